"""The page of a run: numbers, plots and videos in one file that needs nothing else."""

import itertools
import json
import secrets
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

import jinja2

from rfl_jax.config import Config, plain
from rfl_jax.errors import refuse_damage
from rfl_jax.evaluation import plots
from rfl_jax.evaluation.measures import measures_of
from rfl_jax.networks.terms import shown_as
from rfl_jax.reporting.collect import Run, changed, embed
from rfl_jax.rewards.terms import FACE
from rfl_jax.training.actions import told

WAYS = ("reference", "base", "tuned")
TITLES = {"reference": "real clip", "base": "before", "tuned": "after"}
# What the page opens with.
RANKS = ("gains most", "gains least")
# Samples of training on the page of a run that is not evaluated yet.
LAST_SAMPLES = 3


def render(run: Run, *, most: int) -> str:
    """The page as HTML.

    Args:
        run: as it is now.
        most: clips shown: the one that training helped most, then those that it helped least.

    Raises:
        UserError: its files do not say what a run writes there, or name a video that is not there.
    """
    with refuse_damage(
        f"{run.folder}: expected run.json, metrics.jsonl, validation.json and evaluation.json as it wrote them"
    ):
        return _render(run, most)


def _render(run: Run, most: int) -> str:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("rfl_jax.reporting", "."), autoescape=True, undefined=jinja2.StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    # Only what carries it runs or styles: whatever a name or a prompt smuggles in does not know it.
    nonce = secrets.token_urlsafe(16)
    return environment.get_template("page.html.j2").render(
        run=run,
        nonce=nonce,
        name=run.folder.path.name,
        made=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        done=run.steps >= run.total > 0,
        told=told,
        alarms=[entry for entry in (run.validation or {}).get("validations", []) if entry["alarm"]],
        measures=_measures(run),
        charts=[(title, drawing.replace("<style ", f'<style nonce="{nonce}" ')) for title, drawing in _charts(run)],
        clips=_clips(run, most),
        clips_in_all=len(run.evaluation["clips"]) if run.evaluation else 0,
        samples=[] if run.evaluation else _samples(run),
        titles=TITLES,
        settings=changed(run.config, plain(Config())),
        about=run.about,
        judged=(run.evaluation or {}).get("weights"),
        profile=run.profile,
    )


def _terms(run: Run) -> list[str]:
    """Names of the reward's terms besides the face's, which is shown in any case."""
    terms = run.config["reward"].get("terms", {})
    return [name for name, term in terms.items() if term["type"] != FACE]


def _measures(run: Run) -> list[dict[str, Any]]:
    """Rows of the table: the numbers of evaluation.json."""
    if not run.evaluation:
        return []
    rows = []
    for name, measure in measures_of(run.evaluation).items():
        base, tuned = (run.evaluation[name][way] for way in ("base", "tuned"))
        change = tuned - base
        rows.append(
            {
                "name": name,
                "title": measure.title,
                "unit": measure.unit,
                "better": measure.better,
                "base": base,
                "tuned": tuned,
                "change": change,
                "verdict": verdict(measure.better, run.evaluation["statistics"][name]["change"]),
                **{f"{way}_interval": run.evaluation["statistics"][name][way] for way in ("base", "tuned", "change")},
                **{key: run.evaluation["statistics"][name][key] for key in ("rose", "fell", "p")},
            }
        )
    return rows


def verdict(better: str, interval: Sequence[float] | None) -> str:
    """The colour of a change: "good" or "bad" where its interval leaves out zero, none where it may be chance."""
    if interval is None or interval[0] <= 0 <= interval[1] or better not in ("higher", "lower"):
        return ""
    return "good" if (interval[0] > 0) == (better == "higher") else "bad"


