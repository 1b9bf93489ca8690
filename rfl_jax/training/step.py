"""The loss of Reward Feedback Learning and the step that minimises it."""

import dataclasses
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, cast

import jax
import jax.numpy as jnp
import optax
from jax import Array

from rfl_jax.chips import compiler_options
from rfl_jax.config import Config
from rfl_jax.models.wan.vae import VAE
from rfl_jax.networks.parts import Frozen, Networks, States
from rfl_jax.networks.terms import build_terms, shown_as
from rfl_jax.sampling.denoise import denoise, untrained_latents
from rfl_jax.sampling.phases import phase_scope
from rfl_jax.sampling.real import real_loss
from rfl_jax.sampling.sampler import Batch, Sampler, bind_experts, latent_shape, start_noise
from rfl_jax.sampling.window import draw_frames
from rfl_jax.training.budget import adapted
from rfl_jax.training.finite import finite_gradients, finite_weights
from rfl_jax.training.hold import followed, push
from rfl_jax.training.nft import advantages, weighed_matching
from rfl_jax.training.rewarded import reward_of
from rfl_jax.training.state import TrainState, follow

Metrics = dict[str, Any]
# Of the metrics of a micro-batch, those of the guards that are on, by name: means over its samples.
GUARDS = "guards"
# And those of the terms in `reward.terms`, by name: the sum of their valid scores, and how many there are.
TERMS = "terms"
# Likewise the drifts of terms that hold their mean.
DRIFTS = "drifts"
Step = Callable[[TrainState, Frozen, Batch, Array], tuple[TrainState, Metrics]]


def make_loss(cfg: Config, networks: Networks, sampler: Sampler) -> Callable[..., tuple[Array, Metrics]]:
    """`(params, frozen, batch, key, update=0, kl_factor=1, pushes=None) -> (loss, metrics)` of one micro-batch, after so many
    updates, with so many times the KL's weight and these pushes on terms that hold their mean.

    A batch may bring the latents it starts from: "prefix", after steps that are not the sampler's, or "noise".
    """

    def loss(
        params: States,
        frozen: Frozen,
        batch: Batch,
        key: Array,
        update: Array | int = 0,
        kl_factor: Array | float = 1.0,
        pushes: Mapping[str, Array] | None = None,
    ) -> tuple[Array, Metrics]:
        experts, keep = bind_experts(networks, sampler, params, frozen, batch)
        start = batch.get("prefix", batch.get("noise"))
        if start is None:
            shape = latent_shape(sampler, batch)
            start = start_noise(key, batch["clip"], batch["noise_index"], shape, cfg.noise.mode)
        told = {"key": key, "update": update, "clips": batch["clip"]}
        latents, kls = denoise(cfg, sampler, experts, keep, start, **told)
        with phase_scope("vae"):
            video = decode_scored(cfg, networks.build("vae", params, frozen), latents, key, update)
        untrained = None
        if cfg.needs_untrained:
            before = untrained_latents(sampler, experts, keep, start)
            with phase_scope("vae"):
                untrained = decode_scored(cfg, networks.build("vae", params, frozen), before, key, update)
        with phase_scope("reward"):
            terms = build_terms(cfg, networks, params, frozen)
            faces = networks.build("reward", params, frozen)
            reward = reward_of(cfg, faces, terms, video, batch, update, key, untrained, pushes)
        losses, score = reward.losses, reward.score
        if cfg.nft.group:
            advantage = advantages(-losses, score.valid | (cfg.face_term.weight == 0), cfg.nft.group)
            losses, kls = weighed_matching(cfg, sampler, experts, keep, latents, advantage, **told)
        kl = jnp.mean(kls)
        value = cfg.reward.weight * jnp.mean(losses) + cfg.reward.kl_weight * kl_factor * kl
        count = jnp.sum(score.valid)
        metrics = {
            "loss": value,
            "score_sum": jnp.sum(jnp.where(score.valid, score.score, 0.0)),
            "score_count": count,
            "kl_loss": kl,
            "no_face_fraction": 1 - jnp.mean(score.valid.astype(jnp.float32)),
            "video": jnp.clip(jnp.rint((video[0] + 1) * 127.5), 0, 255).astype(jnp.uint8),
            GUARDS: reward.guards,
            TERMS: reward.tallies,
            DRIFTS: reward.drifts,
        }
        return value, metrics

    return loss


