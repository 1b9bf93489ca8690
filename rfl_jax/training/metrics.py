"""Where a run's figures go: metrics.jsonl, TensorBoard, Weights & Biases if asked for, and a live line on the terminal."""

import hashlib
import importlib.util
import io
import json
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
from etils import epath
from jaxtyping import UInt8
from PIL import Image
from tensorboardX import SummaryWriter
from tensorboardX.proto.summary_pb2 import Summary  # pyright: ignore[reportAttributeAccessIssue]
from tqdm import tqdm

from rfl_jax.config import Config, dumps
from rfl_jax.data.videos import encode_video
from rfl_jax.errors import UserError
from rfl_jax.files import is_remote, write_whole
from rfl_jax.planning.chips import CHIPS

COPY_EVERY_S = 60  # how often TensorBoard's events go into a bucket
FPS = 8  # of the samples in TensorBoard

# Peak bf16 matrix throughput in FLOP/s by the beginning of a device's kind: what can be planned for, its other names, and
# (vendors' data sheets) what cannot.
PEAK_FLOPS = {
    **{kind: chip.flops for kind, chip in CHIPS.items()},
    "TPU v4": 275e12,
    "TPU v5e": CHIPS["TPU v5 lite"].flops,
    "TPU v6e": CHIPS["TPU v6 lite"].flops,
    "NVIDIA H100": 989e12,
    "NVIDIA H200": 989e12,
    "NVIDIA A100": 312e12,
}


def peak_flops() -> float | None:
    """Peak of all devices together; None where it is not known (a CPU)."""
    kind = jax.devices()[0].device_kind
    peak = next((v for k, v in sorted(PEAK_FLOPS.items(), reverse=True) if kind.startswith(k)), None)
    return None if peak is None else peak * jax.device_count()


def check_wandb(cfg: Config) -> None:
    """Raises:
    UserError: Weights & Biases is asked for and not installed.
    """
    if cfg.wandb_project and importlib.util.find_spec("wandb") is None:
        raise UserError("config.wandb_project: expected Weights & Biases to be installed: pip install wandb")


def gif(frames: UInt8[np.ndarray, "t h w 3"]) -> bytes:
    """An animated picture, which is what TensorBoard plays."""
    buffer = io.BytesIO()
    first, *rest = (Image.fromarray(frame) for frame in frames)
    first.save(buffer, format="GIF", save_all=True, append_images=rest, duration=1000 // FPS, loop=0)
    return buffer.getvalue()


class Metrics:
    """Writes one object a step.

    Args:
        cfg: of the run.
        workdir: of the run.
        start: steps done before; later lines of an interrupted run are dropped.
        total: steps in all.
    """

    def __init__(self, cfg: Config, workdir: epath.Path, *, start: int, total: int) -> None:
        self._file = workdir / "metrics.jsonl"
        self._lines = []
        if self._file.exists():
            self._lines = [line for line in self._file.read_text().splitlines() if json.loads(line)["step"] <= start]
            self._rewrite()
        # Events are written locally and copied into a bucket from time to time: they grow, objects do not.
        self._remote = workdir / "tensorboard" if is_remote(workdir) else None
        self._local = Path(tempfile.mkdtemp()) if self._remote else Path(workdir / "tensorboard")
        self._copied = time.monotonic()
        self._board = SummaryWriter(str(self._local), purge_step=start + 1)
        self._wandb = _open_wandb(cfg, workdir) if cfg.wandb_project else None
        self._total = total
        self._every = cfg.logging_steps
        # One line that is written over; nothing of it where nobody looks.
        quiet = True if os.environ.get("CI") else None
        form = "{desc} {n}/{total} |{bar:12}| {elapsed}<{remaining}{postfix}"
        self._bar = tqdm(total=total, initial=start, desc="step", disable=quiet, bar_format=form, file=sys.stderr)
        self._last = ""

    def _rewrite(self) -> None:
        write_whole(self._file, "".join(line + "\n" for line in self._lines))

    def write(self, figures: dict[str, Any]) -> None:
        """Adds a step's figures."""
        line = json.dumps(figures)
        if self._remote:
            self._lines.append(line)
            self._rewrite()
        else:
            with self._file.open("a") as stream:
                stream.write(line + "\n")
        step = figures["step"]
        if step % self._every == 0 or step == self._total or "eval_face_sim" in figures:
            scalars = {k: v for k, v in figures.items() if k != "step" and isinstance(v, (int, float))}
            for name, value in scalars.items():
                self._board.add_scalar(name, value, step)
            if self._wandb:
                self._wandb.log(scalars, step=step)
        if self._remote and time.monotonic() - self._copied > COPY_EVERY_S:
            self._copy()
        self._last = (
            f"face {figures['face_score']:.4f}  loss {figures['loss']:+.4f}  kl {figures['kl_loss']:.2e}  "
            f"grad {figures['grad_norm']:.2e}  {figures['step_time_s']:.2f} s"
        )
        self._bar.set_postfix_str(self._last, refresh=False)
        self._bar.update(step - self._bar.n)

    def amend(self, step: int, figures: dict[str, Any]) -> None:
        """Adds figures to the line of the step that an interrupted run ended with."""
        if self._lines and json.loads(self._lines[-1])["step"] == step:
            self._lines[-1] = json.dumps(json.loads(self._lines[-1]) | figures)
            self._rewrite()

    def video(self, step: int, frames: UInt8[np.ndarray, "t h w 3"]) -> None:
        """Shows a sample beside the figures of its step."""
        height, width = frames.shape[1:3]
        picture = Summary.Image(height=height, width=width, colorspace=3, encoded_image_string=gif(frames))
        summary = Summary(value=[Summary.Value(tag="sample", image=picture)])
        assert self._board.file_writer is not None
        self._board.file_writer.add_summary(summary, step)
        if self._wandb:
            import wandb

            self._wandb.log({"sample": wandb.Video(io.BytesIO(encode_video(frames)), format="mp4")}, step=step)

    def note(self, text: str) -> None:
        """A line that stays, above the live one."""
        with tqdm.external_write_mode(file=sys.stderr):
            print(text, file=sys.stderr, flush=True)

    def saved(self, step: int) -> None:
        """Where nobody looks, a checkpoint is worth a line."""
        if self._bar.disable:
            self.note(f"step {step}/{self._total}  {self._last}")

    def _copy(self) -> None:
        self._board.flush()
        for file in self._local.iterdir():
            if self._remote:
                write_whole(self._remote / file.name, file.read_bytes())
        self._copied = time.monotonic()

    def close(self) -> None:
        self._bar.close()
        if self._remote:
            self._copy()
        self._board.close()
        if self._remote:
            shutil.rmtree(self._local)
        if self._wandb:
            self._wandb.finish()


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
