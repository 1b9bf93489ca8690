"""The frontier of guards and windows: what dominates what, and that its command trains, reads and goes on."""

import dataclasses
import itertools
import subprocess
import sys
from functools import reduce
from operator import getitem
from pathlib import Path

import pytest

from benchmarks.frontier import ROWS, Point, dominated, flags, main, plot, table
from configs.mini import miniature
from rfl_jax.config import parse
from rfl_jax.recipes import guarded
from rfl_jax.sampling.sampler import make_sampler
from tests.test_documentation import SHORT

ROOT = Path(__file__).parents[1]
A = Point("defaults", "", 0.8, 0.1, -0.1, 0.05, 0.0, 1.0, 0, 1)


def run(*arguments):
    """The command in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.frontier", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("row", ROWS)
def test_every_row_is_a_miniature_that_can_train(row):
    config = guarded(miniature("clips.csv", ""))
    before = config.to_dict()
    config.update_from_flattened_dict(ROWS[row])
    # Every setting of a row is another than the miniature's own.
    for name, value in ROWS[row].items():
        assert reduce(getitem, name.split("."), before) != value, name
    cfg = parse(config)
    sampler = make_sampler(cfg)
    assert sampler.direct or any(span.gradient for span in sampler.spans)
    assert len(flags(ROWS[row])) == len(ROWS[row])
    assert "," not in row  # --only separates by it


def test_what_another_row_beats_in_everything_is_dominated():
    faster = dataclasses.replace(A, name="faster", seconds=0.5)
    moving = dataclasses.replace(A, name="moving", motion=0.0, likeness=0.7)
    assert dominated([A]) == set()
    assert dominated([A, faster]) == {"defaults"}
    assert dominated([A, moving]) == set()
    assert dominated([A, faster, moving]) == {"defaults"}
    # A time that differs as it does from run to run says nothing.
    assert dominated([A, dataclasses.replace(A, name="again", seconds=0.95)]) == set()
    # Of two that are the same, neither.
    assert dominated([A, dataclasses.replace(A, name="again")]) == set()


def test_the_table_begins_with_the_greatest_likeness_and_the_plot_names_every_row():
    better = dataclasses.replace(A, name="better", settings="--config.real.weight=0.1", likeness=0.9, alarms=2)
    lines = table([A, better]).splitlines()
    assert lines[2] == "| better | `--config.real.weight=0.1` | 0.900 | +10.0% | -10.0% | +5.0% | +0.0% | 1.00 | 2 |  |"
    assert lines[3].endswith("| dominated |")
    # Rows of the same figures are named in different places.
    near = [dataclasses.replace(A, name=name) for name in ("one", "another", "a third")]
    figure = plot([A, better, *near])
    names = figure.axes[0].texts
    assert {text.get_text() for text in names} == {"defaults", "better", "one", "another", "a third"}
    boxes = [text.get_window_extent() for text in names]
    assert not any(a.overlaps(b) for a, b in itertools.combinations(boxes, 2))


@pytest.mark.slow
def test_rows_are_trained_once_and_written(clip_folder, tmp_path):
    csv = f"--config.file_name={clip_folder / 'metadata.csv'}"
    arguments = (f"--dir={tmp_path / 'runs'}", f"--page={tmp_path / 'page.md'}", f"--shorter={' '.join([*SHORT, csv])}")
    done = run(*arguments, "--only=real data 0.3,direct")
    assert done.returncode == 0, done.stderr
    assert "| direct | `--config.window.mode=random " in (tmp_path / "page.md").read_text()
    assert ">direct</text>" in (tmp_path / "page.svg").read_text()
    stamps = {file: file.stat().st_mtime_ns for file in (tmp_path / "runs").rglob("evaluation.json")}
    assert len(stamps) == 2
    assert run(*arguments, "--only=direct").returncode == 0
    assert {file: file.stat().st_mtime_ns for file in stamps} == stamps


@pytest.mark.parametrize(
    ("argument", "expected"),
    [
        ("--only=nonsense", "--only: nonsense: expected some of defaults"),
        ("--seeds=a", "--seeds: a: expected whole numbers"),
    ],
)
def test_refusals(argument, expected, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["frontier", f"--dir={tmp_path}", argument])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    assert expected in capsys.readouterr().err.splitlines()[-1]
