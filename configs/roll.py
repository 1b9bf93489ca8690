"""Runs the original trainer's yaml as it is: `--config=configs/roll.py:path/to/reward_fl_config.yaml`.

Of its sections those that describe the training itself are read (model_args, training_args, data_args, of the whole
file or of its `actor_train` worker). Keys that belong to Ray, DeepSpeed or Megatron have no meaning here: they are
listed once and ignored.
"""

import sys
from pathlib import Path
from typing import Any

import yaml
from ml_collections import ConfigDict

from rfl_jax.config import default_config
from rfl_jax.errors import UserError

SECTIONS = ("model_args", "training_args", "data_args")
DTYPES = {"bf16": "bfloat16", "fp32": "float32"}


def _sections(content: dict[str, Any]) -> dict[str, Any]:
    """All settings of the training sections, nested groups flattened."""
    worker = content.get("actor_train", {})
    found: dict[str, Any] = {}
    for section in SECTIONS:
        for source in (content.get(section), worker.get(section) if isinstance(worker, dict) else None):
            found |= _flat(source or {})
    return found


def _flat(section: dict[str, Any]) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in section.items():
        flat |= _flat(value) if isinstance(value, dict) else {key: value}
    return flat


def get_config(file: str = "") -> ConfigDict:
    """The configuration of a yaml file.

    Raises:
        UserError: no file given, not yaml, or a value that is not of the setting's type.
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
    ignored = [
        key
        for key in content
        if key not in (*SECTIONS, "actor_train", "seed", "save_steps", "logging_steps", "max_steps")
    ]
    settings = {k: content[k] for k in ("seed", "save_steps", "logging_steps", "max_steps") if k in content}
    settings |= _sections(content)
    for key, value in settings.items():
        if key == "dtype" and value in DTYPES:
            config.dtype = DTYPES[value]
        elif key in config and not isinstance(config[key], ConfigDict):
            if value is not None:
                config[key] = _as(type(config[key]), value, f"{file}: {key}")
        else:
            ignored.append(key)
    if ignored:
        print(f"{file}: without meaning here, ignored: {', '.join(sorted(set(ignored)))}", file=sys.stderr)
    return config


def _as(kind: type, value: Any, where: str) -> Any:
    """Yaml reads 1e-6 as text and a list as a list; the original accepts both."""
    if isinstance(value, list):
        value = ",".join(map(str, value))
    try:
        if kind is bool and not isinstance(value, bool):
            raise ValueError
        return kind(value)
    except (TypeError, ValueError):
        raise UserError(f"{where}: expected {kind.__name__}, got {value!r}") from None
