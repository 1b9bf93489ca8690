"""Where converted weights come from, written beside them and shown by `python -m convert inspect DIR`."""

import hashlib
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from etils import epath

from convert import store
from rfl_jax.errors import UserError
from rfl_jax.files import files_below

MAPPING_VERSION = 1  # of the key tables and layouts; a new number where the same source gives other arrays
SAMPLE_BYTES, SAMPLE_EVERY = 1 << 16, 1 << 24


def of_sources(
    named: Sequence[str], files: Sequence[str], loras: Sequence[tuple[str, float]], dtype: str | None
) -> dict[str, Any]:
    """What a description records of its sources.

    Args:
        named: as the command line named them.
        files: what that came to.
        loras: adapters that were merged, and their strengths.
        dtype: as asked for; None: as in the source.
    """
    found = [file for name in files for file in files_below(epath.Path(name))]
    return {
        "named": list(named),
        "files": [{"name": f.name, "bytes": f.stat().length, "sha256_sampled": content_hash(f)} for f in found],
        "loras": [{"name": name, "strength": strength} for name, strength in loras],
        "mapping_version": MAPPING_VERSION,
        "dtype": dtype or "as in the source",
    }


def content_hash(file: Path | epath.Path) -> str:
    """SHA-256 of a file's size and of 64 KiB of every 16 MiB, its end included: all of a small file, and a fraction of
    a second for a large one.
    """
    size = epath.Path(file).stat().length
    digest = hashlib.sha256(str(size).encode())
    with epath.Path(file).open("rb") as stream:
        for start in (*range(0, size, SAMPLE_EVERY), max(0, size - SAMPLE_BYTES)):
            stream.seek(start)
            digest.update(stream.read(SAMPLE_BYTES if size > SAMPLE_BYTES * 64 else size))
    return digest.hexdigest()


def show(directory: str) -> None:
    """Prints component, sizes, origin and a table of parameters.

    Raises:
        UserError: no converted weights.
    """
    if not store.is_converted(directory):
        raise UserError(f"{directory}: expected weights written by python -m convert")
    content = store.read_description(directory)
    arrays = store.stored_arrays(directory)
    print(f"component   {content['kind']}")
    print(f"config      {content['cfg']}")
    for name in ("named", "dtype", "mapping_version"):
        if name in content["origin"]:
            print(f"{name:12s}{content['origin'][name]}")
    for entry in content["origin"].get("files", ()):
        print(f"file        {entry['name']}  {entry['bytes']:,} bytes  sha256_sampled {entry['sha256_sampled'][:16]}")
    for entry in content["origin"].get("loras", ()):
        print(f"merged      {entry['name']} at {entry['strength']}")
    for name, (shape, dtype) in sorted(arrays.items()):
        print(f"  {name:44s}{dtype:10s}{'x'.join(map(str, shape))}")
    print(f"{len(arrays)} arrays, {sum(math.prod(shape) for shape, _ in arrays.values()):,} parameters")
