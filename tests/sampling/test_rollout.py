"""Schedule, spans, where the gradient flows, and which steps the KL compares with the reference."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rfl_jax.config import Config, KLSection
from rfl_jax.errors import UserError
from rfl_jax.remat import steps_options
from rfl_jax.sampling.rollout import Expert, rollout
from rfl_jax.sampling.sampler import compared_steps, make_sampler
from rfl_jax.sampling.schedule import Span, make_sigmas, plan_spans
from rfl_jax.sharding import BATCH
from tests.devices import make_mesh


def test_schedule_is_the_designs():
    want = [1, 0.9722, 0.9375, 0.8929, 0.8333, 0.75, 0.625, 0.4167, 0]
    np.testing.assert_allclose(make_sigmas(8, 5.0), want, atol=5e-5)


def test_spans_split_at_the_boundary_and_at_the_first_gradient():
    sigmas = make_sigmas(8, 5.0)
    assert plan_spans(sigmas, boundary=0.9, mid=4, final=7) == (
        Span("dit", 0, 3, False),
        Span("dit2", 3, 4, False),
        Span("dit2", 4, 8, True),
    )
    assert plan_spans(sigmas, boundary=0.9, mid=1, final=5) == (
        Span("dit", 0, 1, False),
        Span("dit", 1, 3, True),
        Span("dit2", 3, 6, True),
    )
    assert plan_spans(sigmas, boundary=None, mid=4, final=7) == (Span("dit", 0, 4, False), Span("dit", 4, 8, True))


def toy(w):
    def velocity(x, t):
        return jnp.tanh(w * x) + 1e-3 * t[:, None, None, None, None]

    return velocity


def run(w, noise, spans, sigmas, **options):
    expert = Expert(toy(w), toy(0.5), toy(jax.lax.stop_gradient(w)))
    return rollout({"dit": expert, "dit2": expert}, noise, sigmas, spans, **options)


@pytest.mark.parametrize("policy", ["full", "nested", "offload"])
def test_rollout_equals_a_plain_loop_and_its_truncated_gradient(policy):
    sigmas = make_sigmas(8, 5.0)
    spans = plan_spans(sigmas, boundary=0.9, mid=4, final=7)
    noise = jnp.asarray(np.random.default_rng(0).normal(size=(2, 2, 3, 3, 4)), jnp.float32)

    def plain(w):
        x, kl = jnp.asarray(noise), []
        for i in range(8):
            weight = w if i >= 4 else jax.lax.stop_gradient(w)
            v = toy(weight)(x, jnp.full(2, sigmas[i] * 1000))
            if i >= 4:
                reference = jax.lax.stop_gradient(toy(0.5)(x, jnp.full(2, sigmas[i] * 1000)))
                kl.append(jnp.mean((v - reference) ** 2, (1, 2, 3, 4)) / (2 * sigmas[i] ** 2))
            x = x + (sigmas[i + 1] - sigmas[i]) * v
            if i < 4:
                x = jax.lax.stop_gradient(x)
        return jnp.sum(jnp.sin(x)) + jnp.mean(jnp.stack(kl))

    def ours(w):
        out = run(w, noise, spans, sigmas, **steps_options(policy))
        return jnp.sum(jnp.sin(out.latents)) + jnp.mean(out.kl)

    for f, g in zip(jax.value_and_grad(ours)(0.7), jax.value_and_grad(plain)(0.7), strict=True):
        np.testing.assert_allclose(f, g, rtol=1e-5)


def test_what_is_kept_is_restored_before_the_first_and_after_every_step():
    sigmas = make_sigmas(4, 5.0)
    given = jnp.full((1, 1, 2, 2, 3), 7.0)
    expert = Expert(toy(0.7), None, toy(0.7))
    spans = plan_spans(sigmas, boundary=None, mid=2, final=3)
    out = rollout({"dit": expert}, jnp.ones((1, 3, 2, 2, 3)), sigmas, spans, keep=lambda x: x.at[:, :1].set(given))
    assert np.array_equal(out.trajectory[:, :, :1], np.broadcast_to(given, (4, *given.shape)))
    assert not np.array_equal(out.latents[:, 1:], np.ones((1, 2, 2, 2, 3)))


SIGMAS = make_sigmas(8, 5.0)
SPANS = plan_spans(SIGMAS, boundary=0.9, mid=4, final=7)
START = jnp.asarray(np.random.default_rng(0).normal(size=(8, 2, 3, 3, 4)), jnp.float32)


def divergence(w, compared, start=START):
    """The KL, and the latents it is a part of."""
    out = run(w, start, SPANS, SIGMAS, compared=None if compared is None else {SPANS[-1]: jnp.asarray(compared)})
    return jnp.mean(out.kl), out.latents


@pytest.mark.parametrize("every", [2, 4])
def test_the_mean_over_all_choices_is_the_kl_of_all_steps_and_its_gradient(every):
    of_all = jax.value_and_grad(lambda w: divergence(w, None)[0])(0.7)
    of_some = jax.jit(jax.value_and_grad(lambda w, compared: divergence(w, compared)[0]))
    firsts = np.arange(0, 4, every)
    found = []
    for places in itertools.product(range(every), repeat=len(firsts)):
        # Each sample has steps of its own.
        steps = firsts[:, None] + (np.array(places)[:, None] + np.arange(len(START))) % every
        found.append(of_some(0.7, steps))
    assert len({float(value) for value, _ in found}) > 1
    for mean, want in zip(np.mean(found, 0), of_all, strict=True):
        np.testing.assert_allclose(mean, want, rtol=1e-5)
    assert np.array_equal(divergence(0.7, steps)[1], divergence(0.7, None)[1])


@pytest.mark.parametrize("policy", ["full", "nested", "offload"])
@pytest.mark.parametrize(("compared", "runs"), [(None, 4), ([[1], [2]], 2), ([[3]], 1)])
def test_the_reference_runs_for_the_compared_steps_alone(policy, compared, runs):
    asked = []

    def reference(x, t):
        def tell(x, t):
            asked.append(float(t[0]))
            return 0.5 * x

        return jax.pure_callback(tell, jax.ShapeDtypeStruct(x.shape, x.dtype), x, t)

    def loss(w):
        expert = Expert(toy(w), reference, toy(w))
        some = None if compared is None else {SPANS[-1]: jnp.array(compared)}
        out = rollout({"dit": expert, "dit2": expert}, START[:1], SIGMAS, SPANS, compared=some, **steps_options(policy))
        return jnp.sum(out.latents) + jnp.mean(out.kl)

    jax.block_until_ready(jax.jit(jax.value_and_grad(loss))(0.7))
    steps = range(4) if compared is None else np.ravel(compared)
    assert len(asked) == runs
    np.testing.assert_allclose(sorted(asked), sorted(SIGMAS[4 + i] * 1000 for i in steps), rtol=1e-6)


def test_compared_steps_over_a_mesh_equal_one_device():
    steps = np.arange(8)[None] % 4
    want = jax.value_and_grad(lambda w: divergence(w, steps)[0])(0.7)
    mesh = make_mesh(2, 2, 2)
    place = jax.sharding.NamedSharding(mesh, BATCH)
    with jax.set_mesh(mesh):
        value = jax.value_and_grad(lambda w, start: divergence(w, steps, start)[0])
        found = jax.jit(value)(0.7, jax.device_put(START, place))
    for a, b in zip(found, want, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5)


def test_the_choice_is_a_function_of_seed_update_and_clip():
    cfg = Config(kl=KLSection(every=2))
    sampler = make_sampler(cfg)

    def choose(update, clips, seed=0):
        (steps,) = compared_steps(cfg, sampler, jax.random.key(seed), update, jnp.array(clips, jnp.int32)).values()
        return np.asarray(steps)

    many = choose(0, range(1000))
    assert many.shape == (2, 1000)
    # One of each two, each as often as the other (within five standard deviations), and one apart from the other.
    assert np.array_equal(many // 2, np.repeat([[0], [1]], 1000, 1))
    assert np.all(np.abs(np.mean(many % 2, 1) - 0.5) < 5 * 0.5 / 1000**0.5)
    assert abs(np.mean(many[0] % 2 == many[1] % 2) - 0.5) < 5 * 0.5 / 1000**0.5
    assert np.array_equal(choose(0, [7, 3]), many[:, [7, 3]])
    assert not np.array_equal(choose(1, range(1000)), many)
    assert not np.array_equal(choose(0, range(1000), seed=1), many)
    assert compared_steps(Config(), sampler, jax.random.key(0), 0, jnp.arange(2)) is None


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"kl": KLSection(every=3)}, r"a divisor of the steps with gradient \(4 of dit2\), got 3"),
        ({"kl": KLSection(every=8)}, r"a divisor of the steps with gradient \(4 of dit2\), got 8"),
        (
            {"kl": KLSection(every=2), "lora_base_model": ("dit", "dit2"), "mid_timestep": 1},
            r"a divisor of the steps with gradient \(2 of dit and 5 of dit2\), got 2",
        ),
        ({"kl": KLSection(every=2), "lora_base_model": (), "trainable_models": ("vae",)}, "1, as no DiT trains, got 2"),
    ],
)
def test_groups_that_do_not_fill_the_steps_are_refused(changes, expected):
    with pytest.raises(UserError, match=f"config.kl.every: expected {expected}"):
        make_sampler(Config(**changes))
