"""The miniature's networks and a few of its clips, as the training tests use them."""

import dataclasses
import json
import math

import jax
import pytest
from etils import epath
from ml_collections import ConfigDict

from rfl_jax.config import default_config, parse
from rfl_jax.miniature.data import draw_clips
from rfl_jax.miniature.faces import render, sample_identity, sample_scene
from rfl_jax.miniature.world import SIZE, asset_paths, judge_path
from rfl_jax.runs import RunFolder
from rfl_jax.training.loop import train
from rfl_jax.training.setup import set_up

FRAMES = 5  # fewer than the miniature has


def drawn(seed, count, frames):
    """Clips [count, frames, SIZE, SIZE, 3] of one person each, who looks left and right or nods, smiles, and never hides."""
    k1, k2 = jax.random.split(jax.random.key(seed))
    scene = sample_scene(k2, sample_identity(k1, count), frames, prompts=[(0, 0, 0), (2, 1, 0)])
    return render(scene, SIZE)


@pytest.fixture(scope="session")
def clip_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clips") / "drawn"
    draw_clips(folder, 8, seed=5, frames=FRAMES)
    return folder


@pytest.fixture(scope="session")
def cache_folder(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def settings(clip_folder, cache_folder):
    """`settings(key=value, **{"group.key": value}) -> Config` of a small run of the miniature."""

    def make(**changes):
        config: ConfigDict = default_config()
        config.update(asset_paths())
        config.preset = "mini"
        config.dtype = "float32"
        config.file_name = str(clip_folder / "metadata.csv")
        config.train_batch_size = config.per_device_train_batch_size = 2
        config.mesh.data = config.mesh.fsdp = 1
        config.max_steps = 2
        config.learning_rate = 1e-3
        config.warmup_steps = 0
        config.lora_rank = 4
        config.sample_every = 0
        config.save_steps = 2
        config.remat_policy = "none"
        config.reward.detector_size = SIZE
        config.data.num_frames = FRAMES
        config.data.cache_dir = str(cache_folder)
        config.eval.judge_model_path = judge_path()
        config.update_from_flattened_dict(changes)
        return parse(config)

    return make


def few_devices(cfg):
    """As many of the virtual devices as the mesh of a configuration has; an axis of -1 has one."""
    return jax.devices()[: math.prod(max(n, 1) for n in dataclasses.astuple(cfg.mesh))]


def open_run(cfg, path):
    """A run before its first step on as few devices."""
    return set_up(cfg, RunFolder(epath.Path(path)), few_devices(cfg))


def train_run(cfg, path):
    """A run to its end."""
    return train(open_run(cfg, path), RunFolder(epath.Path(path)))


def read_metrics(workdir):
    """Lines of metrics.jsonl without what depends on the clock."""
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in ("step_time_s", "mfu")} for line in lines]
