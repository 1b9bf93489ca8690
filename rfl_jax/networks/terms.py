"""The terms of a run's reward besides the face's: built, named in batches, and known by what clips are prepared for them with."""

import hashlib
import inspect
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flax import nnx
from jaxtyping import Array

from rfl_jax.config import Config
from rfl_jax.fingerprint import fingerprint
from rfl_jax.networks.parts import Frozen, Networks, States
from rfl_jax.networks.table import TERMS
from rfl_jax.rewards.term import COMMON, Prepared, Term, TermSettings
from rfl_jax.rewards.terms import ON_BOARD, find_term
from rfl_jax.settings import edge_form


def open_terms(cfg: Config) -> nnx.List:
    """The terms of `Config.other_terms`, in their order: one network of the step."""
    return nnx.List([find_term(term.type)(term) for term in cfg.other_terms.values()])


def build_terms(cfg: Config, networks: Networks, params: States, frozen: Frozen) -> dict[str, Term]:
    """The same by name, with the weights that a step is handed."""
    if TERMS not in networks.graphs:
        return {}
    return dict(zip(cfg.other_terms, networks.build(TERMS, params, frozen), strict=True))


def shown_as(name: str) -> str:
    """A term's name among metrics and measures."""
    return f"reward/{name}"


def term_arrays(name: str) -> str:
    """What the names of a term's arrays begin with in batches."""
    return f"{shown_as(name)}/"


def prepared_for(name: str, term: Term, batch: Mapping[str, Array]) -> Prepared:
    """What of a batch a term is handed."""
    prefix = term_arrays(name)
    own = {key.removeprefix(prefix): x for key, x in batch.items() if key.startswith(prefix)}
    return own | {key: batch[key] for key in term.takes}


def term_keys(cfg: Config) -> dict[str, str]:
    """For each term by name what its prepared arrays depend on besides the clip, as a text for file names: its type, its own
    settings, its version, the content of its files; and of a type that is not on board the code of its module.
    """
    return {name: _key(term) for name, term in cfg.other_terms.items()}


def _key(cfg: TermSettings) -> str:
    kind = find_term(cfg.type)
    known: dict[str, Any] = {
        "type": cfg.type,
        "settings": {name: value for name, value in edge_form(cfg).items() if name not in COMMON},
        "version": kind.version,
        "files": [fingerprint(file) for file in kind.files(cfg)],
    }
    if cfg.type not in ON_BOARD and (source := inspect.getsourcefile(kind)):
        known["code"] = hashlib.sha256(Path(source).read_bytes()).hexdigest()
    digest = hashlib.sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()[:16]
    return f"{cfg.type.rpartition(':')[2].lower()}_{digest}"
