"""What must not spoil a run: numbers that are none, a second run in the folder, a full disk, a changed configuration."""

import dataclasses
import errno
import itertools
import json
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath

from rfl_jax.config import Config, dumps
from rfl_jax.errors import RunError, UserError, refuse_in_one_line, storage_fault
from rfl_jax.files import aside, write_whole
from rfl_jax.runs import RunFolder
from rfl_jax.settings import settings as all_settings
from rfl_jax.training.changes import FIXED, MAY_CHANGE, check_settings, compare_rows
from rfl_jax.training.checkpoint import Checkpoints, iterator_state
from rfl_jax.training.lock import Lock
from rfl_jax.training.loop import train
from rfl_jax.training.progress import resume
from tests import COMPILER
from tests.runs import open_run, read_metrics

ROOT = Path(__file__).parents[2]


def snapshot(tree):
    # The step donates its state.
    return [np.array(x) for x in jax.tree.leaves(tree)]


def equal(a, b):
    return all(np.array_equal(x, y, equal_nan=True) for x, y in zip(a, b, strict=True))


def with_nan(frozen, network="dit2"):
    """Frozen weights of which one number is none."""
    blocks = frozen.rest[network]["blocks"]["ffn"]["up"]
    spoilt = jax.tree.map(lambda x: x, frozen)
    kernel = blocks["kernel"][...]
    spoilt.rest[network]["blocks"]["ffn"]["up"]["kernel"][...] = kernel.at[(0,) * kernel.ndim].set(jnp.nan)
    return spoilt


def test_updates_that_are_not_finite_are_skipped_and_too_many_end_the_run(settings, tmp_path):
    cfg = settings(max_steps=9, save_steps=1, max_bad_steps=3)
    run, folder = open_run(cfg, tmp_path / "run"), RunFolder(epath.Path(tmp_path / "run"))
    broken, calls, states = with_nan(run.frozen), [], []

    def step(state, frozen, batch, key):
        calls.append(1)
        state, metrics = run.update.step(state, broken if len(calls) in (2, 4, 5, 6) else frozen, batch, key)
        states.append(snapshot(state))
        return state, metrics

    with pytest.raises(RunError) as failure:
        train(dataclasses.replace(run, update=dataclasses.replace(run.update, step=step)), folder)
    text = str(failure.value)
    assert "step 6: dit2.blocks." in text
    assert "lora_a is not finite" in text
    assert "the last of 3 such steps in a row" in text
    assert text.endswith("goes on from the last good checkpoint, that of step 3")
    # A skipped update leaves weights, moments and the schedule's place as they were, to the last bit.
    assert equal(states[0], states[1])
    assert equal(states[2], states[5])
    assert not equal(states[1], states[2])
    lines = read_metrics(tmp_path / "run")
    assert [line["skipped_updates"] for line in lines] == [0, 1, 0, 1, 1, 1]
    assert [line["loss"] is None for line in lines] == [False, True, False, True, True, True]
    text = (tmp_path / "run" / "metrics.jsonl").read_text()
    assert "NaN" not in text
    assert all(json.loads(line) for line in text.splitlines())
    assert sorted(p.name for p in (tmp_path / "run" / "checkpoints").iterdir()) == ["1", "3"]
    # The same command goes on from there.
    cfg = dataclasses.replace(cfg, max_steps=4)
    trained = train(open_run(cfg, tmp_path / "run"), folder)
    assert trained.finished
    assert [line["step"] for line in read_metrics(tmp_path / "run")] == [1, 2, 3, 4]


def test_one_run_holds_a_folder_and_the_dead_do_not(tmp_path):
    folder = RunFolder(epath.Path(tmp_path))
    with Lock(folder):
        with pytest.raises(UserError, match=rf"process {os.getpid()} on .* trains here since"):
            Lock(folder).__enter__()
        held = json.loads(folder.lock.read_text())
        assert held["pid"] == os.getpid()
    assert not folder.lock.exists()
    # A process that is gone, and one that has its number now, hold nothing.
    gone = subprocess.Popen(["true"])
    gone.wait()
    for holder in (held | {"pid": gone.pid}, held | {"born": "0"}):
        folder.lock.write_text(json.dumps(holder))
        with Lock(folder):
            pass
    folder.lock.write_text("{")
    with Lock(folder):
        pass


