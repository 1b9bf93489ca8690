"""Face networks in the folders that others publish, and in converted ones: found beside other files, one of each."""

import dataclasses
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx

from convert import arcface, scrfd, store
from rfl_jax.errors import UserError
from rfl_jax.miniature.world import ASSETS, DETECTOR_FILE, EMBEDDER_FILE
from rfl_jax.models.weights import get_arrays
from rfl_jax.networks.faces import detector_file, embedder_file, licences, open_reward
from rfl_jax.networks.table import abstract_network
from rfl_jax.rewards.embedder import make_embedder
from rfl_jax.rewards.mobilefacenet import BottleneckSpec, ConvPReLUSpec, MobileFaceNetConfig

LAYOUTS = {
    "antelopev2": ("scrfd_10g_bnkps.onnx", "glintr100.onnx"),
    "AuraFace-v1": ("scrfd_10g_bnkps.onnx", "glintr100.onnx"),
    "buffalo_l": ("det_10g.onnx", "w600k_r50.onnx"),
    "buffalo_m": ("det_2.5g.onnx", "w600k_r50.onnx"),
    "buffalo_s": ("det_500m.onnx", "w600k_mbf.onnx"),
}


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    """A folder of the miniature's face networks as `python -m convert` writes them."""
    folder = tmp_path_factory.mktemp("faces")
    for kind, component, file in (("scrfd", scrfd, DETECTOR_FILE), ("arcface", arcface, EMBEDDER_FILE)):
        store.save(str(folder / f"any name of {kind}"), kind, *component.convert(ASSETS / file))
    return folder


@pytest.mark.parametrize("layout", LAYOUTS)
def test_published_layouts(tmp_path, layout):
    for name in ("1k3d68.onnx", "2d106det.onnx", "genderage.onnx", *LAYOUTS[layout]):
        (tmp_path / name).touch()
    found = detector_file(str(tmp_path)), embedder_file(str(tmp_path))
    assert tuple(Path(file).name for file in found) == LAYOUTS[layout]


def test_converted_networks_are_those_of_the_files(converted, settings):
    cfg = settings()
    rewards = [open_reward(cfg, str(folder)) for folder in (converted, (ASSETS / DETECTOR_FILE).parent)]
    got, want = (nnx.to_flat_state(nnx.state(reward)) for reward in rewards)
    assert [path for path, _ in got] == [path for path, _ in want]
    for (_, a), (_, b) in zip(got, want, strict=True):
        np.testing.assert_array_equal(a[...], b[...])
    x = np.random.default_rng(0).uniform(-1, 1, (1, 112, 112, 3)).astype(np.float32)
    np.testing.assert_array_equal(*(jax.jit(reward.embedder)(x) for reward in rewards))


def test_a_mobilefacenet_is_opened_and_planned_like_the_other_embedders(tmp_path, settings):
    layers = (ConvPReLUSpec(8, 3, 2, 1), BottleneckSpec(8, 16, 1, True), BottleneckSpec(16, 16, 2, False))
    model = make_embedder(MobileFaceNetConfig(layers, 12), rngs=nnx.Rngs(0))
    store.save(str(tmp_path / "mine"), "arcface", model.cfg, {k: np.asarray(v) for k, v in get_arrays(model).items()})
    shutil.copy(ASSETS / DETECTOR_FILE, tmp_path / "scrfd_mine.onnx")
    cfg = settings()
    reward = open_reward(cfg, str(tmp_path))
    x = np.random.default_rng(0).uniform(-1, 1, (1, 112, 112, 3)).astype(np.float32)
    np.testing.assert_array_equal(*(jax.jit(embedder)(x) for embedder in (reward.embedder, model)))
    planned = abstract_network(cfg, "embedder", [embedder_file(str(tmp_path))], "train", "cpu")
    shapes = [nnx.to_flat_state(nnx.state(network)) for network in (planned, model)]
    assert [(path, leaf.shape) for path, leaf in shapes[0]] == [(path, leaf.shape) for path, leaf in shapes[1]]


def test_two_of_a_kind_are_refused_by_name(tmp_path, converted):
    shutil.copytree(converted, tmp_path / "faces")
    (tmp_path / "faces" / "w600k_r50.onnx").touch()
    with pytest.raises(UserError, match=r"2 files named .* \(any name of arcface, w600k_r50.onnx\), expected one"):
        embedder_file(str(tmp_path / "faces"))
    assert detector_file(str(tmp_path / "faces")).endswith("any name of scrfd")
    with pytest.raises(UserError, match="0 files named scrfd"):
        detector_file(str(tmp_path))


def test_licences_are_told_of_all_three_networks(settings):
    cfg = settings()
    found = licences(cfg, cfg.reward_model_path)
    assert found == {
        "detector": "the miniature's detector: Apache-2.0 (NOTICE)",
        "embedder": "the miniature's embedder: Apache-2.0 (NOTICE)",
        "judge": "the miniature's judging embedder: Apache-2.0 (NOTICE)",
    }
    alone = dataclasses.replace(cfg, eval=dataclasses.replace(cfg.eval, judge_model_path=""))
    assert licences(alone, alone.reward_model_path).keys() == {"detector", "embedder"}
