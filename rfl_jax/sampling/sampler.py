"""What of sampling is fixed before anything runs: noise levels, which network takes which steps, which of them have
gradient, guidance; and the networks with a batch's conditioning bound to them.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float, Int

from rfl_jax.config import Config
from rfl_jax.errors import UserError
from rfl_jax.models.quantize import round_inputs
from rfl_jax.models.wan.conditioning import conditioning_of
from rfl_jax.models.wan.config import DIT_PRESETS, DiTConfig
from rfl_jax.networks.parts import Frozen, Networks, States
from rfl_jax.sampling.rollout import Expert, Latents, Velocity
from rfl_jax.sampling.schedule import TRAIN_TIMESTEPS, Span, experts_at, make_sigmas, plan_spans
from rfl_jax.sampling.window import choose_window

Batch = Mapping[str, Array]

# Folded into the run's key, so that the choice of steps has nothing to do with a noise.
KL = 0x4B1D


@dataclasses.dataclass(frozen=True)
class Sampler:
    """The static part of sampling.

    Attributes:
        dit: shape of the DiTs.
        sigmas: noise levels, one more than steps.
        spans: which network takes which steps.
        guidance: classifier-free guidance scale of each expert; 1 is none.
        drawn: of spans of which only so many steps have gradient, others in each update, how many.
        direct: where the gradient is that of one step from known noise (`window.direct`, `nft`), and the spans have none: the
            steps it can be, each as likely in an update as another.
        separate: whether each step's gradient stays its own, as `rollout` says.
        conditional: whether guided velocities have their gradient through the prediction with the prompt alone.
        rounds_inputs: whether int8 weights meet int8 inputs where nothing is differentiated: in spans without gradient
            and in the KL's reference.
    """

    dit: DiTConfig
    sigmas: Float[np.ndarray, " n"]
    spans: tuple[Span, ...]
    guidance: Mapping[str, float]
    drawn: Mapping[Span, int] = dataclasses.field(default_factory=dict)
    direct: tuple[Span, ...] = ()
    separate: bool = False
    conditional: bool = False
    rounds_inputs: bool = False

    @property
    def experts(self) -> list[str]:
        """Networks that take steps."""
        return sorted({span.expert for span in self.spans})

    @property
    def guided(self) -> bool:
        """Whether any expert is guided, which takes the features of a negative prompt."""
        return any(scale != 1.0 for scale in self.guidance.values())

    def with_gradient(self, span: Span) -> int:
        """Steps of a span that have gradient in one update."""
        return self.drawn.get(span, span.stop - span.start) if span.gradient else 0

    def predictions(self, expert: str) -> int:
        """Forward passes of one velocity."""
        return 1 if self.guidance[expert] == 1.0 else 2

    def differentiated(self, expert: str) -> int:
        """Those of them that have a gradient, in a step that has one."""
        return 1 if self.conditional else self.predictions(expert)


def make_sampler(cfg: Config) -> Sampler:
    """All steps of an update.

    Raises:
        UserError: a trained DiT that no step with gradient uses, a window of other steps, or groups of steps that do not
            fill its steps.
    """
    dit = DIT_PRESETS[cfg.preset]
    sigmas = make_sigmas(cfg.num_inference_steps, cfg.sampling.shift)
    boundary = None if dit.boundary is None else cfg.min_timestep_boundary
    above = int(np.sum(sigmas[:-1] > np.float32(cfg.max_timestep_boundary)))
    first = max(cfg.mid_timestep, above)
    plan = partial(plan_spans, sigmas, boundary=boundary, mid=first, final=cfg.final_timestep)
    spans = plan()
    _check_reached(cfg, sigmas, experts_at(sigmas[:-1] * TRAIN_TIMESTEPS, boundary), above)
    experts = [span.expert for span in spans for _ in range(span.start, span.stop)]
    window = choose_window(cfg, experts, first)
    drawn: dict[Span, int] = {}
    direct: tuple[Span, ...] = ()
    if window is not None:
        spans = plan(among=window.steps)
        drawn = {
            span: window.drawn[span.expert]
            for span in spans
            if span.gradient and window.drawn.get(span.expert, span.stop - span.start) < span.stop - span.start
        }
    if cfg.window.direct or cfg.nft.group:
        direct = tuple(span for span in spans if span.gradient)
        spans = plan(among=())
    guidance: dict[str, float] = dict.fromkeys(("dit", "dit2"), cfg.sampling.guidance_scale)
    sampler = Sampler(
        dit,
        sigmas,
        spans,
        guidance,
        drawn=drawn,
        direct=direct,
        separate=cfg.window.stop_input_gradient,
        conditional=cfg.sampling.guidance_gradient == "conditional",
        rounds_inputs=cfg.frozen_activations == "int8",
    )
    if cfg.kl.every > 1:
        _check_groups(cfg, sampler)
    return sampler


def _check_reached(cfg: Config, sigmas: Float[np.ndarray, " n"], experts: Sequence[str], above: int) -> None:
    """Raises UserError where a DiT trains that takes no step with gradient: it would stay as it is.

    Args:
        cfg: of the run.
        sigmas: noise levels, one more than steps.
        experts: the network of each step.
        above: first step that `max_timestep_boundary` lets have a gradient.
    """
    first, final = max(cfg.mid_timestep, above), cfg.final_timestep
    reached = set(experts[first : final + 1])
    for name in (name for name in ("dit", "dit2") if name in cfg.trained and name not in reached):
        key = cfg.named_in(name)
        steps = [i for i, expert in enumerate(experts) if expert == name]
        if not steps:
            raise UserError(f"config.{key}: {name} takes no denoising step, expected {experts[0]}")
        last, ways = min(steps[-1], final), []
        if steps[0] > final:
            ways.append(f"final_timestep of at least {steps[0]}")
        elif cfg.mid_timestep > last:
            ways.append(f"mid_timestep of at most {last}")
        if above > last >= steps[0]:
            # Rounded up, so that the number that is told is enough.
            ways.append(f"max_timestep_boundary of at least {math.ceil(float(sigmas[last]) * 1e4) / 1e4:g}")
        other = f"{' and '.join(sorted(reached))}, or " if reached else ""
        raise UserError(
            f"config.{key}: {name} serves no step with gradient: it takes {_steps_told(steps[0], steps[-1])}, those with "
            f"gradient are {_steps_told(first, final)}; expected {other}{' and '.join(ways)}"
        )


def _steps_told(first: int, last: int) -> str:
    return "none" if first > last else f"step {first}" if first == last else f"steps {first} to {last}"


def _check_groups(cfg: Config, sampler: Sampler) -> None:
    """Raises UserError where groups of `kl.every` steps do not fill the steps that have a reference."""
    counts = [(span.stop - span.start, span.expert) for span in compared_spans(cfg, sampler)]
    expected = ""
    if sampler.drawn or sampler.direct:
        one = "window.direct" if cfg.window.direct else "nft"
        expected = "1, as the window draws the steps" if sampler.drawn else f"1, as {one} takes one step"
    elif not counts:
        expected = "1, as no DiT trains"
    elif any(count % cfg.kl.every for count, _ in counts):
        told = " and ".join(f"{count} of {expert}" for count, expert in counts)
        expected = f"a divisor of the steps with gradient ({told})"
    if expected:
        raise UserError(f"config.kl.every: expected {expected}, got {cfg.kl.every}")


def compared_spans(cfg: Config, sampler: Sampler) -> tuple[Span, ...]:
    """The steps whose velocity has a reference: those with gradient of networks that train."""
    steps = (*sampler.spans, *sampler.direct)
    return tuple(span for span in steps if span.gradient and span.expert in cfg.trained)


def compared_steps(
    cfg: Config, sampler: Sampler, key: Array, update: Array | int, clips: Int[Array, " b"]
) -> dict[Span, Int[Array, "k b"]] | None:
    """Which steps of each span the KL compares with the reference: one of every `kl.every`, at random; None: all.

    Args:
        cfg: of the run.
        sampler: the steps.
        key: the run's.
        update: how many updates were made. A clip's steps are a function of key, update and the clip's number, whatever
            the mesh, and whether or not the run was interrupted.
        clips: numbers of the clips.
    """
    every = cfg.kl.every
    if every == 1:
        return None
    key = jax.random.fold_in(jax.random.fold_in(key, KL), update)

    def draw(span: Span) -> Int[Array, "k b"]:
        groups = (span.stop - span.start) // every

        def of_clip(clip: Array) -> Int[Array, " k"]:
            own = jax.random.fold_in(jax.random.fold_in(key, clip), span.start)
            return every * jnp.arange(groups) + jax.random.randint(own, (groups,), 0, every)

        return jax.vmap(of_clip, out_axes=1)(clips)

    return {span: draw(span) for span in compared_spans(cfg, sampler)}


def split_prefix(cfg: Config, sampler: Sampler) -> tuple[Sampler, Sampler]:
    """The steps whose result depends on the clip and its noise alone, and those after them.

    The first are the leading spans without gradient of networks that do not train, if nothing else they depend on
    does. They are a program of their own, whether it runs once, for the cache, or in every update: so both agree to
    the last bit.
    """
    count = 0
    for span in sampler.spans:
        if span.gradient or span.expert in cfg.trained or "text_encoder" in cfg.trained:
            break
        count += 1
    before, after = sampler.spans[:count], sampler.spans[count:]
    return dataclasses.replace(sampler, spans=before, drawn={}, direct=()), dataclasses.replace(sampler, spans=after)


def caches_prefix(cfg: Config, prefix: Sampler) -> bool:
    """Whether the latents after the prefix are computed once and kept.

    Raises:
        UserError: that is asked for where it cannot be.
    """
    finite = cfg.noise.mode == "fixed" or cfg.noise.per_sample > 0
    possible = bool(prefix.spans) and finite
    if cfg.noise.prefix_cache == "on" and not possible:
        raise UserError(
            "config.noise.prefix_cache: on, but "
            + ("what trains takes part in the first step" if finite else "noise.per_sample is 0: noises never repeat")
        )
    return possible and cfg.noise.prefix_cache != "off"


def different_noises(cfg: Config) -> int:
    """How many different noises a clip has before the first comes again; 0: it never does."""
    return 1 if cfg.noise.mode == "fixed" else cfg.noise.per_sample


def start_noise(
    key: Array, clips: Int[Array, " b"], index: Int[Array, " b"], shape: tuple[int, ...], mode: str
) -> Float[Array, "b ..."]:
    """Standard normal latents.

    Args:
        key: the run's.
        clips: numbers of the clips.
        index: which of a clip's noises.
        shape: of one video's latents.
        mode: "fresh": a function of (key, clip, index); "fixed": of the key alone.
    """
    if mode == "fixed":
        return jnp.broadcast_to(jax.random.normal(key, shape)[None], (clips.shape[0], *shape))

    def draw(clip: Array, index: Array) -> Array:
        return jax.random.normal(jax.random.fold_in(jax.random.fold_in(key, clip), index), shape)

    return jax.vmap(draw)(clips, index)


def latent_shape(sampler: Sampler, batch: Batch) -> tuple[int, ...]:
    """Latent frames, rows, columns and channels of a batch's videos."""
    return (*batch["y"].shape[1:4], sampler.dit.out_dim)


