"""What is computed once for each clip and cached: text features, first-frame conditioning, face pool."""

import dataclasses
import functools
import hashlib
import io
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from flax import nnx
from tqdm import tqdm

from convert import store
from rfl_jax import hosts
from rfl_jax.config import Config
from rfl_jax.data.metadata import Row
from rfl_jax.data.text import PromptTokenizer
from rfl_jax.data.videos import read_clip
from rfl_jax.errors import UserError
from rfl_jax.files import files_below, write_whole
from rfl_jax.models.umt5 import UMT5Encoder
from rfl_jax.models.wan.conditioning import first_frame_condition
from rfl_jax.models.wan.config import DIT_PRESETS
from rfl_jax.models.wan.vae import VAE
from rfl_jax.rewards.face import FaceReward
from rfl_jax.sources import Sources

Sample = dict[str, np.ndarray]
FORMAT = 1  # of the cached files; a new number makes old ones unused


@dataclasses.dataclass(frozen=True)
class Prepared:
    """A clip in the cache.

    Attributes:
        row: where it is listed.
        file: npz with ids, mask, context, y, pool, and judge_pool where a judge was given.
        prefix: for each of its noises an npz with the latents after the cached steps; empty without such a cache.
    """

    row: Row
    file: epath.Path
    prefix: tuple[epath.Path, ...] = ()

    def load(self) -> Sample:
        return read_arrays(self.file)

    def load_prefix(self, index: int) -> np.ndarray:
        """Latents [t, h, w, c] of one noise."""
        return read_arrays(self.prefix[index])["latents"]


class Encoders:
    """The networks that only preparation needs, opened when the first sample asks for them. Dropping this object frees
    them before the DiTs are loaded.

    Args:
        cfg: the run.
        sources: where its weights are.
        judge: folder of a second embedder's ONNX file, whose pool is stored as well; empty for none.
    """

    def __init__(self, cfg: Config, sources: Sources, judge: str = "") -> None:
        self.cfg = cfg
        self.sources = sources
        self.judge = judge
        self.tokenizer = PromptTokenizer(sources.tokenizer, DIT_PRESETS[cfg.preset].text_len)

    @functools.cached_property
    def sample(self) -> Callable[[np.ndarray, str], Sample]:
        """A function from a clip [t, h, w, 3] in [-1, 1] and its prompt to a sample."""
        cfg = self.cfg
        networks: dict[str, Any] = {
            "text": open_text_encoder(cfg, self.sources),
            "vae": store.open_component("vae", self.sources.vae, weights_dtype="float32"),
            "reward": open_reward(cfg, self.sources.reward),
        }
        if self.judge:
            networks["judge"] = open_judge(networks["reward"], self.judge)
        # All weights are arguments: what a jitted function closes over becomes a constant of its program.
        graph, weights = nnx.split(networks)
        tokenize = self.tokenizer
        end = "end_image" in cfg.extra_inputs
        first_frame_only = DIT_PRESETS[cfg.preset].first_frame_in_latents

        @jax.jit
        def encode(weights: nnx.State, video: jax.Array, ids: jax.Array, mask: jax.Array) -> dict[str, jax.Array]:
            networks = nnx.merge(graph, weights)
            vae: VAE = networks["vae"]
            image, last = video[None, 0], video[None, -1] if end else None
            if first_frame_only:
                frames = (video.shape[0] - 1) // vae.cfg.stride[0] + 1
                z = vae.encode(image[:, None])[0]
                y = jnp.pad(z, ((0, frames - 1), (0, 0), (0, 0), (0, 0)))
            else:
                y = first_frame_condition(vae, image, video.shape[0], last)[0]
            out = {"context": networks["text"].context(ids, mask)[0], "y": y}
            out["pool"], out["found"] = networks["reward"].pool(video)
            if "judge" in networks:
                out["judge_pool"], _ = networks["judge"].pool(video)
            return out

        def sample(video: np.ndarray, prompt: str) -> Sample:
            ids, mask = tokenize([prompt])
            out = {k: np.asarray(v.astype(jnp.float32)) for k, v in encode(weights, video, ids, mask).items()}
            return {"ids": ids[0], "mask": mask[0], **out}

        return sample


