"""Small random models of each kind in diffusers' naming, diffusers' own modules of them, and both pipelines."""

import json

import numpy as np
import pytest
from PIL import Image

from rfl_jax.config import default_config, parse
from rfl_jax.miniature.world import ASSETS, TOKENIZER_FILE
from rfl_jax.models.wan.config import DiTConfig
from rfl_jax.sampling.options import Request, options_of
from rfl_jax.sampling.pipeline import open_pipeline, start_latents
from tests.runs import few_devices

SIZE, FRAMES = 32, 9
PROMPT, NEGATIVE = "A person nods and smiles, blue background.", "grey background"
SHIFT, GUIDANCE, SEED = 3.0, (2.5, 1.5), 3


TINY = {
    "i2v": DiTConfig(
        in_dim=36, out_dim=16, dim=48, ffn_dim=64, num_heads=2, num_layers=2, freq_dim=32, text_dim=24, boundary=0.9
    ),
    "t2v": DiTConfig(
        in_dim=16, out_dim=16, dim=48, ffn_dim=64, num_heads=2, num_layers=2, freq_dim=32, text_dim=24, boundary=0.9
    ),
    "ti2v": DiTConfig(
        in_dim=48, out_dim=48, dim=48, ffn_dim=64, num_heads=2, num_layers=2, freq_dim=32, text_dim=24,
        first_frame_in_latents=True,
    ),
}  # fmt: skip


def small_world(kind, folder):
    """A small random model: its folder in diffusers' naming, and diffusers' own modules."""
    torch = pytest.importorskip("torch")
    diffusers = pytest.importorskip("diffusers")
    transformers = pytest.importorskip("transformers")
    cfg = TINY[kind]
    torch.manual_seed(0)

    def dit():
        model = diffusers.WanTransformer3DModel(
            num_attention_heads=cfg.num_heads, attention_head_dim=cfg.head_dim, in_channels=cfg.in_dim,
            out_channels=cfg.out_dim, text_dim=cfg.text_dim, freq_dim=cfg.freq_dim, ffn_dim=cfg.ffn_dim,
            num_layers=cfg.num_layers, cross_attn_norm=True, qk_norm="rms_norm_across_heads", eps=cfg.eps,
        )  # fmt: skip
        for p in model.parameters():
            p.data += 0.1 * torch.randn_like(p)
        return model.eval()

    extra = {}
    if kind == "ti2v":
        extra = {
            "decoder_base_dim": 6, "is_residual": True, "in_channels": 12, "out_channels": 12, "patch_size": 2,
            "scale_factor_spatial": 16, "latents_mean": [0.1] * 48, "latents_std": [1.5] * 48,
        }  # fmt: skip
    modules = {
        "transformer": dit(),
        "vae": diffusers.AutoencoderKLWan(base_dim=4, z_dim=cfg.out_dim, **extra).eval(),
        "text_encoder": transformers.UMT5EncoderModel(
            transformers.UMT5Config(
                vocab_size=200,
                d_model=24,
                d_kv=12,
                d_ff=40,
                num_layers=2,
                num_heads=2,
                dropout_rate=0.0,
                feed_forward_proj="gated-gelu",
            )
        ).eval(),
    }
    if cfg.boundary:
        modules["transformer_2"] = dit()
    for name, module in modules.items():
        module.save_pretrained(folder / name)
    return modules


def tiny_config(kind, folder, **changes):
    names = ["transformer", *(["transformer_2"] if TINY[kind].boundary else []), "text_encoder", "vae"]
    config = default_config()
    config.preset = kind
    config.dtype = "float32"
    config.mesh.data = config.mesh.fsdp = config.mesh.context = 1
    config.model_paths = json.dumps([str(folder / name) for name in names])
    config.tokenizer_path = str(ASSETS / TOKENIZER_FILE)
    config.data.num_frames = FRAMES
    config.data.height = config.data.width = 2 * SIZE if kind == "ti2v" else SIZE
    if not TINY[kind].boundary:
        config.trainable_models = config.lora_base_model = "dit"
    config.update_from_flattened_dict(changes)
    return parse(config)


def opened(cfg, **options):
    """A pipeline on as many of the virtual devices as its mesh has."""
    return open_pipeline(cfg, **options, devices=few_devices(cfg))


def picture(seed, size):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (size, size, 3), np.uint8))


def side(kind):
    """Rows and columns of a video."""
    return 2 * SIZE if kind == "ti2v" else SIZE


def first_picture(kind):
    """The first frame, where the kind takes one."""
    return None if kind == "t2v" else picture(1, side(kind))


def their_scheduler(solver, steps, monkeypatch):
    """Diffusers' scheduler with our noise levels."""
    import diffusers

    if solver == "unipc":
        return diffusers.UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=SHIFT
        )
    # Our schedule: from 1 to 0 in equal parts, shifted.
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=SHIFT)
    spaced = [float(s) for s in np.linspace(1, 0, steps + 1)[:-1]]
    whole = scheduler.set_timesteps
    monkeypatch.setattr(scheduler, "set_timesteps", lambda n, device=None: whole(sigmas=spaced, device=device))
    return scheduler


def their_pipeline(kind, modules, scheduler):
    """Diffusers' pipeline of the modules."""
    import diffusers
    import transformers

    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(ASSETS / TOKENIZER_FILE), pad_token="<pad>", eos_token="</s>"
    )
    shared = {
        "tokenizer": tokenizer, "scheduler": scheduler, "boundary_ratio": TINY[kind].boundary,
        "expand_timesteps": kind == "ti2v", "transformer_2": None, **modules,
    }  # fmt: skip
    if kind == "t2v":
        found = diffusers.WanPipeline(**shared)
    else:
        found = diffusers.WanImageToVideoPipeline(image_encoder=None, image_processor=None, **shared)
    found.set_progress_bar_config(disable=True)
    return found


def their_steps(kind, pipeline, noise, steps):
    """The latents after every step of diffusers' pipeline, channels last, and its video, 0..1."""
    import torch

    found, image, size = [], first_picture(kind), side(kind)

    def keep(_, step, t, tensors):
        found.append(np.moveaxis(tensors["latents"].numpy(), 1, -1).copy())
        return {}

    with torch.no_grad():
        video = pipeline(
            prompt=PROMPT, negative_prompt=NEGATIVE, height=size, width=size, num_frames=FRAMES, max_sequence_length=512,
            num_inference_steps=steps, guidance_scale=GUIDANCE[0],
            **({"guidance_scale_2": GUIDANCE[1]} if TINY[kind].boundary else {}),
            latents=torch.from_numpy(np.moveaxis(noise, -1, 0)[None].copy()), output_type="np",
            callback_on_step_end=keep, **({} if image is None else {"image": image}),
        ).frames  # fmt: skip
    return found, video[0]


def our_steps(kind, pipeline, solver, steps):
    """The same of ours, and the noise that it began with."""
    found = []
    options = options_of(
        pipeline.cfg, steps=steps, shift=SHIFT, guidance=GUIDANCE, negative_prompt=NEGATIVE, solver=solver
    )
    request = Request(PROMPT, first_picture(kind), seed=SEED)
    ((_, video),) = pipeline.sample([request], options, observe=lambda step, x: found.append(np.asarray(x)))
    size = side(kind)
    return found, video / 255, start_latents(SEED, pipeline._latents((size, size), FRAMES))
