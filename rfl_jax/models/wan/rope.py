"""Three-axis rotary position embedding (Wan2.2 `wan/modules/model.py`: rope_params, rope_apply)."""

import jax
import jax.numpy as jnp
import numpy as np
from einops import repeat
from jaxtyping import Array, Float

THETA = 10_000.0
Freqs = tuple[
    Float[Array, "n head"], Float[Array, "n head"]
]  # cosine and sine of each channel's angle, equal in a pair


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
        Two float32 arrays [frames*rows*columns, head_dim]. The angles of each axis are computed in float64.
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
    cos, sin = (repeat(jnp.concatenate(p, -1), "t h w d -> (t h w) (d two)", two=2) for p in parts)
    return cos, sin


def apply_rope(x: Float[Array, "b n k head"], freqs: Freqs) -> Float[Array, "b n k head"]:
    """Turns each consecutive pair of channels by its angle, in float32.

    A pair (a, b) becomes (a cos - b sin, b cos + a sin). The (-b, a) come from a product with a signed permutation, which is
    exact: channels stay in place, where cutting pairs out of the narrowest axis makes TPUs rearrange all of it.
    """
    cos, sin = (f[None, :, None, :] for f in freqs)
    d = x.shape[-1]
    swap = np.zeros((d, d), np.float32)
    swap[np.arange(1, d, 2), np.arange(0, d, 2)] = -1
    swap[np.arange(0, d, 2), np.arange(1, d, 2)] = 1
    swapped = jnp.matmul(
        x, jnp.asarray(swap, x.dtype), precision=jax.lax.Precision.HIGHEST, preferred_element_type=jnp.float32
    )
    return (x.astype(jnp.float32) * cos + swapped * sin).astype(x.dtype)
