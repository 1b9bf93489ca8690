"""Several people: who is who in a real clip, and in a video that is to keep all of them.

Faces go to people frame by frame by the assignment that costs least in all (the Hungarian algorithm): each face to one person at
most, each person one face at most. What it costs to take a face for a person is how unlike it is, 1 - cosine, and how far from
where she was: the distance of the boxes' centres in sides of her box, for each frame since she was last seen, at most 1.

The two kinds of video are told apart by what place is worth. In a real clip faces do not change: likeness decides, and place
between those who look alike. In a generated one they do, and that is what is to be seen: there place decides. A person is followed
from where she is in the first frame, which is given; what she looks like counts only between faces that are less than half a side
apart, as where people pass each other. Her face is then compared with her own of the real clip. So

* a person who **vanished** has similarity 0 in each frame in which the real clip has her,
* of two people who **merged** into one face one has it and the other 0,
* two people who **swapped** faces are both compared with the wrong one.

Nothing is differentiated but the similarities of faces that were assigned.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int
from optax.assignment import hungarian_algorithm

from rfl_jax.rewards.detect import areas
from rfl_jax.rewards.embedder import unit
from rfl_jax.sharding import gather

PEOPLE = 4  # a clip, at most, and faces that are looked at in a frame: the largest
TRACKS = 16  # that are followed through a real clip before the largest people are chosen
# Frames that somebody is seen in, at least, and at least this share of the clip's. One who hides behind a hand or turns to profile
# may be unlike herself for some frames, which would make a second person of her.
LEAST, LEAST_SHARE = 2, 0.2
VERSION = 2  # of what is prepared; a new number makes old files unused

# Cosine that a face has at least with a person, where she was and anywhere else; those of different people lie around 0.
SAME_PLACE, ELSEWHERE = 0.15, 0.3
# What a full side away costs.
REAL_PLACE = ELSEWHERE - SAME_PLACE
VIDEO_PLACE = 2.0
NOBODY = -1


@dataclasses.dataclass
class Crowd:
    """The largest faces of each frame, the largest first; rows where there is none are zeros. Without gradient.

    Attributes:
        kps: their five points in pixels.
        boxes: x1, y1, x2, y2 in pixels.
        there: whether there is one.
    """

    kps: Float[Array, "*n k 5 2"]
    boxes: Float[Array, "*n k 4"]
    there: Bool[Array, "*n k"]


@dataclasses.dataclass
class PeopleScore:
    """How much the people of videos resemble those of the real clips.

    Attributes:
        similarity: [b, t, p] of each person's face, mean cosine with her faces of the real clip; 0 where she has none.
        face: [b, t, p] which of a frame's faces is hers, `NOBODY` if none.
        boxes: [b, t, p, 4] its box in pixels, zeros if none.
        counts: [b, t, p] whether she counts: she is there in this frame of the real clip.
        score: [b, p] mean over the frames in which she counts.
        valid: [b, p] whether there are any.
    """

    similarity: Float[Array, "b t p"]
    face: Int[Array, "b t p"]
    boxes: Float[Array, "b t p 4"]
    counts: Bool[Array, "b t p"]
    score: Float[Array, "b p"]
    valid: Bool[Array, "b p"]


_FIELDS = [field.name for field in dataclasses.fields(PeopleScore)]
jax.tree_util.register_dataclass(Crowd, ["kps", "boxes", "there"], [])
jax.tree_util.register_dataclass(PeopleScore, _FIELDS, [])


def assign(cost: Float[Array, "p k"], limit: float) -> Int[Array, " p"]:
    """For each row its column in the assignment that costs least, `NOBODY` where none costs less than the limit.

    Args:
        cost: of each pair; infinity where it is impossible.
        limit: what it costs to leave a row or a column alone, whichever are fewer.
    """
    rows, columns = hungarian_algorithm(jnp.minimum(cost, limit))
    chosen = jnp.where(cost[rows, columns] < limit, columns, NOBODY)
    return jnp.full(cost.shape[0], NOBODY).at[rows].set(chosen)


def distances(
    places: Float[Array, "p 4"], known: Bool[Array, " p"], missed: Int[Array, " p"], boxes: Float[Array, "k 4"]
) -> Float[Array, "p k"]:
    """How far faces are from where people were, 0..1: in sides of their box, for each frame since; 1 where that is not known.

    Args:
        places: boxes of people where they were.
        known: whether they were anywhere.
        missed: frames from then to now.
        boxes: of the faces.
    """

    def centres(x: Float[Array, "n 4"]) -> Float[Array, "n 2"]:
        return (x[:, :2] + x[:, 2:]) / 2

    apart = jnp.linalg.norm(centres(places)[:, None] - centres(boxes)[None], axis=2)
    reach = jnp.where(known, jnp.sqrt(areas(places)) * missed, 0)[:, None]
    return jnp.where(reach > 0, jnp.minimum(apart / jnp.where(reach > 0, reach, 1), 1), 1)


def people_of(
    embeddings: Float[Array, "t k e"], boxes: Float[Array, "t k 4"], there: Bool[Array, "t k"]
) -> Int[Array, "t p"]:
    """Who is who in a real clip: which of each frame's faces is each person's, `NOBODY` where she is not seen; the person who is
    seen largest and longest, by the sum of her boxes, comes first. Who is seen in fewer than `LEAST_SHARE` of the frames is nobody.

    Args:
        embeddings: of the faces.
        boxes: in pixels.
        there: whether there is a face.
    """
    faces = there.shape[1]
    looks = unit(embeddings)

    def turn(state: tuple[Array, ...], frame: tuple[Array, ...]) -> tuple[tuple[Array, ...], Array]:
        sums, places, missed, count = state
        look, box, there = frame
        opened = jnp.arange(TRACKS) < count
        likeness = jnp.einsum("se,ke->sk", unit(sums), look, precision=jax.lax.Precision.HIGHEST)
        cost = 1 - likeness + REAL_PLACE * distances(places, opened, missed, box)
        hers = assign(jnp.where(opened[:, None] & there[None], cost, jnp.inf), 1 - SAME_PLACE)
        # Whoever is like nobody so far is somebody new.
        new = there & ~jnp.any(hers[:, None] == jnp.arange(faces)[None], 0)
        track = jnp.where(new, count + jnp.cumsum(new) - 1, TRACKS)
        hers = hers.at[track].set(jnp.arange(faces), mode="drop")
        seen = hers != NOBODY
        sums = sums + jnp.where(seen[:, None], look[hers], 0)
        places = jnp.where(seen[:, None], box[hers], places)
        missed = jnp.where(seen, 1, missed + 1)
        return (sums, places, missed, jnp.minimum(count + jnp.sum(new), TRACKS)), hers

    start = (
        jnp.zeros((TRACKS, looks.shape[2])),
        jnp.zeros((TRACKS, 4)),
        jnp.ones(TRACKS, jnp.int32),
        jnp.int32(0),
    )
    _, tracks = jax.lax.scan(turn, start, (looks, boxes, there))
    seen = tracks != NOBODY
    sizes = jnp.sum(jnp.where(seen, jnp.take_along_axis(areas(boxes), jnp.maximum(tracks, 0), 1), 0), 0)
    sizes = jnp.where(jnp.sum(seen, 0) >= max(LEAST, LEAST_SHARE * len(there)), sizes, 0)
    size, chosen = jax.lax.top_k(sizes, PEOPLE)
    return jnp.where(size[None] > 0, tracks[:, chosen], NOBODY)


def follow(
    likeness: Float[Array, "t k p"],
    boxes: Float[Array, "t k 4"],
    there: Bool[Array, "t k"],
    real: Float[Array, "t p 4"],
) -> Int[Array, "t p"]:
    """Which of a generated video's faces is each person's, `NOBODY` where she has none.

    Args:
        likeness: mean cosine of each face with each person's in the real clip.
        boxes: of the faces in pixels.
        there: whether there is a face.
        real: boxes of the people in the real clip, zeros where they are not there. A person who was not seen in the video yet is
            expected there.
    """
    anywhere = jnp.any(areas(real) > 0, 0)

    def turn(state: tuple[Array, Array], frame: tuple[Array, ...]) -> tuple[tuple[Array, Array], Array]:
        places, missed = state
        likeness, box, there, real = frame
        met = missed > 0
        place = jnp.where(met[:, None], places, real)
        far = distances(place, areas(place) > 0, jnp.maximum(missed, 1), box)
        cost = 1 - likeness.T + VIDEO_PLACE * far
        hers = assign(jnp.where(anywhere[:, None] & there[None], cost, jnp.inf), 1 - ELSEWHERE + VIDEO_PLACE)
        seen = hers != NOBODY
        places = jnp.where(seen[:, None], box[hers], places)
        return (places, jnp.where(seen, 1, jnp.where(met, missed + 1, 0))), hers

    people = real.shape[1]
    start = (jnp.zeros((people, 4)), jnp.zeros(people, jnp.int32))
    return jax.lax.scan(turn, start, (likeness, boxes, there, real))[1]


def likenesses(
    embeddings: Float[Array, "b t k e"], pool: Float[Array, "b p g e"], pool_mask: Bool[Array, "b p g"]
) -> Float[Array, "b t k p"]:
    """Mean cosine of each face with each person's valid faces; 0 where there is none of either."""
    counts = jnp.sum(pool_mask, -1)[..., None]
    means = jnp.sum(unit(pool) * pool_mask[..., None], 2) / jnp.maximum(counts, 1)
    return jnp.einsum("btke,bpe->btkp", unit(embeddings), means, precision=jax.lax.Precision.HIGHEST)


