"""Video files to frames and back (PyAV), and the size a clip is brought to."""

import collections
import contextlib
import io
import math
import struct
import warnings
from collections.abc import Iterable, Iterator, Sequence
from fractions import Fraction
from pathlib import Path

import av
import av.filter
import av.logging
import numpy as np
from av.container import InputContainer
from av.stream import Disposition
from av.video.stream import VideoStream
from etils import epath
from jaxtyping import Float, UInt8
from PIL import Image, ImageOps

from rfl_jax.data.pyav import fraction, open_video
from rfl_jax.errors import UserError
from rfl_jax.files import write_whole

# The pictures beside a film: covers, posters, thumbnails on the seek bar.
STILLS = Disposition.attached_pic | Disposition.timed_thumbnails | Disposition.still_image
# Damage that libav conceals and tells nobody but its log.
LOGGED_DAMAGE = ("File ended prematurely", "CRC mismatch", "LZW decode failed")

PILLOW_ERRORS = (OSError, ValueError, SyntaxError, RuntimeError, EOFError, struct.error, Image.DecompressionBombError)


def read_frames(path: Path | str) -> Iterator[Image.Image]:
    """All frames of a video as a player shows them, in the order of their times: of the film rather than of a cover,
    turned and mirrored by the display matrix, with square pixels (the width is what changes), between the ends of the edit
    list, over white where they are transparent.

    A decoder that meets bit errors makes pictures up; no such frame is returned where the format can tell. By checksums it
    always can; H.264 notices most bit errors, by what follows them; VP8, VP9, motion JPEG and HEVC without checksums carry
    nothing to notice most of them by.

    Raises:
        UserError: it cannot be read, is damaged, or is turned by less than a right angle.
    """
    path = Path(path)
    try:
        film = _film(path)
        with _open(path) as container:
            stream = container.streams.video[film]
            yield from _upright(path, stream, _whole_frames(path, container, stream))
    except (av.FFmpegError, OSError, ValueError) as error:
        raise UserError(f"{path}: expected a readable video ({_reason(error)})") from None


@contextlib.contextmanager
def _open(path: Path) -> Iterator[InputContainer]:
    if path.is_dir():
        raise UserError(f"{path}: is a folder, expected a video")
    if not path.is_file():
        raise UserError(f"{path}: no such video")
    # Opened here, as libav takes "take2:a.mp4" for a protocol; and what a playlist names is not opened at all.
    options = {"protocol_whitelist": "none"}
    with path.open("rb") as file, open_video(file, options=options) as container:
        yield container


def _reason(error: Exception) -> str:
    return (error.strerror if isinstance(error, OSError) else None) or str(error)


def _film(path: Path) -> int:
    """Which video stream is the film: the default, then the largest, of those that have more than one frame."""
    with _open(path) as container:
        streams = [s for s in container.streams.video if s.codec_context and not s.disposition & STILLS]
        if not streams:
            raise UserError(f"{path}: no video stream that can be decoded")
        streams.sort(key=lambda s: (not s.disposition & Disposition.default, -s.width * s.height))
        packets = collections.Counter()
        if len(streams) > 1:
            for packet in container.demux(streams):
                packets[packet.stream_index] += packet.size > 0
                if all(packets[s.index] > 1 for s in streams):
                    break
        film = next((s for s in streams if packets[s.index] > 1), streams[0])
        return container.streams.video.index(film)


def _whole_frames(path: Path, container: InputContainer, stream: VideoStream) -> Iterator[av.VideoFrame]:
    """Decodes; raises `UserError` in place of the first frame that is not as it was encoded."""
    context = stream.codec_context
    # With more threads damage is found later or not at all, depending on the machine.
    context.thread_count = 1
    # H.264 marks its concealed frames; there "explode" would refuse files that were only cut at another place.
    context.options = {"err_detect": "crccheck" if context.name == "h264" else "crccheck+explode"}
    packets = container.demux(stream)
    while True:
        try:
            with _libav_log() as log:
                packet = next(packets, None)
                frames = [] if packet is None else packet.decode()
        except av.FFmpegError as error:
            raise UserError(f"{path}: damaged ({_reason(error)}), expected a whole video") from None
        if packet is None:
            return
        logged = [text.strip() for _, _, text in log if any(damage in text for damage in LOGGED_DAMAGE)]
        if logged or packet.is_corrupt or any(frame.is_corrupt for frame in frames):
            raise UserError(f"{path}: damaged ({', '.join(logged) or 'bit errors'}), expected a whole video")
        yield from frames


@contextlib.contextmanager
def _libav_log() -> Iterator[list[tuple[int, str, str]]]:
    """This thread's errors in libav, which is silent otherwise."""
    before = av.logging.get_level(), av.logging.get_skip_repeated()
    av.logging.set_level(av.logging.ERROR)
    av.logging.set_skip_repeated(False)
    try:
        with av.logging.Capture() as log:
            yield log
    finally:
        av.logging.set_level(before[0])
        av.logging.set_skip_repeated(before[1])


