"""Three-axis rotary position embedding (Wan2.2 `wan/modules/model.py`: rope_params, rope_apply)."""

import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jaxtyping import Array, Float

THETA = 10_000.0
Freqs = tuple[Float[Array, "n half"], Float[Array, "n half"]]  # cosine and sine; half of a head's width


def split_pairs(head_dim: int) -> tuple[int, int, int]:
    """How many of the head_dim/2 complex pairs turn with the frame, the row and the column."""
    spatial = head_dim // 6
    return head_dim // 2 - 2 * spatial, spatial, spatial


def rope_freqs(grid: tuple[int, int, int], head_dim: int) -> Freqs:
    """Cosine and sine of every token's angles, tokens in frame, row, column order.

    Args:
        grid: frames, rows and columns of tokens.
        head_dim: width of one attention head, even.

    Returns:
        Two float32 arrays [frames*rows*columns, head_dim/2]. The angles of each axis are computed in float64.
    """
    angles = []
    for axis, (length, pairs) in enumerate(zip(grid, split_pairs(head_dim), strict=True)):
        exponent = np.arange(pairs, dtype=np.float64) / pairs
        table = np.outer(np.arange(length), THETA**-exponent)
        shape = [1, 1, 1, pairs]
        shape[axis] = length
        angles.append(table.reshape(shape))
    # The tables are tiny; the grid is laid out by the compiler so that no large constant enters the program.
    parts = [
        [jnp.broadcast_to(jnp.asarray(f(a), jnp.float32), (*grid, a.shape[-1])) for a in angles]
        for f in (np.cos, np.sin)
    ]
    cos, sin = (rearrange(jnp.concatenate(p, -1), "t h w d -> (t h w) d") for p in parts)
    return cos, sin


def apply_rope(
    x: Float[Array, "b n k d"], freqs: tuple[Float[Array, "n d//2"], Float[Array, "n d//2"]]
) -> Float[Array, "b n k d"]:
    """Turns each consecutive pair of channels by its angle, in float32."""
    cos, sin = (f[None, :, None, :] for f in freqs)
    pairs = rearrange(x.astype(jnp.float32), "b n k (d two) -> b n k d two", two=2)
    real, imaginary = pairs[..., 0], pairs[..., 1]
    turned = jnp.stack([real * cos - imaginary * sin, real * sin + imaginary * cos], -1)
    return rearrange(turned, "b n k d two -> b n k (d two)").astype(x.dtype)
