"""A run without its weights: the step of training and the shapes of everything it is called with."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from convert import store
from rfl_jax.config import Config, check_trainable
from rfl_jax.data.prepare import detector_file, embedder_file, video_size
from rfl_jax.models.attention import kernel_for
from rfl_jax.models.quantize import quantize
from rfl_jax.models.umt5 import UMT5Config
from rfl_jax.models.wan.config import DIT_PRESETS, VAE_PRESETS, VAEConfig
from rfl_jax.rewards.arcface import IResNetConfig
from rfl_jax.rewards.face import FaceReward
from rfl_jax.rewards.scrfd import SCRFDConfig, family
from rfl_jax.sharding import make_mesh, micro_batches, replicated
from rfl_jax.sources import experts_of, find_sources
from rfl_jax.training.optim import learning_rate, optimizer
from rfl_jax.training.prefix import jit_prefix, prefix_arguments
from rfl_jax.training.setup import frozen_places, jit_step, samples_an_update, state_places
from rfl_jax.training.state import Frozen, Networks, States, create_state, split_networks
from rfl_jax.training.step import Sampler, caches_prefix, make_sampler, split_prefix

UMT5_XXL = UMT5Config(256384, 4096, 4096, 10240, num_heads=64, num_layers=24)


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is compiled.

    Attributes:
        mesh: devices.
        step: the jitted step of training.
        args: shapes, types and places of its arguments: state, frozen weights, batch, key.
        prefix: the program before it, and its arguments; None if its result is in the cache.
        sampler: denoising steps of both.
        latents: frames, rows and columns of one sample.
        samples: in one update.
        vae, detector, embedder: sizes of the networks after the DiT.
        frames, height, width: of one video.
    """

    mesh: Mesh
    step: Any
    args: tuple[Any, ...]
    prefix: tuple[Any, tuple[Any, ...]] | None
    sampler: Sampler
    latents: tuple[int, int, int]
    samples: int
    vae: VAEConfig
    detector: SCRFDConfig
    embedder: IResNetConfig
    frames: int
    height: int
    width: int


def on_devices(cfg: Config, devices: Sequence[Any]) -> tuple[Config, Mesh]:
    """The configuration with its mesh filled in, and the mesh of these devices.

    Raises:
        UserError: the mesh does not fill them, or the batch does not divide over it.
    """
    mesh = make_mesh(dataclasses.asdict(cfg.mesh), devices)
    cfg = dataclasses.replace(cfg, mesh=dataclasses.replace(cfg.mesh, **dict(mesh.shape)))
    samples_an_update(cfg, mesh)
    return cfg, mesh


