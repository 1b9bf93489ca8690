"""Schedule, spans, and where the gradient flows."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rfl_jax.remat import steps_options
from rfl_jax.sampling.rollout import Expert, rollout
from rfl_jax.sampling.schedule import Span, make_sigmas, plan_spans


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