def bind_experts(
    networks: Networks, sampler: Sampler, params: States, frozen: Frozen, batch: Batch
) -> tuple[dict[str, Expert], Callable[[Latents], Latents]]:
    """The experts with a batch's conditioning, and what is done to latents between steps.

    Args:
        networks: static halves.
        sampler: whose experts are bound.
        params: weights that train.
        frozen: all other weights.
        batch: "y" [b, t, h, w, c] conditioning (none where no first frame is given), "context" [b, s, d] text
            features, and with guidance "negative_context". The text encoder's tokens "ids" and "mask" instead of
            "context" where it trains.
    """
    y = batch["y"].astype(jnp.float32) if "y" in batch else None
    conditioning = None if y is None else conditioning_of(sampler.dit)
    context = batch.get("context")
    if "text_encoder" in networks.graphs:
        context = networks.build("text_encoder", params, frozen).context(batch["ids"], batch["mask"])
        context = context[:, : sampler.dit.text_len]

    def velocity(model: Any, context: Array | None, scale: float, still: Any = None) -> Velocity:
        """Of a model, guided by the same with weights that stay `still` where that prediction is to have no gradient."""

        def one(model: Any, x: Array, t: Array, context: Array | None) -> Array:
            if conditioning is not None and y is not None:
                x, t = conditioning.apply(x, t, y)
            return model(x, t, context)

        def guided(x: Latents, t: Float[Array, " b"]) -> Latents:
            v = one(model, x, t, context)
            if scale == 1.0:
                return v
            shape = (x.shape[0], *batch["negative_context"].shape[1:])
            negative = jnp.broadcast_to(batch["negative_context"], shape)
            away = one(model, x, t, negative) if still is None else one(still, jax.lax.stop_gradient(x), t, negative)
            return away + scale * (v - away)

        return guided

    def rounding(model: Any) -> Any:
        return round_inputs(model) if sampler.rounds_inputs else model

    experts = {}
    still = jax.lax.stop_gradient(params)
    still_context = None if context is None else jax.lax.stop_gradient(context)
    for name in sampler.experts:
        trains, scale = name in params, sampler.guidance[name]
        reference = velocity(rounding(networks.build_reference(name, frozen)), still_context, scale) if trains else None
        unguided = networks.build(name, still, frozen) if sampler.conditional else None
        experts[name] = Expert(
            velocity(networks.build(name, params, frozen), context, scale, unguided),
            reference,
            velocity(rounding(networks.build(name, still, frozen)), still_context, scale),
        )

    def keep(x: Latents) -> Latents:
        return x if conditioning is None or y is None else conditioning.keep(x, y)

    return experts, keep
