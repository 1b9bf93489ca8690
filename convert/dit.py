"""Wan2.2 DiT: original (Wan-Video) and diffusers naming."""

import math
from typing import Any

from flax import nnx

from convert.component import Component
from convert.mapping import Rule, Shapes, patchify, squeeze_leading, target_shapes, transpose, unchanged
from rfl_jax.errors import UserError
from rfl_jax.models.wan.config import DIT_PRESETS, DiTConfig
from rfl_jax.models.wan.dit import DiT

PATCH = (1, 2, 2)


def _linear(source: str, target: str, *, stacked: bool = False) -> list[Rule]:
    return [
        Rule(rf"{source}\.weight", rf"{target}.kernel", transpose, stacked),
        Rule(rf"{source}\.bias", rf"{target}.bias", unchanged, stacked),
    ]


def _norm(source: str, target: str) -> list[Rule]:
    return [
        Rule(rf"{source}\.weight", rf"{target}.scale", unchanged, True),
        Rule(rf"{source}\.bias", rf"{target}.bias", unchanged, True),
    ]


def _rules(names: dict[str, str], attention: dict[str, str], projections: dict[str, str]) -> list[Rule]:
    block = r"blocks\.(\d+)\."
    rules = [
        Rule(r"patch_embedding\.weight", "patch_embedding.kernel", patchify(PATCH)),
        Rule(r"patch_embedding\.bias", "patch_embedding.bias"),
        Rule(names["head_modulation"], "head_modulation", squeeze_leading),
        Rule(block + names["modulation"], "blocks.modulation", squeeze_leading, True),
        *_norm(block + names["norm3"], "blocks.norm3"),
        *_linear(block + names["ffn.up"], "blocks.ffn.up", stacked=True),
        *_linear(block + names["ffn.down"], "blocks.ffn.down", stacked=True),
    ]
    for target in ("text_in", "text_out", "time_in", "time_out", "time_projection", "head"):
        rules += _linear(names[target], target)
    for source, target in attention.items():
        for projection, name in projections.items():
            rules += _linear(rf"{block}{source}\.{projection}", f"blocks.{target}.{name}", stacked=True)
        for norm in ("norm_q", "norm_k"):
            rules.append(Rule(rf"{block}{source}\.{norm}\.weight", f"blocks.{target}.{norm}.scale", unchanged, True))
    return rules


NAMINGS: dict[str, list[Rule]] = {
    "original": _rules(
        {
            "head_modulation": r"head\.modulation",
            "modulation": "modulation",
            "norm3": "norm3",
            "ffn.up": r"ffn\.0",
            "ffn.down": r"ffn\.2",
            "text_in": r"text_embedding\.0",
            "text_out": r"text_embedding\.2",
            "time_in": r"time_embedding\.0",
            "time_out": r"time_embedding\.2",
            "time_projection": r"time_projection\.1",
            "head": r"head\.head",
        },
        {"self_attn": "self_attn", "cross_attn": "cross_attn"},
        {"q": "q", "k": "k", "v": "v", "o": "o"},
    ),
    "diffusers": _rules(
        {
            "head_modulation": "scale_shift_table",
            "modulation": "scale_shift_table",
            "norm3": "norm2",
            "ffn.up": r"ffn\.net\.0\.proj",
            "ffn.down": r"ffn\.net\.2",
            "text_in": r"condition_embedder\.text_embedder\.linear_1",
            "text_out": r"condition_embedder\.text_embedder\.linear_2",
            "time_in": r"condition_embedder\.time_embedder\.linear_1",
            "time_out": r"condition_embedder\.time_embedder\.linear_2",
            "time_projection": r"condition_embedder\.time_proj",
            "head": "proj_out",
        },
        {"attn1": "self_attn", "attn2": "cross_attn"},
        {"to_q": "q", "to_k": "k", "to_v": "v", r"to_out\.0": "o"},
    ),
}


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


def build(cfg: DiTConfig, **options: Any) -> DiT:
    """The module of these sizes; `options` are further arguments of its constructor."""
    return DiT(cfg, **options, rngs=nnx.Rngs(0))


COMPONENT = Component(
    "DiT",
    NAMINGS,
    naming,
    infer_config,
    build,
    hint_names=("num_heads", "text_len", "eps", "boundary"),
)
load = COMPONENT.load
