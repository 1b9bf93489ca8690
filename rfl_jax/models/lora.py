"""Low-rank adapters on the linear layers of a stacked transformer."""

import dataclasses
from collections.abc import Iterable, Sequence
from typing import TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from rfl_jax.models.layers import Linear

M = TypeVar("M", bound=nnx.Module)


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """What a folder of converted adapters belongs to.

    Attributes:
        preset: of the network they adapt.
        rank: of all of them.
    """

    preset: str
    rank: int


# The original's names of layers (lora_target_modules) and ours.
TARGETS = {"q": "q", "k": "k", "v": "v", "o": "o", "ffn.0": "ffn.up", "ffn.2": "ffn.down"}


def targeted(model: nnx.Module, targets: Sequence[str]) -> dict[str, Linear]:
    """The linear layers inside `blocks` whose path ends in one of the targets, by dotted path."""
    suffixes = tuple("." + TARGETS[target] for target in targets)
    layers = {}
    for path, module in nnx.iter_modules(model):
        name = ".".join(map(str, path))
        if isinstance(module, Linear) and name.startswith("blocks.") and name.endswith(suffixes):
            layers[name] = module
    return layers


def add_lora(model: M, *, rank: int, targets: Sequence[str], key: Array, alpha: float | None = None) -> M:
    """Adds adapters W + (alpha / rank) B A in place, float32, as peft initialises them: A uniform, B zero.

    Args:
        model: a DiT.
        rank: of the adapters.
        targets: keys of `TARGETS`.
        key: randomness of A.
        alpha: numerator of the scale; the rank by default, which makes the scale 1.
    """
    for i, (_, layer) in enumerate(sorted(targeted(model, targets).items())):
        *stack, d_in, d_out = layer.kernel.shape
        bound = d_in**-0.5
        a = jax.random.uniform(jax.random.fold_in(key, i), (*stack, d_in, rank), jnp.float32, -bound, bound)
        layer.lora_a = nnx.LoRAParam(a)
        layer.lora_b = nnx.LoRAParam(jnp.zeros((*stack, rank, d_out), jnp.float32))
        layer.lora_scale = (rank if alpha is None else alpha) / rank
    return model


def is_adapters(arrays: Iterable[str]) -> bool:
    """Whether these are the names of adapters alone."""
    return all(name.endswith(("lora_a", "lora_b")) for name in arrays)
