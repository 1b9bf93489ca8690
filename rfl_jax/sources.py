"""Where a run's weights are: the original's `model_paths`, or files fetched from the Hugging Face hub."""

import dataclasses
from pathlib import Path

from etils import epath

from rfl_jax.config import Config
from rfl_jax.errors import UserError
from rfl_jax.fetch import fetch
from rfl_jax.files import parse_json
from rfl_jax.models.wan.config import DIT_PRESETS

ORDER = ("high_noise_model", "low_noise_model", "text encoder", "vae")
TOKENIZER_REPOSITORY = "Wan-AI/Wan2.1-T2V-1.3B"
TOKENIZER_FILE = "google/umt5-xxl/tokenizer.json"


@dataclasses.dataclass(frozen=True)
class Sources:
    """Files (or a folder of converted weights) of each network.

    Attributes:
        dit: of the high-noise expert, or of the only one.
        dit2: of the low-noise expert; empty where one network serves all steps.
        reward: folder of the face networks.
    """

    dit: list[str]
    dit2: list[str]
    text_encoder: list[str]
    vae: list[str]
    tokenizer: str
    reward: str

    def files(self, network: str) -> list[str]:
        """The files of "dit", "dit2", "text_encoder" or "vae"."""
        return getattr(self, network)


def experts_of(cfg: Config) -> int:
    """How many DiTs the preset has."""
    return 1 if DIT_PRESETS[cfg.preset].boundary is None else 2


def find_sources(cfg: Config, *, experts: int) -> Sources:
    """Resolves the configuration's paths, fetching from the hub what it names there.

    Args:
        cfg: `model_paths` is a JSON list in the order of `ORDER` (each a path or a list of shards), or a file that
            holds one; `model_id_with_origin_paths` has `org/name:pattern`, in the same order.
        experts: 2, or 1 where one network serves all steps (then the second entry is absent).
    """
    names = ORDER if experts == 2 else ("model", *ORDER[2:])
    if cfg.model_paths:
        entries = [[file for source in entry for file in fetch(source)] for entry in _paths(cfg.model_paths)]
    elif cfg.model_id_with_origin_paths:
        entries = [fetch(f"hub:{item}") for item in cfg.model_id_with_origin_paths]
    else:
        raise UserError("config.model_paths: empty, expected a JSON list of " + ", ".join(names))
    if len(entries) != len(names):
        raise UserError(f"config.model_paths: {len(entries)} entries, expected {len(names)}: {', '.join(names)}")
    for name, entry in zip(names, entries, strict=True):
        for file in entry:
            if not epath.Path(file).exists():
                raise UserError(f"config.model_paths: {file}: no such file or folder, expected the {name}")
    tokenizer = cfg.tokenizer_path or fetch(f"hub:{TOKENIZER_REPOSITORY}:{TOKENIZER_FILE}")[0]
    first, *middle = entries[: len(entries) - 2]
    return Sources(first, middle[0] if middle else [], entries[-2], entries[-1], tokenizer, cfg.reward_model_path)


def _paths(text: str) -> list[list[str]]:
    where = "config.model_paths"
    if not text.lstrip().startswith("["):
        where = text
        try:
            return _entries(Path(text).read_bytes(), where)
        except (OSError, ValueError):  # ValueError: a NUL byte in a path
            raise UserError(
                f"config.model_paths: {where}: no such file, expected a JSON list or a file of one"
            ) from None
    return _entries(text, where)


def _entries(text: str | bytes, where: str) -> list[list[str]]:
    out = []
    for entry in parse_json(text, where, list):
        files = entry if isinstance(entry, list) else [entry]
        if not files or not all(isinstance(f, str) for f in files):
            raise UserError(f"{where}: {entry!r}: expected a path or a list of paths")
        out.append(files)
    return out
