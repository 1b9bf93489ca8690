"""The drawn world: people who differ, who move smoothly, and whose networks go through the real converters."""

import csv

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import mini
from convert import arcface, dit, scrfd, umt5, vae
from rfl_jax.config import parse
from rfl_jax.data.text import PromptTokenizer
from rfl_jax.miniature import data, world
from rfl_jax.miniature.faces import landmarks, prompt, render, sample_identity, sample_scene
from rfl_jax.models.wan.config import DIT_PRESETS
from rfl_jax.rewards.detect import detect, largest
from rfl_jax.rewards.face import FaceReward, RewardConfig


@pytest.fixture(scope="module")
def scene():
    identity = sample_identity(jax.random.key(0), 12)
    return sample_scene(jax.random.key(1), jnp.concatenate([identity, identity]), world.FRAMES)


def test_clips_move_smoothly_and_depend_on_the_seed(scene):
    video = np.asarray(jax.jit(lambda s: render(s, world.SIZE))(scene))
    assert video.shape == (24, world.FRAMES, world.SIZE, world.SIZE, 3)
    assert np.abs(video).max() <= 1
    kps, box = (np.asarray(x) for x in landmarks(scene, world.SIZE))
    step = np.abs(np.diff(kps, axis=1))
    assert 0.2 < step.mean() < 3
    assert step.max() < 9
    inside = (kps >= box[..., None, :2]) & (kps <= box[..., None, 2:])
    assert inside.mean() > 0.95
    again = sample_scene(jax.random.key(1), scene.identity, world.FRAMES)
    assert np.array_equal(again.pose, scene.pose)
    assert not np.array_equal(sample_scene(jax.random.key(2), scene.identity, world.FRAMES).pose, scene.pose)


def test_prompts_have_no_unknown_words(scene):
    tokenizer = PromptTokenizer(world.ASSETS / world.TOKENIZER_FILE, DIT_PRESETS["mini"].text_len)
    ids, mask = tokenizer([prompt([int(w) for w in words]) for words in scene.words])
    assert not (ids[mask > 0] == 2).any()


def test_detector_finds_every_drawn_face_where_it_is(scene):
    detector = scrfd.load(world.ASSETS / world.DETECTOR_FILE)
    frames = np.asarray(render(scene, world.SIZE)).reshape(-1, world.SIZE, world.SIZE, 3)
    kps, _, found = largest(jax.jit(lambda x: detect(detector, x, size=world.SIZE))(frames))
    assert np.mean(found) > 0.98
    true = np.asarray(landmarks(scene, world.SIZE)[0]).reshape(-1, 5, 2)
    assert np.median(np.abs(np.asarray(kps) - true)[np.asarray(found)]) < 1.5
    blank = np.full((2, world.SIZE, world.SIZE, 3), 0.1, np.float32)
    assert not largest(detect(detector, blank, size=world.SIZE))[2].any()


@pytest.mark.parametrize("file", [world.EMBEDDER_FILE, world.JUDGE_FILE])
def test_embedders_tell_people_apart_who_were_never_trained_on(scene, file):
    detector = scrfd.load(world.ASSETS / world.DETECTOR_FILE)
    reward = FaceReward(detector, arcface.load(world.ASSETS / file), RewardConfig(detector_size=world.SIZE))
    e, found = jax.jit(reward.pool)(np.asarray(render(scene, world.SIZE))[:, 0])
    assert found.all()
    e = np.asarray(e) / np.linalg.norm(e, axis=-1, keepdims=True)
    cosines = e[:12] @ e[12:].T
    same, other = np.diag(cosines), cosines[~np.eye(12, dtype=bool)]
    assert same.mean() > other.mean() + 0.4
    assert (cosines.argmax(1) == np.arange(12)).mean() > 0.7


def test_the_two_embedders_are_different_networks():
    reward, judge = arcface.load(world.ASSETS / world.EMBEDDER_FILE), arcface.load(world.ASSETS / world.JUDGE_FILE)
    assert reward.cfg != judge.cfg


def test_autoencoder_keeps_the_clip(scene):
    model = vae.load(world.ASSETS / "vae" / world.VAE_FILE, dtype="float32")
    video = np.asarray(render(scene, world.SIZE))[:4]
    z = jax.jit(model.encode)(video)
    assert 0.7 < float(jnp.std(z)) < 1.4
    back = jax.jit(model.decode)(z)
    assert np.abs(np.asarray(back) - video).mean() < 0.12


def test_all_assets_are_as_a_user_would_receive_them():
    files = [p for p in world.ASSETS.rglob("*") if p.is_file()]
    assert sum(p.stat().st_size for p in files) < 20e6
    for name in ("dit", "dit2"):
        assert dit.load(world.ASSETS / world.DIT_FILES[name]).cfg == DIT_PRESETS["mini"]
    assert umt5.load(world.ASSETS / "umt5" / world.T5_FILE).cfg.dim == DIT_PRESETS["mini"].text_dim


def test_splits_share_no_person_and_are_drawn_once(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "SPLITS", {"train": (2, 1), "held_out": (2, 2)})
    file = data.clips("train", tmp_path)
    with file.open() as stream:
        rows = list(csv.DictReader(stream))
    assert [row["video"] for row in rows] == ["clip_000.mp4", "clip_001.mp4"]
    stamp = file.stat().st_mtime_ns
    assert data.clips("train", tmp_path).stat().st_mtime_ns == stamp
    assert sorted(p.name for p in tmp_path.iterdir()) == [f"train-2-1-v{data.WORLD}"]
    assert data.clips("held_out", tmp_path) != file


def test_the_config_is_valid():
    assert parse(mini.get_config()).trained == ("dit2",)
