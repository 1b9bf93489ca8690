"""The terms on board: face identity, motion, against copying, plausible landmarks, sharpness, and those of `clip_terms`; and how
others are found.
"""

import dataclasses
import importlib
from collections.abc import Mapping
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from rfl_jax.errors import did_you_mean, first_line
from rfl_jax.models.layers import expand_to
from rfl_jax.rewards.align import TEMPLATE, similarity
from rfl_jax.rewards.clip_terms import HPS, Aesthetic, PickScore
from rfl_jax.rewards.face import SCORE_MEAN, SCORE_STD, Seen, real_agreement, usable_pool
from rfl_jax.rewards.motion import copying, mean_where, motion, moves, repeats
from rfl_jax.rewards.term import Prepared, Term, TermScore, TermSettings
from rfl_jax.settings import Above, AtLeast

LUMA = np.array([0.299, 0.587, 0.114], np.float32)
CENTRED = TEMPLATE - TEMPLATE.mean(0)
SIZE = float(np.sqrt(np.mean(np.sum(CENTRED**2, 1))))  # of the face in the template: root mean square from its centre
# Pixels: motions of less are alike, as the points are not found more exactly.
STILL = 0.1
# Differences up to which two motions (of their logarithms), the copying of two videos and their sharpness (the share that is lost)
# are as good as equal: the pull towards equality grows with the difference up to about there and is the same beyond. Without it
# the score would have a kink where training against the untrained network begins, and the first gradient would be rounding's.
NEAR_MOTION, NEAR_COPYING, NEAR_SHARPNESS = 0.1, 0.01, 0.02


class Face(Term):
    """How much the faces resemble those of the real clip, -1..1: the original's reward."""

    title = "FaceSim, reward's embedder"
    mean, std = SCORE_MEAN, SCORE_STD
    takes = ("pool",)

    def __call__(self, seen: Seen, prepared: Prepared) -> TermScore:
        score = seen.faces.compare(seen, prepared["pool"])
        return TermScore(score.score, score.valid, score.per_frame)

    def ceiling(self, seen: Seen, prepared: Prepared) -> Float[Array, " b"]:
        pool = prepared["pool"]
        return real_agreement(pool, usable_pool(pool, use_first_frame=seen.faces.cfg.use_first_frame))


class Motion(Term):
    """How much the face moves like the real clip's: 1 where its points move as far from frame to frame, towards 0 where they move
    less or more.
    """

    title = "motion like the real clip's"
    mean, std = 0.8, 0.2
    holds = True
    version = 2

    def prepare(self, seen: Seen) -> dict[str, Array]:
        return {"motion": jnp.asarray(motion(seen.kps, seen.mask)), "known": jnp.any(moves(seen.kps, seen.mask)[1], 1)}

    def __call__(self, seen: Seen, prepared: Prepared) -> TermScore:
        steps, both = map(jnp.asarray, moves(seen.points, seen.mask))
        real = prepared["motion"]
        by_step = jnp.where(both, alikeness(steps, jnp.broadcast_to(real[:, None], steps.shape)), 0)
        valid = jnp.any(both, 1) & prepared["known"]
        found = _mean(steps, both)
        return TermScore(alikeness(found, real), valid, _with_first(by_step), further(found, real))


class AntiCopy(Term):
    """How little the later frames repeat pose and expression of the first: 1 where they do no more than the real clip's, 0 for a
    video that stands still.
    """

    title = "own motion, not the first frame's copy"
    mean, std = 0.8, 0.2
    holds = True
    whole = True

    def prepare(self, seen: Seen) -> dict[str, Array]:
        return {"copying": jnp.asarray(copying(seen.kps, seen.mask))}

    def __call__(self, seen: Seen, prepared: Prepared) -> TermScore:
        alike, both = map(jnp.asarray, repeats(seen.points, seen.mask))
        real = prepared["copying"]
        by_step = jnp.where(both, own_motion(alike, jnp.broadcast_to(real[:, None], alike.shape)), 0)
        found = _mean(alike, both)
        return TermScore(own_motion(found, real), jnp.any(both, 1), _with_first(by_step), found - real)


