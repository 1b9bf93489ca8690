"""Pretraining of the miniature's two experts by flow matching on encoded clips of drawn faces."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from tqdm import trange

from convert import dit as dit_converter
from convert import umt5 as umt5_converter
from convert import vae as vae_converter
from rfl_jax.data.text import PromptTokenizer
from rfl_jax.miniature.faces import prompt, render, sample_identity, sample_scene
from rfl_jax.miniature.fit import fit
from rfl_jax.miniature.world import DIT_FILES, FRAMES, SIZE, T5_FILE, TOKENIZER_FILE, VAE_FILE, save_original
from rfl_jax.models.wan.conditioning import Concatenated
from rfl_jax.models.wan.config import DIT_PRESETS
from rfl_jax.models.wan.dit import DiT

CLIPS = 3072
SHIFT = 5.0
# Noise on the conditioning latents while the experts learn, as image-to-video models are taught (Stable Video
# Diffusion's conditioning augmentation): they take over what the frame shows, but its details only roughly. A face
# that changes in the video is what the reward is there to mend.
CONDITION_NOISE = 0.5


def encoded_clips(out: Path, seed: int, count: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Latents, conditioning and text features of random clips, encoded with the stages before this one."""
    vae = vae_converter.load(out / "vae" / VAE_FILE, dtype="float32")
    encoder = umt5_converter.load(out / "umt5" / T5_FILE, dtype="float32")
    tokenizer = PromptTokenizer(out / TOKENIZER_FILE, DIT_PRESETS["mini"].text_len)
    batch = 16

    @jax.jit
    def encode(key: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        k1, k2 = jax.random.split(key)
        scene = sample_scene(k2, sample_identity(k1, batch), FRAMES)
        video = render(scene, SIZE)
        return vae.encode_whole(video), Concatenated(DIT_PRESETS["mini"]).encode(vae, video[:, 0], FRAMES), scene.words

    latents, conditions, contexts = [], [], []
    for i in trange(count // batch, desc="encoding clips", mininterval=5):
        z, y, words = encode(jax.random.fold_in(jax.random.key(seed), i))
        latents.append(np.asarray(z, np.float16))
        conditions.append(np.asarray(y, np.float16))
        ids, mask = tokenizer([prompt(w) for w in words.tolist()])
        contexts.append(np.asarray(encoder.context(jnp.asarray(ids), jnp.asarray(mask)), np.float16))
    return np.concatenate(latents), np.concatenate(conditions), np.concatenate(contexts)


def train_dit(out: Path, seed: int, scale: float) -> None:
    """Both experts: the low-noise one first, from which the high-noise one starts."""
    cfg = DIT_PRESETS["mini"]
    data = tuple(jnp.asarray(x) for x in encoded_clips(out, seed + 300, CLIPS))
    edge = cfg.boundary or 0.9
    model = DiT(cfg, remat_policy="none", rngs=nnx.Rngs(seed))
    # The head starts at zero: the first prediction is no velocity at all.
    model.head.kernel[...] = jnp.zeros_like(model.head.kernel[...])
    graph, params = nnx.split(model)

    def objective(low: float, high: float):  # noqa: ANN202
        def loss(params: nnx.State, key: jax.Array) -> tuple[jax.Array, dict]:
            k1, k2, k3, k4 = jax.random.split(key, 4)
            rows = jax.random.randint(k1, (32,), 0, data[0].shape[0])
            x, y, context = (d[rows].astype(jnp.float32) for d in data)
            y = y.at[..., 4:].add(CONDITION_NOISE * jax.random.normal(k4, x.shape))
            # Uniform on the shifted schedule between the borders.
            ends = [s / (SHIFT - (SHIFT - 1) * s) for s in (low, high)]
            s = jax.random.uniform(k2, (32,), minval=ends[0], maxval=ends[1])
            sigma = SHIFT * s / (1 + (SHIFT - 1) * s)
            noise = jax.random.normal(k3, x.shape)
            level = sigma[:, None, None, None, None]
            noisy = (1 - level) * x + level * noise
            v = nnx.merge(graph, params)(jnp.concatenate([noisy, y], -1), 1000 * sigma, context)
            value = jnp.mean((v - (noise - x)) ** 2)
            return value, {}

        return loss

    for expert, steps, (low, high), offset in (("dit2", 3200, (0.0, edge), 0), ("dit", 800, (edge, 1.0), 1)):
        params = fit(
            objective(low, high), params,
            steps=int(steps * scale), learning_rate=1.5e-3 / (1 + offset), seed=seed + 400 + offset, label=expert, ema=0.999,
        )  # fmt: skip
        config = {
            "_class_name": "WanModel",
            "model_type": "i2v",
            **{k: v for k, v in dataclasses.asdict(cfg).items() if k not in ("patch_size", "first_frame_in_latents")},
        }
        save_original(nnx.merge(graph, params), dit_converter.NAMINGS["original"], out / DIT_FILES[expert], config)
