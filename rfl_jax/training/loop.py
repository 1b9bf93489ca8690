"""The training loop: steps, figures, samples, checkpoints, and stopping without loss."""

import itertools
import signal
import time
from types import FrameType

import grain
import jax
import numpy as np
from etils import epath

from rfl_jax.config import dumps
from rfl_jax.data.videos import write_video
from rfl_jax.errors import UserError
from rfl_jax.files import write_whole
from rfl_jax.hosts import any_host, is_writer, random_key
from rfl_jax.training.checkpoint import Checkpoints, iterator_state
from rfl_jax.training.flops import dit_flops
from rfl_jax.training.metrics import Metrics, peak_flops
from rfl_jax.training.setup import Setup
from rfl_jax.training.state import TrainState

FIGURES = ("loss", "face_score", "kl_loss", "grad_norm", "no_face_fraction", "learning_rate")


class _Stop:
    """Asked for by Ctrl-C or SIGTERM: the running step ends, a checkpoint is written. A second one stops at once."""

    def __init__(self) -> None:
        self.asked = False
        self._before = {s: signal.signal(s, self._ask) for s in (signal.SIGINT, signal.SIGTERM)}

    def _ask(self, number: int, frame: FrameType | None) -> None:
        del number, frame
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True

    def release(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)


def train(run: Setup, workdir: epath.Path) -> tuple[TrainState, bool]:
    """Runs to the last step, or to the interruption.

    Returns:
        The final state, and whether all steps are done.
    """
    cfg = run.cfg
    checkpoints = Checkpoints(workdir / "checkpoints")
    try:
        state, key, iterator, start = _resume(run, checkpoints)
    except BaseException:
        checkpoints.close()
        raise
    metrics = None
    if is_writer():
        write_whole(workdir / "config.json", dumps(cfg))
        metrics = Metrics(workdir, start=start, total=run.steps, every=cfg.logging_steps)
    peak = peak_flops()
    stop = _Stop()
    step = saved = start
    stopping = False
    try:
        while step < run.steps and not stopping:
            begin = time.perf_counter()
            collected, flops = [], 0.0
            for samples in itertools.islice(iterator, run.updates_per_step):
                batch = run.place(samples)
                state, figures = run.step(state, run.frozen, batch, key)
                collected.append(figures)
                flops += dit_flops(cfg, run.rollout, samples["y"].shape[1:4], run.samples)[0]
            figures = jax.device_get([{name: f[name] for name in FIGURES} for f in collected])
            means = {name: float(np.mean([f[name] for f in figures])) for name in FIGURES}
            seconds = time.perf_counter() - begin
            step += 1
            stopping = any_host(stop.asked)
            mfu = flops / seconds / peak if peak else None
            if metrics:
                metrics.write({"step": step, **means, "step_time_s": seconds, "mfu": mfu})
            if metrics and cfg.sample_every and (step % cfg.sample_every == 0 or step in (1, run.steps)):
                write_video(workdir / "samples" / f"step_{step:06d}.mp4", np.asarray(collected[-1]["video"]))
            if step % cfg.save_steps == 0 or step == run.steps or stopping:
                checkpoints.save(step, state, key, iterator_state(iterator))
                saved = step
        if saved != step:
            checkpoints.save(step, state, key, iterator_state(iterator))
    finally:
        stop.release()
        checkpoints.close()
        if metrics:
            metrics.close()
    return state, step == run.steps


def _resume(run: Setup, checkpoints: Checkpoints) -> tuple[TrainState, jax.Array, grain.DatasetIterator, int]:
    """State, key, data and steps done: of the workdir's last checkpoint, else of the run that
    `resume_from_checkpoint` names, else the beginning.
    """
    iterator = run.iterator()
    latest = checkpoints.latest()
    other = None
    if latest is None and run.cfg.resume_from_checkpoint:
        folder = epath.Path(run.cfg.resume_from_checkpoint)
        folder = folder / "checkpoints" if (folder / "checkpoints").is_dir() else folder
        if not folder.is_dir():
            raise UserError(f"config.resume_from_checkpoint: {folder}: no such folder, expected a run's workdir")
        other = checkpoints = Checkpoints(folder)
        latest = checkpoints.latest()
        if latest is None:
            raise UserError(f"config.resume_from_checkpoint: {folder}: holds no checkpoint")
    if latest is None:
        return run.state, run.key, iterator, 0
    state, key, data = checkpoints.restore(latest, run.state)
    iterator.set_state(data)
    if other is not None:
        other.close()
    return state, random_key(key, run.mesh), iterator, latest
