"""On a disk without room every command ends in one line, what was written stays whole, and with room it goes on."""

import contextlib
import errno
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from etils import epath
from flax import nnx

from rfl_jax.errors import storage_fault
from rfl_jax.evaluation.layouts import export
from rfl_jax.files import write_whole
from rfl_jax.miniature.world import ASSETS, DIT_FILES
from rfl_jax.runs import RunFolder
from rfl_jax.training.board import Board
from rfl_jax.training.checkpoint import Checkpoints
from rfl_jax.training.state import TrainState
from tests import COMPILER
from tests.evaluation.test_layouts import evaluated
from tests.runs import read_metrics

ROOT = Path(__file__).parents[1]


@pytest.fixture
def small_disk(tmp_path):
    folder = tmp_path / "small"
    folder.mkdir()
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", folder], check=False, capture_output=True
    ).returncode:
        pytest.skip("a small disk cannot be mounted here")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


def test_a_full_disk_is_one_line_and_what_was_written_stays_whole(small_disk):
    folder = RunFolder(epath.Path(small_disk))
    key = jax.random.key(0)

    def state(step):
        weights = nnx.State({"a": jax.random.normal(jax.random.key(step), (256, 256))})
        return TrainState(jnp.int32(step), {"dit2": weights}, {})

    def save_all():
        with Checkpoints(folder.checkpoints) as checkpoints:
            for step in range(1, 9):
                checkpoints.save(step, state(step), key, {"next": step})

    with pytest.raises(Exception, match="space") as failure:
        save_all()
    assert storage_fault(failure.value).endswith(os.strerror(errno.ENOSPC))
    assert str(folder.checkpoints) in storage_fault(failure.value)
    with Checkpoints(folder.checkpoints) as checkpoints:
        latest = checkpoints.latest()
        restored, *_ = checkpoints.restore(latest, state(0))
    assert int(restored.step) == latest
    # With room again the same goes on.
    subprocess.run(["mount", "-o", "remount,size=64m", small_disk], check=True)
    save_all()
    with Checkpoints(folder.checkpoints) as checkpoints:
        assert checkpoints.latest() == 8

    subprocess.run(["mount", "-o", "remount,size=2m", small_disk], check=True)
    with contextlib.suppress(OSError), (small_disk / "fill").open("wb") as stream:
        while True:
            stream.write(bytes(4096))
    file = small_disk / "metrics.jsonl"
    with pytest.raises(OSError, match="No space left") as full:
        write_whole(file, "x" * 100_000)
    assert storage_fault(full.value) == f"{file}: No space left on device"
    assert sorted(p.name for p in small_disk.iterdir()) == ["checkpoints", "fill"]
    # TensorBoard's events are written here and now, and not by a thread that dies of it.
    (small_disk / "tensorboard").mkdir()
    board = Board(small_disk / "tensorboard", first=1)
    with pytest.raises(OSError, match="No space left"):
        _fill(board)
    with contextlib.suppress(OSError):
        board.close()


def test_a_conversion_onto_a_full_disk_leaves_nothing_and_succeeds_with_room(small_disk):
    def converted():
        source, target = ASSETS / DIT_FILES["dit2"], small_disk / "dit2"
        command = [sys.executable, "-m", "convert", "dit", "--src", str(source), "--dst", str(target)]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)

    full = converted()
    assert full.returncode == 1
    assert full.stderr.count("\n") == 1
    assert "No space left on device" in full.stderr
    assert not list(small_disk.iterdir())
    subprocess.run(["mount", "-o", "remount,size=64m", small_disk], check=True)
    assert converted().returncode == 0


def _fill(board):
    while True:
        board.scalars(1, {})


def leave(disk, room):
    """Fills a disk but for so many bytes; None empties it again."""
    (disk / "fill").unlink(missing_ok=True)
    if room is None:
        return
    free = os.statvfs(disk).f_bavail * os.statvfs(disk).f_frsize
    with (disk / "fill").open("wb") as stream:
        stream.write(bytes(free - room))


