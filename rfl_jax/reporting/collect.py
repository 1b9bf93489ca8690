"""What a run's folder holds, finished or not."""

import base64
import dataclasses
import io
from collections.abc import Mapping
from fractions import Fraction
from typing import Any

import av
import numpy as np
from etils import epath
from PIL import Image

from rfl_jax.data.pyav import fraction, open_video
from rfl_jax.data.videos import encode_video
from rfl_jax.errors import UserError
from rfl_jax.files import read_json, stays_below
from rfl_jax.runs import RunFolder

# Larger videos are scaled down and encoded anew for the page.
EMBEDDED_BYTES, EMBEDDED_SIDE, EMBEDDED_CRF = 400_000, 480, 28
POSTER_QUALITY = 75


@dataclasses.dataclass(frozen=True)
class Run:
    """Attributes:
    folder: of the run.
    config, about: config.json and run.json.
    lines: of metrics.jsonl.
    validation, evaluation, profile: their files' content; None where there is none yet.
    """

    folder: RunFolder
    config: dict[str, Any]
    about: dict[str, Any]
    lines: list[dict[str, Any]]
    validation: dict[str, Any] | None
    evaluation: dict[str, Any] | None
    profile: dict[str, Any] | None

    @property
    def steps(self) -> int:
        """Steps done."""
        return self.lines[-1]["step"] if self.lines else 0

    @property
    def total(self) -> int:
        return self.about.get("steps", self.steps)

    @property
    def samples(self) -> list[epath.Path]:
        """Videos of training, in their order."""
        folder = self.folder.samples
        return sorted(f for f in folder.iterdir() if f.name.endswith(".mp4")) if folder.is_dir() else []

    def evaluation_video(self, name: str) -> epath.Path:
        """A video that evaluation.json names.

        Raises:
            UserError: it lies outside the run's folder, and would come along with a page that is passed on.
        """
        if not stays_below(name):
            raise UserError(f"{self.folder.evaluation}: {name} lies outside the run's folder")
        return self.folder.path / name


def read_run(folder: RunFolder) -> Run:
    """Reads a run as it is now.

    Raises:
        UserError: the folder is no run's, or a file of it cannot be read.
    """
    config = folder.read_config()
    evaluation = _json(folder.evaluation)
    if evaluation and "statistics" not in evaluation:
        raise UserError(
            f"{folder.evaluation}: expected statistics, which earlier releases did not write: "
            f"python -m rfl_jax.evaluate --workdir={folder} makes it anew"
        )
    return Run(
        folder,
        config,
        _json(folder.about) or {},
        [line for _, line in folder.read_lines()],
        _json(folder.validation),
        evaluation,
        _json(folder.profile),
    )


def _json(file: epath.Path) -> dict[str, Any] | None:
    return read_json(file) if file.exists() else None


@dataclasses.dataclass(frozen=True)
class Embedded:
    """Attributes:
    source: a video as a data URL.
    poster: its frame in the middle as one, which stands for it on paper and until it has loaded.
    width, height: in pixels.
    """

    source: str
    poster: str
    width: int
    height: int


def embed(file: epath.Path) -> Embedded:
    """A video for the page, smaller if it is large.

    Raises:
        UserError: there is none, or it cannot be read.
    """
    try:
        content = file.read_bytes()
    except OSError:
        raise UserError(f"{file}: no such video, which evaluation.json names") from None
    try:
        if len(content) > EMBEDDED_BYTES:
            content = _smaller(content)
        poster = _middle(content)
    except (av.FFmpegError, IndexError) as error:
        raise UserError(f"{file}: expected a readable video ({error})") from None
    image = io.BytesIO()
    poster.save(image, "WEBP", quality=POSTER_QUALITY, method=6)
    return Embedded(_url("video/mp4", content), _url("image/webp", image.getvalue()), *poster.size)


def _url(kind: str, content: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def _smaller(content: bytes) -> bytes:
    frames = []
    with open_video(io.BytesIO(content)) as container:
        rate = fraction(container.streams.video[0].average_rate, unknown=Fraction(16))
        for frame in container.decode(video=0):
            image = frame.to_image()
            scale = min(1.0, EMBEDDED_SIDE / max(image.size))
            size = tuple(max(2, round(side * scale) // 2 * 2) for side in image.size)
            frames.append(np.asarray(image.resize(size, Image.Resampling.LANCZOS)))
    return encode_video(np.stack(frames), fps=round(rate), crf=EMBEDDED_CRF)


def _middle(content: bytes) -> Image.Image:
    """Frame n // 2 of n."""
    with open_video(io.BytesIO(content)) as container:
        number = container.streams.video[0].frames // 2
        for i, frame in enumerate(container.decode(video=0)):
            if i == number:
                return frame.to_image()
    raise IndexError("it ends early")


def changed(config: Mapping[str, Any], defaults: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any, bool]]:
    """Every setting by its dotted name, and whether it differs from the default."""
    rows = []
    for name, value in sorted(config.items()):
        if isinstance(value, Mapping):
            rows += changed(value, defaults.get(name, {}), f"{prefix}{name}.")
        else:
            rows.append((prefix + name, value, value != defaults.get(name)))
    return rows
