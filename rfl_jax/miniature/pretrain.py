"""Trains every network of the miniature from drawn faces and writes them as a user would receive them.

    python -m rfl_jax.miniature.pretrain --out=DIR [--seed=0] [--only=vae ...] [--scale=1]

safetensors in the original's naming and ONNX files in antelopev2's names. The `dit` stage reads what `vae` and
`umt5` wrote, so that stages can be rerun one at a time.
"""

from pathlib import Path

from absl import app, flags, logging

from rfl_jax.miniature.stage_dit import train_dit
from rfl_jax.miniature.stage_faces import train_arcface, train_judge, train_scrfd
from rfl_jax.miniature.stage_umt5 import train_umt5
from rfl_jax.miniature.stage_vae import train_vae

STAGES = {
    "vae": train_vae,
    "scrfd": train_scrfd,
    "arcface": train_arcface,
    "judge": train_judge,
    "umt5": train_umt5,
    "dit": train_dit,
}

_OUT = flags.DEFINE_string("out", None, "Folder for the trained files.", required=True)
_SEED = flags.DEFINE_integer("seed", 0, "Seed of everything.")
_ONLY = flags.DEFINE_multi_enum("only", list(STAGES), list(STAGES), "Stages to run, in their order.")
_SCALE = flags.DEFINE_float("scale", 1.0, "Multiplies the number of steps of every stage.", lower_bound=0.0)


def main(argv: list[str]) -> None:
    del argv
    logging.set_verbosity(logging.WARNING)  # Orbax tells of every step of every checkpoint
    for name, train in STAGES.items():
        if name in _ONLY.value:
            train(Path(_OUT.value), _SEED.value, _SCALE.value)


if __name__ == "__main__":
    app.run(main)
