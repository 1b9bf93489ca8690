"""Will it fit? `python -m rfl_jax.plan --config=FILE --topology=NAME [--json] [--search] [--predict]`

Compiles the step of training for devices that need not be there: a TPU slice by its accelerator type (`v5p-8`) or
topology (`v5p:2x2x1`), or the devices of this machine (`local`). Exit status 0: it fits; 1: it does not; 2: bad input.
"""

import dataclasses
import json
import math
import sys
from collections.abc import Sequence
from typing import Any

import jax
from absl import flags

from rfl_jax import cli
from rfl_jax.chips import GIB, devices_of
from rfl_jax.config import Config
from rfl_jax.errors import UserError
from rfl_jax.planning.abstract import make_plan, on_devices
from rfl_jax.planning.compile import LEAST, MORE_MEMORY, Report, compile_plan
from rfl_jax.planning.predict import KINDS, Prediction, check_predictable
from rfl_jax.planning.search import PREDICTED, Tried, predicted, walk
from rfl_jax.terminal import chosen_flags, command_line, tell_next


def as_json(cfg: Config, report: Report, topology: str) -> dict[str, Any]:
    """The object that `--json` prints."""
    return {
        "topology": topology,
        "preset": cfg.preset,
        "mesh": dataclasses.asdict(cfg.mesh),
        "remat_policy": cfg.policy,
        **dataclasses.asdict(report),
        "jax": jax.__version__,
    }


def show(cfg: Config, report: Report, topology: str) -> None:
    """The table on the terminal."""

    def gib(value: int | float | None) -> str:
        return "-" if value is None else f"{value / GIB:.2f} GiB"

    frames, height, width = report.video
    hint = "" if report.predicted else "; --predict predicts"
    mesh = " x ".join(f"{axis} {n}" for axis, n in dataclasses.asdict(cfg.mesh).items())
    rows = [
        ("topology", f"{topology}, {report.devices} devices"),
        ("mesh, remat", f"{mesh}, {cfg.policy}"),
        ("video", f"{height}x{width}x{frames}, {report.samples} samples an update"),
        ("fits", _verdict(report)),
        ("weights", gib(report.weights)),
        ("optimizer", gib(report.optimizer)),
        ("batch", gib(report.batch)),
        ("activations", gib(report.activations)),
        ("peak", f"{gib(report.peak if report.peak is not None else report.needed)} of {gib(report.limit)}"),
        ("pinned host memory", gib(report.host)),
        ("model FLOPs", f"{report.model_flops / 1e12:,.0f} TFLOP an update"),
        ("executed FLOPs", f"{report.executed_flops / 1e12:,.0f} TFLOP an update"),
        *((f"  {name}", f"{flops / 1e12:,.3g} TFLOP of them") for name, flops in report.term_flops.items()),
        *(
            (kind, f"{traffic.count:,} times, {traffic.bytes / GIB:.2f} GiB a device")
            for kind, traffic in report.traffic.items()
        ),
        ("update, at best", "-" if report.step_time_s is None else f"{report.step_time_s:.1f} s, a lower bound{hint}"),
        *_predicted_rows(report.predicted),
        ("compiled in", f"{report.compile_s:.0f} s"),
        *(("large buffer", buffer) for buffer in report.largest),
    ]
    for name, value in rows:
        print(f"{name:20s}{value}")


def _verdict(report: Report) -> str:
    if not report.fits:
        return "no"
    peak, limit = report.peak or 0, report.limit or math.inf
    if report.predicted is None and peak * (1 + MORE_MEMORY) > limit:
        return "narrowly: as training compiles it may need a tenth more, which --predict tells"
    return "yes"


def _predicted_rows(predicted: Prediction | None) -> list[tuple[str, str]]:
    if predicted is None:
        return []

    def told(seconds: float) -> str:
        return f"{seconds:.2f} s" if seconds >= 1 else f"{seconds * 1e3:.3g} ms"

    rows = [("update, predicted", f"{told(predicted.seconds)}, {predicted.mfu:.1%} MFU")]
    for phase, passes in predicted.phases.items():
        by_pass = ", ".join(f"{passed} {told(seconds)}" for passed, seconds in passes.items())
        rows.append((f"  {phase}", told(sum(passes.values())) + (f": {by_pass}" if len(passes) > 1 else "")))
    for part in predicted.largest:
        share = part.seconds / predicted.seconds
        rows.append(("takes most", f"{share:.0%}: {part.phase}, {part.passed}, {KINDS[part.kind]}"))
    rows.append(("beside other work", f"{told(predicted.hidden)} of collectives and copies"))
    return rows + [("not in it", note) for note in predicted.notes]


