"""Checkpoint files: shapes of all tensors at once, tensors or parts of them when asked for.

Safetensors and PyTorch pickles (which need torch), alone, as shards with an index, or as the only one of a folder.
"""

import functools
import json
import math
import os
import re
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open
from tqdm import tqdm

from rfl_jax.errors import UserError, first_line, refuse_damage
from rfl_jax.files import PICKLES, read_json

# Floating-point only: there are no other weights in these networks.
DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
}
# An adapter's alpha is a number that some tools store as a whole one.
ALPHA_DTYPES = {"I64": np.dtype(np.int64), "I32": np.dtype(np.int32), "I16": np.dtype(np.int16)}
# How files begin that are something else than their name says, or nothing that is read here.
PICKLE_STARTS = (b"PK\x03\x04", b"\x80\x02\x8a\x0a")
FOREIGN_STARTS = {
    b"GGUF": "is a GGUF file, which is not read: expected this network's safetensors or PyTorch file, as its authors,"
    " diffusers or ComfyUI publish it",
    b"version https://git-lfs": "is a Git LFS pointer: expected the file that it stands for (git lfs pull)",
}
# What a trainer leaves beside the weights.
LEFTOVERS = ("training_args", "optimizer", "scheduler", "scaler", "rng_state", "random_states")
# What tools put before every key: taken off as often as all keys have it.
PREFIXES = ("model.", "diffusion_model.", "module.", "pipe.", "dit.", "transformer.")
# What PyTorch puts inside a key where it wraps a module.
WRAPPERS = re.compile(r"(?<![^.])(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
# Names of an 8-bit weight's scale, in place of its "weight".
SCALES = ("scale_weight", "weight_scale")
# Last parts of keys that are no weights: what else comes with 8-bit weights, a tokenizer, the numbers of positions, counters of a
# training.
NOT_WEIGHTS = {
    *("scale_input", "input_scale", "scaled_fp8", "comfy_quant", "spiece_model", "position_ids"),
    *("epoch", "step", "global_step", "iteration", "iterations", "num_updates", "n_averaged", "decay"),
}
# Where a pickle keeps the state dict, if not at its top.
NESTS = (
    *("state_dict", "model", "module", "model_state", "model_state_dict", "generator"),
    *("ema", "ema_model", "model_ema", "ema_state_dict", "generator_ema"),
)

Index = tuple[slice, ...]


@runtime_checkable
class Reader(Protocol):
    """One file of tensors.

    Attributes:
        file: its path.
        metadata: texts of its header.
        shapes: of its tensors. What `NOT_WEIGHTS` names is left out.
    """

    file: Path
    metadata: Mapping[str, str]
    shapes: dict[str, tuple[int, ...]]

    def dtype(self, key: str) -> np.dtype:
        """As stored."""
        ...

    def read(self, key: str, index: Index = ()) -> np.ndarray:
        """The tensor as stored, or a part of it."""
        ...


class SafetensorsReader:
    """A safetensors file.

    Raises:
        UserError: it is truncated or no such file, or a tensor is of another type than `DTYPES`.
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._places: dict[str, tuple[int, np.dtype]] = {}
        try:
            # The library checks that the tensors fill the file.
            with safe_open(file, framework="numpy") as content:
                self.metadata: Mapping[str, str] = content.metadata() or {}
            with file.open("rb") as stream:
                length = int.from_bytes(stream.read(8), "little")
                entries: dict[str, Any] = json.loads(stream.read(length))
        except (SafetensorError, OSError, ValueError) as error:
            raise UserError(f"{file}: expected a whole safetensors file ({error})") from None
        entries.pop("__metadata__", None)
        unknown = []
        for key, entry in entries.items():
            if not is_weight(key):
                continue
            dtype = (DTYPES | ALPHA_DTYPES if key.endswith("alpha") else DTYPES).get(entry["dtype"])
            if dtype is None:
                unknown.append(f"{key} ({entry['dtype']})")
                continue
            self._places[key] = (8 + length + entry["data_offsets"][0], dtype)
            self.shapes[key] = tuple(entry["shape"])
        if unknown:
            raise UserError(f"{file}: {_some(unknown)}: expected a type of {', '.join(DTYPES)}")

    def dtype(self, key: str) -> np.dtype:
        return self._places[key][1]

    def read(self, key: str, index: Index = ()) -> np.ndarray:
        offset, dtype = self._places[key]
        shape = self.shapes[key]
        if _is_whole(index, shape):
            # Read, not mapped: mapped pages would count as this process's memory.
            return np.fromfile(self.file, dtype, math.prod(shape), offset=offset).reshape(shape)
        return np.array(np.memmap(self.file, dtype, "r", offset, shape)[index])


def is_weight(key: str) -> bool:
    """Whether a key is none of `NOT_WEIGHTS`."""
    return key.rpartition(".")[2] not in NOT_WEIGHTS


def _is_whole(index: Index, shape: tuple[int, ...]) -> bool:
    return all(part.indices(size) == (0, size, 1) for part, size in zip(index, shape, strict=False))


def _some(texts: Sequence[str], most: int = 3) -> str:
    return ", ".join(texts[:most]) + (f" (+{len(texts) - most} more)" if len(texts) > most else "")


class TorchReader:
    """A state dict that PyTorch pickled; nothing but tensors is unpickled. Of the zip format, which PyTorch has written
    since 1.6, a tensor is read when it is asked for; a file of the older one is in memory whole.

    Raises:
        UserError: torch is not installed, or the file is no such state dict, or holds two.
    """

    def __init__(self, file: Path) -> None:
        try:
            import torch
        except ImportError:
            raise UserError(f"{file}: reading it needs PyTorch: pip install torch") from None
        if zipfile.is_zipfile(file):
            state = file.stat()
            _check_sums(file, state.st_size, state.st_mtime_ns)
        try:
            content = torch.load(file, map_location="cpu", mmap=zipfile.is_zipfile(file), weights_only=True)
        except Exception as error:  # whatever a broken pickle raises
            line = first_line(error)[:160]
            raise UserError(f"{file}: expected a state dict of tensors ({line})") from None
        self.file = file
        self.metadata: Mapping[str, str] = {}
        self._tensors = {key: x.detach() for key, x in _state_dict(file, content, torch.Tensor).items()}
        floats = {
            torch.float64: np.dtype(np.float64),
            torch.float32: np.dtype(np.float32),
            torch.float16: np.dtype(np.float16),
            torch.bfloat16: np.dtype(ml_dtypes.bfloat16),
            torch.float8_e4m3fn: np.dtype(ml_dtypes.float8_e4m3fn),
            torch.float8_e5m2: np.dtype(ml_dtypes.float8_e5m2),
        }
        whole = {torch.int64: np.dtype(np.int64), torch.int32: np.dtype(np.int32), torch.int16: np.dtype(np.int16)}
        self._kinds = floats | whole
        wrong = [
            f"{key} ({x.dtype if x.layout == torch.strided else x.layout})"
            for key, x in self._tensors.items()
            if x.layout != torch.strided or x.dtype not in (self._kinds if key.endswith("alpha") else floats)
        ]
        if wrong:
            raise UserError(f"{file}: {_some(wrong)}: expected floating-point tensors")
        self.shapes = {key: tuple(x.shape) for key, x in self._tensors.items()}
        self._bytes = {1: torch.uint8, 2: torch.int16, 4: torch.float32, 8: torch.float64}

    def dtype(self, key: str) -> np.dtype:
        return self._kinds[self._tensors[key].dtype]

    def read(self, key: str, index: Index = ()) -> np.ndarray:
        part = self._tensors[key][index or ...].contiguous()
        dtype = self.dtype(key)
        # By way of a type that numpy has.
        return part.view(self._bytes[dtype.itemsize]).numpy().view(dtype)


@functools.lru_cache
def _check_sums(file: Path, size: int, changed_ns: int) -> None:
    """Compares the checksums of a zip file, which PyTorch does not; once, for a file of this size and time of change.

    Raises:
        UserError: one is wrong.
    """
    del changed_ns
    bar = tqdm(
        total=size, unit="B", unit_scale=True, desc=f"check {file.name}", disable=None if size > 1 << 30 else True
    )
    with (
        refuse_damage(f"{file}: expected a state dict of tensors as it was written"),
        bar,
        zipfile.ZipFile(file) as content,
    ):
        # PyTorch can be told to write none.
        for entry in (e for e in content.infolist() if e.CRC):
            with content.open(entry) as stream:
                while block := stream.read(1 << 24):
                    bar.update(len(block))


def _state_dict(file: Path, content: Any, kind: type) -> dict[str, Any]:
    """The tensors of a pickle's content, wherever `NESTS` says that they may be."""
    if not isinstance(content, Mapping):
        raise UserError(f"{file}: expected a state dict of tensors, found {type(content).__name__}")
    nests = [name for name in NESTS if _holds(content.get(name), kind)]
    if len(nests) > 1:
        raise UserError(
            f"{file}: holds {' and '.join(nests)}, expected one network: keep one with"
            f' torch.save(torch.load("{file.name}")["{nests[0]}"], "one.pth")'
        )
    if nests:
        return _state_dict(file, content[nests[0]], kind)
    found = {key: x for key, x in content.items() if is_weight(str(key))}
    other = [f"{key} ({type(x).__name__})" for key, x in found.items() if not isinstance(x, kind)]
    if other or not found:
        raise UserError(
            f"{file}: expected a state dict of tensors, at the top or under one of {', '.join(NESTS)};"
            f" found {_some(other) or 'none'}"
        )
    return {str(key): x for key, x in found.items()}


def _holds(content: Any, kind: type) -> bool:
    if not isinstance(content, Mapping):
        return False
    return any(isinstance(x, kind) for x in content.values()) or any(_holds(content.get(n), kind) for n in NESTS)


class Checkpoint:
    """What a converter sees of a checkpoint: keys without prefixes, 8-bit weights with their scale applied.

    Args:
        sources: safetensors files or pickles, `*.index.json` files of their shards, folders that hold one of them.
        prefixes: taken off where all keys have them, and what PyTorch's wrappers add; empty leaves keys as they are.

    Attributes:
        files: that hold the tensors.
        metadata: texts of the files' headers.
        shapes: by key.

    Raises:
        UserError: a file is absent or unusable; a key occurs twice; the index names a shard that is not there or a
            tensor that its shard lacks.
    """

    def __init__(self, sources: Sequence[Path], *, prefixes: Sequence[str] = PREFIXES) -> None:
        self.files: list[Path] = []
        self.metadata: dict[str, str] = {}
        self._readers: dict[str, Reader] = {}
        for source in sources:
            for file, owned in _resolve(Path(source)).items():
                self._add(_open(file), owned, Path(source))
        self._keys = _bare(self._readers, prefixes)
        self._scales: dict[str, str] = {}
        for key in list(self._keys):
            base, _, name = key.rpartition(".")
            if name in SCALES and f"{base}.weight" in self._keys:
                self._scales[f"{base}.weight"] = self._keys.pop(key)
        self.shapes = {key: self._readers[stored].shapes[stored] for key, stored in self._keys.items()}
        bare = [key for key in self._keys if self._stored(key).itemsize == 1 and key not in self._scales]
        shaped = [k for k, s in self._scales.items() if self._readers[s].shapes[s] not in _scale_shapes(self.shapes[k])]
        if shaped:
            raise UserError(f"{self.origin(shaped[0])}: the scale of {_some(shaped)} has an unexpected shape")
        # Weights cast to 8 bits without scales are published too; one scaled and another not is an accident.
        if bare and self._scales:
            raise UserError(f"{self.origin(bare[0])}: {_some(bare)} is 8-bit and has no scale")

    def _add(self, reader: Reader, owned: set[str], index: Path) -> None:
        absent = sorted(key for key in owned - reader.shapes.keys() if is_weight(key))
        if absent:
            raise UserError(f"{reader.file}: lacks tensor {_some(absent)}, which {index.name} says it holds")
        for key in reader.shapes:
            if key in self._readers:
                raise UserError(f"{reader.file}: tensor {key} is also in {self._readers[key].file}")
            self._readers[key] = reader
        self.files.append(reader.file)
        self.metadata |= reader.metadata

    def _stored(self, key: str) -> np.dtype:
        stored = self._keys[key]
        return self._readers[stored].dtype(stored)

    def origin(self, key: str) -> Path:
        """The file of a tensor."""
        return self._readers[self._keys[key]].file

    def name(self, key: str) -> str:
        """File and stored key, for messages."""
        return f"{self.origin(key)}: {self._keys[key]}"

    def dtype(self, key: str) -> np.dtype:
        """Of what `read` returns: as stored, bfloat16 for 8-bit weights."""
        stored = self._stored(key)
        return DTYPES["BF16"] if stored.itemsize == 1 else stored

    def read(self, key: str, index: Index = ()) -> np.ndarray:
        """The tensor or a part of it.

        Raises:
            UserError: it holds NaN or infinity.
        """
        stored = self._keys[key]
        x = self._readers[stored].read(stored, index)
        # 8-bit numbers that are none become none of 16 bits.
        if key in self._scales:
            scale = self._readers[self._scales[key]].read(self._scales[key]).astype(np.float32)
            if scale.size > 1:
                scale = np.broadcast_to(scale.reshape(-1, *[1] * (x.ndim - 1)), self.shapes[key])[index or ...]
            with np.errstate(invalid="ignore", over="ignore"):
                x = x.astype(np.float32) * scale
        x = x.astype(self.dtype(key), copy=False)
        if not is_finite(x):
            raise UserError(f"{self.name(key)} holds NaN or infinity, expected finite numbers")
        return x


def is_finite(x: np.ndarray) -> bool:
    """Whether all numbers are finite. Two maxima of the bits as integers: without a copy, as fast as memory is read."""
    if x.dtype.kind in "iu" or not x.size:
        return True
    signed, unsigned = np.dtype(f"i{x.itemsize}"), np.dtype(f"u{x.itemsize}")
    # Infinity and NaN have larger bits than the largest number has, with the sign's bit and without it.
    largest = int(np.array(ml_dtypes.finfo(x.dtype).max, x.dtype).view(unsigned))
    sign = 1 << (8 * x.itemsize - 1)
    return int(x.view(signed).max()) <= largest and int(x.view(unsigned).max()) <= largest + sign


def _bare(stored: Mapping[str, Reader], prefixes: Sequence[str]) -> dict[str, str]:
    """The stored key of every key without prefixes."""
    names = {key: WRAPPERS.sub("", key) if prefixes else key for key in stored}
    while common := next((p for p in prefixes if names and all(n.startswith(p) for n in names.values())), ""):
        names = {key: name.removeprefix(common) for key, name in names.items()}
    keys: dict[str, str] = {}
    for key, name in names.items():
        if name in keys:
            raise UserError(f"{stored[key].file}: {key} and {keys[name]} are both {name}, expected one of them")
        keys[name] = key
    return keys


def _scale_shapes(weight: tuple[int, ...]) -> list[tuple[int, ...]]:
    """One scale for all of it, or one a row."""
    return [(), (1,), (1, 1), weight[:1], (*weight[:1], *[1] * (len(weight) - 1))]


def _open(file: Path) -> Reader:
    try:
        with file.open("rb") as stream:
            start = stream.read(32)
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror or error})") from None
    for other, message in FOREIGN_STARTS.items():
        if start.startswith(other):
            raise UserError(f"{file}: {message}")
    return TorchReader(file) if file.suffix in PICKLES or start.startswith(PICKLE_STARTS) else SafetensorsReader(file)


