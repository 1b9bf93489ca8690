"""Trained weights for other tools: adapters in their namings, or whole networks with the adapters merged."""

import dataclasses
import json
import struct
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import tensorstore as ts

from convert import dit, lora, store
from convert.mapping import Assignment, LazyArray, Rule, cast, unchanged
from convert.readers import DTYPES, Index
from rfl_jax.files import absolute, aside, is_remote, naming, write_whole
from rfl_jax.models.lora import is_adapters

# Key table of the layers' names, and how adapters are called.
LORA_FORMATS = {
    "original": ("original", "{module}.lora_{half}.weight"),
    "diffusers": ("diffusers", "transformer.{module}.lora_{half}.weight"),
    "peft": ("diffusers", "base_model.model.{module}.lora_{half}.weight"),
    "comfyui": ("original", "diffusion_model.{module}.lora_{half}.weight"),
}
# What the experts are called where these names are at home: in diffusers' pipelines, in ComfyUI's files, in the run's folder.
EXPERTS = {
    "original": {"dit": "dit", "dit2": "dit2"},
    "diffusers": {"dit": "transformer", "dit2": "transformer_2"},
    "peft": {"dit": "transformer", "dit2": "transformer_2"},
    "comfyui": {"dit": "high_noise", "dit2": "low_noise"},
}
SHARD_BYTES = 5_000_000_000
_CODES = {dtype: code for code, dtype in DTYPES.items()}


def adapter_file(arrays: Mapping[str, np.ndarray], kind: str, metadata: Mapping[str, str]) -> bytes:
    """A safetensors file of adapters.

    Args:
        arrays: by our paths, scale 1.
        kind: of `LORA_FORMATS`.
        metadata: of its header.
    """
    naming, pattern = LORA_FORMATS[kind]
    tensors = lora.named(arrays, dit.NAMINGS[naming], pattern)
    if kind == "comfyui":
        tensors = {
            key.replace("lora_A", "lora_down").replace("lora_B", "lora_up"): value for key, value in tensors.items()
        }
        for key in [key for key in tensors if key.endswith(".lora_down.weight")]:
            alpha = np.array(tensors[key].shape[0], np.float32)
            tensors[key.removesuffix("lora_down.weight") + "alpha"] = alpha
    stored = {key: np.ascontiguousarray(x) for key, x in sorted(tensors.items())}
    entries = [Entry(key, x.shape, x.dtype, lambda x=x: x) for key, x in stored.items()]
    return _header(entries, metadata) + b"".join(x.tobytes() for x in stored.values())


def expert_file(file: Path, kind: str, network: str) -> Path:
    """The file of one expert, where both are written: lora.safetensors becomes lora_transformer_2.safetensors. PEFT reads
    folders, in which all files have the same names: theirs become folders.

    Args:
        file: as it would be for one network alone.
        kind: of `LORA_FORMATS`.
        network: "dit" or "dit2".
    """
    name = EXPERTS[kind][network]
    return file.parent / name / file.name if kind == "peft" else file.with_stem(f"{file.stem}_{name}")


def adapter_config(arrays: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """PEFT's adapter_config.json of the adapters in diffusers' naming."""
    names = lora.named(arrays, dit.NAMINGS["diffusers"], "{module}|{half}")
    modules = sorted({name.split("|")[0] for name in names})
    rank = next(a.shape[-1] for name, a in arrays.items() if name.endswith("lora_a"))
    return {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": rank,
        "target_modules": modules,
        "lora_dropout": 0.0,
        "bias": "none",
    }


def whole_network(trained: Mapping[str, np.ndarray], files: list[str]) -> tuple[Any, dict[str, LazyArray]]:
    """Config and arrays of a network with what was trained in it. They are read only as they are written.

    Args:
        trained: adapters, or all weights, by dotted path.
        files: the network's weights before training.
    """
    if len(files) == 1 and store.is_converted(files[0]):
        cfg, arrays = store.describe("dit", files), lazy_converted(files[0])
    else:
        cfg, arrays = dit.COMPONENT.convert(files)
    if not is_adapters(trained):
        return cfg, {name: _replaced(array, trained[name]) for name, array in arrays.items()}
    added: dict[str, dict[int | None, list[Callable[[Index], np.ndarray]]]] = {}
    for name in (n for n in trained if n.endswith("lora_a")):
        a, b = trained[name], trained[name[:-1] + "b"]
        for layer in range(a.shape[0]):

            def part(index: Index, a: np.ndarray = a[layer], b: np.ndarray = b[layer]) -> np.ndarray:
                return a[index[0]] @ b[:, index[1]]

            added.setdefault(name.removesuffix("lora_a") + "kernel", {})[layer] = [part]
    return cfg, {name: array.plus(added[name]) if name in added else array for name, array in arrays.items()}


def _replaced(array: LazyArray, values: np.ndarray) -> LazyArray:
    return _of_layers(values.shape, array.dtype, lambda layer, index: values[layer][index], stacked=array.stacked)


def _of_layers(
    shape: Sequence[int], dtype: np.dtype, read: Callable[[Any, Index], np.ndarray], *, stacked: bool
) -> LazyArray:
    layers: list[int | None] = list(range(shape[0])) if stacked else [None]
    parts = [Assignment(str(layer), "", layer, unchanged) for layer in layers]
    return LazyArray(parts, shape, lambda key, index: read(... if key == "None" else int(key), index), dtype)


def lazy_converted(directory: str) -> dict[str, LazyArray]:
    """The arrays of converted weights, unread."""
    path = absolute(directory)
    names = [child.name for child in (path / "weights").iterdir() if (child / ".zarray").exists()]
    arrays = {}
    for name in sorted(names):
        place = path / "weights" / name
        where = str(place) if is_remote(place) else f"file://{place}"
        found = ts.open({"driver": "zarr", "kvstore": where}, open=True).result()

        def read(layer: Any, index: Index, found: ts.TensorStore = found) -> np.ndarray:
            return found[index if layer is ... else (layer, *index)].read().result()

        dtype = np.dtype(found.dtype.numpy_dtype)
        arrays[name] = _of_layers(found.shape, dtype, read, stacked=name.startswith("blocks."))
    return arrays


@dataclasses.dataclass(frozen=True)
class Entry:
    """One tensor to be written: its key, and how to get it."""

    key: str
    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[], np.ndarray]

    @property
    def nbytes(self) -> int:
        return int(np.prod(self.shape)) * self.dtype.itemsize


