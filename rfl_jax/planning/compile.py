"""Compiles a plan for devices that need not be there, and reads from the result what a run would take."""

import dataclasses
import re
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from rfl_jax.config import Config
from rfl_jax.models.wan.vae import VAE
from rfl_jax.planning.abstract import Plan, bytes_per_device, make_plan
from rfl_jax.planning.chips import chip_of
from rfl_jax.planning.hlo import Traffic, collectives
from rfl_jax.rewards.arcface import CROP, IResNet
from rfl_jax.rewards.scrfd import SCRFD
from rfl_jax.training.flops import dit_flops

# Least effort of the scheduler: a third of the time and memory to compile, and the same memory figures.
EFFORT = {"exec_time_optimization_effort": -1.0}


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
        largest: its largest buffers then, by name.
        model_flops, executed_flops: of one update on all devices, without and with recomputation.
        traffic: collectives of one update by kind.
        step_time_s: the longer of arithmetic at peak, and of collectives at full bandwidth: no step is faster.
        compile_s: seconds the compilation took.
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
    traffic: dict[str, Traffic]
    step_time_s: float | None
    compile_s: float


def plan_run(cfg: Config, mesh: Mesh) -> Report:
    """Compiles the step of training on the mesh, and the program before it where there is one.

    Raises:
        UserError: the batch does not divide over the mesh, or the configuration names weights that cannot be read.
    """
    plan = make_plan(cfg, mesh)
    state, frozen, batch, _ = plan.args
    weights = bytes_per_device((state.params, frozen))
    optimizer, inputs = bytes_per_device(state.opt_state), bytes_per_device(batch)
    resident = weights + optimizer + inputs
    model, executed = step_flops(cfg, plan)
    chip = chip_of(mesh.devices.flat[0])
    begin = time.perf_counter()
    peak: int | None = resident
    needed, largest = None, []
    host, traffic = 0, {}
    try:
        for program, args in filter(None, ((plan.step, plan.args), plan.prefix)):
            with jax.set_mesh(mesh):
                options: Any = EFFORT if chip else None
                compiled = program.lower(*args).compile(compiler_options=options)
            memory = compiled.memory_analysis()
            # A program is not handed what it does not use, which is there nevertheless.
            peak = max(peak, program_peak(memory, chip is not None) + resident - memory.argument_size_in_bytes)
            host = max(host, memory.host_temp_size_in_bytes)
            for kind, sent in collectives(compiled.as_text()).items():
                total = traffic.setdefault(kind, Traffic())
                total.count, total.bytes = total.count + sent.count, total.bytes + sent.bytes
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error) and "memory space hbm" not in str(error):
            raise
        peak, traffic = None, {}
        needed, largest = read_refusal(str(error))
    seconds = time.perf_counter() - begin
    step_time = None
    if chip and peak is not None:
        sent = sum(t.bytes for t in traffic.values())
        step_time = max(executed / mesh.size / chip.flops, sent / chip.interconnect)
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
        traffic=traffic,
        step_time_s=step_time,
        compile_s=seconds,
    )


def program_peak(memory: Any, tpu: bool) -> int:
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
    used = re.search(r"Used ([\d.]+)([KMGT]?) of", message)
    needed = float(used[1]) * _UNITS[used[2]] if used else None
    largest = []
    for size, rest in re.findall(r"\d+\. Size: ([\d.]+[KMGT]?)\s*\n((?:(?!\s*={5}).*\n?){1,6})", message)[:5]:
        operator = re.search(r'op_name="([^"]*)"', rest) or re.search(r"Operator: (.*)", rest)
        shape = re.search(r"Shape: (\S+)", rest)
        name = operator[1].split("/")[-1] if operator else "?"
        largest.append(f"{size}  {shape[1] if shape else ''}  {name}")
    return needed, largest


def step_flops(cfg: Config, plan: Plan) -> tuple[float, float]:
    """Operations of one update on all devices: what it needs, and what it executes.

    Transformers by formula; autoencoder and face networks as the compiler counts their forward passes. The decoder
    and the embedder run forward, again when rematerialised, and backward to their inputs, which takes as much; the
    detector forward alone.
    """
    needed, executed = dit_flops(cfg, plan.sampler, plan.latents, plan.samples)
    frames, rows, columns = plan.latents
    size = cfg.reward.detector_size
    # The decoder is a loop over latent frames, whose body is counted once.
    decode = frames * _forward_flops(lambda: VAE(plan.vae, rngs=nnx.Rngs(0)), (1, 1, rows, columns, plan.vae.z_dim))
    embed = plan.frames * _forward_flops(lambda: IResNet(plan.embedder, rngs=nnx.Rngs(0)), (1, CROP, CROP, 3))
    detect = plan.frames * _forward_flops(lambda: SCRFD(plan.detector, rngs=nnx.Rngs(0)), (1, size, size, 3))
    rest = plan.samples * (2 * decode + 2 * embed + detect)
    again = plan.samples * decode if cfg.policy != "none" else 0.0
    return needed + rest, executed + rest + again


def _forward_flops(build: Callable[[], Any], shape: tuple[int, ...]) -> float:
    graph, weights = nnx.split(nnx.eval_shape(build))

    def forward(weights: nnx.State, x: jax.Array) -> Any:
        network = nnx.merge(graph, weights)
        if isinstance(network, VAE):
            return network.decode(x)
        return network.logits(x) if isinstance(network, SCRFD) else network(x)

    cost = jax.jit(forward).lower(weights, jax.ShapeDtypeStruct(shape, jnp.float32)).cost_analysis()
    return float((cost or {}).get("flops", 0.0))
