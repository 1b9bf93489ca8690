"""Rewards without a gradient: what an update that compares a clip's videos computes, and that it learns by it."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from etils import epath

from rfl_jax.config import Config, NFTSection, NoiseSection, WindowSection
from rfl_jax.errors import UserError
from rfl_jax.models.wan.config import DIT_PRESETS
from rfl_jax.runs import RunFolder
from rfl_jax.sampling.denoise import draw_one
from rfl_jax.sampling.rollout import Expert, rollout
from rfl_jax.sampling.sampler import Sampler, make_sampler
from rfl_jax.sampling.schedule import Span, make_sigmas
from rfl_jax.training.flops import dit_flops
from rfl_jax.training.loop import train
from rfl_jax.training.nft import advantages, weighed_matching
from tests.golden import relative
from tests.runs import open_run, read_metrics
from tests.training.test_step import flat, gradients

GROUP = 4
ONE_STEP = {"window.mode": "random", "window.steps": 1, "window.stop_input_gradient": False}
CFG = Config(nft=NFTSection(GROUP), window=WindowSection(mode="random", steps=1))
SPANS = (Span("dit2", 0, 4, gradient=False),)
SAMPLER = Sampler(
    DIT_PRESETS["mini"], make_sigmas(4, 3.0), SPANS, {"dit2": 1.0}, direct=(Span("dit2", 1, 4, gradient=True),)
)
CLIPS = jnp.repeat(jnp.arange(2), GROUP)
SHAPE = (2, 2, 2, 3)


def same(x):
    return x


def velocity_of(w):
    """Of a network of two weights, so that all of it can be seen through."""
    return lambda x, t: jnp.tanh(w[0] * x) + w[1] + 1e-3 * t[:, None, None, None, None]


def expert(w):
    return Expert(velocity_of(w), velocity_of(jnp.array([0.5, 0.1])), velocity_of(jax.lax.stop_gradient(w)))


def normal(seed):
    return jnp.asarray(np.random.default_rng(seed).normal(size=(2 * GROUP, *SHAPE)), jnp.float32)


def test_advantages_are_differences_from_the_rivals_in_units_of_their_spread():
    rewards, told = jnp.array([1.0, 3.0, 2.0, 2.0, 5.0, 9.0]), jnp.ones(6, bool)
    # Differences -1 1 0 0 -2 2, whose mean square is 10 / 6.
    want = np.array([-1, 1, 0, 0, -2, 2]) / np.sqrt(10 / 6)
    np.testing.assert_allclose(advantages(rewards, told, 2), np.clip(want, -1, 1), rtol=1e-6)
    # How hard a clip is does not matter, nor the unit.
    easier = rewards + jnp.array([7.0, 7, 0, 0, -3, -3])
    np.testing.assert_allclose(advantages(5 * easier, told, 2), np.clip(want, -1, 1), rtol=1e-5)
    # Of three each: -1 1 0 -10/3 -1/3 11/3, whose mean square is 40 / 9.
    want = np.array([-1, 1, 0, -10 / 3, -1 / 3, 11 / 3]) / np.sqrt(40 / 9)
    np.testing.assert_allclose(advantages(rewards, told, 3), np.clip(want, -1, 1), rtol=1e-5, atol=1e-6)


def test_a_video_that_says_nothing_is_no_rival_and_learns_nothing():
    told = jnp.array([True, True, False, True, False, False])
    found = advantages(jnp.array([1.0, 3.0, 99.0, 7.0, 5.0, 9.0]), told, 3)
    np.testing.assert_allclose(found, [-1, 1, 0, 0, 0, 0], rtol=1e-6)
    assert not advantages(jnp.full(6, 0.3), jnp.ones(6, bool), 2).any()
    assert not advantages(jnp.arange(6.0), jnp.zeros(6, bool), 2).any()


def test_the_gradient_is_that_of_diffusion_nft():
    w, videos = jnp.array([0.7, -0.2]), normal(0)
    advantage = jnp.linspace(-1, 1, 2 * GROUP)
    told = {"key": jax.random.key(3), "update": 5, "clips": CLIPS}

    def ours(w):
        losses, kl = weighed_matching(CFG, SAMPLER, {"dit2": expert(w)}, same, videos, advantage, **told)
        return jnp.mean(losses), kl

    def both_branches(w):
        step, noise = draw_one(SAMPLER, told["key"], told["update"], CLIPS, SHAPE)
        sigma = jnp.asarray(SAMPLER.sigmas)[step]
        x, t = (1 - sigma) * videos + sigma * noise, jnp.full(len(videos), 1000 * sigma)
        v, old = velocity_of(w)(x, t), jax.lax.stop_gradient(velocity_of(w)(x, t))
        better, worse = old + (v - old), old - (v - old)
        share = ((1 + advantage) / 2)[:, None, None, None, None]
        target = noise - videos
        return jnp.mean(share * (better - target) ** 2 + (1 - share) * (worse - target) ** 2)

    (slope, kl), want = jax.jacrev(ours, has_aux=True)(w), jax.grad(both_branches)(w)
    np.testing.assert_allclose(slope, want, rtol=1e-5)
    assert kl.shape == (1, 2 * GROUP)
    assert np.all(kl > 0)
    # A clip's videos meet the same noise, at one of the steps with gradient.
    _, noise = draw_one(SAMPLER, told["key"], told["update"], CLIPS, SHAPE)
    assert np.array_equal(noise[0], noise[GROUP - 1])
    assert not np.array_equal(noise[0], noise[GROUP])
    assert {int(draw_one(SAMPLER, told["key"], i, CLIPS, SHAPE)[0]) for i in range(30)} == {1, 2, 3}


def test_a_reward_that_only_counts_is_learnt():
    def videos_of(w, noise):
        return rollout({"dit2": expert(w)}, noise, SAMPLER.sigmas, SPANS).latents

    def reward(videos):
        # How many numbers are above a half: flat almost everywhere.
        return jnp.mean(videos > 0.5, (1, 2, 3, 4))

    held_out = normal(99)
    begin = w = jnp.array([0.5, 0.1])
    tx = optax.adam(0.05)
    state = tx.init(w)

    @jax.jit
    def update(w, state, count):
        noise = jax.random.normal(jax.random.fold_in(jax.random.key(1), count), (2 * GROUP, *SHAPE))

        def loss(w):
            videos = videos_of(w, noise)
            advantage = advantages(reward(videos), jnp.ones(len(videos), bool), GROUP)
            told = {"key": jax.random.key(2), "update": count, "clips": CLIPS}
            losses, _ = weighed_matching(CFG, SAMPLER, {"dit2": expert(w)}, same, videos, advantage, **told)
            return jnp.mean(losses)

        change, state = tx.update(jax.grad(loss)(w), state)
        return optax.apply_updates(w, change), state

    assert not jax.grad(lambda w: jnp.sum(reward(videos_of(w, held_out))))(w).any()
    for count in range(60):
        w, state = update(w, state, count)
    before, after = (float(jnp.mean(reward(videos_of(x, held_out)))) for x in (begin, w))
    assert after > before + 0.2


def test_no_step_of_the_samplers_has_gradient_and_one_beside_it_has():
    cfg = dataclasses.replace(CFG, noise=NoiseSection(per_sample=4))
    sampler = make_sampler(cfg)
    assert not any(span.gradient for span in sampler.spans)
    assert [(span.expert, span.gradient) for span in sampler.direct] == [("dit2", True)]
    direct = Config(window=WindowSection(mode="random", steps=1, direct=True))
    assert dit_flops(cfg, sampler, (21, 60, 60), 4) == dit_flops(direct, make_sampler(direct), (21, 60, 60), 4)


@pytest.fixture
def compared(settings):
    """`compared(**changes) -> Config` of a small run that compares two videos of each clip."""

    def make(**changes):
        few = {"num_inference_steps": 2, "mid_timestep": 1, "final_timestep": 1, "nft.group": 2, **ONE_STEP}
        return settings(train_batch_size=4, **{"per_device_train_batch_size": 4, **few, **changes})

    return make


def test_a_run_takes_a_rule_without_gradient(compared, tmp_path):
    terms = {"face": {}, "light": {"type": "examples.own_rule:Exposure", "weight": 0.5, "every": 2}}
    cfg = compared(**{"reward.terms": terms})
    run = open_run(cfg, tmp_path / "run")
    before = flat(run.state.params)
    trained = train(run, RunFolder(epath.Path(tmp_path / "run")))
    assert trained.finished
    for line in read_metrics(tmp_path / "run"):
        assert line["grad_norm"] > 0
        assert 0 <= line["reward/light"] <= 1 if line["step"] == 1 else line["reward/light"] is None
    assert np.any(flat(trained.state.params) != before)


def test_a_mesh_compares_the_same_videos(compared, tmp_path):
    want_loss, _, want = gradients(open_run(compared(**{"reward.compat": "roll"}), tmp_path))
    wide = {"mesh.data": 2, "mesh.fsdp": 2, "mesh.context": 2, "per_device_train_batch_size": 1}
    loss, _, found = gradients(open_run(compared(**wide, **{"reward.compat": "roll"}), tmp_path))
    assert loss == pytest.approx(want_loss, rel=1e-3)
    assert relative(flat(found), flat(want)) < 1e-3


def test_a_group_that_a_batch_cannot_hold_is_refused(compared, tmp_path):
    with pytest.raises(
        UserError, match=r"nft.group: expected a divisor of 4 = per_device_train_batch_size 4 x 1 .*, got 3"
    ):
        open_run(compared(**{"nft.group": 3}), tmp_path)