def main() -> None:
    cfg = cli.load_config(_CONFIG)
    topology = _TOPOLOGY.value
    if not topology:
        raise UserError("--topology: expected local, an accelerator type such as v5p-8, or a topology")
    devices = devices_of(topology)
    if _PREDICT.value:
        check_predictable(topology, devices)
        notice = "--predict compiles as training does: A14B takes 10 to 20 minutes of one processor for each variant"
        print(notice, file=sys.stderr, flush=True)
    tried = _try(cfg, devices)
    if not tried:
        raise UserError(
            f"config.train_batch_size: {cfg.train_batch_size} fills no mesh of the {len(devices)} devices of {topology}"
        )
    fitting = [entry for entry in tried if entry.report.fits]
    best = min(fitting, key=lambda entry: entry.report.seconds_a_sample, default=None)
    shown = best if _SEARCH.value and best else tried[0]
    change = None if best is None else _flags(best.changes)
    if _JSON.value:
        # What would have to change; nothing where the configuration fits as it is, null where nothing does.
        told = {} if change == "" else {"change": change}
        print(json.dumps(as_json(shown.cfg, shown.report, topology) | told))
    else:
        show(shown.cfg, shown.report, topology)
        if change:
            print(f"{'fastest that fits' if _SEARCH.value else 'fits with':20s}{change}")
        if best is None:
            print(f"{'fits with':20s}none of {len(tried)} variants")
        tell_next(next_command(sys.argv[1:], None if best is None else best.changes))
    sys.exit(0 if shown.report.fits else 1)


def next_command(arguments: Sequence[str], changes: dict[str, Any] | None) -> str:
    """Training with the changes that make it fit; where none do the same question of another topology."""
    if changes is None:
        return command_line("rfl_jax.plan", [*chosen_flags(arguments, lambda n: n != "topology"), "--topology=LARGER"])
    kept = chosen_flags(arguments, lambda name: name not in ("topology", "search", "predict"))
    # What fits comes last, and so counts.
    return command_line("rfl_jax.train", [*kept, *_changes(changes), "--workdir=DIR"])


def _try(cfg: Config, devices: Sequence[Any]) -> list[Tried]:
    """The configuration, and variants where it does not fit or a search is wanted."""
    search, predicting = _SEARCH.value, _PREDICT.value
    tried: list[Tried] = []
    if not search:
        planned, mesh = on_devices(cfg, devices)
        effort = None if predicting else LEAST
        report = compile_plan(planned, make_plan(planned, mesh), effort=effort, predicting=predicting)
        tried.append(Tried({}, planned, report))
    if search or not tried[0].report.fits:
        for entry in walk(cfg, devices, fastest=search, wanted=PREDICTED if predicting else 1):
            _tell(entry)
            tried.append(entry)
    if search and predicting and any(entry.report.fits for entry in tried):
        fitting, tried = tried, []
        for entry in predicted(fitting, devices):
            _tell(entry)
            tried.append(entry)
    return tried


def _tell(entry: Tried) -> None:
    print(f"tried {_flags(entry.changes)}: {_outcome(entry.report)}", file=sys.stderr, flush=True)


def _outcome(report: Report) -> str:
    if report.predicted:
        return f"fits, {report.predicted.seconds:.2f} s predicted" if report.fits else "does not fit"
    if report.fits:
        return "fits"
    return "does not fit" if report.compile_s else f"does not fit, needs {(report.needed or 0) / GIB:.1f} GiB at least"


def _changes(changed: dict[str, Any]) -> list[str]:
    return [f"--config.{key}={value}" for key, value in changed.items()]


def _flags(changed: dict[str, Any]) -> str:
    return " ".join(_changes(changed))


if __name__ == "__main__":
    _CONFIG = cli.define_config()
    _TOPOLOGY = flags.DEFINE_string("topology", None, "TPU accelerator type or topology, or local.")
    _JSON = flags.DEFINE_boolean("json", False, "Print one JSON object.")
    _SEARCH = flags.DEFINE_boolean("search", False, "Try meshes and policies, and print the fastest that fits.")
    _PREDICT = flags.DEFINE_boolean(
        "predict", False, "Compile as training does, for long, and predict an update's time."
    )
    cli.run(main, "plan")
