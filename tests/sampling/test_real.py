"""The real-data loss is flow matching: its best velocity is the one that leads from noise to the clip."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from rfl_jax.config import Config
from rfl_jax.models.wan.config import DIT_PRESETS
from rfl_jax.sampling.real import draw, flow_matching, sigma_range
from rfl_jax.sampling.rollout import Expert, rollout
from rfl_jax.sampling.sampler import make_sampler
from rfl_jax.sampling.schedule import Span, make_sigmas, shifted

SHAPE = (2, 3, 2, 2, 4)


def normal(seed):
    return jnp.asarray(np.random.default_rng(seed).normal(size=SHAPE), jnp.float32)


def test_the_velocity_without_loss_leads_from_any_noise_to_the_clip():
    clean, noise, sigma = normal(0), normal(1), jnp.array([0.3, 0.9])

    def perfect(x, t):
        return (x - clean) / (t / 1000)[:, None, None, None, None]

    def same(x):
        return x

    assert np.abs(flow_matching(perfect, same, clean, sigma, noise)).max() < 1e-9
    steps = make_sigmas(4, 5.0)
    found = rollout({"dit": Expert(perfect, None, perfect)}, normal(2), steps, [Span("dit", 0, 4, True)]).latents
    np.testing.assert_allclose(found, clean, atol=1e-5)
    # Any other velocity loses its squared distance.
    np.testing.assert_allclose(
        flow_matching(lambda x, t: perfect(x, t) + 0.5, same, clean, sigma, noise), 0.25, rtol=1e-5
    )


def test_what_is_given_of_a_clip_is_shown_as_it_is_and_not_counted():
    clean, noise, sigma = normal(0), normal(1), jnp.array([0.3, 0.9])
    shown = []

    def keep(x):
        return x.at[:, :1].set(clean[:, :1])

    def velocity(x, t):
        shown.append(x)
        # Wrong by 0.5 everywhere, and by anything where the first frame is given.
        return (noise - clean + 0.5).at[:, :1].set(7)

    np.testing.assert_allclose(flow_matching(velocity, keep, clean, sigma, noise), 0.25, rtol=1e-5)
    assert np.array_equal(shown[0][:, 0], clean[:, 0])
    np.testing.assert_allclose(shown[0][1, 1:], 0.1 * clean[1, 1:] + 0.9 * noise[1, 1:], rtol=1e-5, atol=1e-6)


def test_each_expert_is_asked_at_the_levels_that_it_serves():
    def levels(expert, preset="wan2_2_i2v_a14b", **changes):
        cfg = Config(**changes)
        sampler = dataclasses.replace(make_sampler(Config()), dit=DIT_PRESETS[preset])
        return sigma_range(cfg, sampler, expert)

    assert levels("dit") == (0.9, 1)
    assert levels("dit2") == (0, 0.9)
    assert levels("dit2", max_timestep_boundary=0.7, min_timestep_boundary=0.7) == (0, 0.7)
    assert levels("dit", max_timestep_boundary=0.95) == (0.9, 0.95)
    assert levels("dit", "wan2_2_ti2v_5b") == (0, 1)


def test_levels_are_spread_as_the_samplers_and_drawn_by_update_and_clip():
    key = jax.random.key(0)
    drawn = jax.jit(draw, static_argnames=("shape", "expert", "levels", "shift"))

    def of(update, clips, expert="dit2"):
        return drawn(key, update, jnp.asarray(clips), (2, 3), expert=expert, levels=(0.0, 0.9), shift=5.0)

    sigma, noise = of(3, np.arange(2000))
    assert 0 <= sigma.min() < sigma.max() < 0.9
    # Evenly, before the shift.
    even = shifted(np.asarray(sigma, np.float64), 1 / 5) / shifted(0.9, 1 / 5)
    assert stats.kstest(even, "uniform").pvalue > 0.01
    assert np.asarray(noise).std() == pytest.approx(1, abs=0.03)
    # The same for the same clip in any company, others for other updates and experts.
    again, likewise = of(3, [7, 5])
    assert np.array_equal(again, sigma[jnp.array([7, 5])])
    assert np.array_equal(likewise, noise[jnp.array([7, 5])])
    for other in (of(4, [7, 5]), of(3, [7, 5], "dit")):
        assert not np.isin(other[0], again).any()
        assert not np.isin(other[1], likewise).any()
