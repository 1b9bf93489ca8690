"""Damaged files are refused in one line wherever their format can tell."""

import json
import subprocess
import zipfile
from pathlib import Path

import numpy as np
import onnx
import pytest
from etils import epath
from onnx import numpy_helper
from PIL import Image

from convert import arcface, dit, store, umt5, vae
from convert.component import sidecar
from convert.readers import Checkpoint
from rfl_jax.data.cache import PreparedClip, write_arrays
from rfl_jax.data.dataset import make_iterator
from rfl_jax.data.metadata import Clip
from rfl_jax.data.videos import read_image
from rfl_jax.errors import UserError
from rfl_jax.export import read_expert
from rfl_jax.files import parse_json
from rfl_jax.miniature.world import ASSETS, DIT_FILES, JUDGE_FILE, T5_FILE, VAE_FILE
from rfl_jax.runs import RunFolder
from rfl_jax.training.lock import Lock
from rfl_jax.training.validation import _read as read_validation


def flip(file, where):
    data = bytearray(file.read_bytes())
    data[where] ^= 1
    file.write_bytes(data)


def entry(file, name):
    """A place in the middle of an entry of a zip file, which is stored as it is."""
    with zipfile.ZipFile(file) as content:
        found = content.getinfo(name)
        return found.header_offset + 30 + len(name) + found.file_size // 2 + 64


@pytest.mark.parametrize("damage", ["clip.npz", "noise.prefix.npz", "clip.latents.2.npz", "removed", "cut", "lacking"])
def test_prepared_clips_are_compared_with_their_checksums(tmp_path, damage):
    clip = PreparedClip(
        Clip(2, Path("a.mp4"), ""), epath.Path(tmp_path / "clip.npz"), (epath.Path(tmp_path / "noise.prefix.npz"),)
    )
    write_arrays(clip.file, {"y": np.ones((2, 4, 4, 8), np.float32), "pool": np.ones((5, 8), np.float32)})
    for file in (clip.prefix[0], clip.real_file(["latents"])):
        write_arrays(file, {"latents": np.ones((2, 4, 4, 8), np.float32)})

    def batch():
        return next(make_iterator([clip], ["y", "pool"], batch=1, seed=0, noises=1, real=["latents"]))

    assert batch()["y"].shape == (1, 2, 4, 4, 8)
    if damage == "removed":
        clip.file.unlink()
    elif damage == "cut":
        clip.file.write_bytes(clip.file.read_bytes()[:-20])
    elif damage == "lacking":
        write_arrays(clip.file, {"y": np.ones((2, 4, 4, 8), np.float32)})
    else:
        file = tmp_path / damage
        flip(file, entry(file, "y.npy" if damage == "clip.npz" else "latents.npy"))
    name = damage if damage.endswith("npz") else "clip.npz"
    with pytest.raises(UserError, match=rf"/{name}: expected a prepared clip as it was written"):
        batch()
    if damage in ("removed", "cut"):
        with pytest.raises(UserError, match=r"clip\.npz: expected a prepared clip"):
            _ = clip.latent_shape


@pytest.mark.parametrize("checksums", [True, False])
def test_pickles_are_compared_with_their_checksums_if_they_have_them(tmp_path, checksums):
    torch = pytest.importorskip("torch")
    file = tmp_path / "model.pth"
    torch.serialization.set_crc32_options(checksums)
    try:
        torch.save({"a": torch.ones(400)}, file)
    finally:
        torch.serialization.set_crc32_options(True)
    assert Checkpoint([file]).read("a").sum() == 400
    flip(file, entry(file, "model/data/0"))
    if checksums:
        with pytest.raises(UserError, match=r"model\.pth: .* as it was written \(Bad CRC-32 for file 'model/data/0'\)"):
            Checkpoint([file])
    else:
        assert (Checkpoint([file]).read("a") != 1).sum() == 1


