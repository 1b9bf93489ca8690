"""What a file or a folder holds, as a text that differs wherever the content does."""

import contextlib
import hashlib
import json
import os
import re
import tempfile
import time
from pathlib import Path
from typing import Any

from etils import epath
from fsspec.core import url_to_fs
from tqdm import tqdm

from rfl_jax.errors import UserError, first_line
from rfl_jax.files import PICKLES, files_below, is_remote, stays_below, user_cache

WEIGHTS = (".safetensors", ".index.json", *PICKLES)
BLOCK = 1 << 22
# A file that takes longer than about a second shows how far it is.
SHOWN_FROM = 1 << 30
# File systems keep times in steps of up to two seconds: a file that changed since may change again unseen.
SETTLED_NS = 2_000_000_000
# How the hub's cache names large files: by their SHA-256.
HUB_BLOB = re.compile(r"/models--[^/]+/blobs/([0-9a-f]{64})$")


def fingerprint(path: str | Path | epath.Path) -> str:
    """Identifies the content of a source of weights, or of any file: equal for equal content, wherever it lies.

    Returns:
        Where `files_of` finds one file, its `content_of`; else `sha256:` and the SHA-256 of all their names and contents.

    Raises:
        UserError: there is no such file or folder, or it cannot be read.
    """
    root = epath.Path(path)
    if is_remote(root) and root.is_dir():
        contents = _of_bucket_folder(root)
    else:
        files = files_of(root)
        if files == [root]:
            return content_of(root)
        folder = str(root if root.is_dir() else root.parent)
        contents = {str(file).removeprefix(folder): content_of(file) for file in files}
    lines = [f"{name} {content}\n" for name, content in contents.items()]
    return f"sha256:{hashlib.sha256(''.join(lines).encode()).hexdigest()}"


def files_of(root: epath.Path) -> list[epath.Path]:
    """All files that a source is read from: those of a folder, an index and its shards, or a file; and what lies beside
    it by the name that belongs there, which is the config.json with the sizes of weights, the adapter_config.json with the
    scale of adapters, or the data of an ONNX graph.
    """
    if root.is_dir():
        return files_below(root)
    files = [root]
    if root.name.endswith(".index.json"):
        # What is wrong with an index is its reader's to say.
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
            names = sorted(set(json.loads(root.read_text())["weight_map"].values()))
            files += [root.parent / name for name in names if stays_below(name)]
    beside = ["adapter_config.json", "config.json"] if root.name.endswith(WEIGHTS) else []
    if root.name.endswith(".onnx"):
        beside = [f"{root.name}.data", f"{root.name}_data"]
    return files + [root.parent / name for name in beside if (root.parent / name).exists()]


def content_of(file: epath.Path) -> str:
    """Identifies the content of one file.

    Returns:
        `sha256:` and the SHA-256 of all of it, which is computed once and remembered until the file changes; large files
        of the hub's cache have it in their names. In a bucket `md5:` and what the bucket says, or the file's address and
        generation where it says none.

    Raises:
        UserError: there is no such file, or it cannot be read.
    """
    try:
        if is_remote(file):
            return version_in_bucket(file) or f"sha256:{_sha256(file, file.stat().length)}"
        return f"sha256:{_sha256_of(Path(os.path.realpath(file)))}"
    except (OSError, RuntimeError) as error:
        raise UserError(f"{file}: cannot be read ({getattr(error, 'strerror', None) or first_line(error)})") from None


def version_in_bucket(file: epath.Path) -> str | None:
    """What a bucket knows of a file's content; None where it tells nothing."""
    try:
        system, name = url_to_fs(str(file), use_listings_cache=False)
    except (ImportError, ValueError):  # one that only TensorFlow can open here
        return None
    return _version(file, system.info(name))


def _of_bucket_folder(folder: epath.Path) -> dict[str, str]:
    """Names and contents of all its files, by one listing where the bucket can be listed: there may be a thousand."""
    try:
        system, name = url_to_fs(str(folder), use_listings_cache=False)
        listed = system.find(name, detail=True)
    except (ImportError, ValueError):  # as above
        return {str(file).removeprefix(str(folder)): content_of(file) for file in files_below(folder)}
    except (OSError, RuntimeError) as error:
        raise UserError(f"{folder}: cannot be read ({first_line(error)})") from None
    names = {key.removeprefix(name): info for key, info in sorted(listed.items())}
    files = {below: folder / below.lstrip("/") for below in names}
    return {below: _version(files[below], info) or content_of(files[below]) for below, info in names.items()}


def _version(file: epath.Path, info: dict[str, Any]) -> str | None:
    if info.get("md5Hash"):
        return f"md5:{info['md5Hash']}"
    version = info.get("generation") or info.get("ETag") or info.get("etag")
    return f"{file}#{version}" if version else None


def _sha256_of(file: Path) -> str:
    """The SHA-256 of a local file, computed only if the file is not as it was when this was last asked."""
    note = user_cache() / "hashes" / f"{hashlib.sha256(os.fsencode(file)).hexdigest()[:32]}.json"
    state, known = _state(file), _read(note)
    if known and known["state"] == state:
        return known["sha256"]
    settled = time.time_ns() - state[2] > SETTLED_NS
    named = HUB_BLOB.search(file.as_posix())
    # What the hub's cache calls a file is believed until the file changes.
    digest = named[1] if named and not known else _sha256(file, state[0])
    if settled and _state(file) == state:
        # Without a cache to write to it is computed again.
        with contextlib.suppress(OSError):
            _write(note, json.dumps({"file": str(file), "state": state, "sha256": digest}))
    return digest


def _read(note: Path) -> dict[str, Any] | None:
    """What was noted of a file; None where nothing was, or nothing that can be read."""
    with contextlib.suppress(OSError, ValueError, TypeError):
        known = json.loads(note.read_text())
        return known if {"state", "sha256"} <= set(known) else None
    return None


def _state(file: Path) -> list[int]:
    """Size, times of change in ns, and inode: the second time cannot be set back by who copies a file."""
    stat = file.stat()
    return [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino]


def _sha256(file: Path | epath.Path, size: int) -> str:
    digest = hashlib.sha256()
    hidden = None if size > SHOWN_FROM else True
    bar = tqdm(total=size, unit="B", unit_scale=True, desc=f"hash {file.name}", disable=hidden)
    with bar, file.open("rb") as stream:
        while block := stream.read(BLOCK):
            digest.update(block)
            bar.update(len(block))
    return digest.hexdigest()


def _write(note: Path, text: str) -> None:
    """Each writer aside under a name of its own: several processes may meet here."""
    note.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=note.parent, prefix=".", delete=False) as aside:
        aside.write(text)
    Path(aside.name).replace(note)
