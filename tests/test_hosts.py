"""Two processes with two devices each do what one process with four does; one that dies ends the other."""

import json
import os
import signal
import socket
import subprocess
import sys
import time

import pytest

from convert import store
from rfl_jax.miniature.data import draw_clips
from rfl_jax.miniature.world import ASSETS, DIT_FILES, T5_FILE, VAE_FILE
from tests import COMPILER

SETTINGS = [
    "--config=configs/mini.py", "--config.data.num_frames=5", "--config.mesh.data=1", "--config.mesh.fsdp=2", "--config.mesh.context=2",
    "--config.train_batch_size=2", "--config.per_device_train_batch_size=1", "--config.eval.file_name=",
    "--config.num_inference_steps=4", "--config.mid_timestep=2", "--config.final_timestep=3",
    "--config.sample_every=0", "--config.save_steps=1", "--config.max_steps=3",
]  # fmt: skip


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    """As many as a batch has samples."""
    folder = tmp_path_factory.mktemp("clips") / "drawn"
    draw_clips(folder, 4, seed=5, frames=5)
    return folder


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """The miniature's weights as Orbax folders."""
    folder = tmp_path_factory.mktemp("weights")
    sources = {"dit": DIT_FILES["dit"], "dit2": DIT_FILES["dit2"], "umt5": f"umt5/{T5_FILE}", "vae": f"vae/{VAE_FILE}"}
    for name, source in sources.items():
        kind = name.removesuffix("2")
        store.save(str(folder / name), kind, *store.convert(kind, [str(ASSETS / source)]))
    return f"--config.model_paths={json.dumps([str(folder / name) for name in sources])}"


def start(workdir, clips, *arguments, process=None, port=0, devices=4):
    environment = os.environ | {"XLA_FLAGS": f"{COMPILER} --xla_force_host_platform_device_count={devices}"}
    command = [sys.executable, "-m", "rfl_jax.train", *SETTINGS, f"--config.file_name={clips / 'metadata.csv'}"]
    command += [f"--workdir={workdir}", *arguments]
    if process is not None:
        command.append("--distributed")
        environment |= {
            "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}",
            "JAX_NUM_PROCESSES": "2",
            "JAX_PROCESS_ID": str(process),
        }
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def start_pair(*args):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    return [start(*args, process=i, port=port, devices=2) for i in (0, 1)]


def lines(workdir):
    file = workdir / "metrics.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def finish(processes, timeout=600):
    output = [process.communicate(timeout=timeout)[0] for process in processes]
    return [process.returncode for process in processes], output


def test_two_processes_equal_one_and_survive_a_death(tmp_path, clips, weights):
    codes, output = finish([start(tmp_path / "one", clips)])
    assert codes == [0], output[0]
    want = lines(tmp_path / "one")
    assert [line["step"] for line in want] == [1, 2, 3]

    # The second process is killed after the first checkpoint; the first ends by itself and says why.
    pair = start_pair(tmp_path / "two", clips, weights)
    while len(lines(tmp_path / "two")) < 2:
        assert all(process.poll() is None for process in pair), "\n".join(finish(pair)[1])
        time.sleep(0.2)
    pair[1].send_signal(signal.SIGKILL)
    began = time.monotonic()
    (code, _), (text, _) = finish(pair, timeout=120)
    assert code not in (0, 2), text
    assert time.monotonic() - began < 60
    assert "another host" in text or "heartbeat" in text.lower(), text

    # What is left is in the middle of the run.
    assert "1" in {folder.name for folder in (tmp_path / "two" / "checkpoints").iterdir()}
    assert not (tmp_path / "two" / "dit2_lora.safetensors").exists()

    # One of them has a clip to prepare again, the other none: it needs networks that the other does not open.
    next(file for file in (tmp_path / "two" / "cache").glob("*.npz") if ".prefix." not in file.name).unlink()
    held_out = [f"--config.eval.file_name={clips / 'metadata.csv'}", "--config.eval.num_samples=3"]
    codes, output = finish(start_pair(tmp_path / "two", clips, weights, *held_out, "--config.eval_every=3"))
    assert codes == [0, 0], "\n".join(output)
    # Both judged the held-out clips, one of them wrote.
    result = json.loads((tmp_path / "two" / "evaluation.json").read_text())
    (validated,) = json.loads((tmp_path / "two" / "validation.json").read_text())["validations"]
    assert len(result["clips"]) == 3
    for figure in ("face_sim", "judge_sim", "motion", "copying"):
        assert validated[figure] == pytest.approx(result[figure]["tuned"], rel=1e-4), figure
    assert "evaluation.json" in output[0]
    assert "evaluation.json" not in output[1]
    found = lines(tmp_path / "two")
    assert [line["step"] for line in found] == [1, 2, 3]
    for a, b in zip(found, want, strict=True):
        for figure in ("loss", "face_score", "no_face_fraction", "learning_rate"):
            assert a[figure] == pytest.approx(b[figure], rel=1e-3, abs=1e-6), figure
    # Both processes stepped, one of them wrote.
    assert "step 3/3" in output[0]
    assert "step 3/3" not in output[1]
