"""Clips as a player shows them, and what is refused instead."""

import itertools
import math
import os
import re
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from av.stream import Disposition
from PIL import Image

from rfl_jax.data.videos import (
    clip_length,
    encode_video,
    first_frame,
    fit_frame,
    frame_size,
    read_clip,
    read_frames,
    to_uint8,
    write_video,
)
from rfl_jax.errors import UserError

SHARED = Path(__file__).parents[3] / "shared"
needs_cases = pytest.mark.skipif(not (SHARED / "cases").is_dir(), reason="no cases from bug reports on this machine")
needs_media = pytest.mark.skipif(not (SHARED / "media").is_dir(), reason="no real clip on this machine")
MATRICES = [  # a b c d of the display matrix: the upright ones, then those turned by right angles
    (s, 0, 0, t) if not turned else (0, s, t, 0) for turned in (0, 1) for s in (1, -1) for t in (1, -1)
]


def scene(count=10, height=48, width=80):
    """Frames without any symmetry, each different."""
    t, y, x = np.mgrid[:count, :height, :width]
    blob = 200 * np.exp(-((x - 15 - 2 * t) ** 2 + (y - 12) ** 2) / 80)
    return np.stack([blob + 20, y * 4, x * 2 + 5 * t], -1).clip(0, 255).astype(np.uint8)


def encode(
    file,
    frames,
    codec="libx264",
    *,
    pix_fmt="yuv420p",
    times=None,
    aspect=None,
    matrix=None,
    options=None,
    **attributes,
):
    """A video of another encoder, with what its container can say of it."""
    with av.open(str(file), "w") as container:
        stream = container.add_stream(codec, rate=16, options={"crf": "8"} if options is None else options)
        stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], pix_fmt
        stream.time_base = stream.codec_context.time_base = Fraction(1, 16)
        for name, value in attributes.items():
            setattr(stream.codec_context, name, value)
        if aspect:
            stream.codec_context.sample_aspect_ratio = aspect
        if matrix:
            a, b, c, d = matrix
            stream.set_display_matrix([a << 16, b << 16, 0, c << 16, d << 16, 0, 0, 0, 1 << 30])
        for i, frame in enumerate(frames):
            source = av.VideoFrame.from_ndarray(
                np.ascontiguousarray(frame), format="rgba" if frame.shape[-1] == 4 else "rgb24"
            )
            picture = source.reformat(
                format=pix_fmt,
                dst_colorspace=attributes.get("colorspace"),
                dst_color_range=attributes.get("color_range"),
            )
            picture.pts, picture.time_base = (times[i] if times else i), Fraction(1, 16)
            container.mux(stream.encode(picture))
        container.mux(stream.encode())
    return file


def decoded(file):
    return np.stack([np.asarray(image) for image in read_frames(file)]).astype(int)


def distance(a, b):
    return np.abs(a.astype(int) - b).max()


def of_ffmpeg(file, *filters):
    """Frames by libav's own filters, which are those of the ffmpeg command."""
    with av.open(str(file)) as container:
        stream = container.streams.video[0]
        graph = av.filter.Graph()
        nodes = [
            graph.add_buffer(template=stream),
            *(graph.add(*each) for each in filters),
            graph.add("scale", "flags=bicubic"),
            graph.add("format", "rgb24"),
            graph.add("buffersink"),
        ]
        graph.link_nodes(*nodes).configure()
        frames = []
        for frame in container.decode(stream):
            graph.vpush(frame)
            frames.append(graph.vpull().to_ndarray())
    return np.stack(frames).astype(int)


def test_clip_lengths_and_sizes():
    assert [clip_length(n, 81) for n in (200, 81, 80, 9, 8, 5)] == [81, 81, 77, 9, 5, 5]
    assert frame_size(1080, 1920, max_pixels=480 * 480, multiple=16) == (352, 640)
    assert frame_size(100, 60, max_pixels=480 * 480, multiple=32) == (96, 32)
    image = Image.fromarray(np.arange(40 * 90 * 3, dtype=np.uint32).astype(np.uint8).reshape(40, 90, 3))
    assert fit_frame(image, 32, 32).shape == (32, 32, 3)


