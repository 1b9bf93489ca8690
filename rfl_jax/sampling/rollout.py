"""The truncated-gradient sampler: noise to latents, differentiable through the last steps only."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from rfl_jax.sampling.schedule import TRAIN_TIMESTEPS, Phase

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
class Rollout:
    """What a rollout leaves.

    Attributes:
        latents: after the last step.
        trajectory: [s, b, t, h, w, c] latents after each step.
        kl: [g, b] of each gradient step: mean((v - v_ref)^2) / (2 sigma^2).
    """

    latents: Latents
    trajectory: Float[Array, "s b t h w c"]
    kl: Float[Array, "g b"]


jax.tree_util.register_dataclass(Rollout, ["latents", "trajectory", "kl"], [])


# Parts of a step by which profiles divide its time; operators carry the name in theirs.
PHASES = ("prefix", "no_grad_steps", "grad_steps", "vae", "reward", "optimizer")


def phase_scope(name: str) -> AbstractContextManager[Any]:
    """Names the operators traced under it as those of a phase, one of `PHASES`."""
    return jax.named_scope(f"rfl.{name}")


def rollout(
    experts: Mapping[str, Expert],
    noise: Latents,
    levels: Float[np.ndarray, " n"],
    phases: Sequence[Phase],
    *,
    keep: Callable[[Latents], Latents] = lambda x: x,
    nested: bool = False,
    unroll: bool = False,
) -> Rollout:
    """Euler steps `x + (sigma[i+1] - sigma[i]) * v(x, t[i])` over the phases, each one `lax.scan`.

    Args:
        experts: by the names that phases use.
        noise: latents at sigma 1, float32.
        levels: sigmas, one more than steps.
        phases: from `plan_phases`. Latents are cut off from the gradient before the first phase that has one.
        keep: applied to the latents before the first and after every step (TI2V writes the first frame back).
        nested: rematerialise whole steps with gradient, so that the activations of one at a time are kept.
        unroll: write the steps with gradient out instead of looping.
    """
    b = noise.shape[0]
    x = keep(noise)
    trajectory, kl = [], [jnp.zeros((0, b))]
    for phase in phases:
        expert = experts[phase.expert]
        velocity = expert.velocity if phase.gradient else expert.frozen
        reference = expert.reference if phase.gradient else None
        if not phase.gradient:
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

        body = jax.checkpoint(step, prevent_cse=False) if nested and phase.gradient else step
        steps = (jnp.asarray(levels[phase.start : phase.stop]), jnp.asarray(levels[phase.start + 1 : phase.stop + 1]))
        with phase_scope("grad_steps" if phase.gradient else "no_grad_steps"):
            x, (states, divergences) = jax.lax.scan(body, x, steps, unroll=unroll and phase.gradient)
        if not phase.gradient:
            x, states = jax.lax.stop_gradient(x), jax.lax.stop_gradient(states)
        else:
            kl.append(divergences)
        trajectory.append(states)
    return Rollout(x, jnp.concatenate(trajectory), jnp.concatenate(kl))
