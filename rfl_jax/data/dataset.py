"""Prepared clips as batches (Grain): shuffled by seed, sharded by process, resumable."""

from collections.abc import Mapping, Sequence

import grain
import numpy as np

from rfl_jax.data.cache import ClipArrays, PreparedClip
from rfl_jax.errors import UserError

# Without a number Grain's length is the largest integer, which batches of one overflow.
EPOCHS = 1 << 20


def check_shapes(clips: Sequence[PreparedClip], batch: int) -> None:
    """Refuses clips of different sizes where several share a batch.

    Raises:
        UserError: naming the first row whose size differs.
    """
    if batch == 1:
        return
    shapes = [(clip.clip.number, clip.latent_shape) for clip in clips]
    for number, shape in shapes:
        if shape != shapes[0][1]:
            raise UserError(
                f"row {number}: latents of {shape} and of {shapes[0][1]} (row {shapes[0][0]}) cannot share a "
                "batch, expected one size: set data.height, data.width and data.num_frames, or batches of 1"
            )


def make_iterator(
    clips: Sequence[PreparedClip],
    names: Sequence[str],
    *,
    batch: int,
    seed: int,
    noises: int,
    group: int = 1,
    real: Sequence[str] = (),
    terms: Mapping[str, str] | None = None,
    people: Sequence[str] = (),
    share: tuple[int, int] = (0, 1),
) -> grain.DatasetIterator:
    """An endless iterator over batches of this process's share; its state can be saved.

    Args:
        clips: all of them.
        names: arrays of a clip that a batch has; besides, "clip" is its number and "noise_index" which of its noises it
            starts from: the next one every epoch.
        batch: samples a process takes each time.
        seed: of the order, which differs from epoch to epoch.
        noises: a clip's noises, after which the first comes again; 0: never.
        group: samples of one clip that follow each other, of so many noises.
        real: arrays that a batch has for guards.
        terms: of the reward, see `PreparedClip.load_terms`.
        people: arrays that a batch has of the clips' people, see `PreparedClip.load_people`.
        share: number of this process's part of every batch, and the number of parts.
    """

    def load(position: int, number: int, member: int) -> ClipArrays:
        index = position // len(clips) * group + member
        index = index % noises if noises else index
        clip = clips[number]
        values = clip.load(names)
        arrays = {"clip": np.array(number, np.int32), "noise_index": np.array(index, np.int32)}
        arrays |= {name: values[name] for name in names} | clip.load_real(real)
        arrays |= clip.load_terms(terms or {}) | clip.load_people(people)
        return arrays | ({"prefix": clip.load_prefix(index)} if clip.prefix else {})

    dataset = grain.MapDataset.source(range(len(clips))).seed(seed).shuffle().repeat(EPOCHS)
    # The parts of a batch are its consecutive rows, so that the batch is the same however many processes feed it.
    part, parts = share
    positions = dataset.map_with_index(lambda position, number: (position, number))

    def share_of(rows: Sequence[tuple[int, int]]) -> ClipArrays:
        samples = [(*row, member) for row in rows for member in range(group)]
        return _stack([load(*sample) for sample in samples[part * batch : (part + 1) * batch]])

    mine = positions.batch(batch * parts // group, batch_fn=list).map(share_of)
    return iter(mine.to_iter_dataset(grain.ReadOptions(num_threads=2, prefetch_buffer_size=4)))


def _stack(clips: Sequence[ClipArrays]) -> ClipArrays:
    return {name: np.stack([clip[name] for clip in clips]) for name in clips[0]}
