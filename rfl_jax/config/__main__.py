"""Prints the page of settings: `python -m rfl_jax.config > docs/settings.md`."""

from rfl_jax.config.page import markdown

print(markdown(), end="")
