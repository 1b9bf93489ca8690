"""Video files to frames and back (PyAV), and the size a clip is brought to."""

import io
import math
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from etils import epath
from jaxtyping import Float, UInt8
from PIL import Image, ImageOps

from rfl_jax.errors import UserError
from rfl_jax.files import write_whole


def read_frames(path: Path) -> Iterator[Image.Image]:
    """All frames of a video.

    Raises:
        UserError: it cannot be read.
    """
    try:
        with av.open(str(path)) as container:
            if not container.streams.video:
                raise UserError(f"{path}: no video stream")
            for frame in container.decode(video=0):
                yield frame.to_image()
    except (av.FFmpegError, OSError) as error:
        raise UserError(f"{path}: expected a readable video ({error})") from None


def read_image(path: Path | str) -> Image.Image:
    """A picture, upright.

    Raises:
        UserError: no such file, or not a picture.
    """
    try:
        with Image.open(path) as image:
            return ImageOps.exif_transpose(image.convert("RGB") if image.mode not in ("RGB", "RGBA") else image)
    except FileNotFoundError:
        raise UserError(f"{path}: no such image") from None
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        raise UserError(f"{path}: expected a readable image ({error})") from None


def first_frame(path: Path | str) -> Image.Image:
    """The first frame of a video.

    Raises:
        UserError: unreadable, or without frames.
    """
    if not Path(path).is_file():
        raise UserError(f"{path}: no such video")
    for image in read_frames(Path(path)):
        return image
    raise UserError(f"{path}: 0 frames, expected at least one")


def clip_length(available: int, longest: int) -> int:
    """Frames taken of a clip: at most `longest`, cut to 4n+1."""
    return (min(available, longest) - 1) // 4 * 4 + 1


def frame_size(height: int, width: int, *, max_pixels: int, multiple: int) -> tuple[int, int]:
    """Size under `max_pixels` with the same aspect, in multiples (DiffSynth ImageCropAndResize)."""
    if height * width > max_pixels:
        scale = math.sqrt(max_pixels / (height * width))
        height, width = int(height * scale), int(width * scale)
    return height // multiple * multiple, width // multiple * multiple


def fit_frame(image: Image.Image, height: int, width: int) -> UInt8[np.ndarray, "h w 3"]:
    """Scales an image to cover the size (antialiased bilinear) and crops its centre."""
    scale = max(width / image.width, height / image.height)
    size = (max(round(image.width * scale), width), max(round(image.height * scale), height))
    image = image.convert("RGB").resize(size, Image.Resampling.BILINEAR)
    left, top = round((size[0] - width) / 2), round((size[1] - height) / 2)
    return np.asarray(image.crop((left, top, left + width, top + height)))


def read_clip(
    path: Path | str, *, num_frames: int, max_pixels: int, multiple: int, height: int = 0, width: int = 0
) -> Float[np.ndarray, "t h w 3"]:
    """The first frames of a video in [-1, 1].

    Args:
        path: video file.
        num_frames: frames at most, 4n+1.
        max_pixels: height * width at most, where no size is given.
        multiple: what height and width are multiples of.
        height, width: size to bring the clip to; 0 derives it from the clip.

    Raises:
        UserError: unreadable, fewer than 5 frames, or smaller than one multiple.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such video")
    frames: list[np.ndarray] = []
    for image in read_frames(path):
        if not frames and not (height and width):
            size = (image.height, image.width)
            height, width = frame_size(*size, max_pixels=max_pixels, multiple=multiple)
            if not height or not width:
                raise UserError(f"{path}: {size[1]}x{size[0]} pixels, expected at least {multiple} each way")
        frames.append(fit_frame(image, height, width))
        if len(frames) == num_frames:
            break
    if len(frames) < 5:
        raise UserError(f"{path}: {len(frames)} frames, expected at least 5")
    return np.stack(frames[: clip_length(len(frames), num_frames)]).astype(np.float32) / 127.5 - 1


def encode_video(frames: UInt8[np.ndarray, "t h w 3"], *, fps: int = 16, crf: int = 12) -> bytes:
    """An H.264 mp4.

    Args:
        frames: of even height and width.
        fps: frames a second.
        crf: quality, 0 (best) to 51.
    """
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=Fraction(fps), options={"crf": str(crf)})
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        for frame in frames:
            for packet in stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")):
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)
    return buffer.getvalue()


def write_video(path: Path | epath.Path, frames: UInt8[np.ndarray, "t h w 3"], *, fps: int = 16) -> None:
    """Writes an H.264 mp4, whole or not at all."""
    write_whole(path, encode_video(frames, fps=fps))


def to_uint8(frames: Float[np.ndarray, "t h w 3"]) -> UInt8[np.ndarray, "t h w 3"]:
    """[-1, 1] to 0..255."""
    return np.clip(np.rint((np.asarray(frames, np.float32) + 1) * 127.5), 0, 255).astype(np.uint8)
