"""TensorBoard's events of a run: figures and samples."""

import importlib
import io
import socket
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from rfl_jax.files import naming

COPY_EVERY_S = 60  # how often events go to the disk, and from there into a bucket
FPS = 8  # of the samples


def _without_torch(*names: str) -> list[ModuleType]:
    """Modules of tensorboardX, which imports torch where that is installed, to know its tensors: seconds at the beginning of
    every command, for tensors that no one here has.
    """
    known = {"torch": sys.modules["torch"]} if "torch" in sys.modules else {}
    sys.modules["torch"] = None  # pyright: ignore[reportArgumentType]: the documented way to make an import fail
    try:
        return [importlib.import_module(f"tensorboardX.{name}") for name in names]
    finally:
        del sys.modules["torch"]
        sys.modules.update(known)


_events, _summaries, _records = _without_torch("proto.event_pb2", "proto.summary_pb2", "record_writer")
Event, SessionLog, Summary, RecordWriter = _events.Event, _events.SessionLog, _summaries.Summary, _records.RecordWriter


def gif(frames: UInt8[np.ndarray, "t h w 3"]) -> bytes:
    """An animated picture, which is what TensorBoard plays."""
    buffer = io.BytesIO()
    first, *rest = (Image.fromarray(frame) for frame in frames)
    first.save(buffer, format="GIF", save_all=True, append_images=rest, duration=1000 // FPS, loop=0)
    return buffer.getvalue()


class Board:
    """TensorBoard's events, written by the caller's own thread: a full disk is told where it is met.

    Args:
        folder: local.
        first: step from which on an interrupted run's events are forgotten.
    """

    def __init__(self, folder: Path, *, first: int) -> None:
        self._folder = folder
        with naming(folder):
            folder.mkdir(parents=True, exist_ok=True)
            self._file = RecordWriter(str(folder / f"events.out.tfevents.{time.time():.0f}.{socket.gethostname()}"))
            self._write(Event(file_version="brain.Event:2"))
            self._write(Event(step=first, session_log=SessionLog(status=SessionLog.START)))
        self._flushed = time.monotonic()

    def _write(self, event: Any) -> None:
        event.wall_time = time.time()
        self._file.write(event.SerializeToString())

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Adds figures of a step."""
        self._add(step, [Summary.Value(tag=name, simple_value=value) for name, value in values.items()])

    def video(self, step: int, frames: UInt8[np.ndarray, "t h w 3"]) -> None:
        """Adds the sample of a step."""
        height, width = frames.shape[1:3]
        picture = Summary.Image(height=height, width=width, colorspace=3, encoded_image_string=gif(frames))
        self._add(step, [Summary.Value(tag="sample", image=picture)])

    def _add(self, step: int, values: list[Any]) -> None:
        """What is added is on the disk within `COPY_EVERY_S`."""
        with naming(self._folder):
            self._write(Event(step=step, summary=Summary(value=values)))
        if time.monotonic() - self._flushed > COPY_EVERY_S:
            self.flush()

    def flush(self) -> None:
        """Brings all events to the disk."""
        with naming(self._folder):
            self._file.flush()
        self._flushed = time.monotonic()

    def close(self) -> None:
        with naming(self._folder):
            self._file.close()
