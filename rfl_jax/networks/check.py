"""Whether weights belong to the configuration and to each other, by their headers alone."""

import dataclasses
from typing import Any

from rfl_jax.config import Config
from rfl_jax.errors import UserError
from rfl_jax.models.wan.conditioning import conditioning_of
from rfl_jax.models.wan.config import DIT_PRESETS, DiTConfig
from rfl_jax.networks.table import describe
from rfl_jax.sources import Sources


def check_trainable(cfg: Config) -> None:
    """Whether there is a face that training could keep.

    Raises:
        UserError: the network takes no first frame.
    """
    if conditioning_of(DIT_PRESETS[cfg.preset]) is None:
        raise UserError(f"config.preset: expected a network that takes a first frame, got {cfg.preset!r}")


def check_weights(cfg: Config, sources: Sources) -> None:
    """Compares what the weights' headers say with the configuration.

    Raises:
        UserError: naming the file, and what differs.
    """
    preset = DIT_PRESETS[cfg.preset]
    if "dit2" in cfg.trained and not sources.dit2:
        raise UserError(
            f"config.{cfg.named_in('dit2')}: dit2 is named, but one network serves all steps of this preset"
        )

    def need(file: str, name: str, found: Any, expected: Any) -> None:
        if found != expected:
            raise UserError(f"{file}: {name} is {found}, expected {expected} (config.preset={cfg.preset})")

    for network, files in (("dit", sources.dit), ("dit2", sources.dit2)):
        if not files:
            continue
        found = describe(cfg, network, files)
        for field in dataclasses.fields(DiTConfig):
            if field.name != "boundary":
                need(files[0], field.name, getattr(found, field.name), getattr(preset, field.name))
    vae = describe(cfg, "vae", sources.vae)
    need(sources.vae[0], "number of latent channels", vae.z_dim, preset.out_dim)
    text = describe(cfg, "text_encoder", sources.text_encoder)
    need(sources.text_encoder[0], "width of text features", text.dim, preset.text_dim)
