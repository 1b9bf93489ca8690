"""Figures of a video measure what they say; intervals, tests and the alarm are those of their definitions."""

import dataclasses

import numpy as np
import pytest
from scipy import stats

from rfl_jax.config import EvalSection
from rfl_jax.evaluation.measures import MEASURES, Scored, copying, dynamics, flicker, means, motion, sharpness
from rfl_jax.evaluation.statistics import compare, interval
from rfl_jax.training.validation import alarm, without_progress

FACE = np.array([[-10.0, -8], [10, -8], [0, 2], [-8, 12], [8, 12]]) + 40


def frames(*changes):
    """Points of a face that starts as it is and is changed in every later frame."""
    return np.stack([FACE, *changes])


def seen(count):
    return np.ones(count, bool)


def test_motion_counts_neighbouring_frames_with_a_face():
    kps = np.zeros((4, 5, 2))
    kps[1:] += 2
    kps[3] += 4
    assert motion(kps, np.array([1, 1, 1, 1], bool)) == pytest.approx(2)
    assert motion(kps, np.array([1, 1, 1, 0], bool)) == pytest.approx(1)
    assert motion(kps, np.array([1, 0, 1, 0], bool)) == 0


def test_a_video_that_stands_still_copies_its_first_frame():
    assert copying(frames(FACE, FACE), seen(3)) == pytest.approx(1)
    # Without a first face, or without a later one, there is nothing to copy.
    assert copying(frames(FACE, FACE), np.array([0, 1, 1], bool)) == 0
    assert copying(frames(FACE, FACE), np.array([1, 0, 0], bool)) == 0


def test_copying_falls_with_pose_and_with_expression_apart():
    size = np.sqrt(np.mean(np.sum((FACE - FACE.mean(0)) ** 2, 1)))
    # A face that only moves by a fifth of its size keeps its expression: (1/e + 1) / 2.
    moved = FACE + np.array([0.2 * size, 0])
    assert copying(frames(moved), seen(2)) == pytest.approx((np.exp(-1) + 1) / 2)
    # Size and turn are pose too.
    turned = (FACE - FACE.mean(0)) @ np.array([[0.8, 0.6], [-0.6, 0.8]]) * 1.3 + 30
    assert copying(frames(turned), seen(2)) > 0.5
    # A mouth that opens is expression: the pose of a least-squares fit hardly changes.
    spoken = FACE + np.array([[0, 0]] * 3 + [[0, 3]] * 2)
    assert 0.2 < copying(frames(spoken), seen(2)) < 0.75
    # Whatever the size of the picture.
    assert copying(3 * frames(spoken) + 7, seen(2)) == pytest.approx(copying(frames(spoken), seen(2)))
    # Frames without a face do not count.
    absent = copying(frames(moved, 5 * FACE), np.array([1, 1, 0], bool))
    assert absent == pytest.approx(copying(frames(moved), seen(2)))


def test_the_picture_is_measured_in_time_and_in_space():
    ramp = np.arange(4)[:, None, None, None] * np.full((1, 8, 8, 3), 5)
    even = ramp.astype(np.uint8)
    assert dynamics(even) == pytest.approx(5)
    assert flicker(even) == pytest.approx(0)
    blinking = (np.arange(4)[:, None, None, None] % 2 * np.full((1, 8, 8, 3), 10)).astype(np.uint8)
    assert dynamics(blinking) == pytest.approx(10)
    assert flicker(blinking) == pytest.approx(10)
    checks = (np.indices((8, 8)).sum(0) % 2 * 100).astype(np.uint8)
    sharp = np.repeat(checks[None, :, :, None], 3, -1)
    # Luma of grey is grey: 4 * 100 at every other pixel, with either sign.
    assert sharpness(sharp) == pytest.approx(400**2, rel=1e-4)
    assert sharpness(even) == pytest.approx(0, abs=1e-3)
    assert dynamics(even[:1]) == flicker(even[:2]) == 0


def test_frames_without_a_face_are_left_out_of_a_clip():
    video = np.zeros((3, 8, 8, 3), np.uint8)
    one = Scored(
        video, np.array([0.5, 0, 0.7]), np.array([0.4, 0, 0.8]), np.array([1, 0, 1], bool), frames(FACE, FACE),
        np.tile([1.0, 2, 3, 4], (3, 1)),
    )  # fmt: skip
    assert one.measures()["face_sim"] == pytest.approx(0.6)
    assert one.measures()["judge_sim"] == pytest.approx(0.6)
    assert one.measures()["face_fraction"] == pytest.approx(2 / 3)
    assert one.frames() == {
        "face_sim": [0.5, None, 0.7],
        "judge_sim": [0.4, None, 0.8],
        "box": [[1, 2, 3, 4], None, [1, 2, 3, 4]],
    }
    none = dataclasses.replace(one, mask=np.zeros(3, bool))
    assert none.measures() == dict.fromkeys(MEASURES, 0.0)
    assert means([one.measures(), none.measures()])["face_sim"] == pytest.approx(0.3)


