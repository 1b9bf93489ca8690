"""Held-out clips judged while training runs: the best checkpoint, when to stop, and the alarm when the reward is hacked."""

import dataclasses
import json
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from etils import epath

from rfl_jax.config import Config, EvalSection
from rfl_jax.errors import UserError
from rfl_jax.evaluation.held_out import HeldOut
from rfl_jax.evaluation.measures import MEASURES, means
from rfl_jax.files import read_json, write_whole
from rfl_jax.hosts import is_writer
from rfl_jax.networks.parts import States
from rfl_jax.networks.terms import shown_as
from rfl_jax.rewards.terms import FACE, find_term
from rfl_jax.runs import RunFolder
from rfl_jax.terminal import RED, styled
from rfl_jax.training.actions import LOWER, STOP, told
from rfl_jax.training.checkpoint import Checkpoints
from rfl_jax.training.guard import factors_of, lowered, put_back
from rfl_jax.training.progress import Progress

# What decides which checkpoint is the best: the embedder that is not trained against.
JUDGED_BY = "judge_sim"
# What a validation adds to its step's metrics.
VALIDATED = ("face_sim", "judge_sim", "motion", "copying", "face_fraction")


# The measure of the face's term.
FACE_SIM = "face_sim"


@dataclasses.dataclass(frozen=True)
class Terms:
    """The terms of a reward, by the names of their measures.

    Attributes:
        trained: factors of their standardised scores in the reward.
        watched: those that are not trained on.
        floors: scores of terms that are worth nothing, where that is not 0.
    """

    trained: Mapping[str, float] = dataclasses.field(default_factory=lambda: {FACE_SIM: 1.0})
    watched: tuple[str, ...] = ()
    floors: Mapping[str, float] = dataclasses.field(default_factory=dict)

    @classmethod
    def of(cls, cfg: Config) -> "Terms":
        """The terms of a run; the face is watched where it is none of them."""
        named = {FACE_SIM if term.type == FACE else shown_as(name): term for name, term in cfg.terms.items()}
        named = {FACE_SIM: cfg.face_term} | named
        trained = {name: term.weight / find_term(term.type).std for name, term in named.items() if term.weight}
        # A reward of one term is shown as that term's score.
        trained = trained if len(trained) > 1 else dict.fromkeys(trained, 1.0)
        floors = {name: floor for name, term in named.items() if (floor := find_term(term.type).floor)}
        return cls(trained, tuple(name for name, term in named.items() if not term.weight), floors)

    def reward(self, measures: Mapping[str, Any]) -> float:
        """What is trained on: the score of the one term, or the weighted sum of several in standard deviations."""
        return sum(factor * measures[name] for name, factor in self.trained.items())


def alarm(
    base: Mapping[str, float], course: Sequence[Mapping[str, Any]], bounds: EvalSection, terms: Terms | None = None
) -> str:
    """What is wrong with a reward that rose; empty if nothing is.

    Args:
        base: measures before training.
        course: measures of the same clips at each validation so far. A reward that rose and fell again was climbed too.
        bounds: on what may be lost by now.
        terms: of the reward; the face alone by default.
    """
    terms = terms or Terms()
    before, highest, now = terms.reward(base), max(terms.reward(measures) for measures in course), course[-1]
    if highest <= before:
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
    if now["face_fraction"] < (1 - bounds.max_face_loss) * base["face_fraction"]:
        # A blur in which no face is found costs no reward: frames without one say nothing.
        found.append(
            f"frames with a face fell from {base['face_fraction']:.0%} to {now['face_fraction']:.0%}, by more than "
            f"{bounds.max_face_loss:.0%} of them (eval.max_face_loss)"
        )
    for name in terms.watched:
        if now[name] < base[name] - bounds.max_term_loss * abs(base[name] - terms.floors.get(name, 0)):
            found.append(
                f"{name}, which is watched, fell from {base[name]:.3f} to {now[name]:.3f}, by more than "
                f"{bounds.max_term_loss:.0%} (eval.max_term_loss)"
            )
    rose = f"the reward rose ({before:.3f} to {highest:.3f}), but "
    return rose + " and ".join(found) if found else ""


