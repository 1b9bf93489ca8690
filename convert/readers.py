"""Checkpoint files: shapes of all tensors at once, tensors or parts of them when asked for.

Safetensors (one file, several, or a folder of shards with an index) and PyTorch pickles, which need torch.
"""

import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from rfl_jax.errors import UserError
from rfl_jax.files import PICKLES

# Floating-point only: there are no other weights in these networks.
DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
}
# What some tools put before every key of the DiT.
PREFIXES = ("model.diffusion_model.", "diffusion_model.")
# Names of an 8-bit weight's scale, in place of its "weight", and of what else comes with it.
SCALES = ("scale_weight", "weight_scale")
NOT_WEIGHTS = ("scale_input", "input_scale", "scaled_fp8")

Index = tuple[slice, ...]


class Reader(Protocol):
    """One or several files of tensors."""

    shapes: dict[str, tuple[int, ...]]

    def dtype(self, key: str) -> np.dtype:
        """As stored."""
        ...

    def read(self, key: str, index: Index = ()) -> np.ndarray:
        """The tensor as stored, or a part of it."""
        ...

    def origin(self, key: str) -> Path:
        """The file of a tensor."""
        ...


class SafetensorsReader:
    """Safetensors files.

    Args:
        files: resolved, without indexes or folders.

    Raises:
        UserError: a file is truncated or not safetensors, a tensor is of another type than `DTYPES`, or a key occurs
            twice.
    """

    def __init__(self, files: Sequence[Path]) -> None:
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._places: dict[str, tuple[Path, int, np.dtype]] = {}
        for file in files:
            for key, (shape, offset, dtype) in _header(file).items():
                if key in self._places:
                    raise UserError(f"{file}: tensor {key} is also in {self._places[key][0]}")
                self._places[key] = (file, offset, dtype)
                self.shapes[key] = shape

    def dtype(self, key: str) -> np.dtype:
        return self._places[key][2]

    def origin(self, key: str) -> Path:
        return self._places[key][0]

    def read(self, key: str, index: Index = ()) -> np.ndarray:
        file, offset, dtype = self._places[key]
        shape = self.shapes[key]
        if _is_whole(index, shape):
            # Read, not mapped: mapped pages would count as this process's memory.
            return np.fromfile(file, dtype, math.prod(shape), offset=offset).reshape(shape)
        return np.array(np.memmap(file, dtype, "r", offset, shape)[index])


def _is_whole(index: Index, shape: tuple[int, ...]) -> bool:
    return all(part.indices(size) == (0, size, 1) for part, size in zip(index, shape, strict=False))


def _header(file: Path) -> dict[str, tuple[tuple[int, ...], int, np.dtype]]:
    """Shape, place in the file and type of every tensor, after the library has checked that they fill the file."""
    try:
        with safe_open(file, framework="numpy"):
            pass
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            entries: dict[str, Any] = json.loads(stream.read(length))
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(f"{file}: expected a whole safetensors file ({error})") from None
    entries.pop("__metadata__", None)
    unknown = [f"{key} ({entry['dtype']})" for key, entry in entries.items() if entry["dtype"] not in DTYPES]
    # A marker that holds nothing to convert may be of any type.
    unknown = [text for text in unknown if not text.startswith(NOT_WEIGHTS)]
    if unknown:
        raise UserError(f"{file}: {', '.join(unknown[:3])}: expected a type of {', '.join(DTYPES)}")
    return {
        key: (tuple(entry["shape"]), 8 + length + entry["data_offsets"][0], DTYPES[entry["dtype"]])
        for key, entry in entries.items()
        if entry["dtype"] in DTYPES
    }


class TorchReader:
    """A state dict that PyTorch pickled, mapped into memory; nothing but tensors is unpickled.

    Raises:
        UserError: torch is not installed, or the file is no such state dict.
    """

    def __init__(self, file: Path) -> None:
        try:
            import torch
        except ImportError:
            raise UserError(f"{file}: reading it needs PyTorch: pip install torch") from None
        try:
            content = torch.load(file, map_location="cpu", mmap=True, weights_only=True)
        except Exception as error:  # whatever a broken pickle raises
            line = (str(error).splitlines() or [type(error).__name__])[0][:160]
            raise UserError(f"{file}: expected a state dict of tensors ({line})") from None
        content = content.get("state_dict", content) if isinstance(content, dict) else None
        if not content or not all(isinstance(x, torch.Tensor) for x in content.values()):
            raise UserError(f"{file}: expected a state dict of tensors")
        self._file = file
        self._tensors = content
        self._kinds = {
            torch.float64: np.dtype(np.float64),
            torch.float32: np.dtype(np.float32),
            torch.float16: np.dtype(np.float16),
            torch.bfloat16: np.dtype(ml_dtypes.bfloat16),
            torch.float8_e4m3fn: np.dtype(ml_dtypes.float8_e4m3fn),
            torch.float8_e5m2: np.dtype(ml_dtypes.float8_e5m2),
        }
        wrong = [f"{key} ({x.dtype})" for key, x in content.items() if x.dtype not in self._kinds]
        if wrong:
            raise UserError(f"{file}: {', '.join(wrong[:3])}: expected floating-point tensors")
        self.shapes = {key: tuple(x.shape) for key, x in content.items()}
        self._bytes = {1: torch.uint8, 2: torch.int16, 4: torch.float32, 8: torch.float64}

    def dtype(self, key: str) -> np.dtype:
        return self._kinds[self._tensors[key].dtype]

    def origin(self, key: str) -> Path:
        del key
        return self._file

    def read(self, key: str, index: Index = ()) -> np.ndarray:
        part = self._tensors[key][index or ...].contiguous()
        dtype = self.dtype(key)
        # By way of a type that numpy has.
        return part.view(self._bytes[dtype.itemsize]).numpy().view(dtype)


