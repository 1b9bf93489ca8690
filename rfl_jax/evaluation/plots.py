"""Plots of an evaluation and of a run's course, for files and for the report's page."""

import functools
import io
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ParamSpec

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from rfl_jax.evaluation.measures import MEASURES, measures_of

BASE, TUNED, INK, GRID = "#8a93a3", "#0b6e99", "#1f2733", "#e3e7ec"
COLOURS = {"base": BASE, "tuned": TUNED}
STYLE: dict[Any, Any] = {
    "font.family": "sans-serif", "font.sans-serif": ["DejaVu Sans"], "font.size": 9,
    "axes.edgecolor": GRID, "axes.labelcolor": INK, "text.color": INK,
    "xtick.color": INK, "ytick.color": INK, "axes.grid": True, "grid.color": GRID, "axes.axisbelow": True,
    "axes.spines.top": False, "axes.spines.right": False, "svg.fonttype": "none", "legend.frameon": False,
    "axes.titlesize": 10, "axes.titleweight": "bold", "axes.titlelocation": "left", "svg.hashsalt": "rfl_jax",
}  # fmt: skip


P = ParamSpec("P")


def _styled(draw: Callable[P, Figure]) -> Callable[P, Figure]:
    """Lets a function draw in `STYLE`."""

    @functools.wraps(draw)
    def styled(*args: P.args, **options: P.kwargs) -> Figure:
        with rc_context(STYLE):
            return draw(*args, **options)

    return styled


def _axes(width: float = 4.6, height: float = 2.7) -> tuple[Figure, Axes]:
    figure = Figure((width, height), layout="constrained")
    return figure, figure.add_subplot()


def png(figure: Figure) -> bytes:
    """The figure as a PNG file."""
    buffer = io.BytesIO()
    with rc_context(STYLE):
        figure.savefig(buffer, format="png", dpi=160)
    return buffer.getvalue()


def svg(figure: Figure, label: str) -> str:
    """The figure as an `<svg>` element that fills the width it is given.

    Args:
        figure: to be drawn.
        label: what it shows, for those who cannot see it.
    """
    buffer = io.StringIO()
    with rc_context(STYLE):
        figure.savefig(buffer, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    text = buffer.getvalue()
    body = text[text.index("<svg") :]
    head, rest = body.split(">", 1)
    box = next(part for part in head.split(" ") if part.startswith("viewBox"))
    start = head.index(box)
    view = head[start : head.index('"', start + len('viewBox="')) + 1]
    return f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" {view} role="img" aria-label="{label}">{rest}'


@_styled
def drift_figure(result: Mapping[str, Any], measure: str = "judge_sim") -> Figure:
    """Similarity to the real face from frame to frame, mean and 95 % band of the mean over clips."""
    figure, axes = _axes()
    for name, colour in COLOURS.items():
        mean = np.array([np.nan if x is None else x for x in result["drift"][measure][name]], float)
        curves = np.full((len(result["clips"]), len(mean)), np.nan)
        for row, clip in zip(curves, result["clips"], strict=True):
            values = clip[name]["frames"][measure]
            row[: len(values)] = [np.nan if x is None else x for x in values]
        counts = np.maximum((~np.isnan(curves)).sum(0), 1)
        squares = np.nansum((curves - mean) ** 2, 0) / counts
        error = 1.96 * np.sqrt(squares / counts)
        frames = np.arange(len(mean))
        axes.fill_between(frames, mean - error, mean + error, color=colour, alpha=0.15, linewidth=0)
        axes.plot(frames, mean, color=colour, label=name, marker="o" if len(mean) < 12 else "", markersize=3)
    axes.set_title("identity from frame to frame")
    axes.set_xlabel("frame")
    axes.set_ylabel(MEASURES[measure].title, fontsize=8)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend(loc="best")
    return figure


@_styled
def bar_figure(result: Mapping[str, Any]) -> Figure:
    """Every measure after training, relative to before, with the interval of the change."""
    figure, axes = _axes(4.6, 3.2)
    names = [name for name in measures_of(result) if result[name]["base"]]
    changes = [100 * (result[name]["tuned"] / result[name]["base"] - 1) for name in names]
    for row, (name, change) in enumerate(zip(names, changes, strict=True)):
        bounds = result["statistics"][name]["change"]
        axes.barh(row, change, color=TUNED, height=0.6)
        if bounds:
            low, high = (100 * x / result[name]["base"] for x in bounds)
            axes.plot([low, high], [row, row], color=INK, linewidth=1.2)
    axes.set_yticks(range(len(names)), [name.replace("_", " ") for name in names])
    axes.invert_yaxis()
    axes.axvline(0, color=INK, linewidth=0.8)
    axes.set_title("change by training, %")
    return figure


@_styled
def course_figure(
    title: str,
    steps: Sequence[int],
    values: Sequence[float],
    marks: Mapping[int, float] | None = None,
    log: bool = False,
) -> Figure:
    """A metric over the steps of training: every step, and a running mean over a twentieth of them.

    Args:
        title: of the plot.
        steps, values: of training.
        marks: values of the validation, by step.
        log: whether the axis is logarithmic.
    """
    figure, axes = _axes()
    axes.plot(steps, values, color=BASE, linewidth=0.8, alpha=0.6)
    axes.plot(steps, smooth(values), color=TUNED, linewidth=1.6, label="training")
    if marks:
        axes.plot(
            list(marks), list(marks.values()), color="#b4540a", marker="o", markersize=4, linewidth=1, label="held out"
        )
        axes.legend(loc="best")
    if log and min(values) > 0:
        axes.set_yscale("log")
    axes.set_title(title)
    axes.set_xlabel("step")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    return figure


@_styled
def validation_figure(title: str, steps: Sequence[int], values: Sequence[float]) -> Figure:
    """A measure of the validations over the steps of training."""
    figure, axes = _axes()
    axes.axhline(values[0], color=BASE, linewidth=0.8, linestyle="--")
    axes.plot(steps, values, color="#b4540a", marker="o", markersize=4)
    axes.set_title(title)
    axes.set_xlabel("step")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    return figure


def smooth(values: Sequence[float]) -> list[float]:
    """Exponential mean over about a twentieth of the values, without the pull of its start."""
    rate = 1 / max(1.0, len(values) / 20)
    total = weight = 0.0
    found = []
    for value in values:
        total, weight = (1 - rate) * total + rate * value, (1 - rate) * weight + rate
        found.append(total / weight)
    return found


@_styled
def phases_figure(phases: Mapping[str, float]) -> Figure:
    """Seconds of a step by phase."""
    figure, axes = _axes(4.6, 2.4)
    names = list(phases)
    axes.barh(range(len(names)), list(phases.values()), color=TUNED, height=0.6)
    for row, seconds in enumerate(phases.values()):
        axes.text(seconds, row, f" {seconds:.2f} s", va="center", fontsize=8)
    axes.set_yticks(range(len(names)), names)
    axes.margins(x=0.15)
    axes.invert_yaxis()
    axes.set_title("time of a step by phase")
    axes.set_xlabel("seconds")
    return figure
