"""CLIP: transformers' naming (CLIPModel) and open_clip's (CLIP), with the aesthetic predictor's head beside either."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from convert.component import Component
from convert.mapping import Rule, Shapes, Transform, conv2d, key_tables, target_shapes, transpose, unchanged
from convert.readers import PREFIXES, Checkpoint, Index
from rfl_jax.errors import UserError
from rfl_jax.models.clip import CLIP, CLIPConfig

# Patch convolution [out, in, h, w] -> [h*w*in, out].
patchify_2d = Transform(
    lambda x: conv2d.forward(x).reshape(-1, x.shape[0]),
    lambda x: conv2d.inverse(x.reshape(*[math.isqrt(x.shape[0] // 3)] * 2, 3, x.shape[1])),
)
# A number alone: [] -> [1].
scalar = Transform(lambda x: x.reshape(1), lambda x: x.reshape(()))

# A row a tensor of a layer: transformers name, open_clip name, our name, change of layout. Both towers have them.
LAYER = (
    ("layer_norm1.weight",      "ln_1.weight",          "norm1.scale",      unchanged),
    ("layer_norm1.bias",        "ln_1.bias",            "norm1.bias",       unchanged),
    ("self_attn.q_proj.weight", "attn.q.weight",        "attn.q.kernel",    transpose),
    ("self_attn.q_proj.bias",   "attn.q.bias",          "attn.q.bias",      unchanged),
    ("self_attn.k_proj.weight", "attn.k.weight",        "attn.k.kernel",    transpose),
    ("self_attn.k_proj.bias",   "attn.k.bias",          "attn.k.bias",      unchanged),
    ("self_attn.v_proj.weight", "attn.v.weight",        "attn.v.kernel",    transpose),
    ("self_attn.v_proj.bias",   "attn.v.bias",          "attn.v.bias",      unchanged),
    ("self_attn.out_proj.weight", "attn.out_proj.weight", "attn.out.kernel", transpose),
    ("self_attn.out_proj.bias", "attn.out_proj.bias",   "attn.out.bias",    unchanged),
    ("layer_norm2.weight",      "ln_2.weight",          "norm2.scale",      unchanged),
    ("layer_norm2.bias",        "ln_2.bias",            "norm2.bias",       unchanged),
    ("mlp.fc1.weight",          "mlp.c_fc.weight",      "up.kernel",        transpose),
    ("mlp.fc1.bias",            "mlp.c_fc.bias",        "up.bias",          unchanged),
    ("mlp.fc2.weight",          "mlp.c_proj.weight",    "down.kernel",      transpose),
    ("mlp.fc2.bias",            "mlp.c_proj.bias",      "down.bias",        unchanged),
)  # fmt: skip
TENSORS = (
    ("logit_scale",                                     "logit_scale",                  "logit_scale",              scalar),
    ("vision_model.embeddings.class_embedding",         "visual.class_embedding",       "vision.summary",           unchanged),
    ("vision_model.embeddings.patch_embedding.weight",  "visual.conv1.weight",          "vision.patch.kernel",      patchify_2d),
    ("vision_model.embeddings.position_embedding.weight", "visual.positional_embedding", "vision.positions",        unchanged),
    ("vision_model.pre_layrnorm.weight",                "visual.ln_pre.weight",         "vision.norm_in.scale",     unchanged),
    ("vision_model.pre_layrnorm.bias",                  "visual.ln_pre.bias",           "vision.norm_in.bias",      unchanged),
    ("vision_model.post_layernorm.weight",              "visual.ln_post.weight",        "vision.norm_out.scale",    unchanged),
    ("vision_model.post_layernorm.bias",                "visual.ln_post.bias",          "vision.norm_out.bias",     unchanged),
    ("text_model.embeddings.token_embedding.weight",    "token_embedding.weight",       "text.embedding",           unchanged),
    ("text_model.embeddings.position_embedding.weight", "positional_embedding",         "text.positions",           unchanged),
    ("text_model.final_layer_norm.weight",              "ln_final.weight",              "text.norm_out.scale",      unchanged),
    ("text_model.final_layer_norm.bias",                "ln_final.bias",                "text.norm_out.bias",       unchanged),
    *((f"vision_model.encoder.layers.*.{a}", f"visual.transformer.resblocks.*.{b}", f"vision.blocks.{c}", t) for a, b, c, t in LAYER),
    *((f"text_model.encoder.layers.*.{a}", f"transformer.resblocks.*.{b}", f"text.blocks.{c}", t) for a, b, c, t in LAYER),
)  # fmt: skip
NAMINGS = key_tables("transformers", "open_clip", TENSORS)
# The same in two layouts.
NAMINGS["transformers"] += [
    Rule(r"visual_projection\.weight", "vision.projection.kernel", transpose),
    Rule(r"text_projection\.weight", "text.projection.kernel", transpose),
]
NAMINGS["open_clip"] += [
    Rule(r"visual\.proj", "vision.projection.kernel"),
    Rule(r"text_projection", "text.projection.kernel"),
]
# Of the aesthetic predictor, whose numbers count its dropouts too.
HEAD_LAYERS = (0, 2, 4, 6, 7)
for rules in NAMINGS.values():
    for ours, theirs in enumerate(HEAD_LAYERS):
        rules.append(Rule(rf"layers\.{theirs}\.weight", f"head.{ours}.kernel", transpose))
        rules.append(Rule(rf"layers\.{theirs}\.bias", f"head.{ours}.bias"))

# Attention heads of the published towers, by their width.
HEADS = {512: 8, 768: 12, 1024: 16, 1280: 16, 1408: 16, 1664: 16}
ACTIVATIONS = {"quick_gelu": True, "gelu": False}
PARTS = ("q", "k", "v")


class Unfused(Checkpoint):
    """A checkpoint in which attention's one projection to queries, keys and values, as open_clip has it, is three tensors."""

    def __init__(self, sources: Sequence[Path], *, prefixes: Sequence[str] = PREFIXES) -> None:
        super().__init__(sources, prefixes=prefixes)
        self._fused: dict[str, tuple[str, int, int]] = {}
        for key in [key for key in self.shapes if key.endswith((".in_proj_weight", ".in_proj_bias"))]:
            rows, *rest = self.shapes[key] or (0,)
            if not rows or rows % len(PARTS):
                raise UserError(
                    f"{self.name(key)} has shape {list(self.shapes[key])}, expected queries, keys and values"
                )
            del self.shapes[key]
            base, _, last = key.rpartition(".")
            for i, part in enumerate(PARTS):
                name = f"{base}.{part}.{last.removeprefix('in_proj_')}"
                if name in self.shapes:
                    raise UserError(f"{self.name(key)}: {name} is there as well, expected one of them")
                size = rows // len(PARTS)
                self.shapes[name] = (size, *rest)
                self._fused[name] = (key, i * size, size)

    def origin(self, key: str) -> Path:
        return super().origin(self._stored_key(key))

    def name(self, key: str) -> str:
        return super().name(self._stored_key(key))

    def dtype(self, key: str) -> np.dtype:
        return super().dtype(self._stored_key(key))

    def read(self, key: str, index: Index = ()) -> np.ndarray:
        if key not in self._fused:
            return super().read(key, index)
        stored, start, size = self._fused[key]
        first, *rest = index or (slice(None),)
        begin, end, step = first.indices(size)
        return super().read(stored, (slice(start + begin, start + end, step), *rest))

    def _stored_key(self, key: str) -> str:
        return self._fused[key][0] if key in self._fused else key


