"""The drawn world: people who differ, who move smoothly, and whose networks go through the real converters."""

import csv

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import mini
from convert import arcface, dit, umt5
from rfl_jax.config import parse
from rfl_jax.data.text import PromptTokenizer
from rfl_jax.miniature import data, quality, world
from rfl_jax.miniature.faces import (
    EXPRESSIONS,
    HELD_OUT_PROMPTS,
    TRAINING_PROMPTS,
    landmarks,
    prompt,
    render,
    sample_identity,
    sample_scene,
    visible,
    wander,
)
from rfl_jax.models.wan.config import DIT_PRESETS


@pytest.fixture(scope="module")
def scene():
    identity = sample_identity(jax.random.key(0), 12)
    return sample_scene(jax.random.key(1), jnp.concatenate([identity, identity]), world.FRAMES)


def test_clips_move_smoothly_and_depend_on_the_seed(scene):
    video = np.asarray(jax.jit(lambda s: render(s, world.SIZE))(scene))
    assert video.shape == (24, world.FRAMES, world.SIZE, world.SIZE, 3)
    assert np.abs(video).max() <= 1
    kps, box = (np.asarray(x)[:, 0] for x in landmarks(scene, world.SIZE))
    step = np.abs(np.diff(kps, axis=1))
    assert 0.2 < step.mean() < 3
    assert step.max() < 9
    inside = (kps >= box[..., None, :2]) & (kps <= box[..., None, 2:])
    assert inside.mean() > 0.95
    who = scene.identity[:, 0, 0]
    assert np.array_equal(sample_scene(jax.random.key(1), who, world.FRAMES).pose, scene.pose)
    assert not np.array_equal(sample_scene(jax.random.key(2), who, world.FRAMES).pose, scene.pose)


def test_prompts_have_no_unknown_words(scene):
    tokenizer = PromptTokenizer(world.ASSETS / world.TOKENIZER_FILE, DIT_PRESETS["mini"].text_len)
    ids, mask = tokenizer([prompt([int(w) for w in words]) for words in scene.words])
    assert not (ids[mask > 0] == 2).any()


def test_detector_finds_every_face_where_it_is_and_none_elsewhere():
    found = dict(quality.detector(world.ASSETS, 11, 200))
    assert found["detector: faces found, share"] > 0.98
    assert found["detector: error of points, median, px"] < 1
    assert found["detector: found in pictures blurred until none is left, share"] < 0.05


@pytest.mark.parametrize("file", [world.EMBEDDER_FILE, world.JUDGE_FILE])
def test_embedders_know_people_who_were_never_trained_on(file):
    found = dict(quality.embedder(arcface.load(world.ASSETS / file), "", 200, 11))
    assert found[": recognised, share"] > 0.98
    assert found[": cosine of the same person"] > 0.85
    assert abs(found[": cosine of strangers"]) < 0.1
    assert found[": cosine with the person blurred away"] < 0.3


def test_the_two_embedders_are_different_networks():
    reward, judge = arcface.load(world.ASSETS / world.EMBEDDER_FILE), arcface.load(world.ASSETS / world.JUDGE_FILE)
    assert reward.cfg != judge.cfg


def test_autoencoder_keeps_the_clip():
    found = dict(quality.autoencoder(world.ASSETS, 11, 4))
    assert found["autoencoder: round trip, dB"] > 30
    assert found["autoencoder: worst error of a background's colour, of 255"] < 8
    for name in ("reward", "judge"):
        real, trip = (found[f"autoencoder: FaceSim of {what}, {name}"] for what in ("real clips", "their round trips"))
        assert trip > 0.88 * real


def test_people_wander_evenly_towards_somebody_ordinary_and_stay_who_they_are_without(scene):
    assert np.array_equal(scene.identity, jnp.broadcast_to(scene.identity[:, :, :1], scene.identity.shape))
    gone = wander(jax.random.key(2), scene, (1.0, 1.0)).identity
    assert np.array_equal(gone[:, :, 0], scene.identity[:, :, 0])
    np.testing.assert_allclose(np.diff(gone, 2, axis=2), 0, atol=1e-6)
    assert np.std(gone[:, :, -1]) == pytest.approx(0.2, rel=0.1)
    assert np.mean(gone[:, :, -1]) == pytest.approx(0.5, abs=0.02)


def test_two_people_stand_apart_and_a_hand_hides_a_face_after_the_first_frame():
    identity = sample_identity(jax.random.key(4), 200)
    scene = sample_scene(jax.random.key(5), identity, world.FRAMES, company=0.5)
    assert np.mean(scene.present[:, 1]) == pytest.approx(0.5, abs=0.1)
    kps = np.asarray(landmarks(scene, world.SIZE)[0]).mean((2, 3))
    both = np.asarray(scene.present[:, 1])
    assert np.abs(kps[both, 0, 0] - kps[both, 1, 0]).min() > 8
    seen = np.asarray(visible(scene))[:, 0]
    hides = np.asarray(scene.words[:, 2]) == EXPRESSIONS.index("hides behind a hand")
    assert seen[:, 0].all()
    assert seen[~hides].all()
    assert not seen[hides].all(1).any()


def test_all_assets_are_as_a_user_would_receive_them():
    files = [p for p in world.ASSETS.rglob("*") if p.is_file()]
    assert sum(p.stat().st_size for p in files) < 20e6
    for name in ("dit", "dit2"):
        assert dit.load(world.ASSETS / world.DIT_FILES[name]).cfg == DIT_PRESETS["mini"]
    assert umt5.load(world.ASSETS / "umt5" / world.T5_FILE).cfg.dim == DIT_PRESETS["mini"].text_dim


def rows_of(file):
    """Prompts of a metadata.csv."""
    with file.open() as stream:
        return [row["prompt"] for row in csv.DictReader(stream)]


def test_splits_share_neither_person_nor_prompt_and_are_drawn_once(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "SPLITS", {"train": (2, 1), "held_out": (2, 2)})
    file = data.clips("train", tmp_path)
    with file.open() as stream:
        rows = list(csv.DictReader(stream))
    assert [row["video"] for row in rows] == ["clip_000.mp4", "clip_001.mp4"]
    stamp = file.stat().st_mtime_ns
    assert data.clips("train", tmp_path).stat().st_mtime_ns == stamp
    assert sorted(p.name for p in tmp_path.iterdir()) == [f"train-2-1-v{data.WORLD}"]
    assert data.clips("held_out", tmp_path) != file
    assert not {*HELD_OUT_PROMPTS} & {*TRAINING_PROMPTS}
    assert {*rows_of(data.clips("held_out", tmp_path))} <= {prompt(words) for words in HELD_OUT_PROMPTS}


def test_the_config_is_valid():
    assert parse(mini.get_config()).trained == ("dit2",)
