"""Checkpoints in whatever form they come; what is broken is refused in one line, at once, with nothing written."""

import json
import struct
import sys
import time

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from convert import dit
from convert.__main__ import main as convert_main
from convert.mapping import unfill
from convert.readers import Checkpoint, is_finite
from rfl_jax.errors import UserError, refuse_in_one_line
from rfl_jax.miniature.world import ASSETS, DIT_FILES, VAE_FILE
from rfl_jax.models.wan.config import DiTConfig
from rfl_jax.models.weights import get_arrays

CFG = DiTConfig(in_dim=8, out_dim=4, dim=16, ffn_dim=24, num_heads=2, num_layers=2, freq_dim=8, text_dim=6, text_len=4)
HINTS = {"num_heads": 2, "text_len": 4}


@pytest.fixture(scope="module")
def tensors():
    """A small DiT in the original's naming."""
    arrays = {name: np.asarray(x) for name, x in get_arrays(dit.build(CFG)).items()}
    return unfill(dit.NAMINGS["original"], arrays)


def load(source, **options):
    return {name: np.asarray(x, np.float32) for name, x in get_arrays(dit.load(source, **HINTS, **options)).items()}


def assert_equal(a, b, rtol=0.0):
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_allclose(a[name], b[name], rtol=rtol, err_msg=name)


@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.float16, ml_dtypes.bfloat16])
def test_types_are_kept_or_cast(tmp_path, tensors, dtype):
    cast = {key: x.astype(dtype) for key, x in tensors.items()}
    save_file(cast, tmp_path / "model.safetensors")
    model = dit.load(tmp_path, **HINTS)
    want = dit.load(tmp_path, **HINTS, dtype="float32")
    kernel = model.blocks.ffn.up.kernel[...]
    assert kernel.dtype == (np.float32 if dtype == np.float64 else dtype)  # jax has no float64 here
    assert want.blocks.ffn.up.kernel[...].dtype == np.float32
    np.testing.assert_array_equal(kernel.astype(np.float32), want.blocks.ffn.up.kernel[...])


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model.", "module._orig_mod."])
@pytest.mark.parametrize("rows", [False, True])
def test_scaled_8_bit_weights(tmp_path, tensors, prefix, rows):
    torch = pytest.importorskip("torch")
    from safetensors.torch import save_file as save_torch

    stored, want = {}, {}
    for key, x in tensors.items():
        name = prefix + key
        if key.startswith("blocks.") and key.endswith(".weight") and x.ndim == 2:
            scale = np.abs(x).max(1, keepdims=True) / 448 if rows else np.abs(x).max() / 448
            eight = torch.from_numpy(x / scale).to(torch.float8_e4m3fn)
            stored[name] = eight
            suffix = "weight_scale" if rows else "scale_weight"
            stored[name.removesuffix("weight") + suffix] = torch.tensor(scale, dtype=torch.float32)
            stored[name.removesuffix("weight") + "scale_input"] = torch.ones(())
            want[key] = (eight.float().numpy() * np.float32(scale)).astype(ml_dtypes.bfloat16)
        else:
            stored[name] = torch.from_numpy(np.array(x)).to(torch.bfloat16)
            want[key] = x.astype(ml_dtypes.bfloat16)
    stored["scaled_fp8"] = torch.zeros(2, dtype=torch.uint8)
    save_torch(stored, tmp_path / "fp8.safetensors")
    save_file(want, tmp_path / "want.safetensors")
    assert_equal(load(tmp_path / "fp8.safetensors"), load(tmp_path / "want.safetensors"))

    key = next(k for k in stored if k.endswith("_scale" if rows else "scale_weight"))
    del stored[key]
    save_torch(stored, tmp_path / "bare.safetensors")
    with pytest.raises(UserError, match="is 8-bit and has no scale"):
        load(tmp_path / "bare.safetensors")
    stored[key] = torch.ones(3)
    save_torch(stored, tmp_path / "shape.safetensors")
    with pytest.raises(UserError, match=r"the scale of .* has an unexpected shape"):
        load(tmp_path / "shape.safetensors")


