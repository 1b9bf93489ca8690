"""Every term of the reward keeps the contract, and says what it claims of real clips and of damaged ones."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from convert import arcface, scrfd
from examples.own_reward import Brightness
from rfl_jax.miniature import world
from rfl_jax.rewards.align import TEMPLATE
from rfl_jax.rewards.face import FaceReward, RewardConfig, Seen
from rfl_jax.rewards.points import trace_points
from rfl_jax.rewards.term import prepare_term
from rfl_jax.rewards.terms import ON_BOARD, alikeness, from_mean_face, gradient_energy, kept, own_motion
from rfl_jax.sharding import batch_shards
from tests.devices import make_mesh
from tests.runs import drawn

# Those without a converted network, which tests/rewards/test_clip_terms.py looks at.
KINDS = {name: kind for name, kind in {**ON_BOARD, "own": Brightness}.items() if not kind.network}
TERMS = {name: kind(kind.Settings(name)) for name, kind in KINDS.items()}
WITHOUT_FACES = ("own",)


@pytest.fixture(scope="module")
def faces():
    detector = scrfd.load(str(world.ASSETS / world.DETECTOR_FILE))
    embedder = arcface.load(str(world.ASSETS / world.EMBEDDER_FILE))
    return FaceReward(detector, embedder, RewardConfig(detector_size=world.SIZE))


@pytest.fixture(scope="module")
def judged(faces):
    """`judged(video, real) -> (scores by term, sizes of their gradients by video and term)` of videos beside real clips."""
    graph, weights = nnx.split(faces)

    @jax.jit
    def prepare(weights, real):
        seen = nnx.merge(graph, weights).see(real)
        pool = seen.embeddings
        return {n: {**prepare_term(term, seen, {"pool": pool}, {}), "pool": pool} for n, term in TERMS.items()}

    @jax.jit
    def judge(weights, video, prepared):
        def scores(video):
            seen = nnx.merge(graph, weights).see(video)
            found = {name: term(seen, prepared[name]) for name, term in TERMS.items()}
            # Of what is not valid there is no reward.
            return jnp.stack([jnp.where(x.valid, x.score, 0) for x in found.values()]), found

        rows, pull, found = jax.vjp(scores, video, has_aux=True)
        every = jnp.broadcast_to(jnp.eye(len(TERMS))[..., None], (*rows.shape[:1], *rows.shape))
        (slopes,) = jax.vmap(pull)(every)
        return found, jnp.sqrt(jnp.sum(slopes**2, range(2, slopes.ndim)))

    def judged(video, real):
        found, slopes = judge(weights, video, prepare(weights, real))
        return found, dict(zip(TERMS, np.asarray(slopes), strict=True))

    return judged


@pytest.fixture(scope="module")
def clips():
    return drawn(3, 2, world.FRAMES)


def blurred(video, by=2):
    small = video.reshape(*video.shape[:2], world.SIZE // by, by, world.SIZE // by, by, 3).mean((3, 5))
    return jax.image.resize(small, video.shape, "bilinear")


def squeezed(video):
    """Faces whose mouth lies where no mouth does: the lower half of the picture is moved up by a fifth of its height."""
    rows = jnp.arange(world.SIZE)
    return video[:, :, jnp.where(rows > world.SIZE // 2, jnp.minimum(rows + world.SIZE // 8, world.SIZE - 1), rows)]


# What each term is there to see.
DAMAGES = {
    "face": lambda clips: clips[::-1],
    "motion": lambda clips: 0.5 * clips + 0.5 * clips[:, :1],
    "anti_copy": lambda clips: 0.5 * clips + 0.5 * clips[:, :1],
    "landmarks": squeezed,
    "sharpness": lambda clips: jnp.concatenate([clips[:, :1], blurred(clips)[:, 1:]], 1),
    "own": lambda clips: 0.5 * clips,
}


@pytest.mark.parametrize("name", TERMS)
def test_a_term_is_highest_for_the_real_clip_and_pulls_a_damaged_one_back(judged, clips, name):
    real, _ = judged(clips, clips)
    assert real[name].valid.all()
    assert (real[name].score <= 1 + 1e-5).all()
    assert real[name].per_frame.shape == clips.shape[:2]
    found, slopes = judged(DAMAGES[name](clips), clips)
    assert found[name].valid.all()
    assert (found[name].score >= (-1 if name == "face" else 0)).all()
    assert found[name].score.mean() < real[name].score.mean() - 0.05
    assert np.isfinite(slopes[name]).all()
    assert slopes[name].max() > 1e-3


def test_equal_motions_have_no_kink():
    # Near equality, where training against the untrained network begins, the pull is in proportion to the difference.
    motion = jnp.float32(0.7)
    slope = jax.grad(alikeness)
    assert alikeness(motion, motion) == 1
    assert slope(motion, motion) == 0
    less, more = (float(slope(motion + d, motion)) for d in (-1e-4, 1e-4))
    assert less == pytest.approx(-more, rel=1e-2)
    # d / (0.8 * 0.8 * 0.1), of the logarithm of motion + 0.1 twice, over the width.
    assert less == pytest.approx(1e-4 / 0.064, rel=1e-2)
    # Far from it the pull is that of the ratio, and the score the ratio but for the width.
    assert float(alikeness(motion, 10 * motion)) == pytest.approx(0.8 / 7.1 * np.exp(0.1), rel=0.01)
    assert float(slope(motion, 10 * motion)) == pytest.approx(np.exp(0.1) / 7.1, rel=0.01)


def test_drifts_tell_which_way_a_video_differs(judged, clips):
    real, _ = judged(clips, clips)
    slower, _ = judged(DAMAGES["motion"](clips), clips)
    for name, way in (("motion", -1), ("anti_copy", 1)):
        np.testing.assert_allclose(real[name].drift, 0, atol=1e-5)
        assert (way * slower[name].drift > 0.02).all(), name
    # Half of the motion is left, beside which a tenth of a pixel counts.
    assert slower["motion"].drift.mean() == pytest.approx(np.log(0.5), abs=0.25)


def test_copying_as_much_as_the_other_has_no_kink():
    real = jnp.float32(0.4)
    slope = jax.grad(own_motion)
    np.testing.assert_array_equal(own_motion(jnp.array([0.1, 0.4, 1.0]), jnp.broadcast_to(real, 3)), [1, 1, 0])
    assert own_motion(jnp.float32(1), jnp.float32(1)) == 1
    assert slope(real, real) == slope(real - 0.1, real) == 0
    assert float(slope(real + 1e-4, real)) == pytest.approx(-1e-4 / 0.01 / 0.59, rel=1e-2)
    assert float(slope(real + 0.3, real)) == pytest.approx(-1 / 0.59, rel=1e-2)


def test_terms_of_faces_say_nothing_where_there_is_none(judged, clips):
    # One video of two without a face: the other keeps its score.
    video = jnp.concatenate([-jnp.ones_like(clips[:1]), clips[1:]])
    found, slopes = judged(video, clips)
    whole, _ = judged(clips, clips)
    for name in TERMS:
        assert found[name].valid.tolist() == [name in WITHOUT_FACES, True], name
        assert np.isfinite(found[name].score).all(), name
        assert np.isfinite(slopes[name]).all(), name
        if name not in WITHOUT_FACES:
            assert slopes[name][0] == 0, name
        np.testing.assert_allclose(found[name].score[1], whole[name].score[1], rtol=1e-4, err_msg=name)


def test_points_follow_the_picture_by_their_gradient(faces):
    frames = drawn(3, 16, 1)[:, 0]
    graph, weights = nnx.split(faces)
    _, boxes, found = jax.jit(lambda w, x: nnx.merge(graph, w).find(x))(weights, frames)
    assert found.all()

    def place(frames, weights, axis):
        detector = nnx.merge(graph, weights).detector
        points = trace_points(detector, frames, boxes, size=world.SIZE, compat="insightface")
        return jnp.sum(jnp.mean(points, 1) * jax.nn.one_hot(axis, 2)[None])

    value, slope = jax.jit(place), jax.jit(jax.grad(place))
    for axis in (0, 1):
        # A picture that moves by a pixel changes by this; the points move by one, as far as the small detector goes with it.
        shift = (jnp.roll(frames, 1, 2 - axis) - jnp.roll(frames, -1, 2 - axis)) / 2
        moved = [float(jnp.sum(slope(frames, weights, of) * shift)) / len(frames) for of in (0, 1)]
        assert moved[axis] == pytest.approx(1, abs=0.4)
        assert abs(moved[1 - axis]) < 0.4
        ahead, behind = (float(value(frames + h * shift, weights, axis)) for h in (3e-3, -3e-3))
        assert (ahead - behind) / 6e-3 / len(frames) == pytest.approx(moved[axis], rel=0.05)


def test_points_are_those_that_were_found(faces, clips):
    seen = faces.see(clips)
    assert jnp.array_equal(seen.points, seen.kps)


def test_what_is_asked_for_twice_is_computed_once(faces, clips, monkeypatch):
    calls = []
    embed = FaceReward.embed
    monkeypatch.setattr(FaceReward, "embed", lambda *args: calls.append(1) or embed(*args))

    def scores(video):
        seen = faces.see(video)
        return [TERMS["face"](seen, {"pool": seen.embeddings}).score for _ in range(3)]

    jax.eval_shape(scores, clips)
    assert len(calls) == 1


def with_settings(name, **changes):
    return type(TERMS[name])(dataclasses.replace(TERMS[name].cfg, **changes))


def test_settings_of_landmarks_say_how_far_is_wrong_and_how_much(faces):
    centred = TEMPLATE - TEMPLATE.mean(0)
    size = np.sqrt(np.mean(np.sum(centred**2, 1)))
    # The nose a face's size to the side, less what the fit takes back.
    points = jnp.asarray(TEMPLATE + np.array([0, 0, size, 0, 0])[:, None] * np.array([1, 0]), jnp.float32)[None, None]
    away = float(from_mean_face(points)[0, 0])
    assert 0.2 < away < 0.5
    seen = Seen(faces, jnp.zeros((1, 8, 8, 3)), (jnp.zeros((1, 5, 2)), jnp.zeros((1, 4)), jnp.ones(1, bool)), 1, 1)
    seen.points = 3 * points + 7
    prepared = {"allowed": jnp.array([0.1])}

    def score(**changes):
        return float(with_settings("landmarks", **changes)(seen, prepared).score[0])

    assert score(slack=0.02, scale=0.05) == pytest.approx(np.exp(-(away - 0.12) / 0.05), rel=1e-3)
    assert score(slack=0.0, scale=0.1) == pytest.approx(np.exp(-(away - 0.1) / 0.1), rel=1e-3)
    assert score(slack=away) == 1


def test_the_region_of_sharpness_is_where_it_looks(faces, clips):
    box = np.asarray(faces.see(clips).boxes)
    x1, y1, x2, y2 = np.moveaxis(box, -1, 0)[..., None, None]
    y, x = np.mgrid[: world.SIZE, : world.SIZE][:, None, None]
    inside = jnp.asarray((x >= x1 - 1) & (x <= x2 + 1) & (y >= y1 - 1) & (y <= y2 + 1))[..., None]
    later = jnp.arange(world.FRAMES)[None, :, None, None, None] > 0
    background = jnp.where(inside | ~later, clips, blurred(clips, by=8))

    def score(video, region):
        term = with_settings("sharpness", region=region)
        return np.asarray(term(faces.see(video), term.prepare(faces.see(clips))).score)

    np.testing.assert_allclose(score(clips, "face"), 1, atol=1e-6)
    np.testing.assert_allclose(score(background, "face"), 1, rtol=0.05)
    assert (score(background, "frame") < score(clips, "face") - 0.05).all()


def test_sharpness_is_what_is_kept_of_the_others():
    real = jnp.array([0.8, 0.8, 0.8, 0.0])
    np.testing.assert_allclose(kept(jnp.array([0.0, 0.8, 0.9, 0.0]), real), [0, 1, 1, 1], atol=1e-6)
    slope = jax.vmap(jax.grad(kept))(jnp.array([0.8, 0.9, 0.4]), real[:3])
    # None at equality and above it; below that of the ratio, but for the width.
    np.testing.assert_allclose(slope, [0, 0, 1 / 0.8 / 0.98], rtol=1e-2)


def test_the_energy_of_a_ramp_is_its_slope():
    row = jnp.linspace(-1, 1, 9)
    video = jnp.broadcast_to(row[None, None, None, :, None], (1, 1, 4, 9, 3))
    assert float(gradient_energy(video, jnp.ones((1, 1, 4, 9), bool))[0, 0]) == pytest.approx(0.25**2, rel=1e-4)


def test_terms_on_a_mesh_are_those_of_one_device(faces, clips):
    # The other pre-processing rounds pixels to 8 bits before detection, which rounding errors may turn.
    faces = FaceReward(faces.detector, faces.embedder, RewardConfig(detector_size=world.SIZE, compat="roll"))
    graph, weights = nnx.split(faces)
    # Where drawn pictures are flat, the detector's pooling has a choice of pixels, which rounding errors would turn as well.
    # With this noise none of them turns (8e-6; with key 3 one frame does on some processors, 1.5e-3).
    clips = 0.9 * clips + 0.02 * jax.random.normal(jax.random.key(5), clips.shape)
    video = DAMAGES["motion"](clips)

    def total(weights, video, real):
        seen, known = nnx.merge(graph, weights).see(video), nnx.merge(graph, weights).see(real)
        scores = {}
        for name, term in TERMS.items():
            pool = jax.lax.stop_gradient(known.embeddings)
            prepared = {**jax.lax.stop_gradient(prepare_term(term, known, {"pool": pool}, {})), "pool": pool}
            scores[name] = term(seen, prepared).score
        return sum(map(jnp.sum, scores.values())), scores

    results = []
    for shape in ((1, 1, 1), (1, 2, 2)):
        mesh = make_mesh(*shape)
        assert len(clips) % batch_shards(mesh) == 0
        with jax.set_mesh(mesh):
            (_, scores), slope = jax.jit(jax.value_and_grad(total, 1, has_aux=True))(weights, video, clips)
        results.append(jax.device_get((scores, slope)))
    (want, slope), (found, other) = results
    for name in TERMS:
        np.testing.assert_allclose(found[name], want[name], rtol=1e-3, atol=1e-4, err_msg=name)
    assert np.linalg.norm(other - slope) < 1e-3 * np.linalg.norm(slope)
