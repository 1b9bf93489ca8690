"""Converted weights on disk (Orbax), and opening any component from wherever it is."""

import dataclasses
import json
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from flax import nnx
from jax.sharding import Sharding

from convert import arcface, clip, dit, scrfd, umt5, vae
from convert.mapping import LazyArray, whole
from convert.streaming import failures_once, streaming_handler
from rfl_jax.errors import UserError, refuse_damage
from rfl_jax.files import absolute, array_handler
from rfl_jax.models.clip import CLIPConfig
from rfl_jax.models.lora import LoraConfig
from rfl_jax.models.umt5 import UMT5Config
from rfl_jax.models.wan.config import DiTConfig, VAEConfig
from rfl_jax.models.weights import dotted, fill
from rfl_jax.rewards.arcface import IResNetConfig
from rfl_jax.rewards.mobilefacenet import BottleneckSpec, ConvPReLUSpec, MobileFaceNetConfig
from rfl_jax.rewards.scrfd import BlockSpec, ConvSpec, PoolSpec, SCRFDConfig

SAFETENSORS = {"dit": dit.COMPONENT, "vae": vae.COMPONENT, "umt5": umt5.COMPONENT, "clip": clip.COMPONENT}
ONNX = {"arcface": arcface.COMPONENT, "scrfd": scrfd.COMPONENT}
KINDS = (*SAFETENSORS, *ONNX)
WRITTEN = "expected weights written by python -m convert"
CAST_TO = ("float32", "bfloat16", "float16")  # dtypes that weights can be cast to
CONFIGS = {
    "dit": DiTConfig, "vae": VAEConfig, "umt5": UMT5Config, "clip": CLIPConfig, "arcface": IResNetConfig, "lora": LoraConfig,
}  # fmt: skip
LAYERS = {kind.__name__: kind for kind in (ConvSpec, PoolSpec, BlockSpec, ConvPReLUSpec, BottleneckSpec)}


def convert(
    kind: str,
    sources: list[str],
    *,
    dtype: str | None = None,
    loras: Sequence[tuple[str, float]] = (),
    expert: str = "",
    **hints: Any,
) -> tuple[Any, Mapping[str, LazyArray | np.ndarray]]:
    """Config and arrays of a component's source files.

    Args:
        kind: one of `KINDS`.
        sources: the checkpoint's files.
        dtype: of the arrays; None keeps the source's.
        loras: for the DiT, files of adapters to merge and their strengths.
        expert: "dit" or "dit2": whose adapters are meant, where a file has those of both.
        hints: sizes that weights do not tell.
    """
    if loras and kind != "dit":
        raise UserError(f"--lora: adapters are of the dit, not of {kind}")
    if kind in SAFETENSORS:
        return SAFETENSORS[kind].convert(sources, dtype=dtype, loras=loras, expert=expert, **hints)
    if len(sources) != 1 or hints or dtype:
        raise UserError(f"{kind}: expected one ONNX file and no further settings")
    return ONNX[kind].convert(sources[0])


def build(kind: str, cfg: Any, **options: Any) -> nnx.Module:
    """The abstract module of a component."""
    return (SAFETENSORS.get(kind) or ONNX[kind]).abstract(cfg, **options)


def save(
    directory: str,
    kind: str,
    cfg: Any,
    arrays: Mapping[str, LazyArray | np.ndarray],
    *,
    origin: Mapping[str, Any] | None = None,
    progress: Callable[[int], Any] = lambda count: None,
) -> None:
    """Writes weights and their description; Orbax renames the finished folder into place.

    Args:
        directory: to write.
        kind: one of `KINDS`.
        cfg: sizes.
        arrays: lazy ones are read piece by piece as they are written.
        origin: where the weights come from, for `inspect`.
        progress: is told of bytes that were written.
    """
    description = {"component": kind, "config": _to_json(cfg), "origin": dict(origin or {})}
    handler = ocp.CompositeCheckpointHandler(
        weights=streaming_handler(progress), description=ocp.JsonCheckpointHandler()
    )
    with failures_once(), ocp.Checkpointer(handler) as checkpointer:
        checkpointer.save(
            absolute(directory),
            ocp.args.Composite(weights=ocp.args.PyTreeSave(dict(arrays)), description=ocp.args.JsonSave(description)),
        )


def _reader() -> ocp.Checkpointer:
    """Reads without waiting for other processes: one may need what the others do not."""
    me = jax.process_index()
    alone = ocp.options.MultiprocessingOptions(
        primary_host=me, active_processes={me}, barrier_sync_key_prefix=f"process{me}"
    )
    handler = ocp.CompositeCheckpointHandler(weights=array_handler(), description=ocp.JsonCheckpointHandler())
    return ocp.Checkpointer(handler, multiprocessing_options=alone)


def is_converted(directory: str) -> bool:
    path = epath.Path(directory)
    return path.is_dir() and (path / "description").exists()


def read_description(directory: str) -> dict[str, Any]:
    """Component, config and origin of converted weights.

    Raises:
        UserError: they are none.
    """
    with refuse_damage(f"{directory}: {WRITTEN}"):
        with _reader() as checkpointer:
            items = ocp.args.Composite(description=ocp.args.JsonRestore())
            content = checkpointer.restore(absolute(directory), items).description
        return {"kind": content["component"], "origin": {}, **content} | {
            "cfg": _from_json(content["component"], content["config"])
        }


