"""The step that `benchmarks.torch_step` times is the same in PyTorch, and the command sees where it is not."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from benchmarks.our_side import OurSide
from benchmarks.sides import ACTIONS
from benchmarks.torch_step import check
from rfl_jax.errors import RunError
from tests.runs import open_run

ROOT = Path(__file__).parents[1]


def run(*arguments, start=("-m", "benchmarks.torch_step")):
    """The command in a process of its own."""
    command = [sys.executable, *start, *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


@pytest.mark.slow  # the command compares them, too, before it measures
def test_score_loss_and_gradients_are_pytorchs(settings, tmp_path):
    pytest.importorskip("torch")
    from benchmarks.torch_side import TorchSide

    side = OurSide(open_run(settings(), tmp_path), seed=0)
    ours = side.first()
    theirs = TorchSide(side.inputs(), "eager").first()
    assert "torch eager differs by" in check(ours, theirs, "eager")
    changes = {"score": theirs["score"] + 1e-3, "loss": np.nan, "gradients": theirs["gradients"][::-1]}
    for name, value in changes.items():
        with pytest.raises(RunError, match=f"expected {name} at most"):
            check(ours, {**theirs, name: np.asarray(value)}, "eager")


@pytest.mark.parametrize(
    ("argument", "expected"),
    [
        ("--phases --what=sample", "--phases: those of a training step, expected no --what=sample"),
        ("--frames=6", "--frames: 6: expected 4n+1, at least 5"),
        ("--size=48", "--size: 48: expected a multiple of 32"),
        ("--modes=fast", "--modes: fast: expected of eager,compile"),
        ("--steps=0", "--steps: 0: expected at least 1"),
        ("--batch=two", "argument --batch: invalid int value: 'two'"),
    ],
)
def test_refusals(argument, expected):
    done = run(*argument.split())
    assert (done.returncode, done.stdout, done.stderr) == (2, "", f"torch_step: {expected}\n")


def test_without_torch_one_line_says_what_to_install():
    hidden = (
        "import runpy, sys; sys.modules['torch'] = None; runpy.run_module('benchmarks.torch_step', None, '__main__')"
    )
    done = run(start=("-c", hidden))
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "torch_step: PyTorch's side needs torch: pip install -r requirements-test.txt\n"


@pytest.mark.slow
@pytest.mark.parametrize("what", ACTIONS)
def test_the_command_prints_both_sides_action_by_action(what):
    pytest.importorskip("torch")
    phases = ["--phases"] if what == "step" else []
    done = run(f"--what={what}", "--batch=1", "--steps=1", "--modes=eager", "--check", *phases)
    assert done.returncode == 0, done.stderr
    rows = [line.split("|")[1].strip() for line in done.stdout.splitlines() if line.startswith("|")]
    assert [row for row in rows if row.removesuffix(", s") in ACTIONS[what]] == [f"{name}, s" for name in ACTIONS[what]]
    assert done.stdout.splitlines()[-1].startswith("torch eager differs by ")
