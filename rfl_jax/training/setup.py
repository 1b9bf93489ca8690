"""From a configuration to everything a run needs: weights on the mesh, the jitted step, the data."""

import dataclasses
from collections.abc import Collection
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from flax import nnx
from jax.sharding import Mesh, NamedSharding

from convert import adapters, store
from rfl_jax import hosts
from rfl_jax.config import Config, check_trainable
from rfl_jax.data.dataset import check_shapes, make_iterator
from rfl_jax.data.metadata import read_metadata
from rfl_jax.data.prepare import Encoders, Prepared, negative_context, open_reward, open_text_encoder, prepare
from rfl_jax.errors import UserError
from rfl_jax.models.wan.config import DIT_PRESETS, DiTConfig
from rfl_jax.models.wan.dit import DiT
from rfl_jax.sharding import BATCH, batch_shards, check_rules, make_mesh, micro_batches, replicated, shardings
from rfl_jax.sources import Sources, experts_of, find_sources
from rfl_jax.training.optim import learning_rate, optimizer
from rfl_jax.training.prefix import jit_prefix, noises_of, open_dit, prefix_arguments, roll_out_prefix
from rfl_jax.training.state import Frozen, Networks, States, TrainState, create_state, split_networks
from rfl_jax.training.step import Sampler, caches_prefix, make_sampler, make_step, split_prefix

# Which sharding table a network uses.
TABLES = {"dit": "dit", "dit2": "dit", "vae": "vae", "text_encoder": "umt5", "reward": "reward"}


