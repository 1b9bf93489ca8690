"""Strict renaming of checkpoint tensors: a table of rules, checked in full before the first byte is copied."""

import dataclasses
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import ml_dtypes
import numpy as np
from flax import nnx

from convert.readers import Index, is_finite
from rfl_jax.errors import UserError
from rfl_jax.models.weights import flat_shapes

MOST_NAMED = 12


@dataclasses.dataclass(frozen=True)
class Transform:
    """A change of layout from PyTorch's to ours, and back.

    Attributes:
        forward, inverse: of whole tensors.
        source_index: which part of the source becomes a part of the result, where there is such a one.
    """

    forward: Callable[[np.ndarray], np.ndarray]
    inverse: Callable[[np.ndarray], np.ndarray]
    source_index: Callable[[Index], Index] | None = None


unchanged = Transform(lambda x: x, lambda x: x, lambda index: index)
# Linear: [out, in] -> [in, out].
transpose = Transform(lambda x: _axes(x, 2).T, lambda x: x.T, lambda index: index[::-1])
# Modulation: [1, n, d] -> [n, d].
squeeze_leading = Transform(lambda x: _axes(x, 3)[0], lambda x: x[None], lambda index: (slice(None), *index))
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
    transform: Transform = unchanged
    stacked: bool = False

    def key(self, layer: int | None) -> str:
        """The source key."""
        return self.pattern.replace(r"(\d+)", str(layer)).replace("\\.", ".")


def key_tables(first: str, second: str, rows: Sequence[tuple[str, str, str, Transform]]) -> dict[str, list[Rule]]:
    """The key maps of two namings from one table.

    Args:
        first, second: the names of the namings.
        rows: a tensor each: its key in the first naming and in the second, with `*` for the layer's number; the
            parameter's path; the change of layout.
    """

    def rule(key: str, target: str, transform: Transform) -> Rule:
        return Rule(re.escape(key).replace(r"\*", r"(\d+)"), target, transform, stacked="*" in key)

    return {
        first: [rule(key, target, transform) for key, _, target, transform in rows],
        second: [rule(key, target, transform) for _, key, target, transform in rows],
    }


@dataclasses.dataclass(frozen=True)
class Assignment:
    """Where one source tensor goes."""

    key: str
    target: str
    layer: int | None
    transform: Transform


Shapes = Mapping[str, Sequence[int]]


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


def cast(value: np.ndarray, dtype: np.dtype, name: str) -> np.ndarray:
    """The numbers in another type.

    Args:
        value: finite numbers.
        dtype: of the result.
        name: for the message: file and key.

    Raises:
        UserError: one is too large for the type.
    """
    largest = float(ml_dtypes.finfo(dtype).max)
    if float(ml_dtypes.finfo(value.dtype).max) <= largest:
        return value.astype(dtype, copy=False)
    with np.errstate(over="ignore"):
        out = value.astype(dtype)
    if not is_finite(out):
        raise UserError(
            f"{name} holds numbers up to {np.abs(value.astype(np.float64)).max():g}, but {dtype} ends at {largest:g}:"
            " expected a --dtype of more range (bfloat16 or float32)"
        )
    return out


Added = Mapping[int | None, Sequence[Callable[[Index], np.ndarray]]]


