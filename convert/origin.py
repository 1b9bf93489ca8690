"""Where converted weights come from, written beside them and shown by `python -m convert inspect DIR`."""

import math
from collections.abc import Sequence
from typing import Any

from etils import epath

from convert import store
from rfl_jax.errors import UserError
from rfl_jax.fingerprint import content_of, files_of

MAPPING_VERSION = 1  # of the key tables and layouts; a new number where the same source gives other arrays


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
    found = [file for name in files for file in files_of(epath.Path(name))]
    return {
        "named": list(named),
        "files": [{"name": f.name, "bytes": f.stat().length, "content": content_of(f)} for f in found],
        "loras": [{"name": name, "strength": strength} for name, strength in loras],
        "mapping_version": MAPPING_VERSION,
        "dtype": dtype or "as in the source",
    }


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
        # Earlier releases noted a hash of samples, which says nothing of the whole.
        held = entry.get("content", "content unknown")
        print(f"file        {entry['name']}  {entry['bytes']:,} bytes  {held}")
    for entry in content["origin"].get("loras", ()):
        print(f"merged      {entry['name']} at {entry['strength']}")
    for name, (shape, dtype) in sorted(arrays.items()):
        print(f"  {name:44s}{dtype:10s}{'x'.join(map(str, shape))}")
    print(f"{len(arrays)} arrays, {sum(math.prod(shape) for shape, _ in arrays.values()):,} parameters")
