"""The training loop: steps, figures, samples, validations, checkpoints, and stopping without loss."""

import dataclasses
import itertools
import json
import platform
import signal
import time
from datetime import UTC, datetime
from importlib.metadata import version
from types import FrameType
from typing import Any

import grain
import jax
import numpy as np
from etils import epath

from rfl_jax.config import dumps
from rfl_jax.data.prepare import detector_file, embedder_file, fingerprint
from rfl_jax.data.videos import write_video
from rfl_jax.errors import UserError
from rfl_jax.evaluation.held_out import HeldOut
from rfl_jax.files import write_whole
from rfl_jax.hosts import any_host, is_writer, random_key
from rfl_jax.training.checkpoint import Checkpoints, iterator_state
from rfl_jax.training.flops import dit_flops
from rfl_jax.training.metrics import Metrics, peak_flops
from rfl_jax.training.profile import Compiled, Profiler
from rfl_jax.training.setup import Setup
from rfl_jax.training.state import TrainState
from rfl_jax.training.validation import Validation

FIGURES = ("loss", "face_score", "kl_loss", "grad_norm", "no_face_fraction", "learning_rate")
VALIDATED = ("face_sim", "judge_sim", "motion", "copying", "face_fraction")
PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")


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


@dataclasses.dataclass
class Trained:
    """What training ends with.

    Attributes:
        state: after the last step.
        finished: whether there is nothing left to do: all steps are done, or `early_stop` ended them.
        step: the last.
        held_out: compiled for the validations; None without them.
        best_step: of the best validation; None without validations.
        alarms: of the validations, one line each.
    """

    state: TrainState
    finished: bool
    step: int
    held_out: HeldOut | None
    best_step: int | None
    alarms: list[str]


def train(run: Setup, workdir: epath.Path) -> Trained:
    """Runs to the last step, or to the interruption."""
    cfg = run.cfg
    checkpoints = Checkpoints(workdir / "checkpoints")
    metrics: Metrics | None = None
    validation: Validation | None = None
    profiler: Profiler | None = None
    try:
        state, key, iterator, start = _resume(run, checkpoints)
        validation = Validation(run, workdir, start) if cfg.validates else None
        if is_writer():
            write_whole(workdir / "config.json", dumps(cfg))
            write_whole(workdir / "run.json", json.dumps(describe(run), indent=1) + "\n")
            metrics = Metrics(cfg, workdir, start=start, total=run.steps)
        profiler = Profiler(cfg.profile.steps, workdir, _keep_programs(run) if cfg.profile.steps else [])
    except BaseException:
        for opened in filter(None, (checkpoints, validation, metrics)):
            opened.close()
        raise
    peak = peak_flops()
    stop = _Stop()
    step = saved = start
    stopping = validation is not None and validation.exhausted
    try:
        if validation and start and start % cfg.eval_every == 0 and not validation.knows(start):
            # An interruption did not wait for it.
            missed = _validated(validation.check(start, state, key, iterator_state(iterator)))
            stopping = validation.exhausted
            if metrics:
                metrics.amend(start, missed)
                _notes(metrics, {"step": start, **missed}, None)
        while step < run.steps and not stopping:
            profiler.before(step + 1)
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
            line: dict[str, Any] = {"step": step, **means, "step_time_s": seconds, "mfu": mfu}
            traced = profiler.after(step, line)
            if validation and not stopping and step % cfg.eval_every == 0:
                line |= _validated(validation.check(step, state, key, iterator_state(iterator)))
                stopping = validation.exhausted
            if metrics:
                metrics.write(line)
                _notes(metrics, line, traced)
            if metrics and cfg.sample_every and (step % cfg.sample_every == 0 or step in (1, run.steps)):
                video = np.asarray(collected[-1]["video"])
                write_video(workdir / "samples" / f"step_{step:06d}.mp4", video)
                metrics.video(step, video)
            if step % cfg.save_steps == 0 or step == run.steps or stopping:
                checkpoints.save(step, state, key, iterator_state(iterator))
                saved = step
                if metrics:
                    metrics.saved(step)
        if saved != step:
            checkpoints.save(step, state, key, iterator_state(iterator))
    finally:
        stop.release()
        for opened in filter(None, (profiler, checkpoints, validation, metrics)):
            opened.close()
    finished = step == run.steps or (validation is not None and validation.exhausted)
    if validation is None:
        return Trained(state, finished, step, None, None, [])
    alarms = [f"step {entry['step']}: {entry['alarm']}" for entry in validation.record["validations"] if entry["alarm"]]
    return Trained(state, finished, step, validation.held_out, validation.best_step, alarms)


def _validated(entry: dict[str, Any]) -> dict[str, Any]:
    """What a validation adds to its step's figures."""
    return {f"eval_{name}": entry[name] for name in VALIDATED} | {"alarm": entry["alarm"]}


def _notes(metrics: Metrics, line: dict[str, Any], traced: dict[str, Any] | None) -> None:
    """What deserves a line of its own."""
    if "eval_face_sim" in line:
        metrics.note(
            f"step {line['step']}: held-out clips: "
            + "  ".join(f"{name} {line[f'eval_{name}']:.4f}" for name in VALIDATED)
        )
        if line["alarm"]:
            metrics.note(f"ALARM at step {line['step']}: {line['alarm']}")
    if traced:
        times = "  ".join(f"{phase} {seconds:.2f} s" for phase, seconds in traced["phases"].items())
        metrics.note(f"steps {traced['steps'][0]}-{traced['steps'][1]}: {times}")


def _keep_programs(run: Setup) -> list[Compiled]:
    """Lets the run's programs be read after they were compiled."""
    run.jitted = Compiled(run.jitted)
    programs = [run.jitted]
    if run.jitted_prefix is not None:
        run.jitted_prefix = Compiled(run.jitted_prefix)
        programs.append(run.jitted_prefix)
    return programs


def describe(run: Setup) -> dict[str, Any]:
    """With what a run is trained: versions, devices, weights."""
    sources = run.sources
    files = {
        "dit": sources.dit,
        "dit2": sources.dit2,
        "text_encoder": sources.text_encoder,
        "vae": sources.vae,
        "detector": [detector_file(sources.reward)],
        "embedder": [embedder_file(sources.reward)],
    }
    return {
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}},
        "devices": {
            "kind": jax.devices()[0].device_kind,
            "count": jax.device_count(),
            "processes": jax.process_count(),
            "mesh": dict(run.mesh.shape),
        },
        "weights": {name: {file: fingerprint(file) for file in paths} for name, paths in files.items() if paths},
        "trained_parameters": {
            name: sum(leaf.size for leaf in jax.tree.leaves(params)) for name, params in run.state.params.items()
        },
        "clips": {"trained_on": len(run.prepared), "held_out": len(run.held_out)},
        "steps": run.steps,
    }


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
