"""The face-identity reward: how much the faces of a video resemble those of the real clip."""

import dataclasses
import functools
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from rfl_jax.rewards.align import align, similarity
from rfl_jax.rewards.detect import Faces, areas, detect, largest, largest_of
from rfl_jax.rewards.embedder import Embedder, unit
from rfl_jax.rewards.people import PEOPLE, Crowd, PeopleScore, mean_of_frames, of_people, people_of, score_people
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
        people: who counts: the "largest" face of each frame, or "all" people of the real clip, each by herself.
    """

    compat: str = "insightface"
    channel_order: str = "rgb"
    detector_size: int = 640
    use_first_frame: bool = False
    people: str = "largest"


@dataclasses.dataclass
class Score:
    """Reward of a batch of videos.

    Attributes:
        score: [b] mean of `per_frame` over frames with a face, 0 where there is none; of all people over frames in which the
            real clip has any.
        per_frame: [b, t] mean cosine with the pool, 0 without a face; of all people the mean over those whom the real clip
            has in the frame.
        mask: [b, t] whether the frame has a face.
        kps: [b, t, 5, 2] the largest face's points in pixels.
        boxes: [b, t, 4] its box x1, y1, x2, y2 in pixels.
        valid: [b] whether the sample has a face in its frames and in its pool.
        people: each by herself, where all count.
    """

    score: Float[Array, " b"]
    per_frame: Float[Array, "b t"]
    mask: Bool[Array, "b t"]
    kps: Float[Array, "b t 5 2"]
    boxes: Float[Array, "b t 4"]
    valid: Bool[Array, " b"]
    people: PeopleScore | None = None


jax.tree_util.register_dataclass(Score, ["score", "per_frame", "mask", "kps", "boxes", "valid", "people"], [])


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


def usable_people(pool: Float[Array, "b p g e"], *, use_first_frame: bool = False) -> Bool[Array, "b p g"]:
    """`usable_pool` of each person's faces."""
    return jax.vmap(lambda x: usable_pool(x, use_first_frame=use_first_frame))(pool)


def real_agreement(pool: Float[Array, "b g e"], pool_mask: Bool[Array, "b g"]) -> Float[Array, " b"]:
    """What real clips score against their own faces: the mean over a pool's valid rows of each row's mean cosine with the
    other ones; infinite for a pool of fewer than two.
    """
    rows = unit(pool) * pool_mask[..., None]
    count = jnp.sum(pool_mask, -1)
    # Of all pairs' cosines, which make up the square of the rows' sum, those of a row with itself are 1.
    pairs = jnp.sum(jnp.sum(rows, 1) ** 2, -1) - count
    return jnp.where(count > 1, pairs / jnp.maximum(count * (count - 1), 1), jnp.inf)