class Landmarks(Term):
    """Whether the five points are those of a face: 1 where they lie, after the similarity that fits them to the mean face, no
    further from it than the real clip's do, towards 0 beyond.
    """

    @dataclasses.dataclass(frozen=True)
    class Settings(TermSettings):
        slack: Annotated[
            float,
            AtLeast(0),
            "Distance from the mean face beyond the real clip's that is still right, in sizes of the face.",
        ] = 0.02
        scale: Annotated[
            float, Above(0), "Distance beyond that at which the score has fallen to 1/e, in sizes of the face."
        ] = 0.05

    title = "plausible landmarks"
    mean, std = 0.9, 0.1

    def prepare(self, seen: Seen) -> dict[str, Array]:
        return {"allowed": jnp.max(jnp.where(seen.mask, from_mean_face(seen.kps), 0), 1)}

    def __call__(self, seen: Seen, prepared: Prepared) -> TermScore:
        beyond = from_mean_face(seen.points) - (prepared["allowed"] + self.cfg.slack)[:, None]
        per_frame = jnp.where(seen.mask, jnp.exp(-jnp.maximum(beyond, 0) / self.cfg.scale), 0)
        return TermScore(_mean(per_frame, seen.mask), jnp.any(seen.mask, 1), per_frame)


class Sharpness(Term):
    """How sharp the later frames are beside the first: 1 where the energy of the luma's gradient over that of frame 0 is no less than
    in the real clip, or than 1 where it rises there, 0 where nothing is left of it.
    """

    @dataclasses.dataclass(frozen=True)
    class Settings(TermSettings):
        region: Annotated[
            Literal["face", "frame"], "Where it is looked at: in the face's box, or in the whole frame."
        ] = "face"

    title = "sharpness beside frame 0"
    mean, std = 0.8, 0.2
    version = 2
    whole = True

    def prepare(self, seen: Seen) -> dict[str, Array]:
        ratio, later = self._beside_first(seen)
        # What says nothing asks for the first frame's.
        return {"sharpness": jnp.where(jnp.any(later, 1), jnp.minimum(_mean(ratio, later), 1), 1)}

    def __call__(self, seen: Seen, prepared: Prepared) -> TermScore:
        ratio, later = self._beside_first(seen)
        real = prepared["sharpness"]
        by_frame = jnp.where(later, kept(ratio, jnp.broadcast_to(real[:, None], ratio.shape)), 0)
        # By definition the first frame keeps its own.
        return TermScore(kept(_mean(ratio, later), real), jnp.any(later, 1), by_frame.at[:, 0].set(jnp.any(later, 1)))

    def _beside_first(self, seen: Seen) -> tuple[Float[Array, "b t"], Bool[Array, "b t"]]:
        """The energy of each frame over that of frame 0, and where it counts: in later frames, if both are there."""
        if self.cfg.region == "face":
            where, there = _inside(seen.boxes, seen.video.shape[2:4]), seen.mask
        else:
            where, there = jnp.ones(seen.video.shape[:4], bool), jnp.ones(seen.video.shape[:2], bool)
        energy = gradient_energy(seen.video, where)
        # What the others are measured by is not to be blurred for it.
        first = jax.lax.stop_gradient(energy[:, :1])
        later = (there & there[:, :1] & (first > 0)).at[:, 0].set(False)
        return jnp.where(later, energy / jnp.where(first > 0, first, 1), 0), later


FACE = "face"
ON_BOARD: Mapping[str, type[Term]] = {
    FACE: Face,
    "motion": Motion,
    "anti_copy": AntiCopy,
    "landmarks": Landmarks,
    "sharpness": Sharpness,
    "aesthetic": Aesthetic,
    "pick_score": PickScore,
    "hps": HPS,
}


def find_term(name: str) -> type[Term]:
    """The term of a type: one on board, or MODULE:CLASS on the import path.

    Raises:
        ValueError: there is none; the message tells what was expected.
    """
    if name in ON_BOARD:
        return ON_BOARD[name]
    module, colon, attribute = name.partition(":")
    if not colon:
        expected = f"expected one of {', '.join(ON_BOARD)}, or MODULE:CLASS, got {name!r}"
        raise ValueError(expected + did_you_mean(name, ON_BOARD))
    try:
        found = getattr(importlib.import_module(module), attribute)
    # A module is a program: whatever it raises is its author's to read, in one line.
    except Exception as error:
        raise ValueError(f"expected MODULE:CLASS on the import path, got {name!r} ({first_line(error)})") from None
    if not (isinstance(found, type) and issubclass(found, Term) and issubclass(found.Settings, TermSettings)):
        raise ValueError(f"expected a subclass of rfl_jax.rewards.term.Term, got {name!r}")
    return found


