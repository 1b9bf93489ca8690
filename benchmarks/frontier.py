"""What each guard and each window makes of the miniature: the likeness that is won, the motion that it costs, the time it takes.

    python -m benchmarks.frontier --dir=DIR --page=docs/frontier.md [--only=NAME,...] [--seeds=0,1] [--shorter='--config.max_steps=2']

Every row is a run of its own in DIR, by the command that anybody types, with a row's settings beside the miniature's. The same
command goes on where it stopped. The page has a table and a plot; with --page, they are written there.
"""

import argparse
import dataclasses
import io
import json
import shlex
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.transforms import Bbox
from tqdm import tqdm

from rfl_jax.chips import answer_libtpu
from rfl_jax.evaluation.plots import INK, STYLE, TUNED
from rfl_jax.files import write_whole

# The face's term alone; the others are watched.
ALONE = {"reward.terms.motion.weight": 0, "reward.terms.anti_copy.weight": 0}
EVERY_STEP = {"window.mode": "last", "window.steps": 0}
# Settings of each row, beside the miniature's own.
ROWS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "original": {**ALONE, **EVERY_STEP, "reward.kl_weight": 1, "ema.decay": 0},
    "face alone without KL": ALONE | {"reward.kl_weight": 0},
    "face alone": ALONE,
    "face alone and KL 2": ALONE | {"reward.kl_weight": 2},
    "face alone and KL within 0.01": ALONE | {"kl.target": 0.01},
    "face alone and real data 1": ALONE | {"real.weight": 1},
    "face weighed by motion and copying": ALONE | {"motion.weight": 1, "motion.copy_weight": 1},
    "without the term for motion": {"reward.terms.motion.weight": 0},
    "without the term against copying": {"reward.terms.anti_copy.weight": 0},
    "means held": {
        "reward.terms.motion.hold": True,
        "reward.terms.motion.weight": 0.3,
        "reward.terms.anti_copy.hold": True,
        "reward.terms.anti_copy.weight": 1,
        "reward.kl_weight": 0.1,
    },
    "no KL": {"reward.kl_weight": 0},
    "KL 1": {"reward.kl_weight": 1},
    "real data 0.3": {"real.weight": 0.3},
    "no average": {"ema.decay": 0},
    "falling rate": {"lr_scheduler_type": "cosine"},
    "terms against the real clip": {"reward.terms.motion.against": "real", "reward.terms.anti_copy.against": "real"},
    "all steps": EVERY_STEP,
    "each step by itself": EVERY_STEP | {"window.stop_input_gradient": True},
    "all steps and KL of one": EVERY_STEP | {"kl.every": 4},
    "last step": {"window.mode": "last"},
    "2 even steps": {"window.mode": "uniform", "window.steps": 2},
    "2 random steps": {"window.steps": 2},
    "direct": {"window.direct": True},
    "high-noise expert": {"trainable_models": "dit", "lora_base_model": "dit", "mid_timestep": 0},
}  # fmt: skip

NOISE = 1.1  # factor of an update's time that says nothing: the same program differs by a few per cent from run to run


@dataclasses.dataclass(frozen=True)
class Point:
    """What a row came to, the mean over its seeds.

    Attributes:
        name: of the row.
        settings: as flags.
        likeness: FaceSim by the judging embedder after training.
        gain: of that, relative to before.
        motion: change, relative to before.
        copying: change, relative to before.
        sharpness: change, relative to before.
        seconds: of an update, the median.
        alarms: validations that raised the alarm, of all seeds together.
        seeds: how many.
    """

    name: str
    settings: str
    likeness: float
    gain: float
    motion: float
    copying: float
    sharpness: float
    seconds: float
    alarms: int
    seeds: int


def flags(settings: dict[str, Any]) -> list[str]:
    """A row's settings as the command takes them."""
    return [f"--config.{name}={value}" for name, value in settings.items()]


def train(folder: Path, row: str, seed: int, cache: Path, shorter: Sequence[str]) -> None:
    """Runs or ends a row.

    Raises:
        SystemExit: it failed.
    """
    command = [
        sys.executable, "-m", "rfl_jax.train", "--config=configs/mini.py", f"--workdir={folder}", f"--config.seed={seed}",
        f"--config.data.cache_dir={cache}", *shorter, *flags(ROWS[row]),
    ]  # fmt: skip
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    if ended.returncode:
        raise SystemExit(f"{row}, seed {seed}: {(ended.stderr.strip().splitlines() or ['no message'])[-1]}")


def read(folder: Path) -> dict[str, float]:
    """The figures of a run that ended."""
    result = json.loads((folder / "evaluation.json").read_text())
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]

    def change(name: str) -> float:
        return result[name]["tuned"] / result[name]["base"] - 1

    return {
        "likeness": result["judge_sim"]["tuned"],
        "gain": change("judge_sim"),
        "motion": change("motion"),
        "copying": change("copying"),
        "sharpness": change("sharpness"),
        # The first step compiles.
        "seconds": statistics.median(line["step_time_s"] for line in lines[1:] or lines),
        "alarms": sum(bool(line.get("alarm")) for line in lines),
    }


def point(name: str, runs: Sequence[dict[str, float]]) -> Point:
    """A row's figures over its seeds."""
    means = {key: statistics.fmean(run[key] for run in runs) for key in runs[0] if key != "alarms"}
    alarms = sum(int(run["alarms"]) for run in runs)
    return Point(name=name, settings=" ".join(flags(ROWS[name])), alarms=alarms, seeds=len(runs), **means)


