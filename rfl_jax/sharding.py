"""Which axis of which array lies on which axis of the mesh: one ordered table a network, and pins for activations."""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import jax
from flax import nnx
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Shaped

from rfl_jax.errors import UserError

P = PartitionSpec
T = TypeVar("T")
Rules = Sequence[tuple[str, PartitionSpec]]

CONTEXT = "context"
AXES = ("data", "fsdp", CONTEXT)
# Samples are spread over data and fsdp, their tokens, frames or columns over context. Weights lie in pieces wherever
# samples differ or are shared out: on a dimension that every layer has.
SAMPLES = ("data", "fsdp")
BATCH = P(SAMPLES)
PIECES = ("fsdp", CONTEXT)

_ADAPTER = (r"blocks\..*\.lora_a", P(None, PIECES, None)), (r"blocks\..*\.lora_b", P(None, None, PIECES))
_QUANTIZED = ((r"blocks\..*\.kernel_scale", P(None, None)),)
RULES: dict[str, Rules] = {
    "dit": (
        *_ADAPTER,
        *_QUANTIZED,
        (r"blocks\..*\.kernel", P(None, PIECES, None)),
        (r"blocks\..*\.(bias|scale)", P(None, None)),
        (r"blocks\.modulation", P(None, None, PIECES)),
        (r"[a-z_]+\.kernel", P(PIECES, None)),
        (r"[a-z_]+\.bias", P(None)),
        (r"head_modulation", P(None, None)),
    ),
    "umt5": (
        (r"embedding", P(PIECES, None)),
        (r"blocks\..*\.kernel", P(None, PIECES, None)),
        (r"blocks\..*\.scale", P(None, None)),
        (r"blocks\.position_bias", P(None, None, None)),
        (r"norm\.scale", P(None)),
    ),
    # Small beside the transformers, and every sample needs all of them.
    "vae": ((r".*", P()),),
    "reward": ((r".*", P()),),
}


