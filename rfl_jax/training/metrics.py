"""Where a run's figures go: metrics.jsonl, TensorBoard, and a line on the terminal."""

import json
import shutil
import sys
import tempfile
import time
from pathlib import Path

import jax
from etils import epath
from tensorboardX import SummaryWriter

from rfl_jax.files import is_remote, write_whole
from rfl_jax.planning.chips import CHIPS

COPY_EVERY_S = 60  # how often TensorBoard's events go into a bucket

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


class Metrics:
    """Writes one object a step.

    Args:
        workdir: of the run.
        start: steps done before; later lines of an interrupted run are dropped.
        total: steps in all.
        every: how often a line is shown.
    """

    def __init__(self, workdir: epath.Path, *, start: int, total: int, every: int) -> None:
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
        self._total = total
        self._every = every
        self._live = sys.stderr.isatty()

    def _rewrite(self) -> None:
        write_whole(self._file, "".join(line + "\n" for line in self._lines))

    def write(self, figures: dict) -> None:
        """Adds a step's figures."""
        line = json.dumps(figures)
        if self._remote:
            self._lines.append(line)
            self._rewrite()
        else:
            with self._file.open("a") as stream:
                stream.write(line + "\n")
        step = figures["step"]
        for name, value in figures.items():
            if name != "step" and value is not None:
                self._board.add_scalar(name, value, step)
        if self._remote and time.monotonic() - self._copied > COPY_EVERY_S:
            self._copy()
        if step % self._every == 0 or step == self._total:
            self._show(figures)

    def _copy(self) -> None:
        self._board.flush()
        for file in self._local.iterdir():
            if self._remote:
                write_whole(self._remote / file.name, file.read_bytes())
        self._copied = time.monotonic()

    def _show(self, f: dict) -> None:
        line = (
            f"step {f['step']}/{self._total}  face {f['face_score']:.4f}  loss {f['loss']:+.4f}  "
            f"kl {f['kl_loss']:.2e}  grad {f['grad_norm']:.2e}  {f['step_time_s']:.2f} s"
        )
        print(f"\r{line}" if self._live else line, end="" if self._live else "\n", file=sys.stderr, flush=True)

    def close(self) -> None:
        if self._live:
            print(file=sys.stderr)
        if self._remote:
            self._copy()
        self._board.close()
        if self._remote:
            shutil.rmtree(self._local)