def as_is(state):
    return state


def of_a_trainer(state):
    import torch

    return {"model": state, "optimizer": {"state": {0: {"exp_avg": torch.zeros(2)}}}, "epoch": 3, "ema": None}


def nested_twice(state):
    return {"state_dict": {"module": {f"_orig_mod.{key}": x for key, x in state.items()}}, "global_step": 7}


def of_self_forcing(state):
    return {"generator": {f"model.{key}": x for key, x in state.items()}, "critic": dict(state)}


def of_parameters(state):
    import torch

    return {key: torch.nn.Parameter(x) for key, x in state.items()} | {"iteration": torch.tensor(7)}


@pytest.mark.parametrize("name", ["model.pth", "pytorch_model.bin"])
@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("wrap", [as_is, of_a_trainer, nested_twice, of_self_forcing, of_parameters])
def test_pickles_hold_the_same(tmp_path, tensors, name, zipped, wrap):
    torch = pytest.importorskip("torch")
    state = {key: torch.from_numpy(np.array(x)).to(torch.bfloat16) for key, x in tensors.items()}
    folder = tmp_path / "folder"
    folder.mkdir()
    torch.save(wrap(state), folder / name, _use_new_zipfile_serialization=zipped)
    torch.save({}, folder / "training_args.bin")
    save_file({key: x.astype(ml_dtypes.bfloat16) for key, x in tensors.items()}, tmp_path / "model.safetensors")
    read, want = Checkpoint([folder]), Checkpoint([tmp_path / "model.safetensors"])
    assert read.shapes == want.shapes
    assert all(np.array_equal(read.read(key), want.read(key)) for key in want.shapes)


def test_a_pickle_converts_like_safetensors(tmp_path, tensors):
    torch = pytest.importorskip("torch")
    state = {key: torch.from_numpy(np.array(x)).to(torch.bfloat16) for key, x in tensors.items()}
    torch.save(state, tmp_path / "model.pth")
    save_file({key: x.astype(ml_dtypes.bfloat16) for key, x in tensors.items()}, tmp_path / "model.safetensors")
    assert_equal(load(tmp_path / "model.pth"), load(tmp_path / "model.safetensors"))
    part = Checkpoint([tmp_path / "model.pth"]).read("blocks.1.ffn.0.weight", (slice(2, 5), slice(1, 9)))
    assert np.array_equal(part, tensors["blocks.1.ffn.0.weight"].astype(ml_dtypes.bfloat16)[2:5, 1:9])


def test_pickles_that_run_code_or_are_broken_are_refused(tmp_path):
    torch = pytest.importorskip("torch")
    import fractions

    torch.save({"x": fractions.Fraction(1, 2)}, tmp_path / "code.pth")
    (tmp_path / "text.pth").write_text("no pickle")
    torch.save({"x": torch.zeros(2, dtype=torch.int32)}, tmp_path / "whole.pth")
    torch.save([1, 2], tmp_path / "list.pth")
    for name in ("code", "text", "list"):
        with pytest.raises(UserError, match=rf"{name}\.pth: expected a state dict of tensors"):
            load(tmp_path / f"{name}.pth")
    with pytest.raises(UserError, match=r"x \(torch.int32\): expected floating-point tensors"):
        load(tmp_path / "whole.pth")


def test_pickles_of_two_networks_or_of_none_are_refused_with_what_they_hold(tmp_path):
    torch = pytest.importorskip("torch")
    state = {"a.weight": torch.zeros(2)}
    for content, message in (
        ({"model": state, "ema": state}, r"two\.pth: holds model and ema, expected one network: keep one with"),
        (
            {"net": state, "epoch": 3},
            r"expected a state dict of tensors, at the top or under one of .*found net \(dict\)",
        ),
        ({"model": {}}, r"found model \(dict\)"),
    ):
        torch.save(content, tmp_path / "two.pth")
        with pytest.raises(UserError, match=message):
            Checkpoint([tmp_path / "two.pth"])


