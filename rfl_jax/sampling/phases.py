"""The phases of a training step, by which profiles divide its time: operators carry the phase's name in theirs."""

from contextlib import AbstractContextManager
from typing import Any

import jax

PHASES = ("prefix", "no_grad_steps", "grad_steps", "vae", "reward", "optimizer")


def phase_scope(name: str) -> AbstractContextManager[Any]:
    """Names the operators traced under it as those of a phase, one of `PHASES`."""
    return jax.named_scope(f"rfl.{name}")
