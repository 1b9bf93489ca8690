"""Adapters of both experts: diffusers' pipeline makes the same video with the two files as ours."""

import jax
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from convert import dit
from convert.export import adapter_file, expert_file
from rfl_jax.errors import UserError
from rfl_jax.models.lora import TARGETS, add_lora
from rfl_jax.models.wan.config import DIT_PRESETS
from rfl_jax.models.weights import dotted
from rfl_jax.sampling.trained import read_trained
from tests.golden import relative
from tests.sampling.small import (
    TINY,
    opened,
    our_steps,
    small_world,
    their_pipeline,
    their_scheduler,
    their_steps,
    tiny_config,
)

STEPS = 4


def random_adapters(seed):
    """Adapters of every layer that can have them, none of them zero."""
    rng = np.random.default_rng(seed)
    model = add_lora(dit.build(TINY["i2v"]), rank=3, targets=list(TARGETS), key=jax.random.key(0))
    state = nnx.to_flat_state(nnx.state(model, nnx.LoRAParam))
    return {dotted(path): 0.3 * rng.normal(size=x.shape).astype(np.float32) for path, x in state}


def written(folder, kind):
    """Adapters of both experts, and the two files that hold them."""
    trained = {name: random_adapters(seed) for seed, name in enumerate(("dit", "dit2"))}
    files = {name: expert_file(folder / "face.safetensors", kind, name) for name in trained}
    for name, arrays in trained.items():
        files[name].write_bytes(adapter_file(arrays, kind, {"base_model": "i2v", "network": name}))
    return trained, files


@pytest.mark.parametrize(
    ("kind", "names"),
    [
        ("diffusers", ["face_transformer.safetensors", "face_transformer_2.safetensors"]),
        ("comfyui", ["face_high_noise.safetensors", "face_low_noise.safetensors"]),
    ],
)
def test_every_step_with_both_files_is_diffusers_pipelines(kind, names, tmp_path, monkeypatch):
    modules = small_world("i2v", tmp_path)
    monkeypatch.setitem(DIT_PRESETS, "i2v", TINY["i2v"])
    config = tiny_config("i2v", tmp_path)
    _, files = written(tmp_path, kind)
    assert [file.name for file in files.values()] == names

    found, video, noise = our_steps("i2v", opened(config, lora=",".join(map(str, files.values()))), "euler", STEPS)
    theirs = their_pipeline("i2v", modules, their_scheduler("euler", STEPS, monkeypatch))
    theirs.load_lora_weights(str(files["dit"]), adapter_name="face")
    theirs.load_lora_weights(str(files["dit2"]), adapter_name="face", load_into_transformer_2=True)
    assert theirs.get_list_adapters() == {"transformer": ["face"], "transformer_2": ["face"]}
    wanted, want = their_steps("i2v", theirs, noise, STEPS)
    assert max(relative(a, b) for a, b in zip(found, wanted, strict=True)) < 1e-4
    assert np.abs(video - want).max() < 1.5 / 255

    # Both count: with one of them alone the steps of the other expert are others, from the first of them on.
    alone = our_steps("i2v", opened(config, lora=f"dit={files['dit']}"), "euler", STEPS)[0]
    differ = [relative(a, b) > 1e-2 for a, b in zip(found, alone, strict=True)]
    assert differ == [step >= differ.index(True) for step in range(STEPS)]
    assert 0 < differ.index(True) < STEPS
    # One name for both: without them either pipeline is as it was.
    theirs.set_adapters("face", 0.0)
    base = our_steps("i2v", opened(config), "euler", STEPS)[0]
    without = their_steps("i2v", theirs, noise, STEPS)[0]
    assert max(relative(a, b) for a, b in zip(base, without, strict=True)) < 1e-4
    assert relative(base[0], found[0]) > 1e-2


def test_one_file_may_hold_both_and_two_may_not_be_of_one(tmp_path, monkeypatch):
    monkeypatch.setitem(DIT_PRESETS, "i2v", TINY["i2v"])
    small_world("i2v", tmp_path)
    config = tiny_config("i2v", tmp_path)
    trained, files = written(tmp_path, "original")
    renamed = {
        f"{prefix}.{key}": x
        for name, prefix in (("dit", "transformer"), ("dit2", "transformer_2"))
        for key, x in load_file(files[name]).items()
    }
    save_file(renamed, tmp_path / "both.safetensors")
    for source in (str(tmp_path / "both.safetensors"), f"{files['dit']},{files['dit2']}"):
        found = read_trained(config, source)
        assert found.keys() == trained.keys()
        for name, arrays in trained.items():
            assert found[name].keys() == arrays.keys()
            assert all(np.array_equal(found[name][key], x) for key, x in arrays.items())

    for source, network in (
        (f"{files['dit']},dit={files['dit2']}", "dit"),
        (f"dit2={files['dit2']},{files['dit2']}", "dit2"),
    ):
        with pytest.raises(
            UserError, match=f"--lora: .*: {network} has adapters of a file before it already, expected one"
        ):
            read_trained(config, source)