def test_shards_of_pickles_are_read_by_their_index(tmp_path, tensors):
    torch = pytest.importorskip("torch")
    keys = sorted(tensors)
    parts = {"pytorch_model-1.bin": keys[::2], "pytorch_model-2.bin": keys[1::2]}
    for name, part in parts.items():
        torch.save({key: torch.from_numpy(np.array(tensors[key])) for key in part}, tmp_path / name)
    weight_map = {key: name for name, part in parts.items() for key in part}
    index = tmp_path / "pytorch_model.bin.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    checkpoint = Checkpoint([tmp_path])
    assert all(np.array_equal(checkpoint.read(key), x) for key, x in tensors.items())
    index.write_text(json.dumps({"weight_map": weight_map | {"more": "pytorch_model-2.bin"}}))
    with pytest.raises(UserError, match=r"pytorch_model-2\.bin: lacks tensor more"):
        Checkpoint([tmp_path])


def test_what_comes_with_weights_is_left_out_by_name(tmp_path, tensors):
    more = {
        "spiece_model": np.zeros(9, np.uint8),
        "global_step": np.array(3, np.int64),
        "model.diffusion_model.epoch": np.array(3, np.int32),
        "scaled_fp8": np.zeros(0, np.float16),
    }
    save_file({f"model.diffusion_model.{key}": x for key, x in tensors.items()} | more, tmp_path / "m.safetensors")
    assert Checkpoint([tmp_path / "m.safetensors"]).shapes.keys() == tensors.keys()
    save_file(tensors | {"other": np.zeros(3, np.int64)}, tmp_path / "m.safetensors")
    with pytest.raises(UserError, match=r"m\.safetensors: other \(I64\): expected a type of"):
        Checkpoint([tmp_path / "m.safetensors"])


@pytest.mark.parametrize("prefix", ["pipe.dit.", "module._orig_mod.", "_orig_mod.module.", "model.", "transformer."])
def test_prefixes_are_taken_off_where_all_keys_have_them(tmp_path, tensors, prefix):
    save_file({prefix + key: x for key, x in tensors.items()}, tmp_path / "m.safetensors")
    assert Checkpoint([tmp_path / "m.safetensors"]).shapes == {key: x.shape for key, x in tensors.items()}
    save_file(tensors | {prefix + key: x for key, x in tensors.items()}, tmp_path / "m.safetensors")
    with pytest.raises(UserError, match=r"are both|unexpected tensor"):
        dit.load(tmp_path / "m.safetensors", **HINTS)


def test_two_keys_of_one_name_are_both_named(tmp_path):
    x = np.zeros(2, np.float32)
    save_file({"a._orig_mod.weight": x, "a.weight": x + 1}, tmp_path / "m.safetensors")
    with pytest.raises(UserError, match=r"m\.safetensors: a\S*\.weight and a\S*\.weight are both a\.weight"):
        Checkpoint([tmp_path / "m.safetensors"])


def test_files_of_another_kind_are_called_by_it(tmp_path):
    for name, content, message in (
        ("model.gguf", b"GGUF\x03\0\0\0", "is a GGUF file, which is not read: expected"),
        ("model.safetensors", b"version https://git-lfs.github.com/spec/v1\n", "is a Git LFS pointer"),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match=message):
            Checkpoint([tmp_path / name])
    (tmp_path / "gguf").mkdir()
    (tmp_path / "model.gguf").rename(tmp_path / "gguf" / "wan2.2-Q4_K_M.gguf")
    with pytest.raises(
        UserError, match=r"wan2\.2-Q4_K_M\.gguf: is a GGUF file, which is not read: expected this network's"
    ):
        Checkpoint([tmp_path / "gguf"])
    (tmp_path / "two").mkdir()
    for name in ("models_t5.pth", "Wan2.1_VAE.pth"):
        (tmp_path / "two" / name).write_bytes(b"")
    with pytest.raises(UserError, match=r"expected one .*found Wan2\.1_VAE\.pth, models_t5\.pth"):
        Checkpoint([tmp_path / "two"])