class Checkpoint:
    """What a converter sees of a checkpoint: keys without prefixes, 8-bit weights with their scale applied.

    Args:
        sources: safetensors files, `*.safetensors.index.json` files, folders that hold either, or pickles.
        prefixes: one of which is taken off, if all keys have it.

    Raises:
        UserError: a file is absent or unusable; the index names a shard that is not there or a tensor that its shard
            lacks.
    """

    def __init__(self, sources: Sequence[Path], *, prefixes: Sequence[str] = PREFIXES) -> None:
        files = [file for source in sources for file in _resolve(Path(source))]
        pickles = [file for file in files if file.suffix in PICKLES]
        if pickles and len(files) > 1:
            raise UserError(f"{pickles[0]}: expected one pickle alone, or safetensors files")
        self.files = files
        self._reader: Reader = TorchReader(files[0]) if pickles else SafetensorsReader(files)
        keys = list(self._reader.shapes)
        prefix = next((p for p in prefixes if keys and all(k.startswith((p, *NOT_WEIGHTS)) for k in keys)), "")
        self._keys = {key.removeprefix(prefix): key for key in keys}
        self._scales: dict[str, str] = {}
        for key in list(self._keys):
            base, _, name = key.rpartition(".")
            if name in SCALES and f"{base}.weight" in self._keys:
                self._scales[f"{base}.weight"] = self._keys.pop(key)
            elif name in NOT_WEIGHTS or key in NOT_WEIGHTS:
                del self._keys[key]
        self.shapes = {key: self._reader.shapes[stored] for key, stored in self._keys.items()}
        bare = [key for key in self._keys if self._stored(key).itemsize == 1 and key not in self._scales]
        shaped = [k for k, s in self._scales.items() if self._reader.shapes[s] not in _scale_shapes(self.shapes[k])]
        for key in shaped:
            raise UserError(f"{self._reader.origin(self._scales[key])}: the scale of {key} has an unexpected shape")
        # Weights cast to 8 bits without scales are published too; one scaled and another not is an accident.
        if bare and self._scales:
            raise UserError(f"{self._reader.origin(self._keys[bare[0]])}: {bare[0]} is 8-bit and has no scale")

    def _stored(self, key: str) -> np.dtype:
        return self._reader.dtype(self._keys[key])

    def dtype(self, key: str) -> np.dtype:
        """Of what `read` returns: as stored, bfloat16 for 8-bit weights."""
        stored = self._stored(key)
        return DTYPES["BF16"] if stored.itemsize == 1 else stored

    def read(self, key: str, index: Index = ()) -> np.ndarray:
        """The tensor or a part of it."""
        x = self._reader.read(self._keys[key], index)
        if key in self._scales:
            scale = self._reader.read(self._scales[key]).astype(np.float32)
            if scale.size > 1:
                scale = np.broadcast_to(scale.reshape(-1, *[1] * (x.ndim - 1)), self.shapes[key])[index or ...]
            x = x.astype(np.float32) * scale
        return x.astype(self.dtype(key), copy=False)


def _scale_shapes(weight: tuple[int, ...]) -> list[tuple[int, ...]]:
    """One scale for all of it, or one a row."""
    return [(), (1,), (1, 1), weight[:1], (weight[0], *[1] * (len(weight) - 1))]


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
        owned = {name: {key for key, file in weight_map.items() if file == name} for name in names}
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        raise UserError(f"{source}: expected a JSON object with a weight_map ({error})") from None
    files = []
    for name in names:
        # Not resolved: the hub's cache keeps links to files elsewhere.
        file = Path(os.path.normpath(source.parent / name))
        if Path(os.path.normpath(source.parent)) not in file.parents:
            raise UserError(f"{source}: shard {name} lies outside the folder of the index")
        if not file.exists():
            raise UserError(f"{source}: shard {name} is missing")
        absent = sorted(owned[name] - _header(file).keys())
        if absent:
            raise UserError(f"{file}: lacks tensor {absent[0]}, which {source.name} says it holds")
        files.append(file)
    return files