WRITER = """
import sys
import numpy as np
from rfl_jax.data.videos import encode_video
from rfl_jax.memory import keep_freed_memory

keep_freed_memory()
rng = np.random.default_rng(0)
t, y, x = np.mgrid[:13, : int(sys.argv[1]), : int(sys.argv[2])]
frames = np.stack([127 + 120 * np.sin((x + k * t) / 7) * np.cos(y / (5 + k)) for k in range(3)], -1).astype(np.uint8)
found = set()
for _ in range(40):
    # What the encoder's memory held before.
    remains = [np.full(size, rng.integers(256), np.uint8) for size in rng.integers(1000, 400_000, 20)]
    del remains
    found.add(encode_video(frames))
print(len(found))
"""


@pytest.mark.parametrize("size", [(64, 64), (96, 160)])
def test_the_same_frames_are_always_the_same_file(size):
    command = [sys.executable, "-c", WRITER, *map(str, size)]
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout == "1\n"


def test_written_videos_read_back(tmp_path):
    frames = scene(10, 48, 64)
    write_video(tmp_path / "v.mp4", frames)
    clip = read_clip(tmp_path / "v.mp4", num_frames=81, max_pixels=480 * 480, multiple=16)
    assert clip.shape == (9, 48, 64, 3)
    assert np.abs(to_uint8(clip).astype(int) - frames[:9]).mean() < 6
    assert [p.name for p in tmp_path.iterdir()] == ["v.mp4"]


# Presentation.


@pytest.mark.parametrize("matrix", MATRICES)
def test_the_display_matrix_turns_and_mirrors(tmp_path, matrix):
    frames = scene()
    file = encode(tmp_path / "v.mp4", frames, matrix=matrix)
    a, b, c, d = matrix
    shown = frames.swapaxes(1, 2) if b else frames
    shown = shown[:, :, :: (c if b else a)][:, :: (b if b else d)]
    assert np.abs(decoded(file) - shown).mean() < 4
    filters = (
        [("transpose", "cclock_flip")] * bool(b)
        + [("hflip", "")] * (-1 in (a, c))
        + [("vflip", "")] * (-1 in ((b,) if b else (d,)))
    )
    assert distance(decoded(file), of_ffmpeg(file, *filters)) <= 2


def test_other_angles_are_refused(tmp_path):
    frames = scene(6)
    with av.open(str(tmp_path / "v.mp4"), "w") as container:
        stream = container.add_stream("libx264", rate=16)
        stream.height, stream.width, stream.pix_fmt = 48, 80, "yuv420p"
        stream.set_display_rotation(30)
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    with pytest.raises(UserError, match=r"v\.mp4: turned by -?30 degrees, expected right angles"):
        first_frame(tmp_path / "v.mp4")


@pytest.mark.parametrize(("suffix", "aspect", "matrix", "size"), [
    ("mp4", Fraction(16, 15), None, (85, 48)), ("mkv", Fraction(16, 15), None, (85, 48)), ("mp4", Fraction(1, 2), None, (40, 48)),
    ("mp4", Fraction(2), (0, 1, -1, 0), (24, 80)), ("mp4", Fraction(1), None, (80, 48)),
])  # fmt: skip
def test_pixels_become_square(tmp_path, suffix, aspect, matrix, size):
    file = encode(tmp_path / f"v.{suffix}", scene(), aspect=aspect, matrix=matrix)
    assert {image.size for image in read_frames(file)} == {size}


