"""One table of the networks: what each is converted from, in which precision it is kept, with which options it is
built, and by which table it is sharded. Loading and planning read the same rows.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from convert import store
from rfl_jax.config import Config
from rfl_jax.models.attention import kernel_for
from rfl_jax.models.clip import VIT_H_14
from rfl_jax.models.quantize import quantize
from rfl_jax.models.umt5 import UMT5Config
from rfl_jax.models.wan.config import DIT_PRESETS, vae_preset
from rfl_jax.models.weights import dotted
from rfl_jax.rewards.arcface import IResNetConfig
from rfl_jax.rewards.scrfd import family
from rfl_jax.sharding import shardings

Use = Literal["train", "sample", "prepare"]
Options = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Network:
    """One row.

    Attributes:
        component: its kind in `convert.store`.
        sharding: its table in `rfl_jax.sharding.RULES`.
        published: precision of the published checkpoint.
        sizes: of the published checkpoint that belongs to a configuration.
        kept: precision of the weights in memory for a use; None keeps the source's.
        options: what its constructor is told for a use, beside its sizes: compute precision, rematerialisation.
    """

    component: str
    sharding: str
    published: str
    sizes: Callable[[Config], Any]
    kept: Callable[[Config, Use], str | None]
    options: Callable[[Config, Use, str, str], Options]


def _kept_in_full(network: str) -> Callable[[Config, Use], str | None]:
    """Masters of what trains in full are made from the source's own precision; all else is kept in the run's."""
    return lambda cfg, use: None if use == "train" and cfg.trains_in_full(network) else cfg.dtype


def _vae_kept(cfg: Config, use: Use) -> str | None:
    return "float32" if use == "prepare" else _kept_in_full("vae")(cfg, use)


def _dit_options(cfg: Config, use: Use, network: str, platform: str) -> Options:
    del use
    return {
        "dtype": jnp.dtype(cfg.dtype),
        "remat_policy": cfg.policy,
        "kernel": kernel_for(cfg.attention, platform),
        "stream": cfg.streams(network),
    }


def _vae_options(cfg: Config, use: Use, network: str, platform: str) -> Options:
    del network, platform
    if use == "prepare":
        return {}  # float32: first frames are encoded once
    if use == "sample":
        return {"dtype": jnp.dtype(cfg.dtype), "remat": False}
    return {"dtype": jnp.dtype(cfg.dtype), "remat": cfg.policy != "none", "caches": cfg.vae_caches}


def _dit_sizes(cfg: Config) -> Any:
    return DIT_PRESETS[cfg.preset]


def _dit(network: str) -> Network:
    return Network("dit", "dit", "float32", _dit_sizes, _kept_in_full(network), _dit_options)


def _onnx(component: str, sizes: Any) -> Network:
    return Network(component, "reward", "float32", lambda _: sizes, lambda *_: None, lambda *_: {})


NETWORKS: Mapping[str, Network] = {
    "dit": _dit("dit"),
    "dit2": _dit("dit2"),
    "vae": Network(
        "vae", "vae", "float32", lambda cfg: vae_preset(DIT_PRESETS[cfg.preset]), _vae_kept, _vae_options
    ),
    "text_encoder": Network(
        "umt5", "umt5", "bfloat16",
        lambda _: UMT5Config(256384, 4096, 4096, 10240, num_heads=64, num_layers=24),
        _kept_in_full("text_encoder"),
        lambda cfg, *_: {"dtype": jnp.dtype(cfg.dtype)},
    ),
    # Of terms of the reward.
    "clip": Network(
        "clip", "reward", "float32", lambda _: VIT_H_14,
        lambda cfg, _: cfg.dtype, lambda cfg, *_: {"dtype": jnp.dtype(cfg.dtype)},
    ),
    "detector": _onnx("scrfd", family("10g")),
    "embedder": _onnx("arcface", IResNetConfig()),
}  # fmt: skip
# The detector and the embedder together are one network of the step, without a file of its own; the networks of terms of the
# reward are another.
REWARD = "reward"
TERMS = "terms"


def sharding_table(network: str) -> str:
    """The table in `rfl_jax.sharding.RULES` of a network of the step."""
    return REWARD if network in (REWARD, TERMS) else NETWORKS[network].sharding


def places(cfg: Config, network: str, state: nnx.State, mesh: Mesh) -> nnx.State:
    """Where the weights of a network lie that do not train: by its sharding table, blocks of streamed weights in host
    memory.

    Args:
        cfg: of the run.
        network: its name.
        state: arrays or their shapes.
        mesh: devices.
    """
    memory = "pinned_host" if cfg.streams(network) else None
    return shardings(state, sharding_table(network), mesh, blocks_memory=memory)


def open_network(cfg: Config, network: str, files: Sequence[str], use: Use, mesh: Mesh | None = None) -> Any:
    """A network filled with the weights of its files.

    Args:
        cfg: of the run.
        network: a row of `NETWORKS`.
        files: its weights.
        use: what for.
        mesh: devices; each process then reads the pieces of its own devices only. The first device by default.

    Raises:
        UserError: weights that cannot be read, or of another network.
    """
    row = NETWORKS[network]
    platform = (mesh.devices.flat[0] if mesh else jax.devices()[0]).platform
    # What will be quantised is quantised on the devices, before it goes to host memory.
    loading = dataclasses.replace(cfg, frozen_memory="device") if cfg.quantizes(network) else cfg
    module = store.open_component(
        row.component,
        list(files),
        weights_dtype=row.kept(cfg, use),
        places=(lambda state: places(loading, network, state, mesh)) if mesh else None,
        **row.options(cfg, use, network, platform),
    )
    return quantize(module) if cfg.quantizes(network) else module


def abstract_network(cfg: Config, network: str, files: Sequence[str] | None, use: Use, platform: str) -> Any:
    """The same network with shapes and types in place of arrays: only headers are read.

    Args:
        cfg: of the run.
        network: a row of `NETWORKS`.
        files: its weights; None means the published checkpoint.
        use: what for.
        platform: of the devices.
    """
    row = NETWORKS[network]
    sizes = describe(cfg, network, files)
    module = store.build(row.component, sizes, **row.options(cfg, use, network, platform))
    kept = row.kept(cfg, use)
    source = store.source_dtypes(row.component, list(files)) if files and kept is None else {}

    def typed(path: tuple[Any, ...], shape: Sequence[int]) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(tuple(shape), jnp.dtype(kept or source.get(dotted(path), row.published)))

    graph, state = nnx.split(module)
    flat = [(path, leaf.replace(typed(path, leaf.shape))) for path, leaf in nnx.to_flat_state(state)]
    module = nnx.merge(graph, nnx.from_flat_state(flat))
    return nnx.eval_shape(lambda: quantize(_zeros(module))) if cfg.quantizes(network) else module


def _zeros(module: Any) -> Any:
    graph, state = nnx.split(module)
    return nnx.merge(graph, jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), state))


def describe(cfg: Config, network: str, files: Sequence[str] | None) -> Any:
    """The sizes of a network: by the headers of its files, else the published checkpoint's."""
    row = NETWORKS[network]
    return store.describe(row.component, list(files)) if files else row.sizes(cfg)
