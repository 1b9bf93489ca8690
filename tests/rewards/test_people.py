"""Several people are followed through clips, and one who vanishes, merges or swaps lowers the score."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from scipy.optimize import linear_sum_assignment

from convert import arcface, scrfd
from rfl_jax.miniature import world
from rfl_jax.rewards.face import FaceReward, RewardConfig, real_score, usable_people
from rfl_jax.rewards.people import NOBODY, PEOPLE, assign, people_of, score_people
from tests.devices import make_mesh
from tests.runs import drawn

FRAMES, WIDTH, SIDE = 12, 16, 20.0


def looks(seed=0, noise=0.15):
    """Embeddings [t, 3, e] of the same three people, who look a little different in every frame."""
    rng = np.random.default_rng(seed)
    people = np.linalg.qr(np.random.default_rng(9).normal(size=(WIDTH, 3)))[0].T
    return 20 * (people[None] + noise * rng.normal(size=(FRAMES, 3, WIDTH)) / np.sqrt(WIDTH))


def boxes_at(centres):
    centres = np.asarray(centres, float)
    return np.concatenate([centres - SIDE / 2, centres + SIDE / 2], -1)


def clip(centres, embeddings, seed=0):
    """A clip's faces as they are found, in an order of their own in each frame.

    Args:
        centres: [t, n, 2] in pixels, NaN where somebody is not seen.
        embeddings: [t, n, e].
    """
    rng = np.random.default_rng(seed)
    found = np.zeros((FRAMES, PEOPLE, WIDTH)), np.zeros((FRAMES, PEOPLE, 4)), np.zeros((FRAMES, PEOPLE), bool)
    who = np.full((FRAMES, PEOPLE), NOBODY)
    for t in range(FRAMES):
        seen = [i for i in range(centres.shape[1]) if not np.isnan(centres[t, i]).any()]
        for place, i in enumerate(rng.permutation(seen).astype(int)):
            found[0][t, place], found[1][t, place] = embeddings[t, i], boxes_at(centres[t, i])
            found[2][t, place], who[t, place] = True, i
    return tuple(jnp.asarray(x, None if x.dtype == bool else jnp.float32) for x in found), who


def standing(*xs):
    return np.broadcast_to(np.array([[x, 30.0] for x in xs])[None], (FRAMES, len(xs), 2)).copy()


def names(face, who):
    """Whose faces [t, p] each of those who were told apart has."""
    face = np.asarray(face)
    return np.where(face == NOBODY, NOBODY, np.take_along_axis(who, np.maximum(face, 0), 1))


def followed(centres, embeddings):
    found, who = clip(centres, embeddings)
    return names(jax.jit(people_of)(*found), who)


@pytest.mark.parametrize("shape", [(4, 4), (16, 4), (2, 5)])
def test_the_assignment_is_scipys(shape):
    assigned = jax.jit(lambda cost: assign(cost, 2.0))
    for seed in range(20):
        cost = np.random.default_rng(seed).uniform(0, 1, shape).astype(np.float32)
        found = np.asarray(assigned(cost))
        rows = np.flatnonzero(found != NOBODY)
        want = linear_sum_assignment(cost)
        assert len(rows) == min(shape) == len(set(found[rows]))
        assert cost[rows, found[rows]].sum() == pytest.approx(cost[want].sum(), rel=1e-5)


def test_the_assignment_leaves_alone_what_costs_too_much():
    cost = np.random.default_rng(1).uniform(0, 1, (4, 4)).astype(np.float32)
    cost[2] = np.inf
    limit = 0.4
    # Everybody may have a place of one's own that costs the limit.
    padded = np.where(np.isinf(cost), 9, cost)
    padded = np.block([[padded, np.full((4, 4), limit)], [np.full((4, 8), 0.0)]])
    columns = linear_sum_assignment(padded)[1]
    want = np.where(columns[:4] < 4, columns[:4], NOBODY)
    assert list(assign(jnp.asarray(cost), limit)) == list(want)
    assert want[2] == NOBODY


def test_people_who_cross_stay_who_they_are():
    time = np.linspace(0, 1, FRAMES)[:, None]
    centres = np.stack(
        [np.concatenate([20 + 60 * time, 30 + 0 * time], 1), np.concatenate([80 - 60 * time, 30 + 0 * time], 1)], 1
    )
    found = followed(centres, looks()[:, :2])
    assert sorted(found[0, :2]) == [0, 1]
    assert (found[:, :2] == found[0, :2]).all()
    assert (found[:, 2:] == NOBODY).all()


def test_people_leave_hide_and_come_back_elsewhere():
    centres = standing(20, 80, 140)
    centres[3:5, 0] = np.nan  # behind somebody
    centres[4:9, 1] = np.nan
    centres[9:, 1, 0] = 200  # back at another place
    centres[6:, 2] = np.nan  # gone for good
    found = followed(centres, looks())
    present = ~np.isnan(centres).any(2)
    assert sorted(found[:, :3].max(0)) == [0, 1, 2]
    for row in found[:, :3].T:
        (who,) = set(row) - {NOBODY}
        assert ((row == who) == present[:, who]).all()


def test_somebody_new_in_the_place_of_who_left_is_somebody_else():
    centres = standing(20, 80, 80)
    centres[5:, 1] = np.nan
    centres[:6, 2] = np.nan
    found = followed(centres, looks())
    assert {frozenset(set(row) - {NOBODY}) for row in found[:, :3].T} == {frozenset([i]) for i in range(3)}


def test_who_is_seen_largest_and_longest_comes_first_and_a_glimpse_is_nobody():
    centres = standing(20, 80, 140)
    centres[8:, 0] = np.nan
    centres[1:, 1] = np.nan
    found = followed(centres, looks())
    assert found[0].tolist() == [2, 0, NOBODY, NOBODY]


@pytest.mark.parametrize(("hidden", "people"), [([4, 7], 1), ([4, 5, 7], 2)])
def test_who_is_unlike_herself_for_some_frames_is_no_second_person(hidden, people):
    embeddings = looks()
    embeddings[hidden, 0] = embeddings[hidden, 1]
    found = followed(standing(20), embeddings[:, :1])
    assert ((found != NOBODY).sum(0) > 0).sum() == people
    assert (np.flatnonzero(found[:, 0] == NOBODY) == hidden).all()


def prepared(centres, embeddings):
    """Pool and boxes of the real clip, whose people stay in the order of their columns."""
    (values, boxes, _), who = clip(centres, embeddings)
    pool, real = np.zeros((1, PEOPLE, FRAMES, WIDTH)), np.zeros((1, PEOPLE, FRAMES, 4))
    for t, place in zip(*np.nonzero(who != NOBODY), strict=True):
        pool[0, who[t, place], t], real[0, who[t, place], t] = values[t, place], boxes[t, place]
    pool = jnp.asarray(pool, jnp.float32)
    return pool, usable_people(pool), jnp.asarray(real, jnp.float32)


def scored(centres, embeddings, real):
    found, who = clip(centres, embeddings, seed=3)
    score = jax.jit(score_people)(*(x[None] for x in found), *real)
    return score, names(score.face[0], who)


@pytest.fixture(scope="module")
def two():
    """A real clip of two people who stand beside each other, and their score in a video that keeps them."""
    real = prepared(standing(20, 80), looks()[:, :2])
    centres = standing(22, 77)
    score, who = scored(centres, looks(1)[:, :2], real)
    assert (who[:, :2] == [0, 1]).all()
    assert (score.score[0, :2] > 0.8).all()
    assert score.valid[0].tolist() == [True, True, False, False]
    return real, score


def test_who_vanishes_has_no_similarity_while_she_is_gone(two):
    real, kept = two
    centres = standing(22, 77)
    centres[6:, 1] = np.nan
    score, who = scored(centres, looks(1)[:, :2], real)
    assert (who[6:, 0] == 0).all()
    assert not score.similarity[0, 6:, 1].any()
    want = float(kept.score[0, 0]), float(jnp.mean(kept.similarity[0, :6, 1])) / 2
    np.testing.assert_allclose(score.score[0, :2], want, atol=1e-5)


def test_who_swap_faces_are_compared_with_who_they_were(two):
    real, _ = two
    embeddings = looks(1)[:, :2]
    embeddings[6:] = embeddings[6:, ::-1].copy()
    score, who = scored(standing(22, 77), embeddings, real)
    # Each keeps her place, whatever she looks like now.
    assert (who[:, :2] == [0, 1]).all()
    assert (score.similarity[0, :6, :2] > 0.8).all()
    assert (score.similarity[0, 6:, :2] < 0.4).all()


def test_of_two_who_merge_one_has_the_face(two):
    real, _ = two
    embeddings = looks(1)[:, :2]
    centres = standing(22, 77)
    centres[6:, 0, 0], centres[6:, 1] = 50, np.nan
    embeddings[6:, 0] = embeddings[6:].mean(1)
    score, _ = scored(centres, embeddings, real)
    late = np.asarray(score.similarity[0, 6:, :2])
    assert ((late > 0).sum(1) == 1).all()
    assert late.mean() < 0.5


def test_who_pass_each_other_in_a_video_are_not_taken_for_swapped(two):
    real, _ = two
    time = np.linspace(0, 1, FRAMES)
    centres = standing(20, 80)
    centres[:, 0, 0], centres[:, 1, 0] = 20 + 60 * time, 80 - 60 * time
    score, who = scored(centres, looks(1)[:, :2], real)
    assert (who[:, :2] == [0, 1]).all()
    assert (score.score[0, :2] > 0.8).all()


def test_who_is_not_in_the_real_clips_frame_does_not_count():
    centres = standing(20, 80)
    centres[4:8, 1] = np.nan
    real = prepared(centres, looks()[:, :2])
    score, _ = scored(standing(20, 80), looks(1)[:, :2], real)
    gone, _ = scored(centres, looks(1)[:, :2], real)
    assert np.array_equal(score.counts[0, :, 1], ~np.isnan(centres[:, 1, 0]))
    np.testing.assert_allclose(gone.score, score.score, atol=1e-6)
    # And a passer-by, whom the real clip does not have, takes nobody's place.
    passing, who = scored(standing(20, 80, 140), looks(1), real)
    assert 2 not in who
    np.testing.assert_allclose(passing.score, score.score, atol=1e-6)


@pytest.fixture(scope="module")
def faces():
    detector = scrfd.load(str(world.ASSETS / world.DETECTOR_FILE))
    embedder = arcface.load(str(world.ASSETS / world.EMBEDDER_FILE))
    return FaceReward(detector, embedder, RewardConfig(detector_size=2 * world.SIZE, people="all", compat="roll"))


@pytest.fixture(scope="module")
def pair():
    """A drawn clip [1, t, h, 2 h, 3] of two people side by side, both of whom the small detector finds."""
    video = drawn(3, 6, world.FRAMES)
    return jnp.concatenate([video[4:5], video[5:]], 3)


@pytest.fixture(scope="module")
def judged(faces):
    """`judged(video, real) -> (score, gradient of each one's by the pixels [p, t, h, w])`."""
    graph, weights = nnx.split(faces)

    @jax.jit
    def prepare(weights, real):
        return {name: x[None] for name, x in nnx.merge(graph, weights).people(real[0]).items()}

    @jax.jit
    def judge(weights, video, clip):
        def score(video):
            faces = nnx.merge(graph, weights)
            found = faces.score(faces.see(video), clip)
            return found.people.score[0], found

        rows, pull, found = jax.vjp(score, video, has_aux=True)
        (slopes,) = jax.vmap(pull)(jnp.eye(len(rows)))
        return found, jnp.abs(slopes[:, 0]).sum(4)

    def judged(video, real):
        clip = prepare(weights, real)
        return *judge(weights, video, clip), clip

    return judged


def test_the_gradient_of_each_reaches_her_face_and_nothing_else(judged, pair):
    found, slopes, clip = judged(pair, pair)
    assert found.people.valid[0].tolist() == [True, True, False, False]
    assert found.people.counts[0, :, :2].all()
    assert not slopes[2:].any()
    boxes = np.asarray(found.people.boxes[0])
    halves = [int(boxes[0, i, 0] > world.SIZE * 0.8) for i in (0, 1)]
    assert sorted(halves) == [0, 1]
    for i, half in enumerate(halves):
        for t in range(world.FRAMES):
            left, right = np.split(np.asarray(slopes[i, t]), 2, 1)
            mine, other = (right, left) if half else (left, right)
            assert mine.sum() > 1e-3
            # What the aligned crop shows of the neighbour is at its edge.
            assert other.sum() < 0.1 * mine.sum()
    # A real clip agrees with itself a little less than with what it is, row by row.
    assert 0.3 < float(real_score(RewardConfig(people="all"), clip)[0]) < float(found.score[0])


def test_drawn_people_who_vanish_or_swap_lower_the_score(judged, pair):
    kept, _, _ = judged(pair, pair)
    left, right = jnp.split(pair, 2, 3)
    swapped = jnp.concatenate([pair[:, :1], jnp.concatenate([right, left], 3)[:, 1:]], 1)
    found, _, _ = judged(swapped, pair)
    assert found.people.similarity[0, 1:, :2].max() < kept.people.similarity[0, :, :2].min()
    grey = jnp.concatenate([left, jnp.broadcast_to(left[:, :, :, :1], left.shape)], 3)
    alone, slopes, _ = judged(grey, pair)
    gone = int(kept.people.boxes[0, 0, 0, 0] < kept.people.boxes[0, 0, 1, 0])
    assert not alone.people.similarity[0, :, gone].any()
    assert not slopes[gone].any()
    assert float(alone.score[0]) == pytest.approx(float(alone.people.score[0, 1 - gone]) / 2, rel=1e-5)
    assert alone.valid.all()
    nobody, slopes, _ = judged(-jnp.ones_like(pair), pair)
    assert not nobody.valid.any()
    assert not slopes.any()
    assert np.isfinite(slopes).all()


def test_people_on_a_mesh_are_those_of_one_device(faces, pair):
    graph, weights = nnx.split(faces)
    video = jnp.concatenate([pair, 0.9 * pair])

    def total(weights, video, real):
        faces = nnx.merge(graph, weights)
        clip = jax.tree.map(lambda x: jnp.stack([x, x]), faces.people(real[0]))
        return jnp.sum(faces.score(faces.see(video), jax.lax.stop_gradient(clip)).score)

    results = []
    for shape in ((1, 1, 1), (1, 2, 2)):
        with jax.set_mesh(make_mesh(*shape)):
            results.append(jax.device_get(jax.jit(jax.value_and_grad(total, 1))(weights, video, pair)))
    (want, slope), (found, other) = results
    assert found == pytest.approx(want, rel=1e-4)
    np.testing.assert_allclose(other, slope, atol=1e-3 * np.abs(slope).max())
