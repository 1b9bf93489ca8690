"""The face-identity reward: how much the faces of a video resemble those of the real clip."""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from rfl_jax.rewards.align import align, similarity
from rfl_jax.rewards.detect import detect, largest
from rfl_jax.rewards.embedder import Embedder
from rfl_jax.rewards.points import follow_points
from rfl_jax.rewards.scrfd import SCRFD
from rfl_jax.sharding import context_shards, pin_frames, pin_tokens

# The original's normalisation of the score (ROLL reward_fl/modules/wan_module.py).
SCORE_MEAN, SCORE_STD, LOSS_WEIGHT = 0.54, 0.16, 0.1


@dataclasses.dataclass(frozen=True)
class RewardConfig:
    """How faces are found and compared.

    Attributes:
        compat: "insightface" (exact warp) or "roll" (the original trainer's pre-processing and crop).
        channel_order: "rgb", or "bgr" to feed ArcFace swapped channels as the original does.
        detector_size: side of the detector's square input in pixels, a multiple of 32.
        use_first_frame: whether the real clip's first frame, which the model is given, counts in the pool.
    """

    compat: str = "insightface"
    channel_order: str = "rgb"
    detector_size: int = 640
    use_first_frame: bool = False


@dataclasses.dataclass
class Score:
    """Reward of a batch of videos.

    Attributes:
        score: [b] mean cosine over frames with a face, 0 where there is none.
        per_frame: [b, t] mean cosine with the pool, 0 without a face.
        mask: [b, t] whether the frame has a face.
        kps: [b, t, 5, 2] the chosen face's points in pixels.
        boxes: [b, t, 4] its box x1, y1, x2, y2 in pixels.
        valid: [b] whether the sample has a face in its frames and in its pool.
    """

    score: Float[Array, " b"]
    per_frame: Float[Array, "b t"]
    mask: Bool[Array, "b t"]
    kps: Float[Array, "b t 5 2"]
    boxes: Float[Array, "b t 4"]
    valid: Bool[Array, " b"]


jax.tree_util.register_dataclass(Score, ["score", "per_frame", "mask", "kps", "boxes", "valid"], [])


def unit(x: Float[Array, "b n e"]) -> Float[Array, "b n e"]:
    """Rows of length 1; rows of zeros stay."""
    square = jnp.sum(x * x, -1, keepdims=True)
    return x * jnp.where(square > 0, jax.lax.rsqrt(jnp.where(square > 0, square, 1)), 0)


def cosine_with_pool(
    embeddings: Float[Array, "b t e"], pool: Float[Array, "b g e"], pool_mask: Bool[Array, "b g"]
) -> Float[Array, "b t"]:
    """Mean cosine of each embedding with the pool's valid rows; 0 where a row or the whole pool is empty."""
    cosines = jnp.einsum("bte,bge->btg", unit(embeddings), unit(pool), precision=jax.lax.Precision.HIGHEST)
    counts = jnp.sum(pool_mask, -1)[:, None]
    return jnp.sum(cosines * pool_mask[:, None], -1) / jnp.maximum(counts, 1)


def usable_pool(pool: Float[Array, "b g e"], *, use_first_frame: bool = False) -> Bool[Array, "b g"]:
    """Rows of a pool that count: those that are not all zero and, by default, not the first frame's."""
    mask = jnp.any(pool != 0, -1)
    return mask if use_first_frame else mask.at[:, 0].set(False)


def real_agreement(pool: Float[Array, "b g e"], pool_mask: Bool[Array, "b g"]) -> Float[Array, " b"]:
    """What real clips score against their own faces: the mean over a pool's valid rows of each row's mean cosine with the
    other ones; infinite for a pool of fewer than two.
    """
    rows = unit(pool) * pool_mask[..., None]
    count = jnp.sum(pool_mask, -1)
    # Of all pairs' cosines, which make up the square of the rows' sum, those of a row with itself are 1.
    pairs = jnp.sum(jnp.sum(rows, 1) ** 2, -1) - count
    return jnp.where(count > 1, pairs / jnp.maximum(count * (count - 1), 1), jnp.inf)


def reward_loss(score: Float[Array, "*b"]) -> Float[Array, "*b"]:
    """The original's loss of a score: -(score - 0.54) / 0.16 * 0.1."""
    return -(score - SCORE_MEAN) / SCORE_STD * LOSS_WEIGHT