def without_progress(scores: Sequence[float]) -> int:
    """How many of the last scores brought no new best."""
    return len(scores) - 1 - scores.index(max(scores)) if scores else 0


def _read(file: epath.Path) -> dict[str, Any]:
    """A validation.json.

    Raises:
        UserError: it is not as a run writes it.
    """
    found = read_json(file)
    entries = found.get("validations")
    measured = [found.get("base"), *entries] if isinstance(entries, list) else []
    terms = found.get("terms", [])
    names = [*VALIDATED, *(terms if isinstance(terms, list) else [])]
    known = [x for x in measured if isinstance(x, dict) and all(type(x.get(name)) is float for name in names)]
    named = all(
        type(x.get("step")) is int and type(x.get("alarm")) is str and _says_what_was_done(x) for x in known[1:]
    )
    if not known or len(known) != len(measured) or not named or not isinstance(found.get("clips"), list):
        raise UserError(f"{file}: expected clips, base and validations with their measures, as a run writes them")
    return found


def _says_what_was_done(entry: Mapping[str, Any]) -> bool:
    """Whether an entry's action is none, or one with its numbers."""
    if "action" not in entry:
        return True
    numbers = {"back_to": int} | (
        {"learning_rate_factor": float, "kl_factor": float} if entry["action"] == LOWER else {}
    )
    return entry["action"] in (LOWER, STOP) and all(type(entry.get(name)) is kind for name, kind in numbers.items())


