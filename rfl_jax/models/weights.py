"""Modules and flat `dotted.path -> array` dictionaries."""

from collections.abc import Mapping
from typing import Any, TypeVar

from flax import nnx
from jax import Array

M = TypeVar("M", bound=nnx.Module)


def dotted(path: tuple[Any, ...]) -> str:
    """A parameter's path as one name: `blocks.self_attn.q.kernel`."""
    return ".".join(map(str, path))


def flat_arrays(state: nnx.State) -> dict[str, Array]:
    """Every array of a state by its dotted path."""
    return {dotted(path): leaf[...] for path, leaf in nnx.to_flat_state(state)}


def get_arrays(module: nnx.Module) -> dict[str, Array]:
    """Every parameter of a module by its dotted path."""
    return flat_arrays(nnx.state(module, nnx.Param))


def flat_shapes(module: nnx.Module) -> dict[str, tuple[int, ...]]:
    """The shape of every parameter of a (possibly abstract) module by its dotted path."""
    return {dotted(path): tuple(leaf.shape) for path, leaf in nnx.to_flat_state(nnx.state(module, nnx.Param))}


def fill_state(state: nnx.State, arrays: Mapping[str, Any], *, partial: bool = False) -> nnx.State:
    """The state with its parameters replaced by arrays.

    Args:
        state: of parameters, arrays or their shapes.
        arrays: by dotted path.
        partial: whether parameters without an array stay as they are.

    Raises:
        KeyError: an array without a parameter or, unless `partial`, a parameter without an array.
        ValueError: an array of another shape than its parameter.
    """
    flat = dict(nnx.to_flat_state(state))
    names = {dotted(path): path for path in flat}
    odd = arrays.keys() - names.keys() if partial else arrays.keys() ^ names.keys()
    if odd:
        raise KeyError(f"parameters differ: {sorted(odd)}")
    for name, array in arrays.items():
        path = names[name]
        if tuple(array.shape) != tuple(flat[path].shape):
            raise ValueError(f"{name} is {tuple(array.shape)}, expected {tuple(flat[path].shape)}")
        flat[path] = flat[path].replace(array)
    return nnx.from_flat_state(flat)


def fill(module: M, arrays: Mapping[str, Any], *, partial: bool = False) -> M:
    """The module (abstract ones too) with its parameters, adapters among them, replaced: see `fill_state`."""
    graph, params, rest = nnx.split(module, nnx.Param, ...)
    return nnx.merge(graph, fill_state(params, arrays, partial=partial), rest)
