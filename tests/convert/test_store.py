"""Orbax weights: written piece by piece, read by the pieces that a mesh needs, and where they come from."""

import hashlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from convert import store, umt5
from convert.__main__ import main as convert_main
from convert.export import lazy_converted
from convert.mapping import LazyArray, whole
from rfl_jax.errors import UserError
from rfl_jax.fingerprint import fingerprint
from rfl_jax.miniature.world import ASSETS, DIT_FILES, T5_FILE, VAE_FILE
from rfl_jax.models.wan.config import DIT_PRESETS
from rfl_jax.models.weights import get_arrays
from rfl_jax.sharding import shardings
from tests.devices import make_mesh

DIT = ASSETS / DIT_FILES["dit2"]


def command(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["convert", *map(str, arguments)])
    convert_main()


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    """The miniature's DiT as Orbax weights."""
    folder = tmp_path_factory.mktemp("converted") / "dit"
    cfg, arrays = store.convert("dit", [str(DIT)])
    counted = []
    store.save(str(folder), "dit", cfg, arrays, progress=counted.append)
    # Every byte is told of, layer by layer.
    assert sum(counted) == sum(array.nbytes for array in arrays.values())
    assert len(counted) == sum(len(list(array.pieces())) for array in arrays.values())
    return folder


def test_what_was_written_in_pieces_is_the_source(converted):
    _, arrays = store.convert("dit", [str(DIT)])
    found = store.restore(str(converted))
    assert found.keys() == arrays.keys()
    for name, array in arrays.items():
        assert found[name].dtype == array.dtype
        assert np.array_equal(found[name], whole(array))
    lazy = lazy_converted(str(converted))
    assert lazy.keys() == arrays.keys()
    for name, array in lazy.items():
        assert array.stacked == arrays[name].stacked
        assert np.array_equal(whole(array), found[name])


