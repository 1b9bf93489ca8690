"""Writing arrays that are larger than memory: Orbax names, renames and describes them, their pieces pass by one at a time."""

import asyncio
import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts
from absl import logging

from convert.mapping import LazyArray
from convert.readers import Index

PIECES = 3  # in memory at once
CHUNK_BYTES = 32 << 20  # of a file at most: what a device's share of a layer is cut from


class _StreamingHandler(ocp.type_handlers.NumpyHandler):
    """Writes a `LazyArray` as the array that it stands for."""

    def __init__(self, progress: Callable[[int], Any]) -> None:
        super().__init__(deepcopy_host_arrays=False)
        self._progress = progress
        self._turn = asyncio.Semaphore(1)
        self._failure: Exception | None = None

    async def _background_serialize(self, *args: Any, **options: Any) -> None:
        await super()._background_serialize(*args, **options)
        if self._failure:
            raise self._failure

    async def _open_and_write(self, value: Any, tspec: dict[str, Any], ts_context: ts.Context) -> None:
        try:
            if self._failure is None:
                await self._write(value, tspec, ts_context)
        except Exception as error:  # a refused source, or whatever the disk raises
            # Raised when all arrays have ended: what is left behind would complain piece by piece.
            self._failure = self._failure or error

    async def _write(self, value: Any, tspec: dict[str, Any], ts_context: ts.Context) -> None:
        lazy = isinstance(value, LazyArray)
        if lazy:
            tspec = {**tspec, "metadata": {**tspec["metadata"], "chunks": _chunks(value)}}
        target = await ts.open(ts.Spec(tspec), create=True, open=True, context=ts_context)
        if not lazy:
            await target.write(value, can_reference_source_data_indefinitely=True)
            self._progress(value.nbytes)
            return
        # One array after the other: some of its pieces are in memory, being read, turned or written.
        async with self._turn, asyncio.TaskGroup() as pieces:
            slots = asyncio.Semaphore(PIECES)
            for index in value.pieces():
                await slots.acquire()
                pieces.create_task(self._pass_on(value, index, target, slots))

    async def _pass_on(self, array: LazyArray, index: Index, target: ts.TensorStore, slots: asyncio.Semaphore) -> None:
        try:
            if self._failure is None:
                piece = await asyncio.to_thread(array.__getitem__, index)
                await target[index].write(piece, can_reference_source_data_indefinitely=True)
                self._progress(piece.nbytes)
        except Exception as error:
            self._failure = self._failure or error
        finally:
            slots.release()


@contextlib.contextmanager
def failures_once() -> Iterator[None]:
    """Keeps Orbax's threads from telling of a failure that is raised again where they are waited for."""

    def say_nothing(_: threading.ExceptHookArgs) -> None:
        pass

    before, threading.excepthook = threading.excepthook, say_nothing
    verbosity = logging.get_verbosity()
    logging.set_verbosity(logging.FATAL)
    try:
        yield
    finally:
        # An interruption puts its own hook there, for threads that outlive this.
        if threading.excepthook is say_nothing:
            threading.excepthook = before
        logging.set_verbosity(verbosity)


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
