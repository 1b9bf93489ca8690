"""Sampling: solvers and the whole pipeline against diffusers, step by step; one device and eight; what a run trained."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from PIL import Image

from convert import store
from convert.export import adapter_file
from rfl_jax.data.videos import first_frame, read_frames, read_image
from rfl_jax.errors import UserError
from rfl_jax.miniature.data import draw_clips
from rfl_jax.models.wan.config import DIT_PRESETS
from rfl_jax.sample import guidance_of, read_requests
from rfl_jax.sampling.options import Request, options_of
from rfl_jax.sampling.pipeline import open_pipeline, read_config
from rfl_jax.sampling.solvers import make_solver
from rfl_jax.sampling.trained import read_trained
from tests import COMPILER
from tests.golden import relative
from tests.runs import train_run
from tests.sampling.small import (
    NEGATIVE,
    PROMPT,
    TINY,
    opened,
    our_steps,
    picture,
    small_world,
    their_pipeline,
    their_scheduler,
    their_steps,
    tiny_config,
)


@pytest.mark.parametrize(("steps", "shift"), [(1, 5.0), (2, 3.0), (3, 5.0), (8, 5.0), (30, 8.0)])
def test_unipc_is_diffusers(steps, shift):
    torch = pytest.importorskip("torch")
    diffusers = pytest.importorskip("diffusers")
    theirs = diffusers.UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift
    )
    theirs.set_timesteps(steps)
    ours = make_solver("unipc", steps, shift)
    assert np.array_equal(ours.timesteps, theirs.timesteps.numpy())
    np.testing.assert_allclose(ours.sigmas, theirs.sigmas.numpy(), rtol=1e-6)
    rng = np.random.default_rng(0)
    x = rng.normal(size=(1, 3, 4, 4, 2)).astype(np.float32)
    y, w = torch.from_numpy(x), rng.normal(size=(2, 2)).astype(np.float32)
    x = jnp.asarray(x)
    for i, t in enumerate(theirs.timesteps):
        x = ours.step(i, jnp.tanh(x @ w) * (1 + ours.timesteps[i] / 1000), x)
        y = theirs.step(torch.tanh(y @ torch.from_numpy(w)) * (1 + float(t) / 1000), t, y)[0]
        assert relative(x, y.numpy()) < 1e-5


@pytest.fixture(scope="module", params=list(TINY))
def world(request, tmp_path_factory):
    """The kind of a small random model, its folder, and diffusers' modules of it."""
    folder = tmp_path_factory.mktemp(request.param)
    return request.param, folder, small_world(request.param, folder)


@pytest.mark.parametrize("solver", ["unipc", "euler"])
def test_every_step_is_diffusers_pipelines(world, solver, monkeypatch):
    kind, folder, modules = world
    monkeypatch.setitem(DIT_PRESETS, kind, TINY[kind])
    steps = 6
    found, video, noise = our_steps(kind, opened(tiny_config(kind, folder)), solver, steps)
    theirs = their_pipeline(kind, modules, their_scheduler(solver, steps, monkeypatch))
    wanted, want = their_steps(kind, theirs, noise, steps)
    assert len(found) == len(wanted) == steps
    # Where the first frame is a part of the latents it is written back before every step, here and there at other times.
    later = slice(1 if kind == "ti2v" else 0, None)
    for step in range(steps):
        assert relative(found[step][:, later], wanted[step][:, later]) < 1e-4, step
    assert np.abs(video - want).max() < 1.5 / 255


@pytest.fixture(scope="module")
def faces(tmp_path_factory):
    """Clips of drawn people."""
    folder = tmp_path_factory.mktemp("faces") / "drawn"
    draw_clips(folder, 3, seed=4, frames=5)
    return folder


def random_adapters(seed, layers=6, dim=128, rank=2):
    rng = np.random.default_rng(seed)
    return {
        f"blocks.self_attn.q.lora_{half}": rng.normal(size=shape).astype(np.float32) / 4
        for half, shape in (("a", (layers, dim, rank)), ("b", (layers, rank, dim)))
    }


