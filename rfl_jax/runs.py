"""The folder of a run: what lies where in it, and what training left there."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from rfl_jax.errors import UserError, refuse_damage
from rfl_jax.files import absolute, array_handler, parse_json, read_json

UNREADABLE = "cannot be read, expected a checkpoint as it was written"
BEST = "best"  # names the checkpoint that validation judged best, where a step's number could stand


@dataclasses.dataclass(frozen=True)
class RunFolder:
    """Names in a run's folder (`--workdir`), which may lie in a bucket.

    Attributes:
        path: the folder itself.
    """

    path: epath.Path

    def __str__(self) -> str:
        return str(self.path)

    @property
    def config(self) -> epath.Path:
        """The configuration as JSON."""
        return self.path / "config.json"

    @property
    def about(self) -> epath.Path:
        """Versions, devices and weights that the run trains with, and the licences of those of faces."""
        return self.path / "run.json"

    @property
    def lock(self) -> epath.Path:
        """Which process trains here now."""
        return self.path / "lock.json"

    @property
    def metrics(self) -> epath.Path:
        """One JSON object a step."""
        return self.path / "metrics.jsonl"

    @property
    def validation(self) -> epath.Path:
        """Measures of the held-out clips at every validation."""
        return self.path / "validation.json"

    @property
    def evaluation(self) -> epath.Path:
        """Measures of the held-out clips before and after training."""
        return self.path / "evaluation.json"

    @property
    def evaluation_files(self) -> epath.Path:
        """Folder of the evaluation's videos and plots."""
        return self.path / "evaluation"

    @property
    def profile(self) -> epath.Path:
        """Time of a step by phase."""
        return self.path / "profile.json"

    @property
    def trace(self) -> epath.Path:
        """Folder of the profiler's own files."""
        return self.path / "profile"

    @property
    def tensorboard(self) -> epath.Path:
        """Folder of TensorBoard's events."""
        return self.path / "tensorboard"

    @property
    def samples(self) -> epath.Path:
        """Folder of videos that training shows."""
        return self.path / "samples"

    def sample(self, step: int) -> epath.Path:
        """The video of a step."""
        return self.samples / f"step_{step:06d}.mp4"

    @property
    def cache(self) -> epath.Path:
        """Folder of prepared clips, unless the configuration names another."""
        return self.path / "cache"

    @property
    def checkpoints(self) -> epath.Path:
        """Folder of the last checkpoints."""
        return self.path / "checkpoints"

    @property
    def best(self) -> epath.Path:
        """Folder of the checkpoint that validation judged best."""
        return self.path / BEST

    def adapters(self, network: str) -> epath.Path:
        """A network's trained adapters by the original's names of layers."""
        return self.path / f"{network}_lora.safetensors"

    def exists(self) -> bool:
        """Whether a run began here."""
        return self.config.exists()

    def read_config(self) -> dict[str, Any]:
        """The run's configuration, to be parsed.

        Raises:
            UserError: no run began here, or its configuration cannot be read.
        """
        if not self.exists():
            raise UserError(f"{self.path}: expected the folder of a run, with its {self.config.name}")
        return read_json(self.config)

    def read_licences(self) -> dict[str, str]:
        """Lines on the licences of the face networks that the run trains with; none of a run of an earlier release.

        Raises:
            UserError: run.json cannot be read, or tells no lines.
        """
        found = read_json(self.about).get("licences", {}) if self.about.exists() else {}
        if not isinstance(found, dict) or not all(isinstance(line, str) for line in found.values()):
            raise UserError(f"{self.about}: licences: {found!r}, expected a line for each network")
        return found

    def read_lines(self) -> list[tuple[str, dict[str, Any]]]:
        """Lines of metrics.jsonl as they are written, and what they say; none where there is no such file. A last line that
        is not ended is left out: a full disk cut it off, or it is on its way while training runs.

        Raises:
            UserError: a line is no JSON object with the number of its step.
        """
        if not self.metrics.exists():
            return []
        lines = []
        for number, line in enumerate(self.metrics.read_bytes().split(b"\n")[:-1], 1):
            where = f"{self.metrics}: line {number}"
            content = parse_json(line, where)
            if type(content.get("step")) is not int:
                raise UserError(f"{where}: expected the number of a step, found {content.get('step')!r}")
            lines.append((line.decode(), content))
        return lines


