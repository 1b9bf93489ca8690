"""The points of a face with a gradient.

Detection has none: it rounds pixels to 8 bits, picks an anchor and suppresses the others. But where the face is known, the picked
anchor's regression of the points is an ordinary network. It runs once more, on a square around the face that a small canvas takes,
a sixteenth of the work of the whole picture: where it sees the points counts for nothing, how that changes with the pixels is the
gradient of the points that were found.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from rfl_jax.rewards.align import bilinear
from rfl_jax.rewards.detect import anchor_points
from rfl_jax.rewards.scrfd import SCRFD

CANVAS = 160  # pixels: side of the square that the detector sees, whose middle half the face fills
MARGIN = 2.0  # sides of the face's box


def follow_points(
    detector: SCRFD,
    frames: Float[Array, "n h w 3"],
    kps: Float[Array, "n 5 2"],
    boxes: Float[Array, "n 4"],
    found: Bool[Array, " n"],
    *,
    size: int,
    compat: str,
) -> Float[Array, "n 5 2"]:
    """Points that were found, with the gradient of `trace_points`; where no face was found, without.

    Args:
        detector: that found them.
        frames: in [-1, 1].
        kps, boxes: of the face in pixels.
        found: whether there is one.
        size: of the detector's canvas; a smaller one than `CANVAS` is kept to.
        compat: see `rfl_jax.rewards.detect`.
    """
    traced = trace_points(detector, frames, boxes, size=min(size, CANVAS), compat=compat)
    change = jnp.where(found[:, None, None], traced - jax.lax.stop_gradient(traced), 0)
    return jax.lax.stop_gradient(kps) + change


def trace_points(
    detector: SCRFD, frames: Float[Array, "n h w 3"], boxes: Float[Array, "n 4"], *, size: int, compat: str
) -> Float[Array, "n 5 2"]:
    """The points of the faces in these boxes in pixels, as the detector sees them on a square around each; the square and the
    anchor that is asked are fixed.
    """
    low, high = boxes[:, :2], boxes[:, 2:]
    side = MARGIN * jnp.max(high - low, 1)
    step = jnp.where(side > 0, side, size)[:, None] / size  # pixels of the frame between two of the canvas
    corner = jax.lax.stop_gradient((low + high - size * step) / 2)
    step = jax.lax.stop_gradient(step)

    def cut(frame: Float[Array, "h w 3"], corner: Float[Array, " 2"], step: Float[Array, " 1"]) -> Array:
        column, row = jnp.meshgrid(*(corner[i] + step * jnp.arange(size) for i in (0, 1)))
        # Black outside the frame.
        return bilinear(frame + 1, column, row) - 1

    canvas = jax.vmap(cut)(frames, corner, step)
    raw = detector(canvas * (127.5 / 128) if compat == "insightface" else canvas)
    anchors, strides = (jnp.asarray(x) for x in anchor_points(size))
    near = anchors[None] - raw.boxes[..., :2] * strides[None, :, None]
    far = anchors[None] + raw.boxes[..., 2:] * strides[None, :, None]
    # Of the anchors that see this face, not one beside it, the surest.
    known_near, known_far = ((x - corner) / step for x in (low, high))
    inter = jnp.minimum(far, known_far[:, None]) - jnp.maximum(near, known_near[:, None])
    inter = jnp.prod(jnp.maximum(inter, 0), -1)
    union = jnp.prod(far - near, -1) + jnp.prod(known_far - known_near, -1)[:, None] - inter
    overlap = jnp.where(union > 0, inter / jnp.where(union > 0, union, 1), 0)
    best = jnp.argmax(jax.lax.stop_gradient(raw.scores * overlap), 1)
    kps = jnp.take_along_axis(raw.kps, best[:, None, None, None], 1)[:, 0]
    kps = anchors[best][:, None] + kps * strides[best][:, None, None]
    return corner[:, None] + kps * step[:, None]
