"""Compiled programs are kept for the next command: JAX's persistent compilation cache, on by default."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import filelock
import jax
from jax.experimental.compilation_cache import compilation_cache

from rfl_jax.errors import first_line
from rfl_jax.files import user_cache

FOLDER_SETTING = "JAX_COMPILATION_CACHE_DIR"  # JAX's own
MAX_BYTES = 4 * 2**30  # what was used longest ago goes first
# A program that compiles in less is not worth a file.
MIN_SECONDS = 0.2


def keep_compiled_programs() -> None:
    """Makes JAX read the programs that an earlier command compiled, and write those that this one compiles.

    They lie in `compiled/` of the user's cache. With JAX_COMPILATION_CACHE_DIR set everything is left as that says; an
    empty value switches the cache off. Where the folder cannot be used, one line says so and programs are compiled anew.
    """
    if FOLDER_SETTING in os.environ:
        return
    folder = user_cache() / "compiled"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # JAX's own lock, by which several processes share the folder.
        with filelock.FileLock(folder / ".lockfile", timeout=10):
            # JAX writes a program, then the time of its use: one without was cut short, and would never be written again.
            for program in folder.glob("*-cache"):
                if not program.with_name(program.name.removesuffix("-cache") + "-atime").exists():
                    program.unlink()
    except (OSError, filelock.Timeout) as error:
        print(f"{folder}: compiled programs are not kept ({first_line(error)})", file=sys.stderr)
        return
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_compilation_cache_max_size", MAX_BYTES)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", MIN_SECONDS)


@contextmanager
def not_kept() -> Iterator[None]:
    """Programs compiled under it are neither read nor written: those for devices that are not there could not be read back."""
    before = jax.config.values["jax_enable_compilation_cache"]
    # JAX asks for the setting once, and after a reset again.
    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()
    try:
        yield
    finally:
        jax.config.update("jax_enable_compilation_cache", before)
        compilation_cache.reset_cache()
