"""Alignment, suppression, score and its gradient, without outside references."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from rfl_jax.rewards.align import TEMPLATE, align, invert, similarity
from rfl_jax.rewards.arcface import IResNetConfig
from rfl_jax.rewards.detect import _suppress, anchor_points, faces_of, largest, letterbox, letterbox_size
from rfl_jax.rewards.embedder import make_embedder
from rfl_jax.rewards.face import FaceReward, RewardConfig, cosine_with_pool, real_agreement, usable_pool
from rfl_jax.rewards.mobilefacenet import BottleneckSpec, ConvPReLUSpec, MobileFaceNetConfig
from rfl_jax.rewards.scrfd import SCRFD, ConvSpec, Detections, resnet
from tests.rewards.pooled import pooled_score

IRESNET = IResNetConfig(widths=(4, 4, 6, 8), layers=(1, 1, 1, 1), stem=4, embedding=8)
MOBILE = MobileFaceNetConfig(
    (
        ConvPReLUSpec(8, 3, 2, 1), ConvPReLUSpec(8, 3, 1, 4), BottleneckSpec(8, 8, 2, False), BottleneckSpec(8, 8, 1, True),
        BottleneckSpec(16, 16, 2, False), BottleneckSpec(16, 32, 2, False), ConvPReLUSpec(32, 1, 1, 1),
    ),
    embedding=8,
)  # fmt: skip


def make_reward(embedder=IRESNET, **cfg):
    detector = SCRFD(resnet((4, 4, 4), (4, 4, 6, 8), (1, 1, 1, 1), 4, (ConvSpec(8),)), rngs=nnx.Rngs(0))
    for head in detector.heads:  # a random detector finds nothing
        head.cls.bias[...] = head.cls.bias[...] - 4.0
    return FaceReward(detector, make_embedder(embedder, rngs=nnx.Rngs(1)), RewardConfig(detector_size=64, **cfg))


def random_kps(rng, n):
    angle, scale = rng.uniform(-0.6, 0.6, n), rng.uniform(0.2, 0.5, n)
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]).transpose(2, 0, 1)
    centre = TEMPLATE - TEMPLATE.mean(0)
    points = np.einsum("nij,pj->npi", turn * scale[:, None, None], centre) + rng.uniform(28, 36, (n, 1, 2))
    return (points + rng.normal(size=points.shape)).astype(np.float32)


def umeyama(source, target):
    """Least-squares similarity by singular values, in float64."""
    p, q = source - source.mean(0), target - target.mean(0)
    u, d, vt = np.linalg.svd(q.T @ p / len(p))
    s = np.array([1, np.sign(np.linalg.det(u @ vt))])
    rotation = u @ np.diag(s) @ vt
    scale = (d * s).sum() / (p * p).sum() * len(p)
    return np.c_[scale * rotation, target.mean(0) - scale * rotation @ source.mean(0)]


def test_similarity_is_umeyamas():
    for kps in random_kps(np.random.default_rng(0), 20):
        want = umeyama(kps.astype(np.float64), TEMPLATE.astype(np.float64))
        np.testing.assert_allclose(similarity(kps), want, rtol=1e-4, atol=2e-3)


def test_similarity_of_coinciding_points_is_finite():
    matrix = similarity(jnp.ones((5, 2)))
    assert np.isfinite(matrix).all()
    assert np.isfinite(invert(matrix)).all()


def test_warp_takes_points_to_the_template():
    rng = np.random.default_rng(1)
    kps = random_kps(rng, 1)
    y, x = np.mgrid[:64, :64].astype(np.float32)
    # An image of its own coordinates: its crop tells where each pixel came from.
    crop = np.asarray(align(np.stack([x, y], -1)[None], similarity(kps))[0])
    matrix = umeyama(kps[0].astype(np.float64), TEMPLATE.astype(np.float64))
    for j, i in ((40, 50), (70, 50), (56, 72)):
        source = np.linalg.solve(matrix[:, :2], np.array([j, i]) - matrix[:, 2])
        np.testing.assert_allclose(crop[i, j], source, atol=1e-2)


def test_suppression_is_greedy_and_ordered():
    rng = np.random.default_rng(2)
    low = rng.uniform(0, 60, (200, 2))
    boxes = np.concatenate([low, low + rng.uniform(5, 40, (200, 2))], 1).astype(np.float32)
    scores = rng.uniform(0, 1, 200).astype(np.float32)
    order = [i for i in np.argsort(-scores) if scores[i] >= 0.5]
    keep = []
    area = np.prod(boxes[:, 2:] - boxes[:, :2], 1)
    while order:
        best, *order = order
        keep.append(best)
        wh = np.minimum(boxes[order, 2:], boxes[best, 2:]) - np.maximum(boxes[order, :2], boxes[best, :2])
        inter = np.prod(np.maximum(wh, 0), 1)
        order = [i for i, o in zip(order, inter / (area[order] + area[best] - inter), strict=True) if o <= 0.4]
    kept, count = jax.jit(lambda b, s: _suppress(b, s, 0.4, 0.0, 128))(boxes, scores)
    assert list(kept[:count]) == keep


def test_suppression_ends_on_degenerate_boxes():
    boxes = jnp.zeros((8, 4))
    _, count = _suppress(boxes, jnp.ones(8), 0.4, 0.0, 16)
    assert count == 1


def crowd(counts, size=640):
    """A detector's outputs for one image a count: so many faces apart from each other, the larger the less sure of it."""
    points, strides = anchor_points(size)
    apart = np.flatnonzero((strides == 32) & ~np.any(points % 64, 1))[::2]
    scores = np.zeros((len(counts), len(points)), np.float32)
    distances = np.ones((len(counts), len(points), 4), np.float32)
    kps = np.random.default_rng(7).normal(size=(len(counts), len(points), 5, 2)).astype(np.float32)
    for i, count in enumerate(counts):
        rows = np.random.default_rng(count).permutation(apart)[:count]
        scores[i, rows] = np.linspace(0.99, 0.51, count)
        distances[i, rows] = np.linspace(0.2, 0.9, count)[:, None]
    return Detections(*map(jnp.asarray, (scores, distances, kps)))