def alikeness(a: Float[Array, "*b"], b: Float[Array, "*b"]) -> Float[Array, "*b"]:
    """The smaller of two motions in pixels over the larger, its kink at equality rounded: 1 where they are alike, towards 0 where
    one is a multiple of the other.
    """
    return jnp.exp(-rounded(further(a, b), NEAR_MOTION))


def further(a: Float[Array, "*b"], b: Float[Array, "*b"]) -> Float[Array, "*b"]:
    """How much further the first of two motions in pixels goes: the logarithm of their ratio, below 0 where it goes less far."""
    return jnp.log((a + STILL) / (b + STILL))


def own_motion(copying: Float[Array, "*b"], real: Float[Array, "*b"]) -> Float[Array, "*b"]:
    """1 up to the real clip's copying, 0 for a video that only repeats its first frame, in proportion between."""
    return left(copying - real, 1 - real, NEAR_COPYING)


def kept(found: Float[Array, "*b"], real: Float[Array, "*b"]) -> Float[Array, "*b"]:
    """1 from the real clip's sharpness on, 0 where nothing is left of it, in proportion between; 1 where the real clip has none."""
    there = real > 0
    return left(1 - found / jnp.where(there, real, 1), there.astype(jnp.float32), NEAR_SHARPNESS)


def left(lost: Float[Array, "*b"], whole: Float[Array, "*b"], width: float) -> Float[Array, "*b"]:
    """The share of a whole that is left: 1 where nothing is lost, 0 where all is, in proportion between, but for the kink where
    losing begins, which is rounded; 1 where there is nothing to lose.
    """
    share = rounded(jnp.maximum(lost, 0), width) / jnp.where(whole > 0, rounded(whole, width), 1)
    return jnp.where(whole > 0, 1 - share, 1)


def rounded(difference: Float[Array, "*b"], width: float) -> Float[Array, "*b"]:
    """A difference's absolute value less about `width`, with a parabola in place of the kink: `sqrt(d**2 + width**2) - width`."""
    # So written it is exactly 0 at 0.
    return difference**2 / (jnp.sqrt(difference**2 + width**2) + width)


def from_mean_face(kps: Float[Array, "b t 5 2"]) -> Float[Array, "b t"]:
    """How far points lie from the mean face after the similarity that fits them to it: root mean square, in its size; 1 for points
    that coincide.
    """
    matrix = similarity(kps)
    fitted = jnp.einsum("btij,btpj->btpi", matrix[..., :2], kps) + matrix[..., None, :, 2]
    square = jnp.mean(jnp.sum((fitted - expand_to(jnp.asarray(TEMPLATE), fitted)) ** 2, 3), 2)
    # The root of zero has no derivative.
    return jnp.sqrt(jnp.maximum(square, np.finfo(np.float32).tiny)) / SIZE


def gradient_energy(video: Float[Array, "b t h w 3"], where: Bool[Array, "b t h w"]) -> Float[Array, "b t"]:
    """Mean square of the luma's change from a pixel to the next, right and down, over a part of each frame."""
    luma = jnp.einsum("bthwc,c->bthw", video, LUMA, precision=jax.lax.Precision.HIGHEST)
    here = luma[:, :, :-1, :-1]
    square = (luma[:, :, :-1, 1:] - here) ** 2 + (luma[:, :, 1:, :-1] - here) ** 2
    inside = where[:, :, :-1, :-1]
    return jnp.sum(jnp.where(inside, square, 0), (2, 3)) / jnp.maximum(jnp.sum(inside, (2, 3)), 1)


def _inside(boxes: Float[Array, "b t 4"], size: Any) -> Bool[Array, "b t h w"]:
    """The pixels of a frame of this height and width that lie in a box."""
    x, y = jnp.arange(size[1])[None, None, None], jnp.arange(size[0])[None, None, :, None]
    x1, y1, x2, y2 = (side[..., None, None] for side in jnp.moveaxis(boxes, -1, 0))
    return (x >= x1) & (x <= x2) & (y >= y1) & (y <= y2)


def _mean(values: Float[Array, "b n"], mask: Bool[Array, "b n"]) -> Float[Array, " b"]:
    """`mean_where` of jax's arrays."""
    return jnp.asarray(mean_where(values, mask))


def _with_first(by_step: Float[Array, "b n"]) -> Float[Array, "b t"]:
    """By frame, of what is known between frames: the first has the second's."""
    return jnp.concatenate([by_step[:, :1], by_step], 1)