def test_intervals_are_those_of_the_mean():
    values = np.random.default_rng(0).normal(3, 2, 60)
    low, high = interval(values.tolist())
    error = stats.sem(values)
    assert low == pytest.approx(values.mean() - 1.96 * error, abs=0.15 * error)
    assert high == pytest.approx(values.mean() + 1.96 * error, abs=0.15 * error)
    assert interval(values.tolist()) == [low, high]
    assert interval([1.0]) is None
    assert interval([2.0, 2.0, 2.0]) == [2, 2]


def test_pairs_are_compared_by_sign():
    base = np.arange(10.0)
    tuned = base + np.array([1, 1, 1, 1, 1, 1, 1, 1, -1, 0])
    found = compare(base.tolist(), tuned.tolist())
    assert (found["rose"], found["fell"]) == (8, 1)
    # Two-sided: 2 * (1 + 9) / 2^9.
    assert found["p"] == pytest.approx(20 / 512)
    assert found["change"][0] < 0.7 < found["change"][1]
    # The clips differ far more among each other than the pairs do.
    assert found["change"][1] - found["change"][0] < found["base"][1] - found["base"][0]
    assert compare([1.0, 2.0], [1.0, 2.0])["p"] == 1


# What a measure is where nothing of interest happens.
FOUND = {"face_fraction": 0.9}
BASE = {"face_sim": 0.7, "motion": 1.0, "copying": 0.4, **FOUND}


@pytest.mark.parametrize(
    ("now", "words"),
    [
        ({"face_sim": 0.8, "motion": 0.79, "copying": 0.4, **FOUND}, ["motion fell from 1.000 to 0.790", "20%"]),
        (
            {"face_sim": 0.8, "motion": 1.0, "copying": 0.49, **FOUND},
            ["copying of the first frame rose from 0.400 to 0.490"],
        ),
        ({"face_sim": 0.8, "motion": 0.1, "copying": 0.9, **FOUND}, ["motion fell", " and copying"]),
        ({"face_sim": 0.8, "motion": 0.81, "copying": 0.47, **FOUND}, []),
        (
            {"face_sim": 0.8, "motion": 1.3, "copying": 0.3, "face_fraction": 0.8},
            ["a face fell from 90% to 80%", "10%"],
        ),
        ({"face_sim": 0.8, "motion": 1.0, "copying": 0.4, "face_fraction": 0.82}, []),
        # A reward that did not rise was not hacked.
        ({"face_sim": 0.7, "motion": 0.1, "copying": 0.9, **FOUND}, []),
    ],
)
def test_the_alarm_wants_a_reward_that_rose_and_something_lost(now, words):
    found = alarm(BASE, [now], EvalSection())
    assert bool(found) == bool(words)
    assert all(word in found for word in words)


def test_a_reward_that_rose_and_fell_again_was_climbed_too():
    risen, lost = (
        {"face_sim": 0.8, "motion": 1.0, "copying": 0.4, **FOUND},
        {"face_sim": 0.6, "motion": 0.5, "copying": 0.4, **FOUND},
    )
    assert not alarm(BASE, [lost], EvalSection())
    assert "the reward rose (0.700 to 0.800)" in alarm(BASE, [risen, lost], EvalSection())
    # What was mended is no alarm any more.
    assert not alarm(BASE, [risen, lost, risen], EvalSection())


def test_bounds_of_the_alarm_are_the_configurations():
    now = {"face_sim": 0.8, "motion": 0.7, "copying": 0.45, **FOUND}
    assert alarm(BASE, [now], EvalSection())
    assert not alarm(BASE, [now], EvalSection(max_motion_loss=0.31))
    assert "copying" in alarm(BASE, [now], EvalSection(max_motion_loss=0.31, max_copying_rise=0.04))
    blurred = {**BASE, "face_sim": 0.8, "face_fraction": 0.8}
    assert alarm(BASE, [blurred], EvalSection())
    assert not alarm(BASE, [blurred], EvalSection(max_face_loss=0.2))


def test_progress_is_a_new_best():
    assert without_progress([]) == 0
    assert without_progress([0.5]) == 0
    assert without_progress([0.5, 0.4, 0.6]) == 0
    assert without_progress([0.5, 0.6, 0.6, 0.1]) == 2
