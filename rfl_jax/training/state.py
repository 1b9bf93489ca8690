"""What a step changes: trainable weights and optimizer, from where they start and where they lie."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from convert import adapters
from rfl_jax.config import Config
from rfl_jax.models.weights import fill_state
from rfl_jax.networks.parts import States
from rfl_jax.networks.table import sharding_table
from rfl_jax.sharding import replicated, shardings


@dataclasses.dataclass
class TrainState:
    """What a step changes.

    Attributes:
        step: optimizer updates done, without those that were skipped.
        params: trainable weights of each trained network, float32.
        opt_state: optimizer state of `params`.
    """

    step: Any
    params: States
    opt_state: Any


jax.tree_util.register_dataclass(TrainState, ["step", "params", "opt_state"], [])


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


def create_state(params: States, tx: optax.GradientTransformation) -> TrainState:
    """The state before the first update."""
    return TrainState(jnp.int32(0), params, tx.init(params))


def state_places(params: States, tx: optax.GradientTransformation, cfg: Config, mesh: Mesh) -> TrainState:
    """Shardings of a state: moments lie where their weights do, or in these devices' host memory; everything else
    everywhere.

    Args:
        params: arrays or their shapes.
        tx: optimizer.
        cfg: of the run.
        mesh: devices.
    """
    whole = replicated(mesh)
    places = {name: shardings(state, sharding_table(name), mesh) for name, state in params.items()}
    abstract = jax.eval_shape(lambda p: create_state(p, tx), params)
    structure = jax.tree.structure(params)

    moments = places
    if cfg.optimizer_memory != "device":
        moments = jax.tree.map(lambda place: place.with_memory_kind(cfg.optimizer_memory), places)

    def is_moments(subtree: Any) -> bool:
        # A moment tree has the structure of the weights.
        return jax.tree.structure(subtree) == structure

    def placed(subtree: Any) -> Any:
        return moments if is_moments(subtree) else jax.tree.map(lambda _: whole, subtree)

    return TrainState(whole, places, jax.tree.map(placed, abstract.opt_state, is_leaf=is_moments))
