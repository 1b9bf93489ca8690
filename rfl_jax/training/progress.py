"""How far a run is: where it goes on after an interruption, and what its hooks are handed after every step."""

import dataclasses
import sys
from typing import Any, Protocol, runtime_checkable

import grain
import jax
from etils import epath

from rfl_jax.errors import UserError, refuse_damage
from rfl_jax.hosts import is_writer, random_key
from rfl_jax.runs import RunFolder
from rfl_jax.training.changes import compare_rows
from rfl_jax.training.checkpoint import Checkpoints, iterator_state
from rfl_jax.training.finite import first_not_finite
from rfl_jax.training.setup import Run
from rfl_jax.training.state import TrainState


@dataclasses.dataclass(frozen=True)
class Order:
    """What the place of the data iterator counts in.

    Attributes:
        clips: names in the cache, in the order of their rows.
        samples: videos of an update.
    """

    clips: list[str]
    samples: int

    @classmethod
    def of(cls, run: Run) -> "Order":
        """The order of a run's data."""
        return cls([clip.file.name for clip in run.inputs.clips.training], run.inputs.batches.samples)


@dataclasses.dataclass
class Progress:
    """A run between two steps.

    Attributes:
        step: done.
        state: weights and optimizer.
        key: of all randomness.
        data: iterator over batches.
        order: of the data.
        bad_steps: the last steps in a row of which an update was skipped.
        went_back: the step after which an alarm last put back the weights; 0: none did.
    """

    step: int
    state: TrainState
    key: jax.Array
    data: grain.DatasetIterator
    order: Order
    bad_steps: int = 0
    went_back: int = 0

    def save(self, checkpoints: Checkpoints, *, anew: bool = False) -> None:
        """Starts writing a checkpoint, unless its weights are not finite, or it is there and is not to be written `anew`."""
        if first_not_finite(self.state.params):
            return
        place = {"data": iterator_state(self.data), **dataclasses.asdict(self.order), "went_back": self.went_back}
        checkpoints.save(self.step, self.state, self.key, place, anew=anew)


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
        UserError: there is no such run, or its checkpoint does not fit, or its updates had another number of videos.
    """
    latest = checkpoints.latest()
    if latest is not None:
        return _restored(run, checkpoints, latest, own=True)
    if not run.cfg.resume_from_checkpoint:
        return Progress(0, run.state, run.inputs.key, run.iterator(), Order.of(run))
    named = epath.Path(run.cfg.resume_from_checkpoint)
    folder = RunFolder(named).checkpoints
    folder = folder if folder.is_dir() else named
    if not folder.is_dir():
        raise UserError(f"config.resume_from_checkpoint: {folder}: no such folder, expected a run's workdir")
    with Checkpoints(folder) as other:
        latest = other.latest()
        if latest is None:
            raise UserError(f"config.resume_from_checkpoint: {folder}: holds no checkpoint")
        return _restored(run, other, latest, own=False)


def _restored(run: Run, checkpoints: Checkpoints, step: int, *, own: bool) -> Progress:
    """A run as a checkpoint has it, which is its own or another run's."""
    state, key, place = checkpoints.restore(step, run.state)
    data, order = run.iterator(), Order.of(run)
    # Earlier releases did not record the order.
    samples, clips = place.get("samples", order.samples), place.get("clips", order.clips)
    if own and samples != order.samples:
        raise UserError(
            f"config.per_device_train_batch_size: makes updates of {order.samples} videos (x sample groups of the mesh x "
            f"gradient_accumulation_steps), expected {samples}, as before step {step}"
        )
    change = compare_rows(clips, order.clips, [clip.clip.number for clip in run.inputs.clips.training])
    moved = samples != order.samples or bool(change and change.moved)
    if not moved:
        with refuse_damage(f"{run.cfg.file_name}: step {step} was at another place of the data"):
            data.set_state(place["data"])
    if change and is_writer():
        then = "weights and optimizer go on, the clips begin anew" if moved else "the epoch goes on in its order"
        print(f"{run.cfg.file_name}: since step {step}: {change.text}; {then}", file=sys.stderr)
    went_back = place.get("went_back", 0) if own else 0
    if not own:  # another run's alarms and pushes are none of this one
        state = dataclasses.replace(state, factors=run.state.factors, held=run.state.held)
    return Progress(step, state, random_key(key, run.mesh), data, order, went_back=went_back)
