"""The miniature's training step beside the same step in PyTorch: same weights, clips, noise and adapters, on this CPU.

`python -m benchmarks.torch_step --check --phases` prints a table for `benchmarks/RESULTS.md`: medians, in brackets the
least and the most, of rounds in which the sides take turns, each in a process of its own. `--what` names other uses of
the networks. Needs `requirements-test.txt`.
"""

import argparse
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from tqdm import tqdm

from benchmarks.sides import ACTIONS, STEP, Outcome, Process
from rfl_jax.errors import ArgumentParser, RunError, UserError, refuse_in_one_line

MODES = ("eager", "compile")
OURS = "ours"
# The modules of the sides.
STEP_SIDES, USE_SIDES = (
    ("benchmarks.our_side", "benchmarks.torch_side"),
    ("benchmarks.our_uses", "benchmarks.torch_uses"),
)
# What is rounding: relative differences, but of numbers absolute ones, and of gradients their cosine's from 1.
BOUNDS = {"gradients": 1e-6}
BOUND = 1e-4  # of everything else
PAUSE = 0.3  # seconds, in which the threads of the side that had its turn stop waiting for more
SHORTEST = 0.3  # seconds that are timed at least
GIB = 2**30

Times = dict[str, list[float]]  # by side, one a round


def difference(name: str, ours: np.ndarray, theirs: np.ndarray) -> float:
    """How far an outcome of two sides is apart, as `BOUNDS` has it."""
    a, b = (np.ravel(x).astype(np.float64) for x in (ours, theirs))
    if name == "gradients":
        return 1 - float(a @ b / (np.linalg.norm(a) * np.linalg.norm(b)))
    return float(np.linalg.norm(a - b) / (np.linalg.norm(a) if a.size > 1 else 1))


def check(ours: Outcome, theirs: Outcome, mode: str) -> str:
    """A line that says how far the sides are apart.

    Raises:
        RunError: further than rounding.
    """
    found = {name: difference(name, ours[name], theirs[name]) for name in ours}
    line = f"torch {mode} differs by " + ", ".join(f"{name} {value:.1e}" for name, value in found.items())
    # Negated, so that what is not a number is refused too.
    bounds = {name: BOUNDS.get(name, BOUND) for name in ours}
    if too_far := [f"{name} at most {bounds[name]:.0e}" for name in ours if not found[name] <= bounds[name]]:
        raise RunError(f"{line}; expected {', '.join(too_far)}")
    return line + "".join(f"; {name} {float(x):.4f}" for name, x in ours.items() if x.size == 1)


def in_turns(running: Mapping[str, Process], action: str, rounds: int, bar: tqdm) -> tuple[Times, Times]:
    """Seconds and most resident bytes of an action, the sides one after another in every round."""
    repeats = {}
    for name, process in running.items():
        process.ask("timed", action)
        seconds, _ = process.ask("timed", action)
        repeats[name] = max(1, round(SHORTEST / seconds))
    times, memory = ({name: [] for name in running} for _ in range(2))
    for _ in range(rounds):
        for name, process in running.items():
            time.sleep(PAUSE)
            seconds, peak = process.ask("timed", action, repeats[name])
            times[name].append(seconds)
            memory[name].append(peak)
        bar.update()
    return times, memory


def spread(values: Sequence[float]) -> str:
    """The median, and the least and the most in brackets."""
    if len(values) == 1:
        return f"{values[0]:.3g}"
    return f"{statistics.median(values):.3g} ({min(values):.3g} to {max(values):.3g})"


def row(label: str, values: Times) -> str:
    """A row of the table: ours, then each other side and the ratio of its values to ours, round by round."""
    cells = [label, spread(values[OURS])]
    for name in (name for name in values if name != OURS):
        cells += [spread(values[name]), spread([a / b for a, b in zip(values[name], values[OURS], strict=True)])]
    return f"| {' | '.join(cells)} |"


def table(running: Mapping[str, Process], started: Mapping[str, float], args: argparse.Namespace) -> Iterator[str]:
    """The lines of the table, as they are measured."""
    others = [name for name in running if name != OURS]
    actions = ACTIONS[args.what] if args.phases or args.what != STEP else (STEP,)
    yield "| | ours | " + " | ".join(f"{name} | {name} / ours" for name in others) + " |"
    yield "|" + "---|" * (2 + 2 * len(others))
    yield row("from the start of the process to the first results, s", {name: [x] for name, x in started.items()})
    with tqdm(total=len(actions) * args.steps, desc="rounds", disable=None) as bar:
        for i, action in enumerate(actions):
            if i == 1 and args.phases:
                # Only now, so that what they keep is not in the memory of a step.
                for process in running.values():
                    process.ask("open_phases")
            times, memory = in_turns(running, action, args.steps, bar)
            yield row(f"{action}, s", times)
            if action == STEP:
                yield row("most memory meanwhile, GiB", {name: [x / GIB for x in v] for name, v in memory.items()})


