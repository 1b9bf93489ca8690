"""The real-data loss: flow matching on the real clips' latents, at the noise levels that the trained networks serve.

The reward and the KL know what a network makes; this knows what a clip is that moves, and pulls towards it.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int

from rfl_jax.config import TRAINABLE, Config
from rfl_jax.networks.parts import Frozen, Networks, States
from rfl_jax.sampling.phases import phase_scope
from rfl_jax.sampling.rollout import Latents, Velocity
from rfl_jax.sampling.sampler import Batch, Sampler, bind_experts, compared_spans
from rfl_jax.sampling.schedule import TRAIN_TIMESTEPS, shifted

# Folded into the run's key, so that these noises have nothing to do with those that videos start from.
REAL = 0x2EA1


def trained_experts(cfg: Config, sampler: Sampler) -> tuple[str, ...]:
    """The DiTs that train, in the order of their steps."""
    return tuple(dict.fromkeys(span.expert for span in compared_spans(cfg, sampler)))


def sigma_range(cfg: Config, sampler: Sampler, expert: str) -> tuple[float, float]:
    """The noise levels that a DiT serves and that may have a gradient, lowest and highest."""
    low, high = 0.0, 1.0
    if sampler.dit.boundary is not None:
        low, high = (cfg.min_timestep_boundary, 1.0) if expert == "dit" else (0.0, cfg.min_timestep_boundary)
    return low, min(high, cfg.max_timestep_boundary)


def draw(
    key: Array,
    update: Array | int,
    clips: Int[Array, " b"],
    shape: tuple[int, ...],
    *,
    expert: str,
    levels: tuple[float, float],
    shift: float,
) -> tuple[Float[Array, " b"], Float[Array, "b ..."]]:
    """Noise levels and noises, a function of (key, update, clip, expert).

    Args:
        key: the run's.
        update: how many updates were made.
        clips: their numbers.
        shape: of one clip's latents.
        expert: the DiT that is asked.
        levels: lowest and highest noise level. Between them they are as dense as those of the sampler's schedule.
        shift: of that schedule.
    """
    key = jax.random.fold_in(jax.random.fold_in(key, REAL), update)
    key = jax.random.fold_in(key, TRAINABLE.index(expert))
    # The shift of 1/shift undoes a shift.
    low, high = (shifted(level, 1 / shift) for level in levels)

    def of_clip(clip: Array) -> tuple[Array, Array]:
        noise, level = jax.random.split(jax.random.fold_in(key, clip))
        even = jax.random.uniform(level, minval=low, maxval=high)
        return shifted(even, shift), jax.random.normal(noise, shape)

    return jax.vmap(of_clip)(clips)


def flow_matching(
    velocity: Velocity, keep: Callable[[Latents], Latents], clean: Latents, sigma: Float[Array, " b"], noise: Latents
) -> Float[Array, " b"]:
    """mean((v - (noise - clean))^2) of each sample, where v is the velocity at (1 - sigma) * clean + sigma * noise.

    Args:
        velocity: (latents, timesteps in 0..1000) -> velocity.
        keep: writes what is given of a clip into its latents; what it overwrites does not count.
        clean: latents of real clips.
        sigma: noise levels, 0..1.
        noise: standard normal.
    """
    s = sigma[:, None, None, None, None]
    return squared_error(velocity(keep((1 - s) * clean + s * noise), sigma * TRAIN_TIMESTEPS), keep, clean, noise)


def squared_error(v: Latents, keep: Callable[[Latents], Latents], clean: Latents, noise: Latents) -> Float[Array, " b"]:
    """mean((v - (noise - clean))^2) of each sample where nothing is given, arguments as `flow_matching` has them."""
    free = keep(jnp.ones_like(clean)) - keep(jnp.zeros_like(clean))  # 1, and 0 where something is given
    axes = (1, 2, 3, 4)
    return jnp.sum(free * (v - (noise - clean)) ** 2, axes) / jnp.sum(free, axes)


def real_loss(
    cfg: Config,
    networks: Networks,
    sampler: Sampler,
    params: States,
    frozen: Frozen,
    batch: Batch,
    key: Array,
    update: Array | int,
) -> Array:
    """The mean of `flow_matching` over a micro-batch's clips and the DiTs that train, each at its own noise levels.

    Args:
        cfg: of the run.
        networks: static halves.
        sampler: denoising steps of the update.
        params: weights that train.
        frozen: all other weights.
        batch: with "latents" [b, t, h, w, c] of the real clips.
        key: the run's.
        update: how many updates were made.
    """
    # The networks themselves are taught, not their guided velocity.
    unguided = dict.fromkeys(sampler.guidance, 1.0)
    taught = dataclasses.replace(sampler, spans=compared_spans(cfg, sampler), guidance=unguided)
    experts, keep = bind_experts(networks, taught, params, frozen, batch)
    clean = batch["latents"]
    losses = []
    with phase_scope("grad_steps"):
        for name in trained_experts(cfg, sampler):
            levels = sigma_range(cfg, sampler, name)
            sigma, noise = draw(
                key, update, batch["clip"], clean.shape[1:], expert=name, levels=levels, shift=cfg.sampling.shift
            )
            losses.append(jnp.mean(flow_matching(experts[name].velocity, keep, clean, sigma, noise)))
    return jnp.mean(jnp.stack(losses))
