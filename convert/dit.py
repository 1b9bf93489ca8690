"""Wan2.2 DiT: original (Wan-Video) and diffusers naming."""

import math

from convert.component import Component
from convert.mapping import Shapes, key_tables, patchify, squeeze_leading, target_shapes, transpose, unchanged
from rfl_jax.errors import UserError
from rfl_jax.models.wan.config import DIT_PRESETS, DiTConfig
from rfl_jax.models.wan.dit import DiT

PATCH = (1, 2, 2)


# A row a tensor; * is the number of the layer, which becomes the first axis of our array.
# original name, diffusers name, our name, change of layout
TENSORS = (
    ("patch_embedding.weight",            "patch_embedding.weight",                           "patch_embedding.kernel",         patchify(PATCH)),
    ("patch_embedding.bias",              "patch_embedding.bias",                             "patch_embedding.bias",           unchanged),
    ("text_embedding.0.weight",           "condition_embedder.text_embedder.linear_1.weight", "text_in.kernel",                 transpose),
    ("text_embedding.0.bias",             "condition_embedder.text_embedder.linear_1.bias",   "text_in.bias",                   unchanged),
    ("text_embedding.2.weight",           "condition_embedder.text_embedder.linear_2.weight", "text_out.kernel",                transpose),
    ("text_embedding.2.bias",             "condition_embedder.text_embedder.linear_2.bias",   "text_out.bias",                  unchanged),
    ("time_embedding.0.weight",           "condition_embedder.time_embedder.linear_1.weight", "time_in.kernel",                 transpose),
    ("time_embedding.0.bias",             "condition_embedder.time_embedder.linear_1.bias",   "time_in.bias",                   unchanged),
    ("time_embedding.2.weight",           "condition_embedder.time_embedder.linear_2.weight", "time_out.kernel",                transpose),
    ("time_embedding.2.bias",             "condition_embedder.time_embedder.linear_2.bias",   "time_out.bias",                  unchanged),
    ("time_projection.1.weight",          "condition_embedder.time_proj.weight",              "time_projection.kernel",         transpose),
    ("time_projection.1.bias",            "condition_embedder.time_proj.bias",                "time_projection.bias",           unchanged),
    ("head.head.weight",                  "proj_out.weight",                                  "head.kernel",                    transpose),
    ("head.head.bias",                    "proj_out.bias",                                    "head.bias",                      unchanged),
    ("head.modulation",                   "scale_shift_table",                                "head_modulation",                squeeze_leading),
    ("blocks.*.self_attn.q.weight",       "blocks.*.attn1.to_q.weight",                       "blocks.self_attn.q.kernel",      transpose),
    ("blocks.*.self_attn.q.bias",         "blocks.*.attn1.to_q.bias",                         "blocks.self_attn.q.bias",        unchanged),
    ("blocks.*.self_attn.k.weight",       "blocks.*.attn1.to_k.weight",                       "blocks.self_attn.k.kernel",      transpose),
    ("blocks.*.self_attn.k.bias",         "blocks.*.attn1.to_k.bias",                         "blocks.self_attn.k.bias",        unchanged),
    ("blocks.*.self_attn.v.weight",       "blocks.*.attn1.to_v.weight",                       "blocks.self_attn.v.kernel",      transpose),
    ("blocks.*.self_attn.v.bias",         "blocks.*.attn1.to_v.bias",                         "blocks.self_attn.v.bias",        unchanged),
    ("blocks.*.self_attn.o.weight",       "blocks.*.attn1.to_out.0.weight",                   "blocks.self_attn.o.kernel",      transpose),
    ("blocks.*.self_attn.o.bias",         "blocks.*.attn1.to_out.0.bias",                     "blocks.self_attn.o.bias",        unchanged),
    ("blocks.*.self_attn.norm_q.weight",  "blocks.*.attn1.norm_q.weight",                     "blocks.self_attn.norm_q.scale",  unchanged),
    ("blocks.*.self_attn.norm_k.weight",  "blocks.*.attn1.norm_k.weight",                     "blocks.self_attn.norm_k.scale",  unchanged),
    ("blocks.*.cross_attn.q.weight",      "blocks.*.attn2.to_q.weight",                       "blocks.cross_attn.q.kernel",     transpose),
    ("blocks.*.cross_attn.q.bias",        "blocks.*.attn2.to_q.bias",                         "blocks.cross_attn.q.bias",       unchanged),
    ("blocks.*.cross_attn.k.weight",      "blocks.*.attn2.to_k.weight",                       "blocks.cross_attn.k.kernel",     transpose),
    ("blocks.*.cross_attn.k.bias",        "blocks.*.attn2.to_k.bias",                         "blocks.cross_attn.k.bias",       unchanged),
    ("blocks.*.cross_attn.v.weight",      "blocks.*.attn2.to_v.weight",                       "blocks.cross_attn.v.kernel",     transpose),
    ("blocks.*.cross_attn.v.bias",        "blocks.*.attn2.to_v.bias",                         "blocks.cross_attn.v.bias",       unchanged),
    ("blocks.*.cross_attn.o.weight",      "blocks.*.attn2.to_out.0.weight",                   "blocks.cross_attn.o.kernel",     transpose),
    ("blocks.*.cross_attn.o.bias",        "blocks.*.attn2.to_out.0.bias",                     "blocks.cross_attn.o.bias",       unchanged),
    ("blocks.*.cross_attn.norm_q.weight", "blocks.*.attn2.norm_q.weight",                     "blocks.cross_attn.norm_q.scale", unchanged),
    ("blocks.*.cross_attn.norm_k.weight", "blocks.*.attn2.norm_k.weight",                     "blocks.cross_attn.norm_k.scale", unchanged),
    ("blocks.*.norm3.weight",             "blocks.*.norm2.weight",                            "blocks.norm3.scale",             unchanged),
    ("blocks.*.norm3.bias",               "blocks.*.norm2.bias",                              "blocks.norm3.bias",              unchanged),
    ("blocks.*.ffn.0.weight",             "blocks.*.ffn.net.0.proj.weight",                   "blocks.ffn.up.kernel",           transpose),
    ("blocks.*.ffn.0.bias",               "blocks.*.ffn.net.0.proj.bias",                     "blocks.ffn.up.bias",             unchanged),
    ("blocks.*.ffn.2.weight",             "blocks.*.ffn.net.2.weight",                        "blocks.ffn.down.kernel",         transpose),
    ("blocks.*.ffn.2.bias",               "blocks.*.ffn.net.2.bias",                          "blocks.ffn.down.bias",           unchanged),
    ("blocks.*.modulation",               "blocks.*.scale_shift_table",                       "blocks.modulation",              squeeze_leading),
)  # fmt: skip
NAMINGS = key_tables("original", "diffusers", TENSORS)


