"""What a file that does not fit looks like, for the line that refuses it."""

import re
from collections.abc import Mapping, Sequence

# The first row that matches any key tells; what comes from elsewhere stands before what may be ours.
NETWORKS = {
    "a VAE": r"(^|\.)(encoder|decoder)\.(downsamples|upsamples|down_blocks|up_blocks|middle|mid_block|mid)\.|quant_conv",
    "a text encoder's LoRA": r"^lora_te|^text_encoder\.|text_model.*lora",
    "a T5 text encoder": r"SelfAttention|DenseReluDense|(^|\.)token_embedding\.|pos_embedding\.embedding",
    "a CLIP model": r"(^|\.)(text_model|vision_model|visual\.)",
    "Flux or HunyuanVideo": r"double_blocks|single_blocks|single_transformer_blocks|double_stream_blocks",
    "Stable Diffusion": r"(down|up|input|output|middle|mid)_blocks?[._]",
    "SD3, Qwen-Image or LTX-Video": r"transformer_blocks",
    "VACE": r"vace_blocks|vace_patch_embedding",
    "Wan2.1 I2V": r"k_img|v_img|img_emb|add_k_proj|image_embedder",
}
BLOCK = re.compile(r"blocks[._](\d+)[._](?:self_attn|cross_attn|attn1|attn2|ffn)")
WIDTHS = {1536: "Wan2.1 1.3B", 3072: "Wan2.2 TI2V 5B", 5120: "Wan 14B"}
# Of adapters: what a key contains.
ADAPTERS = {
    "LoHa": r"hada_w",
    "LoKr": r"lokr_w",
    "DoRA": r"dora_scale|lora_magnitude_vector",
    "LoRA": r"lora[._]|lora_(A|B|down|up)|\.diff(_b|_m)?$",
}
ADAPTER_NAMINGS = {
    "kohya": r"^lora_(unet|te|transformer)",
    "PEFT": r"^base_model\.model\.",
    "ComfyUI": r"^diffusion_model\.",
    "diffusers": r"^transformer(_2)?\.|attn[12]\.to_",
}


def looks_like(shapes: Mapping[str, Sequence[int]]) -> str:
    """A few words on what the tensors of a file may be, and the first of their keys.

    Args:
        shapes: by key, as the file has them.
    """
    if not shapes:
        return "the file holds no tensors"
    keys = list(shapes)
    first = ", ".join(keys[:3])
    network, adapter = _first(NETWORKS, keys), _first(ADAPTERS, keys)
    if not network and any(BLOCK.search(key) for key in keys):
        network = _wan(shapes)
    if not network and not adapter:
        return f"it begins with {first}"
    if network and network.startswith("a "):
        return f"this looks like {network}: it begins with {first}"
    kind = adapter or "network"
    naming = _first(ADAPTER_NAMINGS, keys) if adapter else ""
    where = f" in {naming} naming" if naming else ""
    return f"this looks like a {f'{network} ' if network else ''}{kind}{where}: it begins with {first}"


def _first(table: Mapping[str, str], keys: Sequence[str]) -> str:
    return next((name for name, pattern in table.items() if any(re.search(pattern, key) for key in keys)), "")


def _wan(shapes: Mapping[str, Sequence[int]]) -> str:
    """Which of the networks, by the width that enters a block's projections, and the number of blocks."""
    layers = 1 + max(int(match[1]) for key in shapes if (match := BLOCK.search(key)))
    inner = r"(self_attn[._]q|attn1[._]to_q)(\.weight|.*(lora_A|lora_down|down)\b.*weight)$"
    width = next((shape[-1] for key, shape in shapes.items() if re.search(inner, key) and len(shape) >= 2), None)
    if width is None:
        return "Wan DiT"
    return f"{WIDTHS.get(width, 'Wan DiT')} (width {width}, {layers} block{'s' if layers > 1 else ''})"
