"""How far a run is: where it goes on after an interruption, and what its hooks are handed after every step."""

import dataclasses
from typing import Any, Protocol, runtime_checkable

import grain
import jax
from etils import epath

from rfl_jax.errors import UserError
from rfl_jax.hosts import random_key
from rfl_jax.runs import RunFolder
from rfl_jax.training.checkpoint import Checkpoints, iterator_state
from rfl_jax.training.setup import Run
from rfl_jax.training.state import TrainState


@dataclasses.dataclass
class Progress:
    """A run between two steps.

    Attributes:
        step: done.
        state: weights and optimizer.
        key: of all randomness.
        data: iterator over batches.
        bad_steps: the last steps in a row of which an update was skipped.
    """

    step: int
    state: TrainState
    key: jax.Array
    data: grain.DatasetIterator
    bad_steps: int = 0

    def save(self, checkpoints: Checkpoints) -> None:
        """Starts writing a checkpoint, unless it is there."""
        checkpoints.save(self.step, self.state, self.key, iterator_state(self.data))


@runtime_checkable
class Hook(Protocol):
    """Something that looks on while a run trains."""

    def __enter__(self) -> "Hook": ...

    def __exit__(self, *_: object) -> None: ...

    def before(self, step: int) -> None:
        """A step begins."""
        ...

    def after(self, progress: Progress, line: dict[str, Any], *, stopping: bool) -> dict[str, Any]:
        """A step is done.

        Args:
            progress: the run now.
            line: the step's metrics.
            stopping: whether the run is about to be interrupted, which should not be made to wait.

        Returns:
            What is added to the step's metrics.
        """
        ...


def resume(run: Run, checkpoints: Checkpoints) -> Progress:
    """Where a run goes on: at its folder's last checkpoint, else at that of the run which `resume_from_checkpoint`
    names, else at the beginning.

    Raises:
        UserError: there is no such run, or its checkpoint does not fit.
    """
    latest = checkpoints.latest()
    if latest is not None:
        return _restored(run, checkpoints, latest)
    if not run.cfg.resume_from_checkpoint:
        return Progress(0, run.state, run.inputs.key, run.iterator())
    named = epath.Path(run.cfg.resume_from_checkpoint)
    folder = RunFolder(named).checkpoints
    folder = folder if folder.is_dir() else named
    if not folder.is_dir():
        raise UserError(f"config.resume_from_checkpoint: {folder}: no such folder, expected a run's workdir")
    with Checkpoints(folder) as other:
        latest = other.latest()
        if latest is None:
            raise UserError(f"config.resume_from_checkpoint: {folder}: holds no checkpoint")
        return _restored(run, other, latest)


def _restored(run: Run, checkpoints: Checkpoints, step: int) -> Progress:
    state, key, place = checkpoints.restore(step, run.state)
    data = run.iterator()
    data.set_state(place)
    return Progress(step, state, random_key(key, run.mesh), data)
