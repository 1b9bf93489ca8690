"""The fastest variant of a configuration that fits: bounds first, compilation where they do not decide."""

import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import Any

import jax.numpy as jnp

from rfl_jax.chips import chip_of
from rfl_jax.config import Config
from rfl_jax.planning.abstract import Plan, bytes_per_device, make_plan, on_devices
from rfl_jax.planning.compile import Report, compile_plan, least_seconds
from rfl_jax.remat import NAMES
from rfl_jax.sampling.sampler import caches_prefix, make_sampler, split_prefix

Changes = dict[str, Any]
# How many of the variants that fit are compiled as training does, which takes long.
PREDICTED = 3

# What saves memory, the cheapest first. Weights in host memory come over a link whose speed no bound here knows: they
# are tried when nothing else fits.
SAVINGS: tuple[Changes, ...] = (
    {},
    {"vae_caches": "recompute"},
    {"frozen_memory": "pinned_host", "optimizer_memory": "pinned_host"},
    {"vae_caches": "recompute", "frozen_memory": "pinned_host", "optimizer_memory": "pinned_host"},
)


def kept_by_block(policy: str, ffn: float) -> float:
    """Activations that a block leaves at least for its backward pass, in tensors of its input's size.

    Args:
        policy: of remat.
        ffn: width of the feed-forward layer over the block's.
    """
    # Without remat: the inputs of the products (three norms, two attentions' outputs), queries and keys before their
    # norm and turned, values, cross-attention's queries before and after theirs, the feed-forward layer before and after
    # its nonlinearity.
    return {"none": 5 + 2 + 3 + 2 + 2 * ffn, "save_attention": 3, "offload": 0}.get(policy, 1)


@dataclasses.dataclass(frozen=True)
class Tried:
    """A variant that was decided.

    Attributes:
        changes: what it changes, by flag.
        cfg: with its mesh filled in.
        report: what it takes.
    """

    changes: Changes
    cfg: Config
    report: Report


def changed(cfg: Config, changes: Changes) -> Config:
    """The configuration with dotted settings replaced."""
    for name, value in changes.items():
        section, _, key = name.rpartition(".")
        if section:
            key, value = section, dataclasses.replace(getattr(cfg, section), **{key: value})
        cfg = dataclasses.replace(cfg, **{key: value})
    return cfg


def variants(cfg: Config, devices: int) -> Iterator[Changes]:
    """Meshes that the batch fills, every policy, the prefix cached where it can be, ways to save memory."""
    prefix = split_prefix(cfg, make_sampler(cfg))[0]
    cache = changed(cfg, {"noise.prefix_cache": "auto"})
    common: Changes = {}
    if cache != cfg and caches_prefix(cache, prefix) and not caches_prefix(cfg, prefix):
        common["noise.prefix_cache"] = "auto"
    seen = set()
    for context in (n for n in range(1, devices + 1) if devices % n == 0):
        groups = devices // context
        together = groups * cfg.per_device_train_batch_size
        if cfg.train_batch_size % (together * cfg.gradient_accumulation_steps) or together % cfg.noises_at_once:
            continue
        for policy in NAMES:
            for saving in SAVINGS:
                if policy == "none" and "vae_caches" in saving:
                    continue  # nothing is rematerialised
                changes = {"mesh.data": 1, "mesh.fsdp": groups, "mesh.context": context, "remat_policy": policy}
                changes |= common | saving
                variant = changed(cfg, changes)
                if variant not in seen:
                    seen.add(variant)
                    yield changes


def least_bytes(cfg: Config, plan: Plan) -> int:
    """What a device needs at least: all that lies there between updates, and what a policy keeps of the blocks."""
    resident = bytes_per_device(plan.args)
    sizes = plan.sampler.dit
    tokens = math.prod(plan.latents) // math.prod(sizes.patch_size)
    devices = cfg.mesh.context * cfg.mesh.data * cfg.mesh.fsdp
    block = plan.samples // cfg.gradient_accumulation_steps * tokens * sizes.dim * jnp.dtype(cfg.dtype).itemsize
    # Of the steps that `window.direct` and `nft` draw from one is taken.
    steps = sum(map(plan.sampler.with_gradient, plan.sampler.spans)) or len(plan.sampler.direct[:1])
    kept = kept_by_block(cfg.policy, sizes.ffn_dim / sizes.dim) * sizes.num_layers * block
    # "nested" keeps one denoising step's.
    return resident + int(kept * (1 if cfg.policy == "nested" else steps) / devices)


def walk(cfg: Config, devices: Sequence[Any], *, fastest: bool, wanted: int = 1) -> Iterator[Tried]:
    """Decides variants, those first that can be fastest, and compiles what bounds do not decide.

    Args:
        cfg: the configuration to vary.
        devices: of the topology.
        fastest: go on after the first that fits, as long as a bound is below the best found; else end there.
        wanted: how many are to be found so.
    """
    chip = chip_of(devices[0])
    open_: list[tuple[bool, float, int, Changes, Config, Plan]] = []
    for changes in variants(cfg, len(devices)):
        variant, mesh = on_devices(changed(cfg, changes), devices)
        plan = make_plan(variant, mesh)
        streamed = variant.frozen_memory != "device"
        bound = least_seconds(variant, plan, chip) / plan.samples
        open_.append((streamed, bound, least_bytes(variant, plan), changes, variant, plan))
    best: list[float] = []
    for streamed, bound, least, changes, variant, plan in sorted(open_, key=lambda entry: entry[:3]):
        if best and (streamed or (len(best) == wanted and bound >= best[-1])):
            continue
        report = compile_plan(variant, plan, least=least)
        yield Tried(changes, variant, report)
        if report.fits and not fastest:
            return
        if report.fits:
            best = sorted([*best, report.seconds_a_sample])[:wanted]


def predicted(tried: Sequence[Tried], devices: Sequence[Any]) -> Iterator[Tried]:
    """The best `PREDICTED` of those that fit, compiled once more as training does, with their time predicted."""
    fitting = sorted((t for t in tried if t.report.fits), key=lambda t: t.report.seconds_a_sample)
    for entry in fitting[:PREDICTED]:
        cfg, mesh = on_devices(entry.cfg, devices)
        report = compile_plan(cfg, make_plan(cfg, mesh), effort=None, predicting=True)
        yield dataclasses.replace(entry, report=report)
