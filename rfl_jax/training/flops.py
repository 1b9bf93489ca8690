"""How many floating-point operations a step needs, and how many it executes. Matrix products and convolutions only."""

import dataclasses

import numpy as np

from rfl_jax.config import Config
from rfl_jax.models.wan.config import DiTConfig
from rfl_jax.sampling.real import trained_experts
from rfl_jax.sampling.sampler import Sampler


@dataclasses.dataclass(frozen=True)
class Forward:
    """One forward pass of a DiT over one sample.

    Attributes:
        linear: products with weights.
        attention: products of queries, keys and values.
    """

    linear: float
    attention: float

    @property
    def total(self) -> float:
        return self.linear + self.attention


def dit_forward(cfg: DiTConfig, tokens: int) -> Forward:
    """Operations of the blocks; embeddings and head are a thousandth of them."""
    n, d, s = tokens, cfg.dim, cfg.text_len
    linear = 8 * n * d * d + 4 * n * d * d + 4 * s * d * d + 4 * n * d * cfg.ffn_dim
    return Forward(float(cfg.num_layers * linear), float(cfg.num_layers * (4 * n * n * d + 4 * n * s * d)))


@dataclasses.dataclass(frozen=True)
class Taken:
    """Steps that a network takes in one update, or in the mean over updates where they are drawn.

    Attributes:
        expert: the network.
        still: without gradient.
        gradient: with gradient.
        references: forward passes of the KL's reference.
    """

    expert: str
    still: float
    gradient: float
    references: float


def taken(cfg: Config, sampler: Sampler) -> list[Taken]:
    """The steps of one update."""
    found = []
    for span in sampler.spans:
        gradient, steps = sampler.with_gradient(span), span.stop - span.start
        compared = gradient // cfg.kl.every if span.expert in cfg.trained else 0
        # Those of the untrained network's video are all without gradient.
        still = steps - gradient + (steps if cfg.needs_untrained else 0)
        found.append(Taken(span.expert, *map(float, (still, gradient, compared))))
    among = sum(span.stop - span.start for span in sampler.direct)
    for span in sampler.direct:
        share = (span.stop - span.start) / among
        found.append(Taken(span.expert, 0.0, share, share if span.expert in cfg.trained else 0.0))
    return found


def decoded_frames(cfg: Config, latents: int) -> tuple[float, int]:
    """Latent frames of a video that are decoded without gradient, in the mean over updates, and with."""
    scored = cfg.reward.frames if 0 < cfg.reward.frames < latents else latents
    # A window begins at the second latent frame or later, wherever it has room.
    return 0.0 if scored == latents else (1 + latents - scored) / 2, scored


def decoded_pixels(cfg: Config, frames: int, stride: int) -> int:
    """Frames of a video of so many that are scored, where a latent one is `stride` of them."""
    latents = (frames - 1) // stride + 1
    _, scored = decoded_frames(cfg, latents)
    return frames if scored == latents else scored * stride


def forward_passes(cfg: Config, sampler: Sampler) -> dict[str, float]:
    """How often one micro-batch takes each DiT's weights: forward, for the reference, again under remat, backward. Of passes
    that not all updates have, the mean.
    """
    count: dict[str, float] = {}
    again = {"none": 0, "nested": 2}.get(cfg.policy, 1)
    for steps in taken(cfg, sampler):
        passes = (steps.still + steps.gradient + steps.references) * sampler.predictions(steps.expert)
        passes += steps.gradient * (again + 1) * sampler.differentiated(steps.expert)
        count[steps.expert] = count.get(steps.expert, 0) + passes
    if cfg.real.weight:
        for expert in trained_experts(cfg, sampler):
            count[expert] += (2 if cfg.policy == "none" else 3) / cfg.real.every
    return count


def dit_flops(cfg: Config, sampler: Sampler, latents: tuple[int, ...], samples: int) -> tuple[float, float]:
    """What one update needs of the transformers, and what it executes, all samples together.

    A step without gradient is a forward pass. One with gradient is one as well, another where the reference runs, and a
    backward pass: for weights that stay, as much as forward; for those that train in full, twice; for attention twice, as its
    kernels recompute the scores two and a half times. Rematerialisation executes the forward pass again, under
    "save_attention" without its attention, under "nested" twice. Under guidance there is two of everything; where its
    unconditional prediction has no gradient, of that prediction only the forward pass. The real-data loss is one more step with
    gradient for each DiT that trains, unguided and without a reference, in every `real.every`-th update: its mean counts.

    Args:
        cfg: what trains, and how.
        sampler: the steps.
        latents: frames, rows and columns of one sample.
        samples: in one update.
    """
    tokens = int(np.prod(latents)) // int(np.prod(sampler.dit.patch_size))
    one = dit_forward(sampler.dit, tokens)
    needed = executed = 0.0
    for steps in taken(cfg, sampler):
        backward = one.linear * (2 if cfg.trains_in_full(steps.expert) else 1)
        again = {"none": 0.0, "save_attention": one.linear, "nested": 2 * one.total}.get(cfg.policy, one.total)
        forward = (steps.still + steps.gradient + steps.references) * one.total
        predictions, differentiated = sampler.predictions(steps.expert), sampler.differentiated(steps.expert)
        needed += predictions * forward + differentiated * steps.gradient * (backward + 2 * one.attention)
        executed += predictions * forward + differentiated * steps.gradient * (backward + 2.5 * one.attention + again)
    for expert in trained_experts(cfg, sampler) if cfg.real.weight else ():
        backward = one.linear * (2 if cfg.trains_in_full(expert) else 1)
        # Not one of the steps that "nested" rematerialises whole.
        again = {"none": 0.0, "save_attention": one.linear}.get(cfg.policy, one.total)
        needed += (one.total + backward + 2 * one.attention) / cfg.real.every
        executed += (one.total + backward + 2.5 * one.attention + again) / cfg.real.every
    return samples * needed, samples * executed


def int8_flops(cfg: Config, sampler: Sampler, latents: tuple[int, ...], samples: int) -> float:
    """What `dit_flops` counts as executed in products of 8-bit integers: the linear layers of forward passes without
    gradient.
    """
    tokens = int(np.prod(latents)) // int(np.prod(sampler.dit.patch_size))
    one = dit_forward(sampler.dit, tokens)
    passes = sum(
        sampler.predictions(steps.expert) * (steps.still + steps.references)
        for steps in taken(cfg, sampler)
        if cfg.frozen_activations and cfg.quantizes(steps.expert)
    )
    return samples * passes * one.linear
