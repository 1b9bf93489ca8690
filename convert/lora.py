"""LoRA adapters of the DiT in peft's naming of the original network."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from flax import nnx

from convert.mapping import Rule, fill, plan, transpose, unfill
from convert.readers import SafetensorsReader
from rfl_jax.errors import UserError
from rfl_jax.models.lora import TARGETS
from rfl_jax.models.weights import get_arrays

PLACES = {
    **{f"{attention}.{p}": f"{attention}.{p}" for attention in ("self_attn", "cross_attn") for p in "qkvo"},
    "ffn.0": TARGETS["ffn.0"],
    "ffn.2": TARGETS["ffn.2"],
}
RULES = [
    Rule(
        rf"blocks\.(\d+)\.{source.replace('.', chr(92) + '.')}\.{theirs}\.weight",
        f"blocks.{target}.{ours}",
        transpose,
        True,
    )
    for source, target in PLACES.items()
    for theirs, ours in (("lora_A", "lora_a"), ("lora_B", "lora_b"))
]


def read(file: Path | str, model: nnx.Module) -> dict[str, np.ndarray]:
    """Adapter matrices of a file by our paths, for a DiT that they fit.

    Raises:
        UserError: keys that are no adapter of this DiT, a layer missing in a stack, or wrong shapes.
    """
    reader = SafetensorsReader([Path(file)])
    ranks = {shape[0] for key, shape in reader.shapes.items() if key.endswith("lora_A.weight")}
    if len(ranks) != 1:
        raise UserError(f"{file}: expected lora_A matrices of one rank, found {sorted(ranks)}")
    rank = ranks.pop()
    present = {rule.target for rule in RULES if rule.key(0) in reader.shapes}
    target: dict[str, tuple[int, ...]] = {}
    for path, leaf in get_arrays(model).items():
        if path.endswith(".kernel") and path.startswith("blocks."):
            *stack, d_in, d_out = leaf.shape
            base = path.removesuffix(".kernel")
            target[f"{base}.lora_a"], target[f"{base}.lora_b"] = (*stack, d_in, rank), (*stack, rank, d_out)
    target = {name: shape for name, shape in target.items() if name in present}
    return fill(plan(RULES, reader.shapes, target, what=str(file)), target, reader.read, np.dtype(np.float32))


def names(arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Adapter matrices of our paths under peft's names, ready to be written."""
    return unfill(RULES, arrays)
