"""Metadata, clips, and the order of samples."""

import io

import numpy as np
import pytest
from etils import epath
from PIL import Image

from rfl_jax.data.dataset import make_iterator
from rfl_jax.data.metadata import Row, read_metadata
from rfl_jax.data.prepare import Prepared
from rfl_jax.data.videos import clip_length, fit_frame, frame_size, read_clip, to_uint8, write_video
from rfl_jax.errors import UserError


def test_csv_with_byte_order_mark_quotes_and_commas(tmp_path):
    file = tmp_path / "metadata.csv"
    file.write_text('\ufeffvideo,prompt,other\na.mp4,"A ""face"", smiling",1\nsub/b.mp4,plain,2\n', encoding="utf-8")
    rows = read_metadata(file)
    assert rows == [Row(2, tmp_path / "a.mp4", 'A "face", smiling'), Row(3, tmp_path / "sub/b.mp4", "plain")]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("video,text\na.mp4,x\n", "column prompt is missing"),
        ("video,prompt\n", "no rows"),
        ("video,prompt\na.mp4\n", "row 2: expected a video and a prompt"),
        ("video,prompt\n,x\n", "row 2: expected a video and a prompt"),
        (b"video,prompt\n\xff\xfe,x\n", "expected a UTF-8 csv"),
        ('video,prompt\na.mp4,"never closed\n', "expected a UTF-8 csv"),
    ],
)
def test_bad_csv_is_refused(tmp_path, content, message):
    file = tmp_path / "metadata.csv"
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=message):
        read_metadata(file)


def test_clip_lengths_and_sizes():
    assert [clip_length(n, 81) for n in (200, 81, 80, 9, 8, 5)] == [81, 81, 77, 9, 5, 5]
    assert frame_size(1080, 1920, max_pixels=480 * 480, multiple=16) == (352, 640)
    assert frame_size(100, 60, max_pixels=480 * 480, multiple=32) == (96, 32)
    image = Image.fromarray(np.arange(40 * 90 * 3, dtype=np.uint32).astype(np.uint8).reshape(40, 90, 3))
    assert fit_frame(image, 32, 32).shape == (32, 32, 3)


def test_written_videos_read_back(tmp_path):
    y, x = np.mgrid[:48, :64]
    frames = np.stack([np.stack([x * 3, y * 4, 0 * x + 20 * t], -1) for t in range(10)]).astype(np.uint8)
    write_video(tmp_path / "v.mp4", frames)
    clip = read_clip(tmp_path / "v.mp4", num_frames=81, max_pixels=480 * 480, multiple=16)
    assert clip.shape == (9, 48, 64, 3)
    assert np.abs(to_uint8(clip).astype(int) - frames[:9]).mean() < 6
    assert [p.name for p in tmp_path.iterdir()] == ["v.mp4"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [("text.mp4", b"this is no video", "expected a readable video"), ("empty.mp4", b"", "expected a readable video")],
)
def test_files_that_are_no_videos_are_refused(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=f"{name}: {message}"):
        read_clip(tmp_path / name, num_frames=81, max_pixels=480 * 480, multiple=16)


def test_too_short_or_absent_videos_are_refused(tmp_path):
    write_video(tmp_path / "short.mp4", np.zeros((3, 32, 32, 3), np.uint8))
    with pytest.raises(UserError, match=r"short\.mp4: 3 frames, expected at least 5"):
        read_clip(tmp_path / "short.mp4", num_frames=81, max_pixels=480 * 480, multiple=16)
    with pytest.raises(UserError, match=r"absent\.mp4: no such video"):
        read_clip(tmp_path / "absent.mp4", num_frames=81, max_pixels=480 * 480, multiple=16)


def fake_prepared(tmp_path, count):
    prepared = []
    for i in range(count):
        buffer = io.BytesIO()
        np.savez(buffer, y=np.full((2, 3), i, np.float32), pool=np.zeros((1, 2), np.float32))
        file = tmp_path / f"{i}.npz"
        file.write_bytes(buffer.getvalue())
        prepared.append(Prepared(Row(i + 2, tmp_path / "v.mp4", ""), epath.Path(file)))
    return prepared


def test_samples_are_shuffled_by_seed_and_resumable(tmp_path):
    prepared = fake_prepared(tmp_path, 6)

    def order(seed, count):
        iterator = make_iterator(prepared, ["y", "pool"], batch=2, seed=seed, noises=0)
        return [next(iterator)["sample"].tolist() for _ in range(count)]

    first = order(0, 6)
    assert first == order(0, 6)
    assert first != order(1, 6)
    for epoch in (first[:3], first[3:]):
        assert sorted(i for batch in epoch for i in batch) == list(range(6))
    assert first[:3] != first[3:]

    singles = make_iterator(prepared, ["y"], batch=1, seed=0, noises=2)
    assert sorted(int(next(singles)["sample"][0]) for _ in range(6)) == list(range(6))
    iterator = make_iterator(prepared, ["y"], batch=2, seed=0, noises=2)
    for _ in range(4):
        next(iterator)
    state = iterator.get_state()
    again = make_iterator(prepared, ["y"], batch=2, seed=0, noises=2)
    again.set_state(state)
    assert [next(again)["sample"].tolist() for _ in range(2)] == first[4:]


@pytest.mark.parametrize(("noises", "want"), [(0, [0, 1, 2, 3, 4]), (2, [0, 1, 0, 1, 0]), (1, [0] * 5)])
def test_every_epoch_takes_a_samples_next_noise(tmp_path, noises, want):
    iterator = make_iterator(fake_prepared(tmp_path, 6), ["y"], batch=3, seed=0, noises=noises)
    for index in want:
        for _ in range(2):
            assert next(iterator)["noise_index"].tolist() == [index] * 3
