"""Converted weights on disk (Orbax), and opening any component from wherever it is."""

import dataclasses
import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from flax import nnx

from convert import arcface, dit, scrfd, umt5, vae
from rfl_jax.errors import UserError
from rfl_jax.files import absolute, array_handler
from rfl_jax.models.umt5 import UMT5Config
from rfl_jax.models.wan.config import DiTConfig, VAEConfig
from rfl_jax.models.weights import set_arrays
from rfl_jax.rewards.arcface import IResNetConfig
from rfl_jax.rewards.scrfd import BlockSpec, ConvSpec, PoolSpec, SCRFDConfig

SAFETENSORS = {"dit": dit.COMPONENT, "vae": vae.COMPONENT, "umt5": umt5.COMPONENT}
ONNX = {"arcface": arcface, "scrfd": scrfd}
KINDS = (*SAFETENSORS, *ONNX)
CONFIGS = {"dit": DiTConfig, "vae": VAEConfig, "umt5": UMT5Config, "arcface": IResNetConfig}
LAYERS = {kind.__name__: kind for kind in (ConvSpec, PoolSpec, BlockSpec)}


def convert(
    kind: str, sources: list[str], *, dtype: str | None = None, **hints: Any
) -> tuple[Any, dict[str, np.ndarray]]:
    """Config and arrays of a component's source files."""
    if kind in SAFETENSORS:
        return SAFETENSORS[kind].convert(sources, dtype=dtype, **hints)
    if len(sources) != 1 or hints or dtype:
        raise UserError(f"{kind}: expected one ONNX file and no further settings")
    return ONNX[kind].convert(sources[0])


def build(kind: str, cfg: Any, **options: Any) -> nnx.Module:
    """The abstract module of a component."""
    return nnx.eval_shape(lambda: (SAFETENSORS.get(kind) or ONNX[kind]).build(cfg, **options))


def save(directory: str, kind: str, cfg: Any, arrays: dict[str, np.ndarray]) -> None:
    """Writes weights and their description; Orbax renames the finished folder into place."""
    description = {"component": kind, "config": _to_json(cfg)}
    with ocp.Checkpointer(_handler()) as checkpointer:
        checkpointer.save(
            absolute(directory),
            ocp.args.Composite(weights=ocp.args.PyTreeSave(arrays), description=ocp.args.JsonSave(description)),
        )


def _handler() -> ocp.CompositeCheckpointHandler:
    return ocp.CompositeCheckpointHandler(weights=array_handler(), description=ocp.JsonCheckpointHandler())


def is_converted(directory: str) -> bool:
    path = epath.Path(directory)
    return path.is_dir() and (path / "description").exists()


def restore(directory: str) -> tuple[str, Any, dict[str, Any]]:
    """Component, config and arrays of converted weights."""
    path = absolute(directory)
    try:
        with ocp.Checkpointer(_handler()) as checkpointer:
            found = checkpointer.restore(
                path, ocp.args.Composite(weights=ocp.args.PyTreeRestore(), description=ocp.args.JsonRestore())
            )
        kind = found.description["component"]
        return kind, _from_json(kind, found.description["config"]), found.weights
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise UserError(f"{directory}: expected weights written by python -m convert ({_first_line(error)})") from None


def describe(kind: str, sources: list[str]) -> Any:
    """The config of a component, from the description or the headers of its files."""
    if len(sources) == 1 and is_converted(sources[0]):
        with ocp.Checkpointer(_handler()) as checkpointer:
            items = ocp.args.Composite(description=ocp.args.JsonRestore())
            content = checkpointer.restore(absolute(sources[0]), items).description
        return _from_json(content["component"], content["config"])
    return SAFETENSORS[kind].describe(sources) if kind in SAFETENSORS else ONNX[kind].convert(sources[0])[0]


def open_component(kind: str, sources: list[str], *, weights_dtype: str | None = None, **options: Any) -> Any:
    """A filled module, from converted weights or straight from a checkpoint.

    Args:
        kind: one of `KINDS`.
        sources: a folder of converted weights, or the checkpoint's files.
        weights_dtype: dtype of the stored weights; None keeps the source's.
        options: of the module's constructor (compute dtype, remat policy).
    """
    if len(sources) == 1 and is_converted(sources[0]):
        found, cfg, arrays = restore(sources[0])
        if found != kind:
            raise UserError(f"{sources[0]}: holds {found} weights, expected {kind}")
    else:
        cfg, arrays = convert(kind, sources)
    cast = {name: jnp.asarray(x, weights_dtype) for name, x in arrays.items()}
    return set_arrays(build(kind, cfg, **options), cast)


def count(arrays: dict[str, np.ndarray]) -> int:
    """Parameters in all."""
    return sum(int(np.prod(x.shape)) for x in jax.tree.leaves(arrays))


def _to_json(cfg: Any) -> dict:
    content = dataclasses.asdict(cfg)
    if isinstance(cfg, SCRFDConfig):
        content["backbone"] = [{"layer": type(spec).__name__, **dataclasses.asdict(spec)} for spec in cfg.backbone]
    return json.loads(json.dumps(content))


def _from_json(kind: str, content: dict) -> Any:
    if kind == "scrfd":
        backbone = tuple(
            LAYERS[c["layer"]](**{k: v for k, v in c.items() if k != "layer"}) for c in content["backbone"]
        )
        tower = tuple(ConvSpec(**spec) for spec in content["tower"])
        return SCRFDConfig(backbone, tuple(content["taps"]), content["neck"], tower, content["output_kernel"])
    return CONFIGS[kind](**{k: tuple(v) if isinstance(v, list) else v for k, v in content.items()})


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