def real_score(cfg: RewardConfig, clip: Mapping[str, Array]) -> Float[Array, " b"]:
    """What real clips score against themselves, of what `FaceReward.score` takes: `real_agreement`, of all people as their score
    is a mean.
    """
    if cfg.people == "largest":
        return real_agreement(clip["pool"], usable_pool(clip["pool"], use_first_frame=cfg.use_first_frame))
    mask = usable_people(clip["people_pool"], use_first_frame=cfg.use_first_frame)
    agreed = jax.vmap(real_agreement)(clip["people_pool"], mask)
    counts = ((areas(clip["people_boxes"]) > 0) & jnp.any(mask, 2, keepdims=True)).swapaxes(1, 2)
    return mean_of_frames(jnp.broadcast_to(agreed[:, None], counts.shape), counts)[0]


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
        kps, boxes, found = largest(self._detect(frames))
        return jax.lax.stop_gradient(kps), jax.lax.stop_gradient(boxes), found

    def find_all(self, frames: Float[Array, "n h w 3"]) -> Crowd:
        """The `PEOPLE` largest faces of each frame; no gradient."""
        return Crowd(*jax.lax.stop_gradient(largest_of(self._detect(frames), PEOPLE)))

    def _detect(self, frames: Float[Array, "n h w 3"]) -> Faces:
        return detect(self.detector, jax.lax.stop_gradient(frames), size=self.cfg.detector_size, compat=self.cfg.compat)

    def embed(
        self, frames: Float[Array, "n h w 3"], kps: Float[Array, "n 5 2"], found: Bool[Array, " n"]
    ) -> Float[Array, "n e"]:
        """Embeddings of the faces at these points; zeros where there is none."""
        crops = self._crops(frames, kps, found)
        return jnp.where(found[:, None], self.embedder(crops), 0)

    def embed_all(self, frames: Float[Array, "n h w 3"], crowd: Crowd) -> Float[Array, "n k e"]:
        """Embeddings of several faces of each frame, likewise; each costs what one costs."""
        n, k = crowd.there.shape
        crops = [self._crops(frames, crowd.kps[:, i], crowd.there[:, i]) for i in range(k)]
        crops = jnp.stack(crops, 1).reshape(n * k, *crops[0].shape[1:])
        return jnp.where(crowd.there[..., None], self.embedder(crops).reshape(n, k, -1), 0)

    def _crops(
        self, frames: Float[Array, "n h w 3"], kps: Float[Array, "n 5 2"], found: Bool[Array, " n"]
    ) -> Float[Array, "n 112 112 3"]:
        """What the embedder sees of the faces at these points.

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
        return jnp.where(found[:, None, None, None], crops, 0)

    def pool(self, frames: Float[Array, "g h w 3"]) -> tuple[Float[Array, "g e"], Bool[Array, " g"]]:
        """Embeddings of a real clip's faces (zeros without one) and where they were found."""
        kps, _, found = self.find(frames)
        return self.embed(frames, kps, found), found

    def people(self, frames: Float[Array, "g h w 3"], judge: "FaceReward | None" = None) -> dict[str, Array]:
        """What is known of a real clip's people, by name: "people_pool" [p, g, e], the embeddings of each one's faces, and
        "people_boxes" [p, g, 4] in pixels, both zeros where she is not there; "judge_people_pool" of another embedder.
        """
        crowd = self.find_all(frames)
        embeddings = self.embed_all(frames, crowd)
        face = people_of(embeddings, crowd.boxes, crowd.there)[None]
        known = {"people_pool": embeddings, "people_boxes": crowd.boxes}
        if judge is not None:
            known["judge_people_pool"] = judge.embed_all(frames, crowd)
        return {name: of_people(x[None], face)[0].swapaxes(0, 1) for name, x in known.items()}

    def see(self, video: Float[Array, "b t h w 3"], key: Array | None = None) -> "Seen":
        """Decoded videos, clamped here to [-1, 1], and the largest face of each frame.

        Args:
            video: decoded.
            key: what terms that look at some frames draw them by; evenly spaced ones without it.
        """
        b, t = video.shape[:2]
        frames = _spread(jnp.clip(video, -1, 1))
        if self.cfg.people == "largest":
            return Seen(self, frames, self.find(frames), b, t, key=key)
        crowd = self.find_all(frames)
        return Seen(self, frames, (crowd.kps[:, 0], crowd.boxes[:, 0], crowd.there[:, 0]), b, t, crowd, key)

    def score(self, seen: "Seen", clip: Mapping[str, Array]) -> Score:
        """Score of what was seen against what was prepared of the real clips: "pool", and where all people count "people_pool" and
        "people_boxes", see `people`.
        """
        if self.cfg.people == "largest":
            return self.compare(seen, clip["pool"])
        return self.compare_all(seen, clip["people_pool"], clip["people_boxes"])

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

    def compare_all(self, seen: "Seen", pool: Float[Array, "b p g e"], boxes: Float[Array, "b p g 4"]) -> Score:
        """Score of what was seen against the people of real clips, see `people`. Videos have the real clips' frames."""
        crowd, mask = seen.crowd, usable_people(pool, use_first_frame=self.cfg.use_first_frame)
        people = score_people(seen.crowd_embeddings, crowd.boxes, crowd.there, pool, mask, boxes)
        score, per_frame = mean_of_frames(people.similarity, people.counts)
        valid = jnp.any(people.valid, 1) & jnp.any(seen.mask, 1)
        return Score(score, per_frame, seen.mask, seen.kps, seen.boxes, valid, people)

    def __call__(self, video: Float[Array, "b t h w 3"], pool: Float[Array, "b g e"]) -> Score:
        """Score of decoded videos against pools of real faces, see `see` and `compare`."""
        return self.compare(self.see(video), pool)