class Validation:
    """The validations of a run. Its record, validation.json, survives an interruption.

    Args:
        cfg: of the run.
        held_out: its clips, compiled at the first validation.
        folder: of the run.
        start: steps done; validations of later ones, whose checkpoint was lost, are forgotten.
        note: shows a line.
    """

    def __init__(
        self, cfg: Config, held_out: HeldOut, folder: RunFolder, start: int, note: Callable[[str], None]
    ) -> None:
        self._cfg = cfg
        self._file = folder.validation
        self._note = note
        self.held_out = held_out
        self._best = Checkpoints(folder.best, keep=1)
        self._best.forget_after(start)
        clips = [clip.file.name for clip in self.held_out.clips[: self._cfg.eval.validation_samples]]
        names = list(held_out.term_measures)
        self._measured = (*VALIDATED, *names)
        self._terms = Terms.of(cfg)
        self._record: dict[str, Any] = {"clips": clips, "base": None, "validations": []}
        self._record |= {"terms": names} if names else {}
        if self._file.exists():
            found = _read(self._file)
            # Measures of other clips, or of clips prepared in another way, cannot be compared with; nor those of other terms.
            if found["clips"] == clips and found.get("terms", []) == names:
                kept = [entry for entry in found["validations"] if entry["step"] <= start]
                self._record = {**found, "validations": kept}

    def __enter__(self) -> "Validation":
        return self

    def __exit__(self, *_: object) -> None:
        self._best.__exit__()

    @property
    def entries(self) -> list[dict[str, Any]]:
        """The validations so far: "step", the measures, "alarm"; and where something was done about it "action" ("lower"
        or "stop"), "back_to" (a step), and the factors of learning rate and KL from then on.
        """
        return self._record["validations"]

    @property
    def best_step(self) -> int | None:
        """The step of the best validation so far; none from which the run went back."""
        kept = [entry for entry in self.entries if "action" not in entry]
        return max(kept, key=lambda e: (e[JUDGED_BY], -e["step"]))["step"] if kept else None

    @property
    def end(self) -> str:
        """Why training ends here; empty if it does not."""
        patience = self._cfg.early_stop
        scores = [-math.inf if "action" in entry else entry[JUDGED_BY] for entry in self.entries]
        if patience > 0 and without_progress(scores) >= patience:
            return f"{patience} validations brought nothing better (config.early_stop)"
        last = self.entries[-1] if self.entries else {}
        # Asked again: other settings may let a run go on that was stopped.
        if last.get("action") != STOP or self._action(last["alarm"]) != STOP:
            return ""
        lowers = self._cfg.guard.on_alarm == LOWER
        return "an alarm too many (config.guard.max_falls)" if lowers else "an alarm (config.guard.on_alarm)"

    def _action(self, warning: str) -> str:
        """What is done about an alarm; empty if there is none, or nothing is done."""
        guard = self._cfg.guard
        if not warning or guard.on_alarm == "warn":
            return ""
        falls = sum(entry.get("action") == LOWER for entry in self.entries)
        return LOWER if guard.on_alarm == LOWER and falls < guard.max_falls else STOP

    def before(self, step: int) -> None:
        """Nothing to do."""

    def after(self, progress: Progress, line: Mapping[str, Any], *, stopping: bool) -> dict[str, Any]:
        """Validates every `eval_every` steps, unless the run is about to be interrupted."""
        del line
        return {} if stopping or progress.step % self._cfg.eval_every else self._validate(progress)

    def make_up(self, progress: Progress) -> dict[str, Any]:
        """The validation that an interruption did not wait for; empty if none is missing. The best checkpoint is written
        where it is this step's and was lost, or where none is there that an alarm could go back to.
        """
        guarded = self._cfg.guard.on_alarm != "warn"
        if self.best_step == progress.step or (guarded and self._best.latest() is None):
            progress.save(self._best)
            self._best.wait()
        due = progress.step > 0 and progress.step % self._cfg.eval_every == 0
        known = [entry for entry in self.entries if entry["step"] == progress.step]
        if due and not known:
            return self._validate(progress)
        # The interruption came after the record's entry and before the checkpoint with what was done.
        if known and "action" in known[0] and progress.went_back != progress.step:
            self._go_back(progress, known[0]["action"])
        return {}

    def _validate(self, progress: Progress) -> dict[str, Any]:
        """Judges the weights after a step, keeps them if they are the best so far, goes back if an alarm asks for it, and
        says what was found.
        """
        params = progress.state.tuned
        if self._record["base"] is None:
            self._record["base"] = self._measure(self.held_out.untrained(params))
        measures = self._measure(params)
        warning = alarm(self._record["base"], [*self.entries, measures], self._cfg.eval, self._terms)
        found: dict[str, Any] = {"alarm": warning}
        if action := self._action(warning):
            found |= {"action": action, "back_to": self._go_back(progress, action)}
            found |= factors_of(progress.state) if action == LOWER else {}
        self.entries.append({"step": progress.step, **measures, **found})
        if self.best_step == progress.step:
            progress.save(self._best)
            # The record must not name what a sudden end keeps from being written.
            self._best.wait()
        if is_writer():
            write_whole(self._file, json.dumps({**self._record, "best_step": self.best_step}, indent=1) + "\n")
        shown = "  ".join(f"{name} {measures[name]:.4f}" for name in self._measured)
        self._note(f"step {progress.step}: held-out clips: {shown}")
        if warning:
            self._note(styled(f"ALARM at step {progress.step}: {told(found)}", RED, sys.stderr))
        return {f"eval_{name}": measures[name] for name in self._measured} | found

    def _go_back(self, progress: Progress, action: str) -> int:
        """Puts back the best weights, or those that the run began with, and lowers the learning rate if asked for.

        Returns:
            The step of those weights.
        """
        step = self._best.latest()
        assert step is not None, "make_up keeps one"
        best, _, _ = self._best.restore(step, progress.state)
        state = put_back(progress.state, best)
        progress.state = lowered(state, self._cfg.guard.raise_kl) if action == LOWER else state
        progress.went_back, progress.bad_steps = progress.step, 0
        return step

    def _measure(self, params: States) -> dict[str, float]:
        clips = []
        for numbers in self.held_out.in_batches(self._cfg.eval.validation_samples):
            clips += [one.measures() for one in self.held_out.judge(params, numbers)]
        return means(clips, [*MEASURES, *self.held_out.term_measures])
