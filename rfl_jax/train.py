"""Reward feedback learning: `python -m rfl_jax.train --config=FILE --workdir=DIR`. The same command resumes."""

import sys

from absl import flags

from rfl_jax import cli
from rfl_jax.config import Config
from rfl_jax.evaluation.evaluate import evaluate, show
from rfl_jax.hosts import is_writer
from rfl_jax.runs import RunFolder
from rfl_jax.terminal import RED, command_line, styled, tell_next
from rfl_jax.training.actions import told
from rfl_jax.training.changes import check_settings
from rfl_jax.training.export import export_adapters
from rfl_jax.training.lock import Lock
from rfl_jax.training.loop import train
from rfl_jax.training.record import check_wandb
from rfl_jax.training.setup import set_up


def main() -> None:
    cfg = cli.load_config(_CONFIG)
    check_wandb(cfg)
    if cfg.eval_every and not cfg.validates:
        print("config.eval_every: no validation, as eval.file_name names no held-out clips", file=sys.stderr)
    folder = RunFolder(cli.open_workdir(_WORKDIR.value))
    with Lock(folder) as lock:
        _train(cfg, folder, lock)


def _train(cfg: Config, folder: RunFolder, lock: Lock) -> None:
    changed = check_settings(cfg, folder)
    if changed and is_writer():
        print(changed, file=sys.stderr)
    run = set_up(cfg, folder)
    trained = train(run, folder, lock)
    if not trained.finished:
        print(f"stopped; the same command goes on from here ({folder})", file=sys.stderr)
        if is_writer():
            tell_next(command_line("rfl_jax.train", sys.argv[1:]))
        sys.exit(130)
    params = trained.state.tuned
    files = export_adapters(run, params, folder)
    result = None
    if cfg.eval.file_name:
        held_out = trained.validation.held_out if trained.validation else run.open_held_out()
        result = evaluate(
            held_out, {"base": held_out.untrained(params), "tuned": params}, folder, trained.step, trained.state.weights
        )
    if not is_writer():
        return
    if result:
        show(result)
    if trained.validation:
        if trained.step < run.inputs.steps:
            print(f"ended at step {trained.step}: {trained.validation.end}")
        for entry in trained.validation.entries:
            if entry["alarm"]:
                print(styled(f"ALARM at step {entry['step']}: {told(entry)}", RED, sys.stdout))
        if trained.validation.best_step is not None:
            print(f"best validation: step {trained.validation.best_step} ({folder.best}/, --step=best)")
    for file in files:
        print(f"adapters: {file}")
    print(f"run: {folder} (metrics.jsonl, samples/, checkpoints/{', evaluation.json' if result else ''})")
    tell_next(command_line("rfl_jax.report", [str(folder), "-o", "report.html"]))


if __name__ == "__main__":
    _CONFIG = cli.define_config()
    cli.define_distributed()
    _WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run: config, metrics, samples, checkpoints.")
    cli.run(main, "train")