@pytest.mark.parametrize("source", ["safetensors", "converted"])
def test_devices_read_their_own_pieces(converted, source, monkeypatch):
    mesh = make_mesh(2, 2, 2)
    asked = []
    read = LazyArray.__getitem__

    def watched(self, index):
        part = read(self, index)
        asked.append((self, part.size))
        return part

    monkeypatch.setattr(LazyArray, "__getitem__", watched)
    path = str(converted if source == "converted" else DIT)
    model = store.open_component("dit", [path], places=lambda state: shardings(state, "dit", mesh))
    want = get_arrays(store.open_component("dit", [path]))
    split = 0
    for name, x in get_arrays(model).items():
        assert np.array_equal(x, want[name])
        pieces = {str(s.index) for s in x.addressable_shards}
        if "kernel" in name and name.startswith("blocks."):
            assert len(pieces) == 4, name
            split += 1
    assert split == 10
    if source == "safetensors":
        kernels = [(array, size) for array, size in asked if array.ndim == 3 and array.shape[1] % 4 == 0]
        assert any(size == array.size // 4 for array, size in kernels)


def test_an_interrupted_conversion_leaves_nothing_and_runs_again(tmp_path, monkeypatch):
    # As from the command line, but slow enough to be interrupted in the middle.
    script = tmp_path / "slowly.py"
    script.write_text(
        "import runpy, signal, sys, time\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # also where the tests run detached
        "from convert.mapping import LazyArray\n"
        "read = LazyArray.__getitem__\n"
        "LazyArray.__getitem__ = lambda self, index: (time.sleep(0.3), read(self, index))[1]\n"
        f"sys.argv = ['convert', 'dit', '--src', {str(DIT)!r}, '--dst', {str(tmp_path / 'out')!r}]\n"
        "runpy.run_module('convert', run_name='__main__')\n"
    )
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    process = subprocess.Popen(
        [sys.executable, script], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    while not list(tmp_path.glob("out*/weights*/blocks*/*")):
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert errors == "convert: interrupted\n"
    assert [path.name for path in tmp_path.iterdir()] == ["slowly.py"]
    command(monkeypatch, "dit", "--src", DIT, "--dst", tmp_path / "out")
    assert store.open_component("dit", [str(tmp_path / "out")]).cfg.num_layers == 6


def test_inspect_tells_origin_and_parameters(tmp_path, monkeypatch, capsys):
    command(monkeypatch, "vae", "--src", ASSETS / "vae" / VAE_FILE, "--dst", tmp_path / "vae", "--dtype", "bfloat16")
    folder = tmp_path / "vae"
    assert capsys.readouterr().out.endswith(f"\nnext: python -m convert inspect {folder}\n")
    command(monkeypatch, "inspect", folder)
    shown = capsys.readouterr().out
    size = (ASSETS / "vae" / VAE_FILE).stat().st_size
    digest = hashlib.sha256((ASSETS / "vae" / VAE_FILE).read_bytes()).hexdigest()
    assert "component   vae" in shown
    assert f"{VAE_FILE}  {size:,} bytes  sha256:{digest}\n" in shown
    assert "dtype       bfloat16" in shown
    assert "mapping_version" in shown
    assert "decoder.conv_in.kernel" in shown
    assert shown.endswith("\nnext: python -m rfl_jax.plan --config=CONFIG --topology=local\n")
    arrays = load_file(ASSETS / "vae" / VAE_FILE)
    assert f"{sum(x.size for x in arrays.values()):,} parameters" in shown
    with pytest.raises(UserError, match="expected weights written by python -m convert"):
        command(monkeypatch, "inspect", tmp_path)


def test_inspect_tells_what_was_merged_by_content(tmp_path, monkeypatch, capsys):
    tensors = load_file(DIT)
    for name, module in (("a", "self_attn.q"), ("b", "ffn.0")):
        out, inner = tensors[f"blocks.1.{module}.weight"].shape
        pair = {"A": np.ones((2, inner), np.float32), "B": np.full((out, 2), 0.01, np.float32)}
        save_file(
            {f"transformer_2.blocks.1.{module}.lora_{half}.weight": x for half, x in pair.items()},
            tmp_path / f"{name}.safetensors",
        )
    files = [tmp_path / "a.safetensors", tmp_path / "b.safetensors"]
    command(
        monkeypatch, "dit", "--src", DIT, "--dst", tmp_path / "out", "--lora", f"{files[0]}:0.5", files[1], "--expert", "low"
    )  # fmt: skip
    capsys.readouterr()
    command(monkeypatch, "inspect", tmp_path / "out")
    shown = capsys.readouterr().out
    for file, strength in zip(files, (0.5, 1.0), strict=True):
        assert f"merged      {file} at {strength}  {fingerprint(file)}\n" in shown
    assert "expert      low\n" in shown


@pytest.mark.parametrize("kind", ["dit", "vae", "umt5"])
def test_verify_compares_with_the_reference(kind, tmp_path, monkeypatch, capsys):
    pytest.importorskip("torch")
    source = {"dit": DIT, "vae": ASSETS / "vae" / VAE_FILE, "umt5": ASSETS / "umt5" / T5_FILE}[kind]
    # float32: the references are compared in it.
    save_file({key: x.astype(np.float32) for key, x in load_file(source).items()}, tmp_path / "model.safetensors")
    if (source.parent / "config.json").exists():
        (tmp_path / "config.json").write_text((source.parent / "config.json").read_text())
    hints = ["--set", "num_heads=4", "text_len=32"] if kind == "dit" else []
    command(monkeypatch, kind, "--src", tmp_path / "model.safetensors", "--dst", tmp_path / "out", "--verify", *hints)
    lines = [line for line in capsys.readouterr().out.splitlines() if "largest difference" in line]
    assert len(lines) == (2 if kind == "vae" else 1)
    for line in lines:
        assert float(line.split("transformers " if kind == "umt5" else "diffusers ")[1].split()[0]) < 1e-4


def test_umt5_without_shared_alias(tmp_path):
    # transformers stores the embedding once or twice.
    model = umt5.load(ASSETS / "umt5" / T5_FILE)
    arrays = {name: np.asarray(x, np.float32) for name, x in get_arrays(model).items()}
    from convert.mapping import unfill

    tensors = unfill(umt5.NAMINGS["transformers"], arrays)
    save_file(tensors, tmp_path / "once.safetensors")
    save_file(tensors | {"encoder.embed_tokens.weight": tensors["shared.weight"]}, tmp_path / "twice.safetensors")
    once, twice = (get_arrays(umt5.load(tmp_path / f"{n}.safetensors")) for n in ("once", "twice"))
    assert all(np.array_equal(once[name], twice[name]) for name in once)


def test_a_network_without_weights_is_its_own_each_time():
    first, second = (store.SAFETENSORS["dit"].abstract(DIT_PRESETS["mini"]) for _ in range(2))
    first.head.bias = None
    assert second.head.bias is not None
    assert store.SAFETENSORS["dit"].abstract(DIT_PRESETS["mini"]).head.bias is not None
