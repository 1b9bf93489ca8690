"""Wan2.1 and Wan2.2 VAE: original (Wan-Video) and diffusers naming."""

from collections.abc import Mapping, Sequence

from convert.component import Component
from convert.mapping import (
    Rule,
    Shapes,
    Transform,
    conv2d,
    conv3d,
    flatten_2d,
    flatten_3d,
    pointwise_2d,
    pointwise_3d,
    target_shapes,
    unchanged,
)
from rfl_jax.errors import UserError
from rfl_jax.models.wan.config import VAE_PRESETS, VAEConfig
from rfl_jax.models.wan.vae import VAE

STAGES = 4  # len(dim_mult) of every published Wan autoencoder
RES_BLOCKS = 2


def _layer(source: str, target: str, transform: Transform) -> list[Rule]:
    return [
        Rule(rf"{source}\.weight", f"{target}.kernel", transform),
        Rule(rf"{source}\.bias", f"{target}.bias", unchanged),
    ]


def _norm(source: str, target: str, transform: Transform = flatten_3d) -> Rule:
    return Rule(rf"{source}\.gamma", f"{target}.scale", transform)


def _rules(places: Mapping[str, str], residual: Mapping[str, str], outer: Mapping[str, str]) -> list[Rule]:
    """`places`: residual blocks, resamplings and attentions, source prefix by target path."""
    rules = []
    for target, source in places.items():
        kind = target.rsplit(".", 2)[-2 if target[-1].isdigit() else -1]
        if kind == "attention":
            rules += [_norm(rf"{source}\.norm", f"{target}.norm", flatten_2d)]
            rules += _layer(rf"{source}\.to_qkv", f"{target}.qkv", pointwise_2d)
            rules += _layer(rf"{source}\.proj", f"{target}.proj", pointwise_2d)
        elif kind == "resample":
            rules += _layer(rf"{source}\.resample\.1", f"{target}.conv", conv2d)
            rules += _layer(rf"{source}\.time_conv", f"{target}.time_conv", conv3d)
        else:
            for norm, conv in (("norm1", "conv1"), ("norm2", "conv2")):
                rules += [_norm(rf"{source}\.{residual[norm]}", f"{target}.{norm}")]
                rules += _layer(rf"{source}\.{residual[conv]}", f"{target}.{conv}", conv3d)
            rules += _layer(rf"{source}\.{residual['shortcut']}", f"{target}.shortcut", pointwise_3d)
    for half in ("encoder", "decoder"):
        rules += _layer(rf"{half}\.{outer['conv_in']}", f"{half}.conv_in", conv3d)
        rules += _layer(rf"{half}\.{outer['conv_out']}", f"{half}.conv_out", conv3d)
        rules += [_norm(rf"{half}\.{outer['norm_out']}", f"{half}.norm_out")]
    rules += _layer(outer["quant"], "quant", pointwise_3d)
    rules += _layer(outer["post_quant"], "post_quant", pointwise_3d)
    return rules


def _places(
    block: str, resample: str, half: str, flat: str | None, middle: Sequence[str], blocks_a_stage: int
) -> dict[str, str]:
    """Target path -> source prefix of one half. With `flat`, stages are numbered through in one list."""
    places = dict(zip((f"{half}.middle.{n}" for n in ("block1", "attention", "block2")), middle, strict=True))
    for stage in range(STAGES):
        for i in range(blocks_a_stage):
            k = stage * (blocks_a_stage + 1) + i
            places[f"{half}.stages.{stage}.blocks.{i}"] = flat.format(k) if flat else block.format(stage, i)
        if stage < STAGES - 1:
            k = stage * (blocks_a_stage + 1) + blocks_a_stage
            places[f"{half}.stages.{stage}.resample"] = flat.format(k) if flat else resample.format(stage)
    return places


ORIGINAL_RESIDUAL = {
    "norm1": r"residual\.0",
    "conv1": r"residual\.2",
    "norm2": r"residual\.3",
    "conv2": r"residual\.6",
    "shortcut": "shortcut",
}
ORIGINAL_OUTER = {
    "conv_in": "conv1",
    "conv_out": r"head\.2",
    "norm_out": r"head\.0",
    "quant": "conv1",
    "post_quant": "conv2",
}
DIFFUSERS_RESIDUAL = {n: n for n in ("norm1", "conv1", "norm2", "conv2")} | {"shortcut": "conv_shortcut"}
DIFFUSERS_OUTER = {
    "conv_in": "conv_in",
    "conv_out": "conv_out",
    "norm_out": "norm_out",
    "quant": "quant_conv",
    "post_quant": "post_quant_conv",
}


