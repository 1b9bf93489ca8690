"""From five facial points to an aligned 112x112 crop, differentiable in the pixels."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from rfl_jax.models.layers import expand_to
from rfl_jax.rewards.arcface import CROP

# Eyes, nose, mouth corners (x, y) in a 112x112 crop (insightface utils/face_align.py: arcface_dst).
TEMPLATE = np.array(
    [[38.2946, 51.6963], [73.5318, 51.5014], [56.0252, 71.7366], [41.5493, 92.3655], [70.7299, 92.2041]], np.float32
)


def similarity(kps: Float[Array | np.ndarray, "*b 5 2"]) -> Float[Array, "*b 2 3"]:
    """Least-squares similarity (rotation, one scale, shift) that takes the points to the template.

    With points as complex numbers it is z -> a z + b, and a is a ratio of two sums: no decomposition is needed. It
    equals Umeyama's solution. Points that coincide give a matrix of zeros rather than a division by zero.
    """
    template = expand_to(jnp.asarray(TEMPLATE), kps)
    source_mean, target_mean = (jnp.mean(x, -2, keepdims=True) for x in (kps, template))
    p, q = kps - source_mean, template - target_mean
    norm = jnp.sum(p * p, (-2, -1))
    inverse = jnp.where(norm > 0, 1 / jnp.where(norm > 0, norm, 1), 0)
    cos = jnp.sum(p * q, (-2, -1)) * inverse
    sin = jnp.sum(p[..., 0] * q[..., 1] - p[..., 1] * q[..., 0], -1) * inverse
    rotation = jnp.stack([jnp.stack([cos, -sin], -1), jnp.stack([sin, cos], -1)], -2)
    shift = target_mean[..., 0, :] - jnp.einsum("...ij,...j->...i", rotation, source_mean[..., 0, :])
    return jnp.concatenate([rotation, shift[..., None]], -1)


def invert(matrix: Float[Array, "*b 2 3"]) -> Float[Array, "*b 2 3"]:
    """The inverse of a similarity; of a matrix of zeros, zeros."""
    a, c = matrix[..., 0, 0], matrix[..., 1, 0]
    norm = a * a + c * c
    inverse = jnp.where(norm > 0, 1 / jnp.where(norm > 0, norm, 1), 0)
    rotation = jnp.stack([jnp.stack([a, c], -1), jnp.stack([-c, a], -1)], -2) * inverse[..., None, None]
    shift = -jnp.einsum("...ij,...j->...i", rotation, matrix[..., 2])
    return jnp.concatenate([rotation, shift[..., None]], -1)


def warp(image: Float[Array, "h w c"], matrix: Float[Array, "2 3"], *, roll: bool = False) -> Float[Array, "112 112 c"]:
    """Bilinear crop of an image, zeros outside it.

    Args:
        image: any pixel scale.
        matrix: similarity from image to crop, pixel centres at whole numbers in both.
        roll: sample where the original trainer does. Its normalised grid mixes two pixel conventions: the crop's
            coordinates are stretched by W/(W-1) and the image's shrunk by (W-1)/W (likewise with H).
    """
    h, w = image.shape[:2]
    inverse = invert(matrix)
    axis = jnp.arange(CROP, dtype=jnp.float32)
    column, row = jnp.meshgrid(axis, axis)
    if roll:
        column, row = column * (w / (w - 1)), row * (h / (h - 1))
    x = inverse[0, 0] * column + inverse[0, 1] * row + inverse[0, 2]
    y = inverse[1, 0] * column + inverse[1, 1] * row + inverse[1, 2]
    if roll:
        x, y = x * ((w - 1) / w), y * ((h - 1) / h)
    return bilinear(image, x, y)


def bilinear(
    image: Float[Array, "h w c"], x: Float[Array, "h2 w2"], y: Float[Array, "h2 w2"]
) -> Float[Array, "h2 w2 c"]:
    """The image at these places in pixels, pixel centres at whole numbers; zeros outside it."""
    h, w = image.shape[:2]
    x0, y0 = jnp.floor(x), jnp.floor(y)
    fx, fy = (x - x0)[..., None], (y - y0)[..., None]

    def pixel(column: Float[Array, "h2 w2"], row: Float[Array, "h2 w2"]) -> Float[Array, "h2 w2 c"]:
        inside = (column >= 0) & (column <= w - 1) & (row >= 0) & (row <= h - 1)
        c, r = (jnp.clip(v, 0, n - 1).astype(jnp.int32) for v, n in ((column, w), (row, h)))
        return jnp.where(inside[..., None], image[r, c], 0)

    top = pixel(x0, y0) * (1 - fx) + pixel(x0 + 1, y0) * fx
    bottom = pixel(x0, y0 + 1) * (1 - fx) + pixel(x0 + 1, y0 + 1) * fx
    return top * (1 - fy) + bottom * fy


def align(
    images: Float[Array | np.ndarray, "n h w c"], matrices: Float[Array, "n 2 3"], *, roll: bool = False
) -> Float[Array, "n 112 112 c"]:
    """`warp` of each image."""
    return jax.vmap(lambda image, matrix: warp(image, matrix, roll=roll))(images, matrices)
