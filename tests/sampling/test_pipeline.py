"""Sampling: solvers and the whole pipeline against diffusers, step by step; one device and eight; what a run trained."""

import json

import numpy as np
import pytest
from PIL import Image

from rfl_jax.config import default_config, parse
from rfl_jax.miniature.world import ASSETS, TOKENIZER_FILE
from rfl_jax.models.wan.config import DIT_PRESETS, DiTConfig
from rfl_jax.sampling import pipeline as sampling
from rfl_jax.sampling.pipeline import Request, open_pipeline, options_of, start_latents
from rfl_jax.sampling.solvers import make_solver
from tests.golden import relative

SIZE, FRAMES = 32, 9
PROMPT, NEGATIVE = "A person nods and smiles, blue background.", "grey background"


@pytest.mark.parametrize(("steps", "shift"), [(1, 5.0), (2, 3.0), (3, 5.0), (8, 5.0), (30, 8.0)])
def test_unipc_is_diffusers(steps, shift):
    torch = pytest.importorskip("torch")
    diffusers = pytest.importorskip("diffusers")
    theirs = diffusers.UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift
    )
    theirs.set_timesteps(steps)
    ours = make_solver("unipc", steps, shift)
    assert np.array_equal(ours.timesteps, theirs.timesteps.numpy())
    np.testing.assert_allclose(ours.levels, theirs.sigmas.numpy(), rtol=1e-6)
    rng = np.random.default_rng(0)
    x = rng.normal(size=(1, 3, 4, 4, 2)).astype(np.float32)
    y, w = torch.from_numpy(x), rng.normal(size=(2, 2)).astype(np.float32)
    for i, t in enumerate(theirs.timesteps):
        x = ours.step(i, np.tanh(x @ w) * (1 + ours.timesteps[i] / 1000), x)
        y = theirs.step(torch.tanh(y @ torch.from_numpy(w)) * (1 + float(t) / 1000), t, y)[0]
        assert relative(x, y.numpy()) < 1e-5


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


@pytest.fixture(scope="module", params=list(TINY))
def world(request, tmp_path_factory):
    """A small random model of each kind: its folder in diffusers' naming, and diffusers' own modules."""
    torch = pytest.importorskip("torch")
    diffusers = pytest.importorskip("diffusers")
    transformers = pytest.importorskip("transformers")
    kind, cfg = request.param, TINY[request.param]
    folder = tmp_path_factory.mktemp(kind)
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
    return kind, cfg, folder, modules


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


@pytest.fixture
def one_device(monkeypatch):
    from tests.devices import make_mesh

    monkeypatch.setattr(sampling, "make_mesh", lambda sizes: make_mesh(*(max(n, 1) for n in sizes.values())))


def picture(seed, size):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (size, size, 3), np.uint8))


@pytest.mark.parametrize("solver", ["unipc", "euler"])
def test_every_step_is_diffusers_pipelines(world, solver, monkeypatch, one_device):
    import diffusers
    import torch
    import transformers

    kind, cfg, folder, modules = world
    monkeypatch.setitem(DIT_PRESETS, kind, cfg)
    size = 2 * SIZE if kind == "ti2v" else SIZE
    steps, shift, guidance, seed = 6, 3.0, (2.5, 1.5), 3
    if solver == "unipc":
        scheduler = diffusers.UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift
        )
    else:
        # Our schedule: from 1 to 0 in equal parts, shifted.
        scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=shift)
        spaced = [float(s) for s in np.linspace(1, 0, steps + 1)[:-1]]
        whole = scheduler.set_timesteps
        monkeypatch.setattr(scheduler, "set_timesteps", lambda n, device=None: whole(sigmas=spaced, device=device))
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(ASSETS / TOKENIZER_FILE), pad_token="<pad>", eos_token="</s>"
    )
    shared = {
        "tokenizer": tokenizer, "scheduler": scheduler, "boundary_ratio": cfg.boundary,
        "expand_timesteps": kind == "ti2v", "transformer_2": None, **modules,
    }  # fmt: skip
    image = None if kind == "t2v" else picture(1, size)
    if image is None:
        theirs, given = diffusers.WanPipeline(**shared), {}
    else:
        theirs = diffusers.WanImageToVideoPipeline(image_encoder=None, image_processor=None, **shared)
        given = {"image": image}
    theirs.set_progress_bar_config(disable=True)

    config = tiny_config(kind, folder)
    ours = open_pipeline(config)
    options = options_of(config, steps=steps, shift=shift, guidance=guidance, negative_prompt=NEGATIVE, solver=solver)
    request = Request(PROMPT, image, seed=seed)
    noise = start_latents(seed, ours._latents((size, size), FRAMES))
    wanted, found = [], []

    def keep(_, step, t, tensors):
        wanted.append(np.moveaxis(tensors["latents"].numpy(), 1, -1).copy())
        return {}

    with torch.no_grad():
        want = theirs(
            prompt=PROMPT, negative_prompt=NEGATIVE, height=size, width=size, num_frames=FRAMES, max_sequence_length=512,
            num_inference_steps=steps, guidance_scale=guidance[0],
            **({"guidance_scale_2": guidance[1]} if cfg.boundary else {}),
            latents=torch.from_numpy(np.moveaxis(noise, -1, 0)[None].copy()), output_type="np",
            callback_on_step_end=keep, **given,
        ).frames  # fmt: skip
    ((number, video),) = ours.sample([request], options, observe=lambda step, x: found.append(np.asarray(x)))
    assert number == 0
    assert len(found) == len(wanted) == steps
    # Where the first frame is a part of the latents it is written back before every step, here and there at other times.
    later = slice(1 if kind == "ti2v" else 0, None)
    for step in range(steps):
        assert relative(found[step][:, later], wanted[step][:, later]) < 1e-4, step
    assert np.abs(video / 255 - want[0]).max() < 1.5 / 255