class LazyArray:
    """An array of a network that is read when, and as far as, it is asked for.

    Args:
        parts: the whole of it, or its layers.
        shape: with the layers first, if there are any.
        read: returns a source tensor of a key, or a part of it.
        dtype: of the result.
        added: by layer (None: the whole) what is added in float32: functions of the part asked for.
        name: of a source tensor, for messages: file and key.
    """

    def __init__(
        self,
        parts: Sequence[Assignment],
        shape: Sequence[int],
        read: Callable[[str, Index], np.ndarray],
        dtype: np.dtype,
        added: Added | None = None,
        name: Callable[[str], str] = str,
    ) -> None:
        self.shape = tuple(shape)
        self.dtype = np.dtype(dtype)
        self.stacked = parts[0].layer is not None
        self._parts = {part.layer: part for part in parts}
        self._read = read
        self._added: Added = added or {}
        self._name = name

    def plus(self, added: Added) -> "LazyArray":
        """The same with something more added."""
        together = {k: [*self._added.get(k, ()), *added.get(k, ())] for k in self._added.keys() | added.keys()}
        return LazyArray(list(self._parts.values()), self.shape, self._read, self.dtype, together, self._name)

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.size * self.dtype.itemsize

    def __getitem__(self, index: Index) -> np.ndarray:
        """A part by one slice for each axis, contiguous."""
        if not self.stacked:
            return self._part(None, index)
        layers = range(*index[0].indices(self.shape[0]))
        first = self._part(layers[0], index[1:])
        out = np.empty((len(layers), *first.shape), self.dtype)
        out[0] = first
        for i, layer in enumerate(layers[1:], 1):
            out[i] = self._part(layer, index[1:])
        return out

    def pieces(self) -> Iterator[Index]:
        """Indices of its layers, or of the whole: what is read at once."""
        rest = tuple(slice(None) for _ in self.shape[1:])
        if not self.stacked:
            yield (slice(None), *rest) if self.shape else ()
            return
        for layer in range(self.shape[0]):
            yield (slice(layer, layer + 1), *rest)

    def _part(self, layer: int | None, index: Index) -> np.ndarray:
        part = self._parts[layer]
        if part.transform.source_index is not None:
            value = part.transform.forward(self._read(part.key, part.transform.source_index(index)))
        else:
            value = part.transform.forward(self._read(part.key, ()))[index]
        if layer in self._added:
            value = value.astype(np.float32)
            for part_of in self._added[layer]:
                value = value + part_of(index)
        return _contiguous(cast(value, self.dtype, self._name(part.key)))


ROWS = 16  # of a transposed matrix copied together: the cache lines they share are used before they are gone


def _contiguous(x: np.ndarray) -> np.ndarray:
    """`np.ascontiguousarray`, four times as fast for large transposed matrices."""
    if x.ndim != 2 or x.flags.c_contiguous or not x.flags.f_contiguous:
        return np.ascontiguousarray(x)
    out = np.empty(x.shape, x.dtype)
    for i in range(0, x.shape[1], ROWS):
        out[:, i : i + ROWS] = x[:, i : i + ROWS]
    return out


def lazy_arrays(
    assignments: Iterable[Assignment],
    target: Shapes,
    read: Callable[[str, Index], np.ndarray],
    dtype_of: Callable[[str], np.dtype],
    name: Callable[[str], str] = str,
) -> dict[str, LazyArray]:
    """Every assigned tensor in its (stacked) place, unread.

    Args:
        read: returns a source tensor of a key, or a part of it.
        dtype_of: dtype of the result for a source key; layers that differ become float32.
        name: of a source tensor, for messages: file and key.
    """
    parts: dict[str, list[Assignment]] = {}
    for item in assignments:
        parts.setdefault(item.target, []).append(item)
    arrays = {}
    for path, items in parts.items():
        dtypes = {dtype_of(item.key) for item in items}
        dtype = dtypes.pop() if len(dtypes) == 1 else np.dtype(np.float32)
        arrays[path] = LazyArray(items, target[path], read, dtype, name=name)
    return arrays


def whole(array: LazyArray) -> np.ndarray:
    """All of it, in memory."""
    return array[tuple(slice(None) for _ in array.shape)]


def check_filled(module: nnx.Module, arrays: Mapping[str, np.ndarray], *, what: str) -> None:
    """Refuses arrays that are not exactly a module's parameters, in name and shape."""
    target, got = flat_shapes(module), {name: array.shape for name, array in arrays.items()}
    wrong = sorted(name for name in target.keys() | got.keys() if target.get(name) != got.get(name))
    if wrong:
        raise UserError(f"{what}: {wrong[0]} has shape {got.get(wrong[0])}, expected {target.get(wrong[0])}")


def unfill(rules: Sequence[Rule], arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The inverse of an assignment: source keys and layouts of a module's parameters. Missing optional tensors stay missing."""
    out: dict[str, np.ndarray] = {}
    for rule in rules:
        if rule.target is None or rule.target not in arrays:
            continue
        value = arrays[rule.target]
        for layer in range(value.shape[0]) if rule.stacked else [None]:
            source = rule.transform.inverse(value if layer is None else value[layer])
            out[rule.key(layer)] = np.ascontiguousarray(source)
    return out
