"""The phases of a training step, by which its time is divided: operators carry the phase's name in theirs."""

import re
from contextlib import AbstractContextManager
from typing import Any

import jax

PHASES = ("prefix", "no_grad_steps", "grad_steps", "vae", "reward", "optimizer")
OTHER = "other"  # what is in none of them
_PHASE = re.compile(r"rfl\.(" + "|".join(PHASES) + r")\b")


def phase_scope(name: str) -> AbstractContextManager[Any]:
    """Names the operators traced under it as those of a phase, one of `PHASES`."""
    return jax.named_scope(f"rfl.{name}")


def phase_of(op_name: str) -> str | None:
    """The phase that an operator of a compiled program was traced in; None where its name tells of none."""
    found = _PHASE.search(op_name)
    return found[1] if found else None
