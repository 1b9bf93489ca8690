"""Compiles a plan for devices that need not be there, and reads from the result what a run would take."""

import dataclasses
import functools
import math
import re
import time
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from rfl_jax.chips import GIB, Chip, chip_of
from rfl_jax.config import Config
from rfl_jax.models.wan.vae import VAE
from rfl_jax.planning.abstract import Plan, bytes_per_device
from rfl_jax.planning.hlo import Program, Traffic, collectives
from rfl_jax.planning.links import Links
from rfl_jax.planning.predict import Prediction, predict
from rfl_jax.programs import not_kept
from rfl_jax.rewards.arcface import CROP
from rfl_jax.rewards.embedder import make_embedder
from rfl_jax.rewards.people import PEOPLE
from rfl_jax.rewards.scrfd import SCRFD
from rfl_jax.terminal import waiting
from rfl_jax.training.flops import decoded_frames, decoded_pixels, dit_flops, forward_passes, int8_flops

# Least effort of the scheduler, which tells soon whether a program fits. A14B for v5p-8 took 100 s of a processor for 39.1 GiB
# and 68 s an update by the compiler's cycles, as training compiles it 530 s for 43.4 GiB and 17 s: from what is scheduled so no
# time is read, and a tenth more memory may be needed.
LEAST = "EFFORT_O0"
MORE_MEMORY = 0.1


@dataclasses.dataclass
class Report:
    """What a step takes. Bytes are of one device unless said otherwise.

    Attributes:
        fits: whether the compiler found room for it.
        devices: in the mesh.
        video: frames, height, width.
        samples: in one update.
        weights, optimizer, batch: what lies there between steps.
        activations: the most that is needed at once besides.
        peak: the most in all; None where the program was refused.
        limit: what a program may use; None where it is not known.
        host: pinned host memory that offloading takes.
        needed: what the program would have used, where it was refused.
        largest: its largest buffers then, or its largest arguments, by name.
        model_flops, executed_flops: of one update on all devices, without and with recomputation.
        term_flops: of these what terms of the reward besides the face's take, by name.
        traffic: collectives of one update by kind.
        step_time_s: the longest of arithmetic at peak, of reading weights, and of collectives, both at full bandwidth: no
            update is faster.
        compile_s: seconds the compilation took; 0: nothing was compiled.
        predicted: the time that an update will take; None where that was not asked for.
    """

    fits: bool
    devices: int
    video: tuple[int, int, int]
    samples: int
    weights: int
    optimizer: int
    batch: int
    activations: int | None
    peak: int | None
    limit: float | None
    host: int
    needed: float | None
    largest: list[str]
    model_flops: float
    executed_flops: float
    term_flops: dict[str, float]
    traffic: dict[str, Traffic]
    step_time_s: float | None
    compile_s: float
    predicted: Prediction | None

    @property
    def seconds_a_sample(self) -> float:
        """What variants are compared by: predicted if all are, else the bound; operations where the chip is not known."""
        if self.predicted:
            return self.predicted.seconds / self.samples
        return (self.executed_flops if self.step_time_s is None else self.step_time_s) / self.samples


