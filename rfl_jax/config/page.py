"""All settings as tables for a reader."""

from collections.abc import Iterator

from rfl_jax.config.config import Config, Original
from rfl_jax.settings import (
    Rows,
    Setting,
    own_settings,
    sections,
    settings,
)


def grouped() -> Iterator[tuple[str, str, list[Setting]]]:
    """All settings in groups for a reader: name and meaning of the group, its settings."""
    own = own_settings(Config)
    theirs = own_settings(Original)
    yield "The original's", "Names, meanings and defaults are the original's.", list(theirs.values())
    yield "Ours", "A run's settings that the original has not.", [own[key] for key in own if key not in theirs]
    for name, section in sections(Config).items():
        yield name, str(section.__doc__), list(settings(section, f"{name}."))


def default_text(setting: Setting) -> str:
    """A setting's default as a flag has it."""
    value = setting.write(setting.default)
    if setting.kind == Rows:
        return ""
    return str(value).lower() if isinstance(value, bool) else str(value)


def markdown() -> str:
    """Tables of all settings."""
    lines = [
        "# Settings",
        "",
        "Of `--config.NAME=VALUE`, and of config files. Printed by `python -m rfl_jax.config > docs/settings.md`.",
    ]
    for title, meaning, group in grouped():
        lines += ["", f"## {title}", "", meaning, "", "| setting | values | default | meaning |", "|---|---|---|---|"]
        for item in group:
            default = f"`{default_text(item)}`" if default_text(item) else "empty"
            lines.append(f"| `{item.key}` | {item.expected} | {default} | {item.meaning} |")
    return "\n".join(lines) + "\n"
