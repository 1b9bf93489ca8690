"""The loss of Reward Feedback Learning and the step that minimises it."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array
from jaxtyping import Float

from rfl_jax.config import Config
from rfl_jax.errors import UserError
from rfl_jax.models.wan.config import DiTConfig
from rfl_jax.remat import steps_options
from rfl_jax.rewards.face import reward_loss
from rfl_jax.sampling.rollout import Expert, Velocity, phase_scope, rollout
from rfl_jax.sampling.schedule import Phase, plan_phases, sigmas
from rfl_jax.training.state import Frozen, Networks, States, TrainState

Batch = dict[str, Array]
Step = Callable[[TrainState, Frozen, Batch, Array], tuple[TrainState, dict[str, Array]]]


@dataclasses.dataclass(frozen=True)
class Sampler:
    """The static part of sampling.

    Attributes:
        dit: shape of the DiTs.
        levels: sigmas.
        phases: who serves which steps.
        guidance: classifier-free guidance scale of each expert; 1 is none.
    """

    dit: DiTConfig
    levels: Float[np.ndarray, " n"]
    phases: tuple[Phase, ...]
    guidance: Mapping[str, float]

    @property
    def guided(self) -> bool:
        """Whether any expert is guided, which takes the features of a negative prompt."""
        return any(scale != 1.0 for scale in self.guidance.values())

    def predictions(self, expert: str) -> int:
        """Forward passes of one velocity."""
        return 1 if self.guidance[expert] == 1.0 else 2


def make_sampler(cfg: Config, dit: DiTConfig) -> Sampler:
    """The sampler of a run.

    Raises:
        UserError: a trained DiT that no step with gradient uses.
    """
    levels = sigmas(cfg.num_inference_steps, cfg.sampling.shift)
    boundary = None if dit.boundary is None else cfg.min_timestep_boundary
    above = int(np.sum(levels[:-1] > np.float32(cfg.max_timestep_boundary)))
    phases = plan_phases(levels, boundary=boundary, mid=max(cfg.mid_timestep, above), final=cfg.final_timestep)
    reached = {phase.expert for phase in phases if phase.gradient}
    for name in set(cfg.trained) & {"dit", "dit2"}:
        if name not in reached:
            raise UserError(
                f"config.trainable_models: {name} serves no step with gradient (steps {cfg.mid_timestep} to "
                f"{cfg.final_timestep}), expected one of {', '.join(sorted(reached))} or a lower mid_timestep"
            )
    return Sampler(dit, levels, phases, dict.fromkeys(("dit", "dit2"), cfg.sampling.guidance_scale))


def split_prefix(cfg: Config, sampler: Sampler) -> tuple[Sampler, Sampler]:
    """The steps whose result depends on the clip and its noise alone, and those after them.

    The first are the leading phases without gradient of networks that do not train, if nothing else they depend on
    does. They are a program of their own, whether it runs once, for the cache, or in every update: so both agree to
    the last bit.
    """
    count = 0
    for phase in sampler.phases:
        if phase.gradient or phase.expert in cfg.trained or "text_encoder" in cfg.trained:
            break
        count += 1
    before, after = sampler.phases[:count], sampler.phases[count:]
    return dataclasses.replace(sampler, phases=before), dataclasses.replace(sampler, phases=after)


def caches_prefix(cfg: Config, prefix: Sampler) -> bool:
    """Whether the latents after the prefix are computed once and kept.

    Raises:
        UserError: that is asked for where it cannot be.
    """
    finite = cfg.noise.mode == "fixed" or cfg.noise.per_sample > 0
    possible = bool(prefix.phases) and finite
    if cfg.noise.prefix_cache == "on" and not possible:
        raise UserError(
            "config.noise.prefix_cache: on, but "
            + ("what trains takes part in the first step" if finite else "noise.per_sample is 0: noises never repeat")
        )
    return possible and cfg.noise.prefix_cache != "off"


def start_noise(key: Array, samples: Array, index: Array, shape: tuple[int, ...], mode: str) -> Float[Array, "b ..."]:
    """Standard normal latents.

    Args:
        key: the run's.
        samples: [b] numbers of the samples.
        index: [b] which of a sample's noises.
        shape: of one sample's latents.
        mode: "fresh": a function of (key, sample, index); "fixed": of the key alone.
    """
    if mode == "fixed":
        return jnp.broadcast_to(jax.random.normal(key, shape), (samples.shape[0], *shape))

    def draw(sample: Array, index: Array) -> Array:
        return jax.random.normal(jax.random.fold_in(jax.random.fold_in(key, sample), index), shape)

    return jax.vmap(draw)(samples, index)


def latent_shape(sampler: Sampler, batch: Batch) -> tuple[int, ...]:
    """Latent frames, rows, columns and channels of a batch's videos."""
    return (*batch["y"].shape[1:4], sampler.dit.out_dim)