def decode_scored(cfg: Config, vae: VAE, latents: Array, key: Array, update: Array | int) -> Array:
    """The video that is scored: all of it, or the frames of `reward.frames` latent ones where there are more."""
    count, of = cfg.reward.frames, latents.shape[1]
    if not 0 < count < of:
        return vae.decode(latents)
    return vae.decode_window(latents, draw_frames(key, update, count, of), count)


def make_gradient(cfg: Config, networks: Networks, sampler: Sampler) -> Callable[..., Any]:
    """`(params, frozen, batch, key, update, kl_factor, pushes) -> ((loss, metrics), gradients)` of one micro-batch: of `make_loss`, and
    of the real-data loss in every `real.every`-th update, in the others of which nothing of it runs.
    """
    ours = jax.value_and_grad(make_loss(cfg, networks, sampler), has_aux=True)
    if not cfg.real.weight:
        return ours

    def gradient(
        params: States,
        frozen: Frozen,
        batch: Batch,
        key: Array,
        update: Array,
        kl_factor: Array,
        pushes: Mapping[str, Array],
    ) -> tuple[tuple[Array, Metrics], States]:
        def matched(params: States) -> Array:
            return cfg.real.weight * real_loss(cfg, networks, sampler, params, frozen, batch, key, update)

        def left_out(params: States) -> tuple[Array, States]:
            return jnp.float32(0), jax.tree.map(jnp.zeros_like, params)

        due = update % cfg.real.every == 0
        # Forward and backward pass are in one branch: activations do not leave it.
        real, pull = jax.lax.cond(due, jax.value_and_grad(matched), left_out, params)
        (value, metrics), grads = ours(params, frozen, batch, key, update, kl_factor, pushes)
        value = value + real
        guards = metrics[GUARDS] | {"real_loss": jnp.where(due, real / cfg.real.weight, jnp.nan)}
        return (value, metrics | {"loss": value, GUARDS: guards}), jax.tree.map(jnp.add, grads, pull)

    return gradient


def accumulate(grad: Callable[..., Any], batch: Batch, like: States) -> tuple[States, Metrics]:
    """Mean gradients of the micro-batches, and their metrics stacked.

    Args:
        grad: `(batch=) -> ((loss, metrics), gradients)`.
        batch: arrays with a leading axis of micro-batches.
        like: shapes of the gradients.
    """

    def micro(total: States, batch: Batch) -> tuple[States, Metrics]:
        (_, metrics), grads = grad(batch=batch)
        return jax.tree.map(jnp.add, total, grads), metrics

    count = jax.tree.leaves(batch)[0].shape[0]
    if count == 1:
        # A loop of one turn would keep the compiler from arranging what is in it.
        (_, metrics), grads = grad(batch=jax.tree.map(lambda x: x[0], batch))
        return grads, jax.tree.map(lambda x: x[None], metrics)
    total, metrics = jax.lax.scan(micro, jax.tree.map(jnp.zeros_like, like), batch)
    return jax.tree.map(lambda g: g / count, total), metrics


def _norms(grads: States) -> Metrics:
    """The norm of each network's gradients, where several train: one that is much the larger leaves the others little of
    `max_grad_norm`.
    """
    return {f"grad_norm_{name}": optax.tree.norm(part) for name, part in grads.items()}