@pytest.mark.parametrize("colorspace", ["bt709", "smpte170m"])
@pytest.mark.parametrize("color_range", ["tv", "pc"])
def test_colours_are_those_that_were_encoded(tmp_path, colorspace, color_range):
    codes = {"bt709": 1, "smpte170m": 6, "tv": 1, "pc": 2}
    patches = np.array([[255, 0, 0], [0, 255, 0], [0, 0, 255], [255, 255, 255], [16, 16, 16], [128, 64, 200]], np.uint8)
    frames = np.broadcast_to(np.repeat(patches, 16, 0)[None, None], (6, 32, 96, 3))
    file = encode(
        tmp_path / "v.mkv", frames, pix_fmt="yuv444p", colorspace=codes[colorspace], color_range=codes[color_range]
    )
    assert distance(decoded(file)[:, :, 8::16], frames[:, :, 8::16]) <= 4


@pytest.mark.parametrize(
    ("codec", "pix_fmt", "suffix"),
    [("libx264", "yuv420p10le", "mp4"), ("libx264", "gray", "mkv"), ("libx264", "yuv422p", "mkv"), ("ffv1", "gray16le", "mkv"), ("ffv1", "yuv444p12le", "mkv"), ("png", "rgb48be", "mov")],
)  # fmt: skip
def test_deep_and_grey_pixels(tmp_path, codec, pix_fmt, suffix):
    frames = scene()
    if pix_fmt.startswith("gray"):
        frames = np.repeat(frames[..., :1], 3, -1)
    file = encode(
        tmp_path / f"v.{suffix}", frames, codec, pix_fmt=pix_fmt, options={}, color_range=2 if pix_fmt == "gray" else 0
    )
    assert np.abs(decoded(file) - frames).mean() < 5
    assert distance(decoded(file), of_ffmpeg(file)) <= 2


def test_odd_sizes(tmp_path):
    frames = scene(6, 47, 81)
    file = encode(tmp_path / "v.mkv", frames, pix_fmt="yuv444p")
    assert decoded(file).shape == (6, 47, 81, 3)
    assert np.abs(decoded(file) - frames).mean() < 4


def test_transparent_frames_lie_over_white(tmp_path):
    frames = np.concatenate([scene(6), np.full((6, 48, 80, 1), 255, np.uint8)], -1)
    frames[:, :24, :, 3] = 0
    file = encode(tmp_path / "v.mov", frames, "png", pix_fmt="rgba", options={})
    assert (decoded(file)[:, :24] == 255).all()
    assert distance(decoded(file)[:, 24:], frames[:, 24:, :, :3]) == 0


def test_frames_come_in_the_order_of_their_times(tmp_path):
    frames, times = scene(), [0, 1, 2, 10, 11, 12, 30, 31, 33, 40]
    file = encode(tmp_path / "v.mp4", frames, times=times, options={"bf": "3", "crf": "8"})
    assert np.abs(decoded(file) - frames).mean() < 4


def copy_packets(source, target, *, since=0, patch=lambda i, data: data, options=None):
    """The packets of a video in another container, without decoding."""
    with av.open(str(source)) as reader, av.open(str(target), "w", options=options or {}) as writer:
        stream = reader.streams.video[0]
        out = writer.add_stream_from_template(stream)
        for i, packet in enumerate(p for p in reader.demux(stream) if p.size):
            copy = av.Packet(patch(i, bytes(packet)))
            copy.pts, copy.dts, copy.duration = packet.pts - since, packet.dts - since, packet.duration
            copy.time_base, copy.is_keyframe, copy.stream = packet.time_base, packet.is_keyframe, out
            writer.mux(copy)
    return target


def test_frames_before_the_edit_lists_start_are_not_shown(tmp_path):
    frames = scene(20)
    file = encode(tmp_path / "whole.mp4", frames, options={"crf": "8", "bf": "0", "g": "50"})
    with av.open(str(file)) as container:
        tick = int(1 / 16 / container.streams.video[0].time_base)
    cut = copy_packets(
        file, tmp_path / "cut.mp4", since=6 * tick, options={"use_editlist": "1", "avoid_negative_ts": "disabled"}
    )
    shown = decoded(cut)
    assert len(shown) == 14
    assert distance(shown, decoded(file)[6:]) == 0


