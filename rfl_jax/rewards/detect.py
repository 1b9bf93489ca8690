"""Face detection in fixed shapes: letterbox, SCRFD, box decoding, non-maximum suppression.

Two forms of the same pipeline, told apart by `compat`:

* `insightface`: its own 8-bit pre-processing and its overlap with the "+1 pixel" convention
  (insightface `model_zoo/scrfd.py`).
* `roll`: the original trainer's, on float pixels with an antialiased resize (ROLL `reward_fl/face_tools.py`).
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from rfl_jax.rewards.scrfd import ANCHORS, SCRFD, STRIDES, Detections

COMPATS = ("insightface", "roll")
SCORE_THRESHOLD = 0.5
OVERLAP_THRESHOLD = 0.4


@dataclasses.dataclass
class Faces:
    """Detected faces, by falling score; rows that are not `valid` are zeros.

    Attributes:
        boxes: [b, f, 4] x1, y1, x2, y2 in pixels of the image.
        kps: [b, f, 5, 2] eyes, nose, mouth corners (x, y) in pixels.
        scores: [b, f].
        valid: [b, f].
    """

    boxes: Float[Array, "b f 4"]
    kps: Float[Array, "b f 5 2"]
    scores: Float[Array, "b f"]
    valid: Bool[Array, "b f"]


jax.tree_util.register_dataclass(Faces, ["boxes", "kps", "scores", "valid"], [])


def letterbox_size(height: int, width: int, size: int) -> tuple[int, int]:
    """Height and width of an image scaled to fit a square canvas; the shorter side is truncated."""
    if height > width:
        return size, int(size / (height / width))
    return int(size * (height / width)), size


def _antialiased_weights(source: int, target: int) -> Float[np.ndarray, "{target} {source}"]:
    """Matrix of torch's antialiased bilinear resize (pixel centres at halves)."""
    scale = source / target
    centre = (np.arange(target) + 0.5) * scale
    distance = np.abs(np.arange(source)[None, :] + 0.5 - centre[:, None]) / max(scale, 1.0)
    weights = np.maximum(0.0, 1.0 - distance)
    return (weights / weights.sum(1, keepdims=True)).astype(np.float32)


