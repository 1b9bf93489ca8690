"""What the first (and last) frame tells the DiT (ROLL / DiffSynth `WanVideoUnit_ImageEmbedderVAE`)."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from rfl_jax.models.wan.vae import VAE


def first_frame_condition(
    vae: VAE, image: Float[Array, "b h w 3"], frames: int, end_image: Float[Array, "b h w 3"] | None = None
) -> Float[Array, "b t h2 w2 c"]:
    """Conditioning channels `y` of the image-to-video networks: 4 of mask, then the latents of [image, zeros...].

    Args:
        vae: autoencoder.
        image: first frame in [-1, 1].
        frames: length of the clip, 4n+1.
        end_image: last frame, if it is given too.
    """
    z = vae.encode_first_frame(image, frames, end_image)
    b, t, h, w, _ = z.shape
    stride = vae.cfg.stride[0]
    known = jnp.zeros(frames).at[0].set(1)
    if end_image is not None:
        known = known.at[-1].set(1)
    # The first frame fills the whole of the first latent frame.
    mask = jnp.concatenate([jnp.ones(stride - 1), known]).reshape(t, stride)
    return jnp.concatenate([jnp.broadcast_to(mask[None, :, None, None], (b, t, h, w, stride)), z], -1)
