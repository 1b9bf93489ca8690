"""The sizes of a run's videos."""

from rfl_jax.config import Config
from rfl_jax.errors import UserError
from rfl_jax.models.wan.config import DIT_PRESETS, pixel_multiple


def clip_multiple(cfg: Config) -> int:
    """What heights and widths are multiples of."""
    return pixel_multiple(DIT_PRESETS[cfg.preset])


def video_size(cfg: Config) -> tuple[int, int, int]:
    """Frames, height and width where no clip or image tells them: `data.height` and `data.width`, else the largest
    square of `data.max_pixels`.
    """
    multiple = clip_multiple(cfg)
    side = int(cfg.data.max_pixels**0.5) // multiple * multiple
    return cfg.data.num_frames, cfg.data.height or side, cfg.data.width or side


def clip_settings(cfg: Config) -> dict[str, int]:
    """How `rfl_jax.data.videos.read_clip` brings a clip to size.

    Raises:
        UserError: a height or width that is no multiple.
    """
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
