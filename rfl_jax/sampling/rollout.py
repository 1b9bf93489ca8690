"""The truncated-gradient sampler: noise to latents, differentiable through the last steps only."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

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
        trajectory: [s, b, t, h, w, c] latents after each step.
        kl: [g, b] of each gradient step: mean((v - v_ref)^2) / (2 sigma^2).
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
) -> Denoised:
    """Euler steps `x + (sigma[i+1] - sigma[i]) * v(x, t[i])` over the spans, each one `lax.scan`.

    Args:
        experts: by the names that spans use.
        noise: latents at sigma 1, float32.
        sigmas: noise levels, one more than steps.
        spans: from `plan_spans`. Latents are cut off from the gradient before the first span that has one.
        keep: applied to the latents before the first and after every step (TI2V writes the first frame back).
        nested: rematerialise whole steps with gradient, so that the activations of one at a time are kept.
        unroll: write the steps with gradient out instead of looping.
    """
    b = noise.shape[0]
    x = keep(noise)
    trajectory, kl = [], [jnp.zeros((0, b))]
    for span in spans:
        expert = experts[span.expert]
        velocity = expert.velocity if span.gradient else expert.frozen
        reference = expert.reference if span.gradient else None
        if not span.gradient:
            x = jax.lax.stop_gradient(x)

        def step(
            x: Latents,
            level: tuple[Array, Array],
            velocity: Velocity = velocity,
            reference: Velocity | None = reference,
        ) -> tuple[Latents, tuple[Latents, Array]]:
            sigma, following = level
            t = jnp.full(b, sigma * TRAIN_TIMESTEPS)
            v = velocity(x, t)
            divergence = jnp.zeros(b)
            if reference is not None:
                # The reference is a constant: its dependence on the latents is not differentiated.
                target = jax.lax.stop_gradient(reference(jax.lax.stop_gradient(x), t))
                divergence = jnp.mean((v - target) ** 2, (1, 2, 3, 4)) / (2 * sigma**2)
            x = keep(x + (following - sigma) * v)
            return x, (x, divergence)

        body = jax.checkpoint(step, prevent_cse=False) if nested and span.gradient else step
        steps = (jnp.asarray(sigmas[span.start : span.stop]), jnp.asarray(sigmas[span.start + 1 : span.stop + 1]))
        with phase_scope("grad_steps" if span.gradient else "no_grad_steps"):
            x, (states, divergences) = jax.lax.scan(body, x, steps, unroll=unroll and span.gradient)
        if not span.gradient:
            x, states = jax.lax.stop_gradient(x), jax.lax.stop_gradient(states)
        else:
            kl.append(divergences)
        trajectory.append(states)
    return Denoised(x, jnp.concatenate(trajectory), jnp.concatenate(kl))