def naming(shapes: Shapes) -> str:
    """Which table the keys belong to."""
    return "open_clip" if any(key.startswith("visual.") for key in shapes) else "transformers"


def infer_config(shapes: Shapes, hints: dict) -> CLIPConfig:
    """Sizes from the tensors; `hints` may set what weights do not tell: `vision_heads`, `text_heads`, `quick_gelu`, `eps`.

    Of the published widths the heads are known. Which GELU is not in transformers' naming, where both are usual; open_clip's own
    weights have the exact one.
    """
    name = naming(shapes)
    found = target_shapes(NAMINGS[name], shapes)
    try:
        vision_layers, vision_dim, vision_ffn = found["vision.blocks.up.kernel"]
        text_layers, text_dim, text_ffn = found["text.blocks.up.kernel"]
        rows, tokens = found["vision.patch.kernel"][0], found["vision.positions"][0]
        vocab, text_len = found["text.embedding"][0], found["text.positions"][0]
        projection = found["vision.projection.kernel"][1]
    except KeyError as error:
        raise UserError(f"CLIP: missing tensor for {error.args[0]}") from None
    if "quick_gelu" not in hints and name == "transformers":
        raise UserError(
            "CLIP: quick_gelu is not told by weights, expected a config.json beside them or --set quick_gelu="
        )
    patch = math.isqrt(rows // 3)
    head = [found[key] for i in range(len(HEAD_LAYERS)) if (key := f"head.{i}.kernel") in found]
    return CLIPConfig(
        image_size=math.isqrt(tokens - 1) * patch, patch=patch,
        vision_dim=vision_dim, vision_ffn=vision_ffn, vision_layers=vision_layers,
        vision_heads=_heads("vision_heads", vision_dim, hints),
        vocab=vocab, text_len=text_len,
        text_dim=text_dim, text_ffn=text_ffn, text_layers=text_layers, text_heads=_heads("text_heads", text_dim, hints),
        projection=projection, quick_gelu=hints.get("quick_gelu", False),
        head=(head[0][0], *(width for _, width in head)) if head else (), eps=hints.get("eps", 1e-5),
    )  # fmt: skip


def _heads(name: str, width: int, hints: dict) -> int:
    heads = hints.get(name, HEADS.get(width, 0))
    if not heads or width % heads:
        told = (
            f"{name}={heads} does not divide the width {width}"
            if heads
            else f"{name} of the width {width} is not known"
        )
        raise UserError(f"CLIP: {told}, expected a config.json beside the weights or --set {name}=")
    return heads


def read_sidecar(content: dict[str, Any]) -> dict[str, Any]:
    """What of transformers' config.json weights do not tell, by our names; what it leaves out has transformers' defaults.

    Raises:
        UserError: an activation that is neither of both, or not the same in both towers.
    """
    vision, text = content.get("vision_config"), content.get("text_config")
    if not isinstance(vision, dict) or not isinstance(text, dict):
        return {}
    kinds = {tower.get("hidden_act", "quick_gelu") for tower in (vision, text)}
    if len(kinds) > 1 or not kinds <= ACTIVATIONS.keys():
        told = " and ".join(sorted(map(str, kinds)))
        raise UserError(f"config.json: hidden_act is {told}, expected quick_gelu or gelu in both towers")
    return {
        "vision_heads": vision.get("num_attention_heads", 12),
        "text_heads": text.get("num_attention_heads", 8),
        "quick_gelu": ACTIVATIONS[kinds.pop()],
        "eps": vision.get("layer_norm_eps"),
    }


COMPONENT = Component(
    CLIP, "CLIP", NAMINGS, naming, infer_config,
    hint_kinds={"vision_heads": int, "text_heads": int, "quick_gelu": bool, "eps": float},
    read_sidecar=read_sidecar, checkpoint=Unfused,
)  # fmt: skip
load = COMPONENT.load