def test_a_holder_elsewhere_is_gone_when_it_says_nothing(tmp_path, capsys):
    folder = RunFolder(epath.Path(tmp_path))
    with Lock(folder):
        held = json.loads(folder.lock.read_text()) | {"host": "another", "place": "another"}
    folder.lock.write_text(json.dumps(held))
    lock = Lock(folder, beat_s=0.05, silence_s=0.2)
    with lock:
        assert "waiting whether process" in capsys.readouterr().err
        lock.check()
        # One that slept so long that it was taken for gone writes nothing more.
        with pytest.raises(RunError, match=r"process .* on another took it"):
            _overwritten(lock, folder, held)
    assert json.loads(folder.lock.read_text()) == held

    beats = threading.Thread(target=_beat, args=(folder, held, over := threading.Event()))
    beats.start()
    try:
        with pytest.raises(UserError, match="on another trains here"):
            Lock(folder, beat_s=0.05, silence_s=30.0).__enter__()
    finally:
        over.set()
        beats.join()


def _overwritten(lock, folder, held):
    for _ in range(1000):
        write_whole(folder.lock, json.dumps(held))
        lock.check()
        time.sleep(0.01)


def _beat(folder, held, over):
    for beat in itertools.count(100):
        if over.wait(0.02):
            return
        write_whole(folder.lock, json.dumps(held | {"beat": beat}))


def test_writers_of_one_file_leave_one_of_their_contents_whole(tmp_path):
    file = tmp_path / "file.npz"
    script = (
        "import sys, pathlib; from rfl_jax.files import write_whole\n"
        "for i in range(200): write_whole(pathlib.Path(sys.argv[1]), sys.argv[2] * 100_000)"
    )
    writers = [subprocess.Popen([sys.executable, "-c", script, str(file), letter], cwd=ROOT) for letter in "ab"]
    assert [writer.wait() for writer in writers] == [0, 0]
    assert file.read_text() in ("a" * 100_000, "b" * 100_000)
    assert list(tmp_path.iterdir()) == [file]
    # What a killed process leaves is hidden and has no known ending.
    assert not list(tmp_path.glob(f"*{file.suffix}.tmp"))
    assert aside(file).name.startswith(".")
    assert aside(file) != aside(file)


def test_storage_errors_are_told_from_others(capsys):
    faults = {
        OSError(errno.EDQUOT, "Disk quota exceeded", "/data/a"): "/data/a: Disk quota exceeded",
        PermissionError(errno.EACCES, "Permission denied", "/data/a"): "/data/a: Permission denied",
        ValueError('UNAVAILABLE: Error writing "gs://bucket/a"'): "the network failed",
        ValueError('PERMISSION_DENIED: Error opening "/data/x" [OS error 13: EACCES]'): "/data/x: Permission denied",
    }
    for error, text in faults.items():
        assert storage_fault(error).startswith(text)
        with pytest.raises(SystemExit) as stop, refuse_in_one_line("train"):
            raise RuntimeError("wrapped") from error
        assert stop.value.code == 1
        out = capsys.readouterr().err
        assert text in out
        assert out.count("\n") == 1
    for error in (ValueError("bad"), FileNotFoundError(errno.ENOENT, "No such file", "a"), KeyError("a")):
        assert not storage_fault(error)
        with pytest.raises(type(error)), refuse_in_one_line("train"):
            raise error


@pytest.mark.slow
def test_a_preempted_host_saves_ends_and_goes_on(tmp_path, clip_folder):
    """By the real command; beside it no other trains in the folder."""
    environment = os.environ | {"XLA_FLAGS": COMPILER}
    options = [
        "--config=configs/mini.py", "--config.data.num_frames=5", f"--config.file_name={clip_folder / 'metadata.csv'}", f"--workdir={tmp_path}",
        "--config.train_batch_size=1", "--config.per_device_train_batch_size=1", "--config.eval_every=0",
        "--config.eval.file_name=", "--config.sample_every=0", "--config.save_steps=1000", "--config.noise.prefix_cache=off",
    ]  # fmt: skip

    def start(*more):
        command = [sys.executable, "-m", "rfl_jax.train", *options, *more]
        return subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )

    first = start("--config.max_steps=1000")
    while not (tmp_path / "metrics.jsonl").exists():
        assert first.poll() is None, first.communicate()[1]
        time.sleep(0.2)
    second = start("--config.max_steps=1000")
    refused = second.communicate()[1]
    assert second.returncode == 2
    assert f"process {first.pid} on" in refused.splitlines()[-1]
    first.send_signal(signal.SIGTERM)
    told, errors = first.communicate()
    assert "the same command goes on from here" in errors
    assert (
        told.splitlines()[-1]
        == f"next: {shlex.join(['python', '-m', 'rfl_jax.train', *options])} --config.max_steps=1000"
    )
    assert first.returncode == 130
    (step,) = (int(p.name) for p in (tmp_path / "checkpoints").iterdir())
    assert not RunFolder(epath.Path(tmp_path)).lock.exists()
    again = start(f"--config.max_steps={step + 1}")
    error = again.communicate()[1]
    assert again.returncode == 0, error
    assert [line["step"] for line in read_metrics(tmp_path)] == list(range(1, step + 2))


