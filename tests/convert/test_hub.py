"""Weights from a hub: a server on this machine that speaks its API, broken downloads included."""

import hashlib
import http.server
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import urllib.parse
from pathlib import Path

import pytest

from convert import store
from rfl_jax.miniature.world import ASSETS, DIT_FILES

ROOT = Path(__file__).parents[2]
REPOSITORY = "someone/network"
COMMIT = "0123456789abcdef0123456789abcdef01234567"
TAGGED = "76543210fedcba9876543210fedcba9876543210"


class Hub(http.server.BaseHTTPRequestHandler):
    """What huggingface_hub asks for: the listing of a repository, and its files by parts."""

    protocol_version = "HTTP/1.1"
    files: dict[str, bytes] = {}  # noqa: RUF012 set by the fixture
    tagged: dict[str, bytes] = {}  # noqa: RUF012 files of the revision v1
    asked: list[str] = []  # noqa: RUF012 paths
    breaks: list[int] = []  # noqa: RUF012 after how many bytes the next downloads end
    ranges: list[str] = []  # noqa: RUF012 asked for

    def log_message(self, *_):
        pass

    def answer(self, status, headers, body):
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD" or not body:
            return
        if self.breaks and len(body) > 100_000:
            self.wfile.write(body[: self.breaks.pop()])
            self.wfile.flush()
            self.close_connection = True
            self.connection.close()
            return
        self.wfile.write(body)

    def json(self, content, status=200):
        body = json.dumps(content).encode()
        self.answer(status, {"Content-Length": str(len(body)), "Content-Type": "application/json"}, body)

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        path = urllib.parse.unquote(urllib.parse.urlparse(self.path).path)
        self.asked.append(path)
        found = re.fullmatch(f"(/api/models)?/{REPOSITORY}(?:/(tree|revision|resolve)/([^/]+)/?(.*))?", path)
        if not found:
            return self.answer(404, {"X-Error-Code": "RepoNotFound", "Content-Length": "0"}, b"")
        _, what, revision, name = found.groups()
        commit = {None: COMMIT, "main": COMMIT, "v1": TAGGED}.get(revision, revision)
        if commit not in (COMMIT, TAGGED):
            return self.answer(404, {"X-Error-Code": "RevisionNotFound", "Content-Length": "0"}, b"")
        files = self.files if commit == COMMIT else self.tagged
        if what == "tree":
            entries = [{"type": "file", "oid": "a" * 40, "size": len(data), "path": n} for n, data in files.items()]
            return self.json(entries)
        if what != "resolve":
            siblings = [{"rfilename": name} for name in files]
            return self.json({"id": REPOSITORY, "modelId": REPOSITORY, "sha": commit, "siblings": siblings})
        if name not in files:
            return self.answer(404, {"X-Error-Code": "EntryNotFound", "Content-Length": "0"}, b"")
        data = files[name]
        tag = hashlib.sha256(data).hexdigest()
        headers = {"ETag": f'"{tag}"', "X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
        asked = self.headers.get("Range")
        begin = 0
        if asked and self.command == "GET":
            self.ranges.append(asked)
            begin = int(asked.removeprefix("bytes=").split("-")[0])
            headers["Content-Range"] = f"bytes {begin}-{len(data) - 1}/{len(data)}"
        headers["Content-Length"] = str(len(data) - begin)
        self.answer(206 if begin else 200, headers, data[begin:])
        return None


@pytest.fixture
def hub(tmp_path):
    """Environment of processes that see the hub."""
    dit = (ASSETS / DIT_FILES["dit2"]).read_bytes()
    config = (ASSETS / DIT_FILES["dit2"]).with_name("config.json")
    folder = {"config.json": config.read_bytes()} if config.exists() else {}
    Hub.files = {
        "README.md": b"# a network",
        "diffusion_pytorch_model.safetensors": dit,
        "low/diffusion_pytorch_model.safetensors": dit,
        **folder,
        **{f"low/{name}": data for name, data in folder.items()},
    }
    Hub.tagged, Hub.breaks, Hub.ranges, Hub.asked = {}, [], [], []
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield {k: v for k, v in os.environ.items() if k not in ("XLA_FLAGS", "HF_HUB_OFFLINE")} | {
        "HF_ENDPOINT": f"http://127.0.0.1:{server.server_address[1]}",
        "HF_HOME": str(tmp_path / "home"),
        "HF_HUB_DISABLE_XET": "1",
    }
    server.shutdown()
    server.server_close()


def convert(hub, *arguments):
    command = [sys.executable, "-m", "convert", *map(str, arguments)]
    return subprocess.run(command, env=hub, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)


def fetched(hub, *sources):
    """A process that prints the local files of each source."""
    script = (
        "import sys\n"
        "from rfl_jax.errors import refuse_in_one_line\n"
        "from rfl_jax.fetch import fetch\n"
        "with refuse_in_one_line('fetch'):\n"
        "    for source in sys.argv[1:]:\n"
        "        print(*fetch(source))\n"
    )
    command = [sys.executable, "-c", script, *sources]
    return subprocess.run(command, env=hub, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)


def contents(done):
    assert done.returncode == 0, done.stderr
    return [[Path(file).read_bytes() for file in line.split()] for line in done.stdout.splitlines()]


def test_a_revision_is_what_it_was(hub):
    Hub.files = {"model.safetensors": b"now"}
    Hub.tagged = {"model.safetensors": b"then"}
    sources = [f"hub:{REPOSITORY}", f"hub:{REPOSITORY}@v1:*.safetensors", f"hub:{REPOSITORY}@{TAGGED}"]
    assert contents(fetched(hub, *sources)) == [[b"now"], [b"then"], [b"then"]]
    for revision in ("v2", "0" * 40):
        done = fetched(hub, f"hub:{REPOSITORY}@{revision}:*")
        assert done.returncode == 2
        assert done.stderr.count("\n") == 1, done.stderr
        assert f"{REPOSITORY}@{revision}:*: cannot be fetched from the hub" in done.stderr


@pytest.mark.parametrize("how", ["offline", "unreachable"])
def test_what_is_in_the_cache_needs_no_hub(hub, how):
    Hub.tagged = {"model.safetensors": b"then"}
    low, tagged = f"hub:{REPOSITORY}:low/*", f"hub:{REPOSITORY}@v1"
    first = fetched(hub, low, tagged, low)
    away = hub | ({"HF_HUB_OFFLINE": "1"} if how == "offline" else {"HF_ENDPOINT": "http://127.0.0.1:9"})
    asked = len(Hub.asked)
    done = fetched(away, low, tagged, low)
    assert contents(done) == contents(first)
    assert done.stdout == first.stdout
    assert len(Hub.asked) == asked
    # A line for each commit that could not be asked for; a commit that is named outright needs none.
    assert done.stderr.count("Could not reach the Hub") == 2
    assert done.stderr.count("\n") == 2, done.stderr
    named = fetched(away, f"hub:{REPOSITORY}@{COMMIT}:low/*")
    assert (named.stdout, named.stderr) == (first.stdout.splitlines(True)[0], "")


def test_what_is_not_in_the_cache_is_named_where_the_hub_may_not_be_asked(hub):
    contents(fetched(hub, f"hub:{REPOSITORY}:low/*"))
    away = hub | {"HF_HUB_OFFLINE": "1"}
    for source, message in (
        (f"hub:{REPOSITORY}@{COMMIT}:diffusion*", "HF_HUB_OFFLINE is set, and the hub's cache has no "),
        (f"hub:{REPOSITORY}@v1", f"{REPOSITORY}@v1: cannot be fetched from the hub"),
    ):
        done = fetched(away, source)
        assert done.returncode == 2
        assert done.stderr.count("\n") == 1, done.stderr
        assert message in done.stderr


def test_a_cache_that_another_tool_filled_is_listed_by_its_files(hub):
    script = f"from huggingface_hub import hf_hub_download\nhf_hub_download('{REPOSITORY}', 'README.md')"
    subprocess.run([sys.executable, "-c", script], env=hub, check=True, capture_output=True)
    done = fetched(hub | {"HF_HUB_OFFLINE": "1"}, f"hub:{REPOSITORY}:*")
    assert contents(done) == [[b"# a network"]]


def test_a_name_that_leaves_the_repository_is_refused(hub, tmp_path):
    for name in ("../../../../outside.safetensors", "low/../../../../outside.safetensors", "/outside.safetensors"):
        Hub.files = {name: b"harm"}
        done = fetched(hub, f"hub:{REPOSITORY}:*outside*")
        assert done.returncode == 2
        assert done.stderr.count("\n") == 1, done.stderr
        assert "cannot be fetched from the hub" in done.stderr
        shutil.rmtree(tmp_path / "home")
    assert not list(tmp_path.rglob("outside*"))


def test_a_broken_download_goes_on_where_it_broke(hub):
    # Larger than the parts in which the library writes.
    data = b"".join(hashlib.sha256(bytes([i % 256, i // 256])).digest() for i in range(1 << 16)) * 12
    Hub.files["big.safetensors"] = data
    Hub.breaks = [15_000_000]
    done = fetched(hub, f"hub:{REPOSITORY}:big*")
    assert done.returncode == 0, done.stderr
    assert not Hub.breaks
    # The rest alone was asked for again.
    assert any(int(asked.removeprefix("bytes=").split("-")[0]) >= 10_000_000 for asked in Hub.ranges), Hub.ranges
    assert Path(done.stdout.strip()).read_bytes() == data


def test_a_repository_is_converted(hub, tmp_path):
    hints = ["--set", "num_heads=4", "text_len=32"]
    done = convert(hub, "dit", "--src", f"hub:{REPOSITORY}:low/*", "--dst", tmp_path / "out", *hints)
    assert done.returncode == 0, done.stderr
    assert store.describe("dit", [str(tmp_path / "out")]).num_layers == 6
    shown = convert(hub, "inspect", tmp_path / "out").stdout
    assert f"hub:{REPOSITORY}:low/*" in shown

    # Without a pattern: the weights at the top.
    done = convert(hub, "dit", "--src", f"hub:{REPOSITORY}", "--dst", tmp_path / "top", *hints)
    assert done.returncode == 0, done.stderr


def test_what_the_hub_does_not_have_is_refused_in_one_line(hub, tmp_path):
    for source, message in (
        (f"hub:{REPOSITORY}:high/*", f"{REPOSITORY}: no file matches high/*"),
        ("hub:nobody/nothing:*", "nobody/nothing:*: cannot be fetched from the hub"),
        ("hub:network", "network: expected org/name:pattern"),
        (f"hub:{REPOSITORY}@:*", "expected org/name:pattern, or org/name@revision:pattern"),
    ):
        done = convert(hub, "dit", "--src", source, "--dst", tmp_path / "out")
        assert done.returncode == 2
        assert done.stderr.count("\n") == 1, done.stderr
        assert message in done.stderr
    assert not (tmp_path / "out").exists()


def test_the_originals_names_of_files_train(hub):
    # find_sources alone: its files are local afterwards.
    script = (
        "import json\n"
        "from rfl_jax.config import default_config, parse\n"
        "from rfl_jax.sources import find_sources\n"
        "config = default_config()\n"
        f"config.model_id_with_origin_paths = ','.join(['{REPOSITORY}:low/diffusion*.safetensors'] * 4)\n"
        "config.tokenizer_path = 'here'\n"
        "print(json.dumps(find_sources(parse(config), experts=2).dit2))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], env=hub, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    (file,) = json.loads(done.stdout)
    assert file.endswith("low/diffusion_pytorch_model.safetensors")
    assert Path(file).read_bytes() == Hub.files["low/diffusion_pytorch_model.safetensors"]
