"""Sides of a comparison, each in a process of its own that is kept alive, so that they can be timed in turns.

Nothing here imports JAX or PyTorch: a process holds the one that it measures.
"""

import dataclasses
import importlib
import multiprocessing
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import numpy as np

from rfl_jax.errors import RunError
from rfl_jax.sampling.schedule import Span

# What can be timed: a training step and its parts, and what networks do besides.
STEP = "step"
PREFIX = "DiT prefix"
STILL = "DiT steps without gradient"
GRADIENT = "DiT steps with gradient, forward and backward"
DECODE = "VAE decoder, forward"
DECODE_BACK = "VAE decoder, forward and backward"
DETECT = "detector"
EMBED_BACK = "warp and ArcFace, forward and backward"
ENCODE = "VAE encoder, a clip of its first frame"
TEXT = "umT5 encoder, a prompt"
POOL = "detector and ArcFace, a clip"
GUIDED = "DiT step with guidance"
JUDGE = "detector, ArcFace and judging ArcFace"
ACTIONS = {
    "step": (STEP, PREFIX, STILL, GRADIENT, DECODE, DECODE_BACK, DETECT, EMBED_BACK),
    "prepare": (ENCODE, TEXT, POOL),
    "sample": (GUIDED, DECODE),
    "evaluate": (JUDGE,),
}


@dataclasses.dataclass(frozen=True)
class Inputs:
    """What a step begins with, besides the weights on the disk. Arrays have their channels last.

    Attributes:
        arrays: "y" [b, t, h, w, c], "context" [b, s, d] and "pool" [b, g, e] of the batch, "noise" [b, t, h, w, c] and
            what becomes of it before the step, "prefix".
        adapters: a safetensors file of them in diffusers' naming.
        sigmas: noise levels.
        prefix, spans: denoising steps before the training step, and its own.
        settings: the run's configuration as a dictionary.
    """

    arrays: Mapping[str, np.ndarray]
    adapters: bytes
    sigmas: np.ndarray
    prefix: tuple[Span, ...]
    spans: tuple[Span, ...]
    settings: Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class UseInputs:
    """What uses of networks besides training begin with.

    Attributes:
        actions: what is done, of `ACTIONS`.
        arrays: of the clips: "video" [b, t, h, w, 3], "ids" and "mask" [b, s], "context" [b, s, d], "y" and "noise"
            [b, t, h, w, c]; "negative_context" [1, s, d].
        text_sizes, text_weights: the text encoder: fields of its configuration, a safetensors file in transformers'
            naming.
        guidance, timestep: of the sampling step.
    """

    actions: tuple[str, ...]
    arrays: Mapping[str, np.ndarray]
    text_sizes: Mapping[str, Any]
    text_weights: bytes
    guidance: float
    timestep: float


Outcome = dict[str, np.ndarray]  # what a side computed, to be compared


def in_one(gradients: Mapping[str, np.ndarray]) -> np.ndarray:
    """Gradients by name as one vector."""
    return np.concatenate([np.ravel(gradients[name]) for name in sorted(gradients)])


class Side:
    """Actions that can be timed, by name. Each returns when its result is there."""

    actions: dict[str, Callable[[], Any]]

    def timed(self, action: str, repeats: int = 1) -> tuple[float, float]:
        """Mean seconds of an action, and the most memory in bytes that the process had resident meanwhile."""
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
        begin = time.perf_counter()
        for _ in range(repeats):
            self.actions[action]()
        seconds = (time.perf_counter() - begin) / repeats
        status = Path("/proc/self/status").read_text()
        return seconds, 1024.0 * int(status.split("VmHWM:")[1].split()[0])


_opened: list[Any] = []  # what this process was started for


def _open(module: str, function: str, arguments: tuple[Any, ...]) -> None:
    _opened.append(getattr(importlib.import_module(module), function)(*arguments))


def _ask(method: str, arguments: tuple[Any, ...]) -> Any:
    return getattr(_opened[0], method)(*arguments)


class Process:
    """What a function makes, in a process of its own.

    Args:
        module, function, arguments: that make it.
    """

    def __init__(self, module: str, function: str, *arguments: Any) -> None:
        self._begin = time.perf_counter()
        self._pool = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"))
        self._submit(_open, module, function, arguments)

    def __enter__(self) -> "Process":
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(cancel_futures=True)

    @property
    def age(self) -> float:
        """Seconds since it was started."""
        return time.perf_counter() - self._begin

    def ask(self, method: str, *arguments: Any) -> Any:
        """What a method of it returns.

        Raises:
            RunError: the process is gone.
        """
        return self._submit(_ask, method, arguments)

    def _submit(self, function: Callable[..., Any], *arguments: Any) -> Any:
        try:
            return self._pool.submit(function, *arguments).result()
        except BrokenProcessPool:
            raise RunError("a process of the comparison was ended from outside, out of memory perhaps") from None
