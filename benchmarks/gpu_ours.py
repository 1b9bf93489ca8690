"""Our side of `benchmarks.gpu`. Weights are random, made on the device in the types that they are kept in."""

import dataclasses
import functools
import math
import statistics
import tempfile
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.profiler import ProfileData

from benchmarks.gpu_parts import MOST_SCORES, SHAPES, SMALL_SHAPES, Cases, Job, Record, timed
from configs import wan2_2_i2v_a14b, wan2_2_ti2v_5b
from rfl_jax.chips import answer_libtpu, peak_flops
from rfl_jax.config import Config, parse
from rfl_jax.miniature.world import asset_paths
from rfl_jax.models.attention import attention, kernel_for
from rfl_jax.models.wan.config import DIT_PRESETS, VAE_PRESETS
from rfl_jax.networks.table import abstract_network
from rfl_jax.planning.abstract import make_plan, on_devices
from rfl_jax.planning.compile import step_flops
from rfl_jax.sampling.phases import OTHER
from rfl_jax.training.flops import dit_forward
from rfl_jax.training.profile import phases_of, shares

CONFIGS = {"wan2_2_i2v_a14b": wan2_2_i2v_a14b, "wan2_2_ti2v_5b": wan2_2_ti2v_5b}
LARGE = 1 << 28  # numbers; of a larger stack all layers are the same
DENOISING = ("no_grad_steps", "grad_steps")  # phases that the DiT's layers have a share in

Moments = Callable[[str, tuple[int, ...]], tuple[float, float]]

answer_libtpu()


def configuration(job: Job, **changes: Any) -> Config:
    """The preset's recipe for one video on one device. The presets get the job's sizes, for this process."""
    DIT_PRESETS[job.part.dit], VAE_PRESETS[job.part.vae] = job.dit, job.vae
    config = CONFIGS[job.part.dit].get_config("original")
    config.update(train_batch_size=1, attention=job.attention, **changes)
    config.data.num_frames, config.data.height, config.data.width = job.video
    if job.small:
        config.reward_model_path = asset_paths()["reward_model_path"]
        config.reward.detector_size = 32
    return parse(config)


def of_weights(name: str, shape: tuple[int, ...]) -> tuple[float, float]:
    """Mean and deviation of a parameter."""
    if name == "scale":
        return 1.0, 0.0
    if name == "kernel_scale":
        return 2e-4, 0.0  # of numbers up to 127: 5120**-0.5 in all
    fan_in = shape[-2] if len(shape) in (2, 3) else math.prod(shape[:-1])
    return 0.0, fan_in**-0.5 if name == "kernel" else 0.02


def filled(tree: Any, moments: Moments) -> Any:
    """Arrays on the device in place of shapes. All of a type are cut from one random sequence, as programs that draw take
    long to compile.

    Args:
        tree: of shapes, types and places.
        moments: mean and deviation of what has a name and a shape. Whole numbers are zeros, but those of 8 bits any.
    """
    leaves = [x for x in jax.tree.leaves(tree) if not _is_key(x)]
    sizes = {x.dtype: max(math.prod(_drawn(y.shape)) for y in leaves if y.dtype == x.dtype) for x in leaves}
    sequences = {dtype: _sequence(size, dtype) for dtype, size in sizes.items()}

    def fill(path: tuple[Any, ...], x: jax.ShapeDtypeStruct) -> jax.Array:
        if _is_key(x):
            return jax.device_put(jax.random.key(0), x.sharding)
        name = jax.tree_util.keystr(path, simple=True, separator=".").removesuffix(".value").rpartition(".")[2]
        array = _cut(sequences[x.dtype], *moments(name, x.shape), shape=tuple(x.shape))
        return jax.device_put(array, x.sharding)

    return jax.tree_util.tree_map_with_path(fill, tree)


def _is_key(x: Any) -> bool:
    return jnp.issubdtype(x.dtype, jax.dtypes.prng_key)


def _drawn(shape: tuple[int, ...]) -> tuple[int, ...]:
    return shape[1:] if math.prod(shape) > LARGE else tuple(shape)


@functools.partial(jax.jit, static_argnames=("size", "dtype"))
def _sequence(size: int, dtype: Any) -> jax.Array:
    key = jax.random.key(0, impl="rbg")  # takes no memory besides what it makes
    if dtype == jnp.int8:
        return jax.lax.bitcast_convert_type(jax.random.bits(key, (size,), "uint8"), jnp.int8)
    return jax.random.normal(key, (size,), dtype) if jnp.issubdtype(dtype, jnp.floating) else jnp.zeros(size, dtype)


