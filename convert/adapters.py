"""Adapters from a file in any naming, or from a folder of converted ones (`python -m convert lora`)."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from convert import dit, store
from convert.lora import Lora, UnfitError, adapters, experts_of
from convert.readers import Checkpoint
from rfl_jax.errors import UserError
from rfl_jax.models.lora import TARGETS, LoraConfig
from rfl_jax.models.wan.config import DIT_PRESETS
from rfl_jax.models.weights import flat_shapes


def convert(file: str, preset: str = "", expert: str = "") -> tuple[LoraConfig, dict[str, np.ndarray]]:
    """Config and arrays by our paths, scale 1.

    Args:
        file: safetensors, or a pickle, or the folder of one.
        preset: of the network; by default the first that the file fits.
        expert: "dit" or "dit2": whose adapters are meant, where a file has those of both.

    Raises:
        UserError: it fits none, or changes more than the layers that can have adapters.
    """
    if preset and preset not in DIT_PRESETS:
        raise UserError(f"preset={preset}: expected one of {', '.join(DIT_PRESETS)}")
    refusals: dict[str, UnfitError] = {}
    for name in [preset] if preset else DIT_PRESETS:
        try:
            found = Lora(file, dit.NAMINGS, flat_shapes(store.build("dit", DIT_PRESETS[name])), expert)
        except UnfitError as error:
            refusals[name] = error
            continue
        arrays = adapters(found, tuple(TARGETS), DIT_PRESETS[name].num_layers)
        return LoraConfig(name, found.ranks.pop()), arrays
    closest = min(refusals, key=lambda name: refusals[name].count)
    raise UserError(f"{refusals[closest]}; expected adapters of {closest}{'' if preset else ', the closest preset'}")


def networks_of(file: str) -> tuple[str, ...]:
    """The networks that a file's header, or the prefixes of its keys, say its adapters are of; empty if none does."""
    if store.is_converted(file):
        return ()
    checkpoint = Checkpoint([Path(file)], prefixes=())
    named = checkpoint.metadata.get("network", "")
    return (named,) if named else experts_of(checkpoint.shapes)


def read(source: str, preset: str, targets: Sequence[str], rank: int, expert: str = "") -> dict[str, np.ndarray]:
    """Adapters for a run of these settings, from a file or a folder of converted ones.

    Args:
        source: file or folder.
        preset, targets, rank: the run's network, adapted layers (the original's names) and rank.
        expert: "dit" or "dit2": whose adapters are meant, where a file has those of both.

    Raises:
        UserError: they are of another network or rank, or adapt other layers than `targets`.
    """
    if store.is_converted(source):
        cfg, arrays = store.describe("lora", [source]), store.restore(source)
        # Presets of one shape have the same adapters.
        shapes = [flat_shapes(store.build("dit", DIT_PRESETS[name])) for name in (cfg.preset, preset)]
        if any(shapes[0][n] != shapes[1].get(n) for n in shapes[0] if n.startswith("blocks.")):
            raise UserError(f"{source}: adapts {cfg.preset}, expected {preset}")
    else:
        cfg, arrays = convert(source, preset, expert)
    if cfg.rank != rank:
        raise UserError(f"config.lora_rank: {rank}, but {source} has rank {cfg.rank}")
    suffixes = tuple(f".{TARGETS[target]}.lora_{half}" for target in targets for half in "ab")
    for name in arrays:
        if not name.endswith(suffixes):
            raise UserError(f"{source}: adapts {name[:-7]}, which config.lora_target_modules does not name")
    return arrays
