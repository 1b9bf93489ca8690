"""Whole runs: outputs as promised, stopping and resuming bit for bit, preparation and its bad rows, evaluation."""

import dataclasses
import json
import shutil
import signal

import numpy as np
import pytest
from etils import epath
from flax import nnx
from PIL import Image
from safetensors.numpy import load_file, save_file

from convert import dit, store, umt5
from convert.mapping import unfill
from rfl_jax.data.encoding import ClipEncoder
from rfl_jax.data.metadata import read_metadata
from rfl_jax.data.preparation import prepare_clips
from rfl_jax.data.sizes import clip_settings
from rfl_jax.data.videos import read_clip, to_uint8, write_video
from rfl_jax.errors import UserError
from rfl_jax.evaluation.evaluate import evaluate
from rfl_jax.evaluation.layouts import export
from rfl_jax.evaluation.measures import MEASURES
from rfl_jax.miniature.world import asset_paths
from rfl_jax.models.umt5 import UMT5Config, UMT5Encoder
from rfl_jax.models.wan.config import DIT_PRESETS
from rfl_jax.models.wan.dit import DiT
from rfl_jax.models.weights import get_arrays
from rfl_jax.runs import RunFolder, find_checkpoint
from rfl_jax.sources import find_sources
from rfl_jax.training.export import export_adapters
from rfl_jax.training.inputs import prepare_inputs
from rfl_jax.training.loop import train
from rfl_jax.training.validation import VALIDATED
from tests.runs import FRAMES, few_devices, open_run, read_metrics, train_run


def test_stopped_and_resumed_equals_uninterrupted(settings, tmp_path, clip_folder):
    cfg = settings(
        max_steps=4,
        save_steps=3,
        sample_every=2,
        eval_every=2,
        **{"eval.file_name": str(clip_folder / "metadata.csv"), "eval.num_samples": 3, "eval.validation_samples": 2},
    )
    whole, parts = epath.Path(tmp_path / "whole"), epath.Path(tmp_path / "parts")
    for workdir in (whole, parts):
        workdir.mkdir()
    run = open_run(cfg, whole)
    trained = train(run, RunFolder(whole))
    assert trained.finished
    state = trained.state
    want = read_metrics(whole)
    assert [line["step"] for line in want] == [1, 2, 3, 4]

    # Stopped after the second step by Ctrl-C, as a user would; then the same again.
    again = open_run(cfg, parts)
    calls = []

    def interrupted(*args):
        calls.append(1)
        if len(calls) == 2:
            signal.raise_signal(signal.SIGINT)
        return again.update.step(*args)

    update = dataclasses.replace(again.update, step=interrupted)
    assert not train(dataclasses.replace(again, update=update), RunFolder(parts)).finished
    assert len(read_metrics(parts)) == 2
    # Lines of steps whose checkpoint was lost are written anew.
    with (parts / "metrics.jsonl").open("a") as stream:
        stream.write(json.dumps({"step": 3, "loss": 0}) + "\n")
    train_run(cfg, parts)
    assert read_metrics(parts) == want
    # So do the validations: what was judged before the interruption, and the best checkpoint.
    records = [json.loads((folder / "validation.json").read_text()) for folder in (whole, parts)]
    assert records[0] == records[1]
    assert [entry["step"] for entry in records[0]["validations"]] == [2, 4]
    assert [name for name in want[1] if name.startswith("eval_")] == [f"eval_{name}" for name in VALIDATED]
    assert want[1]["eval_judge_sim"] == records[0]["validations"][0]["judge_sim"]
    assert not any(name.startswith("eval_") for name in want[0])
    best = max(records[0]["validations"], key=lambda entry: entry["judge_sim"])["step"]
    assert records[0]["best_step"] == best == trained.validation.best_step
    assert {find_checkpoint(RunFolder(folder), "best").name for folder in (whole, parts)} == {str(best)}

    assert sorted(p.name for p in (whole / "samples").iterdir()) == [
        "step_000001.mp4",
        "step_000002.mp4",
        "step_000004.mp4",
    ]
    assert any((whole / "tensorboard").iterdir())
    (file,) = export_adapters(run, state.params, RunFolder(whole))
    adapters = load_file(file)
    assert len(adapters) == 6 * 10 * 2
    assert adapters["blocks.0.self_attn.q.lora_A.weight"].shape == (4, 128)

    held_out = trained.validation.held_out
    params = {"base": held_out.untrained(state.params), "tuned": state.params}
    result = evaluate(held_out, params, RunFolder(whole), trained.step, trained.state.weights)
    written = json.loads((whole / "evaluation.json").read_text())
    assert written == result
    assert (written["step"], written["weights"]) == (trained.step, "raw")
    assert len(written["clips"]) == 3
    for figure in MEASURES:
        for name in ("base", "tuned"):
            assert written[figure][name] == pytest.approx(np.mean([c[name][figure] for c in written["clips"]]))
    assert written["judge_sim"]["base"] != written["judge_sim"]["tuned"]
    # A validation is an evaluation of its clips.
    for figure in VALIDATED:
        first = np.mean([clip["tuned"][figure] for clip in written["clips"][:2]])
        assert records[0]["validations"][1][figure] == pytest.approx(first, rel=1e-4)
        assert written["statistics"][figure]["rose"] + written["statistics"][figure]["fell"] <= 3
    for clip in written["clips"]:
        for way in ("reference", "base", "tuned"):
            assert len(clip[way]["frames"]["box"]) == FRAMES
            assert (whole / clip[way]["file"]).stat().length > 500
        # The face in the box is the one that was scored: inside the picture, some pixels wide.
        x1, y1, x2, y2 = clip["reference"]["frames"]["box"][0]
        assert 0 <= x1 < x2 - 10
        assert 0 <= y1 < y2 - 10
        assert clip["tuned"]["judge_sim"] == pytest.approx(np.mean(clip["tuned"]["frames"]["judge_sim"]), abs=1e-4)
    # So is what benchmarks are given.
    for benchmark, names in (("vbench-i2v", "number"), ("opens2v", "")):
        export(RunFolder(whole), benchmark, epath.Path(tmp_path / benchmark), names)
        for name, noise in json.loads((tmp_path / benchmark / "seeds.json").read_text()).items():
            assert noise["seed"] == cfg.seed
            for way in ("base", "tuned"):
                video = whole / written["clips"][noise["clip"]][way]["file"]
                assert (tmp_path / benchmark / way / name).read_bytes() == video.read_bytes()
    image = np.asarray(Image.open(tmp_path / "vbench-i2v" / "images" / "002.png"))
    real = to_uint8(read_clip(held_out.clips[2].clip.video, **clip_settings(cfg)))[0]
    assert np.abs(image.astype(int) - real).mean() < 2
    curve = np.mean([clip["base"]["frames"]["face_sim"] for clip in written["clips"]], 0)
    assert written["drift"]["face_sim"]["base"] == pytest.approx(curve)
    assert (whole / "evaluation" / "drift.png").read_bytes().startswith(b"\x89PNG")

    with pytest.raises(UserError, match=r"does not fit this configuration \(.*lora_.*: found .*4.*, expected .*2"):
        train_run(settings(max_steps=4, lora_rank=2), parts)