def test_a_benchmarks_folder_without_room_is_not_there(small_disk, tmp_path):
    run = evaluated(tmp_path / "run", [("A person nods.", 0), ("She smiles.", 1)])
    out = epath.Path(small_disk / "out")
    leave(small_disk, 8192)
    with pytest.raises(OSError, match="No space left") as failure:
        export(run, "opens2v", out)
    assert storage_fault(failure.value) == f"{out}: No space left on device"
    assert [p.name for p in small_disk.iterdir()] == ["fill"]
    leave(small_disk, None)
    export(run, "opens2v", out)
    assert (out / "seeds.json").exists()


@pytest.mark.slow
def test_every_command_goes_on_when_there_is_room(small_disk, clip_folder):
    subprocess.run(["mount", "-o", "remount,size=16m", small_disk], check=True)
    environment = os.environ | {"XLA_FLAGS": COMPILER}
    run, lora, merged = (small_disk / name for name in ("run", "lora.safetensors", "merged.safetensors"))
    options = [
        "--config=configs/mini.py", "--config.data.num_frames=5", f"--config.file_name={clip_folder / 'metadata.csv'}", f"--workdir={run}",
        "--config.train_batch_size=1", "--config.per_device_train_batch_size=1", "--config.eval_every=0",
        "--config.eval.file_name=", "--config.sample_every=0", "--config.save_steps=1", "--config.noise.prefix_cache=off",
        "--config.num_inference_steps=2", "--config.mid_timestep=1", "--config.final_timestep=1",
    ]  # fmt: skip

    def command(name, *arguments):
        done = subprocess.run(
            [sys.executable, "-m", f"rfl_jax.{name}", *map(str, arguments)],
            cwd=ROOT, env=environment, capture_output=True, text=True, check=False,
        )  # fmt: skip
        # Besides the step that was reached, that more of them are asked for, and what took long.
        told = ("step ", "read the weights", "compile the step", f"{run} goes on with changed settings: max_steps")
        return done.returncode, [line for line in done.stderr.splitlines() if not line.startswith(told)]

    @contextlib.contextmanager
    def fails_and_goes_on(room, name, *arguments):
        leave(small_disk, room)
        code, errors = command(name, *arguments)
        assert code == 1, errors
        assert len(errors) == 1, errors
        (line,) = errors
        assert line.startswith(f"{name}: {small_disk}")
        assert "No space left on device; what was written before is whole" in line
        unfinished = {p.name for p in small_disk.rglob("*.tmp")}
        leave(small_disk, None)
        yield
        code, errors = command(name, *arguments)
        assert (code, unfinished) == (0, set()), errors

    # The disk is full at the first byte, and later at the second checkpoint.
    with fails_and_goes_on(0, "prepare", *options):
        assert not list(run.rglob("*.npz"))
        # From here on two share the cache.
        beside = subprocess.Popen([sys.executable, "-m", "rfl_jax.prepare", *options], cwd=ROOT, env=environment)
    assert beside.wait() == 0
    assert command("train", *options, "--config.max_steps=1") == (0, [])
    with fails_and_goes_on(400_000, "train", *options, "--config.max_steps=2"):
        assert {p.name for p in (run / "checkpoints").iterdir() if p.name.isdigit()} == {"1"}
    assert [line["step"] for line in read_metrics(run)] == [1, 2]
    evaluation = (f"--workdir={run}", f"--data={clip_folder / 'metadata.csv'}")
    with fails_and_goes_on(20_000, "evaluate", *evaluation):
        assert not (run / "evaluation.json").exists()
    assert (run / "evaluation.json").exists()
    for file, more in ((lora, []), (merged, ["--merged", "--format", "original"])):
        with fails_and_goes_on(20_000, "export", "--workdir", run, "--dst", file, *more):
            assert not list(small_disk.glob(f"*{file.name}*"))
        assert file.exists()
