"""The training loop: step, judge, record, save; and stopping without loss."""

import contextlib
import dataclasses
import itertools
import json
import time
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from rfl_jax.chips import peak_flops
from rfl_jax.config import dumps
from rfl_jax.errors import RunError
from rfl_jax.files import write_whole
from rfl_jax.hosts import is_writer
from rfl_jax.runs import RunFolder
from rfl_jax.terminal import waiting
from rfl_jax.training.about import describe
from rfl_jax.training.checkpoint import Checkpoints
from rfl_jax.training.finite import checked_names, first_not_finite
from rfl_jax.training.flops import dit_flops
from rfl_jax.training.lock import Lock
from rfl_jax.training.profile import Profiler
from rfl_jax.training.progress import Hook, Progress, resume
from rfl_jax.training.record import open_record
from rfl_jax.training.setup import Run
from rfl_jax.training.state import TrainState
from rfl_jax.training.stop import Stop
from rfl_jax.training.validation import Validation

METRICS = ("loss", "face_score", "kl_loss", "grad_norm", "no_face_fraction", "learning_rate")


@dataclasses.dataclass(frozen=True)
class Trained:
    """What training ends with.

    Attributes:
        state: after the last step.
        step: the last.
        finished: whether there is nothing left to do: all steps are done, or a validation ended them.
        validation: with its record and its compiled held-out clips; None without validations.
    """

    state: TrainState
    step: int
    finished: bool
    validation: Validation | None


def train(run: Run, folder: RunFolder, lock: Lock | None = None) -> Trained:
    """Runs to the last step, or to the interruption.

    Args:
        run: before its first step.
        folder: of the run.
        lock: of the folder, where others might train in it.

    Raises:
        RunError: `max_bad_steps` steps in a row were not finite, or another run took the folder.
    """
    cfg, total = run.cfg, run.inputs.steps
    with contextlib.ExitStack() as opened:
        checkpoints = opened.enter_context(Checkpoints(folder.checkpoints))
        progress = resume(run, checkpoints)
        begun = progress.step
        if is_writer():
            write_whole(folder.config, dumps(cfg))
            write_whole(folder.about, json.dumps(describe(run), indent=1) + "\n")
        record = opened.enter_context(open_record(cfg, folder, start=begun, total=total))
        profiler = opened.enter_context(Profiler(cfg, folder, run.update, record.note))
        hooks: list[Hook] = [profiler]
        validation = None
        if cfg.validates:
            validation = opened.enter_context(Validation(cfg, run.open_held_out(), folder, begun, record.note))
            hooks.append(validation)
        stop = opened.enter_context(Stop())
        if validation:
            at = progress.went_back
            if missed := validation.make_up(progress):
                record.amend(begun, missed)
            if progress.went_back != at:
                progress.save(checkpoints, anew=True)
                checkpoints.wait()

        def ended() -> bool:
            return progress.step >= total or stop.agreed or bool(validation and validation.end)

        while not ended():
            for hook in hooks:
                hook.before(progress.step + 1)
            compiles = waiting("compile the step and take it", show=is_writer() and progress.step == begun)
            with compiles:
                line, video, not_finite = take_step(run, progress)
            if progress.bad_steps >= cfg.max_bad_steps:
                record.write(line)
                raise RunError(_blown_up(run, progress, not_finite, checkpoints.latest()))
            stop.agree()
            if lock:
                lock.check()
            for hook in hooks:
                line |= hook.after(progress, line, stopping=stop.agreed)
            record.write(line)
            if cfg.sample_every and (progress.step % cfg.sample_every == 0 or progress.step in (1, total)):
                record.video(progress.step, np.asarray(video))
            # Such weights are not saved; nor are they what a run ends with.
            if ended() and (broken := first_not_finite(progress.state.params)):
                raise RunError(_blown_up(run, progress, broken, checkpoints.latest()))
            # Until a finite step the last checkpoint is one to go on from.
            put_back = progress.went_back == progress.step
            if (progress.step % cfg.save_steps == 0 and not progress.bad_steps) or ended() or put_back:
                progress.save(checkpoints)
                record.saved(progress.step)
            if put_back:
                # Nobody goes this way again, who would want the checkpoint that a better one takes the place of.
                checkpoints.wait()
    finished = progress.step >= total or bool(validation and validation.end)
    return Trained(progress.state, progress.step, finished, validation)


def _blown_up(run: Run, progress: Progress, not_finite: str, latest: int | None) -> str:
    """What is said when too many steps in a row were not finite."""
    broken = first_not_finite(run.frozen.rest)
    cause = f" (the weights {broken} hold NaN or infinity)" if broken else ""
    way = "begins anew" if latest is None else f"goes on from the last good checkpoint, that of step {latest}"
    return (
        f"step {progress.step}: {not_finite} is not finite{cause}, the last of {progress.bad_steps} such steps in a row "
        f"(config.max_bad_steps={run.cfg.max_bad_steps}); the same command {way}"
    )


def take_step(run: Run, progress: Progress) -> tuple[dict[str, Any], jax.Array, str]:
    """Moves a run on by one step of `train_batch_size` videos.

    Returns:
        The step's line of metrics.jsonl; one of its videos, uint8 [t, h, w, 3]; and the first tensor, or "loss", for
        which an update was skipped, empty if none was.
    """
    inputs = run.inputs
    begin = time.perf_counter()
    updates, flops = [], 0.0
    for arrays in itertools.islice(progress.data, inputs.updates_per_step):
        batch = inputs.batches.place_share(arrays)
        progress.state, metrics = run.update(progress.state, run.frozen, batch, progress.key)
        updates.append(metrics)
        flops += dit_flops(run.cfg, inputs.whole_sampler, arrays["y"].shape[1:4], inputs.batches.samples)[0]
    values = jax.device_get([{name: x for name, x in metrics.items() if name != "video"} for metrics in updates])
    guards = sorted(values[0].keys() - {*METRICS, "finite"})
    seconds = time.perf_counter() - begin
    progress.step += 1
    skipped = [x["finite"] for x in values if not x["finite"].all()]
    progress.bad_steps = progress.bad_steps + 1 if skipped else 0
    peak = peak_flops()
    line: dict[str, Any] = {
        "step": progress.step,
        **{name: float(np.mean([x[name] for x in values])) for name in METRICS},
        **{name: _mean_of_known([x[name] for x in values]) for name in guards},
        "skipped_updates": len(skipped),
        "step_time_s": seconds,
        "mfu": flops / seconds / peak if peak else None,
    }
    not_finite = checked_names(progress.state.params)[int(np.argmin(skipped[0]))] if skipped else ""
    return line, updates[-1]["video"], not_finite


def _mean_of_known(values: Sequence[Any]) -> float:
    """The mean over a step's updates that have a value; NaN where none has."""
    known = [float(x) for x in values if not np.isnan(x)]
    return sum(known) / len(known) if known else float("nan")
