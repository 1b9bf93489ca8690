"""The face reward's networks in a folder of antelopev2 files."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from rfl_jax.config import Config
from rfl_jax.errors import UserError
from rfl_jax.networks.table import open_network
from rfl_jax.rewards.face import FaceReward

DETECTOR_NAMES = ("scrfd*.onnx", "det_*.onnx")
EMBEDDER_NAMES = ("glintr100.onnx", "w600k_*.onnx")


def detector_file(folder: str) -> str:
    """The detector in a folder of antelopev2 files, beside files of other purposes."""
    return _only_file(folder, DETECTOR_NAMES)


def embedder_file(folder: str) -> str:
    """The embedder in a folder of antelopev2 files."""
    return _only_file(folder, EMBEDDER_NAMES)


def _only_file(folder: str, names: Sequence[str]) -> str:
    path = Path(folder)
    if not folder or not path.is_dir():
        raise UserError(f"{folder or 'config.reward_model_path: empty'}: expected a folder of antelopev2 onnx files")
    files = sorted({file for name in names for file in path.glob(name)})
    if len(files) != 1:
        raise UserError(f"{folder}: {len(files)} files named {' or '.join(names)}, expected one")
    return str(files[0])


def open_reward(cfg: Config, folder: str) -> FaceReward:
    """Detector and embedder with the run's way to compare faces.

    Raises:
        UserError: not exactly one SCRFD and one ArcFace file in the folder.
    """
    return FaceReward(
        open_network(cfg, "detector", [detector_file(folder)], "train"),
        open_network(cfg, "embedder", [embedder_file(folder)], "train"),
        cfg.reward,
    )


def open_judge(cfg: Config, reward: FaceReward, folder: str) -> FaceReward:
    """The reward's detector with the embedder of another folder, which only judges."""
    embedder = open_network(cfg, "embedder", [embedder_file(folder)], "train")
    return FaceReward(reward.detector, embedder, dataclasses.replace(reward.cfg, channel_order="rgb"))
