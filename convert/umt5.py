"""UMT5 encoder: original (Wan-Video `models_t5_umt5-xxl-enc`) and transformers naming."""

from typing import Any

from flax import nnx

from convert.component import Component
from convert.mapping import Rule, Shapes, target_shapes, transpose, unchanged
from rfl_jax.errors import UserError
from rfl_jax.models.umt5 import UMT5Config, UMT5Encoder

ORIGINAL = r"blocks\.(\d+)\."
TRANSFORMERS = r"encoder\.block\.(\d+)\.layer\."


def _rules(names: dict[str, str]) -> list[Rule]:
    layout = {"kernel": transpose, "scale": unchanged, "position_bias": unchanged}
    return [
        Rule(
            rf"{source}\.weight", target, layout.get(target.rsplit(".", 1)[-1], unchanged), target.startswith("blocks.")
        )
        for source, target in names.items()
    ]


NAMINGS: dict[str, list[Rule]] = {
    "original": _rules(
        {
            "token_embedding": "embedding",
            "norm": "norm.scale",
            ORIGINAL + "norm1": "blocks.norm1.scale",
            ORIGINAL + "norm2": "blocks.norm2.scale",
            **{rf"{ORIGINAL}attn\.{p}": f"blocks.attn.{p}.kernel" for p in "qkvo"},
            ORIGINAL + r"ffn\.gate\.0": "blocks.gate.kernel",
            ORIGINAL + r"ffn\.fc1": "blocks.up.kernel",
            ORIGINAL + r"ffn\.fc2": "blocks.down.kernel",
            ORIGINAL + r"pos_embedding\.embedding": "blocks.position_bias",
        }
    ),
    "transformers": [
        *_rules(
            {
                "shared": "embedding",
                r"encoder\.final_layer_norm": "norm.scale",
                TRANSFORMERS + r"0\.layer_norm": "blocks.norm1.scale",
                TRANSFORMERS + r"1\.layer_norm": "blocks.norm2.scale",
                **{rf"{TRANSFORMERS}0\.SelfAttention\.{p}": f"blocks.attn.{p}.kernel" for p in "qkvo"},
                TRANSFORMERS + r"1\.DenseReluDense\.wi_0": "blocks.gate.kernel",
                TRANSFORMERS + r"1\.DenseReluDense\.wi_1": "blocks.up.kernel",
                TRANSFORMERS + r"1\.DenseReluDense\.wo": "blocks.down.kernel",
                TRANSFORMERS + r"0\.SelfAttention\.relative_attention_bias": "blocks.position_bias",
            }
        ),
        # The same tensor as `shared` under its other name.
        Rule(r"encoder\.embed_tokens\.weight", None),
    ],
}


def naming(shapes: Shapes) -> str:
    return "transformers" if any(key.startswith("encoder.block.") for key in shapes) else "original"


def infer_config(shapes: Shapes, hints: dict) -> UMT5Config:
    """Sizes from the tensors; `hints` may set `max_distance` and `eps`, which weights do not tell."""
    found = target_shapes(NAMINGS[naming(shapes)], shapes)
    try:
        vocab, dim = found["embedding"]
        num_layers, _, dim_attn = found["blocks.attn.q.kernel"]
        num_buckets, num_heads = found["blocks.position_bias"][1:]
        dim_ffn = found["blocks.up.kernel"][-1]
    except KeyError as error:
        raise UserError(f"UMT5: missing tensor for {error.args[0]}") from None
    return UMT5Config(
        vocab, dim, dim_attn, dim_ffn, num_heads, num_layers, num_buckets,
        max_distance=hints.get("max_distance", 128), eps=hints.get("eps", 1e-6),
    )  # fmt: skip


def build(cfg: UMT5Config, **options: Any) -> UMT5Encoder:
    """The module of these sizes; `options` are further arguments of its constructor."""
    return UMT5Encoder(cfg, **options, rngs=nnx.Rngs(0))


COMPONENT = Component("UMT5", NAMINGS, naming, infer_config, build, hint_names=("max_distance", "eps"))
load = COMPONENT.load
