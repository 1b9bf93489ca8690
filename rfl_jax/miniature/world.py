"""What all pretraining stages share: the size of the world, its clips, and the form in which weights are stored."""

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float
from safetensors.numpy import save_file

from convert.mapping import Rule, unfill
from rfl_jax.miniature.faces import Scene, landmarks, render, sample_identity, sample_scene, visible, wander
from rfl_jax.models.weights import get_arrays

SIZE = 64  # pixels
FRAMES = 13
COMPANY = 0.15  # share of clips with two people
STEPS, SHIFT = 8, 5.0  # of sampling: what the configurations have by default

VAE_FILE = "Wan2.1_VAE.safetensors"
DIT_FILES = {
    "dit": "high_noise_model/diffusion_pytorch_model.safetensors",
    "dit2": "low_noise_model/diffusion_pytorch_model.safetensors",
}
T5_FILE = "models_t5_umt5-xxl-enc-bf16.safetensors"
TOKENIZER_FILE = "google/umt5-xxl/tokenizer.json"
DETECTOR_FILE = "antelopev2/scrfd_10g_bnkps.onnx"
EMBEDDER_FILE = "antelopev2/glintr100.onnx"
JUDGE_FILE = "judge/glintr100.onnx"


ASSETS = Path(__file__).parent / "assets"


def asset_paths(assets: Path = ASSETS) -> dict[str, str]:
    """Where the pretrained networks are, as settings of the configuration."""
    models = [*(assets / file for file in DIT_FILES.values()), assets / "umt5" / T5_FILE, assets / "vae" / VAE_FILE]
    return {
        "model_paths": json.dumps([str(file) for file in models]),
        "tokenizer_path": str((assets / TOKENIZER_FILE).parent),
        "reward_model_path": str((assets / DETECTOR_FILE).parent),
    }


def judge_path(assets: Path = ASSETS) -> str:
    """Folder of the embedder that only judges."""
    return str((assets / JUDGE_FILE).parent)


def save_original(module: nnx.Module, rules: list[Rule], file: Path, config: dict) -> None:
    """Weights in float16 under the original's names, `config` beside them."""
    arrays = {name: np.asarray(x, np.float16) for name, x in get_arrays(module).items()}
    file.parent.mkdir(parents=True, exist_ok=True)
    save_file(unfill(rules, arrays), file)
    (file.parent / "config.json").write_text(json.dumps(config, indent=1) + "\n")


def video_batch(key: jax.Array, count: int, frames: int) -> tuple[jax.Array, jax.Array]:
    """Random clips [count, frames, SIZE, SIZE, 3], and weights [count, frames, SIZE, SIZE, 1] that favour faces and, more
    so, their eyes, nose and mouth: a few pixels that tell who it is.
    """
    k1, k2, k3 = jax.random.split(key, 3)
    scene = sample_scene(k2, sample_identity(k1, count), frames, company=COMPANY)
    scene = wander(k3, scene, (0.0, 1.0))
    kps, box = landmarks(scene, SIZE)
    axis = jnp.arange(SIZE)
    grid = jnp.stack(jnp.meshgrid(axis, axis), -1)
    x1, y1, x2, y2 = jnp.moveaxis(box, -1, 0)[..., None, None]
    columns, rows = (grid[None, None, None, ..., i] for i in range(2))
    inside = (rows >= y1) & (rows <= y2) & (columns >= x1) & (columns <= x2)
    distance = jnp.sum((grid[None, None, None, None] - kps[..., None, None, :]) ** 2, -1)
    features = jnp.max(jnp.exp(-distance / (2 * 4.0**2)), 3)
    there = visible(scene)[..., None, None]
    weight = jnp.max(there * (1.0 * inside + 4.0 * features), 1)
    return render(scene, SIZE), (1.0 + weight)[..., None]


def moment(key: jax.Array, scene: Scene) -> Scene:
    """One frame of every clip, chosen at random."""
    b, _, t, _ = scene.pose.shape
    index = jax.random.randint(key, (b, 1, 1, 1), 0, t)
    identity, pose = (jnp.take_along_axis(x, index, 2) for x in (scene.identity, scene.pose))
    return dataclasses.replace(scene, identity=identity, pose=pose)


def blur(images: Float[Array, "b h w c"], factor: int) -> Float[Array, "b h w c"]:
    """Images without anything smaller than `factor` pixels."""
    b, h, w, c = images.shape
    small = images.reshape(b, h // factor, factor, w // factor, factor, c).mean((2, 4))
    return jax.image.resize(small, images.shape, "bilinear")


def degrade(key: jax.Array, images: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
    """Frames as a small generator leaves them: blurred, tinted and noisy, each to a random degree."""
    k1, k2, k3, k4 = jax.random.split(key, 4)
    lead = (images.shape[0], 1, 1, 1)
    images = images + (blur(images, 2) - images) * jax.random.uniform(k1, lead)
    tint = 0.06 * jax.random.normal(k2, (images.shape[0], 1, 1, 3))
    noise = 0.08 * jax.random.uniform(k3, lead) * jax.random.normal(k4, images.shape)
    return jnp.clip(images + tint + noise, -1, 1)