FLOATS = [np.float64, np.float32, np.float16, ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2]


@pytest.mark.parametrize("dtype", FLOATS)
def test_every_number_that_is_not_finite_is_found(dtype):
    limits = ml_dtypes.finfo(dtype)
    good = np.array([limits.max, limits.min, limits.smallest_subnormal, 0.0, -0.0], dtype)
    assert is_finite(good)
    assert is_finite(-good[:1])
    for bad in (np.nan, -np.nan, np.inf, -np.inf):
        assert not is_finite(np.append(good, np.array(bad, np.float32).astype(dtype)))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_sources_with_numbers_that_are_not_finite_are_refused_by_key(tmp_path, tensors, bad, capsys, monkeypatch):
    changed = {key: x.copy() for key, x in tensors.items()}
    changed["blocks.1.ffn.0.weight"][3, 5] = bad
    (tmp_path / "src").mkdir()
    save_file(changed, tmp_path / "src" / "bad.safetensors")
    with pytest.raises(UserError, match=r"bad\.safetensors: blocks\.1\.ffn\.0\.weight holds NaN or infinity"):
        load(tmp_path / "src" / "bad.safetensors")
    monkeypatch.chdir(tmp_path / "src")
    line, _ = refused(capsys, monkeypatch, "dit", "bad.safetensors", tmp_path / "out")
    assert line == ("convert: bad.safetensors: blocks.1.ffn.0.weight holds NaN or infinity, expected finite numbers\n")
    assert [p.name for p in tmp_path.iterdir()] == ["src"]


def test_numbers_beyond_the_type_asked_for_are_refused_by_key(tmp_path, tensors):
    changed = {key: x.copy() for key, x in tensors.items()}
    changed["head.head.weight"][1, 2] = -70000
    for dtype in (np.float32, ml_dtypes.bfloat16):
        save_file({key: x.astype(dtype) for key, x in changed.items()}, tmp_path / "big.safetensors")
        with pytest.raises(
            UserError, match=r"big\.safetensors: head\.head\.weight holds numbers up to \S+, but float16"
        ):
            load(tmp_path / "big.safetensors", dtype="float16")
        assert np.abs(load(tmp_path / "big.safetensors", dtype="bfloat16")["head.kernel"]).max() > 65504


def test_the_hubs_cache_of_links_is_read(tmp_path, tensors):
    # Snapshots there are folders of links to files elsewhere, without names that tell their kind.
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshot"
    blobs.mkdir()
    snapshot.mkdir()
    save_file(tensors, blobs / "3f2a")
    (snapshot / "a.safetensors").symlink_to(blobs / "3f2a")
    index = snapshot / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": dict.fromkeys(tensors, "a.safetensors")}))
    assert_equal(load(snapshot), load(blobs / "3f2a"))
    index.write_text(json.dumps({"weight_map": dict.fromkeys([*tensors, "more"], "a.safetensors")}))
    with pytest.raises(UserError, match="lacks tensor more"):
        load(snapshot)


def truncated(data, header, rng):
    return data[: int(rng.integers(0, len(data)))]


def flipped(data, header, rng):
    # Anywhere in the text: keys, types, shapes, offsets. The padding after it says nothing.
    at = 8 + int(rng.integers(0, len(header.rstrip())))
    return data[:at] + bytes([data[at] ^ int(rng.integers(1, 128))]) + data[at + 1 :]


