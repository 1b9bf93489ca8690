"""Lists the commands: `python -m rfl_jax`."""

import sys

from rfl_jax import __version__
from rfl_jax.errors import UserError, did_you_mean, refuse_in_one_line

# In the order in which they are used.
COMMANDS = {
    "convert": "weights in, from files, buckets or the hub",
    "rfl_jax.plan": "will it fit, here or on a TPU slice not at hand",
    "rfl_jax.prepare": "clips ahead of training, which does it as well",
    "rfl_jax.train": "trains and evaluates; the same command resumes",
    "rfl_jax.report": "one page of a run, its videos side by side",
    "rfl_jax.evaluate": "held-out clips before and after training",
    "rfl_jax.sample": "videos from prompts and first frames",
    "rfl_jax.export": "weights out: diffusers, ComfyUI, PEFT, merged",
    "rfl_jax.config": "all settings as a page of Markdown",
}


def main() -> None:
    if arguments := [word for word in sys.argv[1:] if word not in ("-h", "--help")]:
        named = arguments[0] if arguments[0] in COMMANDS else f"rfl_jax.{arguments[0]}"
        meant = f", expected python -m {named}" if named in COMMANDS else did_you_mean(named, COMMANDS, "python -m ")
        raise UserError(f"{arguments[0]}: no argument of this list{meant}")
    print(f"rfl_jax {__version__}: Reward Feedback Learning for Wan2.2 image-to-video\n")
    for name, about in COMMANDS.items():
        print(f"  python -m {name:17s}{about}")
    print("\n--help after any of them lists its flags and settings.")
    print("\nA first run, minutes on two CPU cores, everything included:")
    print("  python -m rfl_jax.train --config=mini --workdir=runs/mini")
    print("  python -m rfl_jax.report runs/mini -o report.html")


if __name__ == "__main__":
    with refuse_in_one_line("rfl_jax"):
        main()
