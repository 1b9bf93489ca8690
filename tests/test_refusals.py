"""Bad inputs end in one line that says what was expected, exit status 2, and nothing written."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from safetensors.numpy import load_file, save_file

from convert import store
from convert.__main__ import main as convert_main
from rfl_jax.cli import open_workdir
from rfl_jax.errors import UserError, refuse_in_one_line
from rfl_jax.miniature.world import ASSETS, DETECTOR_FILE, DIT_FILES, T5_FILE, VAE_FILE, asset_paths
from tests import COMPILER

ROOT = Path(__file__).parents[1]
DIT = ASSETS / DIT_FILES["dit2"]


def refused(capsys, monkeypatch, *arguments):
    """The line that `python -m convert` prints; it must exit with 2."""
    monkeypatch.setattr(sys, "argv", ["convert", *map(str, arguments)])
    with pytest.raises(SystemExit) as stop, refuse_in_one_line("convert"):
        convert_main()
    assert stop.value.code == 2
    out = capsys.readouterr()
    assert out.err.count("\n") == 1
    return out.err


def truncated(tmp_path):
    file = tmp_path / "cut.safetensors"
    file.write_bytes(DIT.read_bytes()[:-1000])
    return "dit", file


def garbage(tmp_path):
    file = tmp_path / "garbage.safetensors"
    file.write_bytes(b"\xff" * 100)
    return "dit", file


def changed(tmp_path, change):
    tensors = load_file(DIT)
    change(tensors)
    save_file(tensors, tmp_path / "model.safetensors")
    return "dit", tmp_path / "model.safetensors"


def missing_shard(tmp_path):
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "absent.safetensors"}}))
    return "dit", tmp_path


def shard_outside(tmp_path):
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "../../x.safetensors"}}))
    return "dit", tmp_path


def data_outside(tmp_path):
    """An ONNX graph whose weights are said to lie elsewhere."""
    tensor = onnx.TensorProto(name="w", data_type=1, dims=[4], data_location=onnx.TensorProto.EXTERNAL)
    tensor.external_data.add(key="location", value="../outside")
    ends = [onnx.helper.make_tensor_value_info(name, 1, [4]) for name in "ab"]
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("Add", ["a", "w"], ["b"])], "g", ends[:1], ends[1:], [tensor]
    )  # fmt: skip
    (tmp_path.parent / "outside").write_bytes(bytes(16))
    (tmp_path / "net.onnx").write_bytes(onnx.helper.make_model(graph).SerializeToString())
    return "arcface", tmp_path / "net.onnx"


def bad_index(tmp_path):
    (tmp_path / "model.safetensors.index.json").write_text("{")
    return "dit", tmp_path


def transposed(tensors):
    tensors["head.head.weight"] = np.ascontiguousarray(tensors["head.head.weight"].T)


CASES = {
    "truncated safetensors": (truncated, "cut.safetensors: expected a whole safetensors file"),
    "no safetensors": (garbage, "garbage.safetensors: expected a whole safetensors file"),
    "missing tensor": (
        lambda p: changed(p, lambda t: t.pop("blocks.1.ffn.0.bias")),
        "missing tensor for blocks.ffn.up.bias of layer 1",
    ),
    "extra tensor": (lambda p: changed(p, lambda t: t.update(more=np.zeros(3))), "unexpected tensor more"),
    "wrong shape": (lambda p: changed(p, transposed), "head.head.weight has shape"),
    "missing shard": (missing_shard, "shard absent.safetensors is missing"),
    "shard outside the folder": (shard_outside, "lies outside the folder"),
    "broken index": (bad_index, "index.json: expected a JSON object ("),
    "absent file": (lambda p: ("vae", p / "none.safetensors"), "none.safetensors: no such file or folder"),
    "empty folder": (lambda p: ("vae", p), "expected one .safetensors file"),
    "another network": (lambda p: ("umt5", ASSETS / "vae" / VAE_FILE), "missing tensor for embedding"),
    "an autoencoder that is none": (
        lambda p: ("vae", ASSETS / "umt5" / T5_FILE),
        "missing tensor encoder.conv1.weight",
    ),
    "a detector as embedder": (lambda p: ("arcface", ASSETS / DETECTOR_FILE), "expected PRelu"),
    "ONNX data outside the folder": (data_outside, "net.onnx: expected an ONNX model with its data beside it"),
    "text as ONNX": (lambda p: ("scrfd", ROOT / "README.md"), "README.md: expected an ONNX model"),
}


@pytest.mark.parametrize("name", CASES)
def test_bad_sources_are_refused_in_one_line(name, tmp_path, capsys, monkeypatch):
    make, message = CASES[name]
    (tmp_path / "src").mkdir()
    kind, source = make(tmp_path / "src")
    destination = tmp_path / "out"
    line = refused(capsys, monkeypatch, kind, "--src", source, "--dst", destination)
    assert message in line
    assert not destination.exists()


def test_bad_arguments_are_refused_in_one_line(tmp_path, capsys, monkeypatch):
    assert "invalid choice: 'dat'" in refused(capsys, monkeypatch, "dat", "--src", "a", "--dst", "b")
    assert "exists already" in refused(capsys, monkeypatch, "dit", "--src", DIT, "--dst", tmp_path)
    out = tmp_path / "out"
    assert "heads: not a setting of DiT" in refused(
        capsys, monkeypatch, "dit", "--src", DIT, "--dst", out, "--set", "heads=2"
    )
    assert "does not split width" in refused(
        capsys, monkeypatch, "dit", "--src", DIT, "--dst", out, "--set", "num_heads=7"
    )
    assert not out.exists()


def test_converted_weights_are_told_apart(tmp_path):
    cfg, arrays = store.convert("umt5", [str(ASSETS / "umt5" / T5_FILE)])
    store.save(str(tmp_path / "t5"), "umt5", cfg, arrays)
    model = store.open_component("umt5", [str(tmp_path / "t5")])
    assert model.cfg == cfg
    with pytest.raises(UserError, match="holds umt5 weights, expected dit"):
        store.open_component("dit", [str(tmp_path / "t5")])
    cfg, arrays = store.convert("scrfd", [str(ASSETS / DETECTOR_FILE)])
    store.save(str(tmp_path / "scrfd"), "scrfd", cfg, arrays)
    assert store.open_component("scrfd", [str(tmp_path / "scrfd")]).cfg == cfg


def run(*arguments):
    # As a user has it: one device, not the tests' eight.
    environment = os.environ | {"XLA_FLAGS": COMPILER}
    command = [sys.executable, "-m", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, check=False)


def test_commands_refuse_in_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    mini = "--config=configs/mini.py"
    cases = [
        (("rfl_jax.train", mini), "--workdir: expected a folder"),
        (("rfl_jax.train", f"--workdir={tmp_path}"), "--config: expected a config file"),
        (("rfl_jax.train", mini, f"--workdir={tmp_path}", "--config.learning_rat=1"), "learning_rat"),
        (("rfl_jax.train", "--config=configs/none.py", f"--workdir={tmp_path}"), "configs/none.py"),
        (("rfl_jax.evaluate", f"--workdir={tmp_path}"), "expected the folder of a run"),
    ]
    for arguments, message in cases:
        result = run(*arguments)
        assert result.returncode == 2, (arguments, result.stderr)
        assert message in result.stderr.strip().splitlines()[-1], (arguments, result.stderr)
        assert "Traceback" not in result.stderr


def test_workdir_is_made_where_it_can_be(tmp_path):
    assert open_workdir(str(tmp_path / "a" / "b")).is_dir()
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"file.*not writable"):
        open_workdir(str(tmp_path / "file"))


def test_paths_of_weights_are_checked_before_anything_is_loaded():
    from rfl_jax.config import default_config, parse
    from rfl_jax.sources import find_sources

    def sources(**changes):
        config = default_config()
        config.update(asset_paths() | changes)
        return find_sources(parse(config), experts=2)

    assert sources().vae == [str(ASSETS / "vae" / VAE_FILE)]
    for paths, message in (
        ("", "config.model_paths: empty"),
        ("[", "expected a JSON list"),
        ('["a"]', "1 entries, expected 4"),
        ('["a", "b", "c", "d"]', "a: no such file or folder, expected the high_noise_model"),
        ("nowhere.json", "nowhere.json: no such file"),
        ("[1, 2, 3, 4]", "1: expected a path"),
    ):
        with pytest.raises(UserError, match=message):
            sources(model_paths=paths)
    with pytest.raises(UserError, match="expected org/name:pattern"):
        sources(model_paths="", model_id_with_origin_paths="Wan-AI")


def test_out_of_memory_is_one_line_that_names_the_plan():
    script = (
        "import jax.numpy as jnp\n"
        "from rfl_jax import cli\n"
        "cli.run(lambda: jnp.zeros((1 << 50,), jnp.int8).block_until_ready(), 'train')\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith("train: out of memory (RESOURCE_EXHAUSTED")
    assert "rfl_jax.plan" in done.stderr
    assert done.stderr.count("\n") == 1
