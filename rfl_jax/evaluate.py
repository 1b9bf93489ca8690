"""Before and after, on clips that were held out, judged by a network that was not the reward.

`python -m rfl_jax.evaluate --workdir=RUN [--data=FILE.csv] [--step=best]` writes RUN/evaluation.json and RUN/evaluation/.
"""

import json
from typing import Any

import numpy as np
from absl import flags
from etils import epath
from ml_collections import ConfigDict
from tqdm import tqdm

from rfl_jax import cli
from rfl_jax.config import parse
from rfl_jax.data.videos import write_video
from rfl_jax.errors import UserError
from rfl_jax.evaluation.figures import FIGURES, means
from rfl_jax.evaluation.held_out import HeldOut, untrained
from rfl_jax.evaluation.plots import bar_figure, drift_figure, png
from rfl_jax.evaluation.statistics import compare
from rfl_jax.files import write_whole
from rfl_jax.hosts import is_writer
from rfl_jax.runs import BEST, RunFolder, find_checkpoint
from rfl_jax.training.checkpoint import Checkpoints
from rfl_jax.training.setup import Setup, set_up
from rfl_jax.training.state import TrainState

NAMES = ("base", "tuned")


def evaluate(run: Setup, state: TrainState, workdir: epath.Path, held_out: HeldOut | None = None) -> dict[str, Any]:
    """Samples every held-out clip with the untrained and the trained weights from the same noise.

    Args:
        run: its `cfg.eval` names clips and judge.
        state: what was trained.
        workdir: where evaluation.json and evaluation/ (videos, plots) are written.
        held_out: of the run, where it is compiled already.

    Returns:
        The content of evaluation.json: of every figure the means of "base" and "tuned", "statistics" (intervals, sign
        test), "drift" (mean similarity of each frame), and "clips" with their own figures, files and frames.
    """
    held_out = held_out or HeldOut(run)
    params = dict(zip(NAMES, (untrained(run, state.params), state.params), strict=True))
    clips: dict[int, dict[str, Any]] = {}
    folder = workdir / "evaluation"

    def written(number: int, name: str, video: np.ndarray) -> str:
        file = folder / f"{number:03d}_{name}.mp4"
        if is_writer():
            write_video(file, video)
        return f"{folder.name}/{file.name}"

    with tqdm(total=len(held_out.items) * len(NAMES), desc="evaluate", disable=None) as bar:
        for numbers in held_out.batches():
            sampled = {}
            for name in NAMES:
                sampled[name] = held_out.sample(params[name], numbers)
                bar.update(len(numbers))
            for i, number in enumerate(numbers):
                row = held_out.items[number].row
                real = held_out.real(number)
                clip: dict[str, Any] = {"video": row.video.name, "prompt": row.prompt}
                clip["reference"] = {"file": written(number, "reference", real.video), "frames": real.frames()}
                for name in NAMES:
                    one = sampled[name][i]
                    file = written(number, name, one.video)
                    clip[name] = {**one.figures(), "file": file, "frames": one.frames()}
                clips[number] = clip
    result = summary([clips[number] for number in sorted(clips)])
    result["step"] = int(state.step) // run.updates_per_step
    if is_writer():
        write_whole(folder / "drift.png", png(drift_figure(result)))
        write_whole(folder / "change.png", png(bar_figure(result)))
        write_whole(workdir / "evaluation.json", json.dumps(result, indent=1) + "\n")
    return result


def summary(clips: list[dict[str, Any]]) -> dict[str, Any]:
    """The totals of evaluated clips, and the clips themselves."""
    totals = {name: means([clip[name] for clip in clips]) for name in NAMES}
    result: dict[str, Any] = {figure: {name: totals[name][figure] for name in NAMES} for figure in FIGURES}
    result["statistics"] = {
        figure: compare(*([clip[name][figure] for clip in clips] for name in NAMES)) for figure in FIGURES
    }
    result["drift"] = {
        figure: {name: drift([clip[name]["frames"][figure] for clip in clips]) for name in NAMES}
        for figure in ("face_sim", "judge_sim")
    }
    return result | {"clips": clips}


def drift(curves: list[list[float | None]]) -> list[float | None]:
    """Mean similarity of each frame over the clips that have a face in it."""
    longest = max(map(len, curves))
    at = [[curve[t] for curve in curves if t < len(curve) and curve[t] is not None] for t in range(longest)]
    return [float(np.mean(np.array(values, float))) if values else None for values in at]


def show(result: dict[str, Any]) -> None:
    """A table on the terminal."""
    count = len(result["clips"])
    print(
        f"{'held-out clips: ' + str(count):52s}{'base':>9s}{'tuned':>9s}{'change (95 %)':>30s}{'rose/fell':>11s}{'p':>8s}"
    )
    for name, figure in FIGURES.items():
        base, tuned = result[name]["base"], result[name]["tuned"]
        found = result["statistics"][name]
        bounds = found["change"]
        text = f"{tuned - base:+.4f}" + (f" [{bounds[0]:+.4f}, {bounds[1]:+.4f}]" if bounds else "")
        signs = f"{found['rose']}/{found['fell']}"
        title = figure.title + (f" ({figure.unit})" if figure.unit else "")
        print(f"{title:52s}{base:9.4f}{tuned:9.4f}{text:>30s}{signs:>11s}{found['p']:8.3f}")


def main() -> None:
    workdir = epath.Path(_WORKDIR.value or "")
    file = workdir / "config.json"
    if not _WORKDIR.value or not file.exists():
        raise UserError(f"--workdir: {_WORKDIR.value}: expected the folder of a run, with its config.json")
    values = json.loads(file.read_text())
    if _DATA.value:
        values["eval"]["file_name"] = _DATA.value
    cfg = parse(ConfigDict(values))
    if not cfg.eval.file_name:
        raise UserError("--data: expected a csv of held-out clips, as the run's config names none")
    checkpoint = find_checkpoint(RunFolder(workdir), _STEP.value)
    run = set_up(cfg, workdir)
    checkpoints = Checkpoints(workdir / checkpoint.parent.name)
    state, _, _ = checkpoints.restore(int(checkpoint.name), run.state)
    checkpoints.close()
    result = evaluate(run, state, workdir)
    if is_writer():
        show(result)
        print(f"written: {workdir / 'evaluation.json'}, {workdir / 'evaluation'}/")
        print(f"next: python -m rfl_jax.report {workdir} -o report.html")


if __name__ == "__main__":
    _WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run.")
    cli.define_distributed()
    _DATA = flags.DEFINE_string("data", None, "csv of held-out clips; default: the run's eval.file_name.")
    _STEP = flags.DEFINE_string("step", "", f"Checkpoint: a number, or {BEST}; default: the last.")
    cli.run(main, "evaluate")
