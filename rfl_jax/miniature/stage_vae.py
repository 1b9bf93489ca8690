"""Pretraining of the miniature's video autoencoder."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from convert import vae as vae_converter
from rfl_jax.miniature.fit import fit
from rfl_jax.miniature.world import FRAMES, SIZE, save_original, video_batch
from rfl_jax.models.wan.config import VAEConfig
from rfl_jax.models.wan.vae import VAE

WIDTH = 16  # of the first stage; Wan's has 96
KL = 1e-5  # weight of the latents' divergence from a standard normal, small: they are normalised afterwards


def train_vae(out: Path, seed: int, scale: float) -> None:
    """Wan2.1 architecture: first single frames, for which one temporal tap of each kernel is enough, then clips: pieces of
    them, of which more are seen in the same time, and at the end whole ones.
    """
    cfg = VAEConfig("2.1", WIDTH, WIDTH, 16, (0.0,) * 16, (1.0,) * 16)
    graph, params = nnx.split(VAE(cfg, remat=False, rngs=nnx.Rngs(seed)))

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

    def objective(frames: int, count: int, side: int):  # noqa: ANN202
        def loss(params: nnx.State, key: jax.Array) -> tuple[jax.Array, dict]:
            k1, k2, k3 = jax.random.split(key, 3)
            video, weight = video_batch(k1, count, frames)
            video, weight = _pieces(k3, (video, weight), side)
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
            psnr = -10 * jnp.log10(jnp.mean(jnp.clip(error, -2, 2) ** 2) / 4)
            return pixel + edges + KL * kl, {"psnr": psnr, "kl": kl}

        return loss

    def train(
        params: nnx.State, frames: int, count: int, side: int, *, steps: int, rate: float, offset: int, label: str
    ) -> nnx.State:
        return fit(
            objective(frames, count, side), params,
            steps=int(steps * scale), learning_rate=rate, seed=seed + offset, label=label, folder=out / "checkpoints",
        )  # fmt: skip

    params = train(params, 1, 16, SIZE, steps=1400, rate=2e-3, offset=1, label="vae: frames")
    params = jax.tree.map(lambda x: start_of_time(x) if is_causal(x) else x, params)
    # Three latent frames: the first, the second, which meets the first's caches, and the third, as all later ones are.
    params = train(params, 9, 3, SIZE, steps=800, rate=1e-3, offset=9, label="vae: first clips")
    params = train(params, 9, 12, SIZE // 2, steps=2200, rate=1.5e-3, offset=2, label="vae: pieces")
    params = train(params, 9, 3, SIZE, steps=450, rate=5e-4, offset=3, label="vae: clips")

    model = nnx.merge(graph, params)
    encode = jax.jit(lambda v: model.encode_moments(v)[0])
    z = np.concatenate([encode(video_batch(jax.random.key(seed + 2 + i), 4, FRAMES)[0]) for i in range(16)])
    config = {
        "_class_name": "WanVAE",
        "latents_mean": z.mean((0, 1, 2, 3)).round(4).tolist(),
        "latents_std": z.std((0, 1, 2, 3)).round(4).tolist(),
    }
    save_original(model, vae_converter.NAMINGS["original 2.1"], out / "vae" / "Wan2.1_VAE.safetensors", config)


def _pieces(key: jax.Array, arrays: tuple[jax.Array, ...], side: int) -> tuple[jax.Array, ...]:
    """The same random square of `side` pixels of each clip's arrays [b, t, h, w, c]."""
    b, t, h, w, _ = arrays[0].shape
    corners = jax.random.randint(key, (b, 2), 0, jnp.array([h - side + 1, w - side + 1]))

    def cut(x: jax.Array, corner: jax.Array) -> jax.Array:
        return jax.lax.dynamic_slice(x, (0, corner[0], corner[1], 0), (t, side, side, x.shape[-1]))

    return tuple(jax.vmap(cut)(x, corners) for x in arrays)


def _gradients(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    pad = [(0, 0)] * x.ndim
    return (
        jnp.pad(x[:, :, 1:] - x[:, :, :-1], [*pad[:2], (0, 1), *pad[3:]]),
        jnp.pad(x[:, :, :, 1:] - x[:, :, :, :-1], [*pad[:3], (0, 1), *pad[4:]]),
    )
