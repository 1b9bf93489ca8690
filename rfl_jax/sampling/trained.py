"""Trained weights and adapters of a run, or adapters of another tool, put into a network."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from flax import nnx

from convert import adapters, store
from rfl_jax.config import Config
from rfl_jax.errors import UserError
from rfl_jax.models.lora import TARGETS, add_lora, is_adapters
from rfl_jax.models.weights import fill, flat_shapes, get_arrays
from rfl_jax.runs import RunFolder, find_checkpoint, read_network, takes_average, trained_networks
from rfl_jax.sources import experts_of


def read_trained(cfg: Config, source: str, step: str = "", *, raw: bool = False) -> dict[str, dict[str, np.ndarray]]:
    """Trained arrays by network and path: adapters or weights.

    Args:
        cfg: configuration of the pipeline.
        source: folder of a run; or a file of adapters in any naming that `convert.lora` reads, or
            [NETWORK=]FILE[,[NETWORK=]FILE], which says which expert a file is for (by default the one that its header
            names, else that of its keys, which may be both, else the low-noise one). Empty: none.
        step: of the run's checkpoint, or "best"; the last by default.
        raw: the weights themselves, where the checkpoint has their average.

    Raises:
        UserError: nothing of that kind is there, or it fits no network of this preset.
    """
    if not source:
        if step or raw:
            raise UserError(f"--{'step' if step else 'raw'}: expected a run in --lora")
        return {}
    folder = RunFolder(epath.Path(source))
    if "=" not in source and folder.exists() and not store.is_converted(source):
        checkpoint = find_checkpoint(folder, step)
        average = takes_average(checkpoint, raw=raw)
        return {name: read_network(checkpoint, name, average=average) for name in trained_networks(checkpoint)}
    if step or raw:
        raise UserError(f"--{'step' if step else 'raw'}: {source} is no run, whose checkpoint could be chosen")
    experts = ("dit", "dit2")[: experts_of(cfg)]
    found: dict[str, dict[str, np.ndarray]] = {}
    for item in source.split(","):
        network, _, file = item.rpartition("=")
        if not epath.Path(file).exists():
            raise UserError(f"--lora: {file}: no such run or file of adapters")
        for named in (network,) if network else adapters.networks_of(file) or ("",):
            network = named or experts[-1]
            if network not in experts:
                raise UserError(f"--lora: {item}: {cfg.preset} has no {network}, expected {' or '.join(experts)}")
            if network in found:
                raise UserError(
                    f"--lora: {item}: {network} has adapters of a file before it already, expected one for each network: "
                    "NETWORK=FILE,NETWORK=FILE says which"
                )
            converted = store.is_converted(file)
            found[network] = store.restore(file) if converted else adapters.convert(file, cfg.preset, named)[1]
    return found


def add_trained(module: Any, arrays: Mapping[str, np.ndarray]) -> Any:
    """The module with trained adapters added, or with trained weights in place of its own.

    Raises:
        UserError: they are of a network of other sizes.
    """
    if not arrays:
        return module
    if is_adapters(arrays):
        _check_adapters(module, arrays)
        layers = {name.rsplit(".", 1)[0] for name in arrays}
        targets = [target for target, ours in TARGETS.items() if any(n.endswith(f".{ours}") for n in layers)]
        rank = next(x.shape[-1] for name, x in arrays.items() if name.endswith("lora_a"))
        add_lora(module, rank=rank, targets=targets, key=jax.random.key(0))
        return fill(module, {name: jnp.asarray(x, jnp.float32) for name, x in arrays.items()}, partial=True)
    kept = {name: x.dtype for name, x in get_arrays(module).items()}
    own = {name: jnp.asarray(x, kept[name]) for name, x in arrays.items() if name in kept}
    try:
        return fill(module, own, partial=True)
    except ValueError as error:
        raise UserError(f"--lora: {error}") from None


def _check_adapters(module: nnx.Module, arrays: Mapping[str, np.ndarray]) -> None:
    """Refuses adapters whose products have other shapes than the layers' kernels."""
    shapes = flat_shapes(module)
    for name in (n.removesuffix(".lora_a") for n in arrays if n.endswith(".lora_a")):
        expected = shapes.get(f"{name}.kernel")
        found = (*arrays[f"{name}.lora_a"].shape[:-1], arrays[f"{name}.lora_b"].shape[-1])
        if expected is not None and tuple(expected) != found:
            raise UserError(f"--lora: {name} is {found}, expected {tuple(expected)} as the network's")
