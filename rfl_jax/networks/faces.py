"""The face networks in a folder, as insightface's model packs and AuraFace-v1 have them, or converted."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from convert import store
from convert.licence import licence_of
from rfl_jax.config import Config
from rfl_jax.errors import UserError
from rfl_jax.networks.table import NETWORKS, open_network
from rfl_jax.rewards.face import FaceReward

DETECTOR_NAMES = ("scrfd*.onnx", "det_*.onnx")
EMBEDDER_NAMES = ("glintr100.onnx", "w600k_*.onnx")


def detector_file(folder: str) -> str:
    """The detector in a folder, beside files of other purposes: an ONNX file, or a folder of converted weights."""
    return _only(folder, "detector", DETECTOR_NAMES)


def embedder_file(folder: str) -> str:
    """The embedder in a folder, likewise."""
    return _only(folder, "embedder", EMBEDDER_NAMES)


def _only(folder: str, network: str, names: Sequence[str]) -> str:
    path = Path(folder)
    if not folder or not path.is_dir():
        raise UserError(
            f"{folder or 'config.reward_model_path: empty'}: expected a folder of face networks, as antelopev2"
        )
    kind = NETWORKS[network].component
    files = {file for name in names for file in path.glob(name) if file.is_file()}
    files |= {child for child in path.iterdir() if _holds(child, kind)}
    if len(files) != 1:
        found = f" ({', '.join(sorted(file.name for file in files))})" if files else ""
        written = f"folders written by python -m convert {kind}"
        raise UserError(f"{folder}: {len(files)} files named {' or '.join(names)}, or {written}{found}, expected one")
    return str(files.pop())


def _holds(folder: Path, kind: str) -> bool:
    return store.is_converted(str(folder)) and store.read_description(str(folder))["kind"] == kind


def licences(cfg: Config, folder: str) -> dict[str, str]:
    """A line on the licence of each face network's weights: of the reward's "detector" and "embedder", and of the "judge".

    Args:
        cfg: of the run.
        folder: of the reward's networks.

    Raises:
        UserError: not exactly one detector and one embedder in the folder.
    """
    files = {"detector": detector_file(folder), "embedder": embedder_file(folder)}
    if cfg.eval.judge_model_path:
        files["judge"] = embedder_file(cfg.eval.judge_model_path)
    return {network: licence_of(file) for network, file in files.items()}


def open_reward(cfg: Config, folder: str) -> FaceReward:
    """Detector and embedder with the run's way to compare faces.

    Raises:
        UserError: not exactly one detector and one embedder in the folder.
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
