"""From noise to the latents that are scored, with gradient as the window says."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float, Int

from rfl_jax.config import Config
from rfl_jax.remat import KEEP_REFERENCE, steps_options
from rfl_jax.sampling.phases import phase_scope
from rfl_jax.sampling.rollout import Expert, Latents, divergence, rollout
from rfl_jax.sampling.sampler import Sampler, compared_steps
from rfl_jax.sampling.schedule import TRAIN_TIMESTEPS, Span
from rfl_jax.sampling.window import DIRECT, draw_steps


def denoise(
    cfg: Config,
    sampler: Sampler,
    experts: Mapping[str, Expert],
    keep: Callable[[Latents], Latents],
    start: Latents,
    *,
    key: Array,
    update: Array | int,
    clips: Int[Array, " b"],
) -> tuple[Latents, Float[Array, "g b"]]:
    """Latents to be scored, and the KL of the steps with gradient, as `Denoised` has it.

    Args:
        cfg: of the run.
        sampler: the steps.
        experts: with a batch's conditioning.
        keep: applied to latents before the first and after every step.
        start: latents before the sampler's first step.
        key: the run's.
        update: how many updates were made; with the key it decides what is drawn.
        clips: numbers of the clips.
    """
    out = rollout(
        experts,
        start,
        sampler.sigmas,
        sampler.spans,
        keep=keep,
        compared=compared_steps(cfg, sampler, key, update, clips),
        drawn=draw_steps(sampler.drawn, key, update) if sampler.drawn else None,
        separate=sampler.separate,
        **steps_options(cfg.policy),
    )
    if not cfg.window.direct:
        return out.latents, out.kl
    step, noise = draw_one(sampler, key, update, clips, out.latents.shape[1:])
    with phase_scope("grad_steps"):
        return align_directly(
            experts, sampler.direct, keep, out.latents, noise, sampler.sigmas, step, nested=cfg.policy == "nested"
        )


def untrained_latents(
    sampler: Sampler, experts: Mapping[str, Expert], keep: Callable[[Latents], Latents], start: Latents
) -> Latents:
    """What the networks before training make of the same noise, without gradient; arguments as `denoise` has them."""
    spans = [dataclasses.replace(span, gradient=False) for span in sampler.spans]
    before = {
        name: dataclasses.replace(expert, frozen=expert.reference or expert.frozen) for name, expert in experts.items()
    }
    return jax.lax.stop_gradient(rollout(before, start, sampler.sigmas, spans, keep=keep).latents)


def draw_one(
    sampler: Sampler, key: Array, update: Array | int, clips: Int[Array, " b"], shape: tuple[int, ...]
) -> tuple[Int[Array, ""], Latents]:
    """One of `sampler.direct`'s steps, and a standard normal noise for each sample: functions of key, update and clip.

    Args:
        sampler: the steps.
        key: the run's.
        update: how many updates were made.
        clips: numbers of the clips. Samples of the same one have the same noise.
        shape: of one sample's latents.
    """
    key = jax.random.fold_in(jax.random.fold_in(key, DIRECT), update)
    steps = np.concatenate([np.arange(span.start, span.stop, dtype=np.int32) for span in sampler.direct])
    step = jnp.asarray(steps)[jax.random.randint(jax.random.fold_in(key, 0), (), 0, len(steps))]
    return step, jax.vmap(lambda clip: jax.random.normal(jax.random.fold_in(key, 1 + clip), shape))(clips)


def predict(
    experts: Mapping[str, Expert],
    spans: Sequence[Span],
    x: Latents,
    sigma: Float[Array, ""],
    step: Int[Array, ""],
    *,
    nested: bool = False,
) -> tuple[Latents, Float[Array, " b"]]:
    """The velocity at one step by the network that takes it, and its divergence from that network's reference.

    Args:
        experts: with a batch's conditioning.
        spans: where `step` may lie. Of two, what the backward pass needs of either network has its place in memory.
        x: latents at the noise level sigma.
        sigma: 0..1.
        step: its number.
        nested: rematerialise the whole step, so that nothing of it is kept until the backward pass.
    """

    def of(expert: Expert) -> tuple[Latents, Float[Array, " b"]]:
        v = expert.velocity(x, jnp.full(x.shape[0], sigma * TRAIN_TIMESTEPS))
        kl = jnp.zeros(x.shape[0]) if expert.reference is None else divergence(expert.reference, x, v, sigma)
        return v, kl

    if nested:
        of = jax.checkpoint(of, policy=KEEP_REFERENCE, static_argnums=0)
    chosen = [experts[span.expert] for span in spans]
    if len(chosen) == 1:
        return of(chosen[0])
    return jax.lax.cond(step < spans[1].start, lambda: of(chosen[0]), lambda: of(chosen[1]))


def align_directly(
    experts: Mapping[str, Expert],
    spans: Sequence[Span],
    keep: Callable[[Latents], Latents],
    clean: Latents,
    noise: Latents,
    sigmas: Float[np.ndarray, " n"],
    step: Int[Array, ""],
    *,
    nested: bool = False,
) -> tuple[Latents, Float[Array, "1 b"]]:
    """Direct-Align: the clean latents again, differentiable through one denoising step at whatever noise.

    From x = (1 - s) clean + s noise the step goes to the next noise level r, x + (r - s) v(x). From what is reached the
    known noise is subtracted, (x + (r - s) v - r noise) / (1 - r): which is clean + (r - s) / (1 - r) (v - (noise - clean)).
    A network that predicts noise - clean gives the clean latents back, and an error at high noise is not magnified.

    Args:
        experts: with a batch's conditioning.
        spans: where `step` may lie.
        keep: applied to what the network sees, and to the result.
        clean: no gradient goes through them.
        noise: standard normal.
        sigmas: noise levels.
        step: its number.
        nested: rematerialise the whole step, so that nothing of it is kept while the result is scored.
    """
    clean = jax.lax.stop_gradient(clean)
    sigma, following = (jnp.asarray(sigmas)[step + i] for i in (0, 1))
    x = keep((1 - sigma) * clean + sigma * noise)
    v, kl = predict(experts, spans, x, sigma, step, nested=nested)
    return keep(clean + (following - sigma) / (1 - following) * (v - (noise - clean))), kl[None]
