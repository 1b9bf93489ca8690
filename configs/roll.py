"""Runs the original trainer's yaml as it is: `--config=configs/roll.py:path/to/reward_fl_config.yaml`.

Settings are read wherever the original has them: at the top, in model_args, training_args and data_args with what is
nested in them, of the whole file or of its `actor_train` worker. The original itself takes some from the top
(train_batch_size, max_grad_norm, seed) and others from the worker, so two places that disagree are refused. Keys that
belong to Ray, DeepSpeed or Megatron have no meaning here: they are listed once and ignored.
"""

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from ml_collections import ConfigDict

from rfl_jax.config import Config, default_config
from rfl_jax.errors import UserError
from rfl_jax.settings import Names, Setting, own_settings

SECTIONS = ("model_args", "training_args", "data_args")
WORKER = "actor_train"
DTYPES = {"bf16": "bfloat16", "fp32": "float32"}
# What is always so here: other values of these would be another training.
FIXED = {
    "adam_beta1": 0.9,
    "adam_beta2": 0.999,
    "adam_epsilon": 1e-8,
    "fp16": False,
    "lora_dropout": 0.0,
    "warmup_ratio": 0.0,
}


def _places(content: dict[str, Any], where: str = "") -> Iterator[tuple[str, str, Any]]:
    """Path, name and value of every key that stands where the original has settings, and of those beside them."""
    for key, value in content.items():
        path = f"{where}{key}"
        if path in SECTIONS or path.removeprefix(f"{WORKER}.") in SECTIONS:
            yield from _leaves(value, f"{path}.")
        elif path == WORKER and isinstance(value, dict):
            yield from _places(value, f"{path}.")
        else:
            yield path, str(key), value


def _leaves(section: Any, where: str) -> Iterator[tuple[str, str, Any]]:
    for key, value in section.items() if isinstance(section, dict) else ():
        if isinstance(value, dict):
            yield from _leaves(value, f"{where}{key}.")
        else:
            yield f"{where}{key}", str(key), value


def get_config(file: str = "") -> ConfigDict:
    """The configuration of a yaml file.

    Raises:
        UserError: no file given, not yaml, a value that cannot be used, or two places that disagree.
    """
    if not file:
        raise UserError("configs/roll.py: expected configs/roll.py:FILE.yaml")
    try:
        content = yaml.safe_load(Path(file).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{file}: {error.strerror}, expected the original's yaml") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{file}: expected yaml ({' '.join(str(error).split())})") from None
    if not isinstance(content, dict):
        raise UserError(f"{file}: expected a mapping with sections {', '.join(SECTIONS)}")
    config = default_config()
    known = own_settings(Config)
    found: dict[str, tuple[str, Any]] = {}
    ignored = set()
    faults = []
    for path, name, value in _places(content):
        if name not in known and name not in FIXED:
            ignored.add(name)
            continue
        try:
            value = _resolved(value, content)
            if value is None:
                continue
            if name in FIXED:
                _check_fixed(name, value)
                continue
            value = _as(known[name], value)
        except ValueError as error:
            faults.append(f"{path}: {error}")
            continue
        other, before = found.setdefault(name, (path, value))
        if before != value:
            faults.append(f"{path}: expected {before!r} as in {other}, got {value!r}")
        config[name] = value
    if faults:
        raise UserError(f"{file}: {'; '.join(faults)}")
    if ignored:
        print(f"{file}: without meaning here, ignored: {', '.join(sorted(ignored))}", file=sys.stderr)
    return config


def _resolved(value: Any, content: dict[str, Any], above: tuple[str, ...] = ()) -> Any:
    """A value with what its ${a.b} refer to in the file, which may refer on; `above` are those that led here."""
    if not isinstance(value, str):
        return value

    def referred(found: re.Match) -> Any:
        place: Any = content
        for part in found[1].split("."):
            if not isinstance(place, dict) or part not in place or found[1] in above:
                raise ValueError(f"expected {found[0]} to name a key of this file")
            place = place[part]
        return _resolved(place, content, (*above, found[1]))

    whole = re.fullmatch(r"\$\{([^{}]+)\}", value)
    return referred(whole) if whole else re.sub(r"\$\{([^{}]+)\}", lambda found: str(referred(found)), value)


def _check_fixed(name: str, value: Any) -> None:
    """Raises: ValueError: the value is another than the one that is always so here."""
    try:
        same = float(value) == FIXED[name]
    except (TypeError, ValueError):
        same = False
    if not same:
        raise ValueError(f"expected {FIXED[name]}, as it always is here, got {value!r}")


def _as(setting: Setting, value: Any) -> Any:
    """The edge form of a yaml value. The original accepts 1e-6, which yaml reads as text, lists as well as names
    separated by commas, and false where nothing is to be resumed.

    Raises:
        ValueError: it cannot be used.
    """
    if setting.key == "dtype":
        if not isinstance(value, str) or value not in DTYPES:
            raise ValueError(f"expected {' or '.join(DTYPES)}, got {value!r}")
        return DTYPES[value]
    if setting.key == "resume_from_checkpoint" and isinstance(value, bool):
        if value:
            raise ValueError(f"expected a run's workdir, or false, got {value!r}")
        return ""
    if isinstance(value, list):
        texts = [item for item in value if isinstance(item, str)]
        if setting.key == "model_paths":
            value = json.dumps(value)
        elif texts == value and (setting.kind == Names or len(texts) == 1):
            value = ",".join(texts)
    if setting.edge in (int, float) and isinstance(value, str | float):
        try:
            number = float(value)
        except ValueError:
            raise ValueError(f"expected {setting.edge.__name__}, got {value!r}") from None
        value = int(number) if setting.edge is int and number.is_integer() else number
    return setting.write(setting.read(value))