# Which stream is the film.


def with_poster(file, frames, *, disposition=0, poster_size=(64, 96), after=False):
    """A film of which a still picture is another video stream."""
    with av.open(str(file), "w") as container:
        streams = {}
        for name in ("film", "poster") if after else ("poster", "film"):
            streams[name] = container.add_stream({"film": "libx264", "poster": "mjpeg"}[name], rate=16)
        poster, film = streams["poster"], streams["film"]
        film.height, film.width, film.pix_fmt = *frames.shape[1:3], "yuv420p"
        poster.height, poster.width, poster.pix_fmt = *poster_size, "yuvj420p"
        if disposition:
            poster.disposition = disposition
        container.mux(poster.encode(av.VideoFrame.from_ndarray(np.full((*poster_size, 3), 99, np.uint8))))
        container.mux(poster.encode())
        for frame in frames:
            container.mux(film.encode(av.VideoFrame.from_ndarray(frame)))
        container.mux(film.encode())
    return file


@pytest.mark.parametrize("poster_size", [(16, 16), (640, 640)])
@pytest.mark.parametrize(("suffix", "disposition"), [
    ("mkv", 0), ("mkv", Disposition.default), ("mp4", 0), ("mov", Disposition.default), ("mp4", Disposition.attached_pic),
])  # fmt: skip
def test_the_film_is_taken_and_not_its_poster(tmp_path, suffix, poster_size, disposition):
    frames = scene()
    for after in (False, True):
        file = with_poster(
            tmp_path / f"v{after}.{suffix}", frames, disposition=disposition, poster_size=poster_size, after=after
        )
        assert np.abs(decoded(file) - frames).mean() < 8


def test_a_file_of_sound_has_no_film(tmp_path):
    with av.open(str(tmp_path / "sound.mkv"), "w") as container:
        stream = container.add_stream("pcm_s16le", rate=8000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), format="s16", layout="mono")
        frame.rate = 8000
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    with pytest.raises(UserError, match=r"sound\.mkv: no video stream"):
        first_frame(tmp_path / "sound.mkv")


def test_a_film_without_a_decoder_is_refused(tmp_path):
    (tmp_path / "v.mp4").write_bytes(encode_video(scene(6)).replace(b"avc1", b"zzzz").replace(b"avcC", b"zzzC"))
    with pytest.raises(UserError, match=r"v\.mp4: no video stream that can be decoded"):
        first_frame(tmp_path / "v.mp4")


# Names and files.


@pytest.mark.parametrize(
    "name", ["take2:final.mp4", "http:x.mp4", "-i.mp4", "a b%03d.mp4", "映像.mp4", "concat:a|b.mp4"]
)
def test_names_are_names_of_files(tmp_path, name, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path(name).write_bytes(encode_video(scene(6)))
    assert first_frame(name).size == (80, 48)


@pytest.mark.parametrize(
    "text", ["#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\n{}\n#EXT-X-ENDLIST\n", "ffconcat version 1.0\nfile {}\n"]
)
@pytest.mark.parametrize("target", ["v.mp4", "http://127.0.0.1:9/v.mp4"])
def test_what_a_playlist_names_is_not_opened(tmp_path, text, target):
    (tmp_path / "v.mp4").write_bytes(encode_video(scene(6)))
    (tmp_path / "list.mp4").write_text(text.format(target))
    with pytest.raises(UserError, match=r"list\.mp4: expected a readable video"):
        first_frame(tmp_path / "list.mp4")


@pytest.mark.parametrize(
    ("name", "content"), [("text.mp4", b"this is no video"), ("empty.mp4", b""), ("x" * 300 + ".mp4", None)]
)
def test_files_that_are_no_videos_are_refused(tmp_path, name, content):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=f"{name}: expected a readable video"):
        read_clip(tmp_path / name, num_frames=81, max_pixels=480 * 480, multiple=16)


