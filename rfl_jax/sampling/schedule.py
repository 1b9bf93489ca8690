"""The flow-matching schedule and which network serves which of its steps."""

import dataclasses

import numpy as np
from jaxtyping import Float

TRAIN_TIMESTEPS = 1000


def sigmas(steps: int, shift: float) -> Float[np.ndarray, " n"]:
    """`steps + 1` noise levels from 1 to 0 (ROLL reward_fl/euler.py): s = linspace(1, 0), shift*s / (1 + (shift-1)*s)."""
    s = np.linspace(1.0, 0.0, steps + 1)
    return (shift * s / (1 + (shift - 1) * s)).astype(np.float32)


@dataclasses.dataclass(frozen=True)
class Phase:
    """Consecutive steps of one expert, all with gradient or all without.

    Attributes:
        expert: "dit" (high noise) or "dit2" (low noise).
        start, stop: steps start..stop-1.
        gradient: whether the reward is differentiated through them.
    """

    expert: str
    start: int
    stop: int
    gradient: bool


def plan_phases(levels: Float[np.ndarray, " n"], *, boundary: float | None, mid: int, final: int) -> tuple[Phase, ...]:
    """Splits steps 0..final into phases.

    Args:
        levels: from `sigmas`.
        boundary: `dit` serves t >= boundary * 1000, `dit2` the rest; None: `dit` serves all.
        mid: first step with gradient.
        final: last step that is run.
    """
    timesteps = levels * TRAIN_TIMESTEPS
    # Compared in float32, like the reference's tensors: 0.9 * 1000 in float64 is not the same edge.
    edge = np.float32((boundary or 0.0) * TRAIN_TIMESTEPS)
    phases: list[Phase] = []
    for i in range(final + 1):
        expert, gradient = ("dit" if boundary is None or timesteps[i] >= edge else "dit2"), i >= mid
        last = phases[-1] if phases else None
        if last and (last.expert, last.gradient) == (expert, gradient):
            phases[-1] = dataclasses.replace(last, stop=i + 1)
        else:
            phases.append(Phase(expert, i, i + 1, gradient))
    return tuple(phases)
