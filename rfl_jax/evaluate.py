"""Before and after, on clips that were held out, judged by a network that was not the reward.

`python -m rfl_jax.evaluate --workdir=RUN [--data=FILE.csv] [--step=best] [--raw]` writes RUN/evaluation.json and RUN/evaluation/.

`python -m rfl_jax.evaluate --workdir=RUN --export=vbench-i2v --dst=DIR` evaluates nothing: it lays what was written out for the
scripts of VBench-I2V, or with `--export=opens2v` for those of OpenS2V-Eval.
"""

import dataclasses

from absl import flags
from etils import epath
from ml_collections import ConfigDict

from rfl_jax import cli
from rfl_jax.config import parse
from rfl_jax.errors import UserError
from rfl_jax.evaluation import layouts
from rfl_jax.evaluation.evaluate import evaluate, show
from rfl_jax.hosts import is_writer
from rfl_jax.runs import BEST, RunFolder, find_checkpoint, takes_average
from rfl_jax.terminal import command_line, tell_next
from rfl_jax.training.checkpoint import Checkpoints
from rfl_jax.training.setup import set_up


def main() -> None:
    folder = RunFolder(epath.Path(_WORKDIR.value or ""))
    if not _WORKDIR.value or not folder.exists():
        raise UserError(f"--workdir: {_WORKDIR.value}: expected the folder of a run, with its {folder.config.name}")
    if _EXPORT.value:
        _export(folder)
        return
    if _DST.value or _NAMES.value:
        raise UserError(f"--{'dst' if _DST.value else 'names'}: of --export only")
    values = folder.read_config()
    if _DATA.value:
        values["eval"]["file_name"] = _DATA.value
    cfg = parse(ConfigDict(values))
    if not cfg.eval.file_name:
        raise UserError("--data: expected a csv of held-out clips, as the run's config names none")
    checkpoint = find_checkpoint(folder, _STEP.value)
    averaged = takes_average(checkpoint, raw=_RAW.value)
    run = set_up(cfg, folder)
    with Checkpoints(checkpoint.parent) as checkpoints:
        state, _, _ = checkpoints.restore(int(checkpoint.name), run.state)
    held_out = run.open_held_out()
    if not averaged:
        state = dataclasses.replace(state, average={})
    params = {"base": held_out.untrained(state.tuned), "tuned": state.tuned}
    result = evaluate(held_out, params, folder, int(checkpoint.name), state.weights)
    if is_writer():
        show(result)
        print(f"written: {folder.evaluation}, {folder.evaluation_files}/")
        _tell_report(folder)


def _export(folder: RunFolder) -> None:
    # No device is asked for: another process may have them.
    for name, given in (
        ("data", _DATA.value),
        ("step", _STEP.value),
        ("raw", _RAW.value),
        ("distributed", _DISTRIBUTED.value),
    ):
        if given:
            raise UserError(f"--{name}: not with --export, which takes the evaluation that is there")
    if not _DST.value:
        raise UserError("--dst: expected a folder to write to")
    dst = epath.Path(_DST.value)
    command = layouts.export(folder, _EXPORT.value, dst, _NAMES.value)
    print(f"written: {dst}/; in a clone of {layouts.BENCHMARKS[_EXPORT.value].repository}:\n{command}")
    _tell_report(folder)


def _tell_report(folder: RunFolder) -> None:
    tell_next(command_line("rfl_jax.report", [str(folder), "-o", "report.html"]))


if __name__ == "__main__":
    _WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run.")
    _DISTRIBUTED = cli.define_distributed()
    _DATA = flags.DEFINE_string("data", None, "csv of held-out clips; default: the run's eval.file_name.")
    _STEP = flags.DEFINE_string("step", "", f"Checkpoint: a number, or {BEST}; default: the last.")
    _RAW = flags.DEFINE_boolean("raw", False, "The weights themselves, where the run keeps their average (ema.decay).")
    _EXPORT = flags.DEFINE_string("export", "", f"Lays the evaluation out for {' or '.join(layouts.BENCHMARKS)}.")
    _DST = flags.DEFINE_string("dst", "", "With --export: a new or empty folder.")
    _NAMES = flags.DEFINE_string("names", "", f"With --export=vbench-i2v: {' or '.join(layouts.NAMINGS)}.")
    cli.run(main, "evaluate")