def test_training_ends_when_validations_bring_nothing_better(settings, tmp_path, clip_folder):
    cfg = settings(
        max_steps=6, save_steps=6, eval_every=1, early_stop=2, learning_rate=0.0,
        **{"eval.file_name": str(clip_folder / "metadata.csv"), "eval.num_samples": 2, "eval.validation_samples": 2},
    )  # fmt: skip
    # Nothing is learnt, so the first validation remains the best and two more are enough.
    trained = train_run(cfg, tmp_path)
    assert (trained.finished, trained.step, trained.validation.best_step) == (True, 3, 1)
    assert not any(entry["alarm"] for entry in trained.validation.entries)
    # The same command again finds nothing to do; with more patience it goes on.
    assert train_run(cfg, tmp_path).step == 3
    assert train_run(dataclasses.replace(cfg, early_stop=3), tmp_path).step == 4


def bad_rows(folder, clip_folder):
    folder.mkdir()
    shutil.copy(clip_folder / "clip_000.mp4", folder / "good.mp4")
    (folder / "text.mp4").write_text("no video")
    (folder / "empty.mp4").write_bytes(b"")
    write_video(folder / "short.mp4", np.zeros((3, 64, 64, 3), np.uint8))
    write_video(folder / "faceless.mp4", np.full((FRAMES, 64, 64, 3), 128, np.uint8))
    names = ["good", "text", "empty", "short", "faceless", "absent"]
    (folder / "metadata.csv").write_text("video,prompt\n" + "".join(f"{n}.mp4,a face\n" for n in names))
    return folder / "metadata.csv"


def test_bad_rows_are_skipped_or_refused_by_number(settings, tmp_path, clip_folder, capsys):
    file = bad_rows(tmp_path / "rows", clip_folder)
    cfg = settings(file_name=str(file), **{"data.on_bad_row": "skip"})
    sources, rows, cache = find_sources(cfg, experts=2), read_metadata(file), epath.Path(tmp_path / "cache")
    encoder = ClipEncoder(cfg, sources)
    prepared = prepare_clips(encoder, rows, cache, listed_in=str(file))
    assert [p.clip.number for p in prepared] == [2]
    assert "5 of 6 rows left out: 3, 4, 5, 6, 7" in capsys.readouterr().out
    sample = prepared[0].load()
    assert sample["y"].shape == (2, 8, 8, 20)
    assert sample["pool"].shape[0] == FRAMES
    assert not sample["context"][sample["mask"] == 0].any()

    strict = settings(file_name=str(file))
    with pytest.raises(UserError, match=r"row 3: .*text\.mp4: expected a readable video"):
        prepare_clips(ClipEncoder(strict, sources), rows, cache, listed_in=str(file))
    # Nothing half-written, and what is cached is not computed again: no network is opened.
    assert sorted(p.name for p in cache.iterdir()) == [prepared[0].file.name]
    broken = type(sources)(["x"], ["x"], sources.text_encoder, sources.vae, sources.tokenizer, sources.reward)
    stamp = prepared[0].file.stat().mtime
    (again,) = prepare_clips(ClipEncoder(cfg, broken), rows[:1], cache, listed_in="")
    assert again.file.stat().mtime == stamp
    # Another prompt is another sample.
    other = type(rows[0])(2, rows[0].video, "another prompt")
    assert prepare_clips(encoder, [other], cache, listed_in="")[0].file != prepared[0].file


