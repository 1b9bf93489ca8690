"""The training loop: step, judge, record, save; and stopping without loss."""

import contextlib
import dataclasses
import itertools
import json
import time
from typing import Any

import jax
import numpy as np

from rfl_jax.chips import peak_flops
from rfl_jax.config import dumps
from rfl_jax.files import write_whole
from rfl_jax.hosts import is_writer
from rfl_jax.runs import RunFolder
from rfl_jax.training.about import describe
from rfl_jax.training.checkpoint import Checkpoints
from rfl_jax.training.flops import dit_flops
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
        finished: whether there is nothing left to do: all steps are done, or `early_stop` ended them.
        validation: with its record and its compiled held-out clips; None without validations.
    """

    state: TrainState
    step: int
    finished: bool
    validation: Validation | None


def train(run: Run, folder: RunFolder) -> Trained:
    """Runs to the last step, or to the interruption."""
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
        if validation and (missed := validation.make_up(progress)):
            record.amend(begun, missed)

        def ended() -> bool:
            return progress.step >= total or stop.agreed or bool(validation and validation.exhausted)

        while not ended():
            for hook in hooks:
                hook.before(progress.step + 1)
            line, video = take_step(run, progress)
            stop.agree()
            for hook in hooks:
                line |= hook.after(progress, line, stopping=stop.agreed)
            record.write(line)
            if cfg.sample_every and (progress.step % cfg.sample_every == 0 or progress.step in (1, total)):
                record.video(progress.step, np.asarray(video))
            if progress.step % cfg.save_steps == 0 or ended():
                progress.save(checkpoints)
                record.saved(progress.step)
    finished = progress.step == total or (validation is not None and validation.exhausted)
    return Trained(progress.state, progress.step, finished, validation)


def take_step(run: Run, progress: Progress) -> tuple[dict[str, Any], jax.Array]:
    """Moves a run on by one step of `train_batch_size` videos.

    Returns:
        The step's line of metrics.jsonl, and one of its videos, uint8 [t, h, w, 3].
    """
    inputs = run.inputs
    begin = time.perf_counter()
    updates, flops = [], 0.0
    for arrays in itertools.islice(progress.data, inputs.updates_per_step):
        batch = inputs.batches.place_share(arrays)
        progress.state, metrics = run.update(progress.state, run.frozen, batch, progress.key)
        updates.append(metrics)
        flops += dit_flops(run.cfg, inputs.whole_sampler, arrays["y"].shape[1:4], inputs.batches.samples)[0]
    values = jax.device_get([{name: metrics[name] for name in METRICS} for metrics in updates])
    seconds = time.perf_counter() - begin
    progress.step += 1
    peak = peak_flops()
    line: dict[str, Any] = {
        "step": progress.step,
        **{name: float(np.mean([x[name] for x in values])) for name in METRICS},
        "step_time_s": seconds,
        "mfu": flops / seconds / peak if peak else None,
    }
    return line, updates[-1]["video"]
