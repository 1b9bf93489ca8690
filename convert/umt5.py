"""UMT5 encoder: original (Wan-Video `models_t5_umt5-xxl-enc`) and transformers naming."""

from convert.component import Component
from convert.mapping import Rule, Shapes, key_tables, target_shapes, transpose, unchanged
from rfl_jax.errors import UserError
from rfl_jax.models.umt5 import UMT5Config, UMT5Encoder

# A row a tensor; * is the number of the layer, which becomes the first axis of our array.
# original name, transformers name, our name, change of layout
TENSORS = (
    ("token_embedding.weight",                  "shared.weight",                                                        "embedding",            unchanged),
    ("norm.weight",                             "encoder.final_layer_norm.weight",                                      "norm.scale",           unchanged),
    ("blocks.*.norm1.weight",                   "encoder.block.*.layer.0.layer_norm.weight",                            "blocks.norm1.scale",   unchanged),
    ("blocks.*.attn.q.weight",                  "encoder.block.*.layer.0.SelfAttention.q.weight",                       "blocks.attn.q.kernel", transpose),
    ("blocks.*.attn.k.weight",                  "encoder.block.*.layer.0.SelfAttention.k.weight",                       "blocks.attn.k.kernel", transpose),
    ("blocks.*.attn.v.weight",                  "encoder.block.*.layer.0.SelfAttention.v.weight",                       "blocks.attn.v.kernel", transpose),
    ("blocks.*.attn.o.weight",                  "encoder.block.*.layer.0.SelfAttention.o.weight",                       "blocks.attn.o.kernel", transpose),
    ("blocks.*.pos_embedding.embedding.weight", "encoder.block.*.layer.0.SelfAttention.relative_attention_bias.weight", "blocks.position_bias", unchanged),
    ("blocks.*.norm2.weight",                   "encoder.block.*.layer.1.layer_norm.weight",                            "blocks.norm2.scale",   unchanged),
    ("blocks.*.ffn.gate.0.weight",              "encoder.block.*.layer.1.DenseReluDense.wi_0.weight",                   "blocks.gate.kernel",   transpose),
    ("blocks.*.ffn.fc1.weight",                 "encoder.block.*.layer.1.DenseReluDense.wi_1.weight",                   "blocks.up.kernel",     transpose),
    ("blocks.*.ffn.fc2.weight",                 "encoder.block.*.layer.1.DenseReluDense.wo.weight",                     "blocks.down.kernel",   transpose),
)  # fmt: skip
NAMINGS = key_tables("original", "transformers", TENSORS)
# The same tensor as `shared` under its other name.
NAMINGS["transformers"].append(Rule(r"encoder\.embed_tokens\.weight", None))


def naming(shapes: Shapes) -> str:
    """Which table the keys belong to."""
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


COMPONENT = Component(
    UMT5Encoder, "UMT5", NAMINGS, naming, infer_config, hint_kinds={"max_distance": int, "eps": float}
)
load = COMPONENT.load
