"""Where a run's weights are: the original's `model_paths`, or files fetched from the Hugging Face hub."""

import dataclasses
import fnmatch
import hashlib
import json
import os
from pathlib import Path, PurePosixPath

from etils import epath
from huggingface_hub import HfApi, hf_hub_download
from tqdm import tqdm

from convert.readers import PICKLES
from rfl_jax.config import Config
from rfl_jax.errors import UserError
from rfl_jax.files import is_remote
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
        reward: folder of antelopev2 onnx files.
    """

    dit: list[str]
    dit2: list[str]
    text_encoder: list[str]
    vae: list[str]
    tokenizer: str
    reward: str


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
            text = Path(text).read_text()
        except OSError:
            raise UserError(
                f"config.model_paths: {where}: no such file, expected a JSON list or a file of one"
            ) from None
    try:
        entries = json.loads(text)
    except ValueError as error:
        raise UserError(f"{where}: expected a JSON list ({error})") from None
    if not isinstance(entries, list):
        raise UserError(f"{where}: expected a JSON list")
    out = []
    for entry in entries:
        files = entry if isinstance(entry, list) else [entry]
        if not files or not all(isinstance(f, str) for f in files):
            raise UserError(f"{where}: {entry!r}: expected a path or a list of paths")
        out.append(files)
    return out


def fetch(source: str) -> list[str]:
    """Local files of a source: the source itself; `hub:org/name[:pattern]` and checkpoints in buckets are fetched once
    into the user's cache. From the hub a broken download goes on, from a bucket it begins anew.

    Args:
        source: path, `gs://` path, or hub reference. A pattern is of file names with folders; without one all weights
            at the top of the repository are meant. HF_ENDPOINT names another hub.

    Raises:
        UserError: it names nothing, or cannot be fetched.
    """
    if source.startswith("hub:"):
        return _from_hub(source.removeprefix("hub:"))
    if is_remote(epath.Path(source)) and source.endswith((".safetensors", ".index.json", *PICKLES)):
        return _from_bucket(epath.Path(source))
    return [source]


def _from_hub(item: str) -> list[str]:
    repository, _, pattern = item.partition(":")
    if repository.count("/") != 1:
        raise UserError(f"{item}: expected org/name:pattern")
    try:
        listed = HfApi().list_repo_files(repository)
        files = [f for f in listed if fnmatch.fnmatch(f, pattern)] if pattern else [f for f in listed if _is_weight(f)]
        if not files:
            raise UserError(f"{repository}: no file matches {pattern or '*.safetensors'}")
        # What a network's sizes are read from lies beside its weights.
        beside = {str(PurePosixPath(f).with_name("config.json")) for f in files} & set(listed)
        for f in sorted(beside - set(files)):
            hf_hub_download(repository, f)
        found = [hf_hub_download(repository, f) for f in sorted(files)]
    except UserError:
        raise
    except Exception as error:  # the hub's library raises its own errors, its transport's and the system's
        line = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{item}: cannot be fetched from the hub ({line})") from None
    indexes = [f for f in found if f.endswith(".safetensors.index.json")]
    return indexes if len(indexes) == 1 else [f for f in found if not f.endswith("config.json")]


def _is_weight(name: str) -> bool:
    return "/" not in name and name.endswith((".safetensors", ".safetensors.index.json"))


def _from_bucket(source: epath.Path) -> list[str]:
    """A copy in the user's cache; with an index its shards as well."""
    folder = Path(os.environ.get("RFL_JAX_CACHE", Path.home() / ".cache" / "rfl_jax")) / "buckets"
    base = folder / hashlib.sha256(str(source.parent).encode()).hexdigest()[:16]
    try:
        files = [source]
        if source.name.endswith(".index.json"):
            names = set(json.loads(source.read_text())["weight_map"].values())
            files += [source.parent / PurePosixPath(name).name for name in sorted(names)]
        config = source.parent / "config.json"
        for file in [*files, *([config] if config.exists() else [])]:
            _copy(file, base / file.name)
    except (OSError, ValueError, KeyError, AttributeError, RuntimeError) as error:
        line = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{source}: cannot be fetched ({line})") from None
    return [str(base / source.name)]


def _copy(file: epath.Path, target: Path) -> None:
    there = file.stat()
    size = there.length
    if target.exists() and target.stat().st_size == size and target.stat().st_mtime >= there.mtime:
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    aside = target.with_name(f".{target.name}.tmp")
    bar = tqdm(total=size, unit="B", unit_scale=True, desc=file.name, disable=None)
    with bar, file.open("rb") as source, aside.open("wb") as copy:
        while block := source.read(1 << 24):
            copy.write(block)
            bar.update(len(block))
    aside.replace(target)
