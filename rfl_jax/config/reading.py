"""Configurations as config files and flags have them: found, read into a `Config`, and written."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import ml_collections

from rfl_jax.config.config import Config
from rfl_jax.config.rules import RULES
from rfl_jax.errors import UserError, did_you_mean
from rfl_jax.settings import (
    Rows,
    build,
    edge_form,
    sections,
    settings,
)


def plain(cfg: Config) -> dict[str, Any]:
    """The settings as flags, config files and config.json have them: numbers, texts, dictionaries of them."""
    return edge_form(cfg)


def default_config() -> ml_collections.ConfigDict:
    """The defaults as a ConfigDict, for config files to change."""
    return ml_collections.ConfigDict(plain(Config()))


# Where configs are: inside the installed package, or at the top of a clone.
FOLDERS = (Path(__file__).parents[1] / "configs", Path(__file__).parents[2] / "configs")


def config_file(text: str) -> str:
    """The file of a config that is named alone: `mini` is `configs/mini.py`, `roll:FILE.yaml` likewise with its argument.
    The name of a file stays what it is.

    Raises:
        UserError: there is no config of that name.
    """
    name, colon, argument = text.partition(":")
    if not name.isidentifier() or Path(name).exists():
        return text
    for folder in FOLDERS:
        if (folder / f"{name}.py").is_file():
            return f"{folder / name}.py{colon}{argument}"
    known = sorted(file.stem for folder in FOLDERS for file in folder.glob("[a-z]*.py"))
    near = did_you_mean(name, known) or f", or one of {', '.join(known)}"
    raise UserError(f"--config: {name}: expected a config file{near}")


def check_keys(keys: Iterable[str]) -> None:
    """Refuses dotted keys that name no setting, before a config is asked for them.

    Raises:
        UserError: naming all of them, each with the nearest setting.
    """
    listed = list(settings(Config))
    known = [*(item.key for item in listed), *sections(Config)]
    # What a table has is known when the config is read.
    keys = [key for key in keys if not any(key.startswith(f"{item.key}.") for item in listed if item.kind == Rows)]
    unknown = [
        f"config.{key}: unknown setting{did_you_mean(key, known, 'config.') or ', --help lists all'}"
        for key in keys
        if key not in known
    ]
    if unknown:
        raise UserError("; ".join(unknown))


def parse(values: ml_collections.ConfigDict) -> Config:
    """A validated `Config`.

    Raises:
        UserError: unknown keys, values of the wrong type, and those that make no sense, all of them by name.
    """
    cfg, faults = build(Config, values.to_dict())
    shown = {item.key: item for item in settings(Config)}
    for rule in RULES:
        if faults.keys().isdisjoint(rule.keys) and not rule.holds(cfg):
            value = cfg
            for part in rule.keys[0].split("."):
                value = getattr(value, part)
            expected = rule.expected if isinstance(rule.expected, str) else rule.expected(cfg)
            faults[rule.keys[0]] = f"expected {expected}, got {shown[rule.keys[0]].write(value)!r}"
    if faults:
        raise UserError("; ".join(f"config.{key}: {fault}" for key, fault in faults.items()))
    return cfg


def dumps(cfg: Config) -> str:
    """The configuration as JSON."""
    return json.dumps(plain(cfg), indent=1, sort_keys=True) + "\n"