def open_reward(cfg: Config, folder: str) -> FaceReward:
    """Detector and embedder of an antelopev2 folder.

    Raises:
        UserError: not exactly one SCRFD and one ArcFace file in it.
    """
    return FaceReward(
        store.open_component("scrfd", [detector_file(folder)]),
        store.open_component("arcface", [embedder_file(folder)]),
        cfg.reward,
    )


def open_judge(reward: FaceReward, folder: str) -> FaceReward:
    """The reward's detector with another embedder."""
    embedder = store.open_component("arcface", [embedder_file(folder)])
    return FaceReward(reward.detector, embedder, dataclasses.replace(reward.cfg, channel_order="rgb"))


def open_text_encoder(cfg: Config, sources: Sources) -> UMT5Encoder:
    """The text encoder in the run's dtype."""
    return store.open_component("umt5", sources.text_encoder, weights_dtype=cfg.dtype, dtype=jnp.dtype(cfg.dtype))


DETECTOR_NAMES = ("scrfd*.onnx", "det_*.onnx")
EMBEDDER_NAMES = ("glintr100.onnx", "w600k_*.onnx")


def detector_file(folder: str) -> str:
    """The detector in a folder of antelopev2 files, beside files of other purposes."""
    return _only_file(folder, DETECTOR_NAMES)


def embedder_file(folder: str) -> str:
    """The embedder in a folder of antelopev2 files."""
    return _only_file(folder, EMBEDDER_NAMES)


def _only_file(folder: str, names: Sequence[str]) -> str:
    path = Path(folder)
    if not folder or not path.is_dir():
        raise UserError(f"{folder or 'config.reward_model_path: empty'}: expected a folder of antelopev2 onnx files")
    files = sorted({file for name in names for file in path.glob(name)})
    if len(files) != 1:
        raise UserError(f"{folder}: {len(files)} files named {' or '.join(names)}, expected one")
    return str(files[0])


def prepare(encoders: Encoders, rows: Sequence[Row], cache: epath.Path, *, listed_in: str) -> list[Prepared]:
    """Prepares all rows, taking from the cache what is there.

    Args:
        encoders: of the run; nothing is opened if all rows are cached.
        rows: clips.
        cache: folder of prepared samples.
        listed_in: the csv, for messages.

    Raises:
        UserError: an unusable row under `data.on_bad_row=error`, or none that is usable.
    """
    cfg = encoders.cfg
    base = _settings_hash(cfg, encoders.sources, encoders.judge)
    cache.mkdir(parents=True, exist_ok=True)
    # Every process takes its part of the rows.
    part, parts = jax.process_index(), jax.process_count()
    found: dict[int, str] = {}
    errors: dict[int, str] = {}
    for row in tqdm(rows[part::parts], desc="prepare", disable=None):
        try:
            key = _row_hash(base, row)
            file = cache / f"{key}.npz"
            if not file.exists():
                video = read_clip(row.video, **clip_settings(cfg))
                values = encoders.sample(video, row.prompt)
                if not values.pop("found")[0]:
                    raise UserError(f"{row.video}: no face in the first frame")
                write_arrays(file, values)
            found[row.number] = file.name
        except UserError as error:
            errors[row.number] = str(error)
            if cfg.data.on_bad_row == "error":
                break
    for of_process in _exchange(cache, {"found": found, "errors": errors}):
        found |= {int(number): name for number, name in of_process["found"].items()}
        errors |= {int(number): text for number, text in of_process["errors"].items()}
    if errors and cfg.data.on_bad_row == "error":
        number = min(errors)
        raise UserError(f"{listed_in}: row {number}: {errors[number]}")
    bad = sorted(errors)
    for number in bad if hosts.is_writer() else []:
        tqdm.write(f"{listed_in}: row {number} left out: {errors[number]}")
    prepared = [Prepared(row, cache / found[row.number]) for row in rows if row.number in found]
    if not prepared:
        raise UserError(f"{listed_in}: none of its {len(rows)} rows can be used")
    if bad and hosts.is_writer():
        print(f"{len(bad)} of {len(rows)} rows left out: {', '.join(map(str, bad))}")
    return prepared


