"""Which axis of which array lies on which axis of the mesh: one ordered table a network."""

import re
from collections.abc import Mapping, Sequence

import jax
import numpy as np
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from rfl_jax.errors import UserError

P = PartitionSpec
Rules = Sequence[tuple[str, PartitionSpec]]

# Samples are spread over both axes; weights over fsdp, on a dimension that every layer has.
BATCH = P(("data", "fsdp"))

_ADAPTER = (r"blocks\..*\.lora_a", P(None, "fsdp", None)), (r"blocks\..*\.lora_b", P(None, None, "fsdp"))
RULES: dict[str, Rules] = {
    "dit": (
        *_ADAPTER,
        (r"blocks\..*\.kernel", P(None, "fsdp", None)),
        (r"blocks\..*\.(bias|scale)", P(None, None)),
        (r"blocks\.modulation", P(None, None, "fsdp")),
        (r"[a-z_]+\.kernel", P("fsdp", None)),
        (r"[a-z_]+\.bias", P(None)),
        (r"head_modulation", P(None, None)),
    ),
    "umt5": (
        (r"embedding", P("fsdp", None)),
        (r"blocks\..*\.kernel", P(None, "fsdp", None)),
        (r"blocks\..*\.scale", P(None, None)),
        (r"blocks\.position_bias", P(None, None, None)),
        (r"norm\.scale", P(None)),
    ),
    # Small beside the transformers, and every sample needs all of them.
    "vae": ((r".*", P()),),
    "reward": ((r".*", P()),),
}


def make_mesh(sizes: Mapping[str, int]) -> Mesh:
    """A mesh of all devices.

    Args:
        sizes: devices along each axis; one may be -1 and takes the rest.

    Raises:
        UserError: the sizes do not multiply to the number of devices.
    """
    devices = jax.device_count()
    known = int(np.prod([n for n in sizes.values() if n != -1]))
    shape = [devices // known if n == -1 else n for n in sizes.values()]
    if int(np.prod(shape)) != devices:
        wanted = ", ".join(f"{axis}={n}" for axis, n in sizes.items())
        raise UserError(f"config.mesh: {wanted} does not fill {devices} devices")
    return jax.make_mesh(tuple(shape), tuple(sizes), axis_types=(AxisType.Auto,) * len(shape))


def spec_of(name: str, shape: Sequence[int], rules: Rules, mesh: Mesh, used: set[str] | None = None) -> PartitionSpec:
    """The first rule's spec; an axis that the mesh does not divide stays whole.

    Raises:
        KeyError: no rule matches.
    """
    for pattern, spec in rules:
        if re.fullmatch(pattern, name):
            if used is not None:
                used.add(pattern)
            return P(*(a if a is None or shape[i] % mesh.shape[a] == 0 else None for i, a in enumerate(spec)))
    raise KeyError(f"no sharding rule for {name}")


def shardings(state: nnx.State, network: str, mesh: Mesh) -> nnx.State:
    """NamedShardings in the structure of a network's state."""
    rules = RULES[network]

    def place(path: tuple, leaf: jax.Array) -> NamedSharding:
        name = ".".join(str(getattr(k, "key", getattr(k, "name", k))) for k in path).removesuffix(".value")
        return NamedSharding(mesh, spec_of(name, leaf.shape, rules, mesh))

    return jax.tree_util.tree_map_with_path(place, state)


def check_rules(states: Sequence[nnx.State], network: str, mesh: Mesh, *, adapted: bool) -> None:
    """Raises KeyError where a parameter has no rule or a rule no parameter.

    Args:
        states: the parts of one network, trainable and frozen.
        network: name of its table.
        adapted: whether it has adapters, which are a part of the table only then.
    """
    used = set() if adapted else {pattern for pattern, _ in _ADAPTER}
    for state in states:
        for path, leaf in nnx.to_flat_state(state):
            spec_of(".".join(map(str, path)), leaf.shape, RULES[network], mesh, used)
    unused = [pattern for pattern, _ in RULES[network] if pattern not in used]
    if unused:
        raise KeyError(f"{network}: sharding rule {unused[0]!r} matches no parameter")


def batch_shards(mesh: Mesh) -> int:
    """Into how many parts a batch is split."""
    return mesh.shape["data"] * mesh.shape["fsdp"]