def restore(directory: str, dtype: str | None = None, places: Mapping[str, Sharding] | None = None) -> dict[str, Any]:
    """Arrays of converted weights.

    Args:
        directory: written by `save`.
        dtype: to cast to; None keeps what is stored.
        places: of each array, whose pieces alone are read; whole in host memory by default.

    Raises:
        UserError: not to be read.
    """

    def wanted(path: tuple, leaf: Any) -> ocp.RestoreArgs:
        del leaf
        stored = jnp.dtype(dtype) if dtype else None
        if places is None:
            return ocp.RestoreArgs(restore_type=np.ndarray, dtype=stored)
        return ocp.ArrayRestoreArgs(sharding=places[path[0].key], dtype=stored)

    with refuse_damage(f"{directory}: {WRITTEN}"), _reader() as checkpointer:
        path = absolute(directory)
        found = checkpointer.metadata(path).item_metadata["weights"].tree
        items = ocp.args.PyTreeRestore(found, restore_args=jax.tree_util.tree_map_with_path(wanted, found))
        return checkpointer.restore(path, ocp.args.Composite(weights=items)).weights


def stored_arrays(directory: str) -> dict[str, tuple[tuple[int, ...], str]]:
    """Shape and dtype of every array of converted weights; nothing else is read."""
    with refuse_damage(f"{directory}: {WRITTEN}"):
        with _reader() as checkpointer:
            tree = checkpointer.metadata(absolute(directory)).item_metadata["weights"].tree
        return {name: (tuple(leaf.shape), str(np.dtype(leaf.dtype))) for name, leaf in tree.items()}


def describe(kind: str, sources: list[str]) -> Any:
    """The config of a component, from the description or the headers of its files.

    Raises:
        UserError: converted weights of another component.
    """
    if len(sources) == 1 and is_converted(sources[0]):
        content = read_description(sources[0])
        if content["kind"] != kind:
            raise UserError(f"{sources[0]}: holds {content['kind']} weights, expected {kind}")
        return content["cfg"]
    return SAFETENSORS[kind].describe(sources) if kind in SAFETENSORS else ONNX[kind].convert(sources[0])[0]


def source_dtypes(kind: str, sources: list[str]) -> dict[str, np.dtype]:
    """The precision in which a component's arrays are stored, by their paths; only headers are read of safetensors."""
    if len(sources) == 1 and is_converted(sources[0]):
        return {name: np.dtype(jnp.dtype(dtype)) for name, (_, dtype) in stored_arrays(sources[0]).items()}
    return {name: np.dtype(array.dtype) for name, array in convert(kind, sources)[1].items()}


Places = Callable[[nnx.State], Any]


def open_component(
    kind: str, sources: list[str], *, weights_dtype: str | None = None, places: Places | None = None, **options: Any
) -> Any:
    """A filled module, from converted weights or straight from a checkpoint.

    Args:
        kind: one of `KINDS`.
        sources: a folder of converted weights, or the checkpoint's files.
        weights_dtype: dtype of the stored weights; None keeps the source's.
        places: shardings in the structure of the module's (abstract) state; each process then reads the pieces of its
            own devices only. The first device by default.
        options: of the module's constructor (compute dtype, remat policy).

    Raises:
        UserError: weights that cannot be read, or of another component.
    """
    converted = len(sources) == 1 and is_converted(sources[0])
    lazy: Mapping[str, Any] = {}
    if converted:
        cfg = describe(kind, sources)
    else:
        cfg, lazy = convert(kind, sources, dtype=weights_dtype if kind in SAFETENSORS else None)
    module = build(kind, cfg, **options)
    shardings = None
    if places is not None:
        found = nnx.to_flat_state(places(nnx.state(module, nnx.Param)))
        shardings = {dotted(path): leaf.get_value() for path, leaf in found}
    if converted:
        arrays = restore(sources[0], weights_dtype, shardings)
        if shardings is None:
            arrays = {name: jnp.asarray(x) for name, x in arrays.items()}
    elif shardings is None:
        arrays = {name: jnp.asarray(_whole(x), weights_dtype) for name, x in lazy.items()}
    else:
        arrays = {name: _placed(x, shardings[name], weights_dtype) for name, x in lazy.items()}
    return fill(module, arrays)


def _whole(x: LazyArray | np.ndarray) -> np.ndarray:
    return whole(x) if isinstance(x, LazyArray) else x


def _placed(x: LazyArray | np.ndarray, place: Sharding, dtype: str | None) -> jax.Array:
    stored = jnp.dtype(dtype or x.dtype)
    return jax.make_array_from_callback(
        x.shape, place, lambda index: np.asarray(x[index or ()]).astype(stored, copy=False)
    )


def count(arrays: Mapping[str, Any]) -> int:
    """Parameters in all."""
    return sum(math.prod(x.shape) for x in arrays.values())


def _to_json(cfg: Any) -> dict:
    content = dataclasses.asdict(cfg)
    table = "backbone" if isinstance(cfg, SCRFDConfig) else "layers" if isinstance(cfg, MobileFaceNetConfig) else None
    if table:
        specs = getattr(cfg, table)
        content[table] = [{"layer": type(spec).__name__, **dataclasses.asdict(spec)} for spec in specs]
    return json.loads(json.dumps(content))


def _layers(content: Sequence[dict]) -> tuple[Any, ...]:
    return tuple(LAYERS[c["layer"]](**{k: v for k, v in c.items() if k != "layer"}) for c in content)


def _from_json(kind: str, content: dict) -> Any:
    if kind == "scrfd":
        tower = tuple(ConvSpec(**spec) for spec in content["tower"])
        backbone, taps = _layers(content["backbone"]), tuple(content["taps"])
        return SCRFDConfig(backbone, taps, content["neck"], tower, content["output_kernel"])
    # An IResNet's layers are numbers, a MobileFaceNet's are told one by one.
    if kind == "arcface" and isinstance(content["layers"][0], dict):
        return MobileFaceNetConfig(_layers(content["layers"]), content["embedding"])
    return CONFIGS[kind](**{k: tuple(v) if isinstance(v, list) else v for k, v in content.items()})