def naming(shapes: Shapes) -> str:
    """Which table the keys belong to."""
    return "diffusers" if any(key.startswith("condition_embedder.") for key in shapes) else "original"


def infer_config(shapes: Shapes, hints: dict) -> DiTConfig:
    """Sizes as the tensors tell them.

    The number of heads and the text length leave no trace in the weights. They come from `hints` (the original's
    or diffusers' config.json, or the command line), else from the published networks: heads 128 wide, 512 rows.

    Args:
        shapes: source keys and shapes.
        hints: `num_heads` or `num_attention_heads`, `text_len`, `eps`, `boundary`; other keys are not used.
    """
    found = target_shapes(NAMINGS[naming(shapes)], shapes)
    try:
        patch_in, dim = found["patch_embedding.kernel"]
        num_layers, _, ffn_dim = found["blocks.ffn.up.kernel"]
        text_dim, freq_dim = found["text_in.kernel"][0], found["time_in.kernel"][0]
        in_dim, out_dim = patch_in // math.prod(PATCH), found["head.kernel"][1] // math.prod(PATCH)
    except KeyError as error:
        raise UserError(f"DiT: missing tensor for {error.args[0]}") from None
    preset = next(
        (p for p in DIT_PRESETS.values() if (p.in_dim, p.dim, p.num_layers) == (in_dim, dim, num_layers)), None
    )
    heads = hints.get("num_heads", hints.get("num_attention_heads", preset.num_heads if preset else max(dim // 128, 1)))
    if dim % heads or (dim // heads) % 2:
        raise UserError(f"DiT: num_heads={heads} does not split width {dim} into even heads")
    return DiTConfig(
        in_dim=in_dim,
        out_dim=out_dim,
        dim=dim,
        ffn_dim=ffn_dim,
        num_heads=heads,
        num_layers=num_layers,
        freq_dim=freq_dim,
        text_dim=text_dim,
        text_len=hints.get("text_len", preset.text_len if preset else 512),
        patch_size=PATCH,
        eps=hints.get("eps", 1e-6),
        # TI2V is the one whose input has no conditioning channels but 48 latent ones.
        first_frame_in_latents=in_dim == out_dim == 48,
        boundary=hints.get("boundary", preset.boundary if preset else 0.9),
    )


COMPONENT = Component(
    DiT,
    "DiT",
    NAMINGS,
    naming,
    infer_config,
    hint_kinds={"num_heads": int, "num_attention_heads": int, "text_len": int, "eps": float, "boundary": float},
)
build, load = COMPONENT.build, COMPONENT.load
