"""How a given first frame (and last frame) enters the DiT. Wan2.2 has two forms, each with the same three verbs:

* `encode`: pictures to the array `y`, once a clip;
* `apply`: latents, timesteps and `y` to what the DiT is called with;
* `keep`: what is written back into the latents between denoising steps.
"""

from typing import Protocol, runtime_checkable

import jax.numpy as jnp
from jaxtyping import Array, Float

from rfl_jax.models.wan.config import DiTConfig
from rfl_jax.models.wan.vae import VAE

Image = Float[Array, "b height width 3"]
Latents = Float[Array, "b t h w _"]
Condition = Float[Array, "b t h w _"]
Timesteps = Float[Array, "b ..."]


@runtime_checkable
class Conditioning(Protocol):
    """One form.

    Attributes:
        channels: of `y`.
        required: whether the network makes no video without a first frame.
        takes_end_image: whether a last frame can be given as well.
    """

    channels: int
    required: bool
    takes_end_image: bool

    def encode(self, vae: VAE, image: Image, frames: int, end_image: Image | None = None) -> Condition:
        """The array `y` of first frames in [-1, 1] for clips of `frames` video frames, 4n+1."""
        ...

    def apply(self, x: Latents, t: Float[Array, " b"], y: Condition) -> tuple[Latents, Timesteps]:
        """The DiT's input and its timesteps."""
        ...

    def keep(self, x: Latents, y: Condition) -> Latents:
        """Latents with what is given written back into them."""
        ...


class Concatenated:
    """Image-to-video A14B: 4 mask channels and the latents of [first frame, zeros ...] beside the noisy latents
    (ROLL / DiffSynth `WanVideoUnit_ImageEmbedderVAE`).
    """

    required = True
    takes_end_image = True

    def __init__(self, cfg: DiTConfig) -> None:
        self.channels = cfg.in_dim - cfg.out_dim

    def encode(self, vae: VAE, image: Image, frames: int, end_image: Image | None = None) -> Condition:
        z = vae.encode_first_frame(image, frames, end_image)
        b, t, h, w, _ = z.shape
        stride = vae.cfg.stride[0]
        known = jnp.zeros(frames).at[0].set(1)
        if end_image is not None:
            known = known.at[-1].set(1)
        # The first frame fills the whole of the first latent frame.
        mask = jnp.concatenate([jnp.ones(stride - 1), known]).reshape(t, stride)
        return jnp.concatenate([jnp.broadcast_to(mask[None, :, None, None], (b, t, h, w, stride)), z], -1)

    def apply(self, x: Latents, t: Float[Array, " b"], y: Condition) -> tuple[Latents, Timesteps]:
        return jnp.concatenate([x, y], -1), t

    def keep(self, x: Latents, y: Condition) -> Latents:
        del y
        return x


class FirstFrameInLatents:
    """TI2V-5B: the first latent frame is the given one, and its tokens have timestep 0."""

    required = False
    takes_end_image = False

    def __init__(self, cfg: DiTConfig) -> None:
        self.channels = cfg.out_dim
        self._patch = cfg.patch_size

    def encode(self, vae: VAE, image: Image, frames: int, end_image: Image | None = None) -> Condition:
        assert end_image is None, "this network takes no last frame"
        later = (frames - 1) // vae.cfg.stride[0]
        return jnp.pad(vae.encode(image[:, None]), ((0, 0), (0, later), (0, 0), (0, 0), (0, 0)))

    def apply(self, x: Latents, t: Float[Array, " b"], y: Condition) -> tuple[Latents, Timesteps]:
        del y
        frames, rows, columns = (size // patch for size, patch in zip(x.shape[1:4], self._patch, strict=True))
        later = jnp.repeat(jnp.arange(frames) > 0, rows * columns)
        return x, t[:, None] * later[None]

    def keep(self, x: Latents, y: Condition) -> Latents:
        return x.at[:, :1].set(y[:, :1])


def conditioning_of(cfg: DiTConfig) -> Conditioning | None:
    """The form that a network takes; None where it makes videos of text alone."""
    if cfg.first_frame_in_latents:
        return FirstFrameInLatents(cfg)
    return Concatenated(cfg) if cfg.in_dim > cfg.out_dim else None
