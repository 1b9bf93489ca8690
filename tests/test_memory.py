"""What is freed is kept: the kernel clears the pages of large arrays once."""

import ctypes
import os
import subprocess
import sys

import pytest

PROGRAM = """
import resource, sys
import numpy as np
from rfl_jax.memory import keep_freed_memory

keep_freed_memory()
faults = []
for _ in range(4):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    np.ones(1 << 22)  # 32 MiB
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(*faults)
"""


def faults(**environment):
    """Pages that were cleared for each of four arrays in turn."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith("MALLOC_")}
    # Large pages are cleared at once and would hide the difference.
    kept["NUMPY_MADVISE_HUGEPAGE"] = "0"
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], env=kept | environment, capture_output=True, text=True, check=True
    )
    return [int(x) for x in done.stdout.split()]


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="needs glibc")
def test_a_large_array_takes_the_place_of_the_last_one():
    kept, users = faults(JAX_PLATFORMS="cpu"), faults(JAX_PLATFORMS="cpu", MALLOC_ARENA_MAX="4")
    assert max(kept[1:]) < 100
    # Who sets these variables gets what they say.
    assert min(users) > 10 * max(1, *kept[1:])
