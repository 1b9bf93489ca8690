"""Motion and copying are those that evaluation measures, and take from the reward what they say."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rfl_jax.evaluation import measures
from rfl_jax.rewards.motion import copying, motion, moving_share, own_share
from tests.rewards.test_face import random_kps


def plain_motion(kps, mask):
    steps = []
    for i in range(1, len(kps)):
        centres = kps[i - 1 : i + 1].mean(1)
        sizes = [np.sqrt(np.mean(np.abs((kps[j] - kps[j].mean(0)) @ np.array([1, 1j])) ** 2)) for j in (i - 1, i)]
        if mask[i] and mask[i - 1] and np.hypot(*(centres[1] - centres[0])) <= 2 * max(sizes):
            steps.append(np.abs(kps[i] - kps[i - 1]).mean())
    return np.mean(steps) if steps else 0.0


def plain_copying(kps, mask):
    """Frame by frame, with points as complex numbers."""
    later = np.flatnonzero(mask[1:]) + 1
    if not mask[0] or not later.size:
        return 0.0
    first = kps[0] @ np.array([1, 1j])
    centre = first.mean()
    size = np.sqrt(np.mean(np.abs(first - centre) ** 2))
    values = []
    for points in kps[later] @ np.array([1, 1j]):
        factor = np.vdot(first - centre, points - points.mean()) / np.sum(np.abs(first - centre) ** 2)
        fitted = points.mean() + factor * (first - centre)
        pose, rest = (np.sqrt(np.mean(np.abs(x) ** 2)) / size for x in (fitted - first, points - fitted))
        values.append((np.exp(-pose / 0.2) + np.exp(-rest / 0.05)) / 2)
    return np.mean(values)


def test_training_and_evaluation_measure_what_a_plain_loop_does():
    rng = np.random.default_rng(0)
    kps = np.stack([random_kps(rng, 1) + rng.normal(0, spread, (6, 5, 2)) for spread in (0.2, 1, 3, 3, 3, 3, 0.5)])
    kps[1] = kps[1, :1]  # stands still
    kps[6, 2:4] += 200  # somebody else
    mask = np.ones((7, 6), bool)
    mask[2, 3] = mask[3, 0] = mask[4, 1:] = False
    mask[5] = False
    kps = np.where(mask[..., None, None], kps, 0)
    for ours, evaluated, plain in ((motion, measures.motion, plain_motion), (copying, measures.copying, plain_copying)):
        expected = [plain(*row) for row in zip(kps, mask, strict=True)]
        found = np.asarray(jax.jit(ours)(kps.astype(np.float32), mask))
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6)
        found = [evaluated(*row) for row in zip(kps, mask, strict=True)]
        np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-12)


def test_two_faces_far_apart_are_no_motion():
    rng = np.random.default_rng(1)
    face = random_kps(rng, 1)[0]
    size = np.sqrt(np.mean(np.sum((face - face.mean(0)) ** 2, 1)))
    for step, counts in ((1.99, True), (2.01, False)):
        moved = np.stack([face, face + 0.1, face + np.array([step * size + 0.1, 0.1])])[None]
        mean = (0.1 + step * size / 2) / 2 if counts else 0.1
        assert motion(moved, np.ones((1, 3), bool))[0] == pytest.approx(mean, rel=1e-4)


def test_a_video_keeps_its_reward_where_it_moves_as_the_real_clip_does():
    found, real = jnp.array([0.0, 0.5, 1.0, 3.0, 0.0]), jnp.array([1.0, 1.0, 1.0, 1.0, 0.0])
    # By as much as it moves; nothing is asked where the real clip stands still.
    np.testing.assert_allclose(moving_share(found, real, 1.0), [0, 0.5, 1, 1, 1])
    np.testing.assert_allclose(moving_share(found, real, 0.4), [0.6, 0.8, 1, 1, 1], rtol=1e-6)
    found, real = jnp.array([1.0, 0.7, 0.4, 0.1, 1.0]), jnp.array([0.4, 0.4, 0.4, 0.4, 1.0])
    np.testing.assert_allclose(own_share(found, real, 1.0), [0, 0.5, 1, 1, 1], atol=1e-6)
    np.testing.assert_allclose(own_share(found, real, 0.4), [0.6, 0.8, 1, 1, 1], rtol=1e-6)