def test_too_short_or_absent_videos_are_refused(tmp_path):
    write_video(tmp_path / "short.mp4", np.zeros((3, 32, 32, 3), np.uint8))
    for name, message in (
        ("short.mp4", "3 frames, expected at least 5"),
        ("absent.mp4", "no such video"),
        ("", "is a folder, expected a video"),
        ("http://127.0.0.1:9/v.mp4", "no such video"),
    ):
        with pytest.raises(UserError, match=message):
            read_clip(tmp_path / name, num_frames=81, max_pixels=480 * 480, multiple=16)


@pytest.mark.parametrize("suffix", ["mp4", "mkv"])
def test_tags_may_be_bytes_that_are_no_text(tmp_path, suffix):
    plain, broken = encode(tmp_path / f"plain.{suffix}", scene(6)), tmp_path / f"broken.{suffix}"
    content = plain.read_bytes()
    assert b"Lavf" in content  # the tag that says who made it
    broken.write_bytes(content.replace(b"Lavf", b"\xff\xfe\x80\xc3"))
    assert distance(decoded(broken), decoded(plain)) == 0


# Damage.

ENCODERS = {
    "h264.mp4": ("libx264", {}),
    "h264.mkv": ("libx264", {"preset": "ultrafast"}),
    "h264-slices.mov": ("libx264", {"tune": "zerolatency", "x264-params": "slices=4"}),
    "h264-open-gop.ts": ("libx264", {"x264-params": "open-gop=1:keyint=8:bframes=3"}),
    "h264-fragments.mp4": ("libx264", {}),
    "hevc.mp4": ("libx265", {"x265-params": "log-level=none"}),
    "hevc-checksums.mkv": ("libx265", {"x265-params": "log-level=none:hash=1"}),
    "vp9.webm": ("libvpx-vp9", {"cpu-used": "8"}),
    "vp8.webm": ("libvpx", {"cpu-used": "8", "auto-alt-ref": "1"}),
    "av1.mp4": ("libsvtav1", {"preset": "12", "svtav1-params": "lp=1"}),
    "mpeg4.mp4": ("mpeg4", {}),
    "mpeg4.avi": ("mpeg4", {"bf": "2"}),
    "mpeg2.ts": ("mpeg2video", {}),
    "mjpeg.mov": ("mjpeg", {}),
    "gif.gif": ("gif", {}),
    "ffv1.mkv": ("ffv1", {"level": "3", "slicecrc": "1"}),
}
PIXELS = {"gif": "rgb8", "mjpeg": "yuvj420p"}
# Of some wrong bits: always, by checksums; mostly, as what follows them cannot be decoded. The others have nothing to notice them
# by (VP8, VP9, motion JPEG, HEVC without checksums, GIF).
CHECKED, MOSTLY = ("hevc-checksums.mkv", "ffv1.mkv"), ("h264.mp4", "h264-slices.mov")


def by(name, folder, count=20):
    codec, options = ENCODERS[name]
    if codec not in av.codecs_available:
        pytest.skip(f"this libav has no {codec}")
    frames = scene(count, 96, 160) // 2 + np.random.default_rng(0).integers(0, 99, (count, 96, 160, 3), np.uint8)
    file = encode(folder / name, frames, codec, pix_fmt=PIXELS.get(codec, "yuv420p"), options=options)
    if "fragments" in name:
        moov = {"movflags": "frag_keyframe+empty_moov"}
        file = copy_packets(encode(folder / "plain.mp4", frames, codec, options=options), folder / name, options=moov)
    return file


@pytest.mark.parametrize("name", ENCODERS)
def test_whole_files_raise_no_alarm(tmp_path, name):
    assert len(decoded(by(name, tmp_path))) == 20