@dataclasses.dataclass
class Setup:
    """A run before its first step.

    Attributes:
        cfg: its configuration.
        sources: where its weights are.
        mesh: its devices.
        prepared: its samples.
        held_out: samples of the evaluation.
        networks: static halves of the networks.
        prefix, sampler: denoising steps before the step, if they are not in the cache, and those of the step.
        state, frozen: weights and optimizer on the mesh.
        jitted: the jitted step, to be called under `jax.set_mesh(mesh)`, as `step` does.
        jitted_prefix: the program before it; None without steps of its own.
        key: of all randomness.
        updates_per_step: optimizer updates a step of `train_batch_size` samples.
        steps: in all.
        batch_names: arrays of a batch.
        constants: arrays that are the same in every batch.
    """

    cfg: Config
    sources: Sources
    mesh: Mesh
    prepared: list[Prepared]
    held_out: list[Prepared]
    networks: Networks
    prefix: Sampler
    sampler: Sampler
    state: TrainState
    frozen: Frozen
    jitted: Any
    jitted_prefix: Any
    key: jax.Array
    updates_per_step: int
    steps: int
    batch_names: tuple[str, ...]
    constants: dict[str, np.ndarray]

    def step(
        self, state: TrainState, frozen: Frozen, batch: dict[str, jax.Array], key: jax.Array
    ) -> tuple[TrainState, dict[str, jax.Array]]:
        """One optimizer update on the mesh. `state` is donated."""
        batch = self.start(frozen, batch, key)
        with jax.set_mesh(self.mesh):
            return self.jitted(state, frozen, batch, key)

    def start(self, frozen: Frozen, batch: dict[str, jax.Array], key: jax.Array) -> dict[str, jax.Array]:
        """The batch with the latents that the step starts from, where they are not in the cache."""
        if self.jitted_prefix is None:
            return batch
        with jax.set_mesh(self.mesh):
            return batch | {"prefix": self.jitted_prefix(*prefix_arguments(self.prefix, frozen, batch), key)}

    @property
    def rollout(self) -> Sampler:
        """All denoising steps of an update."""
        return dataclasses.replace(self.sampler, phases=self.prefix.phases + self.sampler.phases)

    @property
    def samples(self) -> int:
        """In one optimizer update, of all processes."""
        return samples_an_update(self.cfg, self.mesh)

    def iterator(self) -> Any:
        """The data, one optimizer update's samples of this process at a time."""
        share = hosts.share_of(NamedSharding(self.mesh, BATCH), batch_shards(self.mesh))
        return make_iterator(
            self.prepared,
            self.batch_names,
            batch=self.samples // share[1],
            share=share,
            seed=self.cfg.seed,
            noises=noises_of(self.cfg),
        )

    def place(self, samples: dict[str, np.ndarray]) -> dict[str, jax.Array]:
        """A batch on the mesh: micro-batches first, samples spread over devices."""
        count = self.cfg.gradient_accumulation_steps
        batch = {k: v.reshape(count, -1, *v.shape[1:]) for k, v in samples.items()}
        placed = {
            k: jax.make_array_from_process_local_data(
                micro_batches(self.mesh), v, (count, self.samples // count, *v.shape[2:])
            )
            for k, v in batch.items()
        }
        whole = replicated(self.mesh)
        return placed | {k: hosts.place(np.stack([v] * count), whole) for k, v in self.constants.items()}


def check_weights(cfg: Config, sources: Sources) -> None:
    """Whether the weights belong to the configuration and to each other, by their headers.

    Raises:
        UserError: naming the file, and what differs.
    """
    preset = DIT_PRESETS[cfg.preset]
    if "dit2" in cfg.trained and not sources.dit2:
        raise UserError("config.trainable_models: dit2 is named, but one network serves all steps of this preset")

    def need(file: str, name: str, found: Any, expected: Any) -> None:
        if found != expected:
            raise UserError(f"{file}: {name} is {found}, expected {expected} (config.preset={cfg.preset})")

    for files in filter(None, (sources.dit, sources.dit2)):
        found = store.describe("dit", files)
        for field in dataclasses.fields(DiTConfig):
            if field.name != "boundary":
                need(files[0], field.name, getattr(found, field.name), getattr(preset, field.name))
    vae = store.describe("vae", sources.vae)
    need(sources.vae[0], "number of latent channels", vae.z_dim, preset.out_dim)
    text = store.describe("umt5", sources.text_encoder)
    need(sources.text_encoder[0], "width of text features", text.dim, preset.text_dim)


def load_networks(
    cfg: Config, sources: Sources, experts: Collection[str], mesh: Mesh
) -> tuple[Networks, States, Frozen]:
    """All networks of an update, trainable and frozen weights apart. A DiT that is none of the experts stays where it is.

    Raises:
        UserError: weights that cannot be read.
    """
    dtype = jnp.dtype(cfg.dtype)
    dits: dict[str, DiT] = {}
    for name, files in (("dit", sources.dit), ("dit2", sources.dit2)):
        if name not in experts:
            continue
        # Masters of what trains in full come from the source's own precision.
        stored = None if cfg.trains_in_full(name) else cfg.dtype
        dits[name] = open_dit(cfg, name, files, mesh, stored=stored)
    vae_dtype = "float32" if "vae" in cfg.trained else cfg.dtype
    return split_networks(
        cfg,
        dits=dits,
        vae=store.open_component(
            "vae", sources.vae, weights_dtype=vae_dtype, dtype=dtype, remat=cfg.policy != "none", caches=cfg.vae_caches
        ),
        reward=open_reward(cfg, sources.reward),
        text_encoder=open_text_encoder(cfg, sources) if "text_encoder" in cfg.trained else None,
    )


def start_from(cfg: Config, params: States) -> States:
    """The adapters of `init_lora` in place of fresh ones. Layers that the file does not adapt begin anew.

    Raises:
        UserError: the file is not of this network, adapts other layers than `lora_target_modules`, or has another rank.
    """
    params = dict(params)
    for name, file in cfg.init_loras.items():
        arrays = adapters.read(file, cfg.preset, cfg.lora_target_modules, cfg.lora_rank)
        flat = dict(nnx.to_flat_state(params[name]))
        for path, leaf in flat.items():
            key = ".".join(map(str, path))
            if key in arrays:
                flat[path] = leaf.replace(jnp.asarray(arrays[key]))
        params[name] = nnx.from_flat_state(flat)
    return params


def frozen_places(states: States, cfg: Config, mesh: Mesh) -> dict[str, Any]:
    """Where weights lie that do not train: by the network's table, those of streamed blocks in host memory.

    Args:
        states: arrays or their shapes.
    """
    return {
        name: shardings(state, TABLES[name], mesh, blocks_memory="pinned_host" if cfg.streams(name) else None)
        for name, state in states.items()
    }


def place_states(states: States, places: dict[str, Any]) -> States:
    """Weights on the mesh."""
    return {name: jax.tree.map(hosts.place, state, places[name]) for name, state in states.items()}


# Folded into the run's key, so that no clip is judged on a noise it was trained on.
EVALUATION = 0x5EED


def evaluation_key(key: jax.Array) -> jax.Array:
    """The randomness of a run's evaluation."""
    return jax.random.fold_in(key, EVALUATION)


def samples_an_update(cfg: Config, mesh: Mesh) -> int:
    """Samples of one optimizer update, of all processes.

    Raises:
        UserError: `train_batch_size` is no multiple of them.
    """
    samples = cfg.per_device_train_batch_size * batch_shards(mesh) * cfg.gradient_accumulation_steps
    if cfg.train_batch_size % samples:
        raise UserError(
            f"config.train_batch_size: {cfg.train_batch_size} is no multiple of {samples} = per_device_train_batch_size "
            f"{cfg.per_device_train_batch_size} x {batch_shards(mesh)} sample groups of the mesh x "
            f"gradient_accumulation_steps {cfg.gradient_accumulation_steps}"
        )
    return samples


def cache_folder(cfg: Config, workdir: epath.Path) -> epath.Path:
    return epath.Path(cfg.data.cache_dir) if cfg.data.cache_dir else workdir / "cache"


def prepare_clips(cfg: Config, sources: Sources, cache: epath.Path) -> tuple[list[Prepared], list[Prepared]]:
    """The clips to train on and those held out. Both before training: a bad held-out row is found now, not at the end."""
    encoders = Encoders(cfg, sources, cfg.eval.judge_model_path)
    prepared = prepare(encoders, read_metadata(cfg.file_name), cache, listed_in=cfg.file_name)
    if not cfg.eval.file_name:
        return prepared, []
    rows = read_metadata(cfg.eval.file_name)[: cfg.eval.num_samples]
    return prepared, prepare(encoders, rows, cache, listed_in=cfg.eval.file_name)


@dataclasses.dataclass
class Preparation:
    """A run before the weights of its step are loaded.

    Attributes:
        sources: where its weights are.
        mesh: its devices.
        prefix, sampler: as in `Setup`.
        prepared, held_out: samples to train on, and of the evaluation.
        constants: arrays that are the same in every batch.
        key: of all randomness.
        samples: in one optimizer update.
        steps: in all.
    """

    sources: Sources
    mesh: Mesh
    prefix: Sampler
    sampler: Sampler
    prepared: list[Prepared]
    held_out: list[Prepared]
    constants: dict[str, np.ndarray]
    key: jax.Array
    samples: int
    steps: int


def prepare_run(cfg: Config, workdir: epath.Path) -> Preparation:
    """Prepares every clip and its frozen prefix, as far as they are not in the cache.

    Raises:
        UserError: anything in the configuration or the data that cannot be used.
    """
    check_trainable(cfg)
    sources = find_sources(cfg, experts=experts_of(cfg))
    check_weights(cfg, sources)
    prefix, sampler = split_prefix(cfg, make_sampler(cfg, DIT_PRESETS[cfg.preset]))
    cached = caches_prefix(cfg, prefix)
    mesh = make_mesh(dataclasses.asdict(cfg.mesh))
    samples = samples_an_update(cfg, mesh)
    cache = cache_folder(cfg, workdir)
    prepared, held_out = prepare_clips(cfg, sources, cache)
    check_shapes(prepared, samples // cfg.gradient_accumulation_steps)
    constants = {}
    if sampler.guided:
        constants["negative_context"] = negative_context(cfg, sources)[None]
    steps_an_epoch = max(1, len(prepared) // cfg.train_batch_size)
    steps = cfg.max_steps if cfg.max_steps > 0 else cfg.num_train_epochs * steps_an_epoch
    key = hosts.random_key(cfg.seed, mesh)
    if cached:
        epochs = -(-steps * cfg.train_batch_size // len(prepared))
        prepared = roll_out_prefix(
            cfg, sources, prefix, prepared, cache, mesh,
            key=key, noises=min(noises_of(cfg), epochs), mode=cfg.noise.mode, constants=constants,
        )  # fmt: skip
        held_out = roll_out_prefix(
            cfg, sources, prefix, held_out, cache, mesh,
            key=evaluation_key(key), noises=1, mode="fresh", constants=constants,
        )  # fmt: skip
        prefix = dataclasses.replace(prefix, phases=())
    return Preparation(sources, mesh, prefix, sampler, prepared, held_out, constants, key, samples, steps)


def set_up(cfg: Config, workdir: epath.Path) -> Setup:
    """Prepares the data, loads the weights and jits the step.

    Raises:
        UserError: anything in the configuration, the data or the weights that cannot be used.
    """
    ready = prepare_run(cfg, workdir)
    mesh, prefix, sampler = ready.mesh, ready.prefix, ready.sampler
    experts = {phase.expert for phase in prefix.phases + sampler.phases}
    networks, params, frozen = load_networks(cfg, ready.sources, experts, mesh)
    params = start_from(cfg, params)
    updates_per_step = cfg.train_batch_size // ready.samples
    tx = optimizer(cfg, ready.steps * updates_per_step)
    schedule = learning_rate(cfg, ready.steps * updates_per_step)

    for name in networks.graphs:
        parts = [states[name] for states in (params, frozen.rest) if name in states]
        check_rules(parts, TABLES[name], mesh, adapted=name in networks.adapted, quantized=cfg.quantizes(name))
    places = state_places(params, tx, cfg, mesh)
    params = place_states(params, places.params)
    frozen = Frozen(*(place_states(s, frozen_places(s, cfg, mesh)) for s in (frozen.rest, frozen.reference)))
    state = jax.jit(lambda p: create_state(p, tx), out_shardings=places)(params)
    jitted = jit_step(cfg, networks, sampler, tx, schedule, places)
    names = ("y", "pool", *(("ids", "mask") if "text_encoder" in cfg.trained else ("context",)))
    return Setup(
        cfg=cfg,
        sources=ready.sources,
        mesh=mesh,
        prepared=ready.prepared,
        held_out=ready.held_out,
        networks=networks,
        prefix=prefix,
        sampler=sampler,
        state=state,
        frozen=frozen,
        jitted=jitted,
        jitted_prefix=jit_prefix(networks, prefix, mesh, mode=cfg.noise.mode) if prefix.phases else None,
        key=ready.key,
        updates_per_step=updates_per_step,
        steps=ready.steps,
        batch_names=names,
        constants=ready.constants,
    )


def jit_step(cfg: Config, networks: Networks, sampler: Sampler, tx: Any, schedule: Any, places: TrainState) -> Any:
    """The jitted step, to be called under `jax.set_mesh`. The state that goes in is donated.

    Args:
        places: shardings of the state.
    """
    step = make_step(cfg, networks, sampler, tx, schedule)
    # Figures and the video are wanted on every host.
    return jax.jit(step, out_shardings=(places, places.step), donate_argnums=0)


def state_places(params: States, tx: Any, cfg: Config, mesh: Mesh) -> TrainState:
    """Shardings of a state: moments lie where their weights do, or in these devices' host memory; everything else
    everywhere.

    Args:
        params: arrays or their shapes.
    """
    whole = replicated(mesh)
    places = {name: shardings(state, TABLES[name], mesh) for name, state in params.items()}
    abstract = jax.eval_shape(lambda p: create_state(p, tx), params)
    structure = jax.tree.structure(params)

    moments = places
    if cfg.optimizer_memory != "device":
        moments = jax.tree.map(lambda place: place.with_memory_kind(cfg.optimizer_memory), places)

    def like_params(subtree: Any) -> Any:
        # A moment tree has the structure of the weights and takes their places.
        return moments if jax.tree.structure(subtree) == structure else jax.tree.map(lambda _: whole, subtree)

    is_moments = lambda x: jax.tree.structure(x) == structure  # noqa: E731
    return TrainState(whole, places, jax.tree.map(like_params, abstract.opt_state, is_leaf=is_moments))