def test_adapters_change_the_video_as_merged_weights_do(settings, faces, tmp_path):
    image = first_frame(faces / "clip_000.mp4")
    cfg = settings()
    base = opened(cfg)(PROMPT, image, seed=1)
    assert np.array_equal(base, opened(cfg)(PROMPT, image, seed=1))
    assert not np.array_equal(base, opened(cfg)(PROMPT, image, seed=2))
    arrays = random_adapters(0)
    file = tmp_path / "lora.safetensors"
    file.write_bytes(adapter_file(arrays, "diffusers", {"network": "dit2"}))
    adapted = opened(cfg, lora=str(file))(PROMPT, image, seed=1)
    assert np.abs(adapted.astype(int) - base).max() > 10

    # Merged by the converter instead: the same video but for rounding.
    sources = json.loads(cfg.model_paths)
    merged = tmp_path / "merged"
    store.save(str(merged), "dit", *store.convert("dit", [sources[1]], dtype="float32", loras=[(str(file), 1.0)]))
    paths = json.dumps([sources[0], str(merged), *sources[2:]])
    whole = opened(settings(model_paths=paths))(PROMPT, image, seed=1)
    assert np.abs(whole.astype(int) - adapted).max() <= 2
    # The header said which expert; said otherwise it is the other one.
    high = opened(cfg, lora=f"dit={file}")(PROMPT, image, seed=1)
    assert not np.array_equal(high, adapted)
    assert sorted(read_trained(cfg, f"dit={file},dit2={file}")) == ["dit", "dit2"]


def test_eight_devices_sample_what_one_does(settings, faces):
    cfg = settings()
    requests = [Request(f"{PROMPT} {i}", first_frame(faces / f"clip_00{i}.mp4"), seed=i) for i in range(3)]
    options = options_of(cfg, steps=3, guidance=(2.0, 1.0), negative_prompt=NEGATIVE)
    videos = {}
    for shape in ((1, 1, 1), (2, 2, 2)):
        mesh = dict(zip(("mesh.data", "mesh.fsdp", "mesh.context"), shape, strict=True))
        found = dict(opened(settings(**mesh)).sample(requests, options))
        assert sorted(found) == [0, 1, 2]
        videos[shape] = np.stack([found[i] for i in range(3)]).astype(int)
    assert np.abs(videos[1, 1, 1] - videos[2, 2, 2]).max() <= 1
    # And one alone what many do.
    ((_, alone),) = opened(cfg).sample(requests[1:2], options)
    assert np.abs(alone.astype(int) - videos[1, 1, 1][1]).max() <= 1


def sample(*arguments):
    command = [sys.executable, "-m", "rfl_jax.sample", *map(str, arguments)]
    environment = os.environ | {"XLA_FLAGS": COMPILER}
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def frames_of(file):
    return np.stack([np.asarray(image) for image in read_frames(file)]).astype(int)


def test_the_command_takes_a_run_its_checkpoints_and_many_rows(settings, faces, tmp_path):
    run = epath.Path(tmp_path / "run")
    run.mkdir()
    cfg = settings(max_steps=2, save_steps=1, learning_rate=0.05)
    assert train_run(cfg, run).finished
    first_frame(faces / "clip_000.mp4").save(tmp_path / "face.png")
    common = ("--lora", run, "--image", tmp_path / "face.png", "--prompt", PROMPT)
    # The run's own configuration is taken where none is named.
    done = sample(*common, "--out", tmp_path / "last.mp4")
    assert done.returncode == 0, done.stderr
    assert "5 frames of 64x64" in done.stdout
    assert done.stdout.endswith(f"\nnext: python -m rfl_jax.export --workdir {run} --dst lora.safetensors\n")
    last = frames_of(tmp_path / "last.mp4")

    # The same from Python; an earlier checkpoint and the untrained network give other videos.
    image = Image.open(tmp_path / "face.png")
    video = opened(cfg, lora=str(run))(PROMPT, image).astype(int)
    assert np.abs(video - last).mean() < 3  # of the file's compression
    assert np.abs(video - opened(cfg, lora=str(run), step="1")(PROMPT, image)).max() > 3
    assert np.abs(video - opened(cfg)(PROMPT, image)).max() > 3

    # And from a list of which a row has the same seed.
    rows = [
        ("image", "video", "prompt", "seed", "out"),
        ("face.png", "", PROMPT, "0", "a.mp4"),
        ("", faces / "clip_001.mp4", "x", "", ""),
    ]
    with (tmp_path / "rows.csv").open("w", newline="") as stream:
        csv.writer(stream).writerows(rows)
    done = sample("--lora", run, "--csv", tmp_path / "rows.csv", "--out", tmp_path / "many")
    assert done.returncode == 0, done.stderr
    assert sorted(p.name for p in (tmp_path / "many").iterdir()) == ["0003.mp4", "a.mp4"]
    assert np.abs(frames_of(tmp_path / "many" / "a.mp4") - last).mean() < 2

    for step, message in (
        (7, "no checkpoint 7, expected one of 1, 2, or best"),
        ("best", "config.eval_every keeps one"),
    ):
        with pytest.raises(UserError, match=message):
            read_trained(cfg, str(run), str(step))


