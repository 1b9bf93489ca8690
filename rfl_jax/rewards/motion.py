"""How much a face moves, and how much of its reward a video keeps: all of it where its face moves as the real clip's does, less
where it stands still.

What a video keeps is a weight of the samples, on points that are found without gradient: it takes the reward from a video that
stands still, it does not move it. Terms of the reward (`rfl_jax.rewards.terms`) measure the same on points with a gradient.
"""

from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

VERSION = 2  # of what is measured; another number makes what was prepared of real clips unused

# Of jax while training, of numpy in evaluation: each array knows the functions of its own kind.
Either = Array | np.ndarray
Points = Float[Either, "b t 5 2"]
Found = Bool[Either, "b t"]

# Displacements, in sizes of the face, at which the similarity to the first frame has fallen to 1/e: a fifth of the
# face's size for where it is and how it is turned in the picture, a twentieth for its points among each other.
POSE_SCALE, EXPRESSION_SCALE = 0.2, 0.05

# Sizes of the face (root mean square distance of its points from their centre; about half of its width) beyond which no head
# moves from one frame to the next: the largest face is somebody else's then.
JUMP = 2.0


def _functions(array: Any) -> Any:
    """Those of the array's kind."""
    return array.__array_namespace__()


def motion(kps: Points, mask: Found) -> Float[Either, " b"]:
    """Mean absolute displacement of the five points between neighbouring frames that show one face, in pixels; 0 where no two do."""
    return mean_where(*moves(kps, mask))


def moves(kps: Points, mask: Found) -> tuple[Float[Either, "b t2"], Bool[Either, "b t2"]]:
    """Mean absolute displacement of the five points from each frame but the first to the one before it, in pixels, and whether
    both have a face, not further apart than `JUMP`.
    """
    xp = _functions(kps)
    centres = xp.mean(kps, axis=2)
    square = xp.mean(xp.sum((kps - centres[:, :, None]) ** 2, axis=3), axis=2)
    square = xp.maximum(square[:, 1:], square[:, :-1])
    # Points that all lie in one place tell no size.
    far = (square > 0) & (xp.sum((centres[:, 1:] - centres[:, :-1]) ** 2, axis=2) > JUMP**2 * square)
    return xp.mean(xp.abs(kps[:, 1:] - kps[:, :-1]), axis=(2, 3)), mask[:, 1:] & mask[:, :-1] & ~far


def copying(kps: Points, mask: Found) -> Float[Either, " b"]:
    """How much the later frames repeat the pose and the expression of frame 0, 1 for a video that stands still; 0 where frame 0 or
    all later ones have no face.

    A frame's points are those of frame 0 after a similarity transform (pose: place, size, turn in the picture) and a
    rest (expression, and turns out of the picture). Both are measured in sizes of the face, root mean square:
    the mean of exp(-pose / 0.2) and exp(-rest / 0.05), over later frames with a face.
    """
    return mean_where(*repeats(kps, mask))


def repeats(kps: Points, mask: Found) -> tuple[Float[Either, "b t2"], Bool[Either, "b t2"]]:
    """How much each frame but the first repeats frame 0, 0..1, see `copying`; and whether both have a face."""
    xp = _functions(kps)
    centres = xp.mean(kps, axis=2, keepdims=True)
    shapes = kps - centres
    first = shapes[:, :1]
    tiny = xp.asarray(np.finfo(np.float32).tiny, dtype=kps.dtype)
    # No face is a point.
    square = xp.maximum(xp.sum(first**2, axis=(2, 3)), tiny)
    # Least-squares similarity: one complex factor, and an offset that the centres tell.
    real = xp.sum(first * shapes, axis=(2, 3)) / square
    imaginary = xp.sum(first[..., 0] * shapes[..., 1] - first[..., 1] * shapes[..., 0], axis=2) / square
    turned = xp.stack([-first[..., 1], first[..., 0]], axis=-1)
    fitted = real[..., None, None] * first + imaginary[..., None, None] * turned
    size = xp.sqrt(square / 5)

    def distance(moved: Points) -> Float[Either, "b t"]:
        # The root of zero has no derivative.
        return xp.sqrt(xp.maximum(xp.mean(xp.sum(moved**2, axis=3), axis=2), tiny)) / size

    pose = distance(fitted - first + centres - centres[:, :1])
    alike = (xp.exp(-pose / POSE_SCALE) + xp.exp(-distance(shapes - fitted) / EXPRESSION_SCALE)) / 2
    return alike[:, 1:], mask[:, 1:] & mask[:, :1]


def mean_where(values: Float[Either, "b n"], mask: Bool[Either, "b n"]) -> Float[Either, " b"]:
    """Mean of each row's masked values; 0 where there are none."""
    xp = _functions(values)
    return xp.sum(xp.where(mask, values, 0), axis=1) / xp.maximum(xp.sum(mask, axis=1), 1)


def moving_share(motion: Float[Either, " b"], real: Float[Array, " b"], weight: float) -> Float[Array, " b"]:
    """What a sample keeps by its motion: 1 from the real clip's motion on, `1 - weight` where it stands still, in proportion
    between; 1 where the real clip stands still.
    """
    return 1 - weight * jnp.where(real > 0, jnp.maximum(1 - motion / jnp.where(real > 0, real, 1), 0), 0)


def own_share(copying: Float[Either, "*b"], real: Float[Array, "*b"], weight: float) -> Float[Array, "*b"]:
    """What a sample keeps by its copying: 1 up to the real clip's, `1 - weight` where it only repeats its first frame (1), in
    proportion between.
    """
    beyond = jnp.maximum(copying - real, 0)
    return 1 - weight * jnp.where(real < 1, beyond / jnp.where(real < 1, 1 - real, 1), 0)
