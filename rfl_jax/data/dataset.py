"""Prepared samples as batches (Grain): shuffled by seed, sharded by process, resumable."""

from collections.abc import Sequence

import grain
import jax
import numpy as np

from rfl_jax.data.prepare import Prepared, Sample
from rfl_jax.errors import UserError

# Without a number Grain's length is the largest integer, which batches of one overflow.
EPOCHS = 1 << 20


class _Source:
    """Random access to prepared samples; each carries its number."""

    def __init__(self, prepared: Sequence[Prepared], names: Sequence[str]) -> None:
        self._prepared = prepared
        self._names = names

    def __len__(self) -> int:
        return len(self._prepared)

    def __getitem__(self, index: int) -> Sample:
        values = self._prepared[index].load()
        return {"sample": np.array(index, np.int32), **{name: values[name] for name in self._names}}


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
    prepared: Sequence[Prepared], names: Sequence[str], *, batch: int, seed: int
) -> grain.DatasetIterator:
    """An endless iterator over batches of this process's share; its state can be saved.

    Args:
        prepared: all samples.
        names: arrays a sample gives.
        batch: samples a process takes each time.
        seed: of the order, which differs from epoch to epoch.
    """
    dataset = grain.MapDataset.source(_Source(prepared, names)).seed(seed).shuffle().repeat(EPOCHS)
    # A stride through the shuffled whole: every process sees other samples, all of them over the epochs.
    dataset = dataset[jax.process_index() :: jax.process_count()]
    return iter(dataset.batch(batch).to_iter_dataset(grain.ReadOptions(num_threads=2, prefetch_buffer_size=4)))
