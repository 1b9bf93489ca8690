"""Lazy readers of checkpoint files: one file, several, or a folder of shards with an index."""

import json
from collections.abc import Sequence
from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from rfl_jax.errors import UserError

DTYPES = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "I64": np.int64,
    "I32": np.int32,
    "I16": np.int16,
    "I8": np.int8,
    "U8": np.uint8,
    "BOOL": np.bool_,
}


class SafetensorsReader:
    """Shapes of all tensors at once, the tensors themselves one at a time.

    Args:
        sources: safetensors files, `*.safetensors.index.json` files, or folders that hold either.

    Raises:
        UserError: a file is absent, truncated or not safetensors; the index names a shard that is not there or a
            tensor that its shard lacks; a key occurs twice.
    """

    def __init__(self, sources: Sequence[Path]) -> None:
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._files: dict[str, Path] = {}
        self._handles: dict[Path, safe_open] = {}
        for file in [file for source in sources for file in _resolve(Path(source))]:
            self._open(file)

    def _open(self, file: Path) -> None:
        try:
            handle = safe_open(file, framework="numpy")
            keys = list(handle.keys())
            shapes = {key: tuple(handle.get_slice(key).get_shape()) for key in keys}
        except (SafetensorError, OSError, ValueError) as error:
            raise UserError(f"{file}: expected a whole safetensors file ({error})") from None
        for key in keys:
            if key in self._files:
                raise UserError(f"{file}: tensor {key} is also in {self._files[key]}")
            self._files[key] = file
        self._handles[file] = handle
        self.shapes |= shapes

    def read(self, key: str) -> np.ndarray:
        """The tensor as stored (bfloat16 as ml_dtypes.bfloat16)."""
        file = self._files[key]
        name = self._handles[file].get_slice(key).get_dtype()
        if name not in DTYPES:
            raise UserError(f"{file}: tensor {key} has dtype {name}, expected one of {', '.join(DTYPES)}")
        return np.asarray(self._handles[file].get_tensor(key))


def _resolve(source: Path) -> list[Path]:
    if source.is_dir():
        indexes = sorted(source.glob("*.safetensors.index.json"))
        if len(indexes) == 1:
            return _resolve(indexes[0])
        files = sorted(source.glob("*.safetensors"))
        if len(indexes) > 1 or len(files) != 1:
            raise UserError(f"{source}: expected one .safetensors file or one .safetensors.index.json in the folder")
        return files
    if not source.exists():
        raise UserError(f"{source}: no such file or folder")
    if not source.name.endswith(".index.json"):
        return [source]
    try:
        weight_map = json.loads(source.read_text())["weight_map"]
        names = sorted(set(weight_map.values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{source}: expected a JSON object with a weight_map ({error})") from None
    files = []
    for name in names:
        file = (source.parent / name).resolve()
        if source.parent.resolve() not in file.parents:
            raise UserError(f"{source}: shard {name} lies outside the folder of the index")
        if not file.exists():
            raise UserError(f"{source}: shard {name} is missing")
        files.append(file)
    return files
