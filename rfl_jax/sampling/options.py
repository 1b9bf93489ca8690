"""What is asked for when videos are sampled: how, and of what."""

import dataclasses
from typing import Any

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from rfl_jax.config import Config
from rfl_jax.data.sizes import clip_multiple
from rfl_jax.errors import UserError
from rfl_jax.sampling.solvers import SOLVERS

Video = UInt8[np.ndarray, "t h w 3"]


@dataclasses.dataclass(frozen=True)
class Options:
    """How videos are sampled.

    Attributes:
        steps: denoising steps.
        shift: of the sigma schedule.
        guidance: classifier-free guidance scales of the high-noise and of the low-noise expert; 1 is none.
        negative_prompt: what guidance steers away from.
        solver: "euler" (as in training) or "unipc".
        frames: of a video, 4n+1.
        height, width: 0 takes the first frame's shape under `data.max_pixels`.
    """

    steps: int
    shift: float
    guidance: tuple[float, float]
    negative_prompt: str
    solver: str
    frames: int
    height: int
    width: int


def options_of(cfg: Config, **changes: Any) -> Options:
    """The options of a run's configuration, as changed.

    Raises:
        UserError: a value that makes no sense, by its name.
    """
    scale = cfg.sampling.guidance_scale
    found = Options(
        steps=cfg.num_inference_steps,
        shift=cfg.sampling.shift,
        guidance=(scale, scale),
        negative_prompt=cfg.sampling.negative_prompt,
        solver="euler",
        frames=cfg.data.num_frames,
        height=cfg.data.height,
        width=cfg.data.width,
    )
    found = dataclasses.replace(found, **{name: value for name, value in changes.items() if value is not None})
    multiple = clip_multiple(cfg)
    for name, right, expected in (
        ("steps", found.steps >= 1, "at least 1"),
        ("shift", found.shift > 0, "a positive number"),
        ("solver", found.solver in SOLVERS, f"one of {', '.join(SOLVERS)}"),
        ("frames", found.frames >= 1 and found.frames % 4 == 1, "4n+1"),
        ("height", found.height >= 0 and found.height % multiple == 0, f"a multiple of {multiple}"),
        ("width", found.width >= 0 and found.width % multiple == 0, f"a multiple of {multiple}"),
        ("height", bool(found.height) == bool(found.width), "height and width both, or neither"),
    ):
        if not right:
            raise UserError(f"{name}: expected {expected}, got {getattr(found, name)}")
    return found


@dataclasses.dataclass(frozen=True)
class Request:
    """One video.

    Attributes:
        prompt: caption.
        image: first frame; None for text-to-video.
        end_image: last frame, where `extra_inputs` names it.
        seed: of its noise.
    """

    prompt: str
    image: Image.Image | None = None
    end_image: Image.Image | None = None
    seed: int = 0
