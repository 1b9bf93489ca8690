"""Where a run's metrics go: metrics.jsonl, TensorBoard, Weights & Biases if asked for, and a live line on the terminal."""

import hashlib
import importlib.util
import io
import json
import math
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from etils import epath
from jaxtyping import UInt8
from tqdm import tqdm

from rfl_jax.config import Config, dumps
from rfl_jax.data.videos import encode_video, write_video
from rfl_jax.errors import UserError
from rfl_jax.files import is_remote, naming, write_whole
from rfl_jax.hosts import is_writer
from rfl_jax.runs import RunFolder
from rfl_jax.training.board import COPY_EVERY_S, Board


def check_wandb(cfg: Config) -> None:
    """Raises:
    UserError: Weights & Biases is asked for and not installed.
    """
    if cfg.wandb_project and importlib.util.find_spec("wandb") is None:
        raise UserError("config.wandb_project: expected Weights & Biases to be installed: pip install wandb")


class Silent:
    """A record that keeps nothing: that of the processes which do not write."""

    def __enter__(self) -> "Silent":
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def write(self, line: Mapping[str, Any]) -> None:
        """Adds a step's metrics."""

    def amend(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Adds metrics to the line of the step that an interrupted run ended with."""

    def video(self, step: int, frames: UInt8[np.ndarray, "t h w 3"]) -> None:
        """Keeps a sample beside the metrics of its step."""

    def note(self, text: str) -> None:
        """Shows a line that stays, above the live one."""

    def saved(self, step: int) -> None:
        """A checkpoint is being written."""


def open_record(cfg: Config, folder: RunFolder, *, start: int, total: int) -> Silent:
    """The record of a run: on the process that writes what all share; silent on the others.

    Args:
        cfg: of the run.
        folder: of the run.
        start: steps done before; later lines of an interrupted run are dropped.
        total: steps in all.
    """
    return Record(cfg, folder, start=start, total=total) if is_writer() else Silent()


class Record(Silent):
    """Writes one object a step; see `open_record`."""

    def __init__(self, cfg: Config, folder: RunFolder, *, start: int, total: int) -> None:
        self._folder = folder
        self._file = folder.metrics
        self._lines = []
        if self._file.exists():
            self._lines = [text for text, line in folder.read_lines() if line["step"] <= start]
            self._rewrite()
        # Events are written locally and copied into a bucket from time to time: they grow, objects do not.
        self._remote = folder.tensorboard if is_remote(folder.path) else None
        self._local = Path(tempfile.mkdtemp()) if self._remote else Path(folder.tensorboard)
        self._copied = time.monotonic()
        self._board = Board(self._local, first=start + 1)
        self._wandb = _open_wandb(cfg, folder.path) if cfg.wandb_project else None
        self._total = total
        self._every = cfg.logging_steps
        # One line that is written over; none at all where the output is not a terminal.
        quiet = True if os.environ.get("CI") else None
        form = "{desc} {n}/{total} |{bar:12}| {elapsed}<{remaining}{postfix}"
        self._bar = tqdm(total=total, initial=start, desc="step", disable=quiet, bar_format=form, file=sys.stderr)
        self._last = ""

    def _rewrite(self) -> None:
        write_whole(self._file, "".join(line + "\n" for line in self._lines))

    def write(self, line: Mapping[str, Any]) -> None:
        text = _json(line)
        if self._remote:
            self._lines.append(text)
            self._rewrite()
        else:
            with naming(self._file), self._file.open("a") as stream:
                stream.write(text + "\n")
        step = line["step"]
        if step % self._every == 0 or step == self._total or "eval_face_sim" in line:
            numbers = {k: v for k, v in line.items() if k != "step" and isinstance(v, (int, float))}
            scalars = {k: v for k, v in numbers.items() if math.isfinite(v)}
            self._board.scalars(step, scalars)
            if self._wandb:
                self._wandb.log(scalars, step=step)
        if self._remote and time.monotonic() - self._copied > COPY_EVERY_S:
            self._copy()
        self._last = (
            f"face {line['face_score']:.4f}  loss {line['loss']:+.4f}  kl {line['kl_loss']:.2e}  "
            f"grad {line['grad_norm']:.2e}  {line['step_time_s']:.2f} s"
        )
        self._bar.set_postfix_str(self._last, refresh=False)
        self._bar.update(step - self._bar.n)

    def amend(self, step: int, metrics: Mapping[str, Any]) -> None:
        if self._lines and json.loads(self._lines[-1])["step"] == step:
            self._lines[-1] = _json(json.loads(self._lines[-1]) | metrics)
            self._rewrite()

    def video(self, step: int, frames: UInt8[np.ndarray, "t h w 3"]) -> None:
        write_video(self._folder.sample(step), frames)
        self._board.video(step, frames)
        if self._wandb:
            import wandb

            self._wandb.log({"sample": wandb.Video(io.BytesIO(encode_video(frames)), format="mp4")}, step=step)

    def note(self, text: str) -> None:
        with tqdm.external_write_mode(file=sys.stderr):
            print(text, file=sys.stderr, flush=True)

    def saved(self, step: int) -> None:
        if self._bar.disable:  # no live line: a checkpoint is worth one of its own
            self.note(f"step {step}/{self._total}  {self._last}")

    def _copy(self) -> None:
        self._board.flush()
        for file in self._local.iterdir():
            if self._remote:
                write_whole(self._remote / file.name, file.read_bytes())
        self._copied = time.monotonic()

    def __exit__(self, *_: object) -> None:
        self._bar.close()
        if self._remote:
            self._copy()
        self._board.close()
        if self._remote:
            shutil.rmtree(self._local)
        if self._wandb:
            self._wandb.finish()


def _json(line: Mapping[str, Any]) -> str:
    """A line of metrics.jsonl, where null stands for what is not finite: JSON has no word for it."""
    finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in line.items()}
    return json.dumps(finite, allow_nan=False)


def _open_wandb(cfg: Config, workdir: epath.Path) -> Any:
    """The run in Weights & Biases; the same workdir is the same run there."""
    import wandb

    identity = hashlib.sha256(str(workdir if is_remote(workdir) else workdir.resolve()).encode()).hexdigest()[:16]
    folder = tempfile.gettempdir() if is_remote(workdir) else str(workdir)
    try:
        return wandb.init(
            project=cfg.wandb_project,
            id=identity,
            name=workdir.name,
            resume="allow",
            dir=folder,
            config=json.loads(dumps(cfg)),
            settings=wandb.Settings(silent=True),
        )
    except wandb.Error as error:
        raise UserError(f"config.wandb_project: {cfg.wandb_project}: cannot be opened ({error})") from None