class FaceReward(nnx.Module):
    """Detector and embedder with the rule that compares faces. Differentiable in the pixels, not through detection."""

    def __init__(self, detector: SCRFD, embedder: Embedder, cfg: RewardConfig) -> None:
        self.detector = detector
        self.embedder = embedder
        self.cfg = cfg

    def find(
        self, frames: Float[Array, "n h w 3"]
    ) -> tuple[Float[Array, "n 5 2"], Float[Array, "n 4"], Bool[Array, " n"]]:
        """Points and box of each frame's largest face in pixels, and whether there is one; no gradient."""
        faces = detect(
            self.detector, jax.lax.stop_gradient(frames), size=self.cfg.detector_size, compat=self.cfg.compat
        )
        kps, boxes, found = largest(faces)
        return jax.lax.stop_gradient(kps), jax.lax.stop_gradient(boxes), found

    def embed(
        self, frames: Float[Array, "n h w 3"], kps: Float[Array, "n 5 2"], found: Bool[Array, " n"]
    ) -> Float[Array, "n e"]:
        """Embeddings of the faces at these points; zeros where there is none.

        Under `compat="insightface"` pixels outside the frame are black, as its 8-bit warp leaves them; the
        original's are mid-grey.
        """
        matrices = similarity(kps)
        if self.cfg.compat == "roll":
            crops = align(frames, matrices, roll=True)
        else:
            crops = align(frames + 1, matrices) - 1
        if self.cfg.channel_order == "bgr":
            crops = crops[..., ::-1]
        # Frames without a face are embedded as well (shapes are fixed) and dropped, values and gradient.
        crops = jnp.where(found[:, None, None, None], crops, 0)
        return jnp.where(found[:, None], self.embedder(crops), 0)

    def pool(self, frames: Float[Array, "g h w 3"]) -> tuple[Float[Array, "g e"], Bool[Array, " g"]]:
        """Embeddings of a real clip's faces (zeros without one) and where they were found."""
        kps, _, found = self.find(frames)
        return self.embed(frames, kps, found), found

    def see(self, video: Float[Array, "b t h w 3"]) -> "Seen":
        """Decoded videos, clamped here to [-1, 1], and the largest face of each frame."""
        b, t = video.shape[:2]
        # Frames are spread over the mesh; black ones, which have no face, fill up what it does not divide.
        extra = -t % context_shards()
        video = jnp.pad(jnp.clip(video, -1, 1), ((0, 0), (0, extra), (0, 0), (0, 0), (0, 0)), constant_values=-1)
        frames = pin_frames(pin_tokens(video).reshape(-1, *video.shape[2:]))
        return Seen(self, frames, self.find(frames), b, t)

    def compare(self, seen: "Seen", pool: Float[Array, "b g e"]) -> Score:
        """Score of what was seen against pools of real faces: embeddings of the real clips' frames, zeros where they have no
        face.
        """
        mask = seen.mask
        pool_mask = usable_pool(pool, use_first_frame=self.cfg.use_first_frame)
        per_frame = cosine_with_pool(seen.embeddings, pool, pool_mask) * mask
        score = jnp.sum(per_frame, 1) / jnp.maximum(jnp.sum(mask, 1), 1)
        valid = jnp.any(mask, 1) & jnp.any(pool_mask, 1)
        return Score(score, per_frame, mask, seen.kps, seen.boxes, valid)

    def __call__(self, video: Float[Array, "b t h w 3"], pool: Float[Array, "b g e"]) -> Score:
        """Score of decoded videos against pools of real faces, see `see` and `compare`."""
        return self.compare(self.see(video), pool)


@dataclasses.dataclass
class Seen:
    """Videos and what the face networks make of them. Each thing is computed once, however many terms of a reward ask for it;
    what none asks for is not computed.

    Attributes:
        faces: the networks.
        frames: the frames of all videos in [-1, 1], spread over the mesh; black ones may fill them up.
        found: points, box and whether there is one, of the largest face of each; without gradient.
        count, length: videos, and frames of each.
    """

    faces: FaceReward
    frames: Float[Array, "n h w 3"]
    found: tuple[Float[Array, "n 5 2"], Float[Array, "n 4"], Bool[Array, " n"]]
    count: int
    length: int

    def at(self, frames: Float[Array, "n h w 3"]) -> "Seen":
        """The same faces in other frames, of which everything else is computed anew: those to differentiate by."""
        return Seen(self.faces, frames, self.found, self.count, self.length)

    def each(self, network: Callable[[Float[Array, "n h w 3"]], Array]) -> Array:
        """What a network makes of every frame [b, t, ...], spread over the mesh as the frames are."""
        return self._of_videos(network(self.frames))

    def _of_videos(self, x: Array) -> Array:
        return x.reshape(self.count, -1, *x.shape[1:])[:, : self.length]

    @functools.cached_property
    def video(self) -> Float[Array, "b t h w 3"]:
        """Pixels in [-1, 1]."""
        return self._of_videos(self.frames)

    @functools.cached_property
    def kps(self) -> Float[Array, "b t 5 2"]:
        """The five points of the largest face in pixels, zeros where there is none; no gradient."""
        return self._of_videos(self.found[0])

    @functools.cached_property
    def boxes(self) -> Float[Array, "b t 4"]:
        """Its box x1, y1, x2, y2 in pixels, zeros where there is none; no gradient."""
        return self._of_videos(self.found[1])

    @functools.cached_property
    def mask(self) -> Bool[Array, "b t"]:
        """Whether a frame has a face."""
        return self._of_videos(self.found[2])

    @functools.cached_property
    def embeddings(self) -> Float[Array, "b t e"]:
        """Of the largest face, not normalised, zeros where there is none; differentiable in the pixels."""
        kps, _, there = self.found
        return self._of_videos(self.faces.embed(self.frames, kps, there))

    @functools.cached_property
    def points(self) -> Float[Array, "b t 5 2"]:
        """`kps`, differentiable in the pixels, see `rfl_jax.rewards.points`."""
        size, compat = self.faces.cfg.detector_size, self.faces.cfg.compat
        return self._of_videos(follow_points(self.faces.detector, self.frames, *self.found, size=size, compat=compat))
