"""What the converters share: from the source's tensors or graph to the arrays of a module, and to the filled module."""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Generic, TypeVar

import jax.numpy as jnp
import numpy as np
from flax import nnx

from convert.lora import Lora, merge
from convert.mapping import LazyArray, Rule, Shapes, check_filled, lazy_arrays, plan, whole
from convert.onnx_graph import Graph
from convert.readers import Checkpoint
from convert.recognise import looks_like
from rfl_jax.errors import UserError
from rfl_jax.files import read_json
from rfl_jax.models.weights import fill, flat_shapes

# No size of a network comes near.
LARGEST = 1e9

C = TypeVar("C")
M = TypeVar("M", bound=nnx.Module)


@dataclasses.dataclass(frozen=True)
class Network(Generic[C, M]):
    """A module that weights are converted for.

    Attributes:
        module: its class, called with a config.
    """

    module: Callable[..., M]

    def build(self, cfg: C, **options: Any) -> M:
        """The module of these sizes; `options` are further arguments of its constructor."""
        return self.module(cfg, **options, rngs=nnx.Rngs(0))

    def abstract(self, cfg: C, **options: Any) -> M:
        """The module with shapes in place of its weights."""
        # Tracing takes a third of a second for the larger ones, and modules may be changed by who gets them.
        return nnx.clone(_abstract(self.module, cfg, tuple(sorted(options.items()))))

    def filled(self, cfg: C, arrays: Mapping[str, np.ndarray]) -> M:
        """The module with these weights."""
        return fill(self.abstract(cfg), {name: jnp.asarray(array) for name, array in arrays.items()})


@functools.cache
def _abstract(module: Callable[..., M], cfg: Any, options: tuple[tuple[str, Any], ...]) -> M:
    return nnx.eval_shape(lambda: module(cfg, **dict(options), rngs=nnx.Rngs(0)))


@dataclasses.dataclass(frozen=True)
class OnnxComponent(Network[C, M]):
    """A network that is recognised by the flow of data through an ONNX graph.

    Attributes:
        walk: config and arrays of a graph.
    """

    walk: Callable[[Graph], tuple[C, dict[str, np.ndarray]]]

    def convert(self, source: Path | str) -> tuple[C, dict[str, np.ndarray]]:
        """Config and `dotted.path -> array` of an ONNX file.

        Raises:
            UserError: not an ONNX file, or naming the first node that is not the network's.
        """
        cfg, arrays = self.walk(Graph(Path(source)))
        check_filled(self.abstract(cfg), arrays, what=str(source))
        if unfit := [name for name, array in arrays.items() if not np.isfinite(array).all()]:
            raise UserError(f"{source}: gives NaN or infinity for {unfit[0]}, expected finite numbers")
        return cfg, arrays

    def load(self, source: Path | str) -> M:
        """The Flax module filled with an ONNX file's weights; raises as `convert` does."""
        return self.filled(*self.convert(source))