def of_people(values: Array, face: Int[Array, "b t p"]) -> Array:
    """Of what is known of each face [b, t, k, ...] each person's [b, t, p, ...], zeros where she has none."""
    index = face.reshape(*face.shape, *[1] * (values.ndim - 3))
    return jnp.where(index == NOBODY, 0, jnp.take_along_axis(values, jnp.maximum(index, 0), 2))


def own(values: Float[Array, "b t p p"]) -> Float[Array, "b t p"]:
    """Of everybody's face beside everybody's pool each one's beside her own."""
    return jnp.diagonal(values, axis1=2, axis2=3)


def mean_of_frames(
    values: Float[Array, "b t p"], counts: Bool[Array, "b t p"]
) -> tuple[Float[Array, " b"], Float[Array, "b t"]]:
    """Mean over the frames in which anybody counts of the mean over those who do, and that mean by frame; 0 where nobody does."""
    per_frame = jnp.sum(jnp.where(counts, values, 0), 2) / jnp.maximum(jnp.sum(counts, 2), 1)
    return jnp.sum(per_frame, 1) / jnp.maximum(jnp.sum(jnp.any(counts, 2), 1), 1), per_frame


def score_people(
    embeddings: Float[Array, "b t k e"],
    boxes: Float[Array, "b t k 4"],
    there: Bool[Array, "b t k"],
    pool: Float[Array, "b p g e"],
    pool_mask: Bool[Array, "b p g"],
    real: Float[Array, "b p t 4"],
) -> PeopleScore:
    """Assigns the faces of videos to the people of the real clips and compares them.

    Args:
        embeddings: of the videos' faces.
        boxes, there: of the same faces.
        pool, pool_mask: embeddings of each person in the real clips' frames, and which of them count.
        real: her boxes in the frames of the real clip, zeros where she is not there.
    """
    likeness = likenesses(embeddings, pool, pool_mask)
    known = jnp.any(pool_mask, 2)
    real = jnp.where(known[..., None, None], real, 0).transpose(0, 2, 1, 3)
    # Small, and looked at one after the other: every device does it by itself.
    told = gather(jax.lax.stop_gradient((likeness, boxes, there, real)))
    face = jax.vmap(follow)(*told)
    similarity = own(of_people(likeness, face))
    counts = areas(real) > 0
    frames = jnp.sum(counts, 1)
    score = jnp.sum(jnp.where(counts, similarity, 0), 1) / jnp.maximum(frames, 1)
    return PeopleScore(similarity, face, of_people(boxes, face), counts, score, frames > 0)
