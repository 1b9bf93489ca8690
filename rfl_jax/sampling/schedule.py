"""The flow-matching schedule and which network serves which of its steps."""

import dataclasses
from collections.abc import Collection
from typing import Any

import numpy as np
from jaxtyping import Float

TRAIN_TIMESTEPS = 1000


def shifted(s: Any, shift: float) -> Any:
    """Noise levels of evenly spaced ones, numbers or arrays in 0..1: shift*s / (1 + (shift-1)*s)."""
    return shift * s / (1 + (shift - 1) * s)


def make_sigmas(steps: int, shift: float) -> Float[np.ndarray, " n"]:
    """`steps + 1` noise levels from 1 to 0 (ROLL reward_fl/euler.py): `shifted` linspace(1, 0)."""
    return shifted(np.linspace(1.0, 0.0, steps + 1), shift).astype(np.float32)


@dataclasses.dataclass(frozen=True)
class Span:
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


def experts_at(timesteps: Float[np.ndarray, " s"], boundary: float | None) -> list[str]:
    """Which network serves each timestep in 0..1000: `dit` those of t >= boundary * 1000, `dit2` the rest; without a
    boundary `dit` serves all.
    """
    # Compared in float32, like the reference's tensors: 0.9 * 1000 in float64 is not the same edge.
    edge = np.float32((boundary or 0.0) * TRAIN_TIMESTEPS)
    return ["dit" if boundary is None or t >= edge else "dit2" for t in timesteps]


def plan_spans(
    sigmas: Float[np.ndarray, " n"],
    *,
    boundary: float | None,
    mid: int,
    final: int,
    among: Collection[int] | None = None,
) -> tuple[Span, ...]:
    """Splits steps 0..final into spans.

    Args:
        sigmas: from `make_sigmas`.
        boundary: between the networks, as in `experts_at`.
        mid: first step with gradient.
        final: last step that is run.
        among: of the steps from `mid` on, those with gradient; all of them by default.
    """
    spans: list[Span] = []
    for i, expert in enumerate(experts_at(sigmas[: final + 1] * TRAIN_TIMESTEPS, boundary)):
        gradient = i >= mid and (among is None or i in among)
        last = spans[-1] if spans else None
        if last and (last.expert, last.gradient) == (expert, gradient):
            spans[-1] = dataclasses.replace(last, stop=i + 1)
        else:
            spans.append(Span(expert, i, i + 1, gradient))
    return tuple(spans)
