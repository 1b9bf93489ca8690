"""The moving picture of a run: the clips that gained the most, real clip, before and after side by side, in time."""

import json
import re

import numpy as np
import pytest
from PIL import Image

from rfl_jax.reporting.animation import BAR, GAP
from tests.reporting.conftest import CLIPS, FRAMES, SIZE, moving, report


def frames(file):
    """Its pictures [t, h, w, 3] and their durations in milliseconds."""
    found, durations = [], []
    with Image.open(file) as image:
        for i in range(image.n_frames):
            image.seek(i)
            found.append(np.asarray(image.convert("RGB"), np.float32))
            durations.append(image.info["duration"])
    return np.stack(found), durations


@pytest.mark.parametrize("suffix", ["gif", "webp"])
def test_the_clips_that_gain_most_are_shown_as_they_move(folder, tmp_path, suffix):
    out = tmp_path / f"run.{suffix}"
    done = report(folder, "-o", out, "--gallery=2")
    assert done.returncode == 0, done.stderr
    assert re.match(rf"{re.escape(str(out))}: \d\.\d MB\n", done.stdout)
    found, durations = frames(out)
    side = 160
    assert found.shape == (FRAMES, BAR + 2 * (side + GAP) - GAP, 3 * (side + GAP) - GAP, 3)
    # GIFs count hundredths of a second.
    assert durations == [120 if suffix == "gif" else 125] * (FRAMES - 1) + [1000]
    clips = json.loads((folder / "evaluation.json").read_text())["clips"]
    gains = [clip["tuned"]["judge_sim"] - clip["base"]["judge_sim"] for clip in clips]
    order = sorted(range(CLIPS), key=lambda i: -gains[i])
    for row, clip in enumerate(order[:2]):
        for column, (seed, speed) in enumerate(((clip, 1), (clip, 1), (clip + 11, 0.5))):
            drawn = moving(seed, speed)[0]
            top, left = BAR + row * (side + GAP), column * (side + GAP)
            cell = found[:, top : top + side, left : left + side]
            for t in (0, FRAMES - 1):
                small = np.asarray(Image.fromarray(cell[t].astype(np.uint8)).resize((SIZE, SIZE)), np.float32)
                assert np.abs(small - drawn[t]).mean() < 20, (row, column, t)


def test_what_cannot_be_shown_is_refused_in_one_line(refused, folder, tmp_path):
    out = tmp_path / "run.webp"
    assert refused(folder, "-o", out, "--gallery=0") == "report: --gallery: expected a number of at least 1, got 0\n"
    (folder / "evaluation" / "000_base.mp4").write_bytes(b"no video")
    assert "000_base.mp4: expected a readable video" in refused(folder, "-o", out, f"--gallery={CLIPS}")
    (folder / "evaluation.json").unlink()
    assert "evaluation.json: no such file, expected a run that was evaluated" in refused(folder, "-o", out)
    assert not out.exists()