@dataclasses.dataclass(frozen=True)
class Component(Network[C, M]):
    """A network that is recognised by the keys and shapes of its checkpoint's tensors.

    Attributes:
        name: in messages.
        namings: key tables by name.
        naming: picks a table from the source's keys.
        infer_config: sizes from the source's shapes and hints.
        hint_kinds: fields of a config.json or `--set` that this component reads: whole numbers (int), numbers (float), lists of
            numbers (list), or true and false (bool).
        read_sidecar: those fields of a config.json's content.
        checkpoint: what the source is opened as.
    """

    name: str
    namings: dict[str, list[Rule]]
    naming: Callable[[Shapes], str]
    infer_config: Callable[[Shapes, dict], C]
    hint_kinds: Mapping[str, type] = dataclasses.field(default_factory=dict)
    read_sidecar: Callable[[dict[str, Any]], dict[str, Any]] = dict
    checkpoint: type[Checkpoint] = Checkpoint

    def convert(
        self,
        sources: Sequence[Path | str],
        *,
        dtype: str | None = None,
        loras: Sequence[tuple[str, float]] = (),
        expert: str = "",
        **hints: Any,
    ) -> tuple[C, dict[str, LazyArray]]:
        """Config and `dotted.path -> array` of a checkpoint. The arrays are checked, but not read yet.

        Args:
            sources: the checkpoint's files.
            dtype: of the arrays; None keeps the source's (bfloat16 for 8-bit weights).
            loras: files of adapters and their strengths, which are merged into the weights.
            expert: "dit" or "dit2": whose adapters are meant, where a file has those of both.
            hints: see `infer_config`.

        Raises:
            UserError: unreadable files, or tensors that are missing, unexpected or misshapen.
        """
        unknown = sorted(set(hints) - set(self.hint_kinds))
        if unknown:
            raise UserError(
                f"{unknown[0]}: not a setting of {self.name}, expected one of {', '.join(self.hint_kinds) or 'none'}"
            )
        paths = [Path(source) for source in sources]
        told = self.read_sidecar(sidecar(paths[0]))
        sizes = self._checked(sidecar_of(paths[0]), told) | self._checked("--set", hints)
        checkpoint = self.checkpoint(paths)
        try:
            rules = self.namings[self.naming(checkpoint.shapes)]
            cfg = self.infer_config(checkpoint.shapes, sizes)
            target = flat_shapes(self.abstract(cfg))
            assignments = plan(rules, checkpoint.shapes, target, what=self.name)
        except UserError as error:
            raise UserError(f"{paths[0]}: {error}; {looks_like(checkpoint.shapes)}") from None
        stored = np.dtype(jnp.dtype(dtype)) if dtype else None
        arrays = lazy_arrays(
            assignments, target, checkpoint.read, lambda key: stored or checkpoint.dtype(key), checkpoint.name
        )
        merged = [(Lora(file, self.namings, target, expert), strength) for file, strength in loras]
        return cfg, merge(arrays, merged)

    def _checked(self, where: Path | str, values: Mapping[str, Any]) -> dict[str, Any]:
        """Those of the values that this component reads; null stands for one that is not said."""
        found = {name: values[name] for name in self.hint_kinds if values.get(name) is not None}
        for name, value in found.items():
            kind = self.hint_kinds[name]
            if kind is bool:
                if type(value) is not bool:
                    raise UserError(f"{where}: {name}={value!r}, expected True or False")
                continue
            numbers = value if kind is list and isinstance(value, list | tuple) else [value]
            whole = kind is int
            if (kind is list and numbers is not value) or not all(
                _is_positive(x, whole, kind is list) for x in numbers
            ):
                expected = (
                    "a list of numbers" if kind is list else "a whole number above 0" if whole else "a number above 0"
                )
                raise UserError(f"{where}: {name}={value!r}, expected {expected}")
        return found

    def describe(self, sources: Sequence[Path | str]) -> C:
        """The config alone: only headers are read."""
        return self.convert(sources)[0]

    def load(self, source: Path | str | Sequence[Path | str], *, dtype: str | None = None, **hints: Any) -> M:
        """The Flax module filled with a checkpoint's weights, in memory.

        Args:
            source: file, folder of shards, index, or a list of files.
            dtype: dtype of the stored weights; None keeps the source's.
            hints: sizes that weights do not tell, see `infer_config`.
        """
        sources = [source] if isinstance(source, str | Path) else list(source)
        cfg, arrays = self.convert(sources, dtype=dtype, **hints)
        return self.filled(cfg, {name: whole(array) for name, array in arrays.items()})


def _is_positive(x: Any, whole: bool, any_sign: bool) -> bool:
    """Whether it is a finite number, whole and above zero where that is asked for."""
    is_number = type(x) is int or (type(x) is float and math.isfinite(x) and not whole)
    return is_number and abs(x) < LARGEST and (any_sign or x > 0)


def sidecar_of(source: Path) -> Path:
    """Where the config.json of a checkpoint lies, if it has one."""
    return (source if source.is_dir() else source.parent) / "config.json"


def sidecar(source: Path) -> dict[str, Any]:
    """The config.json beside a checkpoint, as the original and diffusers publish it; empty where there is none."""
    file = sidecar_of(source)
    return read_json(file) if file.exists() else {}
