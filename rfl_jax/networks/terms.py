"""The terms of a run's reward besides the face's: built, named in batches, and known by what clips are prepared for them with."""

import hashlib
import inspect
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from jaxtyping import Array

from convert import store
from convert.licence import licence_of
from rfl_jax.config import Config
from rfl_jax.errors import UserError
from rfl_jax.fingerprint import fingerprint
from rfl_jax.networks.parts import Frozen, Networks, States
from rfl_jax.networks.table import TERMS, Use, abstract_network, open_network
from rfl_jax.rewards.term import COMMON, Prepared, Term, TermSettings
from rfl_jax.rewards.terms import ON_BOARD, find_term
from rfl_jax.settings import edge_form


def open_terms(cfg: Config, use: Use) -> nnx.List:
    """The terms of `Config.other_terms`, in their order: one network of the step.

    Args:
        cfg: of the run.
        use: all of them for "prepare"; for others what `Term.slim` leaves.

    Raises:
        UserError: a term's `path` names no converted network that it could use.
    """
    return _made(cfg, use, lambda kind, folder: open_network(cfg, kind, [folder], use))


def abstract_terms(cfg: Config, use: Use, platform: str) -> nnx.List:
    """The same with shapes and types in place of the weights of converted networks: only headers are read."""
    return _made(cfg, use, lambda kind, folder: abstract_network(cfg, kind, [folder], use, platform))


def _made(cfg: Config, use: Use, opened: Callable[[str, str], Any]) -> nnx.List:
    terms = []
    for name, settings in cfg.other_terms.items():
        kind = find_term(settings.type)
        term = _constructed(name, kind, settings, opened) if kind.network else kind(settings)
        if use != "prepare":
            term.slim()
        terms.append(term)
    return nnx.List(terms)


def _constructed(name: str, kind: type[Term], settings: Any, opened: Callable[[str, str], Any]) -> Term:
    """A term with its converted network."""
    _check_path(name, kind, settings)
    constructor: Any = kind
    try:
        return constructor(settings, opened(kind.network, settings.path))
    except ValueError as error:
        raise UserError(f"config.reward.terms.{name}.path: {settings.path!r}: {error}") from None


def _check_path(name: str, kind: type[Term], settings: Any) -> None:
    """Raises UserError where a term with a converted network names no folder of one."""
    if not kind.network:
        return
    written = f"expected a folder written by python -m convert {kind.network}"
    if not store.is_converted(settings.path):
        raise UserError(f"config.reward.terms.{name}.path: {written}, got {settings.path!r}")
    if (found := store.read_description(settings.path)["kind"]) != kind.network:
        raise UserError(
            f"config.reward.terms.{name}.path: {written}, got {settings.path!r}, which holds {found} weights"
        )


def check_terms(cfg: Config) -> None:
    """Whether terms can use their converted networks, by the headers of these, and read prompts.

    Raises:
        UserError: naming the term's `path`, or the file.
    """
    platform = jax.devices()[0].platform
    for name, settings in cfg.other_terms.items():
        if (kind := find_term(settings.type)).network:
            _constructed(
                name, kind, settings, lambda kind, folder: abstract_network(cfg, kind, [folder], "prepare", platform)
            )
    term_tokens(cfg, "")


def term_tokens(cfg: Config, prompt: str) -> dict[str, dict[str, np.ndarray]]:
    """What terms read of a prompt, by term; raises UserError as they do."""
    return {name: find_term(term.type).tokens(term, prompt) for name, term in cfg.other_terms.items()}


def term_licences(cfg: Config) -> dict[str, str]:
    """A line on the licence of each converted network of a term, by "term_" and the term's name."""
    networked = {name: term for name, term in cfg.other_terms.items() if find_term(term.type).network}
    return {f"term_{name}": licence_of(getattr(term, "path", "")) for name, term in networked.items()}


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
    return {name: _key(name, term) for name, term in cfg.other_terms.items()}


def _key(name: str, cfg: TermSettings) -> str:
    kind = find_term(cfg.type)
    _check_path(name, kind, cfg)
    known: dict[str, Any] = {
        "type": cfg.type,
        # Not where a converted network lies, but what is in it.
        "settings": {
            name: value
            for name, value in edge_form(cfg).items()
            if name not in COMMON and not (kind.network and name == "path")
        },
        "version": kind.version,
        "files": [fingerprint(file) for file in kind.files(cfg)],
    }
    if cfg.type not in ON_BOARD and (source := inspect.getsourcefile(kind)):
        known["code"] = hashlib.sha256(Path(source).read_bytes()).hexdigest()
    digest = hashlib.sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()[:16]
    return f"{cfg.type.rpartition(':')[2].lower()}_{digest}"
