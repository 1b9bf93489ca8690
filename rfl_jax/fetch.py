"""Weights brought to this machine: from the Hugging Face hub, and from buckets that keep whole checkpoints."""

import fnmatch
import hashlib
import json
import os
from pathlib import Path, PurePosixPath

from etils import epath
from huggingface_hub import HfApi, hf_hub_download
from tqdm import tqdm

from rfl_jax.errors import UserError, first_line
from rfl_jax.files import PICKLES, is_remote


def fetch(source: str) -> list[str]:
    """Local files of a source: the source itself; `hub:org/name[:pattern]` and checkpoints in buckets are fetched once
    into the user's cache. From the hub a broken download goes on, from a bucket it begins anew.

    Args:
        source: path, `gs://` path, or hub reference. A pattern is of file names with folders; without one all weights
            at the top of the repository are meant. HF_ENDPOINT names another hub.

    Raises:
        UserError: it names nothing, or cannot be fetched.
    """
    if source.startswith("hub:"):
        return _from_hub(source.removeprefix("hub:"))
    if is_remote(epath.Path(source)) and source.endswith((".safetensors", ".index.json", *PICKLES)):
        return _from_bucket(epath.Path(source))
    return [source]


def _from_hub(item: str) -> list[str]:
    repository, _, pattern = item.partition(":")
    if repository.count("/") != 1:
        raise UserError(f"{item}: expected org/name:pattern")
    try:
        listed = HfApi().list_repo_files(repository)
        files = [f for f in listed if fnmatch.fnmatch(f, pattern)] if pattern else [f for f in listed if _is_weight(f)]
        if not files:
            raise UserError(f"{repository}: no file matches {pattern or '*.safetensors'}")
        # What a network's sizes are read from lies beside its weights.
        beside = {str(PurePosixPath(f).with_name("config.json")) for f in files} & set(listed)
        for f in sorted(beside - set(files)):
            hf_hub_download(repository, f)
        found = [hf_hub_download(repository, f) for f in sorted(files)]
    except UserError:
        raise
    except Exception as error:  # the hub's library raises its own errors, its transport's and the system's
        raise UserError(f"{item}: cannot be fetched from the hub ({first_line(error)})") from None
    indexes = [f for f in found if f.endswith(".safetensors.index.json")]
    return indexes if len(indexes) == 1 else [f for f in found if not f.endswith("config.json")]


def _is_weight(name: str) -> bool:
    return "/" not in name and name.endswith((".safetensors", ".safetensors.index.json"))


def _from_bucket(source: epath.Path) -> list[str]:
    """A copy in the user's cache; with an index its shards as well."""
    folder = Path(os.environ.get("RFL_JAX_CACHE", Path.home() / ".cache" / "rfl_jax")) / "buckets"
    base = folder / hashlib.sha256(str(source.parent).encode()).hexdigest()[:16]
    try:
        files = [source]
        if source.name.endswith(".index.json"):
            names = set(json.loads(source.read_text())["weight_map"].values())
            files += [source.parent / PurePosixPath(name).name for name in sorted(names)]
        config = source.parent / "config.json"
        for file in [*files, *([config] if config.exists() else [])]:
            _copy(file, base / file.name)
    except (OSError, ValueError, KeyError, AttributeError, RuntimeError) as error:
        raise UserError(f"{source}: cannot be fetched ({first_line(error)})") from None
    return [str(base / source.name)]


def _copy(file: epath.Path, target: Path) -> None:
    there = file.stat()
    size = there.length
    if target.exists() and target.stat().st_size == size and target.stat().st_mtime >= there.mtime:
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    aside = target.with_name(f".{target.name}.tmp")
    bar = tqdm(total=size, unit="B", unit_scale=True, desc=file.name, disable=None)
    with bar, file.open("rb") as source, aside.open("wb") as copy:
        while block := source.read(1 << 24):
            copy.write(block)
            bar.update(len(block))
    aside.replace(target)
