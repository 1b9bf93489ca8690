"""Every held-out clip before and after training, as files and as the content of evaluation.json."""

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

import numpy as np
from tqdm import tqdm

from rfl_jax.data.videos import write_video
from rfl_jax.evaluation.held_out import HeldOut
from rfl_jax.evaluation.measures import MEASURES, Measure, Scored, means, measures_of, several
from rfl_jax.evaluation.statistics import compare
from rfl_jax.files import write_whole
from rfl_jax.hosts import is_writer
from rfl_jax.networks.parts import States
from rfl_jax.runs import RunFolder

NAMES = ("base", "tuned")


def evaluate(
    held_out: HeldOut, params: Mapping[str, States], folder: RunFolder, step: int, weights: str
) -> dict[str, Any]:
    """Samples every held-out clip with the untrained and the trained weights from the same noise.

    Args:
        held_out: clips.
        params: the trainable weights "base" (before training) and "tuned".
        folder: of the run, where evaluation.json and evaluation/ (videos, plots) are written.
        step: of the trained weights.
        weights: whether these are the "average" or the "raw" weights of that step.

    Returns:
        The content of evaluation.json: for every measure the means of "base" and "tuned", "statistics" (intervals, sign
        test), "drift" (mean similarity of each frame), and "clips" with their own measures, files and frames; "terms" tells how
        the measures of the reward's terms are shown, where there are any; "step" and "weights" are the arguments.
    """
    clips: dict[int, dict[str, Any]] = {}
    files = folder.evaluation_files

    def written(number: int, name: str, video: np.ndarray) -> str:
        file = files / f"{number:03d}_{name}.mp4"
        if is_writer():
            write_video(file, video)
        return f"{files.name}/{file.name}"

    with tqdm(total=len(held_out.clips) * len(NAMES), desc="evaluate", disable=None) as bar:
        for numbers in held_out.in_batches():
            judged = {}
            for name in NAMES:
                judged[name] = held_out.judge(params[name], numbers)
                bar.update(len(numbers))
            for i, number in enumerate(numbers):
                row = held_out.clips[number].clip
                real = held_out.real(number)
                clip: dict[str, Any] = {"video": row.video.name, "prompt": row.prompt}
                clip["reference"] = {"file": written(number, "reference", real.video), "frames": real.frames()}
                clip["reference"] |= of_people(real, real)
                for name in NAMES:
                    one = judged[name][i]
                    file = written(number, name, one.video)
                    clip[name] = {**one.measures(), "file": file, "frames": one.frames(), **of_people(one, real)}
                clips[number] = clip
    result = summary([clips[number] for number in sorted(clips)], held_out.term_measures) | {
        "step": step,
        "weights": weights,
    }
    if is_writer():
        # Matplotlib is imported here: a third of a second that the beginning of a training need not wait for.
        from rfl_jax.evaluation.plots import bar_figure, drift_figure, png

        write_whole(files / "drift.png", png(drift_figure(result)))
        write_whole(files / "change.png", png(bar_figure(result)))
        write_whole(folder.evaluation, json.dumps(result, indent=1) + "\n")
    return result


def of_people(one: Scored, real: Scored) -> dict[str, Any]:
    """What a clip with several people has besides: "people", their measures and their "boxes" by frame, the largest first, and
    "swaps"; empty for other clips.
    """
    if one.people is None or not several(real):
        return {}
    rows = zip(one.people.measures(), one.people.frames(), strict=True)
    return {"people": [{**measures, "boxes": boxes} for measures, boxes in rows], "swaps": one.people.swaps()}


def summary(clips: list[dict[str, Any]], terms: Mapping[str, Measure] | None = None) -> dict[str, Any]:
    """The totals of evaluated clips, and the clips themselves.

    Args:
        clips: with their measures.
        terms: measures of the reward's terms, which they have as well.
    """
    shown = {name: dataclasses.asdict(measure) for name, measure in (terms or {}).items()}
    measured = [*MEASURES, *shown]
    totals = {name: means([clip[name] for clip in clips], measured) for name in NAMES}
    result: dict[str, Any] = {measure: {name: totals[name][measure] for name in NAMES} for measure in measured}
    if shown:
        result["terms"] = shown
    result["statistics"] = {
        measure: compare(*([clip[name][measure] for clip in clips] for name in NAMES)) for measure in measured
    }
    result["drift"] = {
        measure: {name: drift([clip[name]["frames"][measure] for clip in clips]) for name in NAMES}
        for measure in ("face_sim", "judge_sim")
    }
    return result | {"clips": clips}


def drift(curves: list[list[float | None]]) -> list[float | None]:
    """Mean similarity of each frame over the clips that have a face in it."""
    longest = max(map(len, curves))
    at = [[curve[t] for curve in curves if t < len(curve) and curve[t] is not None] for t in range(longest)]
    return [float(np.mean(np.array(values, float))) if values else None for values in at]


def show(result: Mapping[str, Any]) -> None:
    """Prints a table of the measures."""
    count = len(result["clips"])
    print(
        f"{'held-out clips: ' + str(count):52s}{'base':>9s}{'tuned':>9s}{'change (95 %)':>30s}{'rose/fell':>11s}{'p':>8s}"
    )
    for name, measure in measures_of(result).items():
        base, tuned = result[name]["base"], result[name]["tuned"]
        found = result["statistics"][name]
        bounds = found["change"]
        text = f"{tuned - base:+.4f}" + (f" [{bounds[0]:+.4f}, {bounds[1]:+.4f}]" if bounds else "")
        signs = f"{found['rose']}/{found['fell']}"
        title = measure.title + (f" ({measure.unit})" if measure.unit else "")
        print(f"{title:52s}{base:9.4f}{tuned:9.4f}{text:>30s}{signs:>11s}{found['p']:8.3f}")
