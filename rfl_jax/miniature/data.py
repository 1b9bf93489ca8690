"""The miniature's clips, drawn on first use: people to train on and people held out."""

import csv
import tempfile
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np
from tqdm import tqdm

from rfl_jax.data.videos import to_uint8, write_video
from rfl_jax.miniature.faces import (
    FPS,
    HELD_OUT_PROMPTS,
    TRAINING_PROMPTS,
    prompt,
    render,
    sample_identity,
    sample_scene,
)
from rfl_jax.miniature.world import COMPANY, FRAMES, SIZE

SPLITS = {"train": (256, 1001), "held_out": (96, 2002)}  # clips and seed: no person and no prompt is in both
PROMPTS = {"train": TRAINING_PROMPTS, "held_out": HELD_OUT_PROMPTS}
WORLD = 3  # of what is drawn; a new number makes clips of older releases unused


def clips(split: str, folder: Path | str | None = None) -> Path:
    """The metadata.csv of a split, whose clips are drawn if they are not there yet.

    Args:
        split: "train" or "held_out".
        folder: where they are; the user's cache by default.
    """
    count, seed = SPLITS[split]
    base = Path(folder) if folder else Path.home() / ".cache" / "rfl_jax" / "miniature"
    done = base / f"{split}-{count}-{seed}-v{WORLD}"
    if (done / "metadata.csv").exists():
        return done / "metadata.csv"
    base.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{done.name}.", dir=base) as aside:
        draw_clips(Path(aside) / "clips", count, seed, prompts=PROMPTS[split])
        try:
            (Path(aside) / "clips").rename(done)
        except OSError:
            # Another process may have drawn the same clips meanwhile.
            if not (done / "metadata.csv").exists():
                raise
    return done / "metadata.csv"


def draw_clips(
    folder: Path, count: int, seed: int, frames: int = FRAMES, size: int = SIZE,
    prompts: Sequence[tuple[int, ...]] = TRAINING_PROMPTS,
) -> None:  # fmt: skip
    """Writes `count` clips of different people, `size` pixels wide and high, with their metadata.csv."""
    folder.mkdir(parents=True)
    draw = jax.jit(lambda scene: render(scene, size))
    rows = []
    for i in tqdm(range(count), desc="drawing clips", disable=None):
        k1, k2 = jax.random.split(jax.random.fold_in(jax.random.key(seed), i))
        scene = sample_scene(k2, sample_identity(k1, 1), frames, prompts=prompts, company=COMPANY)
        name = f"clip_{i:03d}.mp4"
        write_video(folder / name, to_uint8(np.asarray(draw(scene)[0])), fps=FPS)
        rows.append((name, prompt([int(w) for w in scene.words[0]])))
    with (folder / "metadata.csv").open("w", newline="", encoding="utf-8") as stream:
        csv.writer(stream).writerows([("video", "prompt"), *rows])
