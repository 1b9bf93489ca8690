"""Strict renaming of checkpoint tensors: a table of rules, checked in full before the first byte is copied."""

import dataclasses
import re
from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np
from flax import nnx

from rfl_jax.errors import UserError

MOST_NAMED = 12


@dataclasses.dataclass(frozen=True)
class Transform:
    """A change of layout from PyTorch's to ours, and back."""

    forward: Callable[[np.ndarray], np.ndarray]
    inverse: Callable[[np.ndarray], np.ndarray]


identity = Transform(lambda x: x, lambda x: x)
# Linear: [out, in] -> [in, out].
transpose = Transform(lambda x: _axes(x, 2).T, lambda x: x.T)
# Modulation: [1, n, d] -> [n, d].
squeeze_leading = Transform(lambda x: _axes(x, 3)[0], lambda x: x[None])
# Norms with trailing unit axes: [c, 1, 1] and [c, 1, 1, 1] -> [c].
flatten_2d = Transform(lambda x: _axes(x, 3)[:, 0, 0], lambda x: x[:, None, None])
flatten_3d = Transform(lambda x: _axes(x, 4)[:, 0, 0, 0], lambda x: x[:, None, None, None])
# Convolutions: [out, in, h, w] -> [h, w, in, out], [out, in, t, h, w] -> [t, h, w, in, out].
conv2d = Transform(lambda x: _axes(x, 4).transpose(2, 3, 1, 0), lambda x: x.transpose(3, 2, 0, 1))
conv3d = Transform(lambda x: _axes(x, 5).transpose(2, 3, 4, 1, 0), lambda x: x.transpose(4, 3, 0, 1, 2))
# Convolutions of one pixel: [out, in, 1, 1] and [out, in, 1, 1, 1] -> [in, out].
pointwise_2d = Transform(lambda x: _axes(x, 4)[:, :, 0, 0].T, lambda x: x.T[:, :, None, None])
pointwise_3d = Transform(lambda x: _axes(x, 5)[:, :, 0, 0, 0].T, lambda x: x.T[:, :, None, None, None])


def patchify(patch: tuple[int, int, int]) -> Transform:
    """Patch convolution [out, in, t, h, w] -> [t*h*w*in, out]."""
    return Transform(
        lambda x: conv3d.forward(x).reshape(-1, x.shape[0]),
        lambda x: conv3d.inverse(x.reshape(*patch, -1, x.shape[-1])),
    )


def _axes(x: np.ndarray, count: int) -> np.ndarray:
    if x.ndim != count:
        raise ValueError(f"expected {count} axes, got {x.ndim}")
    return x


@dataclasses.dataclass(frozen=True)
class Rule:
    r"""One row of a key map.

    Attributes:
        pattern: regular expression that matches the whole source key; literal but for the layer's number, so that
            it also tells the key of a target.
        target: the parameter's path, with `\1`-style groups. None ignores the key on purpose.
        transform: source layout to target layout.
        stacked: the pattern's first group is the layer, which becomes the index on axis 0 of the target.
    """

    pattern: str
    target: str | None
    transform: Transform = identity
    stacked: bool = False

    def key(self, layer: int | None) -> str:
        """The source key."""
        return self.pattern.replace(r"(\d+)", str(layer)).replace("\\.", ".")


@dataclasses.dataclass(frozen=True)
class Assignment:
    """Where one source tensor goes."""

    key: str
    target: str
    layer: int | None
    transform: Transform


Shapes = Mapping[str, Sequence[int]]


def flat_shapes(module: nnx.Module) -> dict[str, tuple[int, ...]]:
    """`dotted.path -> shape` of every parameter of a (possibly abstract) module."""
    state = nnx.to_flat_state(nnx.state(module, nnx.Param))
    return {".".join(map(str, path)): tuple(leaf.shape) for path, leaf in state}


def target_shapes(rules: Sequence[Rule], source: Shapes) -> dict[str, tuple[int, ...]]:
    """The shapes the source would fill, wherever a rule matches: what a network's sizes are read from."""
    found: dict[str, tuple[int, ...]] = {}
    for rule in rules:
        if rule.target is None:
            continue
        pattern = re.compile(rule.pattern)
        for key, shape in source.items():
            if not (match := pattern.fullmatch(key)) or (after := _shape_after(rule.transform, tuple(shape))) is None:
                continue
            name = match.expand(rule.target)
            if rule.stacked:
                layers = max(int(match.group(1)) + 1, found.get(name, (0,))[0])
                found[name] = (layers, *after)
            else:
                found[name] = after
    return found


