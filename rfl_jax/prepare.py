"""Prepares a run's clips and their frozen prefix ahead of training: `python -m rfl_jax.prepare --config=FILE --workdir=DIR`.

Training does the same before its first step; clips that are prepared already are taken from the cache.
"""

import sys

from absl import flags

from rfl_jax import cli
from rfl_jax.hosts import is_writer
from rfl_jax.runs import RunFolder
from rfl_jax.terminal import command_line, tell_next
from rfl_jax.training.inputs import cache_of, prepare_inputs


def main() -> None:
    cfg = cli.load_config(_CONFIG)
    folder = RunFolder(cli.open_workdir(_WORKDIR.value))
    clips = prepare_inputs(cfg, folder).clips
    if is_writer():
        print(f"{len(clips.training)} clips, {len(clips.held_out)} held out, in {cache_of(cfg, folder)}")
        tell_next(command_line("rfl_jax.train", sys.argv[1:]))


if __name__ == "__main__":
    _CONFIG = cli.define_config()
    cli.define_distributed()
    _WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run.")
    cli.run(main, "prepare")