def test_what_cannot_be_sampled_is_refused_by_name(settings, tmp_path, faces):
    cfg = settings()
    for changes, message in (
        ({"steps": 0}, "steps: expected at least 1, got 0"),
        ({"shift": 0.0}, "shift: expected a positive number"),
        ({"solver": "heun"}, "solver: expected one of euler, unipc, got heun"),
        ({"frames": 6}, r"frames: expected 4n\+1, got 6"),
        ({"height": 40, "width": 64}, "height: expected a multiple of 16, got 40"),
        ({"height": 64}, "height: expected height and width both"),
    ):
        with pytest.raises(UserError, match=message):
            options_of(cfg, **changes)
    assert options_of(cfg, steps=None).steps == cfg.num_inference_steps
    assert guidance_of("3.5") == (3.5, 3.5)
    assert guidance_of("3.5,1") == (3.5, 1)
    for text in ("1,2,3", "much", ""):
        with pytest.raises(UserError, match="--guidance: expected a number, or HIGH,LOW"):
            guidance_of(text)

    # A configuration may be named by its file, as on the command line.
    mini = read_config(Path(__file__).parents[2] / "configs" / "mini.py")
    assert (mini.preset, mini.learning_rate) == ("mini", 2e-3)
    with pytest.raises(UserError, match=r"none\.py: no such file, expected a config file"):
        open_pipeline(tmp_path / "none.py")

    (tmp_path / "none.safetensors").write_text("nothing")
    for source, message in (
        (tmp_path / "absent", "no such run or file"),
        (tmp_path / "none.safetensors", "expected a whole safetensors file"),
        (f"dit3={faces / 'metadata.csv'}", "has no dit3, expected dit or dit2"),
    ):
        with pytest.raises(UserError, match=message):
            read_trained(cfg, str(source))
    for source, message in (("", "expected a run in --lora"), (tmp_path / "none.safetensors", "is no run")):
        with pytest.raises(UserError, match=f"--raw: .*{message}"):
            read_trained(cfg, str(source), raw=True)
    wide = tmp_path / "wide.safetensors"
    wide.write_bytes(adapter_file(random_adapters(0, dim=64), "diffusers", {}))
    with pytest.raises(UserError, match=r"wide\.safetensors: .* do not make"):
        read_trained(cfg, str(wide))

    for content, message in (
        ("image\nx.png\n", "column prompt is missing"),
        ("prompt,image\n", "no rows"),
        ("prompt,image\nx,absent.png\n", r"row 2: .*absent\.png: no such image"),
        ("prompt,video\nx,absent.mp4\n", r"row 2: .*absent\.mp4: no such video"),
        ("prompt,seed\nx,one\n", "row 2: seed: expected a whole number, got one"),
        ("prompt,out\nx,../a.mp4\n", "row 2: expected a prompt, and in out a name"),
        ("prompt,out\nx,a.mp4\ny,a.mp4\n", "row 3: expected a prompt, and in out a name of its own"),
    ):
        (tmp_path / "rows.csv").write_text(content)
        with pytest.raises(UserError, match=message):
            read_requests(str(tmp_path / "rows.csv"), 0)
    (tmp_path / "rows.csv").write_text("\ufeffprompt,seed\nx,\ny,9\nz,\n", encoding="utf-8")
    assert [(n, r.seed) for n, r in read_requests(str(tmp_path / "rows.csv"), 5)] == [
        ("0002.mp4", 5), ("0003.mp4", 9), ("0004.mp4", 7),
    ]  # fmt: skip


def test_pictures_that_cannot_be_used_are_refused(tmp_path, faces, settings):
    (tmp_path / "text.png").write_text("no picture")
    for name, message in (("text.png", "expected a readable image"), ("none.png", "no such image")):
        with pytest.raises(UserError, match=message):
            read_image(tmp_path / name)
    pipeline = opened(settings())
    with pytest.raises(UserError, match="8x8 pixels, expected at least 16 each way"):
        pipeline(PROMPT, picture(0, 8))
    with pytest.raises(UserError, match="expected a first frame, which mini needs"):
        pipeline(PROMPT)
    # A photo that lies on its side is put upright.
    photo, exif = picture(0, 32).resize((48, 32)), Image.Exif()
    exif[274] = 6
    photo.save(tmp_path / "photo.jpg", exif=exif)
    assert read_image(tmp_path / "photo.jpg").size == (32, 48)
