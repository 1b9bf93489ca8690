"""Memory that a process has freed: on a CPU it is kept for the next operator."""

import ctypes
import os
from pathlib import Path

from rfl_jax.chips import has_tpu_device

# Parameters of glibc's mallopt (malloc.h) and what they are set to.
_SETTINGS = {
    "M_ARENA_MAX": (-8, 1),  # one heap, that all threads share what is kept
    "M_MMAP_MAX": (-4, 0),  # large arrays come from it as well, not from the kernel
    "M_TRIM_THRESHOLD": (-1, -1),  # it is never made smaller
    "M_TOP_PAD": (-2, 1 << 28),  # bytes by which it grows beyond what is asked for
}


def keep_freed_memory() -> None:
    """Makes glibc keep what is freed where the machine has no accelerator.

    XLA's programs for CPUs ask for their large temporaries anew in every run, some of them in every turn of a loop. By default
    each of these is mapped by the kernel, cleared page by page and handed back: a quarter of the miniature's step. Where weights
    and batches only pass through on their way to an accelerator, nothing is changed, nor where the user has set MALLOC_*
    variables or there is no glibc. The most that a process uses stays about what it was; it keeps that to its end.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None or _has_accelerator() or any(name.startswith("MALLOC_") for name in os.environ):
        return
    for parameter, value in _SETTINGS.values():
        mallopt(parameter, value)


def _has_accelerator() -> bool:
    """Whether there is a device file of a TPU or of an NVIDIA GPU, unless JAX is told to use the CPU."""
    if os.environ.get("JAX_PLATFORMS") == "cpu":
        return False
    return has_tpu_device() or any(Path("/dev").glob("nvidia[0-9]*"))