def dominated(points: Sequence[Point]) -> set[str]:
    """Rows beside which another one wins no less likeness, keeps no less motion and takes no more time, and is better in one of
    these. Times that differ by less than `NOISE` count as the same.
    """

    def beats(a: Point, b: Point) -> bool:
        no_worse = a.likeness >= b.likeness and a.motion >= b.motion and a.seconds <= NOISE * b.seconds
        return no_worse and (a.likeness > b.likeness or a.motion > b.motion or NOISE * a.seconds < b.seconds)

    return {b.name for b in points if any(beats(a, b) for a in points)}


def table(points: Sequence[Point]) -> str:
    """Markdown, the greatest likeness first."""
    worse = dominated(points)
    lines = [
        "| row | settings | FaceSim, judge | gain | motion | copying | sharpness | s an update | alarms | |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for p in sorted(points, key=lambda p: -p.likeness):
        settings = f"`{p.settings}`" if p.settings else ""
        changes = " | ".join(f"{x:+.1%}" for x in (p.gain, p.motion, p.copying, p.sharpness))
        figures = f"{p.likeness:.3f} | {changes} | {p.seconds:.2f} | {p.alarms}"
        lines.append(f"| {p.name} | {settings} | {figures} | {'dominated' if p.name in worse else ''} |")
    return "\n".join(lines) + "\n"


def plot(points: Sequence[Point]) -> Figure:
    """Likeness against motion, each point with its row's name; those that are dominated are hollow."""
    worse = dominated(points)
    with rc_context(STYLE):
        figure = Figure((8.5, 7), layout="constrained")
        axes = figure.add_subplot()
        points = sorted(points, key=lambda p: p.likeness)
        for p in points:
            face = "none" if p.name in worse else TUNED
            axes.scatter(100 * p.motion, p.likeness, 30, edgecolors=TUNED, facecolors=face)
        axes.margins(x=0.12)
        axes.set_xlabel("change of motion, %")
        axes.set_ylabel("FaceSim by the judging embedder")
        axes.set_title("Held-out clips after training")
        # Where points lie on the page is known when the axes are.
        figure.draw_without_rendering()
        places = axes.transData.transform([(100 * p.motion, p.likeness) for p in points])
        taken = [Bbox.from_bounds(x - 5, y - 5, 10, 10) for x, y in places]
        for p in points:
            taken.append(_named(axes, p, taken))
    return figure


def _named(axes: Axes, p: Point, taken: Sequence[Bbox]) -> Bbox:
    """Writes a point's name beside it, where no other name and no point is if there is such a place; returns where."""
    places = [(x * d, y * d - 2) for d in (6, 14, 22) for x in (1, -1) for y in (1, -1, 0)]
    while True:
        offset = places.pop(0)
        name = axes.annotate(
            p.name, (100 * p.motion, p.likeness), offset, textcoords="offset points",
            fontsize=7, color=INK, horizontalalignment="left" if offset[0] > 0 else "right",
        )  # fmt: skip
        box = name.get_window_extent()
        if not places or not any(box.overlaps(other) for other in taken):
            return box
        name.remove()


def main() -> None:
    parser = argparse.ArgumentParser(prog="frontier", description=str(__doc__).split("\n")[0])
    parser.add_argument("--dir", type=Path, required=True, help="folder of the runs")
    parser.add_argument(
        "--page", type=Path, help="Markdown file to write, its plot beside it; else the table is printed"
    )
    parser.add_argument("--only", help="names of rows, separated by commas; all by default")
    parser.add_argument("--seeds", default="0", help="separated by commas")
    parser.add_argument("--shorter", default="", help="further flags of every run")
    args = parser.parse_args()
    names = args.only.split(",") if args.only else list(ROWS)
    for name in names:
        if name not in ROWS:
            parser.error(f"--only: {name}: expected some of {', '.join(ROWS)}")
    if not all(seed.isdigit() for seed in args.seeds.split(",")):
        parser.error(f"--seeds: {args.seeds}: expected whole numbers, separated by commas")
    seeds = [int(seed) for seed in args.seeds.split(",")]
    points = []
    for name in tqdm(names, desc="rows", disable=None):
        folders = [args.dir / f"{name.replace(' ', '_')}-{seed}" for seed in seeds]
        for seed, folder in zip(seeds, folders, strict=True):
            if not (folder / "evaluation.json").exists():
                train(folder, name, seed, args.dir / "cache", shlex.split(args.shorter))
        points.append(point(name, [read(folder) for folder in folders]))
    if args.page is None:
        print(table(points), end="")
        return
    picture = args.page.with_suffix(".svg")
    drawing = io.StringIO()
    with rc_context(STYLE):
        plot(points).savefig(drawing, format="svg", metadata={"Date": None})
    write_whole(picture, drawing.getvalue())
    asked = f" --only='{args.only}'" if args.only else ""
    head = f"# The frontier\n\nWritten by `python -m benchmarks.frontier{asked}`: "
    text = f"{head}the miniature with each row's settings beside its own, {len(seeds)} seed{'s' * (len(seeds) > 1)} each. Dominated rows (hollow in the plot) "
    text += "have another one beside them that wins no less likeness, keeps no less motion and takes no more time.\n\n"
    write_whole(args.page, f"{text}![likeness against motion]({picture.name})\n\n{table(points)}")
    print(f"{args.page}: {len(points)} rows")


if __name__ == "__main__":
    answer_libtpu()
    main()
