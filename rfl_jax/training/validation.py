"""Held-out clips judged while training runs: the best checkpoint, when to stop, and the alarm when the reward is hacked."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from etils import epath

from rfl_jax.config import EvalSection
from rfl_jax.evaluation.figures import means
from rfl_jax.evaluation.held_out import HeldOut, untrained
from rfl_jax.files import write_whole
from rfl_jax.hosts import is_writer
from rfl_jax.runs import BEST
from rfl_jax.training.checkpoint import Checkpoints
from rfl_jax.training.setup import Setup
from rfl_jax.training.state import States, TrainState

# What decides which checkpoint is the best: the embedder that is not trained against.
JUDGED_BY = "judge_sim"
FILE = "validation.json"


def alarm(base: Mapping[str, float], course: Sequence[Mapping[str, float]], bounds: EvalSection) -> str:
    """What is wrong with a reward that rose; empty if nothing is.

    Args:
        base: figures before training.
        course: figures of the same clips at each validation so far. A reward that rose and fell again was climbed too.
        bounds: on what may be lost by now.
    """
    highest, now = max(figures["face_sim"] for figures in course), course[-1]
    if highest <= base["face_sim"]:
        return ""
    found = []
    if now["motion"] < (1 - bounds.max_motion_loss) * base["motion"]:
        found.append(
            f"motion fell from {base['motion']:.3f} to {now['motion']:.3f} px, by more than "
            f"{bounds.max_motion_loss:.0%} (eval.max_motion_loss)"
        )
    if now["copying"] > base["copying"] + bounds.max_copying_rise:
        found.append(
            f"copying of the first frame rose from {base['copying']:.3f} to {now['copying']:.3f}, by more than "
            f"{bounds.max_copying_rise:g} (eval.max_copying_rise)"
        )
    rose = f"the reward rose ({base['face_sim']:.3f} to {highest:.3f}), but "
    return rose + " and ".join(found) if found else ""


def without_progress(scores: Sequence[float]) -> int:
    """How many of the last scores brought no new best."""
    return len(scores) - 1 - scores.index(max(scores)) if scores else 0


class Validation:
    """The validations of a run. Its record, validation.json, survives an interruption.

    Args:
        run: with held-out clips.
        workdir: of the run.
        start: steps done; validations of later ones, whose checkpoint was lost, are forgotten.
    """

    def __init__(self, run: Setup, workdir: epath.Path, start: int) -> None:
        self._run = run
        self._file = workdir / FILE
        self.held_out = HeldOut(run)
        self._best = Checkpoints(workdir / BEST, keep=1)
        self._best.forget_after(start)
        clips = [item.file.name for item in self.held_out.items[: run.cfg.eval.validation_samples]]
        self.record: dict[str, Any] = {"clips": clips, "base": None, "validations": []}
        if self._file.exists():
            found = json.loads(self._file.read_text())
            # Figures of other clips, or of clips prepared in another way, cannot be compared with.
            if found["clips"] == clips:
                kept = [entry for entry in found["validations"] if entry["step"] <= start]
                self.record = {**found, "validations": kept}

    @property
    def scores(self) -> list[float]:
        return [entry[JUDGED_BY] for entry in self.record["validations"]]

    @property
    def best_step(self) -> int | None:
        """Of the best validation so far."""
        entries = self.record["validations"]
        return max(entries, key=lambda e: (e[JUDGED_BY], -e["step"]))["step"] if entries else None

    @property
    def exhausted(self) -> bool:
        """Whether `early_stop` says that it is enough."""
        patience = self._run.cfg.early_stop
        return patience > 0 and without_progress(self.scores) >= patience

    def knows(self, step: int) -> bool:
        """Whether the weights after a step were judged."""
        return any(entry["step"] == step for entry in self.record["validations"])

    def _figures(self, params: States) -> dict[str, float]:
        clips = []
        for numbers in self.held_out.batches(self._run.cfg.eval.validation_samples):
            clips += [one.figures() for one in self.held_out.sample(params, numbers)]
        return means(clips)

    def check(self, step: int, state: TrainState, key: jax.Array, data: dict) -> dict[str, Any]:
        """Judges the weights after a step and keeps them if they are the best so far.

        Returns:
            Figures, and "alarm".
        """
        if self.record["base"] is None:
            self.record["base"] = self._figures(untrained(self._run, state.params))
        figures = self._figures(state.params)
        course = [*self.record["validations"], figures]
        entry = {"step": step, **figures, "alarm": alarm(self.record["base"], course, self._run.cfg.eval)}
        self.record["validations"].append(entry)
        if self.best_step == step:
            self._best.save(step, state, key, data)
        if is_writer():
            write_whole(self._file, json.dumps({**self.record, "best_step": self.best_step}, indent=1) + "\n")
        return entry

    def close(self) -> None:
        self._best.close()
