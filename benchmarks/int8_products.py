"""What int8 inputs of int8 weights bring on a TPU, by the compiler's own estimate of a layer's linear products: no TPU is
needed.

    python -m benchmarks.int8_products --topology=v5p-8 --tokens=4725
"""

import argparse
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import SingleDeviceSharding

from rfl_jax.chips import devices_of
from rfl_jax.models.layers import LayerNorm
from rfl_jax.models.quantize import quantize, round_inputs
from rfl_jax.models.wan.config import DIT_PRESETS
from rfl_jax.models.wan.dit import Block

A14B = DIT_PRESETS["wan2_2_i2v_a14b"]


class Layer(nnx.Module):
    """The linear layers of one block, each group behind what comes before it."""

    def __init__(self) -> None:
        rngs = nnx.Rngs(0)
        self.blocks = Block(A14B, kernel="xla", dtype=jnp.bfloat16, rngs=rngs)
        self.norm = LayerNorm(A14B.dim, eps=A14B.eps, rngs=rngs)


def products(layer: Layer) -> dict[str, Callable[[jax.Array], Any]]:
    """The groups by name."""
    block = layer.blocks
    attention = block.self_attn

    def projections(x: jax.Array) -> Any:
        h = layer.norm(x)
        return attention.q(h), attention.k(h), attention.v(h)

    return {
        "queries, keys, values": projections,
        "attention's output": attention.o,
        "feed-forward": lambda x: block.ffn(layer.norm(x)),
    }


def build(mode: str) -> Layer:
    """One layer with bfloat16 weights, int8 weights, or int8 inputs too."""
    layer = Layer()
    if mode != "bf16":
        quantize(layer)
    graph, state = nnx.split(layer)
    state = jax.tree.map(lambda x: x if x.dtype == jnp.int8 else x.astype(jnp.bfloat16), state)
    first = nnx.merge(graph, jax.tree_util.tree_map_with_path(_first_of_stack, state))
    return round_inputs(first) if mode == "w8a8" else first


def _first_of_stack(path: tuple[Any, ...], x: jax.Array) -> jax.Array:
    return x[0] if "blocks" in jax.tree_util.keystr(path) else x


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--topology", default="v5p-8", help="TPU accelerator type or topology")
    parser.add_argument("--tokens", type=int, default=4725, help="of a chip: 18,900 of 480x480x81 over four")
    given = parser.parse_args()
    place = SingleDeviceSharding(devices_of(given.topology)[0])
    totals: dict[str, int] = {}
    for mode in ("bf16", "w8", "w8a8"):
        graph, state = nnx.split(nnx.eval_shape(lambda mode=mode: build(mode)))
        weights = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), state)
        x = jax.ShapeDtypeStruct((1, given.tokens, A14B.dim), jnp.bfloat16, sharding=place)
        for name in products(nnx.merge(graph, state)):

            @jax.jit
            def run(weights: nnx.State, x: jax.Array, name: str = name, graph: Any = graph) -> Any:
                return products(nnx.merge(graph, weights))[name](x)

            text = run.lower(weights, x).compile().as_text() or ""
            found = re.findall(r'"estimated_cycles":"(\d+)"', text[text.index("ENTRY") :])
            cycles = sum(map(int, found))
            totals[mode] = totals.get(mode, 0) + cycles
            print(f"{mode:5s} {name:22s} {cycles:>12,} cycles", flush=True)
    for mode, cycles in totals.items():
        print(
            f"{mode:5s} all of them            {cycles:>12,} cycles, {cycles / totals['w8']:.2f} of int8 weights alone"
        )


if __name__ == "__main__":
    main()