def compile_plan(
    cfg: Config, plan: Plan, *, least: int = 0, effort: str | None = LEAST, predicting: bool = False
) -> Report:
    """Compiles the step of training, and the program before it where there is one.

    Args:
        cfg: of the plan.
        plan: what is compiled.
        least: bytes a device is known to need; nothing is compiled where it has less.
        effort: of the compiler for TPUs, EFFORT_O0 to EFFORT_O3; None: as training compiles.
        predicting: tell the time of an update, compiled with this effort. For TPUs whose clock is known.
    """
    mesh = plan.mesh
    state, frozen, batch, _ = plan.args
    weights = bytes_per_device((state.params, state.average, frozen))
    optimizer, inputs = bytes_per_device(state.opt_state), bytes_per_device(batch)
    resident = weights + optimizer + inputs
    model, executed = step_flops(cfg, plan)
    device = mesh.devices.flat[0]
    chip, tpu = chip_of(device), device.platform == "tpu"
    begin = time.perf_counter()
    peak: int | None = resident
    needed, largest = None, []
    host, traffic, texts = 0, {}, []
    programs = list(filter(None, ((plan.step, plan.args), plan.prefix)))
    if chip is not None and least > chip.memory:
        programs, peak, needed = [], None, float(least)
    try:
        for program, args in programs:
            kept = nullcontext() if device in jax.devices() else not_kept()
            with waiting(f"compile for {plan.samples} samples and the policy {cfg.policy}"), jax.set_mesh(mesh), kept:
                options: Any = {"xla_optimization_level": effort} if tpu and effort is not None else None
                compiled = program.lower(*args).compile(compiler_options=options)
            memory = compiled.memory_analysis()
            # A program is not handed what it does not use, which is there nevertheless.
            peak = max(peak or 0, program_peak(memory, tpu=tpu) + resident - memory.argument_size_in_bytes)
            host = max(host, memory.host_temp_size_in_bytes)
            texts.append(Program(compiled.as_text()))
            for kind, sent in collectives(texts[-1]).items():
                total = traffic.setdefault(kind, Traffic())
                total.count, total.bytes = total.count + sent.count, total.bytes + sent.bytes
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error) and "memory space hbm" not in str(error):
            raise
        peak, traffic = None, {}
        needed, largest = read_refusal(str(error))
        # Some refusals name no buffer: then what lies there before the program begins.
        largest = largest or largest_arguments(plan.args)
    seconds = time.perf_counter() - begin if programs else 0.0
    step_time = None
    if chip and peak is not None:
        sent = sum(t.bytes for t in traffic.values())
        step_time = max(least_seconds(cfg, plan, chip), sent / chip.interconnect)
    predicted = None
    if predicting and chip and peak is not None:
        links, kind = Links.of(list(mesh.devices.flat), chip), device.device_kind
        predicted = predict(texts, links, chip, kind, operations=model / mesh.size)
    return Report(
        fits=peak is not None and (chip is None or peak <= chip.memory),
        devices=mesh.size,
        video=(plan.frames, plan.height, plan.width),
        samples=plan.samples,
        weights=weights,
        optimizer=optimizer,
        batch=inputs,
        activations=None if peak is None else peak - resident,
        peak=peak,
        limit=chip.memory if chip else None,
        host=host + bytes_per_device(plan.args, host=True),
        needed=needed,
        largest=largest,
        model_flops=model,
        executed_flops=executed,
        term_flops={name: plan.samples * flops for name, flops in plan.terms.items()},
        traffic=traffic,
        step_time_s=step_time,
        compile_s=seconds,
        predicted=predicted,
    )


def program_peak(memory: Any, *, tpu: bool) -> int:
    """The most bytes of device memory that a compiled program takes, its arguments among them.

    Args:
        memory: its `memory_analysis()`.
        tpu: whether it is compiled for TPU. Its compiler tells the true peak, unless something waits in host memory,
            which it counts as well, at whatever moment the sum is largest; then, as on other devices, all temporaries
            are added up, which is more than are needed at once.
    """
    if tpu and not memory.host_temp_size_in_bytes and not memory.host_argument_size_in_bytes:
        return memory.peak_memory_in_bytes
    produced = memory.output_size_in_bytes - memory.alias_size_in_bytes
    return memory.argument_size_in_bytes + memory.temp_size_in_bytes + produced


_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}


def read_refusal(message: str) -> tuple[float | None, list[str]]:
    """Bytes that a refused program would have used, and its largest buffers with their operators."""
    used = re.search(r"(?:Used |required for HLO temporaries \()([\d.]+)([KMGT]?)\b", message)
    needed = float(used[1]) * _UNITS[used[2]] if used else None
    largest = []
    for size, rest in re.findall(r"\d+\. Size: ([\d.]+[KMGT]?)\s*\n((?:(?!\s*={5}).*\n?){1,6})", message)[:5]:
        operator = re.search(r'op_name="([^"]*)"', rest) or re.search(r"Operator: (.*)", rest)
        shape = re.search(r"Shape: (\S+)", rest)
        name = operator[1].split("/")[-1] if operator else "?"
        largest.append(f"{size}  {shape[1] if shape else ''}  {name}")
    return needed, largest


