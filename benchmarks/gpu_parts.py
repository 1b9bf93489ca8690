"""The parts of `benchmarks.gpu`: their sizes, how a run is timed, and the process in which a side measures one.

Nothing here imports JAX or PyTorch: a process holds the one that it measures.
"""

import dataclasses
import importlib
import json
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from rfl_jax.errors import first_line
from rfl_jax.models.wan.config import DIT_PRESETS, VAE_PRESETS, DiTConfig, VAEConfig

SIDES = {"ours": "benchmarks.gpu_ours", "torch": "benchmarks.gpu_torch"}
MARK = "record "  # begins the lines of a process that are records
RUNS = 3
LONG_S = 5.0  # a run of so long needs none before it that warms up
SMALL_DIT = {"dim": 64, "ffn_dim": 128, "num_heads": 2, "freq_dim": 32, "text_dim": 32, "text_len": 16}
SMALL_VAE = {
    "dim": 16, "decoder_dim": 16, "num_res_blocks": 1, "dim_mult": (1, 1), "temporal_downsample": (True,),
}  # fmt: skip
# Tokens and heads of attention. Scores are at most as many where all of them are kept, by XLA and by float32.
SHAPES, SMALL_SHAPES = ((2048, 40), (18_900, 4), (18_900, 40)), ((320, 2),)
MOST_SCORES = 18_900**2 * 4

Record = dict[str, Any]
# Cases and what measures them. Records of one case complete each other.
Cases = Iterator[tuple[str, Callable[[], Record]]]


@dataclasses.dataclass(frozen=True)
class Part:
    """One part.

    Attributes:
        dit, vae: presets.
        pixels: height and width of 81 frames, which are 18,900 tokens of the DiT.
        layers: of the DiT, most first: measured are the most that memory and time are enough for.
        seconds: what a side's process takes, and what each layer adds. Guesses at 400 TFLOP/s, by which the time is
            shared out.
    """

    dit: str
    vae: str
    pixels: int
    layers: tuple[int, ...]
    seconds: Mapping[str, tuple[float, float]]


_A14B = ("wan2_2_i2v_a14b", "wan2_1", 480)
PARTS = {
    "attention": Part(*_A14B, (1,), {"ours": (40, 0), "torch": (25, 0)}),
    "layer": Part(*_A14B, (1,), {"ours": (50, 0), "torch": (30, 0)}),
    "step_a14b": Part(*_A14B, (40, 30, 20, 10), {"ours": (100, 3.7), "torch": (40, 3.0)}),
    "vae": Part(*_A14B, (1,), {"ours": (80, 0), "torch": (40, 0)}),
    "step_5b": Part("wan2_2_ti2v_5b", "wan2_2", 960, (30, 20, 10), {"ours": (160, 2.2), "torch": (70, 1.7)}),
}


@dataclasses.dataclass(frozen=True)
class Job:
    """What a process measures.

    Attributes:
        name: of a part, or "about" for the machine.
        small: whether at sizes for a CPU.
        layers: of the DiT.
        attention: our kernel, as the configuration names it.
    """

    name: str
    small: bool = False
    layers: int = 1
    attention: str = "auto"

    @property
    def part(self) -> Part:
        return PARTS[self.name]

    @property
    def dit(self) -> DiTConfig:
        sizes = SMALL_DIT if self.small else {}
        return dataclasses.replace(DIT_PRESETS[self.part.dit], num_layers=self.layers, **sizes)

    @property
    def vae(self) -> VAEConfig:
        return dataclasses.replace(VAE_PRESETS[self.part.vae], **SMALL_VAE if self.small else {})

    @property
    def video(self) -> tuple[int, int, int]:
        """Frames, height and width."""
        return (5, 16, 16) if self.small else (81, self.part.pixels, self.part.pixels)

    @property
    def latents(self) -> tuple[int, int, int]:
        """Frames, rows and columns."""
        (frames, height, width), (time, rows, columns) = self.video, self.vae.stride
        return (frames - 1) // time + 1, height // rows, width // columns

    @property
    def tokens(self) -> int:
        t, h, w = self.latents
        return t * (h // 2) * (w // 2)


def timed(job: Job, call: Callable[[], Any], wait: Callable[[Any], Any], compiling: float = 0.0) -> Record:
    """Seconds of at least three runs, and of the first with what it took to compile.

    Args:
        job: short runs are repeated, less often where it is small.
        call: begins a run and gives its result.
        wait: for a result.
        compiling: seconds that went before.
    """

    def seconds(times: int = 1) -> float:
        begin, result = time.perf_counter(), None
        for _ in range(times):
            result = call()
        wait(result)
        return (time.perf_counter() - begin) / times

    first = seconds()
    if first > LONG_S:
        runs = [first, *(seconds() for _ in range(RUNS - 1))]
    else:
        times = max(1, round((0.02 if job.small else 0.3) / seconds()))
        runs = [seconds(times) for _ in range(RUNS)]
    return {"first_s": compiling + first, "seconds": runs}


def _failed(case: str, error: Exception) -> Record:
    traceback.print_exc()
    return {"case": case, "failed": f"{type(error).__name__}: {first_line(error)}"}


def records(side: str, job: Job) -> Iterator[Record]:
    """What a side measures in this process, case by case; of what fails the error's first line."""
    try:
        for case, measure in importlib.import_module(SIDES[side]).MEASURES[job.name.split("_")[0]](job):
            try:
                yield {"case": case, **measure()}
            except Exception as error:  # a kernel is not made for the device, or memory is too small
                yield _failed(case, error)
    except Exception as error:  # a package is not there, or memory is too small for the weights
        yield _failed("", error)


if __name__ == "__main__":
    for record in records(sys.argv[1], Job(**json.loads(sys.argv[2]))):
        print(MARK + json.dumps(record), flush=True)