def make_step(
    cfg: Config, networks: Networks, sampler: Sampler, tx: optax.GradientTransformation, schedule: optax.Schedule
) -> Step:
    """`(state, frozen, batch, key) -> (state, metrics)`: one optimizer update.

    The batch's arrays have a leading axis of micro-batches, whose gradients are averaged. An update whose loss
    or gradients are not all finite is skipped: the state stays as it was. The metric "finite" tells of `checked_names`.
    """
    grad = make_gradient(cfg, networks, sampler)

    def step(state: TrainState, frozen: Frozen, batch: Batch, key: Array) -> tuple[TrainState, Metrics]:
        pushes = {name: push(held) for name, held in state.held.items()}
        told = {"key": key, "update": state.step, "kl_factor": state.kl_factor, "pushes": pushes}
        grads, metrics = accumulate(partial(grad, state.params, frozen, **told), batch, state.params)
        before = state
        if cfg.optimizer_memory != "device":
            opt_state = jax.device_put(state.opt_state, jax.memory.Space.Device)
            before = dataclasses.replace(state, opt_state=opt_state)
        with phase_scope("optimizer"):
            updates, opt_state = tx.update(grads, before.opt_state, state.params)
            # An update is a multiple of the rate: weight decay is too.
            updates = jax.tree.map(lambda u: state.factors["learning_rate"] * u, updates)
            params = cast(States, optax.apply_updates(state.params, updates))
            average = follow(state.average, params, cfg.ema.decay, state.step) if cfg.ema.decay else state.average
            # An update that is not finite leaves no trace, not in the moments nor in the schedule either. Its new values
            # have no say in that: all of them would have to be there before the first could take the old one's place.
            finite = finite_gradients(grads, jnp.mean(metrics["loss"]))
            factors = state.factors
            if cfg.kl.target:
                # An alarm that raises the KL's weight lowers its budget: otherwise the budget would undo it.
                used = state.factors["kl"] * jnp.mean(metrics["kl_loss"])
                factors = factors | {"kl_target": adapted(factors["kl_target"], used, cfg.kl.target)}
            drifts = {name: (jnp.sum(total), jnp.sum(count)) for name, (total, count) in metrics[DRIFTS].items()}
            held = {name: followed(state.held[name], *drifts[name]) for name in state.held}
            kept = TrainState(state.step + 1, params, opt_state, average, factors, held)
            kept = jax.tree.map(partial(jnp.where, jnp.all(finite)), kept, before)
        means = {
            "loss": jnp.mean(metrics["loss"]),
            "face_score": jnp.sum(metrics["score_sum"]) / jnp.maximum(jnp.sum(metrics["score_count"]), 1),
            "kl_loss": jnp.mean(metrics["kl_loss"]),
            "grad_norm": optax.tree.norm(grads),
            **(_norms(grads) if len(grads) > 1 else {}),
            "no_face_fraction": jnp.mean(metrics["no_face_fraction"]),
            "learning_rate": schedule(state.step) * state.factors["learning_rate"],
            "finite": finite & finite_weights(kept.params),
            "video": metrics["video"][0],
            **jax.tree.map(jnp.mean, metrics[GUARDS]),
            **{shown_as(name): jnp.sum(total) / jnp.sum(count) for name, (total, count) in metrics[TERMS].items()},
            **{f"{shown_as(name)}/drift": total / count for name, (total, count) in drifts.items()},
            **{f"{shown_as(name)}/push": pushed for name, pushed in pushes.items()},
        }
        if cfg.kl.target:
            means["kl_weight"] = cfg.reward.kl_weight * state.kl_factor
        return kept, means

    return step


def jit_step(
    cfg: Config,
    networks: Networks,
    sampler: Sampler,
    tx: optax.GradientTransformation,
    schedule: optax.Schedule,
    places: TrainState,
) -> Any:
    """The jitted step, to be called under `jax.set_mesh`. The state that goes in is donated.

    Args:
        cfg: of the run.
        networks: static halves.
        sampler: denoising steps that are part of the step.
        tx: optimizer.
        schedule: of the learning rate.
        places: shardings of the state.
    """
    step = make_step(cfg, networks, sampler, tx, schedule)
    # Metrics and the video are wanted on every host.
    return jax.jit(
        step,
        out_shardings=(places, places.step),
        donate_argnums=0,
        compiler_options=compiler_options(places.step.mesh, cfg.compiler_options),
    )