def bind_experts(
    networks: Networks, sampler: Sampler, params: States, frozen: Frozen, batch: Batch
) -> tuple[dict[str, Expert], Callable[[Array], Array]]:
    """The experts with a batch's conditioning, and what is done to latents between steps.

    Args:
        batch: "y" [b, t, h, w, c] conditioning (none where no first frame is given), "context" [b, s, d] text
            features, and with guidance "negative_context". The text encoder's tokens "ids" and "mask" instead of
            "context" where it trains.
    """
    cfg = sampler.dit
    y = batch["y"].astype(jnp.float32) if "y" in batch else None
    context = batch.get("context")
    if "text_encoder" in networks.graphs:
        context = networks.build("text_encoder", params, frozen).context(batch["ids"], batch["mask"])
        context = context[:, : cfg.text_len]

    def velocity(model: Any, context: Array | None, scale: float) -> Velocity:
        def one(x: Array, t: Array, context: Array | None) -> Array:
            if y is None:
                return model(x, t, context)
            if not cfg.first_frame_in_latents:
                return model(jnp.concatenate([x, y], -1), t, context)
            # TI2V: the tokens of the first latent frame, which is given, have timestep 0.
            pt, ph, pw = cfg.patch_size
            frames, rows, columns = x.shape[1] // pt, x.shape[2] // ph, x.shape[3] // pw
            later = jnp.repeat(jnp.arange(frames) > 0, rows * columns)
            return model(x, t[:, None] * later, context)

        def guided(x: Array, t: Array) -> Array:
            v = one(x, t, context)
            if scale == 1.0:
                return v
            shape = (x.shape[0], *batch["negative_context"].shape[1:])
            away = one(x, t, jnp.broadcast_to(batch["negative_context"], shape))
            return away + scale * (v - away)

        return guided

    experts = {}
    still = jax.lax.stop_gradient(params)
    still_context = None if context is None else jax.lax.stop_gradient(context)
    for name in {phase.expert for phase in sampler.phases}:
        trains, scale = name in params, sampler.guidance[name]
        reference = velocity(networks.build_reference(name, frozen), still_context, scale) if trains else None
        experts[name] = Expert(
            velocity(networks.build(name, params, frozen), context, scale),
            reference,
            velocity(networks.build(name, still, frozen), still_context, scale),
        )

    def keep(x: Array) -> Array:
        return x if y is None or not cfg.first_frame_in_latents else x.at[:, :1].set(y[:, :1])

    return experts, keep


def make_loss(
    cfg: Config, networks: Networks, sampler: Sampler
) -> Callable[[States, Frozen, Batch, Array], tuple[Array, dict[str, Array]]]:
    """`(params, frozen, batch, key) -> (loss, figures)` of one micro-batch.

    A batch may bring the latents it starts from: "prefix", after steps that are not the sampler's, or "noise".
    """

    def loss(params: States, frozen: Frozen, batch: Batch, key: Array) -> tuple[Array, dict[str, Array]]:
        experts, keep = bind_experts(networks, sampler, params, frozen, batch)
        start = batch.get("prefix", batch.get("noise"))
        if start is None:
            shape = latent_shape(sampler, batch)
            start = start_noise(key, batch["sample"], batch["noise_index"], shape, cfg.noise.mode)
        out = rollout(experts, start, sampler.levels, sampler.phases, keep=keep, **steps_options(cfg.policy))
        with phase_scope("vae"):
            video = networks.build("vae", params, frozen).decode(out.latents)
        with phase_scope("reward"):
            score = networks.build("reward", params, frozen)(video, batch["pool"])
        # Samples without a face say nothing: no reward and no gradient of it.
        rewarded = jnp.where(score.valid, reward_loss(score.score), 0.0)
        kl = jnp.mean(out.kl)
        value = cfg.reward.weight * jnp.mean(rewarded) + cfg.reward.kl_weight * kl
        count = jnp.sum(score.valid)
        figures = {
            "loss": value,
            "score_sum": jnp.sum(jnp.where(score.valid, score.score, 0.0)),
            "score_count": count,
            "kl_loss": kl,
            "no_face_fraction": 1 - jnp.mean(score.valid.astype(jnp.float32)),
            "video": jnp.clip(jnp.rint((video[0] + 1) * 127.5), 0, 255).astype(jnp.uint8),
        }
        return value, figures

    return loss


def make_step(
    cfg: Config, networks: Networks, sampler: Sampler, tx: optax.GradientTransformation, schedule: optax.Schedule
) -> Step:
    """`(state, frozen, batch, key) -> (state, metrics)`: one optimizer update.

    The batch's arrays have a leading axis of micro-batches, whose gradients are averaged.
    """
    grad = jax.value_and_grad(make_loss(cfg, networks, sampler), has_aux=True)

    def step(state: TrainState, frozen: Frozen, batch: Batch, key: Array) -> tuple[TrainState, dict[str, Array]]:
        def micro(total: States, batch: Batch) -> tuple[States, dict[str, Array]]:
            (_, figures), grads = grad(state.params, frozen, batch, key)
            return jax.tree.map(jnp.add, total, grads), figures

        zeros = jax.tree.map(jnp.zeros_like, state.params)
        grads, figures = jax.lax.scan(micro, zeros, batch)
        count = figures["loss"].shape[0]
        grads = jax.tree.map(lambda g: g / count, grads)
        opt_state = state.opt_state
        if cfg.optimizer_memory != "device":
            opt_state = jax.device_put(opt_state, jax.memory.Space.Device)
        with phase_scope("optimizer"):
            updates, opt_state = tx.update(grads, opt_state, state.params)
            params = cast(States, optax.apply_updates(state.params, updates))
        metrics = {
            "loss": jnp.mean(figures["loss"]),
            "face_score": jnp.sum(figures["score_sum"]) / jnp.maximum(jnp.sum(figures["score_count"]), 1),
            "kl_loss": jnp.mean(figures["kl_loss"]),
            "grad_norm": optax.tree.norm(grads),
            "no_face_fraction": jnp.mean(figures["no_face_fraction"]),
            "learning_rate": schedule(state.step),
            "video": figures["video"][0],
        }
        return TrainState(state.step + 1, params, opt_state), metrics

    return step