def test_what_is_prepared_is_not_prepared_again(monkeypatch, settings, tmp_path):
    cfg = settings(**{"data.cache_dir": str(tmp_path), "eval.file_name": settings().file_name, "eval.num_samples": 1})
    folder = RunFolder(epath.Path(tmp_path))
    first = prepare_inputs(cfg, folder, few_devices(cfg)).clips
    assert all(len(clip.prefix) == 1 for clip in first.training + first.held_out)
    stamps = {file.name: file.stat().st_mtime_ns for file in tmp_path.iterdir()}
    # 8 clips with their prefix; the one that is held out as well has another, of the evaluation's noise.
    assert len(stamps) == 2 * 8 + 1

    def refuse(*args, **options):
        raise AssertionError("a network was opened")

    monkeypatch.setattr(store, "open_component", refuse)
    again = prepare_inputs(cfg, folder, few_devices(cfg)).clips
    assert {file.name: file.stat().st_mtime_ns for file in tmp_path.iterdir()} == stamps
    assert [clip.prefix for clip in again.training] == [clip.prefix for clip in first.training]


def test_an_end_image_is_marked_in_the_condition(settings, tmp_path, clip_folder):
    cfg = settings(extra_inputs="input_image,end_image")
    rows = read_metadata(clip_folder / "metadata.csv")[:1]
    encoder = ClipEncoder(cfg, find_sources(cfg, experts=2))
    (prepared,) = prepare_clips(encoder, rows, epath.Path(tmp_path), listed_in="")
    y = prepared.load()["y"]
    assert np.array_equal(y[:, 0, 0, :4], [[1] * 4, [0, 0, 0, 1]])


def test_clips_of_different_sizes_cannot_share_a_batch(settings, tmp_path, clip_folder):
    folder = tmp_path / "rows"
    folder.mkdir()
    shutil.copy(clip_folder / "clip_000.mp4", folder / "a.mp4")
    shutil.copy(clip_folder / "clip_001.mp4", folder / "b.mp4")
    (folder / "metadata.csv").write_text("video,prompt\na.mp4,x\nb.mp4,y\n")
    clip = to_uint8(read_clip(folder / "b.mp4", num_frames=FRAMES, max_pixels=10**6, multiple=16))
    write_video(folder / "b.mp4", clip[:, :48])
    with pytest.raises(UserError, match=r"row 3: latents of .* cannot share a batch"):
        open_run(settings(file_name=str(folder / "metadata.csv")), tmp_path)


def test_weights_of_another_network_are_refused_before_anything_is_prepared(settings, tmp_path):
    def refused(message, *, file=None, at=0, **changes):
        paths = json.loads(asset_paths()["model_paths"])
        paths[at] = str(file) if file else paths[at]
        with pytest.raises(UserError, match=message):
            prepare_inputs(settings(model_paths=json.dumps(paths), **changes), RunFolder(epath.Path(tmp_path / "run")))
        assert not (tmp_path / "run").exists()

    refused(r"dim is 128, expected 5120 \(config.preset=wan2_2_i2v_a14b\)", preset="wan2_2_i2v_a14b")
    wide = dataclasses.replace(DIT_PRESETS["mini"], num_layers=5)
    arrays = {name: np.asarray(x) for name, x in get_arrays(DiT(wide, rngs=nnx.Rngs(0))).items()}
    (tmp_path / "dit").mkdir()
    save_file(unfill(dit.NAMINGS["original"], arrays), tmp_path / "dit" / "model.safetensors")
    (tmp_path / "dit" / "config.json").write_text(json.dumps({"num_heads": 4, "text_len": 32}))
    refused("num_layers is 5, expected 6", file=tmp_path / "dit", at=1)
    small = UMT5Encoder(UMT5Config(40, 24, 24, 32, num_heads=2, num_layers=1), rngs=nnx.Rngs(0))
    arrays = {name: np.asarray(x) for name, x in get_arrays(small).items()}
    save_file(unfill(umt5.NAMINGS["original"], arrays), tmp_path / "t5.safetensors")
    refused("width of text features is 24, expected 32", file=tmp_path / "t5.safetensors", at=2)
