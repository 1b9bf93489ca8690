"""What a step changes: trainable weights, their average and the optimizer, from where they start and where they lie."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Int

from convert import adapters
from rfl_jax.config import Config
from rfl_jax.models.weights import fill_state
from rfl_jax.networks.parts import States
from rfl_jax.networks.table import sharding_table
from rfl_jax.sharding import replicated, shardings
from rfl_jax.training.hold import unheld

FACTORS = ("learning_rate", "kl")  # of alarms


def factor_names(cfg: Config) -> tuple[str, ...]:
    """The factors of a run's state."""
    return (*FACTORS, "kl_target") if cfg.kl.target else FACTORS


@dataclasses.dataclass
class TrainState:
    """What a step changes.

    Attributes:
        step: optimizer updates done, without those that were skipped.
        params: trainable weights of each trained network, float32.
        opt_state: optimizer state of `params`.
        average: exponential moving average of `params`, float32; empty without `ema.decay`.
        factors: of "learning_rate" and "kl" (the KL's weight): 1, until alarms change them (`guard.on_alarm`). With
            `kl.target` also "kl_target", of the KL's weight, which keeps the KL within its budget.
        held: of each term that holds its mean, by name, see `rfl_jax.training.hold`.
    """

    step: Any
    params: States
    opt_state: Any
    average: States = dataclasses.field(default_factory=dict)
    factors: dict[str, Any] = dataclasses.field(default_factory=lambda: dict.fromkeys(FACTORS, jnp.float32(1)))
    held: dict[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def tuned(self) -> States:
        """The weights that are judged and handed on: the average where there is one."""
        return self.average or self.params

    @property
    def weights(self) -> str:
        """What `tuned` are: the "average", or the "raw" weights."""
        return "average" if self.average else "raw"

    @property
    def kl_factor(self) -> Any:
        """What the KL's weight is multiplied by, for alarms and for the budget together."""
        kl = self.factors["kl"]
        return kl * self.factors["kl_target"] if "kl_target" in self.factors else kl


jax.tree_util.register_dataclass(TrainState, ["step", "params", "opt_state", "average", "factors", "held"], [])


def start_from(cfg: Config, params: States) -> States:
    """The adapters of `init_lora` in place of fresh ones. Layers that the file does not adapt begin anew.

    Raises:
        UserError: the file is not of this network, adapts other layers than `lora_target_modules`, or has another rank.
    """
    params = dict(params)
    for name, file in cfg.init_loras.items():
        arrays = adapters.read(file, cfg.preset, cfg.lora_target_modules, cfg.lora_rank, name)
        params[name] = fill_state(params[name], {k: jnp.asarray(x) for k, x in arrays.items()}, partial=True)
    return params


def create_state(params: States, tx: optax.GradientTransformation, cfg: Config) -> TrainState:
    """The state before the first update. The average begins at the weights."""
    average = jax.tree.map(jnp.copy, params) if cfg.ema.decay else {}
    factors = dict.fromkeys(factor_names(cfg), jnp.float32(1))
    return TrainState(jnp.int32(0), params, tx.init(params), average, factors, {name: unheld() for name in cfg.held})


def follow(average: States, params: States, decay: float, updates: Int[Array, ""]) -> States:
    """The moving average after an update: `d * average + (1 - d) * params` with d = min(decay, (1 + n) / (10 + n)).

    An average of a constant d would still hold d**n of the weights that it began with after n updates, most of what a
    short run gives. A d that grows from 0.1 lets go of them at once: there is no bias left to correct.

    Args:
        average: before it.
        params: after it.
        decay: of the configuration.
        updates: n, done before it.
    """
    d = jnp.minimum(decay, (1 + updates) / (10 + updates))
    return jax.tree.map(lambda a, p: d * a + (1 - d) * p, average, params)


def state_places(params: States, tx: optax.GradientTransformation, cfg: Config, mesh: Mesh) -> TrainState:
    """Shardings of a state: average and moments lie where their weights do, moments if asked for in these devices' host
    memory; everything else everywhere.

    Args:
        params: arrays or their shapes.
        tx: optimizer.
        cfg: of the run.
        mesh: devices.
    """
    whole = replicated(mesh)
    places = {name: shardings(state, sharding_table(name), mesh) for name, state in params.items()}
    abstract = jax.eval_shape(lambda p: create_state(p, tx, cfg), params)
    structure = jax.tree.structure(params)

    moments = places
    if cfg.optimizer_memory != "device":
        moments = jax.tree.map(lambda place: place.with_memory_kind(cfg.optimizer_memory), places)

    def is_moments(subtree: Any) -> bool:
        # A moment tree has the structure of the weights.
        return jax.tree.structure(subtree) == structure

    def placed(subtree: Any) -> Any:
        return moments if is_moments(subtree) else jax.tree.map(lambda _: whole, subtree)

    return TrainState(
        whole,
        places,
        jax.tree.map(placed, abstract.opt_state, is_leaf=is_moments),
        places if cfg.ema.decay else {},
        dict.fromkeys(factor_names(cfg), whole),
        {name: dict.fromkeys(unheld(), whole) for name in cfg.held},
    )
