"""Pretraining of the miniature's video autoencoder."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from convert import vae as vae_converter
from rfl_jax.miniature.fit import fit
from rfl_jax.miniature.world import FRAMES, save_original, video_batch
from rfl_jax.models.wan.config import VAEConfig
from rfl_jax.models.wan.vae import VAE


def train_vae(out: Path, seed: int, scale: float) -> None:
    """Wan2.1 architecture: first single frames, for which one temporal tap of each kernel is enough, then clips."""
    cfg = VAEConfig("2.1", 8, 8, 16, (0.0,) * 16, (1.0,) * 16)
    graph, params = nnx.split(VAE(cfg, rngs=nnx.Rngs(seed)))

    def is_causal(x: jax.Array) -> bool:
        return x.ndim == 5 and x.shape[0] == 3

    def start_of_time(kernel: jax.Array) -> jax.Array:
        """Frames taught only the last tap; the others start small. Resampling in time starts as a mean of frames on
        the way down and as a repetition on the way up.
        """
        kernel = kernel.at[:-1].multiply(0.05)
        if kernel.shape[1] == 3:
            return kernel
        c_in, c_out = kernel.shape[3:]
        identity = jnp.tile(jnp.eye(c_in), (1, c_out // c_in))[None, None, None]
        taps = jnp.array([0.0, 0.5, 0.5] if c_in == c_out else [0.0, 0.0, 1.0])
        return 0.05 * kernel + taps[:, None, None, None, None] * identity

    def objective(frames: int, count: int):  # noqa: ANN202
        def loss(params: nnx.State, key: jax.Array) -> tuple[jax.Array, dict]:
            k1, k2 = jax.random.split(key)
            video, weight = video_batch(k1, count, frames)
            if frames == 1:
                params = jax.tree.map(lambda x: x[-1:] if is_causal(x) else x, params)
            model = nnx.merge(graph, params)
            mean, log_variance = model.encode_moments(video)
            log_variance = jnp.clip(log_variance, -20, 4)
            z = mean + jnp.exp(0.5 * log_variance) * jax.random.normal(k2, mean.shape)
            error = model.decode_whole(z) - video
            pixel = jnp.mean(weight * jnp.abs(error))
            edges = sum(jnp.mean(weight[:, :, :-1, :-1] * jnp.abs(d[:, :, :-1, :-1])) for d in _gradients(error))
            kl = 0.5 * jnp.mean(mean**2 + jnp.exp(log_variance) - 1 - log_variance)
            return pixel + edges + 5e-5 * kl, {"l1": jnp.mean(jnp.abs(error)), "kl": kl}

        return loss

    params = fit(objective(1, 12), params, steps=int(1300 * scale), learning_rate=3e-3, seed=seed, label="vae: frames")
    params = jax.tree.map(lambda x: start_of_time(x) if is_causal(x) else x, params)
    params = fit(
        objective(FRAMES, 4), params, steps=int(900 * scale), learning_rate=1.2e-3, seed=seed + 1, label="vae: clips"
    )

    model = nnx.merge(graph, params)
    encode = jax.jit(lambda v: model.encode_moments(v)[0])
    z = np.concatenate([encode(video_batch(jax.random.key(seed + 2 + i), 4, FRAMES)[0]) for i in range(16)])
    config = {
        "_class_name": "WanVAE",
        "latents_mean": z.mean((0, 1, 2, 3)).round(4).tolist(),
        "latents_std": z.std((0, 1, 2, 3)).round(4).tolist(),
    }
    save_original(model, vae_converter.NAMINGS["original 2.1"], out / "vae" / "Wan2.1_VAE.safetensors", config)


def _gradients(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    pad = [(0, 0)] * x.ndim
    return (
        jnp.pad(x[:, :, 1:] - x[:, :, :-1], [*pad[:2], (0, 1), *pad[3:]]),
        jnp.pad(x[:, :, :, 1:] - x[:, :, :, :-1], [*pad[:3], (0, 1), *pad[4:]]),
    )