def _exchange(cache: epath.Path, mine: dict[str, Any]) -> list[dict[str, Any]]:
    """What every process found, by way of the folder that they share."""
    if jax.process_count() == 1:
        return [mine]
    files = [cache / f".process-{i}.json" for i in range(jax.process_count())]
    files[jax.process_index()].write_text(json.dumps(mine))
    hosts.wait("rows are prepared")
    content = [json.loads(file.read_text()) for file in files]
    hosts.wait("rows are read")
    files[jax.process_index()].unlink()
    return content


def negative_context(cfg: Config, sources: Sources) -> np.ndarray:
    """Text features of the negative prompt [s, d]."""
    text = open_text_encoder(cfg, sources)
    ids, mask = PromptTokenizer(sources.tokenizer, DIT_PRESETS[cfg.preset].text_len)([cfg.sampling.negative_prompt])
    return np.asarray(text.context(jnp.asarray(ids), jnp.asarray(mask))[0].astype(jnp.float32))


def clip_multiple(cfg: Config) -> int:
    """What heights and widths are multiples of: two by two latents make a token."""
    return 32 if DIT_PRESETS[cfg.preset].first_frame_in_latents else 16


def video_size(cfg: Config) -> tuple[int, int, int]:
    """Frames, height and width where no clip or image tells them: `data.height` and `data.width`, else the largest
    square of `data.max_pixels`.
    """
    multiple = clip_multiple(cfg)
    side = int(cfg.data.max_pixels**0.5) // multiple * multiple
    return cfg.data.num_frames, cfg.data.height or side, cfg.data.width or side


def clip_settings(cfg: Config) -> dict[str, int]:
    """What `read_clip` is to make of a clip."""
    multiple = clip_multiple(cfg)
    data = cfg.data
    for key in ("height", "width"):
        if getattr(data, key) % multiple:
            raise UserError(f"config.data.{key}: expected a multiple of {multiple}, got {getattr(data, key)}")
    return {
        "num_frames": data.num_frames,
        "max_pixels": data.max_pixels,
        "multiple": multiple,
        "height": data.height,
        "width": data.width,
    }


def _settings_hash(cfg: Config, sources: Sources, judge: str) -> str:
    """Everything besides the row itself that a sample depends on."""
    settings = {
        "format": FORMAT,
        "clip": clip_settings(cfg),
        "inputs": cfg.extra_inputs,
        "preset": cfg.preset,
        "dtype": cfg.dtype,
        "reward": [cfg.reward.compat, cfg.reward.channel_order, cfg.reward.detector_size],
        "weights": [fingerprint(f) for f in (*sources.text_encoder, *sources.vae, sources.tokenizer)],
        "faces": [
            fingerprint(file)
            for file in (
                detector_file(sources.reward),
                embedder_file(sources.reward),
                *([embedder_file(judge)] if judge else []),
            )
        ],
    }
    return json.dumps(settings, sort_keys=True)


def fingerprint(path: str) -> str:
    """A short hash of a file or folder: names, sizes, and the first and last 64 KiB of each file."""
    digest = hashlib.sha256()
    root = epath.Path(path)
    for file in files_below(root):
        size = file.stat().length
        digest.update(f"{str(file).removeprefix(str(root))}:{size}".encode())
        with file.open("rb") as stream:
            digest.update(stream.read(65536))
            stream.seek(max(0, size - 65536))
            digest.update(stream.read())
    return digest.hexdigest()[:16]


def _row_hash(base: str, row: Row) -> str:
    digest = hashlib.sha256(base.encode())
    digest.update(row.prompt.encode())
    try:
        with row.video.open("rb") as stream:
            while block := stream.read(1 << 20):
                digest.update(block)
    except OSError:
        raise UserError(f"{row.video}: no such video") from None
    return digest.hexdigest()[:32]


def read_arrays(file: epath.Path) -> Sample:
    """The content of an npz."""
    with np.load(io.BytesIO(file.read_bytes())) as content:
        return dict(content)


def write_arrays(file: epath.Path, values: Sample) -> None:
    """An npz, whole or not at all."""
    buffer = io.BytesIO()
    np.savez(buffer, allow_pickle=False, **values)
    write_whole(file, buffer.getvalue())
