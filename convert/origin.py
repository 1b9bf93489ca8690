"""Where converted weights come from, written beside them and shown by `python -m convert inspect DIR`."""

import math
from collections.abc import Sequence
from typing import Any

from etils import epath

from convert import store
from rfl_jax.errors import UserError
from rfl_jax.fingerprint import content_of, files_of, fingerprint

MAPPING_VERSION = 1  # of the key tables and layouts; a new number where the same source gives other arrays


def of_sources(
    named: Sequence[str],
    files: Sequence[str],
    dtype: str | None,
    *,
    loras: Sequence[tuple[str, str, float]] = (),
    expert: str = "",
    licence: str = "",
) -> dict[str, Any]:
    """What a description records of its sources.

    Args:
        named: as the command line named them.
        files: what that came to.
        dtype: as asked for; None: as in the source.
        loras: adapters that were merged: as the command line named them, the file, and the strength.
        expert: whose adapters were asked for; empty for those that a file has.
        licence: of a face network's weights, in a line; empty for others.
    """
    found = [file for name in files for file in files_of(epath.Path(name))]
    return {
        "named": list(named),
        "files": [{"name": f.name, "bytes": f.stat().length, "content": content_of(f)} for f in found],
        "loras": [{"name": name, "strength": strength, "content": fingerprint(file)} for name, file, strength in loras],
        "expert": expert,
        "licence": licence,
        "mapping_version": MAPPING_VERSION,
        "dtype": dtype or "as in the source",
    }


def show(directory: str) -> str:
    """Prints component, sizes, origin and a table of parameters.

    Returns:
        the component.

    Raises:
        UserError: no converted weights.
    """
    if not store.is_converted(directory):
        raise UserError(f"{directory}: expected weights written by python -m convert")
    content = store.read_description(directory)
    arrays = store.stored_arrays(directory)
    print(f"component   {content['kind']}")
    print(f"config      {content['cfg']}")
    for name in ("named", "dtype", "expert", "licence", "mapping_version"):
        if content["origin"].get(name):
            print(f"{name:12s}{content['origin'][name]}")
    for entry in content["origin"].get("files", ()):
        # Earlier releases noted a hash of samples, which says nothing of the whole, and none of adapters.
        held = entry.get("content", "content unknown")
        print(f"file        {entry['name']}  {entry['bytes']:,} bytes  {held}")
    for entry in content["origin"].get("loras", ()):
        print(f"merged      {entry['name']} at {entry['strength']}  {entry.get('content', 'content unknown')}")
    for name, (shape, dtype) in sorted(arrays.items()):
        print(f"  {name:44s}{dtype:10s}{'x'.join(map(str, shape))}")
    print(f"{len(arrays)} arrays, {sum(math.prod(shape) for shape, _ in arrays.values()):,} parameters")
    return content["kind"]