def licence_header(licences: Mapping[str, str]) -> dict[str, str]:
    """The lines on licences as entries of a safetensors file's header, `licence_detector` and so on."""
    return {f"licence_{network}": line for network, line in licences.items()}


def _steps(checkpoints: epath.Path) -> list[int]:
    """The steps of the checkpoints in a folder."""
    folder = absolute(checkpoints)
    return sorted(int(p.name) for p in folder.iterdir() if p.name.isdigit()) if folder.is_dir() else []


def holds_checkpoint(checkpoints: epath.Path) -> bool:
    """Whether a folder of checkpoints has any."""
    return bool(_steps(checkpoints))


def find_checkpoint(folder: RunFolder, step: str = "") -> epath.Path:
    """The folder of a run's checkpoint.

    Args:
        folder: of the run.
        step: its number, or "best"; the last by default.

    Raises:
        UserError: no such run or checkpoint.
    """
    if not folder.exists():
        raise UserError(f"{folder}: expected the folder of a run, with its {folder.config.name}")
    parent = absolute(folder.best if step == BEST else folder.checkpoints)
    steps = _steps(parent)
    if not steps:
        why = ": config.eval_every keeps one" if step == BEST else ""
        raise UserError(f"{folder}/{parent.name}: holds no checkpoint{why}")
    number = str(steps[-1]) if step in ("", BEST) else step
    if not number.isdigit() or int(number) not in steps:
        raise UserError(
            f"--step: {folder} has no checkpoint {step}, expected one of {', '.join(map(str, steps))}, or {BEST}"
        )
    return parent / str(int(number))


def trained_networks(checkpoint: epath.Path) -> list[str]:
    """Networks that a checkpoint holds weights or adapters for."""
    with refuse_damage(f"{checkpoint}: {UNREADABLE}"), ocp.Checkpointer(array_handler()) as checkpointer:
        return sorted(checkpointer.metadata(checkpoint / "state").item_metadata.tree["params"])


def holds_average(checkpoint: epath.Path) -> bool:
    """Whether a checkpoint holds an average of its weights beside them, as runs with `ema.decay` keep it."""
    with refuse_damage(f"{checkpoint}: {UNREADABLE}"), ocp.Checkpointer(array_handler()) as checkpointer:
        return "average" in checkpointer.metadata(checkpoint / "state").item_metadata.tree


def takes_average(checkpoint: epath.Path, *, raw: bool) -> bool:
    """Whether what a checkpoint hands on is the average of its weights: where there is one, and not the `raw` weights are
    asked for.

    Raises:
        UserError: raw weights are asked for where there are no others.
    """
    averaged = holds_average(checkpoint)
    if raw and not averaged:
        raise UserError(
            f"--raw: {checkpoint} holds no average (config.ema.decay), expected none, as its weights are raw"
        )
    return averaged and not raw


def read_network(checkpoint: epath.Path, network: str, *, average: bool = False) -> dict[str, np.ndarray]:
    """The trained arrays of one network by dotted path, or their average; those of other networks are not read."""
    part = "average" if average else "params"
    with refuse_damage(f"{checkpoint}: {UNREADABLE}"), ocp.Checkpointer(array_handler()) as checkpointer:
        tree = checkpointer.metadata(checkpoint / "state").item_metadata.tree
        wanted = {part: {network: tree[part][network]}}
        restored = checkpointer.restore(
            checkpoint / "state",
            ocp.args.PyTreeRestore(
                wanted,
                restore_args=jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), wanted),
                partial_restore=True,
            ),
        )
    found, _ = jax.tree_util.tree_flatten_with_path(restored[part][network])
    names = (jax.tree_util.keystr(path, simple=True, separator=".").removesuffix(".value") for path, _ in found)
    return dict(zip(names, (array for _, array in found), strict=True))
