"""Weights brought to this machine: from the Hugging Face hub, and from buckets that keep whole checkpoints."""

import contextlib
import fcntl
import fnmatch
import functools
import glob
import hashlib
import json
from pathlib import Path, PurePosixPath

from etils import epath
from huggingface_hub import (
    HfApi,
    ResolvedRevision,
    get_cached_repo_tree,
    is_offline_mode,
    snapshot_download,
    try_to_load_from_cache,
)
from huggingface_hub.errors import CachedRepoTreeNotFoundError, LocalEntryNotFoundError
from huggingface_hub.utils import logging
from tqdm import tqdm

from rfl_jax.errors import UserError, first_line, is_full
from rfl_jax.files import PICKLES, is_remote, naming, stays_below, user_cache
from rfl_jax.fingerprint import version_in_bucket

# The library prints its warnings; the root logger, which absl has a handler at, would print them again.
logging.disable_propagation()


def fetch(source: str) -> list[str]:
    """Local files of a source: the source itself; `hub:org/name[@revision][:pattern]` and checkpoints in buckets are
    fetched once into the user's cache. From the hub a broken download goes on, from a bucket it begins anew.

    Args:
        source: path, `gs://` path, or hub reference. A revision is a branch, a tag or a commit; a pattern is of file
            names with folders, and without one all weights at the top of the repository are meant. HF_ENDPOINT names
            another hub; with HF_HUB_OFFLINE=1, or where the hub does not answer, its cache has to hold them.

    Raises:
        UserError: it names nothing, or cannot be fetched.
    """
    if source.startswith("hub:"):
        return _from_hub(source.removeprefix("hub:"))
    if is_remote(epath.Path(source)) and source.endswith((".safetensors", ".index.json", *PICKLES)):
        return _from_bucket(epath.Path(source))
    return [source]


def _from_hub(item: str) -> list[str]:
    named, _, pattern = item.partition(":")
    repository, at, revision = named.partition("@")
    if repository.count("/") != 1 or bool(at) != bool(revision):
        raise UserError(f"{item}: expected org/name:pattern, or org/name@revision:pattern")
    try:
        commit = _commit(repository, revision or None)
        listed = _listed(repository, commit)
        files = [f for f in listed if fnmatch.fnmatch(f, pattern)] if pattern else [f for f in listed if _is_weight(f)]
        if not files:
            raise UserError(f"{named}: no file matches {pattern or '*.safetensors'}")
        # What a network's sizes are read from lies beside its weights.
        beside = {str(PurePosixPath(f).with_name("config.json")) for f in files} & set(listed)
        _download(repository, commit, sorted({*files, *beside}))
        found = [str(_cached(repository, commit, f)) for f in sorted(files)]
    except UserError:
        raise
    except Exception as error:  # the hub's library raises its own errors, its transport's and the system's
        if is_full(error):
            raise
        raise UserError(f"{item}: cannot be fetched from the hub ({first_line(error)})") from None
    indexes = [f for f in found if f.endswith(".safetensors.index.json")]
    return indexes if len(indexes) == 1 else [f for f in found if not f.endswith("config.json")]


@functools.cache
def _commit(repository: str, revision: str | None) -> ResolvedRevision:
    """The commit that a branch or tag is at now. Where the hub cannot be asked the one it was last fetched at, and the
    hub's library says so in a line.
    """
    return HfApi().resolve_revision(repository, revision=revision)


def _listed(repository: str, commit: ResolvedRevision) -> list[str]:
    """Names of a commit's files; of those in the cache where neither the hub nor its cache lists them."""
    try:
        return [file.path for file in get_cached_repo_tree(repository, revision=commit)]
    except CachedRepoTreeNotFoundError:
        pass
    try:
        return HfApi().list_repo_files(repository, revision=commit.resolved)
    except Exception:  # as above
        with contextlib.suppress(LocalEntryNotFoundError):
            folder = Path(snapshot_download(repository, revision=commit, local_files_only=True))
            return [file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file()]
        raise


def _download(repository: str, commit: ResolvedRevision, files: list[str]) -> None:
    missing = [file for file in files if _cached(repository, commit, file) is None]
    if missing and is_offline_mode():
        raise UserError(f"{repository}: HF_HUB_OFFLINE is set, and the hub's cache has no {missing[0]}")
    if missing:
        # A name is a pattern of itself alone.
        snapshot_download(repository, revision=commit, allow_patterns=[glob.escape(file) for file in files])


def _cached(repository: str, commit: ResolvedRevision, file: str) -> str | None:
    found = try_to_load_from_cache(repository, file, revision=commit.resolved)
    return found if isinstance(found, str) else None


def _is_weight(name: str) -> bool:
    return "/" not in name and name.endswith((".safetensors", ".safetensors.index.json"))


def _from_bucket(source: epath.Path) -> list[str]:
    """A copy in the user's cache; with an index its shards as well."""
    base = user_cache() / "buckets" / hashlib.sha256(str(source.parent).encode()).hexdigest()[:16]
    try:
        names = [source.name]
        if source.name.endswith(".index.json"):
            names += sorted(set(json.loads(source.read_text())["weight_map"].values()))
        for name in names:
            if not stays_below(name):
                raise UserError(f"{source}: shard {name} lies outside the folder of the index")
        if (source.parent / "config.json").exists():
            names.append("config.json")
        for name in names:
            _copy_once(source.parent / name, base / name)
    except (OSError, ValueError, KeyError, AttributeError, TypeError, RuntimeError, RecursionError) as error:
        if is_full(error):
            raise
        raise UserError(f"{source}: cannot be fetched ({first_line(error)})") from None
    return [str(base / source.name)]


def _copy_once(file: epath.Path, target: Path) -> None:
    """Copies a file that is not there yet as the bucket has it now; beside it is noted which version that is."""
    target.parent.mkdir(parents=True, exist_ok=True)
    note = target.with_name(f".{target.name}.version")
    with target.with_name(f".{target.name}.lock").open("w") as lock:
        # Of several processes of a run one copies, and the others find it done.
        fcntl.flock(lock, fcntl.LOCK_EX)
        version = _version(file)
        if target.exists() and note.exists() and note.read_text() == version:
            return
        note.unlink(missing_ok=True)
        _copy(file, target)
        if _version(file) != version:
            raise UserError(f"{file}: changed while it was copied, expected a file that nobody is writing")
        note.write_text(version)


def _copy(file: epath.Path, target: Path) -> None:
    aside = target.with_name(f".{target.name}.tmp")
    bar = tqdm(total=file.stat().length, unit="B", unit_scale=True, desc=file.name, disable=None)
    try:
        with bar, file.open("rb") as source, aside.open("wb") as copy:
            while block := source.read(1 << 24):
                with naming(target):
                    copy.write(block)
                    copy.flush()
                bar.update(len(block))
        aside.replace(target)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise


def _version(file: epath.Path) -> str:
    if known := version_in_bucket(file):
        return known
    stat = file.stat()
    return f"{stat.length} bytes of {stat.mtime}"