def _charts(run: Run) -> list[tuple[str, str]]:
    """Titles and drawings."""
    drawn = []

    def course(title: str, key: str, marks: str = "", log: bool = False) -> None:
        lines = [line for line in run.lines if line.get(key) is not None]
        if not lines:
            return
        held_out = {line["step"]: line[marks] for line in run.lines if marks and line.get(marks) is not None}
        figure = plots.course_figure(
            title, [line["step"] for line in lines], [line[key] for line in lines], held_out, log=log
        )
        drawn.append((title, figure))

    def validated(title: str, key: str) -> None:
        lines = [line for line in run.lines if line.get(key) is not None]
        base = (run.validation or {}).get("base")
        if lines:
            steps, values = [line["step"] for line in lines], [line[key] for line in lines]
            if base:
                steps, values = [0, *steps], [base[key.removeprefix("eval_")], *values]
            drawn.append((title, plots.validation_figure(title, steps, values)))

    if run.evaluation:
        drawn.append(("identity from frame to frame", plots.drift_figure(run.evaluation)))
        drawn.append(("change by training", plots.bar_figure(run.evaluation)))
    course("reward: face similarity", "face_score", "eval_face_sim")
    settings = run.config["reward"].get("terms", {})
    for name in _terms(run):
        shown = shown_as(name)
        if settings.get(name, {}).get("against") == "untrained":
            # Validations compare with the real clip: the two scores are not to be read on one axis.
            course(f"reward: {name}, against the untrained", shown)
            validated(f"held out: {name}, against the real clip", f"eval_{shown}")
        else:
            course(f"reward: {name}", shown, f"eval_{shown}")
        course(f"mean that {name} holds: distance", f"{shown}/drift")
        course(f"mean that {name} holds: push", f"{shown}/push")
    validated("held out: judging embedder", "eval_judge_sim")
    validated("held out: motion, px", "eval_motion")
    validated("held out: copying of the first frame", "eval_copying")
    course("loss", "loss")
    course("KL to the untrained network", "kl_loss", log=True)
    course("weight of the KL, by its budget", "kl_weight", log=True)
    course("real-data loss", "real_loss")
    course("samples at the ceiling of the reward", "ceiling_fraction")
    course("share of the reward that is left for motion and copying", "reward_share")
    course("gradient norm", "grad_norm", log=True)
    course("learning rate", "learning_rate")
    course("samples without a face", "no_face_fraction")
    course("seconds a step", "step_time_s")
    course("MFU", "mfu")
    if run.profile:
        drawn.append(("time of a step by phase", plots.phases_figure(run.profile["phases"])))
    return [(title, plots.svg(figure, title)) for title, figure in drawn]


def _clips(run: Run, most: int) -> list[dict[str, Any]]:
    """Clips with their videos: the one that the judging embedder sees gain most, then from the one that gains least on."""
    if not run.evaluation:
        return []

    def gain(clip: dict[str, Any]) -> float:
        return clip["tuned"]["judge_sim"] - clip["base"]["judge_sim"]

    chosen = sorted(run.evaluation["clips"], key=gain)
    chosen = (chosen[-1:] + chosen[:-1])[:most]
    clips = []
    for clip, rank in zip(chosen, itertools.chain(RANKS, itertools.repeat("")), strict=False):
        values = [value for way in WAYS for value in clip[way]["frames"]["judge_sim"] if value is not None]
        low, high = min(values, default=0.0), max(values, default=1.0)
        videos = [
            {
                "way": way,
                "label": f"{clip['video']}, {TITLES[way]}",
                "video": embed(run.evaluation_video(clip[way]["file"])),
                "frames": json.dumps({"judge_sim": clip[way]["frames"]["judge_sim"], "boxes": boxes_of(clip[way])}),
                "people": len(boxes_of(clip[way])),
                "curve": curve(clip[way]["frames"]["judge_sim"], low, high),
                "measures": {k: clip[way].get(k) for k in ("face_sim", "judge_sim", "motion", "copying")},
                "terms": {k: clip[way][shown_as(k)] for k in _terms(run) if shown_as(k) in clip[way]},
            }
            for way in WAYS
        ]
        clips.append(
            {
                "video": clip["video"], "prompt": clip["prompt"], "gain": gain(clip), "rank": rank, "videos": videos,
                "frames": len(clip["reference"]["frames"]["judge_sim"]), "low": low, "high": high,
                "people": list(zip(*([one["judge_sim"] for one in clip[way].get("people", [])] for way in WAYS[1:]), strict=True)),
                "swaps": [clip[way].get("swaps", 0) for way in WAYS[1:]],
            }
        )  # fmt: skip
    return clips


def _samples(run: Run) -> list[dict[str, Any]]:
    """The last videos that training wrote."""
    return [
        {"way": "", "label": file.name, "video": embed(file), "frames": "", "people": 0}
        for file in run.samples[-LAST_SAMPLES:]
    ]


def boxes_of(video: Mapping[str, Any]) -> list[list[Any]]:
    """Boxes by frame of each person of a clip with several, else of the largest face."""
    return [one["boxes"] for one in video["people"]] if "people" in video else [video["frames"]["box"]]


def curve(values: Sequence[float | None], low: float, high: float) -> str:
    """The path of values by frame in an SVG, frame t at x = t, high at y = 0 and low at y = 100; broken where there is none."""
    path, broken = "", True
    for frame, value in enumerate(values):
        if value is not None:
            y = 100 * (high - value) / (high - low or 1.0)
            # A frame between two without a face is a dot: a line of no length, whose ends are round.
            path += f"{'M' if broken else 'L'}{frame} {y:.1f}" + ("h0" if broken else "")
        broken = value is None
    return path