def compare(args: argparse.Namespace, folder: Path) -> None:
    """Prints the comparison.

    Raises:
        RunError: with `--check`, sides that do not agree.
    """
    shape = (folder, args.batch, args.frames, args.size, args.seed)
    module, theirs = STEP_SIDES if args.what == STEP else USE_SIDES
    ours = (module, "open_side", *(() if args.what == STEP else (args.what,)), *shape)
    with Process("benchmarks.our_side", "prepare", *shape):
        print("clips are drawn and prepared", file=sys.stderr)
    # Caches of compiled programs that nobody has filled.
    os.environ["JAX_COMPILATION_CACHE_DIR"] = str(folder / "jax")
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(folder / "inductor")
    with Process(*ours) as cold:
        cold.ask("first")
        cold_start = cold.age
    with ExitStack() as stack:
        running = {OURS: stack.enter_context(Process(*ours))}
        wanted: Outcome = running[OURS].ask("first")
        started, inputs = {OURS: running[OURS].age}, running[OURS].ask("inputs")
        notes = [f"Ours started with its cache of compiled programs warm; cold {cold_start:.1f} s."]
        for mode in args.modes:
            name = f"torch {mode}"
            running[name] = stack.enter_context(Process(theirs, "open_side", inputs, mode))
            outcome: Outcome = running[name].ask("first")
            started[name] = running[name].age
            if args.check:
                notes.append(check(wanted, outcome, mode))
        versions = ", ".join(f"{name} {metadata.version(name)}" for name in ("jax", "torch", "diffusers"))
        print(f"{args.batch} videos of {args.frames} frames {args.size}x{args.size}, {args.steps} rounds, {versions}")
        print(f"{len(os.sched_getaffinity(0))} cores\n")
        for line in table(running, started, args):
            print(line, flush=True)
    print("", *notes, sep="\n")


def arguments() -> argparse.Namespace:
    """The command line's."""
    parser = ArgumentParser(
        prog="python -m benchmarks.torch_step",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--what", default=STEP, choices=tuple(ACTIONS), help="the networks are used for (default: step)"
    )
    parser.add_argument("--batch", type=int, default=8, help="videos of a step (default: 8)")
    parser.add_argument("--frames", type=int, default=5, help="frames of a video, 4n+1 (default: 5)")
    parser.add_argument("--size", type=int, default=64, help="pixels a side, a multiple of 32 (default: 64)")
    parser.add_argument("--steps", type=int, default=7, help="rounds in which each side takes a step (default: 7)")
    parser.add_argument("--modes", default="eager,compile", help="of PyTorch (default: eager,compile)")
    parser.add_argument("--phases", action="store_true", help="time the parts of a step as well")
    parser.add_argument("--check", action="store_true", help="end with status 1 where the sides differ")
    parser.add_argument("--seed", type=int, default=0, help="of clips, noise and adapters (default: 0)")
    args = parser.parse_args()
    args.modes = args.modes.split(",")
    refuse_bad(args)
    return args


def refuse_bad(args: argparse.Namespace) -> None:
    """Raises UserError on values that make no sense here, and on a machine that cannot compare."""
    for name, fits, expected in (
        ("batch", args.batch >= 1, "at least 1"),
        ("frames", args.frames >= 5 and args.frames % 4 == 1, "4n+1, at least 5"),
        ("size", args.size >= 32 and args.size % 32 == 0, "a multiple of 32"),
        ("steps", args.steps >= 1, "at least 1"),
        ("seed", 0 <= args.seed < 2**32, "0 to 2^32 - 1"),
        ("modes", set(args.modes) <= set(MODES) and len(set(args.modes)) == len(args.modes), f"of {','.join(MODES)}"),
    ):
        if not fits:
            value = getattr(args, name)
            raise UserError(f"--{name}: {','.join(value) if name == 'modes' else value}: expected {expected}")
    if args.phases and args.what != STEP:
        raise UserError(f"--phases: those of a training step, expected no --what={args.what}")
    if missing := [name for name in ("torch", "diffusers", "peft", "transformers") if find_spec(name) is None]:
        raise UserError(f"PyTorch's side needs {', '.join(missing)}: pip install -r requirements-test.txt")
    if "compile" in args.modes and not shutil.which(os.environ.get("CXX", "g++")):
        raise UserError("--modes: compile: torch.compile needs a C++ compiler (g++, or what CXX names)")
    if not os.access("/proc/self/clear_refs", os.W_OK):
        raise UserError("/proc/self/clear_refs: expected Linux, which tells there how much memory a process needs")


def main() -> None:
    args = arguments()
    os.environ["JAX_PLATFORMS"] = "cpu"
    with tempfile.TemporaryDirectory() as folder:
        compare(args, Path(folder))


if __name__ == "__main__":
    with refuse_in_one_line("torch_step"):
        main()