@pytest.mark.parametrize("compat", ["insightface", "roll"])
def test_a_crowd_keeps_its_largest_faces(compat):
    raw = crowd([100, 64, 65, 3])
    faces = jax.jit(lambda raw: faces_of(raw, 0.5, size=640, compat=compat, most=64))(raw)
    sides = np.asarray(faces.boxes[..., 2] - faces.boxes[..., 0])
    assert list(faces.valid.sum(1)) == [64, 64, 64, 3]
    for i, count in enumerate((100, 64, 65, 3)):
        want = (np.linspace(0.2, 0.9, count) * 2 * 32 / 0.5)[-64:]  # by falling score, which here is rising size
        np.testing.assert_allclose(sides[i, : len(want)], want, rtol=1e-5)
    _, boxes, found = largest(faces)
    assert found.all()
    np.testing.assert_allclose(boxes[:, 2] - boxes[:, 0], 0.9 * 2 * 32 / 0.5, rtol=1e-5)
    # Those that are cut leave no trace in the points of the others.
    order = np.argsort(-np.asarray(raw.scores[0]), kind="stable")[36:100]
    points, strides = anchor_points(640)
    kps = (points[order, None] + np.asarray(raw.kps[0])[order] * strides[order, None, None]) / 0.5
    np.testing.assert_allclose(faces.kps[0], kps, rtol=1e-5)


def test_faces_that_find_room_are_those_that_no_limit_gives():
    raw = crowd([63, 64])
    few, many = (faces_of(raw, 1.0, size=640, compat="insightface", most=most) for most in (64, 512))
    for got, want in zip(jax.tree.leaves(few), jax.tree.leaves(many), strict=True):
        np.testing.assert_array_equal(got, want[:, :64])


@pytest.mark.parametrize("shape", [(50, 120), (200, 90), (64, 64)])
def test_letterbox_is_torchs_antialiased_resize(shape):
    torch = pytest.importorskip("torch")
    x = np.random.default_rng(3).uniform(-1, 1, (1, *shape, 3)).astype(np.float32)
    canvas, scale = letterbox(x, 64, "roll")
    size = letterbox_size(*shape, 64)
    want = torch.nn.functional.interpolate(
        torch.from_numpy(x.transpose(0, 3, 1, 2).copy()), size, mode="bilinear", align_corners=False, antialias=True
    ).numpy()
    np.testing.assert_allclose(canvas[0, : size[0], : size[1]], want[0].transpose(1, 2, 0), atol=1e-5)
    assert not np.asarray(canvas[0, size[0] :]).any()
    assert scale == size[0] / shape[0]


@pytest.mark.parametrize("shape", [(50, 120), (200, 90)])
def test_letterbox_is_opencvs_8_bit_resize(shape):
    cv2 = pytest.importorskip("cv2")
    image = np.random.default_rng(3).integers(0, 256, (*shape, 3)).astype(np.uint8)
    canvas, _ = letterbox(image[None].astype(np.float32) / 127.5 - 1, 64, "insightface")
    h, w = letterbox_size(*shape, 64)
    want = cv2.resize(image, (w, h)).astype(np.float32)
    got = np.asarray(canvas[0, :h, :w]) * 128 + 127.5
    assert np.abs(got - want).max() <= 1
    assert (np.abs(got - want) > 0.5).mean() < 0.01
    np.testing.assert_allclose(canvas[0, h:], -127.5 / 128)


