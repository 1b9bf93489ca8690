"""What becomes of a run whose reward is hacked: back to its best weights, and on with smaller steps, or to its end."""

import dataclasses
from typing import Any

import jax
import numpy as np
import optax

from rfl_jax import hosts
from rfl_jax.training.state import FACTORS, TrainState

SLOWER = 0.5  # factor of the learning rate


def put_back(now: TrainState, best: TrainState) -> TrainState:
    """The best weights with their average and moments, at the place in the learning rate's schedule where the run is now."""

    def is_place(part: Any) -> bool:
        return isinstance(part, optax.ScaleByScheduleState)

    def chosen(then: Any, present: Any) -> Any:
        return present if is_place(present) else then

    opt_state = jax.tree.map(chosen, best.opt_state, now.opt_state, is_leaf=is_place)
    return dataclasses.replace(best, step=now.step, opt_state=opt_state, factors=now.factors)


def lowered(state: TrainState, raise_kl: float) -> TrainState:
    """With half the learning rate and `raise_kl` times the KL's weight from here on."""
    changes = {"learning_rate": SLOWER, "kl": raise_kl}
    factors = {
        name: hosts.place(np.asarray(state.factors[name]) * np.float32(change), state.factors[name].sharding)
        for name, change in changes.items()
    }
    return dataclasses.replace(state, factors=state.factors | factors)


def factors_of(state: TrainState) -> dict[str, float]:
    """The factors of alarms as numbers, by name."""
    return {f"{name}_factor": float(np.asarray(state.factors[name])) for name in FACTORS}