def absurd_length(data, header, rng):
    return struct.pack("<Q", int(rng.integers(len(data), 2**62))) + data[8:]


def edited(change):
    def make(data, header, rng):
        entries = json.loads(header)
        key = sorted(k for k in entries if k != "__metadata__")[int(rng.integers(len(entries) - 1))]
        change(entries, key, rng)
        text = json.dumps(entries).encode()
        return struct.pack("<Q", len(text)) + text + data[8 + len(header) :]

    return make


def overlap(entries, key, rng):
    begin, end = entries[key]["data_offsets"]
    shift = 4 * int(rng.integers(1, 8))
    entries[key]["data_offsets"] = [begin + shift, end + shift]


def other_type(entries, key, rng):
    entries[key]["dtype"] = ["I16", "U16", "F32", "BOOL", "F99", "I64"][int(rng.integers(6))]


def absurd_shape(entries, key, rng):
    entries[key]["shape"] = [2**40, int(rng.integers(2**20, 2**40))]


def negative(entries, key, rng):
    entries[key]["data_offsets"][0] = -int(rng.integers(1, 100))


def dropped(entries, key, rng):
    del entries[key]


CORRUPTIONS = [
    truncated,
    flipped,
    flipped,
    absurd_length,
    *map(edited, (overlap, other_type, absurd_shape, negative, dropped)),
]


@pytest.mark.parametrize("kind", ["dit", "vae"])
def test_corrupted_sources_are_refused_at_once(kind, tmp_path, capsys, monkeypatch):
    source = ASSETS / (DIT_FILES["dit2"] if kind == "dit" else f"vae/{VAE_FILE}")
    data = source.read_bytes()
    header = data[8 : 8 + int.from_bytes(data[:8], "little")]
    rng = np.random.default_rng(0)
    bad, out = tmp_path / "bad.safetensors", tmp_path / "out"
    for i in range(100):
        corrupt = CORRUPTIONS[i % len(CORRUPTIONS)]
        bad.write_bytes(corrupt(data, header, rng))
        if bad.read_bytes() == data:
            continue
        line, seconds = refused(capsys, monkeypatch, kind, bad, out)
        assert line.count("\n") == 1, (i, corrupt, line)
        assert "bad.safetensors" in line, (i, corrupt, line)
        assert seconds < 1, (i, corrupt, line)
        assert sorted(p.name for p in tmp_path.iterdir()) == ["bad.safetensors"]


def test_corrupted_indexes_are_refused_at_once(tmp_path, capsys, monkeypatch):
    tensors = load_file(ASSETS / DIT_FILES["dit2"])
    folder = tmp_path / "src"
    folder.mkdir()
    save_file(tensors, folder / "a.safetensors")
    index = folder / "model.safetensors.index.json"
    rng = np.random.default_rng(0)
    names = sorted(tensors)
    for i in range(20):
        weight_map = dict.fromkeys(tensors, "a.safetensors")
        key = names[int(rng.integers(len(names)))]
        weight_map[key] = ["../a.safetensors", "/etc/passwd", "absent.safetensors", 7, "model.safetensors.index.json"][
            i % 5
        ]
        index.write_text(json.dumps({"weight_map": weight_map}) if i < 15 else json.dumps(weight_map)[: 10 * i])
        line, seconds = refused(capsys, monkeypatch, "dit", folder, tmp_path / "out")
        assert line.count("\n") == 1
        assert seconds < 1
        assert not (tmp_path / "out").exists()


def refused(capsys, monkeypatch, kind, source, out):
    """What is printed, and the processor's seconds it took."""
    monkeypatch.setattr(sys, "argv", ["convert", kind, "--src", str(source), "--dst", str(out)])
    begin = time.process_time()
    with pytest.raises(SystemExit) as stop, refuse_in_one_line("convert"):
        convert_main()
    seconds = time.process_time() - begin
    assert stop.value.code == 2
    return capsys.readouterr().err, seconds
