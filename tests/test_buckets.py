"""A run that lives in a bucket: weights converted to gs://, trained from there into gs://, stopped and resumed; and what
happens when the bucket cannot be reached, or another trains there.
"""

import contextlib
import itertools
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request

import pytest
from safetensors.numpy import load_file

from rfl_jax.miniature.data import draw_clips
from rfl_jax.miniature.world import ASSETS, DIT_FILES, T5_FILE, VAE_FILE
from tests import COMPILER

BUCKET = "runs"
FILL = """
import json, os, sys
from etils import epath
from convert.__main__ import main

file, address = json.loads(os.environ["UPLOAD"])
epath.Path(address).write_bytes(epath.Path(file).read_bytes())
for component, source, destination in json.loads(os.environ["CONVERT"]):
    sys.argv = ["convert", component, "--src", source, "--dst", destination]
    main()
"""


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Way:
    """A port that leads to another one while it is not cut."""

    def __init__(self, target):
        self.port, self._target, self._ends = free_port(), target, []
        self.mend()

    def mend(self):
        self._listener = socket.create_server(("127.0.0.1", self.port))
        threading.Thread(target=self._accept, args=(self._listener,), daemon=True).start()

    def cut(self):
        for end in (self._listener, *self._ends):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    def _accept(self, listener):
        with contextlib.suppress(OSError):
            while True:
                near = listener.accept()[0]
                try:
                    far = socket.create_connection(("127.0.0.1", self._target))
                except ConnectionError:  # the server is not there yet
                    near.close()
                    continue
                self._ends += [near, far]
                for pair in ((near, far), (far, near)):
                    threading.Thread(target=self._pass_on, args=pair, daemon=True).start()

    @staticmethod
    def _pass_on(here, there):
        with contextlib.suppress(OSError):
            while data := here.recv(1 << 16):
                there.sendall(data)
        with contextlib.suppress(OSError):
            there.shutdown(socket.SHUT_RDWR)
        here.close()


@pytest.fixture(scope="module")
def way():
    """The way to the bucket's server."""
    way = Way(free_port())
    yield way
    way.cut()


