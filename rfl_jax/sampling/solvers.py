"""Solvers of the flow's differential equation: from one noise level to the next, given the velocity.

Training takes Euler steps inside its program (`rollout`); sampling takes either solver, one step at a time.
"""

import dataclasses
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Array, Float

from rfl_jax.sampling.schedule import TRAIN_TIMESTEPS, make_sigmas

SOLVERS = ("euler", "unipc")
# UniPC's order: it looks back at one step (the official pipeline's `solver_order`).
ORDER = 2

Latents = Float[Array, "b t h w c"]


@runtime_checkable
class Solver(Protocol):
    """Takes the steps of one batch, once."""

    @property
    def timesteps(self) -> Float[np.ndarray, " s"]:
        """What the network is told at each step, in 0..1000."""
        ...

    def step(self, i: int, velocity: Latents, x: Latents) -> Latents:
        """Latents at level i + 1 from those at level i. Steps are taken in their order."""
        ...


def make_solver(name: str, steps: int, shift: float) -> Solver:
    """A solver by its name in `SOLVERS`.

    Args:
        name: of the solver.
        steps: denoising steps.
        shift: of the sigma schedule.
    """
    return Euler(make_sigmas(steps, shift)) if name == "euler" else UniPC(unipc_sigmas(steps, shift))


@dataclasses.dataclass
class Euler:
    """`x + (sigma[i+1] - sigma[i]) * v`, as in training."""

    sigmas: Float[np.ndarray, " n"]

    @property
    def timesteps(self) -> Float[np.ndarray, " s"]:
        return self.sigmas[:-1] * np.float32(TRAIN_TIMESTEPS)

    def step(self, i: int, velocity: Latents, x: Latents) -> Latents:
        return x + (self.sigmas[i + 1] - self.sigmas[i]) * velocity


def unipc_sigmas(steps: int, shift: float) -> Float[np.ndarray, " n"]:
    """UniPC's sigmas: from just below 1, where the logarithm of the signal's share still exists, to 0
    (diffusers `UniPCMultistepScheduler` with `use_flow_sigmas`).
    """
    s = np.linspace(1, 1 / TRAIN_TIMESTEPS, steps + 1)[:-1]
    sigmas = shift * s / (1 + (shift - 1) * s)
    return np.append(np.minimum(sigmas, 1 - 1e-6), 0).astype(np.float32)


class UniPC:
    """Unified predictor-corrector of order 2, "bh2", on predictions of the clean latents (arXiv 2302.04867).

    Every step first corrects the one before with what the network says at its end, then predicts the next. The first
    and the last predictions are of order 1.

    Args:
        sigmas: from `unipc_sigmas`.
    """

    def __init__(self, sigmas: Float[np.ndarray, " n"]) -> None:
        self.sigmas = sigmas
        alphas = np.float32(1) - sigmas
        with np.errstate(divide="ignore"):
            self._lambdas = np.log(alphas.astype(np.float64)) - np.log(sigmas.astype(np.float64))
        self._alphas = alphas.astype(np.float64)
        self._clean: list[Latents] = []  # predictions of the last two steps, the latest last
        self._start: Latents | None = None  # where the last step began, corrected
        self._order = 0  # of the last prediction

    @property
    def timesteps(self) -> Float[np.ndarray, " s"]:
        # Whole numbers: the official pipelines cut the rest off.
        return np.floor(self.sigmas[:-1].astype(np.float64) * TRAIN_TIMESTEPS).astype(np.float32)

    def step(self, i: int, velocity: Latents, x: Latents) -> Latents:
        clean = x - self.sigmas[i] * velocity
        if self._start is not None:
            x = self._move(i - 1, self._start, self._order, following=clean)
        self._clean = [*self._clean[-(ORDER - 1) :], clean]
        self._start = x
        self._order = min(ORDER, i + 1, len(self.sigmas) - 1 - i)
        return self._move(i, x, self._order)

    def _move(self, i: int, x: Latents, order: int, following: Latents | None = None) -> Latents:
        """From level i to i + 1: predicted, or corrected where the clean prediction at i + 1 is `following`."""
        h = self._lambdas[i + 1] - self._lambdas[i]
        growth = np.expm1(-h)
        now = self._clean[-1]
        slope: Latents | float = 0.0
        before: Latents | None = None
        ratio = 1.0
        if order == ORDER:
            ratio = (self._lambdas[i - 1] - self._lambdas[i]) / h
            before = (self._clean[-2] - now) / np.float32(ratio)
        if following is None:
            if before is not None:
                slope = np.float32(0.5) * before
        else:
            weights = _corrector_weights(h, ratio, order)
            slope = np.float32(weights[-1]) * (following - now)
            if before is not None:
                slope = slope + np.float32(weights[0]) * before
        scale = np.float32(self.sigmas[i + 1] / self.sigmas[i])
        amount = np.float32(self._alphas[i + 1] * growth)
        return scale * x - amount * (now + slope)


def _corrector_weights(h: float, ratio: float, order: int) -> Float[np.ndarray, " w"]:
    """Weights of the differences to the prediction before and to the following one (equation 9 of the paper)."""
    if order == 1:
        return np.array([0.5])
    growth = np.expm1(-h)
    first = growth / -h - 1
    second = first / -h - 0.5
    return np.linalg.solve([[1.0, 1.0], [ratio, 1.0]], [first / growth, 2 * second / growth])
