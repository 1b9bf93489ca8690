"""How much of its reward a video keeps: all of it where its face moves as the real clip's does, less where it stands still.

Landmarks are found without gradient (pixels are rounded to 8 bits before detection, and a detector that is differentiated can be
fooled), so motion is no term of the loss: it weighs the samples. A weight takes the reward from a video that stands still; it
does not move it.
"""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

Points = Float[Array, "b t 5 2"]
Found = Bool[Array, "b t"]

# Displacements, in sizes of the face, at which the similarity to the first frame has fallen to 1/e: a fifth of the
# face's size for where it is and how it is turned in the picture, a twentieth for its points among each other.
POSE_SCALE, EXPRESSION_SCALE = 0.2, 0.05


def motion(kps: Points, mask: Found) -> Float[Array, " b"]:
    """Mean absolute displacement of the five points between neighbouring frames that both have a face, in pixels; 0 where
    no two have one. The batched form of `rfl_jax.evaluation.measures.motion`.
    """
    both = mask[:, 1:] & mask[:, :-1]
    moved = jnp.mean(jnp.abs(jnp.diff(kps, axis=1)), (2, 3))
    return _mean(moved, both)


def copying(kps: Points, mask: Found) -> Float[Array, " b"]:
    """How much the later frames repeat the pose and the expression of frame 0, 0..1. The batched form of
    `rfl_jax.evaluation.measures.copying`, which says how.
    """
    centres = jnp.mean(kps, 2, keepdims=True)
    shapes = kps - centres
    first = shapes[:, :1]
    square = jnp.maximum(jnp.sum(first**2, (2, 3)), jnp.finfo(jnp.float32).tiny)
    # Least-squares similarity: one complex factor, and an offset that the centres tell.
    real = jnp.sum(first * shapes, (2, 3)) / square
    imaginary = jnp.sum(first[..., 0] * shapes[..., 1] - first[..., 1] * shapes[..., 0], 2) / square
    turned = jnp.stack([-first[..., 1], first[..., 0]], -1)
    fitted = real[..., None, None] * first + imaginary[..., None, None] * turned
    size = jnp.sqrt(square / 5)

    def distance(moved: Points) -> Float[Array, "b t"]:
        return jnp.sqrt(jnp.mean(jnp.sum(moved**2, 3), 2)) / size

    pose = distance(fitted - first + centres - centres[:, :1])
    alike = (jnp.exp(-pose / POSE_SCALE) + jnp.exp(-distance(shapes - fitted) / EXPRESSION_SCALE)) / 2
    return _mean(alike[:, 1:], mask[:, 1:] & mask[:, :1])


def _mean(values: Float[Array, "b n"], mask: Bool[Array, "b n"]) -> Float[Array, " b"]:
    """Mean of each row's masked values; 0 where there are none."""
    return jnp.sum(jnp.where(mask, values, 0), 1) / jnp.maximum(jnp.sum(mask, 1), 1)


def moving_share(motion: Float[Array, " b"], real: Float[Array, " b"], weight: float) -> Float[Array, " b"]:
    """What a sample keeps by its motion: 1 from the real clip's motion on, `1 - weight` where it stands still, in proportion
    between; 1 where the real clip stands still.
    """
    return 1 - weight * jnp.where(real > 0, jnp.maximum(1 - motion / jnp.where(real > 0, real, 1), 0), 0)


def own_share(copying: Float[Array, " b"], real: Float[Array, " b"], weight: float) -> Float[Array, " b"]:
    """What a sample keeps by its copying: 1 up to the real clip's, `1 - weight` where it only repeats its first frame (1), in
    proportion between.
    """
    beyond = jnp.maximum(copying - real, 0)
    return 1 - weight * jnp.where(real < 1, beyond / jnp.where(real < 1, 1 - real, 1), 0)
