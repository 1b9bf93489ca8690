"""One page of a run that opens anywhere: `python -m rfl_jax.report RUN -o report.html`.

RUN is a folder or gs://. While training runs the page shows what there is so far; the same command refreshes it.
A name in .gif or .webp asks for a small moving picture instead: the clips that gained the most, before beside after.
"""

import argparse

from etils import epath

from rfl_jax.chips import answer_libtpu
from rfl_jax.errors import ArgumentParser, UserError, refuse_in_one_line
from rfl_jax.files import write_whole
from rfl_jax.reporting.animation import SUFFIXES, animate
from rfl_jax.reporting.collect import read_run
from rfl_jax.reporting.page import render
from rfl_jax.runs import RunFolder
from rfl_jax.terminal import command_line, tell_next

# Clips shown unless asked otherwise.
PAGE, ANIMATED = 12, 3


def main() -> None:
    parser = ArgumentParser(
        prog="python -m rfl_jax.report", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", metavar="RUN", help="folder of the run")
    parser.add_argument("-o", "--out", default="report.html", help="file to write (default: %(default)s)")
    parser.add_argument(
        "--gallery",
        type=int,
        metavar="N",
        help=f"clips shown at most (default: {PAGE}; {ANIMATED} in a moving picture)",
    )
    args = parser.parse_args()
    out = epath.Path(args.out)
    animated = out.suffix in SUFFIXES
    most = (ANIMATED if animated else PAGE) if args.gallery is None else args.gallery
    if most < animated:
        raise UserError(f"--gallery: expected a number of at least {int(animated)}, got {most}")
    if out.is_dir():
        raise UserError(f"--out: {out}: is a folder, expected a file")
    run = read_run(RunFolder(epath.Path(args.run)))
    page = animate(run, out.suffix, most=most) if animated else render(run, most=most).encode()
    try:
        write_whole(out, page)
    except OSError as error:
        raise UserError(f"--out: {out}: cannot be written ({error.strerror or error})") from None
    print(f"{out}: {len(page) / 1e6:.1f} MB")
    if run.evaluation:
        tell_next(command_line("rfl_jax.export", ["--workdir", args.run, "--dst", "lora.safetensors"]))
    elif run.steps >= run.total > 0:
        tell_next(command_line("rfl_jax.evaluate", [f"--workdir={args.run}", "--data=HELD_OUT.csv"]))
    else:  # it still trains
        tell_next(command_line("rfl_jax.report", [args.run, "-o", args.out]))


if __name__ == "__main__":
    answer_libtpu()
    with refuse_in_one_line("report"):
        main()
