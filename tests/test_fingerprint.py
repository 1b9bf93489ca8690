"""A fingerprint changes with any byte, costs one reading, and is the hub's own where the hub has one."""

import hashlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from etils import epath

from rfl_jax import fingerprint as module
from rfl_jax.errors import UserError
from rfl_jax.fingerprint import content_of, files_of, fingerprint

SIZE = 3 << 20


@pytest.fixture
def file(tmp_path, monkeypatch):
    """Weights that nobody has touched for a while, and an empty cache."""
    monkeypatch.setenv("RFL_JAX_CACHE", str(tmp_path / "cache"))
    path = epath.Path(tmp_path / "weights" / "model.safetensors")
    path.parent.mkdir()
    path.write_bytes(os.urandom(SIZE))
    return path


@pytest.fixture
def read(monkeypatch):
    """Names of files that are read whole, as they are."""
    names = []
    real = module._sha256
    monkeypatch.setattr(module, "_sha256", lambda file, size: (names.append(file.name), real(file, size))[1])
    return names


def later(monkeypatch, seconds=10):
    now = time.time_ns()
    monkeypatch.setattr(module.time, "time_ns", lambda: now + seconds * 1_000_000_000)


def flip(path, at):
    """Another byte in the middle, with size and time of change as before."""
    path = Path(path)
    stat = path.stat()
    with path.open("r+b") as stream:
        stream.seek(at)
        byte = stream.read(1)
        stream.seek(at)
        stream.write(bytes([byte[0] ^ 1]))
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


@pytest.mark.parametrize("at", [0, SIZE // 2 + 1, SIZE - 1])
def test_a_byte_anywhere_changes_it(file, at, monkeypatch, read):
    later(monkeypatch)
    first = fingerprint(file)
    assert first == f"sha256:{hashlib.sha256(file.read_bytes()).hexdigest()}"
    assert fingerprint(file) == first
    assert read == [file.name]
    flip(file, at)
    assert fingerprint(file) == f"sha256:{hashlib.sha256(file.read_bytes()).hexdigest()}" != first


def test_what_changed_a_moment_ago_is_not_remembered(file, read):
    for _ in range(2):
        fingerprint(file)
    assert read == [file.name] * 2


def test_a_file_that_changes_while_it_is_read_is_not_remembered(file, monkeypatch, read):
    later(monkeypatch)
    real = module._sha256

    def slowly(path, size):
        digest = real(path, size)
        flip(path, 5)
        return digest

    monkeypatch.setattr(module, "_sha256", slowly)
    fingerprint(file)
    monkeypatch.setattr(module, "_sha256", real)
    assert fingerprint(file) == f"sha256:{hashlib.sha256(file.read_bytes()).hexdigest()}"


def test_a_cache_that_cannot_be_written_or_read_costs_a_reading(file, tmp_path, monkeypatch):
    later(monkeypatch)
    want = fingerprint(file)
    (note,) = (tmp_path / "cache" / "hashes").iterdir()
    for text in ("", "[]", "{}", '{"state": null}'):
        note.write_text(text)
        assert fingerprint(file) == want
    monkeypatch.setenv("RFL_JAX_CACHE", str(file / "no folder"))
    assert fingerprint(file) == want


def test_processes_remember_side_by_side(file, tmp_path):
    script = (
        "import sys\n"
        "from rfl_jax import fingerprint as f\n"
        "f.SETTLED_NS = -10**12\n"
        "for _ in range(30):\n"
        "    for note in (f.user_cache() / 'hashes').glob('*.json'):\n"
        "        note.unlink(missing_ok=True)\n"
        "    print(f.fingerprint(sys.argv[1]))\n"
    )
    command = [sys.executable, "-c", script, str(file)]
    running = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    found = {line for process in running for line in process.communicate()[0].splitlines()}
    assert found == {f"sha256:{hashlib.sha256(file.read_bytes()).hexdigest()}"}
    assert [p.suffix for p in (tmp_path / "cache" / "hashes").iterdir()] == [".json"]


def test_the_hubs_own_name_is_taken_until_the_file_changes(tmp_path, read, monkeypatch):
    monkeypatch.setenv("RFL_JAX_CACHE", str(tmp_path / "cache"))
    later(monkeypatch)
    data = b"some weights"
    digest = hashlib.sha256(data).hexdigest()
    blob = tmp_path / "models--a--b" / "blobs" / digest
    blob.parent.mkdir(parents=True)
    blob.write_bytes(data)
    link = tmp_path / "models--a--b" / "snapshots" / "0" / "model.safetensors"
    link.parent.mkdir(parents=True)
    link.symlink_to(blob)
    assert fingerprint(link) == f"sha256:{digest}"
    assert read == []
    # The same content outside the hub's cache is the same.
    (tmp_path / "copy.safetensors").write_bytes(data)
    assert fingerprint(tmp_path / "copy.safetensors") == f"sha256:{digest}"
    # Who writes through the link is found out.
    flip(link, 3)
    assert fingerprint(link) == f"sha256:{hashlib.sha256(blob.read_bytes()).hexdigest()}" != f"sha256:{digest}"


def test_a_folder_changes_with_a_name_or_a_file_in_it(file):
    folder = file.parent
    found = {fingerprint(folder)}
    flip(file, SIZE // 2)
    found.add(fingerprint(folder))
    file.rename(folder / "other.safetensors")
    found.add(fingerprint(folder))
    (folder / "more").write_text("")
    found.add(fingerprint(folder))
    assert len(found) == 4
    # Not with where it lies.
    assert fingerprint(folder.rename(folder.parent / "elsewhere")) in found


def test_an_index_stands_for_its_shards_and_weights_for_the_sizes_beside_them(file):
    index = file.parent / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": file.name, "b": file.name, "c": "../outside.safetensors"}}))
    assert files_of(index) == [index, file]
    first = fingerprint(index)
    flip(file, SIZE // 2)
    second = fingerprint(index)
    (file.parent / "config.json").write_text('{"num_heads": 4}')
    assert files_of(file) == [file, file.parent / "config.json"]
    assert len({first, second, fingerprint(index)}) == 3
    third = fingerprint(file)
    (file.parent / "adapter_config.json").write_text('{"r": 4, "lora_alpha": 16}')
    assert fingerprint(file) != third
    assert fingerprint(file) != content_of(file)


def test_an_onnx_graph_comes_with_its_data(tmp_path):
    graph, data = epath.Path(tmp_path / "net.onnx"), epath.Path(tmp_path / "net.onnx.data")
    graph.write_bytes(b"graph")
    alone = fingerprint(graph)
    data.write_bytes(b"data")
    assert files_of(graph) == [graph, data]
    assert fingerprint(graph) != alone


def test_what_is_not_there_is_refused_by_name(tmp_path):
    with pytest.raises(UserError, match=r"none\.onnx: cannot be read \(No such file"):
        fingerprint(tmp_path / "none.onnx")
