"""Prepares a run's clips ahead of training: `python -m rfl_jax.prepare --config=FILE --workdir=DIR`.

Training does the same before its first step; clips that are prepared already are taken from the cache.
"""

from absl import flags

from rfl_jax import cli
from rfl_jax.data.metadata import read_metadata
from rfl_jax.data.prepare import Encoders, prepare
from rfl_jax.sources import find_sources
from rfl_jax.training.setup import cache_folder, experts_of


def main() -> None:
    cfg = cli.load_config(_CONFIG)
    workdir = cli.open_workdir(_WORKDIR.value)
    cache = cache_folder(cfg, workdir)
    encoders = Encoders(cfg, find_sources(cfg, experts=experts_of(cfg)), cfg.eval.judge_model_path)
    prepared = prepare(encoders, read_metadata(cfg.file_name), cache, listed_in=cfg.file_name)
    print(f"{len(prepared)} clips in {cache}")


if __name__ == "__main__":
    _CONFIG = cli.define_config()
    cli.define_distributed()
    _WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run.")
    cli.run(main, "prepare")