def largest_arguments(args: Any, count: int = 5) -> list[str]:
    """The arguments that take most of a device's memory, as `read_refusal` tells of buffers."""
    leaves = [
        (bytes_per_device(leaf), f"{leaf.dtype}[{','.join(map(str, leaf.sharding.shard_shape(leaf.shape)))}]", path)
        for path, leaf in jax.tree_util.tree_leaves_with_path(args)
    ]
    top = sorted(leaves, key=lambda entry: -entry[0])[:count]
    return [f"{size / GIB:.2f}G  {shape}  argument {jax.tree_util.keystr(path)}" for size, shape, path in top]


def step_flops(cfg: Config, plan: Plan) -> tuple[float, float]:
    """Operations of one update on all devices: what it needs, and what it executes.

    Transformers by formula; autoencoder and face networks as the compiler counts their forward passes. The decoder
    and the embedder run forward, again when rematerialised, and backward to their inputs, which takes as much; the
    detector forward alone. Under `nft` nothing of them runs backward. Where all people count, the embedder sees `PEOPLE` faces of each frame. Terms of the reward as the compiler counts them, forward and backward.
    """
    needed, executed = dit_flops(cfg, plan.sampler, plan.latents, plan.samples)
    frames, rows, columns = plan.latents
    size = cfg.reward.detector_size
    # The decoder is a loop over latent frames, whose body is counted once.
    decode = _forward_flops(VAE, plan.vae, (1, 1, rows, columns, plan.vae.z_dim))
    before, scored = decoded_frames(cfg, frames)
    pixels = decoded_pixels(cfg, plan.frames, plan.vae.stride[0])
    faces = PEOPLE if cfg.reward.people == "all" else 1
    embed = faces * pixels * _forward_flops(make_embedder, plan.embedder, (1, CROP, CROP, 3))
    detect = pixels * _forward_flops(SCRFD, plan.detector, (1, size, size, 3))
    terms = sum(plan.terms.values())
    # The untrained network's video, where a term compares with that, is decoded and looked at without gradient.
    again = before + scored if cfg.needs_untrained else 0
    both = 1 if cfg.nft.group else 2  # forward, and backward
    videos = (before + both * scored + again) * decode + both * embed + (2 if cfg.needs_untrained else 1) * detect
    rest = plan.samples * (videos + terms)
    # Grouped caches take one more forward pass.
    passes = 0 if cfg.policy == "none" or cfg.nft.group else 2 if cfg.vae_caches == "recompute" else 1
    recomputed = plan.samples * scored * decode * passes
    return needed + rest, executed + rest + recomputed


def least_seconds(cfg: Config, plan: Plan, chip: Chip | None) -> float:
    """No update is faster than its arithmetic at peak (8-bit products at twice that), or than reading each DiT's weights as
    often as it runs; the operations themselves where the chip is not known.

    Args:
        cfg: of the plan.
        plan: what is compiled.
        chip: the devices'.
    """
    executed = step_flops(cfg, plan)[1] - int8_flops(cfg, plan.sampler, plan.latents, plan.samples) / 2
    if chip is None:
        return executed
    state, frozen = plan.args[:2]
    read = 0
    for name, count in forward_passes(cfg, plan.sampler).items():
        states = [states[name] for states in (state.params, frozen.rest) if name in states]
        read += count * sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(states))
    read *= cfg.gradient_accumulation_steps
    return max(executed / plan.mesh.size / chip.flops, read / chip.bandwidth)


# A search asks for the same networks at the same sizes again and again.
@functools.cache
def _forward_flops(network: Callable[..., nnx.Module], sizes: Any, shape: tuple[int, ...]) -> float:
    graph, weights = nnx.split(nnx.eval_shape(lambda: network(sizes, rngs=nnx.Rngs(0))))

    def forward(weights: nnx.State, x: jax.Array) -> Any:
        module = nnx.merge(graph, weights)
        if isinstance(module, VAE):
            return module.decode(x)
        return module.logits(x) if isinstance(module, SCRFD) else module(x)

    cost = jax.jit(forward).lower(weights, jax.ShapeDtypeStruct(shape, jnp.float32)).cost_analysis()
    return float((cost or {}).get("flops", 0.0))