def test_every_setting_may_change_on_resume_or_must_stay():
    assert sorted((*FIXED, *MAY_CHANGE)) == sorted(setting.key for setting in all_settings(Config))


def begun(path, cfg):
    """A folder as a run with a checkpoint leaves it."""
    folder = RunFolder(epath.Path(path))
    write_whole(folder.config, dumps(cfg))
    (folder.checkpoints / "2").mkdir(parents=True)
    return folder


def test_settings_that_change_are_told_or_refused_by_name(settings, tmp_path):
    folder = begun(tmp_path / "run", settings())
    assert check_settings(settings(), folder) == ""
    told = check_settings(settings(max_steps=9, learning_rate=1e-4, **{"eval.num_samples": 3}), folder)
    assert told.endswith("eval.num_samples from 16 to 3, learning_rate from 0.001 to 0.0001, max_steps from 2 to 9")
    with pytest.raises(
        UserError, match=r"config\.lora_rank: 2, expected 4; config\.seed: 1, expected 42, as the run in"
    ):
        check_settings(settings(lora_rank=2, seed=1), folder)
    # A setting that was not there yet is no change.
    values = json.loads(folder.config.read_text())
    del values["max_bad_steps"]
    folder.config.write_text(json.dumps(values))
    assert check_settings(settings(max_bad_steps=7), folder) == ""

    # Another run may begin with its weights: only what they are has to stay.
    new = RunFolder(epath.Path(tmp_path / "new"))
    assert check_settings(settings(seed=1, resume_from_checkpoint=str(folder)), new) == ""
    with pytest.raises(UserError, match=r"config\.lora_rank: 2, expected 4"):
        check_settings(settings(lora_rank=2, resume_from_checkpoint=str(folder)), new)
    # Without a checkpoint nothing was trained that could be spoilt.
    (folder.checkpoints / "2").rmdir()
    assert check_settings(settings(lora_rank=2), folder) == ""


def test_changed_rows_are_told_and_keep_the_place_where_it_means_the_same():
    def change(now, before="abcd"):
        found = compare_rows(list(before), list(now), list(range(2, 2 + len(now))))
        return found and (found.text, found.moved)

    assert change("abcd") is None
    assert change("abXd") == ("1 row edited (4)", False)
    assert change("wxyz") == ("all rows have another video or prompt, or are prepared by other networks", False)
    assert change("abcdef") == ("2 rows added (6, 7)", True)
    assert change("abd") == ("1 removed", True)
    assert change("bacd") == ("rows reordered", True)
    assert change("dcbXa") == ("1 row added (5), others reordered", True)
    assert change("aab", before="ab") == ("1 row added (3)", True)
    assert change("Xabc") == ("1 row added (2), 1 removed", True)


def test_a_csv_with_other_rows_begins_anew_and_updates_keep_their_size(settings, tmp_path, clip_folder, capsys):
    rows = [f"{clip_folder / f'clip_{i:03d}.mp4'},a face\n" for i in range(6)]
    file = tmp_path / "metadata.csv"
    file.write_text("video,prompt\n" + "".join(rows))
    cfg = settings(
        file_name=str(file), max_steps=1, save_steps=1, num_inference_steps=2, mid_timestep=1, final_timestep=1
    )
    folder = RunFolder(epath.Path(tmp_path / "run"))
    train(open_run(cfg, tmp_path / "run"), folder)

    def resumed(cfg):
        run = open_run(cfg, tmp_path / "run")
        with Checkpoints(folder.checkpoints) as checkpoints:
            return resume(run, checkpoints)

    fresh = iterator_state(open_run(cfg, tmp_path / "run").iterator())
    progress = resumed(cfg)
    place = iterator_state(progress.data)
    assert place != fresh
    assert "since step" not in capsys.readouterr().err

    file.write_text("video,prompt\n" + "".join([rows[0].replace("a face", "another"), *rows[1:]]))
    assert iterator_state(resumed(cfg).data) == place
    assert f"{file}: since step 1: 1 row edited (2); the epoch goes on in its order" in capsys.readouterr().err
    file.write_text("video,prompt\n" + "".join(rows[:5]))
    assert iterator_state(resumed(cfg).data) == fresh
    assert "since step 1: 1 removed; weights and optimizer go on, the clips begin anew" in capsys.readouterr().err
    with pytest.raises(UserError, match=r"makes updates of 1 videos .*, expected 2, as before step 1"):
        resumed(dataclasses.replace(cfg, per_device_train_batch_size=1))
