"""Eight virtual devices and one cache of compiled programs for all tests; must run before jax is imported."""

import os
from pathlib import Path

import pytest
from jaxtyping import install_import_hook

from tests import COMPILER

os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + f" {COMPILER} --xla_force_host_platform_device_count=8"
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# What is remembered of files, not in the home of who runs the tests.
os.environ.setdefault("RFL_JAX_CACHE", str(Path(__file__).parents[1] / ".pytest_cache" / "rfl_jax"))
# Many tests compile the same step; the second one reads it.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path(__file__).parents[1] / ".pytest_cache" / "jax"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")

# A broadcast that adds axes is written out, and annotated shapes are checked at every call.
os.environ.setdefault("JAX_NUMPY_RANK_PROMOTION", "raise")

install_import_hook(["rfl_jax", "convert"], "beartype.beartype")

import jax  # noqa: E402

pytest_plugins = ["tests.documentation", "tests.runs"]


@pytest.fixture(autouse=True, scope="module")
def _forget_programs():
    """A worker would keep the compiled programs of all its tests, gigabytes of them."""
    yield
    jax.clear_caches()


# A minute and more each.
LONG = ("test_buckets.py", "test_hosts.py", "test_plan.py")


def pytest_collection_modifyitems(items):
    """Every worker is given an equal share of the list, in its order: each begins with another of the longest, so that none
    is left over when everything else is done.
    """
    rest = [item for item in items if item.path.name not in LONG]
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    shares = min(workers, len(LONG))
    for share in range(shares):
        at = share * len(items) // workers
        rest[at:at] = [item for item in items if item.path.name in LONG[share::shares]]
    items[:] = rest