def plan(rules: Sequence[Rule], source: Shapes, target: Shapes, *, what: str) -> list[Assignment]:
    """Assigns every source key to its place.

    Raises:
        UserError: naming all keys that match no rule, all parameters that nothing fills, and all shapes that
            differ. Nothing has been read by then.
    """
    compiled = [(re.compile(rule.pattern), rule) for rule in rules]
    assignments, problems = [], []
    filled: dict[tuple[str, int | None], str] = {}
    for key, shape in source.items():
        matches = [(m, rule) for pattern, rule in compiled if (m := pattern.fullmatch(key))]
        if len(matches) != 1:
            problems.append(f"unexpected tensor {key}" if not matches else f"{key} matches {len(matches)} rules")
            continue
        match, rule = matches[0]
        if rule.target is None:
            continue
        name = match.expand(rule.target)
        layer = int(match.group(1)) if rule.stacked else None
        if name not in target:
            problems.append(f"unexpected tensor {key}")
            continue
        expected = tuple(target[name][1:] if rule.stacked else target[name])
        if rule.stacked and layer is not None and layer >= target[name][0]:
            problems.append(f"unexpected tensor {key}")
            continue
        if (name, layer) in filled:
            problems.append(f"{key} and {filled[name, layer]} both fill {name}")
            continue
        filled[name, layer] = key
        got = _shape_after(rule.transform, tuple(shape))
        if got != expected:
            problems.append(f"{key} has shape {list(shape)}, expected one that gives {list(expected)}")
        assignments.append(Assignment(key, name, layer, rule.transform))
    for name in target:
        if (name, None) in filled:
            continue
        layers = [layer for n, layer in filled if n == name]
        missing = sorted(set(range(target[name][0])) - set(layers)) if layers else None
        if missing is None:
            problems.append(f"missing tensor for {name}")
        problems += [f"missing tensor for {name} of layer {i}" for i in missing or ()]
    if problems:
        more = f" (+{len(problems) - MOST_NAMED} more)" if len(problems) > MOST_NAMED else ""
        raise UserError(f"{what}: {'; '.join(problems[:MOST_NAMED])}{more}")
    return assignments


def _shape_after(transform: Transform, shape: tuple[int, ...]) -> tuple[int, ...] | None:
    # A zero-stride array carries the shape without memory, so full-size models are checked for nothing.
    try:
        return transform.forward(np.broadcast_to(np.float32(0), shape)).shape
    except ValueError:
        return None


def fill(
    assignments: Iterable[Assignment], target: Shapes, read: Callable[[str], np.ndarray], dtype: np.dtype | None = None
) -> dict[str, np.ndarray]:
    """Reads every assigned tensor into its (stacked) place.

    Args:
        read: returns the source tensor of a key.
        dtype: dtype of the result; None keeps the source's.
    """
    arrays: dict[str, np.ndarray] = {}
    for item in assignments:
        value = item.transform.forward(read(item.key))
        if dtype is not None:
            value = value.astype(dtype)
        if item.layer is None:
            arrays[item.target] = np.ascontiguousarray(value)
        else:
            if item.target not in arrays:
                arrays[item.target] = np.empty(target[item.target], value.dtype)
            arrays[item.target][item.layer] = value
    return arrays


def check_filled(module: nnx.Module, arrays: Mapping[str, np.ndarray], *, what: str) -> None:
    """Refuses arrays that are not exactly a module's parameters, in name and shape."""
    target, got = flat_shapes(module), {name: array.shape for name, array in arrays.items()}
    wrong = sorted(name for name in target.keys() | got.keys() if target.get(name) != got.get(name))
    if wrong:
        raise UserError(f"{what}: {wrong[0]} has shape {got.get(wrong[0])}, expected {target.get(wrong[0])}")


def unfill(rules: Sequence[Rule], arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The inverse of `fill`: source keys and layouts of a module's parameters. Missing optional tensors stay missing."""
    out: dict[str, np.ndarray] = {}
    for rule in rules:
        if rule.target is None or rule.target not in arrays:
            continue
        value = arrays[rule.target]
        for layer in range(value.shape[0]) if rule.stacked else [None]:
            source = rule.transform.inverse(value if layer is None else value[layer])
            out[rule.key(layer)] = np.ascontiguousarray(source)
    return out