@functools.partial(jax.jit, static_argnames="shape")
def _cut(sequence: jax.Array, mean: Any, deviation: Any, *, shape: tuple[int, ...]) -> jax.Array:
    values = sequence[: math.prod(_drawn(shape))].reshape(_drawn(shape))
    if jnp.issubdtype(sequence.dtype, jnp.floating):
        values = values * deviation + mean
    return jnp.broadcast_to(values, shape)


def normal(*shape: int, dtype: Any = jnp.float32) -> jax.Array:
    """Standard normal numbers."""
    return jax.random.normal(jax.random.key(0, impl="rbg"), shape, dtype)


def open_random(cfg: Config, network: str) -> tuple[nnx.GraphDef, nnx.State]:
    """A network of training: its static half, and weights."""
    graph, shapes = nnx.split(abstract_network(cfg, network, None, "train", jax.devices()[0].platform))
    return graph, filled(shapes, of_weights)


def _peak() -> int | None:
    """The most bytes of the device that this process had; None on a CPU."""
    return (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use")


def run(job: Job, f: Callable[..., Any], *arguments: Any, **facts: Any) -> Record:
    """Compiles a function and times it."""
    begin = time.perf_counter()
    program = jax.jit(f).lower(*arguments).compile()
    compiling = time.perf_counter() - begin
    return {**timed(job, lambda: program(*arguments), jax.block_until_ready, compiling), "peak": _peak(), **facts}


def both(f: Callable[..., Any]) -> Callable[..., Any]:
    """Of `f(weights, *inputs)`: `(weights, g, *inputs) -> (output, gradients of the inputs)`."""

    def forward_and_backward(weights: Any, g: jax.Array, *inputs: jax.Array) -> Any:
        out, back = jax.vjp(functools.partial(f, weights), *inputs)
        return out, back(g)

    return forward_and_backward


def about(job: Job) -> Cases:
    """The machine."""
    del job
    device = jax.devices()[0]
    versions = ", ".join(f"{name} {metadata.version(name)}" for name in ("jax", "flax"))
    facts = {"platform": device.platform, "device": device.device_kind, "versions": versions, "flops": peak_flops()}
    yield "", lambda: facts


def measure_attention(job: Job) -> Cases:
    """The configuration's kernel and XLA's, on a CPU flash's as well, in the interpreter. Errors come last: what they are
    measured by takes most memory.
    """
    platform = jax.devices()[0].platform
    own = kernel_for(job.attention, platform)
    kernels = dict.fromkeys((own, "xla", *(("flash_interpret",) if platform == "cpu" else ())))
    shapes = SMALL_SHAPES if job.small else SHAPES
    fitting = [(tokens, heads) for tokens, heads in shapes if tokens**2 * heads <= MOST_SCORES]
    errors = []
    for kernel in kernels:
        for tokens, heads in shapes if kernel == own else fitting:
            case = f"{tokens:,} tokens, {heads} heads, {'' if kernel == own else f'{kernel}, '}forward"
            g, *qkv = normal(4, 1, tokens, heads, job.dit.head_dim, dtype=jnp.bfloat16)
            f = functools.partial(_attend, kernel)
            flops = 4.0 * tokens**2 * heads * job.dit.head_dim
            yield case, functools.partial(run, job, f, (), *qkv, flops=flops, kernel=kernel)
            case += " and backward"
            yield case, functools.partial(run, job, both(f), (), g, *qkv, flops=3 * flops, kernel=kernel)
            if (tokens, heads) in fitting:
                errors.append((case, functools.partial(_error, f, g, *qkv)))
    yield from errors


def _attend(kernel: str, weights: Any, q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    del weights
    return attention(q, k, v, kernel=kernel)


_exact = jax.jit(both(functools.partial(_attend, "xla")))


def _error(f: Callable[..., Any], *inputs: jax.Array) -> Record:
    """The largest relative error of output and gradients against XLA's in float32; not a number where any is none."""
    with jax.default_matmul_precision("highest"):
        exact = _exact((), *(x.astype(jnp.float32) for x in inputs))
    found = jax.jit(both(f))((), *inputs)
    errors = jax.tree.map(lambda a, b: jnp.linalg.norm((a - b).ravel()) / jnp.linalg.norm(b.ravel()), found, exact)
    return {"error": float(jnp.max(jnp.stack(jax.tree.leaves(errors))))}


def measure_layer(job: Job) -> Cases:
    """A DiT of one layer with embeddings and head, and the gradient of its input, with weights of 8 and of 16 bits."""
    one = dit_forward(job.dit, job.tokens)
    x, g = (normal(1, *job.latents, c) for c in (job.dit.in_dim, job.dit.out_dim))
    context, t = normal(1, job.dit.text_len, job.dit.text_dim), jnp.full(1, 500.0)
    for frozen in ("int8", ""):
        cfg = configuration(job, frozen_weights=frozen, remat_policy="none")
        graph, weights = open_random(cfg, "dit2")
        f = functools.partial(lambda graph, weights, x: nnx.merge(graph, weights)(x, t, context), graph)
        case = f"{job.tokens:,} tokens, {frozen or cfg.dtype} weights, forward"
        yield case, functools.partial(run, job, f, weights, x, flops=one.total)
        needed = 2 * one.linear + 3 * one.attention
        yield f"{case} and backward", functools.partial(run, job, both(f), weights, g, x, flops=needed)


def measure_vae(job: Job) -> Cases:
    """The decoder, and the gradient of its latents."""
    graph, weights = open_random(configuration(job), "vae")
    z, g = normal(1, *job.latents, job.vae.z_dim), normal(1, *job.video, 3)

    def decode(weights: nnx.State, z: jax.Array) -> jax.Array:
        return nnx.merge(graph, weights).decode(z)

    # Counted where all frames are decoded at once: of a loop the compiler counts one turn.
    whole = jax.jit(lambda weights, z: nnx.merge(graph, weights).decode_whole(z)).lower(weights, z)
    flops = float((whole.cost_analysis() or {}).get("flops", 0.0))
    yield "forward", functools.partial(run, job, decode, weights, z, flops=flops)
    yield "forward and backward", functools.partial(run, job, both(decode), weights, g, z, flops=2 * flops)


def measure_step(job: Job) -> Cases:
    """The training step as `rfl_jax.train` compiles it, and its phases."""
    frozen_weights = "int8" if job.dit.boundary else ""
    options = {"remat_policy": "full", "vae_caches": "recompute", "frozen_weights": frozen_weights}
    cfg, mesh = on_devices(configuration(job, **options), jax.devices()[:1])
    plan = make_plan(cfg, mesh)
    state, *rest = plan.args
    params, frozen = filled((state.params, rest[0]), of_weights)
    # Moments are zeros at first, and their squares never less.
    zeros = filled(dataclasses.replace(state, params={}), lambda *_: (0.0, 0.0))
    state = dataclasses.replace(zeros, params=params)
    batch, key = filled(tuple(rest[1:]), lambda *_: (0.0, 1.0))
    programs, seconds, loss = [], 0.0, jnp.nan

    def step() -> jax.Array:
        nonlocal state, loss
        state, metrics = programs[0](state, frozen, batch, key)
        loss = metrics["loss"]
        return loss

    def whole() -> Record:
        nonlocal seconds
        begin = time.perf_counter()
        with jax.set_mesh(mesh):
            programs.append(plan.step.lower(state, frozen, batch, key).compile())
            found = timed(job, step, jax.block_until_ready, time.perf_counter() - begin)
        seconds = statistics.median(found["seconds"])
        return {**found, "peak": _peak(), "loss": float(loss)}

    def phases() -> Record:
        with tempfile.TemporaryDirectory() as folder:
            with jax.set_mesh(mesh), jax.profiler.trace(folder):
                jax.block_until_ready(step())
            traces = [ProfileData.from_file(str(file)) for file in Path(folder).rglob("*.xplane.pb")]
        found = {name: x * seconds for name, x in shares(traces, phases_of([programs[0].as_text()])).items()}
        # What CUDA graphs run has no operator's name in the trace. It counts as the layers', for most of it is theirs.
        rest = sum(x for name, x in found.items() if name not in (*DENOISING, OTHER))
        return {"phases": found, "rest_s": rest}

    case = f"{job.tokens:,} tokens"
    yield case, whole
    if seconds:
        yield case, lambda: {"flops": step_flops(cfg, plan)[0]}
        yield case, phases


MEASURES = {
    "about": about,
    "attention": measure_attention,
    "layer": measure_layer,
    "vae": measure_vae,
    "step": measure_step,
}
