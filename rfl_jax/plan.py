"""Will it fit? `python -m rfl_jax.plan --config=FILE --topology=NAME [--json] [--search]`

Compiles the step of training for devices that need not be there: a TPU slice by its accelerator type (`v5p-8`) or
topology (`v5p:2x2x1`), or the devices of this machine (`local`). Exit status 0: it fits; 1: it does not; 2: bad input.
"""

import dataclasses
import json
import math
import sys
from collections.abc import Iterator
from typing import Any

import jax
from absl import flags

from rfl_jax import cli
from rfl_jax.config import Config
from rfl_jax.errors import UserError
from rfl_jax.planning.chips import GIB, devices_of
from rfl_jax.planning.compile import Report, plan_run
from rfl_jax.sharding import make_mesh


def changes(cfg: Config, devices: int) -> Iterator[tuple[dict[str, Any], Config]]:
    """Variants of a configuration that need less memory, as settings and as configuration: policies that keep less,
    more pieces of each sample. Meshes give every sample group at least one sample of the batch.
    """
    policies = [cfg.policy, *(p for p in ("save_attention", "full", "offload", "nested") if p != cfg.policy)]
    for context in (2**i for i in range(int(math.log2(devices)) + 1)):
        if devices % context:
            continue
        for policy in policies:
            mesh = dataclasses.replace(cfg.mesh, data=1, fsdp=devices // context, context=context)
            if cfg.train_batch_size % (mesh.fsdp * cfg.per_device_train_batch_size):
                continue
            changed = {"mesh.data": 1, "mesh.fsdp": mesh.fsdp, "mesh.context": context, "remat_policy": policy}
            yield changed, dataclasses.replace(cfg, mesh=mesh, remat_policy=policy)


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

    def gib(value: float | None) -> str:
        return "-" if value is None else f"{value / GIB:.2f} GiB"

    frames, height, width = report.video
    mesh = " x ".join(f"{axis} {n}" for axis, n in dataclasses.asdict(cfg.mesh).items())
    rows = [
        ("topology", f"{topology}, {report.devices} devices"),
        ("mesh, remat", f"{mesh}, {cfg.policy}"),
        ("video", f"{height}x{width}x{frames}, {report.samples} samples an update"),
        ("fits", "yes" if report.fits else "no"),
        ("weights", gib(report.weights)),
        ("optimizer", gib(report.optimizer)),
        ("batch", gib(report.batch)),
        ("activations", gib(report.activations)),
        ("peak", f"{gib(report.peak if report.peak is not None else report.needed)} of {gib(report.limit)}"),
        ("pinned host memory", gib(report.host)),
        ("model FLOPs", f"{report.model_flops / 1e12:,.0f} TFLOP an update"),
        ("executed FLOPs", f"{report.executed_flops / 1e12:,.0f} TFLOP an update"),
        *(
            (kind, f"{traffic.count:,} times, {traffic.bytes / GIB:.2f} GiB a device")
            for kind, traffic in report.traffic.items()
        ),
        ("update, at best", "-" if report.step_time_s is None else f"{report.step_time_s:.1f} s"),
        ("compiled in", f"{report.compile_s:.0f} s"),
        *(("large buffer", buffer) for buffer in report.largest),
    ]
    for name, value in rows:
        print(f"{name:20s}{value}")


def on_mesh(cfg: Config, devices: Any) -> tuple[Config, Report]:
    """The configuration with its mesh filled in, and what a step of it takes on these devices."""
    mesh = make_mesh(dataclasses.asdict(cfg.mesh), devices)
    cfg = dataclasses.replace(cfg, mesh=dataclasses.replace(cfg.mesh, **dict(mesh.shape)))
    samples = cfg.per_device_train_batch_size * mesh.shape["data"] * mesh.shape["fsdp"]
    if cfg.train_batch_size % (samples * cfg.gradient_accumulation_steps):
        raise UserError(
            f"config.train_batch_size: {cfg.train_batch_size} is no multiple of "
            f"{samples * cfg.gradient_accumulation_steps}, the samples that mesh {dict(mesh.shape)} takes at once"
        )
    return cfg, plan_run(cfg, mesh)


def main() -> None:
    cfg = cli.load_config(_CONFIG)
    topology = _TOPOLOGY.value
    if not topology:
        raise UserError("--topology: expected local, an accelerator type such as v5p-8, or a topology")
    devices = devices_of(topology)
    found: list[tuple[dict[str, Any], Config, Report]] = []
    if not _SEARCH.value:
        planned, report = on_mesh(cfg, devices)
        found.append(({}, planned, report))
    if _SEARCH.value or not found[0][2].fits:
        for changed, variant in changes(cfg, len(devices)):
            planned, report = on_mesh(variant, devices)
            print(f"tried {_flags(changed)}: {'fits' if report.fits else 'does not fit'}", file=sys.stderr)
            found.append((changed, planned, report))
            if report.fits and not _SEARCH.value:
                break
    fitting = [entry for entry in found if entry[2].fits]
    best = min(fitting, key=lambda entry: entry[2].step_time_s or entry[2].executed_flops, default=None)
    chosen = best if _SEARCH.value and best else found[0]
    change = None if best is None or (chosen is best and not _SEARCH.value) else _flags(best[0])
    if _JSON.value:
        print(json.dumps(as_json(chosen[1], chosen[2], topology) | {"change": change}))
    else:
        show(chosen[1], chosen[2], topology)
        if change is not None:
            print(f"{'fastest that fits' if _SEARCH.value else 'fits with':20s}{change}")
    sys.exit(0 if chosen[2].fits else 1)


def _flags(changed: dict[str, Any]) -> str:
    return " ".join(f"--config.{key}={value}" for key, value in changed.items())


if __name__ == "__main__":
    _CONFIG = cli.define_config()
    _TOPOLOGY = flags.DEFINE_string("topology", None, "TPU accelerator type or topology, or local.")
    _JSON = flags.DEFINE_boolean("json", False, "Print one JSON object.")
    _SEARCH = flags.DEFINE_boolean("search", False, "Try meshes and policies, and print the fastest that fits.")
    cli.run(main, "plan")
