"""Compiled programs are read by the next process, half-written ones are thrown away, and a folder of no use stops nobody."""

import os
import subprocess
import sys

import pytest

SCRIPT = """
import jax, jax.numpy as jnp
from rfl_jax.programs import keep_compiled_programs, not_kept
keep_compiled_programs()
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
def before(x): return jnp.sin(x) @ x
def within(x): return jnp.cos(x) @ x
def after(x): return jnp.tan(x) @ x
x = jnp.ones((8, 8))
jax.block_until_ready(jax.jit(before)(x))
with not_kept():
    jax.block_until_ready(jax.jit(within)(x))
jax.block_until_ready(jax.jit(after)(x))
"""


@pytest.fixture
def run(tmp_path):
    def start(**changes):
        environment = {k: v for k, v in os.environ.items() if not k.startswith("JAX_COMPILATION_CACHE")}
        environment |= {"RFL_JAX_CACHE": str(tmp_path / "cache"), **changes}
        done = subprocess.run(
            [sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        folder = tmp_path / "cache" / "compiled"
        return done.stderr, {file.name: file.stat().st_mtime_ns for file in folder.glob("*-cache")}

    return start


def test_programs_are_kept_and_half_of_one_is_not(run, tmp_path):
    _, first = run()
    # What was not to be kept is not, what came after it is.
    assert {name.partition("-")[0] for name in first} >= {"jit_before", "jit_after"}
    assert not any(name.startswith("jit_within") for name in first)
    cut = next((tmp_path / "cache" / "compiled").glob("*-cache"))
    # A process that ended while it wrote left no time of use.
    cut.with_name(cut.name.removesuffix("-cache") + "-atime").unlink()
    cut.write_bytes(b"half")
    said, second = run()
    assert not said
    assert second.keys() == first.keys()
    assert {name for name in first if second[name] != first[name]} == {cut.name}


def test_it_may_be_switched_off_or_impossible(run, tmp_path):
    assert run(JAX_COMPILATION_CACHE_DIR="") == ("", {})
    (tmp_path / "cache").write_text("")
    assert "compiled programs are not kept" in run()[0]