def entries(arrays: Mapping[str, LazyArray], rules: Sequence[Rule], dtype: str | None = None) -> list[Entry]:
    """Source keys and layouts of a network's arrays, unread.

    Args:
        arrays: by our paths.
        rules: key table of the naming.
        dtype: to cast to; None keeps the arrays'.
    """
    found = []
    for rule in rules:
        if rule.target is None or rule.target not in arrays:
            continue
        array = arrays[rule.target]
        kept = np.dtype(jnp.dtype(dtype)) if dtype else array.dtype
        for index in array.pieces():
            layer = index[0].start if rule.stacked else None
            shape = array.shape[1:] if rule.stacked else array.shape
            source = rule.transform.inverse(np.broadcast_to(np.float32(0), shape)).shape

            key = rule.key(layer)

            def read(
                array: LazyArray = array, index: Index = index, rule: Rule = rule, kept: np.dtype = kept, key: str = key
            ) -> np.ndarray:
                value = array[index]
                value = rule.transform.inverse(value[0] if rule.stacked else value)
                return np.ascontiguousarray(cast(value, kept, key))

            found.append(Entry(key, source, kept, read))
    return sorted(found, key=lambda entry: entry.key)


def write_safetensors(
    file: Path,
    tensors: Sequence[Entry],
    metadata: Mapping[str, str],
    progress: Callable[[int], Any] = lambda count: None,
) -> list[Path]:
    """Writes tensors one after the other; where they are more than `SHARD_BYTES`, as shards with an index.

    Nothing is under its name before it is whole.

    Returns:
        The files.
    """
    shards: list[list[Entry]] = [[]]
    for entry in tensors:
        if shards[-1] and sum(e.nbytes for e in shards[-1]) + entry.nbytes > SHARD_BYTES:
            shards.append([])
        shards[-1].append(entry)
    if len(shards) == 1:
        _write_shard(file, shards[0], metadata, progress)
        return [file]
    files, weight_map = [], {}
    for number, shard in enumerate(shards, 1):
        part = file.with_name(f"{file.stem}-{number:05d}-of-{len(shards):05d}.safetensors")
        _write_shard(part, shard, metadata, progress)
        files.append(part)
        weight_map |= {entry.key: part.name for entry in shard}
    total = sum(entry.nbytes for entry in tensors)
    index = file.with_name(f"{file.name}.index.json")
    write_whole(index, json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=1) + "\n")
    return [*files, index]


def _header(tensors: Sequence[Entry], metadata: Mapping[str, str]) -> bytes:
    """What a safetensors file begins with. The library's own writer puts metadata in an order that differs each time."""
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    offset = 0
    for entry in tensors:
        header[entry.key] = {
            "dtype": _CODES[entry.dtype],
            "shape": list(entry.shape),
            "data_offsets": [offset, offset + entry.nbytes],
        }
        offset += entry.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def _write_shard(
    file: Path, tensors: Sequence[Entry], metadata: Mapping[str, str], progress: Callable[[int], Any]
) -> None:
    unfinished = Path(aside(file))
    with naming(file):
        try:
            with unfinished.open("wb") as stream:
                stream.write(_header(tensors, metadata))
                for entry in tensors:
                    stream.write(np.ascontiguousarray(entry.read()).view(np.uint8).reshape(-1).data)
                    progress(entry.nbytes)
            unfinished.replace(file)
        except BaseException:
            unfinished.unlink(missing_ok=True)
            raise
