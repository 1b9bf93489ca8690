"""A run without its weights: the step of training and the shapes of everything it is called with."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from rfl_jax.chips import compiler_options
from rfl_jax.config import Config
from rfl_jax.data.batching import micro_batch, samples_per_update
from rfl_jax.data.sizes import video_size
from rfl_jax.models.wan.conditioning import conditioning_of
from rfl_jax.models.wan.config import VAEConfig
from rfl_jax.networks.check import check_trainable
from rfl_jax.networks.faces import detector_file, embedder_file
from rfl_jax.networks.parts import Frozen, Networks, States, frozen_places, split_networks
from rfl_jax.networks.table import REWARD, TERMS, abstract_network, describe
from rfl_jax.networks.terms import abstract_terms, build_terms, prepared_for, term_arrays, term_tokens
from rfl_jax.planning.operations import count_flops
from rfl_jax.rewards.embedder import EmbedderConfig
from rfl_jax.rewards.face import FaceReward, Seen
from rfl_jax.rewards.people import PEOPLE
from rfl_jax.rewards.scrfd import SCRFDConfig
from rfl_jax.rewards.term import prepare_term
from rfl_jax.sampling.prefix import jit_prefix, prefix_arguments
from rfl_jax.sampling.sampler import Sampler, caches_prefix, make_sampler, split_prefix
from rfl_jax.sharding import make_mesh, micro_batches, replicated
from rfl_jax.sources import experts_of, find_sources
from rfl_jax.training.flops import decoded_pixels
from rfl_jax.training.optim import learning_rate, optimizer
from rfl_jax.training.setup import modules_of_step
from rfl_jax.training.state import create_state, state_places
from rfl_jax.training.step import jit_step

UPDATES = 1000  # of the learning rate's schedule: any number compiles to the same program


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
        terms: operations of the reward's terms besides the face's, of one sample in the mean over updates, by name.
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
    embedder: EmbedderConfig
    frames: int
    height: int
    width: int
    terms: dict[str, float]


def on_devices(cfg: Config, devices: Sequence[Any]) -> tuple[Config, Mesh]:
    """The configuration with its mesh filled in, and the mesh of these devices.

    Raises:
        UserError: the mesh does not fill them, or the batch does not divide over it.
    """
    mesh = make_mesh(dataclasses.asdict(cfg.mesh), devices)
    cfg = dataclasses.replace(cfg, mesh=dataclasses.replace(cfg.mesh, **dict(mesh.shape)))
    samples_per_update(cfg, mesh)
    return cfg, mesh


def find_files(cfg: Config) -> dict[str, list[str] | None]:
    """Each network's files, described by their headers; None means the published checkpoint of the preset, where the
    configuration names no weights.
    """
    sources = find_sources(cfg, experts=experts_of(cfg)) if cfg.model_paths else None
    folder = cfg.reward_model_path
    return {
        **{name: sources.files(name) if sources else None for name in ("dit", "dit2", "text_encoder", "vae")},
        "detector": [detector_file(folder)] if folder else None,
        "embedder": [embedder_file(folder)] if folder else None,
    }


def abstract_networks(
    cfg: Config, mesh: Mesh, experts: Sequence[str], files: dict[str, list[str] | None]
) -> tuple[Networks, States, Frozen]:
    """What `rfl_jax.training.setup.load_networks` gives, with shapes in place of arrays."""
    platform = mesh.devices.flat[0].platform
    modules = {
        name: abstract_network(cfg, name, files[name], "train", platform)
        for name in (*modules_of_step(experts, cfg), "detector", "embedder")
    }
    if cfg.other_terms:
        modules[TERMS] = abstract_terms(cfg, "train", platform)
    graphs, states = {}, {}
    for name, module in modules.items():
        graphs[name], states[name] = nnx.split(module)
    found: list[Networks] = []

    def build(states: dict[str, nnx.State]) -> tuple[States, Frozen]:
        built = {name: nnx.merge(graphs[name], state) for name, state in states.items()}
        built[REWARD] = FaceReward(built.pop("detector"), built.pop("embedder"), cfg.reward)
        networks, params, frozen = split_networks(cfg, built)
        found.append(networks)
        return params, frozen

    params, frozen = jax.eval_shape(build, states)
    return found[0], params, frozen


def make_plan(cfg: Config, mesh: Mesh) -> Plan:
    """The step of a configuration on a mesh."""
    check_trainable(cfg)
    files = find_files(cfg)
    every = make_sampler(cfg)
    prefix, sampler = split_prefix(cfg, every)
    cached = caches_prefix(cfg, prefix)
    executed = sampler if cached else every
    networks, params, frozen = abstract_networks(cfg, mesh, executed.experts, files)
    tx, schedule = optimizer(cfg, UPDATES), learning_rate(cfg, UPDATES)
    places = state_places(params, tx, cfg, mesh)
    state = _placed(jax.eval_shape(lambda p: create_state(p, tx, cfg), params), places)
    frozen = _placed(frozen, frozen_places(cfg, frozen, mesh))

    vae, embedder = (describe(cfg, name, files[name]) for name in ("vae", "embedder"))
    frames, height, width = video_size(cfg)
    time, rows, columns = vae.stride
    latents = ((frames - 1) // time + 1, height // rows, width // columns)
    batch = _batch(cfg, sampler, mesh, latents, pool=(frames, embedder.embedding))
    platform = mesh.devices.flat[0].platform
    terms = _Terms(cfg, networks, frozen, (frames, height, width), embedder.embedding, platform)
    batch |= {name: _of_samples(cfg, mesh, *x.shape[1:], dtype=x.dtype) for name, x in terms.arrays.items()}
    key = jax.eval_shape(lambda: jax.random.key(0))
    key = jax.ShapeDtypeStruct(key.shape, key.dtype, sharding=replicated(mesh))
    before = None
    if prefix.spans and not cached:
        arguments = (*prefix_arguments(prefix, frozen, batch), key)
        options = compiler_options(mesh, cfg.compiler_options)
        before = jit_prefix(networks, prefix, mesh, mode=cfg.noise.mode, options=options), arguments
    if prefix.spans:
        batch["prefix"] = _of_samples(cfg, mesh, *latents, sampler.dit.out_dim)
    return Plan(
        mesh=mesh,
        step=jit_step(cfg, networks, sampler, tx, schedule, places),
        args=(state, frozen, batch, key),
        prefix=before,
        sampler=executed,
        latents=latents,
        samples=samples_per_update(cfg, mesh),
        vae=vae,
        detector=describe(cfg, "detector", files["detector"]),
        embedder=embedder,
        frames=frames,
        height=height,
        width=width,
        terms=terms.flops(decoded_pixels(cfg, frames, vae.stride[0])),
    )


class _Terms:
    """The reward's terms besides the face's, of one sample, in shapes.

    Args:
        cfg: of the run.
        networks, frozen: of the step.
        size: frames, height and width of a real clip.
        embedding: of a face.
        platform: of the devices.
    """

    def __init__(
        self,
        cfg: Config,
        networks: Networks,
        frozen: Frozen,
        size: tuple[int, int, int],
        embedding: int,
        platform: str,
    ) -> None:
        self._cfg = cfg
        self._networks = networks
        self._frozen = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype),
            Frozen({name: frozen.rest[name] for name in (REWARD, TERMS) if name in frozen.rest}, {}),
        )
        self._size = size
        self._pool = jax.ShapeDtypeStruct((1, size[0], embedding), jnp.float32)
        # With all that training drops.
        self._preparing, weights = nnx.split(abstract_terms(cfg, "prepare", platform))
        self.arrays = jax.eval_shape(self._prepared, self._frozen, weights, self._video(size[0]), self._pool)

    def _video(self, frames: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((1, frames, *self._size[1:], 3), jnp.float32)

    def _prepared(self, frozen: Frozen, weights: nnx.State, video: jax.Array, pool: jax.Array) -> dict[str, jax.Array]:
        """Their arrays in a batch."""
        found = {}
        seen = self._networks.build(REWARD, {}, frozen).see(video)
        tokens = jax.tree.map(lambda x: jnp.asarray(x)[None], term_tokens(self._cfg, ""))
        for name, term in zip(self._cfg.other_terms, nnx.merge(self._preparing, weights), strict=True):
            arrays = prepare_term(term, seen, {"pool": pool}, tokens[name])
            found |= {f"{term_arrays(name)}{key}": x for key, x in arrays.items()}
        return found

    def flops(self, frames: int) -> dict[str, float]:
        """Operations of each, as the compiler counts them: forward and, of what is trained on, backward to the pixels. What of
        the faces' points several of them share is each one's.

        Args:
            frames: that are scored.
        """
        return {name: self._flops_of(name, frames) / term.every for name, term in self._cfg.other_terms.items()}

    def _flops_of(self, name: str, frames: int) -> float:
        def score(frozen: Frozen, video: jax.Array, batch: dict[str, jax.Array], found: Any) -> jax.Array:
            faces = self._networks.build(REWARD, {}, frozen)
            term = build_terms(self._cfg, self._networks, {}, frozen)[name]
            seen = Seen(faces, video[0], found, 1, video.shape[1])
            return term(seen, prepared_for(name, term, batch)).score[0]

        shapes = ((frames, 5, 2), jnp.float32), ((frames, 4), jnp.float32), ((frames,), jnp.bool)
        found = tuple(jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in shapes)
        batch = {**self.arrays, "pool": self._pool}
        differentiated = self._cfg.terms[name].weight and not self._cfg.nft.group
        program = jax.value_and_grad(score, 1) if differentiated else score
        return count_flops(program, self._frozen, self._video(frames), batch, found)


def _of_samples(cfg: Config, mesh: Mesh, *shape: int, dtype: Any = jnp.float32) -> jax.ShapeDtypeStruct:
    """An array with one row for each video of an update, micro-batches first."""
    lead = (cfg.gradient_accumulation_steps, micro_batch(cfg, mesh))
    return jax.ShapeDtypeStruct((*lead, *shape), dtype, sharding=micro_batches(mesh))


def _batch(
    cfg: Config, sampler: Sampler, mesh: Mesh, latents: tuple[int, int, int], *, pool: tuple[int, int]
) -> dict[str, jax.ShapeDtypeStruct]:
    dit, conditioning = sampler.dit, conditioning_of(sampler.dit)
    assert conditioning is not None
    batch = {
        "clip": _of_samples(cfg, mesh, dtype=jnp.int32),
        "noise_index": _of_samples(cfg, mesh, dtype=jnp.int32),
        "y": _of_samples(cfg, mesh, *latents, conditioning.channels),
        "pool": _of_samples(cfg, mesh, *pool),
    }
    real = {"latents": (*latents, dit.out_dim), "motion": (), "copying": ()}
    batch |= {name: _of_samples(cfg, mesh, *real[name]) for name in cfg.real_arrays}
    people = {"people_pool": pool, "people_boxes": (pool[0], 4)}
    batch |= {name: _of_samples(cfg, mesh, PEOPLE, *people[name]) for name in cfg.people_arrays}
    if "text_encoder" in cfg.trained:
        batch |= {name: _of_samples(cfg, mesh, dit.text_len, dtype=jnp.int32) for name in ("ids", "mask")}
    else:
        batch["context"] = _of_samples(cfg, mesh, dit.text_len, dit.text_dim)
    if sampler.guided:
        shape = (cfg.gradient_accumulation_steps, 1, dit.text_len, dit.text_dim)
        batch["negative_context"] = jax.ShapeDtypeStruct(shape, jnp.float32, sharding=replicated(mesh))
    return batch


def _placed(tree: Any, places: Any) -> Any:
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, places)


def bytes_per_device(tree: Any, *, host: bool = False) -> int:
    """Memory that arguments take on one device, or of its host."""
    return sum(
        int(np.prod(leaf.sharding.shard_shape(leaf.shape))) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
        if not jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) and (leaf.sharding.memory_kind == "pinned_host") == host
    )