def _upright(path: Path, stream: VideoStream, frames: Iterable[av.VideoFrame]) -> Iterator[Image.Image]:
    """Frames to pictures by a graph of libav's filters, the one the ffmpeg command builds."""
    graph, graph_of = None, None
    for frame in frames:
        data = frame.side_data.get("DISPLAYMATRIX")
        matrix = (1, 0, 0, 0, 1, 0, 0, 0, 1) if data is None else tuple(np.frombuffer(data, np.int32).tolist())
        kind = (frame.width, frame.height, frame.format.name, frame.colorspace, frame.color_range, matrix)
        if graph is None or kind != graph_of:
            aspect = fraction(stream.sample_aspect_ratio, unknown=Fraction(1))
            graph, graph_of = _upright_graph(path, frame, matrix, aspect), kind
        graph.vpush(frame)
        yield _over_white(Image.fromarray(graph.vpull().to_ndarray()))


def _upright_graph(path: Path, frame: av.VideoFrame, matrix: Sequence[int], aspect: Fraction) -> av.filter.Graph:
    # [x' y'] = [x y] [[a b] [c d]]: the picture is transposed or not, then mirrored along each axis or not.
    a, b, _, c, d = matrix[:5]
    width, height = frame.width, frame.height
    turned = abs(b) + abs(c) > abs(a) + abs(d)
    off_axis, on_axis = (abs(a) + abs(d), abs(b) + abs(c)) if turned else (abs(b) + abs(c), abs(a) + abs(d))
    if off_axis > on_axis * math.tan(math.radians(1)):
        raise UserError(f"{path}: turned by {math.degrees(math.atan2(b, a)):.0f} degrees, expected right angles")
    across, down = (c, b) if turned else (a, d)
    if turned:
        width, height, aspect = height, width, 1 / aspect
    filters = [("transpose", "cclock_flip")] * turned + [("hflip", "")] * (across < 0) + [("vflip", "")] * (down < 0)
    filters.append(("scale", f"{max(round(width * aspect), 1)}:{height}:flags=bicubic"))
    transparent = frame.format.has_palette or any(c.is_alpha for c in frame.format.components)
    filters.append(("format", "rgba" if transparent else "rgb24"))
    graph = av.filter.Graph()
    settings = {"colorspace": int(frame.colorspace), "range": int(frame.color_range)}
    source = graph.add(
        "buffer",
        video_size=f"{frame.width}x{frame.height}",
        pix_fmt=frame.format.name,
        time_base=str(fraction(frame.time_base, unknown=Fraction(1, 1000))),
        **{name: str(value) for name, value in settings.items()},
    )
    graph.link_nodes(source, *(graph.add(*each) for each in filters), graph.add("buffersink")).configure()
    return graph


def _over_white(image: Image.Image) -> Image.Image:
    """RGB, with white where the picture is transparent."""
    if not image.has_transparency_data:
        return image.convert("RGB")
    white = Image.new("RGBA", image.size, "white")
    return Image.alpha_composite(white, image.convert("RGBA")).convert("RGB")


def read_image(path: Path | str) -> Image.Image:
    """A picture in RGB, upright by its EXIF orientation; the first frame of an animation; over white where transparent;
    16-bit grey rounded to 8 bits.

    Raises:
        UserError: no such file, not a whole picture, pixels of 32 bits (whose white is unknown), or too large.
    """
    try:
        # Pillow warns of what it can do without; what is twice as large as what it warns of it refuses.
        with (
            warnings.catch_warnings(action="ignore"),
            Image.open(path) as image,
        ):
            if image.format == "PNG":
                # Its checksums are not looked at otherwise; what was looked at cannot be decoded.
                with Image.open(path) as other:
                    other.verify()
            upright = ImageOps.exif_transpose(image)
            if upright.mode in ("I", "F") or (upright.mode.startswith("I;16") and upright.has_transparency_data):
                raise UserError(f"{path}: pixels of mode {upright.mode}, expected 8 or 16 bits a channel")
            if upright.mode.startswith("I;16"):
                return Image.fromarray(np.rint(np.asarray(upright) / 257).astype(np.uint8)).convert("RGB")
            return _over_white(upright)
    except FileNotFoundError:
        raise UserError(f"{path}: no such image") from None
    except IsADirectoryError:
        raise UserError(f"{path}: is a folder, expected an image") from None
    except PILLOW_ERRORS as error:
        raise UserError(f"{path}: expected a readable image ({_reason(error)})") from None


def first_frame(path: Path | str) -> Image.Image:
    """The first frame of a video.

    Raises:
        UserError: unreadable, damaged, or without frames.
    """
    for image in read_frames(path):
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
        UserError: unreadable, damaged, fewer than 5 frames, or smaller than one multiple.
    """
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
    """An H.264 mp4, the same for the same frames.

    Args:
        frames: of even height and width.
        fps: frames a second.
        crf: quality, 0 (best) to 51.
    """
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        # Looking ahead, libx264 reads beyond the rows of its smaller pictures, so that what it decides depends on what the
        # process had in that memory before. Without that the same frames always give the same file.
        options = {"crf": str(crf), "x264-params": "rc-lookahead=0:bframes=0"}
        stream = container.add_stream("libx264", rate=Fraction(fps), options=options)
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
