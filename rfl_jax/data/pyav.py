"""The releases of PyAV as one: what they read of a file's tags, and the numbers they give rates, time bases and aspects as."""

import io
from fractions import Fraction
from typing import Any, Protocol, runtime_checkable

import av
from av.container import InputContainer

# Tags that are no UTF-8 make no video unreadable: PyAV 19 takes any bytes, earlier ones where they are told to.
TAGS: dict[str, Any] = {} if int(av.__version__.split(".")[0]) >= 19 else {"metadata_errors": "replace"}


@runtime_checkable
class Ratio(Protocol):
    """A `Fraction` up to PyAV 18, from 19 on an `av.rational.AVRational`, which does not round and may be 0/0."""

    @property
    def numerator(self) -> int: ...

    @property
    def denominator(self) -> int: ...


def open_video(file: io.BufferedIOBase, *, options: dict[str, str] | None = None) -> InputContainer:
    """A container to read, whatever bytes its tags are of.

    Args:
        file: open for reading.
        options: of libav, for its format.

    Raises:
        av.FFmpegError: libav cannot read it.
    """
    return av.open(file, "r", options=options, **TAGS)


def fraction(ratio: Ratio | None, *, unknown: Fraction) -> Fraction:
    """A rate, time base or aspect as a Fraction; `unknown` where the file does not tell it (None, 0/1, n/0)."""
    return Fraction(ratio.numerator, ratio.denominator) if ratio else unknown