def _resolve(source: Path) -> dict[Path, set[str]]:
    """Files of a source, and the tensors that an index says they hold."""
    if source.is_dir():
        return _resolve(_only(source))
    if not source.exists():
        raise UserError(f"{source}: no such file or folder")
    if not source.name.endswith(".index.json"):
        return {source: set()}
    try:
        weight_map = read_json(source).get("weight_map")
    except OSError as error:
        raise UserError(f"{source}: cannot be read ({error.strerror or error})") from None
    if not isinstance(weight_map, dict) or not all(
        isinstance(name, str) and "\0" not in name for name in weight_map.values()
    ):
        raise UserError(f"{source}: expected a JSON object with a weight_map, the file of every tensor")
    owned: dict[str, set[str]] = {}
    for key, name in weight_map.items():
        owned.setdefault(str(Path(name)), set()).add(key)
    if not owned:
        raise UserError(f"{source}: its weight_map is empty, expected the file of every tensor")
    files = {}
    for name in sorted(owned):
        # Not resolved: the hub's cache keeps links to files elsewhere.
        file = Path(os.path.normpath(source.parent / name))
        if Path(os.path.normpath(source.parent)) not in file.parents:
            raise UserError(f"{source}: shard {name} lies outside the folder of the index")
        if not file.exists():
            raise UserError(f"{source}: shard {name} is missing")
        files[file] = owned[name]
    return files


def _only(folder: Path) -> Path:
    """The one checkpoint of a folder: safetensors before pickles, an index before its shards."""
    # The last kind is not read, which is said better of the file than of the folder.
    for suffixes in ((".safetensors",), PICKLES, (".gguf",)):
        files = [f for f in sorted(folder.iterdir()) if not f.name.startswith((".", *LEFTOVERS))]
        indexes = [f for f in files if f.name.endswith(tuple(f"{suffix}.index.json" for suffix in suffixes))]
        found = indexes or [f for f in files if f.suffix in suffixes]
        if len(found) > 1:
            raise UserError(
                f"{folder}: expected one .safetensors file or one .safetensors.index.json in the folder (or one pickle),"
                f" found {_some([f.name for f in found])}"
            )
        if found:
            return found[0]
    names = [f.name for f in sorted(folder.iterdir())]
    raise UserError(
        f"{folder}: expected one .safetensors file or one .safetensors.index.json in the folder (or one pickle),"
        f" found {_some(names) or 'nothing'}"
    )
