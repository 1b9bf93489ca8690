"""Prepares a run's clips and their frozen prefix ahead of training: `python -m rfl_jax.prepare --config=FILE --workdir=DIR`.

Training does the same before its first step; clips that are prepared already are taken from the cache.
"""

from absl import flags

from rfl_jax import cli
from rfl_jax.training.setup import cache_folder, prepare_run


def main() -> None:
    cfg = cli.load_config(_CONFIG)
    workdir = cli.open_workdir(_WORKDIR.value)
    ready = prepare_run(cfg, workdir)
    print(f"{len(ready.prepared)} clips, {len(ready.held_out)} held out, in {cache_folder(cfg, workdir)}")


if __name__ == "__main__":
    _CONFIG = cli.define_config()
    cli.define_distributed()
    _WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run.")
    cli.run(main, "prepare")
