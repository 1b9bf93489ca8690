"""Trains every network of the miniature from drawn faces and writes them as a user would receive them.

    python -m rfl_jax.miniature.pretrain --out=DIR [--seed=0] [--only=vae ...] [--scale=1]

safetensors in the original's naming and ONNX files in antelopev2's names. The `dit` stage reads what `vae` and
`umt5` wrote, so that stages can be rerun one at a time.
"""

import argparse
from pathlib import Path

from absl import logging

from rfl_jax.errors import ArgumentParser, UserError, refuse_in_one_line
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


def main() -> None:
    parser = ArgumentParser(
        prog="python -m rfl_jax.miniature.pretrain",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for the trained files")
    parser.add_argument("--seed", type=int, default=0, help="of everything (default: 0)")
    parser.add_argument(
        "--only", action="append", choices=STAGES, help="a stage to run, once or more often; else all of them"
    )
    parser.add_argument("--scale", type=float, default=1.0, help="multiplies the steps of every stage (default: 1)")
    args = parser.parse_args()
    if not args.scale > 0:
        raise UserError(f"--scale: {args.scale:g}: expected more than 0")
    logging.set_verbosity(logging.WARNING)  # Orbax tells of every step of every checkpoint
    for name, train in STAGES.items():
        if name in (args.only or STAGES):
            train(args.out, args.seed, args.scale)


if __name__ == "__main__":
    with refuse_in_one_line("pretrain"):
        main()