def test_score_leaves_out_the_first_frame_and_missing_faces():
    rng = np.random.default_rng(4)
    pool = rng.normal(size=(2, 5, 8)).astype(np.float32)
    pool[0, 3] = 0
    e = rng.normal(size=(2, 4, 8)).astype(np.float32)
    unit = lambda x: x / np.linalg.norm(x, axis=-1, keepdims=True)  # noqa: E731
    want = [(unit(e[i]) @ unit(pool[i, rows]).T).mean(1) for i, rows in ((0, [1, 2, 4]), (1, [1, 2, 3, 4]))]
    e, pool = jnp.asarray(e), jnp.asarray(pool)
    np.testing.assert_allclose(cosine_with_pool(e, pool, usable_pool(pool)), want, atol=1e-6)
    mask = np.array([[1, 1, 0, 1], [0, 0, 0, 0]], bool)
    np.testing.assert_allclose(pooled_score(e, mask, pool), want[0][mask[0]].mean(), atol=1e-6)
    with_first = cosine_with_pool(e, pool, usable_pool(pool, use_first_frame=True))
    np.testing.assert_allclose(with_first[1], (unit(e[1]) @ unit(pool[1]).T).mean(1), atol=1e-6)


def test_a_real_clip_agrees_with_itself_as_each_frame_does_with_the_others():
    pool = np.random.default_rng(6).normal(size=(3, 6, 8)).astype(np.float32)
    pool[0, 2] = 0
    pool[2, 2:] = 0
    found = np.asarray(jax.jit(lambda x: real_agreement(x, usable_pool(x)))(pool))
    for i, rows in ((0, [1, 3, 4, 5]), (1, [1, 2, 3, 4, 5])):
        faces = pool[i, rows] / np.linalg.norm(pool[i, rows], axis=-1, keepdims=True)
        agreed = [np.mean([face @ other for other in np.delete(faces, j, 0)]) for j, face in enumerate(faces)]
        assert found[i] == pytest.approx(np.mean(agreed), rel=1e-5)
    # One face has no other to agree with.
    assert found[2] == np.inf


@pytest.mark.parametrize(("embedder", "compat"), [(IRESNET, "insightface"), (IRESNET, "roll"), (MOBILE, "insightface")])
def test_pixel_gradient_equals_finite_differences(embedder, compat):
    reward = make_reward(embedder, compat=compat)
    rng = np.random.default_rng(5)
    y, x = np.mgrid[:64, :64] / 64
    waves = [np.sin(2 * np.pi * (rng.uniform(1, 3) * x + rng.uniform(1, 3) * y) + p) for p in rng.uniform(0, 6, 6)]
    frames = 0.4 * np.stack([np.stack(waves[:3], -1), np.stack(waves[3:], -1)]).astype(np.float32)
    kps, found = jnp.asarray(random_kps(rng, 2)), jnp.array([True, True])
    pool = rng.normal(size=(1, 4, 8)).astype(np.float32)

    def score(frames):
        return pooled_score(reward.embed(frames, kps, found)[None], found[None], pool)

    grad = jax.jit(jax.grad(score))(frames)
    evaluate = jax.jit(score)
    for _ in range(3):
        # Smooth directions: PReLU's kinks make single pixels jump.
        direction = np.asarray(grad) + 0.5 * np.abs(np.asarray(grad)).mean() * rng.normal(size=frames.shape)
        direction = (direction / np.linalg.norm(direction)).astype(np.float32)
        h = 2e-2
        numeric = (float(evaluate(frames + h * direction)) - float(evaluate(frames - h * direction))) / (2 * h)
        assert abs(numeric - float(jnp.vdot(grad, direction))) < 0.02 * abs(numeric) + 1e-5


def test_a_video_without_faces_has_no_score_and_no_gradient():
    reward = make_reward()
    video = jnp.zeros((1, 3, 64, 64, 3))
    pool = jnp.ones((1, 3, 8))

    def score(video):
        out = reward(video, pool)
        return out.score[0], out

    (value, out), grad = jax.jit(jax.value_and_grad(score, has_aux=True))(video)
    assert not out.mask.any()
    assert not out.valid[0]
    assert value == 0
    assert not np.asarray(grad).any()