@pytest.fixture(scope="module")
def bucket(way):
    """Environment of processes that see a bucket, served on this machine."""
    port = way._target
    url = f"http://127.0.0.1:{way.port}"
    command = ["--host", "127.0.0.1", "--port", str(port), "--default-bucket", BUCKET, "-M"]
    server = subprocess.Popen(
        [sys.executable, "-c", "from gcp_storage_emulator.__main__ import main; main()", "start", *command],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        for _ in range(300):
            try:
                urllib.request.urlopen(f"{url}/storage/v1/b", timeout=1).close()
                break
            except (urllib.error.URLError, ConnectionError, TimeoutError):
                assert server.poll() is None, "the bucket's server ended"
                time.sleep(0.1)
        yield os.environ | {
            "XLA_FLAGS": COMPILER,
            "STORAGE_EMULATOR_HOST": url,
            "TENSORSTORE_GCS_HTTP_URL": url,
            "GOOGLE_AUTH_TOKEN_FOR_TESTING": "fake",
            "GOOGLE_CLOUD_PROJECT": "test",
            "GCE_METADATA_ROOT": "127.0.0.1:9",
            "NO_GCE_CHECK": "true",
            "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",
        }
    finally:
        server.terminate()
        server.wait()


def run(bucket, module, *arguments):
    done = subprocess.run(
        [sys.executable, "-m", module, *arguments], env=bucket, capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done


def listing(bucket):
    with urllib.request.urlopen(f"{bucket['STORAGE_EMULATOR_HOST']}/storage/v1/b/{BUCKET}/o") as response:
        return {item["name"]: item for item in json.load(response).get("items", [])}


def read(bucket, name):
    address = f"{bucket['STORAGE_EMULATOR_HOST']}/storage/v1/b/{BUCKET}/o/{name.replace('/', '%2F')}?alt=media"
    with urllib.request.urlopen(address) as response:
        return response.read().decode()


def write(bucket, name, text):
    address = f"{bucket['STORAGE_EMULATOR_HOST']}/upload/storage/v1/b/{BUCKET}/o?uploadType=media&name={name}"
    urllib.request.urlopen(urllib.request.Request(address, text.encode(), {"Content-Type": "text/plain"})).close()


CHANGE = """
import json, sys
from etils import epath
from rfl_jax.errors import UserError
from rfl_jax.fetch import fetch
from rfl_jax.fingerprint import content_of, fingerprint

folder = epath.Path(sys.argv[1])
file, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
for content in ("once", "then", "once"):
    file.write_text(content)
    index.write_text(json.dumps({"weight_map": {"a": file.name}}))
    (copy,) = fetch(str(file))
    (listed,) = fetch(str(index))
    print(content_of(file), fingerprint(folder), fingerprint(listed), epath.Path(copy).read_text())
index.write_text(json.dumps({"weight_map": {"a": "../outside.safetensors"}}))
try:
    fetch(str(index))
except UserError as error:
    print(error)
"""


def test_a_checkpoint_that_changes_in_a_bucket_is_another(bucket, tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", CHANGE, f"gs://{BUCKET}/changing"], env=bucket | {"RFL_JAX_CACHE": str(tmp_path / "cache")},
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    *lines, refused = done.stdout.splitlines()
    first, second, third = (line.split() for line in lines)
    assert [line[-1] for line in (first, second, third)] == ["once", "then", "once"]
    # Three ways to name it, and each tells them apart.
    assert all(a != b for a, b in zip(first, second, strict=True))
    assert first == third
    assert first[0].startswith("md5:")
    assert refused.endswith("shard ../outside.safetensors lies outside the folder of the index")


HOLD = """
import sys
from etils import epath
from rfl_jax.errors import refuse_in_one_line
from rfl_jax.runs import RunFolder
from rfl_jax.training.lock import Lock

with refuse_in_one_line("train"), Lock(RunFolder(epath.Path(sys.argv[1])), beat_s=0.5, silence_s=3):
    print("held")
"""


def test_a_holder_on_another_host_keeps_a_bucket_while_it_lives(bucket):
    holder = {"host": "another", "pid": 7, "born": "1", "place": "", "since": "noon", "token": "t"}

    def hold():
        command = [sys.executable, "-c", HOLD, f"gs://{BUCKET}/held"]
        done = subprocess.run(command, env=bucket, capture_output=True, text=True, timeout=120, check=False)
        assert f"waiting whether process 7 on another, which trains in gs://{BUCKET}/held, is still" in done.stderr
        return done.returncode, done.stdout, done.stderr.splitlines()[-1]

    over = threading.Event()

    def beat():
        for i in itertools.count():
            write(bucket, "held/lock.json", json.dumps(holder | {"beat": i}))
            if over.wait(0.3):
                return

    beats = threading.Thread(target=beat)
    beats.start()
    code, _, line = hold()
    over.set()
    beats.join()
    assert (code, line.split(", expected")[0]) == (
        2, f"train: --workdir: gs://{BUCKET}/held: process 7 on another trains here since noon"
    )  # fmt: skip
    assert hold()[:2] == (0, "held\n")
    assert "held/lock.json" not in listing(bucket)


@pytest.mark.slow
def test_convert_train_stop_and_resume_in_a_bucket(bucket, way, tmp_path):
    draw_clips(tmp_path / "clips", 4, seed=5, frames=5)
    # A checkpoint that itself lies in the bucket is converted by a command; the others by the same in one process.
    original = f"gs://{BUCKET}/original/{VAE_FILE}"
    weights = [f"gs://{BUCKET}/weights/{name}" for name in ("high", "low", "umt5", "vae")]
    kinds, sources = ("dit", "dit", "umt5"), (DIT_FILES["dit"], DIT_FILES["dit2"], f"umt5/{T5_FILE}")
    bucket = bucket | {
        "RFL_JAX_CACHE": str(tmp_path / "cache"),
        "UPLOAD": json.dumps([str(ASSETS / "vae" / VAE_FILE), original]),
        "CONVERT": json.dumps([[k, str(ASSETS / s), w] for k, s, w in zip(kinds, sources, weights, strict=False)]),
    }
    subprocess.run([sys.executable, "-c", FILL], env=bucket, check=True)
    run(bucket, "convert", "vae", "--src", original, "--dst", weights[-1])

    held_out = [f"--config.eval.file_name={tmp_path / 'clips' / 'metadata.csv'}", "--config.eval.num_samples=2"]

    command = [
        "rfl_jax.train", "--config=configs/mini.py", "--config.data.num_frames=5", f"--workdir=gs://{BUCKET}/mini",
        f"--config.model_paths={json.dumps(weights)}", f"--config.file_name={tmp_path / 'clips' / 'metadata.csv'}",
        "--config.train_batch_size=2", "--config.per_device_train_batch_size=2",
        "--config.num_inference_steps=4", "--config.mid_timestep=2", "--config.final_timestep=3", "--config.sample_every=1",
    ]  # fmt: skip

    # While one trains another is refused, and the bucket is out of reach for longer than gcsfs has patience.
    one_step = [
        sys.executable,
        "-m",
        *command,
        "--config.max_steps=1",
        "--config.eval.file_name=",
        "--config.eval_every=0",
    ]
    trains = subprocess.Popen(one_step, env=bucket, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    while "mini/lock.json" not in listing(bucket):
        assert trains.poll() is None, trains.communicate()[1]
        time.sleep(0.2)
    lock = read(bucket, "mini/lock.json")
    trains.send_signal(signal.SIGSTOP)
    other = subprocess.run(one_step, env=bucket, capture_output=True, text=True, timeout=300, check=False)
    assert (other.returncode, other.stderr.count("\n")) == (2, 1), other.stderr
    assert f"gs://{BUCKET}/mini: process {trains.pid} on {socket.gethostname()} trains here since" in other.stderr
    way.cut()
    trains.send_signal(signal.SIGCONT)
    assert any("gs://: trying again, as the network failed" in line for line in trains.stderr)
    way.mend()
    errors = trains.stderr.read()
    assert trains.wait() == 0, errors
    trains.stderr.close()
    assert "mini/lock.json" not in listing(bucket)
    # A lock whose process is gone, as one that was killed leaves it, keeps nobody out.
    write(bucket, "mini/lock.json", lock)
    first = [json.loads(line) for line in read(bucket, "mini/metrics.jsonl").splitlines()]
    assert [line["step"] for line in first] == [1]
    done = run(bucket, *command, "--config.max_steps=2", *held_out, "--config.eval_every=2")
    assert "waiting whether" not in done.stderr
    assert f"next: python -m rfl_jax.report gs://{BUCKET}/mini" in done.stdout
    both = [json.loads(line) for line in read(bucket, "mini/metrics.jsonl").splitlines()]
    assert both[0] == first[0]
    assert [line["step"] for line in both] == [1, 2]
    # Validated, evaluated and reported from there.
    result = json.loads(read(bucket, "mini/evaluation.json"))
    record = json.loads(read(bucket, "mini/validation.json"))
    assert record["validations"][0]["judge_sim"] == pytest.approx(result["judge_sim"]["tuned"], rel=1e-4)
    run(bucket, "rfl_jax.report", f"gs://{BUCKET}/mini", "-o", str(tmp_path / "page.html"))
    page = (tmp_path / "page.html").read_text()
    assert f"{result['judge_sim']['tuned']:.4f}" in page
    assert page.count("<video") == 6
    exported = tmp_path / "lora.safetensors"
    run(bucket, "convert", "export", "--workdir", f"gs://{BUCKET}/mini", "--dst", str(exported))
    assert len(load_file(exported)) == 6 * 10 * 2
    names = set(listing(bucket))
    assert {"mini/config.json", "mini/dit2_lora.safetensors", "mini/samples/step_000002.mp4"} <= names
    assert any(name.startswith("mini/cache/") and name.endswith(".prefix.npz") for name in names)
    assert any(name.startswith("mini/tensorboard/") for name in names)
    assert any(name.startswith("mini/best/2/") for name in names)
    assert not any(".tmp" in name or ".writable" in name for name in names)
