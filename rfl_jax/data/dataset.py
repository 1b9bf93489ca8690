"""Prepared samples as batches (Grain): shuffled by seed, sharded by process, resumable."""

from collections.abc import Sequence

import grain
import numpy as np

from rfl_jax.data.prepare import Prepared, Sample
from rfl_jax.errors import UserError

# Without a number Grain's length is the largest integer, which batches of one overflow.
EPOCHS = 1 << 20


def check_shapes(prepared: Sequence[Prepared], batch: int) -> None:
    """Refuses clips of different sizes where samples are batched.

    Raises:
        UserError: naming the first row whose size differs.
    """
    if batch == 1:
        return
    shapes = [(p.row.number, p.load()["y"].shape) for p in prepared]
    for number, shape in shapes:
        if shape != shapes[0][1]:
            raise UserError(
                f"row {number}: latents of {shape[:3]} and of {shapes[0][1][:3]} (row {shapes[0][0]}) cannot share a "
                "batch, expected one size: set data.height, data.width and data.num_frames, or batches of 1"
            )


def make_iterator(
    prepared: Sequence[Prepared],
    names: Sequence[str],
    *,
    batch: int,
    seed: int,
    noises: int,
    share: tuple[int, int] = (0, 1),
) -> grain.DatasetIterator:
    """An endless iterator over batches of this process's share; its state can be saved.

    Args:
        prepared: all samples.
        names: arrays a sample gives; besides, "sample" is its number and "noise_index" which of its noises it starts
            from: the next one every epoch.
        batch: samples a process takes each time.
        seed: of the order, which differs from epoch to epoch.
        noises: a sample's noises, after which the first comes again; 0: never.
        share: number of this process's part of every batch, and the number of parts.
    """

    def load(position: int, number: int) -> Sample:
        epoch = position // len(prepared)
        index = epoch % noises if noises else epoch
        item = prepared[number]
        values = item.load()
        sample = {"sample": np.array(number, np.int32), "noise_index": np.array(index, np.int32)}
        sample |= {name: values[name] for name in names}
        return sample | ({"prefix": item.load_prefix(index)} if item.prefix else {})

    dataset = grain.MapDataset.source(range(len(prepared))).seed(seed).shuffle().repeat(EPOCHS)
    # The parts of a batch are its consecutive rows, so that the batch is the same however many processes feed it.
    part, parts = share
    positions = dataset.map_with_index(lambda position, number: (position, number)).batch(batch * parts, batch_fn=list)
    mine = positions.map(lambda rows: _stack([load(*row) for row in rows[part * batch : (part + 1) * batch]]))
    return iter(mine.to_iter_dataset(grain.ReadOptions(num_threads=2, prefetch_buffer_size=4)))


def _stack(samples: Sequence[Sample]) -> Sample:
    return {name: np.stack([sample[name] for sample in samples]) for name in samples[0]}
