"""The two families of face embedders: aligned crops in, embeddings out, whichever it is."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from rfl_jax.rewards.arcface import IResNet, IResNetConfig
from rfl_jax.rewards.mobilefacenet import MobileFaceNet, MobileFaceNetConfig

Embedder = IResNet | MobileFaceNet
EmbedderConfig = IResNetConfig | MobileFaceNetConfig


def make_embedder(cfg: EmbedderConfig, *, dtype: DTypeLike = jnp.float32, rngs: nnx.Rngs) -> Embedder:
    """The network of these sizes.

    Args:
        cfg: its class says which family.
        dtype: of the convolutions' arithmetic.
        rngs: of the first weights.
    """
    if isinstance(cfg, MobileFaceNetConfig):
        return MobileFaceNet(cfg, dtype=dtype, rngs=rngs)
    return IResNet(cfg, dtype=dtype, rngs=rngs)


def unit(x: Float[Array, "*n e"]) -> Float[Array, "*n e"]:
    """Rows of length 1; rows of zeros stay."""
    square = jnp.sum(x * x, -1, keepdims=True)
    return x * jnp.where(square > 0, jax.lax.rsqrt(jnp.where(square > 0, square, 1)), 0)
