"""From a configuration to a run before its first step: weights on the mesh, programs to compile, data to feed."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import grain
import jax
from jax.sharding import Mesh, NamedSharding

from rfl_jax import hosts
from rfl_jax.chips import compiler_options
from rfl_jax.config import Config
from rfl_jax.data.dataset import make_iterator
from rfl_jax.errors import UserError
from rfl_jax.evaluation.held_out import HeldOut
from rfl_jax.networks.faces import open_reward
from rfl_jax.networks.parts import Frozen, Networks, States, frozen_places, split_networks
from rfl_jax.networks.table import REWARD, TERMS, open_network
from rfl_jax.networks.terms import open_terms, term_keys
from rfl_jax.runs import RunFolder
from rfl_jax.sampling.prefix import jit_prefix
from rfl_jax.sampling.sampler import different_noises
from rfl_jax.sharding import BATCH, batch_shards
from rfl_jax.sources import Sources
from rfl_jax.terminal import waiting
from rfl_jax.training.finite import first_not_finite
from rfl_jax.training.inputs import Inputs, prepare_inputs
from rfl_jax.training.optim import learning_rate, optimizer
from rfl_jax.training.state import TrainState, create_state, start_from, state_places
from rfl_jax.training.step import jit_step
from rfl_jax.training.update import Update


@dataclasses.dataclass(frozen=True)
class Run:
    """A run before its first step.

    Attributes:
        cfg: its configuration.
        inputs: devices, schedule, clips.
        networks: static halves of the networks.
        frozen: weights on the mesh that do not train.
        state: weights on the mesh that train, and optimizer.
        update: one optimizer update.
    """

    cfg: Config
    inputs: Inputs
    networks: Networks
    frozen: Frozen
    state: TrainState
    update: Update

    @property
    def mesh(self) -> Mesh:
        """Its devices."""
        return self.inputs.mesh

    def open_held_out(self) -> HeldOut:
        """The held-out clips, to be judged with any weights of the run."""
        inputs = self.inputs
        return HeldOut(
            self.cfg,
            inputs.clips.held_out,
            inputs.batches,
            self.networks,
            self.frozen,
            inputs.whole_sampler,
            inputs.key,
        )

    def iterator(self) -> grain.DatasetIterator:
        """This process's share of the clips, an optimizer update's at a time."""
        batches = self.inputs.batches
        share = hosts.share_of(NamedSharding(batches.mesh, BATCH), batch_shards(batches.mesh))
        return make_iterator(
            self.inputs.clips.training,
            batches.names,
            batch=batches.samples // share[1],
            share=share,
            seed=self.cfg.seed,
            noises=different_noises(self.cfg),
            group=self.cfg.noises_at_once,
            real=self.cfg.real_arrays,
            terms=term_keys(self.cfg),
            people=self.cfg.people_arrays,
        )


def modules_of_step(experts: Sequence[str], cfg: Config) -> tuple[str, ...]:
    """Networks of the step besides the reward: its DiTs, the autoencoder, and the text encoder where it trains."""
    return (*experts, "vae", *(("text_encoder",) if "text_encoder" in cfg.trained else ()))


def load_networks(cfg: Config, sources: Sources, experts: Sequence[str], mesh: Mesh) -> tuple[Networks, States, Frozen]:
    """All networks of an update, trainable and frozen weights apart.

    Args:
        cfg: of the run.
        sources: where the weights are.
        experts: the DiTs that take steps of the update; another one is not read.
        mesh: devices.

    Raises:
        UserError: weights that cannot be read.
    """
    modules: dict[str, Any] = {
        # DiTs are too large for one device; the others are read whole.
        name: open_network(cfg, name, sources.files(name), "train", mesh if name in experts else None)
        for name in modules_of_step(experts, cfg)
    }
    modules[REWARD] = open_reward(cfg, sources.reward)
    if cfg.other_terms:
        modules[TERMS] = open_terms(cfg, "train")
    return split_networks(cfg, modules)


def set_up(cfg: Config, folder: RunFolder, devices: Sequence[Any] | None = None) -> Run:
    """Prepares the data, loads the weights and makes the programs.

    Args:
        cfg: of the run.
        folder: of the run.
        devices: this machine's by default.

    Raises:
        UserError: anything in the configuration, the data or the weights that cannot be used.
    """
    inputs = prepare_inputs(cfg, folder, devices)
    mesh = inputs.mesh
    with waiting("read the weights", show=hosts.is_writer()):
        networks, params, frozen = load_networks(cfg, inputs.sources, inputs.whole_sampler.experts, mesh)
    hosts.wait("loaded")
    networks.check_sharding(cfg, params, frozen, mesh)
    params = start_from(cfg, params)
    tx = optimizer(cfg, inputs.steps * inputs.updates_per_step)
    schedule = learning_rate(cfg, inputs.steps * inputs.updates_per_step)
    places = state_places(params, tx, cfg, mesh)
    params = jax.tree.map(hosts.place, params, places.params)
    if broken := first_not_finite(params):
        raise UserError(
            f"{broken}: holds NaN or infinity before training, expected numbers in the weights it begins with"
        )
    frozen = jax.tree.map(hosts.place, frozen, frozen_places(cfg, frozen, mesh))
    state = jax.jit(lambda p: create_state(p, tx, cfg), out_shardings=places)(params)
    step = jit_step(cfg, networks, inputs.sampler, tx, schedule, places)
    prefix = None
    if inputs.prefix.spans:
        options = compiler_options(mesh, cfg.compiler_options)
        prefix = jit_prefix(networks, inputs.prefix, mesh, mode=cfg.noise.mode, options=options)
    # Profiles need the text of the compiled programs.
    kept = hosts.Compiled if cfg.profile.steps else hosts.together
    step, prefix = kept(step), None if prefix is None else kept(prefix)
    return Run(cfg, inputs, networks, frozen, state, Update(mesh, step, prefix, inputs.prefix))
