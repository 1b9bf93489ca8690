"""Converted weights against the networks they come from, on the same random input."""

from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import onnxruntime

from convert import store
from convert.export import entries
from convert.readers import Checkpoint
from rfl_jax.errors import UserError
from rfl_jax.models.clip import CLIPConfig
from rfl_jax.rewards.arcface import CROP
from rfl_jax.rewards.embedder import unit

DETECTOR_SIZE = 320  # used where the graph leaves its input size free
# Which libraries hold the reference, beside torch.
REFERENCES = {"dit": "diffusers", "vae": "diffusers", "umt5": "transformers", "clip": "transformers"}


def check_possible(kind: str, loras: Sequence[Any]) -> None:
    """Refuses before anything is written.

    Raises:
        UserError: there is no reference to compare with.
    """
    if loras:
        raise UserError("--verify: the source is not what adapters are merged into, expected no --lora")
    missing = [name for name in ("torch", REFERENCES.get(kind, "")) if kind in REFERENCES and find_spec(name) is None]
    if missing:
        raise UserError(f"--verify: {kind} is compared with {REFERENCES[kind]}: pip install {' '.join(missing)}")


def compare(kind: str, files: Sequence[str], directory: str, *, seed: int = 0) -> list[str]:
    """A line for each output: its largest difference, relative to the output's largest value.

    Args:
        kind: one of `store.KINDS`.
        files: the source.
        directory: what was converted from it.
        seed: of the input.
    """
    model = store.open_component(kind, [directory], weights_dtype="float32" if kind in REFERENCES else None)
    if kind in store.ONNX:
        reference, found = "ONNX Runtime", face_outputs(kind, files[0], model, seed=seed)
    else:
        reference, found = REFERENCES[kind], _REFERENCES[kind](files, model, np.random.default_rng(seed))
    return [
        f"{name}: largest difference from {reference} {_difference(ours, theirs):.1e} of the largest value"
        for name, (ours, theirs) in found.items()
    ]


def _difference(ours: Any, theirs: np.ndarray) -> float:
    return float(np.abs(np.asarray(ours, np.float32).reshape(theirs.shape) - theirs).max() / np.abs(theirs).max())


Outputs = dict[str, tuple[Any, np.ndarray]]


def face_outputs(kind: str, source: str, model: Any, *, seed: int = 0) -> Outputs:
    """Ours and ONNX Runtime's outputs of a face network."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # graphs that fix their output shapes warn at other input sizes
    session = onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])
    (entry,) = session.get_inputs()
    side = entry.shape[-1]
    size = CROP if kind == "arcface" else side if isinstance(side, int) else DETECTOR_SIZE
    x = np.random.default_rng(seed).uniform(-1, 1, (1, size, size, 3)).astype(np.float32)
    outputs = session.run(None, {entry.name: np.ascontiguousarray(x.transpose(0, 3, 1, 2))})
    theirs = [np.asarray(o) for o in outputs]
    ours = jax.jit(model)(x)
    if kind == "arcface":
        return {"embedding": (ours, theirs[0])}
    parts = [np.concatenate([o.reshape(-1, o.shape[-1]) for o in theirs[i : i + 3]]) for i in (0, 3, 6)]
    names = ("scores", "boxes", "kps")
    return dict(zip(names, zip((ours.scores, ours.boxes, ours.kps), parts, strict=True), strict=True))


def _state(files: Sequence[str], original: str, rename: Any) -> dict[str, Any]:
    """The source as a torch state dict in the reference's naming, float32."""
    import torch

    checkpoint = Checkpoint([Path(file) for file in files])
    state = {key: torch.from_numpy(checkpoint.read(key).astype(np.float32)) for key in checkpoint.shapes}
    # Renamed by the reference itself, not by our tables.
    return rename(state) if original in state else state


def _dit(files: Sequence[str], model: Any, rng: np.random.Generator) -> Outputs:
    import torch
    from diffusers import WanTransformer3DModel
    from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers

    cfg = model.cfg
    theirs = WanTransformer3DModel(
        num_attention_heads=cfg.num_heads, attention_head_dim=cfg.head_dim, in_channels=cfg.in_dim,
        out_channels=cfg.out_dim, text_dim=cfg.text_dim, freq_dim=cfg.freq_dim, ffn_dim=cfg.ffn_dim,
        num_layers=cfg.num_layers, cross_attn_norm=True, qk_norm="rms_norm_across_heads", eps=cfg.eps,
    )  # fmt: skip
    theirs.load_state_dict(_state(files, "head.modulation", convert_wan_transformer_to_diffusers), strict=True)
    x = rng.normal(size=(1, 2, 4, 4, cfg.in_dim)).astype(np.float32)
    context = rng.normal(size=(1, cfg.text_len, cfg.text_dim)).astype(np.float32)
    t = np.array([700.0], np.float32)
    with torch.no_grad():
        out = theirs(
            torch.from_numpy(np.moveaxis(x, -1, 1).copy()), torch.from_numpy(t), torch.from_numpy(context),
            return_dict=False,
        )[0]  # fmt: skip
    return {"velocity": (jax.jit(model)(x, t, context), np.moveaxis(out.numpy(), 1, -1))}