def make_plan(cfg: Config, mesh: Mesh) -> Plan:
    """The step of a configuration on a mesh. Weights that the configuration names are described by their headers; where
    it names none, the published checkpoints of its preset are meant.
    """
    check_trainable(cfg)
    dit = DIT_PRESETS[cfg.preset]
    sources = find_sources(cfg, experts=experts_of(cfg)) if cfg.model_paths else None
    vae = _describe("vae", sources.vae if sources else None, VAE_PRESETS["wan2_2" if dit.out_dim == 48 else "wan2_1"])
    text = _describe("umt5", sources.text_encoder if sources else None, UMT5_XXL)
    folder = cfg.reward_model_path
    detector = _describe("scrfd", [detector_file(folder)] if folder else None, family("10g"))
    embedder = _describe("arcface", [embedder_file(folder)] if folder else None, IResNetConfig())

    every = make_sampler(cfg, dit)
    prefix, sampler = split_prefix(cfg, every)
    cached = caches_prefix(cfg, prefix)
    executed = sampler if cached else every
    experts = sorted({phase.expert for phase in executed.phases})
    networks, params, frozen = _networks(cfg, mesh, experts, vae, text, detector, embedder)
    tx, schedule = optimizer(cfg, 1000), learning_rate(cfg, 1000)
    places = state_places(params, tx, cfg, mesh)
    state = _placed(jax.eval_shape(lambda p: create_state(p, tx), params), places)
    frozen = Frozen(*(_placed(states, frozen_places(states, cfg, mesh)) for states in (frozen.rest, frozen.reference)))

    frames, height, width = video_size(cfg)
    st, sh, sw = vae.stride
    latents = ((frames - 1) // st + 1, height // sh, width // sw)
    count, micro = cfg.gradient_accumulation_steps, samples_an_update(cfg, mesh) // cfg.gradient_accumulation_steps

    def samples(*shape: int, dtype: Any = jnp.float32) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((count, micro, *shape), dtype, sharding=micro_batches(mesh))

    channels = dit.out_dim if dit.first_frame_in_latents else dit.in_dim - dit.out_dim
    batch = {
        "sample": samples(dtype=jnp.int32),
        "noise_index": samples(dtype=jnp.int32),
        "y": samples(*latents, channels),
        "pool": samples(frames, embedder.embedding),
    }
    if "text_encoder" in cfg.trained:
        batch |= {name: samples(dit.text_len, dtype=jnp.int32) for name in ("ids", "mask")}
    else:
        batch["context"] = samples(dit.text_len, dit.text_dim)
    if sampler.guided:
        batch["negative_context"] = jax.ShapeDtypeStruct(
            (count, 1, dit.text_len, dit.text_dim), jnp.float32, sharding=replicated(mesh)
        )
    key = jax.eval_shape(lambda: jax.random.key(0))
    key = jax.ShapeDtypeStruct(key.shape, key.dtype, sharding=replicated(mesh))
    before = None
    if prefix.phases and not cached:
        arguments = (*prefix_arguments(prefix, frozen, batch), key)
        before = jit_prefix(networks, prefix, mesh, mode=cfg.noise.mode), arguments
    if prefix.phases:
        batch["prefix"] = samples(*latents, dit.out_dim)
    return Plan(
        mesh,
        jit_step(cfg, networks, sampler, tx, schedule, places),
        (state, frozen, batch, key),
        before,
        executed,
        latents,
        count * micro,
        vae,
        detector,
        embedder,
        frames,
        height,
        width,
    )


def _describe(kind: str, files: list[str] | None, published: Any) -> Any:
    return store.describe(kind, files) if files else published


def _placed(tree: Any, places: Any) -> Any:
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, places)


def _networks(
    cfg: Config,
    mesh: Mesh,
    experts: Sequence[str],
    vae: VAEConfig,
    text: UMT5Config,
    detector: SCRFDConfig,
    embedder: IResNetConfig,
) -> tuple[Networks, States, Frozen]:
    """Shapes of all networks of the step, in the types in which `load_networks` keeps them."""
    dtype = jnp.dtype(cfg.dtype)
    kernel = kernel_for(cfg.attention, mesh.devices.flat[0].platform)
    found: list[Networks] = []

    def kept(kind: str, sizes: Any, stored: str | None, **options: Any) -> Any:
        graph, weights = nnx.split((store.SAFETENSORS.get(kind) or store.ONNX[kind]).build(sizes, **options))
        return nnx.merge(graph, jax.tree.map(lambda x: x.astype(stored or x.dtype), weights))

    def build() -> tuple[States, Frozen]:
        dits = {}
        for name in experts:
            dit = kept(
                "dit", DIT_PRESETS[cfg.preset], cfg.dtype,
                dtype=dtype, remat_policy=cfg.policy, kernel=kernel, stream=cfg.streams(name),
            )  # fmt: skip
            dits[name] = quantize(dit) if cfg.quantizes(name) else dit
        stored = "float32" if "vae" in cfg.trained else cfg.dtype
        networks, params, frozen = split_networks(
            cfg,
            dits=dits,
            vae=kept("vae", vae, stored, dtype=dtype, remat=cfg.policy != "none", caches=cfg.vae_caches),
            reward=FaceReward(kept("scrfd", detector, None), kept("arcface", embedder, None), cfg.reward),
            text_encoder=kept("umt5", text, cfg.dtype, dtype=dtype) if "text_encoder" in cfg.trained else None,
        )
        found.append(networks)
        return params, frozen

    params, frozen = jax.eval_shape(build)
    return found[0], params, frozen


def bytes_per_device(tree: Any, *, host: bool = False) -> int:
    """Memory that arguments take on one device, or of its host."""
    return sum(
        int(np.prod(leaf.sharding.shard_shape(leaf.shape))) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
        if not jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) and (leaf.sharding.memory_kind == "pinned_host") == host
    )