def test_pngs_are_compared_with_their_checksums(tmp_path):
    file = tmp_path / "face.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)).save(file)
    assert read_image(file).size == (32, 32)
    flip(file, file.stat().st_size // 2)
    with pytest.raises(UserError, match=r"face\.png: expected a readable image"):
        read_image(file)


def test_what_a_picture_can_do_without_is_not_told(tmp_path):
    file = tmp_path / "face.tiff"
    Image.fromarray(np.zeros((32, 32, 3), np.uint8)).save(file)
    whole = file.read_bytes()
    # A tag has more values than the file has bytes, of which Pillow warns; here warnings are errors.
    at = whole.rindex(b"\x17\x01\x04\x00")
    file.write_bytes(whole[: at + 4] + b"\xff\xff\xff\x0f" + whole[at + 8 :])
    with pytest.warns(UserWarning, match="Tag data larger than file"), Image.open(file) as image:
        assert image.size == (32, 32)
    assert read_image(file).size == (32, 32)


@pytest.mark.parametrize(
    "text", ["", "{", "3", "[1]", b"\xff{}", '{"a": 1}}', "[" * 100_000, '{"a": 1' + "0" * 5000 + "}"]
)
def test_what_is_no_json_object(text):
    with pytest.raises(UserError, match=r"^file: expected a JSON object[ ,]"):
        parse_json(text, "file")


@pytest.mark.parametrize(
    ("component", "content", "message"),
    [
        (dit, {"num_heads": "4"}, "num_heads='4', expected a whole number above 0"),
        (dit, {"num_attention_heads": 0}, "num_attention_heads=0, expected a whole number"),
        (dit, {"text_len": 1 << 70}, "text_len=1180591620717411303424, expected a whole number"),
        (dit, {"eps": float("nan")}, "eps=nan, expected a number above 0"),
        (umt5, {"max_distance": [1]}, r"max_distance=\[1\], expected a whole number"),
        (vae, {"latents_mean": 3}, "latents_mean=3, expected a list of numbers"),
        (vae, {"latents_std": [1, None]}, r"latents_std=\[1, None\], expected a list of numbers"),
        (dit, [], "expected a JSON object, found list"),
    ],
)
def test_sizes_beside_weights_are_numbers(tmp_path, component, content, message):
    source = {dit: DIT_FILES["dit2"], umt5: f"umt5/{T5_FILE}", vae: f"vae/{VAE_FILE}"}[component]
    (tmp_path / "model.safetensors").symlink_to(ASSETS / source)
    (tmp_path / "config.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=rf"config\.json: {message}"):
        component.COMPONENT.convert([tmp_path])
    (tmp_path / "config.json").write_text(json.dumps({"eps": None, "other": "x"}))
    assert sidecar(tmp_path)
    component.COMPONENT.convert([tmp_path])


def test_an_onnx_file_whose_numbers_are_none(tmp_path):
    model = onnx.load(ASSETS / JUDGE_FILE)
    weight = next(i for i in model.graph.initializer if len(i.dims) == 4)
    values = numpy_helper.to_array(weight).copy()
    values.flat[3] = np.nan
    weight.CopyFrom(numpy_helper.from_array(values, weight.name))
    onnx.save(model, tmp_path / "net.onnx")
    with pytest.raises(UserError, match=rf"net\.onnx: {weight.name} holds NaN or infinity"):
        arcface.convert(tmp_path / "net.onnx")


def cut_json(file):
    file.write_text(file.read_text()[:-3])


@pytest.mark.parametrize(
    ("damaged", "damage"),
    [
        ("weights/embedding/.zarray", cut_json),
        ("weights/embedding/.zarray", Path.unlink),
        ("weights/embedding/0.0", Path.unlink),
        ("weights/_METADATA", cut_json),
        ("weights/_METADATA", lambda file: file.write_text(file.read_text().replace("key_type", "key_tipe"))),
        ("description/metadata", cut_json),
        ("description/metadata", lambda file: file.write_text("[]")),
    ],
)
def test_damaged_converted_weights(tmp_path, damaged, damage):
    folder = tmp_path / "t5"
    store.save(str(folder), "umt5", *store.convert("umt5", [str(ASSETS / "umt5" / T5_FILE)]))
    damage(folder / damaged)
    with pytest.raises(UserError, match=r"t5: expected weights written by python -m convert"):  # noqa: PT012
        store.stored_arrays(str(folder))
        store.open_component("umt5", [str(folder)])


MEASURES = dict.fromkeys(("face_sim", "judge_sim", "motion", "copying", "face_fraction"), 0.5)
STOPPED = {**MEASURES, "step": 4, "alarm": "motion fell", "action": "stop", "back_to": 2}


@pytest.mark.parametrize(
    "change",
    [
        {"clips": 3}, {"base": None}, {"validations": {}}, {"validations": [3]}, {"base": {"face_sim": 1.0}},
        {"validations": [STOPPED | {"action": "laugh"}]}, {"validations": [STOPPED | {"back_to": "2"}]},
        {"validations": [STOPPED | {"action": "lower", "kl_factor": 2.0}]},
    ],
)  # fmt: skip
def test_a_validation_record_that_is_none(tmp_path, change):
    whole = {"clips": ["a"], "base": MEASURES, "validations": [{**MEASURES, "step": 2, "alarm": ""}, STOPPED]}
    file = epath.Path(tmp_path / "validation.json")
    file.write_text(json.dumps(whole))
    assert read_validation(file) == whole
    file.write_text(json.dumps(whole | change))
    with pytest.raises(UserError, match=r"validation\.json: expected clips, base and validations"):
        read_validation(file)


@pytest.mark.parametrize(
    "content", [{}, {"preset": "mini"}, {"preset": 3, "lora_rank": 4}, {"preset": "mini", "lora_rank": "4"}]
)
def test_an_export_of_no_configuration(tmp_path, content):
    folder = RunFolder(epath.Path(tmp_path))
    (folder.checkpoints / "2").mkdir(parents=True)
    folder.config.write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"config\.json: preset=.*, lora_rank=.*, expected the configuration of a run"):
        read_expert(folder, folder.checkpoints / "2", "dit2")


def test_lines_of_metrics_that_are_none(tmp_path):
    folder = RunFolder(epath.Path(tmp_path))
    assert folder.read_lines() == []
    folder.metrics.write_text('{"step": 1}\n{"step": 2, "loss"')
    assert folder.read_lines() == [('{"step": 1}', {"step": 1})]
    for line in ("{", "3", '{"loss": 1}', '{"step": "2"}', "[" * 100_000):
        folder.metrics.write_text(f'{{"step": 1}}\n{line}\n{{"step": 3}}\n')
        with pytest.raises(UserError, match=r"metrics\.jsonl: line 2: expected"):
            folder.read_lines()


def test_a_lock_of_something_else_keeps_nobody_out(tmp_path):
    folder = RunFolder(epath.Path(tmp_path))
    with Lock(folder):
        held = json.loads(folder.lock.read_text())
    gone = subprocess.Popen(["true"])
    gone.wait()
    for change in ({"pid": "1"}, {"pid": -1}, {"pid": 1 << 70}, {"host": None}, {"token": [1]}, {"beat": "x"}):
        folder.lock.write_text(json.dumps(held | {"pid": gone.pid} | change))
        with Lock(folder):
            pass
