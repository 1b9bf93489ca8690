"""Modules and flat `dotted.path -> array` dictionaries."""

from collections.abc import Mapping
from typing import TypeVar

from flax import nnx
from jax import Array

M = TypeVar("M", bound=nnx.Module)


def flat_arrays(state: nnx.State) -> dict[str, Array]:
    """Every array of a state by its dotted path."""
    return {".".join(map(str, path)): leaf[...] for path, leaf in nnx.to_flat_state(state)}


def get_arrays(module: nnx.Module) -> dict[str, Array]:
    """Every parameter of a module by its dotted path."""
    return flat_arrays(nnx.state(module, nnx.Param))


def set_arrays(module: M, arrays: Mapping[str, Array]) -> M:
    """The module (abstract ones too) with every parameter replaced.

    Raises:
        KeyError: the arrays and the module's parameters are not the same set.
    """
    graph, params, rest = nnx.split(module, nnx.Param, ...)
    flat = dict(nnx.to_flat_state(params))
    names = {".".join(map(str, path)): path for path in flat}
    if names.keys() != arrays.keys():
        raise KeyError(f"parameters differ: {sorted(names.keys() ^ arrays.keys())}")
    for name, path in names.items():
        flat[path] = flat[path].replace(arrays[name])
    return nnx.merge(graph, nnx.from_flat_state(flat), rest)
