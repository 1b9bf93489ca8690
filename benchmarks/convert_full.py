"""Converts a synthetic file with every key and shape of a published DiT, and compares with the disk's own copy speed.

`python -m benchmarks.convert_full --dir=DIR [--preset=wan2_2_i2v_a14b]` needs twice the file's size (28.6 GB) of free disk
and prints one line for `benchmarks/RESULTS.md`.
"""

import argparse
import dataclasses
import os
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from flax import nnx
from tqdm import tqdm

from convert import dit
from convert.export import Entry, write_safetensors
from rfl_jax.models.wan.config import DIT_PRESETS
from rfl_jax.models.weights import flat_shapes


def tensors(preset: str, seed: int) -> Iterator[Entry]:
    """Every tensor of the original's checkpoint, cut from one block of small random numbers."""
    cfg = DIT_PRESETS[preset]
    target = flat_shapes(nnx.eval_shape(lambda: dit.build(cfg)))
    largest = max(int(np.prod(shape[1:])) for shape in target.values())
    noise = np.random.default_rng(seed).normal(0, 0.02, largest).astype(ml_dtypes.bfloat16)
    for rule in dit.NAMINGS["original"]:
        if rule.target is None:
            continue
        shape = target[rule.target]
        for layer in range(shape[0]) if rule.stacked else [None]:
            one = np.broadcast_to(np.float32(0), shape[1:] if rule.stacked else shape)
            source = rule.transform.inverse(one).shape
            count = int(np.prod(source))
            yield Entry(
                rule.key(layer), source, np.dtype(ml_dtypes.bfloat16),
                lambda count=count, source=source: np.resize(noise, count).reshape(source),
            )  # fmt: skip


def seconds(action: Callable[[], Any]) -> float:
    """Wall-clock seconds of an action, until everything is on the disk."""
    begin = time.perf_counter()
    action()
    os.sync()
    return time.perf_counter() - begin


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dir", type=Path, required=True)
    parser.add_argument("--preset", default="wan2_2_i2v_a14b", choices=tuple(DIT_PRESETS))
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    args.dir.mkdir(parents=True, exist_ok=True)
    source, copy, out = (args.dir / name for name in ("source", "copy", "converted"))
    if not source.exists():
        source.mkdir()
        found = sorted(tensors(args.preset, args.seed), key=lambda e: e.key)
        with tqdm(total=sum(e.nbytes for e in found), unit="B", unit_scale=True, desc="source", disable=None) as bar:
            write_safetensors(source / "model.safetensors", found, {}, bar.update)
    size = sum(file.stat().st_size for file in source.iterdir())
    copying = seconds(lambda: shutil.copytree(source, copy))
    shutil.rmtree(copy)
    shutil.rmtree(out, ignore_errors=True)
    command = [sys.executable, "-m", "convert", "dit", "--src", str(source), "--dst", str(out)]
    converting = seconds(lambda: subprocess.run(command, check=True))
    memory = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
    shutil.rmtree(out)
    print(
        f"{dataclasses.asdict(DIT_PRESETS[args.preset])['num_layers']} layers, {size / 1e9:.1f} GB: copied in "
        f"{copying:.0f} s ({size / copying / 1e9:.2f} GB/s), converted in {converting:.0f} s "
        f"({size / converting / 1e9:.2f} GB/s, {copying / converting:.0%} of the copy's speed), "
        f"{memory / 1e9:.2f} GB of memory at most"
    )


if __name__ == "__main__":
    main()