def _spread(video: Float[Array, "b t h w 3"]) -> Float[Array, "n h w 3"]:
    """The frames of videos, spread over the mesh; black ones, which have no face, fill up what it does not divide."""
    extra = -video.shape[1] % context_shards()
    video = jnp.pad(video, ((0, 0), (0, extra), (0, 0), (0, 0), (0, 0)), constant_values=-1)
    return pin_frames(pin_tokens(video).reshape(-1, *video.shape[2:]))


@dataclasses.dataclass
class Seen:
    """Videos and what the face networks make of them. Each thing is computed once, however many terms of a reward ask for it;
    what none asks for is not computed.

    Attributes:
        faces: the networks.
        frames: the frames of all videos in [-1, 1], spread over the mesh; black ones may fill them up.
        found: points, box and whether there is one, of the largest face of each; without gradient.
        count, length: videos, and frames of each.
        several: the largest faces of each frame, where all people count.
        key: of the update, see `drawn`; None where nothing is trained.
    """

    faces: FaceReward
    frames: Float[Array, "n h w 3"]
    found: tuple[Float[Array, "n 5 2"], Float[Array, "n 4"], Bool[Array, " n"]]
    count: int
    length: int
    several: Crowd | None = None
    key: Array | None = None

    def at(self, frames: Float[Array, "n h w 3"]) -> "Seen":
        """The same faces in other frames, of which everything else is computed anew: those to differentiate by."""
        return dataclasses.replace(self, frames=frames)

    def by(self, faces: FaceReward) -> "Seen":
        """The same faces in the same frames, as other networks embed them."""
        return dataclasses.replace(self, faces=faces)

    def each(
        self, network: Callable[[Float[Array, "n h w 3"]], Array], which: Int[Array | np.ndarray, " k"] | None = None
    ) -> Array:
        """What a network makes of every frame [b, t, ...], spread over the mesh as the frames are; or of some.

        Args:
            network: of any number of frames.
            which: numbers of frames, the same of every video; the result is then [b, k, ...].
        """
        if which is None:
            return self._of_videos(network(self.frames))
        found = network(_spread(self.video[:, jnp.asarray(which)]))
        return found.reshape(self.count, -1, *found.shape[1:])[:, : len(which)]

    def drawn(self, count: int) -> Int[Array | np.ndarray, " k"]:
        """Numbers of so many frames in rising order, all of them where there are fewer: by the key each frame as likely as any
        other, without it the middles of as many equal parts.
        """
        if count >= self.length:
            return np.arange(self.length)
        if self.key is None:
            return np.array([int((i + 0.5) * self.length / count) for i in range(count)])
        return jnp.sort(jax.random.choice(self.key, self.length, (count,), replace=False))

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
    def crowd(self) -> Crowd:
        """The largest faces of each frame, [b, t, k] each, where all people count; no gradient."""
        assert self.several is not None
        return jax.tree.map(self._of_videos, self.several)

    @functools.cached_property
    def crowd_embeddings(self) -> Float[Array, "b t k e"]:
        """Of these, not normalised, zeros where there is none; differentiable in the pixels."""
        assert self.several is not None
        return self._of_videos(self.faces.embed_all(self.frames, self.several))

    @functools.cached_property
    def points(self) -> Float[Array, "b t 5 2"]:
        """`kps`, differentiable in the pixels, see `rfl_jax.rewards.points`."""
        size, compat = self.faces.cfg.detector_size, self.faces.cfg.compat
        return self._of_videos(follow_points(self.faces.detector, self.frames, *self.found, size=size, compat=compat))