def make_mesh(sizes: Mapping[str, int], devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh of all devices.

    Args:
        sizes: devices along each axis; one may be -1 and takes the rest.
        devices: those of a described topology; by default those of this run.

    Raises:
        UserError: the sizes do not multiply to the number of devices.
    """
    count = len(devices) if devices is not None else jax.device_count()
    known = math.prod(n for n in sizes.values() if n != -1)
    shape = [count // known if n == -1 else n for n in sizes.values()]
    if math.prod(shape) != count:
        wanted = ", ".join(f"{axis}={n}" for axis, n in sizes.items())
        raise UserError(f"config.mesh: {wanted} does not fill {count} devices")
    # An axis may be part of a physical one: 8 of the 4x4 chips of a v6e-16.
    grid = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    return Mesh(grid, tuple(sizes), axis_types=(AxisType.Auto,) * len(shape))


def replicated(mesh: Mesh) -> NamedSharding:
    """Whole on every device."""
    return NamedSharding(mesh, P())


def micro_batches(mesh: Mesh) -> NamedSharding:
    """Where a batch's arrays lie: micro-batches on axis 0 follow one another, their samples on axis 1 are spread."""
    return NamedSharding(mesh, P(None, *BATCH))


def spec_of(name: str, shape: Sequence[int], rules: Rules, mesh: Mesh, used: set[str] | None = None) -> PartitionSpec:
    """The first rule's spec; an axis that the mesh does not divide stays whole.

    Raises:
        KeyError: no rule matches.
    """
    for pattern, spec in rules:
        if re.fullmatch(pattern, name):
            if used is not None:
                used.add(pattern)
            return P(*(a if a is None or shape[i] % _size(a, mesh) == 0 else None for i, a in enumerate(spec)))
    raise KeyError(f"no sharding rule for {name}")


def _size(axes: str | tuple[str, ...], mesh: Mesh | AbstractMesh) -> int:
    return math.prod(mesh.shape[a] for a in ((axes,) if isinstance(axes, str) else axes))


def _dotted(path: Sequence[Any]) -> str:
    """A parameter's name, `blocks.ffn.up.kernel`, from its path in a state or a tree."""
    return ".".join(str(getattr(k, "key", getattr(k, "name", k))) for k in path).removesuffix(".value")


def shardings(state: nnx.State, network: str, mesh: Mesh, *, blocks_memory: str | None = None) -> nnx.State:
    """NamedShardings in the structure of a network's state.

    Args:
        blocks_memory: memory kind of the stacked blocks' kernels; None: the device's own. Vectors stay there: they are
            small, and TPUs do not cut single rows of 16-bit numbers out of host memory.
    """
    rules = RULES[network]

    def place(path: tuple, leaf: Array | jax.ShapeDtypeStruct) -> NamedSharding:
        name = _dotted(path)
        memory = blocks_memory if name.startswith("blocks.") and name.endswith(".kernel") else None
        return NamedSharding(mesh, spec_of(name, leaf.shape, rules, mesh), memory_kind=memory)

    return jax.tree_util.tree_map_with_path(place, state)


def check_rules(
    states: Sequence[nnx.State], network: str, mesh: Mesh, *, adapted: bool, quantized: bool = False
) -> None:
    """Raises KeyError where a parameter has no rule or a rule no parameter.

    Args:
        states: the parts of one network, trainable and frozen.
        network: name of its table.
        adapted: whether it has adapters, which are a part of the table only then.
        quantized: whether its kernels have scales; likewise.
    """
    absent = (() if adapted else _ADAPTER) + (() if quantized else _QUANTIZED)
    used = {pattern for pattern, _ in absent}
    for state in states:
        for path, leaf in nnx.to_flat_state(state):
            spec_of(_dotted(path), leaf.shape, RULES[network], mesh, used)
    unused = [pattern for pattern, _ in RULES[network] if pattern not in used]
    if unused:
        raise KeyError(f"{network}: sharding rule {unused[0]!r} matches no parameter")


def batch_shards(mesh: Mesh | AbstractMesh) -> int:
    """Into how many parts a batch is split."""
    return _size(SAMPLES, mesh)


def current_mesh() -> AbstractMesh | None:
    """The mesh under whose `jax.set_mesh` the caller is traced, or None."""
    mesh = jax.sharding.get_abstract_mesh()
    return None if mesh.empty or mesh.axis_names != AXES else mesh


def context_shards() -> int:
    """Into how many parts a sample's tokens are split."""
    mesh = current_mesh()
    return 1 if mesh is None else mesh.shape[CONTEXT]


def divided_batch(samples: int, mesh: Mesh | AbstractMesh) -> tuple[str, ...] | None:
    """The axes over which a batch lies; None where they do not divide it (then it is everywhere)."""
    return SAMPLES if samples % batch_shards(mesh) == 0 else None


def _pin(x: Array, *rest: str | None) -> Array:
    mesh = current_mesh()
    if mesh is None:
        return x
    return jax.lax.with_sharding_constraint(x, P(divided_batch(x.shape[0], mesh), *rest))


def pin_samples(x: Shaped[Array, "b n *c"]) -> Shaped[Array, "b n *c"]:
    """Spreads samples, each whole. Without a mesh, `x` as it is."""
    return _pin(x)


def pin_tokens(x: Shaped[Array, "b n *c"]) -> Shaped[Array, "b n *c"]:
    """Spreads samples, and the tokens (or frames) of each over the context axis. Without a mesh, `x` as it is."""
    return _pin(x, CONTEXT)


def pin_columns(x: Shaped[Array, "b t h w c"]) -> Shaped[Array, "b t h w c"]:
    """Spreads samples, and the columns of each video over the context axis. Without a mesh, `x` as it is."""
    return _pin(x, None, None, CONTEXT)


def gather(weights: T) -> T:
    """One layer's weights whole on every device, for as long as the layer runs. Left to itself the compiler may gather
    the activations instead, where they are smaller.
    """
    if current_mesh() is None:
        return weights
    return jax.tree.map(lambda w: jax.lax.with_sharding_constraint(w, P()), weights)


def pin_frames(x: Shaped[Array, "n h w c"]) -> Shaped[Array, "n h w c"]:
    """Spreads the frames of all samples over all devices, if they divide them."""
    mesh = current_mesh()
    if mesh is None or x.shape[0] % mesh.size:
        return x
    return jax.lax.with_sharding_constraint(x, P(AXES))
