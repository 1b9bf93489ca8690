"""Reward feedback learning: `python -m rfl_jax.train --config=FILE --workdir=DIR`. The same command resumes."""

import sys

from absl import flags

from rfl_jax import cli
from rfl_jax.evaluate import evaluate, show
from rfl_jax.hosts import is_writer
from rfl_jax.training.export import export_adapters
from rfl_jax.training.loop import train
from rfl_jax.training.metrics import check_wandb
from rfl_jax.training.setup import set_up


def main() -> None:
    cfg = cli.load_config(_CONFIG)
    check_wandb(cfg)
    if cfg.eval_every and not cfg.validates:
        print("config.eval_every: no validation, as eval.file_name names no held-out clips", file=sys.stderr)
    workdir = cli.open_workdir(_WORKDIR.value)
    run = set_up(cfg, workdir)
    trained = train(run, workdir)
    if not trained.finished:
        print(f"stopped; the same command goes on from here ({workdir})", file=sys.stderr)
        sys.exit(130)
    files = export_adapters(run, trained.state, workdir)
    result = evaluate(run, trained.state, workdir, trained.held_out) if cfg.eval.file_name else None
    if not is_writer():
        return
    if result:
        show(result)
    if trained.step < run.steps:
        print(f"ended at step {trained.step}: {cfg.early_stop} validations brought nothing better (config.early_stop)")
    for line in trained.alarms:
        print(f"ALARM at {line}")
    if trained.best_step is not None:
        print(f"best validation: step {trained.best_step} ({workdir / 'best'}/, --step=best)")
    for file in files:
        print(f"adapters: {file}")
    print(f"run: {workdir} (metrics.jsonl, samples/, checkpoints/{', evaluation.json' if result else ''})")
    print(f"next: python -m rfl_jax.report {workdir} -o report.html")


if __name__ == "__main__":
    _CONFIG = cli.define_config()
    cli.define_distributed()
    _WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run: config, metrics, samples, checkpoints.")
    cli.run(main, "train")
