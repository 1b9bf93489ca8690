"""Files in local folders and in buckets (`gs://`), written whole or not at all."""

import contextlib
import json
import os
import secrets
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import TypeVar

import fsspec
import orbax.checkpoint as ocp
from etils import epath

from rfl_jax.errors import UserError, first_line

Json = TypeVar("Json")

# Endings of the files that PyTorch pickles.
PICKLES = (".pth", ".pt", ".ckpt", ".bin")

for protocol in ("gs", "gcs"):
    fsspec.register_implementation(
        protocol, "rfl_jax.buckets.Bucket", clobber=True, errtxt='gs:// needs pip install "etils[epath-gcs]"'
    )


def user_cache() -> Path:
    """The user's folder of what is fetched and computed once: RFL_JAX_CACHE, or rfl_jax in ~/.cache."""
    return Path(os.environ.get("RFL_JAX_CACHE") or Path.home() / ".cache" / "rfl_jax")


def is_remote(path: Path | epath.Path) -> bool:
    """Whether it lies in a bucket."""
    return "://" in str(path)


def stays_below(name: str) -> bool:
    """Whether a path that a file or a server names stays in the folder that it is relative to."""
    path = PurePosixPath(name.replace("\\", "/"))
    return bool(path.parts) and not path.is_absolute() and ".." not in path.parts


def files_below(path: epath.Path) -> list[epath.Path]:
    """All files of a folder in a fixed order; a file alone is its own only one."""
    if not path.is_dir():
        return [path]
    return [file for child in sorted(path.iterdir()) for file in files_below(child)]


def parse_json(text: str | bytes, what: str, kind: type[Json] = dict) -> Json:
    """The value of a JSON text, which is an object by default.

    Args:
        text: to be read.
        what: begins the message: the file, or the place in it.
        kind: of the value, `dict` or `list`.

    Raises:
        UserError: it is no JSON, or of another kind.
    """
    expected = f"{what}: expected a JSON {'list' if kind is list else 'object'}"
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:  # RecursionError: nested deeper than the parser goes
        raise UserError(f"{expected} ({first_line(error)})") from None
    if not isinstance(value, kind):
        raise UserError(f"{expected}, found {type(value).__name__}")
    return value


def read_json(file: Path | epath.Path, kind: type[Json] = dict) -> Json:
    """The value of a JSON file; raises as `parse_json` does, or OSError."""
    return parse_json(file.read_bytes(), str(file), kind)


def absolute(path: str | epath.Path) -> epath.Path:
    """The path as Orbax wants it."""
    return epath.Path(path) if is_remote(epath.Path(path)) else epath.Path(path).resolve()


def array_handler() -> ocp.PyTreeCheckpointHandler:
    """How Orbax stores trees of arrays here: a folder each. Arrays are stacked, so there are few; the one-database form
    is for many, and several threads at its manifest fail in a bucket that does not order their writes.
    """
    return ocp.PyTreeCheckpointHandler(use_ocdbt=False)


def aside(path: Path | epath.Path) -> Path | epath.Path:
    """Where a file is written before it is whole: hidden, of no known ending, and of no other process."""
    return path.with_name(f".{path.name[:40]}.{os.getpid()}-{secrets.token_hex(4)}.tmp")


def write_whole(path: Path | epath.Path, content: bytes | str) -> None:
    """Replaces a file by new content. Locally it is written aside and renamed; an object of a bucket appears when its
    upload is complete.

    Raises:
        OSError: it cannot be written; names `path`.
    """
    data = content.encode() if isinstance(content, str) else content
    if is_remote(path):
        path.write_bytes(data)
        return
    unfinished = aside(path)
    with naming(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            unfinished.write_bytes(data)
            unfinished.replace(path)
        except BaseException:
            with contextlib.suppress(OSError):
                unfinished.unlink()
            raise


@contextlib.contextmanager
def naming(path: Path | epath.Path) -> Iterator[None]:
    """Has an OSError name a file: that of a full disk names none, and one written aside would be named by that name."""
    try:
        yield
    except OSError as error:
        error.filename, error.filename2 = str(path), None
        raise