def _taps(source: int, target: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """OpenCV's bilinear resize along one axis: two source indices and their weights in 1/2048."""
    position = ((np.arange(target) + 0.5) * (source / target) - 0.5).astype(np.float32)
    low = np.floor(position).astype(np.int32)
    fraction = np.where((low < 0) | (low >= source - 1), 0, position - low)
    low = np.clip(low, 0, source - 1)
    weights = [np.rint(f * 2048).astype(np.int32) for f in (1 - fraction, fraction)]
    return low, np.minimum(low + 1, source - 1), weights[0], weights[1]


def _resize_8bit(images: Float[Array, "b h w 3"], height: int, width: int) -> Float[Array, "b {height} {width} 3"]:
    """OpenCV's 8-bit bilinear resize in its own fixed-point steps, on values 0..255."""
    x = images.astype(jnp.int32)
    x0, x1, a, b = _taps(x.shape[2], width)
    rows = x[:, :, x0] * a[None, None, :, None] + x[:, :, x1] * b[None, None, :, None]
    y0, y1, c, d = _taps(x.shape[1], height)
    upper = (c[None, :, None, None] * (rows[:, y0] >> 4)) >> 16
    lower = (d[None, :, None, None] * (rows[:, y1] >> 4)) >> 16
    return jnp.asarray((upper + lower + 2) >> 2, jnp.float32)


def letterbox(
    images: Float[Array | np.ndarray, "b h w 3"], size: int, compat: str
) -> tuple[Float[Array, "b {size} {size} 3"], float]:
    """The detector's input and the scale that images were resized by.

    Args:
        images: RGB in [-1, 1].
        size: side of the square canvas; the image goes to its top left corner.
        compat: see the module.
    """
    h, w = images.shape[1:3]
    nh, nw = letterbox_size(h, w, size)
    if compat == "roll":
        rows, columns = _antialiased_weights(h, nh), _antialiased_weights(w, nw)
        precision = jax.lax.Precision.HIGHEST
        resized = jnp.einsum("ih,bhwc,jw->bijc", rows, images, columns, precision=precision)
        black = 0.0
    else:
        # insightface works on 8-bit images and a black canvas.
        eight_bit = jnp.round(jnp.clip((images + 1) * 127.5, 0, 255))
        resized = (_resize_8bit(eight_bit, nh, nw) - 127.5) / 128
        black = -127.5 / 128
    canvas = jnp.pad(resized, ((0, 0), (0, size - nh), (0, size - nw), (0, 0)), constant_values=black)
    return canvas, nh / h


def anchor_points(size: int) -> tuple[Float[np.ndarray, "n 2"], Float[np.ndarray, " n"]]:
    """Position (x, y) in canvas pixels [n, 2] and stride [n] of every anchor, in the order of SCRFD's outputs."""
    points, strides = [], []
    for stride in STRIDES:
        cells = size // stride
        y, x = np.mgrid[:cells, :cells]
        grid = np.stack([x, y], -1).reshape(-1, 2) * stride
        points.append(np.repeat(grid, ANCHORS, 0))
        strides.append(np.full(cells * cells * ANCHORS, stride))
    return np.concatenate(points).astype(np.float32), np.concatenate(strides).astype(np.float32)


def areas(boxes: Float[Array, "*b 4"]) -> Float[Array, "*b"]:
    """Square pixels of boxes x1, y1, x2, y2; 0 of a face that is not there."""
    return (boxes[..., 2] - boxes[..., 0]) * (boxes[..., 3] - boxes[..., 1])


def _suppress(
    boxes: Float[Array, "n 4"], scores: Float[Array, " n"], threshold: float, plus: float, most: int
) -> tuple[Int[Array, " {most}"], Int[Array, ""]]:
    """Greedy suppression of one image: indices of the kept boxes by falling score, and how many there are.

    Each turn keeps the best box left and drops all that overlap it by more than the threshold, so it takes as many
    turns as there are faces and needs no sort and no limit on candidates. Of more than `most` faces the largest stay: one
    that finds no place left takes that of the smallest, if it is larger.
    """
    x1, y1, x2, y2 = jnp.moveaxis(boxes, -1, 0)
    whole = (x2 - x1 + plus) * (y2 - y1 + plus)
    sizes = areas(boxes)

    def turn(state: tuple[Array, Array, Array, Array]) -> tuple[Array, Array, Array, Array]:
        left, kept, turns, count = state
        best = jnp.argmax(left)
        width = jnp.maximum(0, jnp.minimum(x2, x2[best]) - jnp.maximum(x1, x1[best]) + plus)
        height = jnp.maximum(0, jnp.minimum(y2, y2[best]) - jnp.maximum(y1, y1[best]) + plus)
        inter = width * height
        overlap = inter / (whole + whole[best] - inter)
        # Negated, so that a degenerate box (0/0) is dropped too and the loop ends.
        left = jnp.where(~(overlap <= threshold), -1.0, left).at[best].set(-1.0)
        smallest = jnp.argmin(sizes[kept])
        free = count < most
        place = jnp.where(free, count, smallest)
        enters = free | (sizes[best] > sizes[kept[smallest]])
        kept, turns = (x.at[place].set(jnp.where(enters, new, x[place])) for x, new in ((kept, best), (turns, count)))
        return left, kept, turns, count + 1

    start = jnp.where(scores >= SCORE_THRESHOLD, scores, -1.0)
    nobody = jnp.zeros(most, jnp.int32), jnp.full(most, scores.size, jnp.int32)
    _, kept, turns, count = jax.lax.while_loop(
        lambda state: jnp.max(state[0]) >= 0, turn, (start, *nobody, jnp.int32(0))
    )
    return kept[jnp.argsort(turns)], jnp.minimum(count, most)


def detect(
    detector: SCRFD,
    images: Float[Array | np.ndarray, "b h w 3"],
    *,
    size: int = 640,
    compat: str = "insightface",
    most: int = 64,
) -> Faces:
    """Faces of each image.

    Args:
        detector: an SCRFD.
        images: RGB in [-1, 1].
        size: side of the detector's square input, a multiple of 32.
        compat: "insightface" or "roll", see the module.
        most: faces kept an image, the largest of them.
    """
    canvas, scale = letterbox(images, size, compat)
    return faces_of(detector(canvas), scale, size=size, compat=compat, most=most)


def faces_of(raw: Detections, scale: float, *, size: int, compat: str, most: int) -> Faces:
    """Faces from a detector's outputs.

    Args:
        raw: of every anchor; distances in strides.
        scale: that the images were resized by.
        size: as for `detect`.
        compat: as for `detect`.
        most: as for `detect`.
    """
    points, strides = (jnp.asarray(x)[None] for x in anchor_points(size))
    low = points - raw.boxes[..., :2] * strides[..., None]
    high = points + raw.boxes[..., 2:] * strides[..., None]
    boxes = jnp.concatenate([low, high], -1) / scale
    kps = (points[:, :, None] + raw.kps * strides[..., None, None]) / scale
    plus = 1.0 if compat == "insightface" else 0.0
    kept, count = jax.vmap(lambda b, s: _suppress(b, s, OVERLAP_THRESHOLD, plus, most))(boxes, raw.scores)
    valid = jnp.arange(most)[None] < count[:, None]

    def pick(x: Float[Array, "b n *c"]) -> Float[Array, "b f *c"]:
        chosen = jax.vmap(lambda row, index: row[index])(x, kept)
        return jnp.where(valid.reshape(*valid.shape, *[1] * (chosen.ndim - 2)), chosen, 0)

    return Faces(pick(boxes), pick(kps), pick(raw.scores), valid)


def largest(faces: Faces) -> tuple[Float[Array, "b 5 2"], Float[Array, "b 4"], Bool[Array, " b"]]:
    """Keypoints and box of each image's largest face (zeros where there is none), and whether there is one."""
    index = jnp.argmax(jnp.where(faces.valid, areas(faces.boxes), -jnp.inf), 1)
    kps = jnp.take_along_axis(faces.kps, index[:, None, None, None], 1)[:, 0]
    boxes = jnp.take_along_axis(faces.boxes, index[:, None, None], 1)[:, 0]
    return kps, boxes, jnp.any(faces.valid, 1)


def largest_of(faces: Faces, most: int) -> tuple[Float[Array, "b k 5 2"], Float[Array, "b k 4"], Bool[Array, "b k"]]:
    """Keypoints and boxes of each image's `most` largest faces, the largest first (zeros where there are fewer), and whether there
    is one.
    """
    size, index = jax.lax.top_k(jnp.where(faces.valid, areas(faces.boxes), -jnp.inf), most)
    kps = jnp.take_along_axis(faces.kps, index[:, :, None, None], 1)
    return kps, jnp.take_along_axis(faces.boxes, index[:, :, None], 1), size > -jnp.inf
