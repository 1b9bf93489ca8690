"""Writing arrays that are larger than memory: Orbax names, renames and describes them, their pieces pass by one at a time."""

import asyncio
from collections.abc import Callable
from typing import Any

import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts

from convert.mapping import LazyArray

PIECES = 2  # read ahead while others are being written
CHUNK_BYTES = 32 << 20  # of a file at most: what a device's share of a layer is cut from


class _StreamingHandler(ocp.type_handlers.NumpyHandler):
    """Writes a `LazyArray` as the array that it stands for."""

    def __init__(self, progress: Callable[[int], Any]) -> None:
        super().__init__(deepcopy_host_arrays=False)
        self._progress = progress
        self._turn = asyncio.Semaphore(1)

    async def _open_and_write(self, value: Any, tspec: dict[str, Any], ts_context: ts.Context) -> None:
        lazy = isinstance(value, LazyArray)
        if lazy:
            tspec = {**tspec, "metadata": {**tspec["metadata"], "chunks": _chunks(value)}}
        target = await ts.open(ts.Spec(tspec), create=True, open=True, context=ts_context)
        if not lazy:
            await target.write(value, can_reference_source_data_indefinitely=True)
            self._progress(value.nbytes)
            return
        # One array after the other: each holds its pieces in memory while they are written.
        async with self._turn:
            waiting: list[tuple[int, Any]] = []
            for index in value.pieces():
                piece = await asyncio.to_thread(value.__getitem__, index)
                waiting.append((piece.nbytes, target[index].write(piece, can_reference_source_data_indefinitely=True)))
                if len(waiting) >= PIECES:
                    await self._finish(waiting.pop(0))
            for written in waiting:
                await self._finish(written)

    async def _finish(self, written: tuple[int, Any]) -> None:
        await written[1]
        self._progress(written[0])


def _chunks(array: LazyArray) -> list[int]:
    """One layer a chunk at most, cut along the first axis after it."""
    chunks = [1, *array.shape[1:]] if array.stacked else list(array.shape)
    axis = 1 if array.stacked and array.ndim > 1 else 0
    while np.prod(chunks) * array.dtype.itemsize > CHUNK_BYTES and chunks[axis] % 2 == 0:
        chunks[axis] //= 2
    return chunks


def streaming_handler(progress: Callable[[int], Any]) -> ocp.PyTreeCheckpointHandler:
    """A handler of trees of lazy and of ordinary arrays, a folder each, uncompressed: weights do not compress.

    Args:
        progress: is told of bytes that were written.
    """
    handler = _StreamingHandler(progress)
    registry = ocp.type_handlers.create_type_handler_registry((LazyArray, handler), (np.ndarray, handler))
    return ocp.PyTreeCheckpointHandler(use_ocdbt=False, use_compression=False, type_handler_registry=registry)