def _original_middle(half: str) -> list[str]:
    return [rf"{half}\.middle\.{i}" for i in range(3)]


def _diffusers_middle(half: str) -> list[str]:
    return [rf"{half}\.mid_block\.{n}" for n in (r"resnets\.0", r"attentions\.0", r"resnets\.1")]


NAMINGS: dict[str, list[Rule]] = {
    "original 2.1": _rules(
        _places("", "", "encoder", r"encoder\.downsamples\.{}", _original_middle("encoder"), RES_BLOCKS)
        | _places("", "", "decoder", r"decoder\.upsamples\.{}", _original_middle("decoder"), RES_BLOCKS + 1),
        ORIGINAL_RESIDUAL,
        ORIGINAL_OUTER,
    ),
    "original 2.2": _rules(
        _places(
            r"encoder\.downsamples\.{}\.downsamples\.{}",
            rf"encoder\.downsamples\.{{}}\.downsamples\.{RES_BLOCKS}",
            "encoder", None, _original_middle("encoder"), RES_BLOCKS,
        )
        | _places(
            r"decoder\.upsamples\.{}\.upsamples\.{}",
            rf"decoder\.upsamples\.{{}}\.upsamples\.{RES_BLOCKS + 1}",
            "decoder", None, _original_middle("decoder"), RES_BLOCKS + 1,
        ),
        ORIGINAL_RESIDUAL,
        ORIGINAL_OUTER,
    ),
    "diffusers 2.1": _rules(
        _places("", "", "encoder", r"encoder\.down_blocks\.{}", _diffusers_middle("encoder"), RES_BLOCKS)
        | _places(
            r"decoder\.up_blocks\.{}\.resnets\.{}", r"decoder\.up_blocks\.{}\.upsamplers\.0",
            "decoder", None, _diffusers_middle("decoder"), RES_BLOCKS + 1,
        ),
        DIFFUSERS_RESIDUAL,
        DIFFUSERS_OUTER,
    ),
    "diffusers 2.2": _rules(
        _places(
            r"encoder\.down_blocks\.{}\.resnets\.{}", r"encoder\.down_blocks\.{}\.downsampler",
            "encoder", None, _diffusers_middle("encoder"), RES_BLOCKS,
        )
        | _places(
            r"decoder\.up_blocks\.{}\.resnets\.{}", r"decoder\.up_blocks\.{}\.upsampler",
            "decoder", None, _diffusers_middle("decoder"), RES_BLOCKS + 1,
        ),
        DIFFUSERS_RESIDUAL,
        DIFFUSERS_OUTER,
    ),
}  # fmt: skip


def naming(shapes: Shapes) -> str:
    """The table whose input convolution the source has; Wan2.2 is told by its twelve (patched) input channels."""
    family, key = (
        ("diffusers", "encoder.conv_in.weight")
        if "quant_conv.weight" in shapes
        else ("original", "encoder.conv1.weight")
    )
    if len(shapes.get(key, ())) != 5:
        raise UserError(f"VAE: missing tensor {key} of five axes")
    return f"{family} {'2.2' if shapes[key][1] == 12 else '2.1'}"


def infer_config(shapes: Shapes, hints: dict) -> VAEConfig:
    """Widths from the tensors; the latent statistics are the published ones unless `hints` has
    `latents_mean` and `latents_std` (diffusers' config.json).
    """
    name = naming(shapes)
    preset = VAE_PRESETS["wan2_2" if name.endswith("2.2") else "wan2_1"]
    found = target_shapes(NAMINGS[name], shapes)
    try:
        dim, decoder_dim = found["encoder.conv_in.kernel"][-1], found["decoder.norm_out.scale"][0]
        z_dim = found["post_quant.kernel"][0]
    except KeyError as error:
        raise UserError(f"VAE: missing tensor for {error.args[0]}") from None
    mean, std = hints.get("latents_mean", preset.latent_mean), hints.get("latents_std", preset.latent_std)
    if not len(mean) == len(std) == z_dim:
        raise UserError(
            f"VAE: {z_dim} latent channels, expected as many latents_mean ({len(mean)}) and latents_std ({len(std)})"
        )
    return VAEConfig(preset.version, dim, decoder_dim, z_dim, tuple(mean), tuple(std))


COMPONENT = Component(VAE, "VAE", NAMINGS, naming, infer_config, hint_kinds={"latents_mean": list, "latents_std": list})
load = COMPONENT.load