@needs_media
def test_a_real_clip_raises_no_alarm():
    assert len(decoded(SHARED / "media" / "video1.mp4")) == 81


def differs(data, file, good):
    """Whether a damaged file decodes to other pictures, and what is said of it."""
    file.write_bytes(data)
    try:
        got = decoded(file)
    except UserError as error:
        return str(error)
    return len(got) != len(good) or distance(got, good) > 2


def outcomes_of_bit_errors(name, folder, count):
    """What `differs` tells of files with four wrong bits within forty bytes, at random places."""
    file = by(name, folder)
    good, data, random = decoded(file), file.read_bytes(), np.random.default_rng(0)
    outcomes = []
    for at in random.integers(len(data) * 3 // 10, len(data) * 8 // 10, count):
        hurt = bytearray(data)
        for place in range(int(at), int(at) + 40, 10):
            hurt[place] ^= 1 << random.integers(8)
        outcomes.append(differs(bytes(hurt), folder / f"hurt-{name}", good))
    return outcomes


def noticed(outcomes, name):
    return sum(isinstance(outcome, str) and f"hurt-{name}: damaged (" in outcome for outcome in outcomes)


@pytest.mark.parametrize("name", CHECKED)
def test_bit_errors_are_damage(tmp_path, name):
    outcomes = outcomes_of_bit_errors(name, tmp_path, 8)
    assert True not in outcomes
    assert noticed(outcomes, name) >= 7


@pytest.mark.parametrize("name", MOSTLY)
def test_most_bit_errors_of_h264_are_damage(tmp_path, name):
    assert noticed(outcomes_of_bit_errors(name, tmp_path, 64), name) > 32


@pytest.mark.parametrize(
    "name", [n for n in ENCODERS if n.endswith((".mkv", ".webm", ".avi", ".gif", ".ts")) or "fragments" in n]
)
@pytest.mark.parametrize("share", [0.5, 0.9])
def test_files_that_stop_early_are_damage(tmp_path, name, share):
    data = by(name, tmp_path).read_bytes()
    (tmp_path / f"hurt-{name}").write_bytes(data[: int(len(data) * share)])
    for _ in range(2):  # libav's log leaves out what it said last
        with pytest.raises(UserError, match=re.escape(f"hurt-{name}: damaged (")):
            decoded(tmp_path / f"hurt-{name}")


@pytest.mark.parametrize("faststart", [False, True])
@pytest.mark.parametrize("share", [0.5, 0.9])
def test_an_mp4_that_stops_early_is_refused(tmp_path, faststart, share):
    options = {"movflags": "faststart"} if faststart else {}
    file = copy_packets(by("h264.mp4", tmp_path), tmp_path / "v.mp4", options=options)
    file.write_bytes(file.read_bytes()[: math.floor(file.stat().st_size * share)])
    with pytest.raises(UserError, match=r"v\.mp4: damaged" if faststart else r"v\.mp4: expected a readable video"):
        decoded(file)


@needs_cases
def test_reported_files():
    cases = SHARED / "cases"
    upright = decoded(cases / "rotation" / "rot90.mp4")
    assert upright.shape == (20, 320, 576, 3)
    assert distance(upright, of_ffmpeg(cases / "rotation" / "rot90.mp4", ("transpose", "clock"))) <= 2
    assert decoded(cases / "video" / "poster_first.mkv").shape == (20, 576, 320, 3)
    with pytest.raises(UserError, match=r"flipped\.mp4: damaged"):
        decoded(cases / "video" / "flipped.mp4")


def test_readers_do_not_disturb_each_other(tmp_path):
    (tmp_path / "v.mp4").write_bytes(encode_video(scene(6)))
    pairs = list(itertools.zip_longest(read_frames(tmp_path / "v.mp4"), read_frames(tmp_path / "v.mp4")))
    assert len(pairs) == 6
    assert all(np.array_equal(a, b) for a, b in pairs)
    assert av.logging.get_level() is None
