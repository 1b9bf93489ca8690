"""Motion and copying are those that evaluation measures, and take from the reward what they say."""

import jax.numpy as jnp
import numpy as np
import pytest

from rfl_jax.evaluation import measures
from rfl_jax.rewards.motion import copying, motion, moving_share, own_share
from tests.rewards.test_face import random_kps


def test_they_are_what_evaluation_measures():
    rng = np.random.default_rng(0)
    kps = np.stack([random_kps(rng, 1) + rng.normal(0, spread, (6, 5, 2)) for spread in (0.2, 1, 3, 3, 3, 3)])
    kps[1] = kps[1, :1]
    mask = np.ones((6, 6), bool)
    mask[2, 3] = mask[3, 0] = mask[4, 1:] = False
    mask[5] = False
    kps = np.where(mask[..., None, None], kps, 0).astype(np.float32)
    for ours, theirs in ((motion, measures.motion), (copying, measures.copying)):
        found = np.asarray(ours(jnp.asarray(kps), jnp.asarray(mask)))
        np.testing.assert_allclose(found, [theirs(*row) for row in zip(kps, mask, strict=True)], rtol=1e-4, atol=1e-6)
    assert copying(jnp.asarray(kps), jnp.asarray(mask))[1] == pytest.approx(1)


def test_a_video_keeps_its_reward_where_it_moves_as_the_real_clip_does():
    found, real = jnp.array([0.0, 0.5, 1.0, 3.0, 0.0]), jnp.array([1.0, 1.0, 1.0, 1.0, 0.0])
    # By as much as it moves; nothing is asked where the real clip stands still.
    np.testing.assert_allclose(moving_share(found, real, 1.0), [0, 0.5, 1, 1, 1])
    np.testing.assert_allclose(moving_share(found, real, 0.4), [0.6, 0.8, 1, 1, 1], rtol=1e-6)
    found, real = jnp.array([1.0, 0.7, 0.4, 0.1, 1.0]), jnp.array([0.4, 0.4, 0.4, 0.4, 1.0])
    np.testing.assert_allclose(own_share(found, real, 1.0), [0, 0.5, 1, 1, 1], atol=1e-6)
    np.testing.assert_allclose(own_share(found, real, 0.4), [0.6, 0.8, 1, 1, 1], rtol=1e-6)
