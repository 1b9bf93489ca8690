"""The truncated-gradient sampler: noise to latents, differentiable through some steps only."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from rfl_jax.remat import KEEP_REFERENCE, REFERENCE_VELOCITY, checkpoint_name
from rfl_jax.sampling.phases import phase_scope
from rfl_jax.sampling.schedule import TRAIN_TIMESTEPS, Span

Latents = Float[Array, "b t h w c"]
Velocity = Callable[[Latents, Float[Array, " b"]], Latents]


@dataclasses.dataclass(frozen=True)
class Expert:
    """One network of the rollout, its conditioning already bound.

    Attributes:
        velocity: (latents, timesteps [b] in 0..1000) -> velocity.
        reference: the same network before training, for the KL; None where nothing of it trains, so that the two
            cannot differ.
        frozen: the same function with its weights cut off from the gradient, for steps without gradient.
    """

    velocity: Velocity
    reference: Velocity | None
    frozen: Velocity


@dataclasses.dataclass
class Denoised:
    """What `rollout` gives.

    Attributes:
        latents: after the last step.
        trajectory: [s, b, t, h, w, c] latents after each step; of a span with drawn steps after these alone.
        kl: [g, b] of each gradient step: mean((v - v_ref)^2) / (2 sigma^2). Where only some steps are compared with the
            reference or drawn, theirs as often as there are steps for each of them, and 0 of the others.
    """

    latents: Latents
    trajectory: Float[Array, "s b t h w c"]
    kl: Float[Array, "g b"]


jax.tree_util.register_dataclass(Denoised, ["latents", "trajectory", "kl"], [])


def rollout(
    experts: Mapping[str, Expert],
    noise: Latents,
    sigmas: Float[np.ndarray, " n"],
    spans: Sequence[Span],
    *,
    keep: Callable[[Latents], Latents] = lambda x: x,
    nested: bool = False,
    unroll: bool = False,
    compared: Mapping[Span, Int[Array, "k b"]] | None = None,
    drawn: Mapping[Span, Int[Array, " k"]] | None = None,
    separate: bool = False,
) -> Denoised:
    """Euler steps `x + (sigma[i+1] - sigma[i]) * v(x, t[i])` over the spans, each one `lax.scan`.

    Args:
        experts: by the names that spans use.
        noise: latents at sigma 1, float32.
        sigmas: noise levels, one more than steps.
        spans: from `plan_spans`. Latents are cut off from the gradient before the first step that has one. Later ones
            without hand it on as it is: they add a constant to the latents, `keep` is differentiated.
        keep: applied to the latents before the first and after every step (TI2V writes the first frame back).
        nested: rematerialise whole steps with gradient, so that the activations of one at a time are kept; of the
            reference its velocity is.
        unroll: write the steps with gradient out instead of looping.
        compared: of the spans that have a reference, the steps of each sample (counted from the span's first) whose
            velocity is compared with it, each for an equal share of the span's steps; all steps by default. The
            reference runs for these alone, after the span.
        drawn: of spans with gradient, the steps that have it, in rising order, none of them compared by `compared`. Each
            counts for an equal share of the span's steps: n / k times its velocity's gradient. The others are as those
            of spans without.
        separate: cut the latents off before each velocity with gradient: what remains is the sum over the steps of
            what each velocity alone does to the latents, as in DRTune.
    """
    b = noise.shape[0]
    x = keep(noise)
    trajectory, kl = [], [jnp.zeros((0, b))]
    reached = False  # whether a step before had gradient
    for span in spans:
        expert = experts[span.expert]
        velocity = expert.velocity if span.gradient else expert.frozen
        reference = expert.reference if span.gradient else None
        some = compared[span] if compared is not None and reference is not None else None
        chosen = drawn.get(span) if drawn is not None else None
        before = x
        if not span.gradient:
            x = jax.lax.stop_gradient(x)
        weight = 1.0 if chosen is None else (span.stop - span.start) / len(chosen)

        def step(
            x: Latents,
            level: tuple[Array, Array],
            velocity: Velocity = velocity,
            reference: Velocity | None = reference if some is None else None,
            passed: bool = some is not None,
            cut: bool = separate and span.gradient,
            weight: float = weight,
        ) -> tuple[Latents, tuple[Latents, Array, tuple[Latents, Latents] | None]]:
            sigma, following = level
            v = velocity(jax.lax.stop_gradient(x) if cut else x, jnp.full(b, sigma * TRAIN_TIMESTEPS))
            kl = jnp.zeros(b) if reference is None else divergence(reference, x, v, sigma)
            after = keep(x + (following - sigma) * (v if weight == 1 else _weighted(v, weight)))
            return after, (after, kl, (x, v) if passed else None)

        body = jax.checkpoint(step, policy=KEEP_REFERENCE, prevent_cse=False) if nested and span.gradient else step
        steps = (jnp.asarray(sigmas[span.start : span.stop]), jnp.asarray(sigmas[span.start + 1 : span.stop + 1]))
        if chosen is not None:
            still = partial(step, velocity=expert.frozen, reference=None, weight=1.0)
            x, (states, divergences, _) = _drawn_steps(body, still, keep, x, steps, chosen - span.start, unroll=unroll)
            divergences = jnp.zeros((len(steps[0]), b)).at[chosen - span.start].set(weight * divergences)
        else:
            with phase_scope("grad_steps" if span.gradient else "no_grad_steps"):
                x, (states, divergences, passed) = jax.lax.scan(body, x, steps, unroll=unroll and span.gradient)
                if reference is not None and some is not None and passed is not None:
                    divergences = _divergences_of_some(reference, *passed, steps[0], some)
        if not span.gradient:
            x, states = jax.lax.stop_gradient(x), jax.lax.stop_gradient(states)
            x = _handed_on(before, x, keep) if reached else x
        else:
            kl.append(divergences)
            reached = True
        trajectory.append(states)
    return Denoised(x, jnp.concatenate(trajectory), jnp.concatenate(kl))


def _weighted(v: Latents, weight: float) -> Latents:
    """The same value with so many times its gradient."""
    constant = jax.lax.stop_gradient(v)
    return constant + weight * (v - constant)


def _handed_on(before: Latents, after: Latents, keep: Callable[[Latents], Latents]) -> Latents:
    """The value of `after` with the gradient of `before`, as far as it is not kept from changing."""
    return keep(jax.lax.stop_gradient(after) + (before - jax.lax.stop_gradient(before)))


def _drawn_steps(
    body: Callable[..., Any],
    still: Callable[..., Any],
    keep: Callable[[Latents], Latents],
    x: Latents,
    steps: tuple[Float[Array, " s"], Float[Array, " s"]],
    chosen: Int[Array, " k"],
    *,
    unroll: bool,
) -> tuple[Latents, Any]:
    """The steps of a span: `body` for the chosen ones, `still` without gradient for the others between them, in loops
    that take as many turns as there are steps. What the backward pass needs is kept of the chosen ones alone.
    """

    def between(x: Latents, first: Array | int, end: Array | int) -> Latents:
        def one(i: Array, x: Latents) -> Latents:
            return still(x, (steps[0][first + i], steps[1][first + i]))[0]

        # Counted from 0, as `plan` takes a loop that compares with a constant to begin there.
        with phase_scope("no_grad_steps"):
            return _handed_on(x, jax.lax.fori_loop(0, end - first, one, jax.lax.stop_gradient(x)), keep)

    def turn(carry: tuple[Latents, Array], i: Array) -> tuple[tuple[Latents, Array], Any]:
        x = between(*carry, i)
        with phase_scope("grad_steps"):
            x, told = body(x, (steps[0][i], steps[1][i]))
        return (x, i + 1), told

    (x, first), told = jax.lax.scan(turn, (x, jnp.zeros((), chosen.dtype)), chosen, unroll=unroll)
    return between(x, first, len(steps[0])), told


def divergence(reference: Velocity, x: Latents, v: Latents, sigma: Float[Array, "*b"]) -> Float[Array, " b2"]:
    """mean((v - v_ref)^2) / (2 sigma^2) of each sample, at a sigma of all or of each. The reference is a constant: its
    dependence on the latents is not differentiated.
    """
    t = jnp.broadcast_to(sigma * TRAIN_TIMESTEPS, x.shape[:1])
    target = checkpoint_name(jax.lax.stop_gradient(reference(jax.lax.stop_gradient(x), t)), REFERENCE_VELOCITY)
    return jnp.mean((v - target) ** 2, (1, 2, 3, 4)) / (2 * sigma**2)


def _divergences_of_some(
    reference: Velocity,
    x: Float[Array, "s b t h w c"],
    v: Float[Array, "s b t h w c"],
    sigmas: Float[Array, " s"],
    some: Int[Array, "k b"],
) -> Float[Array, "s b"]:
    """Divergences of some steps, s / k times each, between zeros of the others; k forward passes of the reference.

    Args:
        reference: what is compared with.
        x: latents before each step.
        v: velocity of each step.
        sigmas: of each step.
        some: the steps of each sample.
    """

    def taken(of_steps: Float[Array, "s b t h w c"]) -> Float[Array, "k b t h w c"]:
        return jnp.take_along_axis(of_steps, some[..., None, None, None, None], 0)

    def one(_: None, step: tuple[Latents, Latents, Array]) -> tuple[None, Array]:
        return None, divergence(reference, *step)

    # One forward pass is no loop.
    _, found = jax.lax.scan(one, None, (taken(x), taken(v), sigmas[some]), unroll=0 if len(some) == 1 else 1)
    return jnp.put_along_axis(jnp.zeros(v.shape[:2]), some, len(v) / len(some) * found, 0, inplace=False)