def _vae(files: Sequence[str], model: Any, rng: np.random.Generator) -> Outputs:
    import torch
    from diffusers import AutoencoderKLWan
    from diffusers.loaders.single_file_utils import convert_wan_vae_to_diffusers

    cfg = model.cfg
    options: Mapping[str, Any] = {}
    if cfg.version == "2.2":
        patched = 3 * cfg.patch**2
        options = {"decoder_base_dim": cfg.decoder_dim, "is_residual": True, "in_channels": patched,
                   "out_channels": patched, "patch_size": cfg.patch}  # fmt: skip
    theirs = AutoencoderKLWan(
        base_dim=cfg.dim, z_dim=cfg.z_dim, latents_mean=list(cfg.latent_mean), latents_std=list(cfg.latent_std),
        scale_factor_spatial=cfg.stride[1], **options,
    )  # fmt: skip
    theirs.load_state_dict(_state(files, "encoder.conv1.weight", convert_wan_vae_to_diffusers), strict=True)
    side = 2 * cfg.stride[1]
    video = rng.uniform(-1, 1, (1, 5, side, side, 3)).astype(np.float32)
    with torch.no_grad():
        encoded: Any = theirs.encode(torch.from_numpy(np.moveaxis(video, -1, 1).copy()))
        raw = encoded.latent_dist.mode()
        shown: Any = theirs.decode(raw)
        decoded = np.moveaxis(shown.sample.numpy(), 1, -1)
    z = (np.moveaxis(raw.numpy(), 1, -1) - np.float32(cfg.latent_mean)) / np.float32(cfg.latent_std)
    # diffusers clamps.
    return {"latents": (jax.jit(model.encode)(video), z), "video": (jnp.clip(jax.jit(model.decode)(z), -1, 1), decoded)}


def _umt5(files: Sequence[str], model: Any, rng: np.random.Generator) -> Outputs:
    import torch
    from transformers import UMT5Config, UMT5EncoderModel

    cfg = model.cfg
    theirs = UMT5EncoderModel(
        UMT5Config(
            vocab_size=cfg.vocab, d_model=cfg.dim, d_kv=cfg.dim_attn // cfg.num_heads, d_ff=cfg.dim_ffn,
            num_layers=cfg.num_layers, num_heads=cfg.num_heads, feed_forward_proj="gated-gelu", dropout_rate=0.0,
            relative_attention_num_buckets=cfg.num_buckets, relative_attention_max_distance=cfg.max_distance,
        )
    ).eval()  # fmt: skip

    def rename(state: dict[str, Any]) -> dict[str, Any]:
        # No library knows the original's names of this network: ours are used.
        del state
        component = store.SAFETENSORS["umt5"]
        _, arrays = component.convert(list(files), dtype="float32")
        named = entries(arrays, component.namings["transformers"])
        return {entry.key: torch.from_numpy(entry.read()) for entry in named}

    state = _state(files, "token_embedding.weight", rename)
    state.setdefault("encoder.embed_tokens.weight", state["shared.weight"])
    theirs.load_state_dict(state, strict=True)
    ids = rng.integers(0, cfg.vocab, (1, 16))
    mask = np.ones_like(ids)
    with torch.no_grad():
        want = theirs(torch.from_numpy(ids), torch.from_numpy(mask)).last_hidden_state.numpy()
    return {"features": (jax.jit(model)(ids, mask), want)}


def _clip(files: Sequence[str], model: Any, rng: np.random.Generator) -> Outputs:
    import torch
    from transformers import CLIPModel

    cfg = model.cfg
    theirs = CLIPModel(clip_config(cfg)).eval()

    def rename(state: dict[str, Any]) -> dict[str, Any]:
        # No library that is asked for knows open_clip's names: ours are used.
        del state
        component = store.SAFETENSORS["clip"]
        told = {"quick_gelu": cfg.quick_gelu, "vision_heads": cfg.vision_heads, "text_heads": cfg.text_heads}
        _, arrays = component.convert(list(files), dtype="float32", **told)
        named = entries(arrays, component.namings["transformers"])
        return {entry.key: torch.from_numpy(entry.read()) for entry in named}

    state = _state(files, "visual.proj", rename)
    theirs.load_state_dict({key: x for key, x in state.items() if not key.startswith("layers.")}, strict=True)
    images = rng.normal(size=(1, cfg.image_size, cfg.image_size, 3)).astype(np.float32)
    ids = rng.integers(0, cfg.vocab - 1, (1, cfg.text_len))
    ids[:, -1] = cfg.vocab - 1
    with torch.no_grad():
        out: Any = theirs(torch.from_numpy(ids), torch.from_numpy(np.moveaxis(images, -1, 1).copy()))
    return {
        "image": (unit(jax.jit(model.vision)(images)), out.image_embeds.numpy()),
        "text": (unit(jax.jit(model.text)(ids)), out.text_embeds.numpy()),
    }


def clip_config(cfg: CLIPConfig) -> Any:
    """The same sizes as transformers' configuration."""
    from transformers import CLIPConfig, CLIPTextConfig, CLIPVisionConfig

    both = {"hidden_act": "quick_gelu" if cfg.quick_gelu else "gelu", "layer_norm_eps": cfg.eps}
    text = CLIPTextConfig(
        vocab_size=cfg.vocab, hidden_size=cfg.text_dim, intermediate_size=cfg.text_ffn, projection_dim=cfg.projection,
        num_hidden_layers=cfg.text_layers, num_attention_heads=cfg.text_heads, max_position_embeddings=cfg.text_len,
        bos_token_id=cfg.vocab - 2, eos_token_id=cfg.vocab - 1, **both,
    )  # fmt: skip
    vision = CLIPVisionConfig(
        hidden_size=cfg.vision_dim, intermediate_size=cfg.vision_ffn, projection_dim=cfg.projection,
        num_hidden_layers=cfg.vision_layers, num_attention_heads=cfg.vision_heads,
        image_size=cfg.image_size, patch_size=cfg.patch, **both,
    )  # fmt: skip
    return CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=cfg.projection)


_REFERENCES = {"dit": _dit, "vae": _vae, "umt5": _umt5, "clip": _clip}
