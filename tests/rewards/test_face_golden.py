"""Detection, alignment, embedding and score agree with insightface, ONNX Runtime and the original trainer."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file

from convert import arcface, scrfd
from rfl_jax.rewards.align import align, similarity
from rfl_jax.rewards.detect import detect, letterbox
from rfl_jax.rewards.face import FaceReward, RewardConfig, reward_loss
from tests.golden import ROOT, case, needs_golden, relative
from tests.rewards.pooled import pooled_score

pytestmark = needs_golden


def names() -> list[tuple[str, str, str]]:
    if not ROOT.is_dir():
        return []
    keys = load_file(ROOT / "face" / "expected.safetensors")
    return sorted({tuple(key.split("|")[:3]) for key in keys})


@pytest.fixture(scope="module")
def expected():
    return load_file(ROOT / "face" / "expected.safetensors")


def pixels(name: str) -> np.ndarray:
    image = np.asarray(Image.open(ROOT / "face" / "images" / name).convert("RGB"), np.float32)
    return image[None] / 127.5 - 1


@pytest.mark.parametrize(("model", "variant", "image"), names())
def test_detection_and_crops(expected, model, variant, image):
    def want(item):
        return expected.get(f"{model}|{variant}|{image}|{item}")

    detector = scrfd.load(ROOT / "face" / "models" / model)
    x = pixels(image)
    size = int(variant.removeprefix("size"))
    for compat, blob, blob_error in (("insightface", "blob_every16", 1.1 / 128), ("roll", "letterbox_every16", 1e-4)):
        if want(f"{compat}.det") is None:
            continue
        canvas, _ = letterbox(x, size, compat)
        if want(f"{compat}.{blob}") is not None:
            got = np.moveaxis(np.asarray(canvas[0]), -1, 0)[:, ::16, ::16]
            assert np.abs(got - want(f"{compat}.{blob}")).max() < blob_error
        raw = detector(canvas)
        start = 0
        for stride in (8, 16, 32):
            index = want(f"{compat}.raw.stride{stride}.index")
            if index is not None:
                rows = start + index.reshape(-1)
                error = 1e-3 if compat == "insightface" else 1e-4
                np.testing.assert_allclose(
                    raw.scores[0][rows], want(f"{compat}.raw.stride{stride}.score").reshape(-1), atol=error
                )
                np.testing.assert_allclose(
                    raw.boxes[0][rows], want(f"{compat}.raw.stride{stride}.box"), atol=20 * error
                )
            start += (size // stride) ** 2 * 2
        faces = detect(detector, x, size=size, compat=compat)
        det, kps = want(f"{compat}.det"), want(f"{compat}.kps")
        count = int(faces.valid.sum())
        near = np.abs(det[:, 4] - 0.5) < 2e-3
        assert abs(count - len(det)) <= near.sum()
        for row, points, matrix in zip(det[~near], kps[~near], want(f"{compat}.similarity")[~near], strict=True):
            boxes = np.asarray(faces.boxes[0, :count])
            low, high = np.maximum(boxes[:, :2], row[:2]), np.minimum(boxes[:, 2:], row[2:4])
            inter = np.prod(np.maximum(high - low, 0), 1)
            union = np.prod(boxes[:, 2:] - boxes[:, :2], 1) + np.prod(row[2:4] - row[:2]) - inter
            best = int(np.argmax(inter / union))
            assert (inter / union)[best] > 0.98
            assert np.abs(np.asarray(faces.kps[0, best]) - points).max() < 0.5
            np.testing.assert_allclose(similarity(jnp.asarray(points)), matrix, rtol=2e-4, atol=2e-3)
        index = want("crop_index")
        if index is None:
            continue
        matrices = jnp.asarray(want(f"{compat}.similarity")[index])
        images = np.repeat(x, len(index), 0)
        if compat == "roll":
            crops = np.moveaxis(np.asarray(align(images, matrices, roll=True)), -1, 1)
            assert np.abs(crops - want("roll.crop")).max() < 1e-3
        else:
            crops = np.asarray(align((images + 1) * 127.5, matrices))
            # OpenCV's 8-bit warp rounds positions to 1/32 pixel.
            error = np.abs(crops - want("insightface.crop_rgb_u8"))
            assert error.mean() < 0.6
            assert np.quantile(error, 0.999) < 12


@pytest.mark.parametrize("variant", ["folded", "unfolded"])
def test_embedding_and_pixel_gradient(variant):
    folder, config, io = case("arcface")
    model = arcface.load(folder / f"model_{variant}.onnx")
    assert (model.cfg.widths, model.cfg.layers) == (tuple(config["widths"]), tuple(config["layers"]))
    crops, rng = io["in.crops"].transpose(0, 2, 3, 1), np.random.default_rng(0)
    for name, order in (("rgb", slice(None)), ("channel_swapped", slice(None, None, -1))):
        errors = []
        # An activation of the first crop is all but zero, and the processor's rounding decides on which side of its kink it is: the
        # reference's gradient is that of these crops or of others no further away than rounding.
        for crop in (crops, *(crops + 1e-6 * rng.normal(size=crops.shape).astype(np.float32) for _ in range(5))):
            embedding, pull = jax.vjp(lambda x, order=order: model(x[..., order]), jnp.asarray(crop))
            assert relative(embedding, io[f"out.embedding_{name}"]) < 1e-4
            (grad,) = pull(jnp.asarray(io["in.c"]))
            errors.append(relative(grad.transpose(0, 3, 1, 2), io[f"grad.crops_{name}"]))
        assert min(errors) < 1e-3


def test_pooled_score_cases():
    io = load_file(ROOT / "reward" / "pool_cases.safetensors")
    for name in {key.split(".")[1] for key in io}:
        value = {k.removeprefix(f"pool.{name}."): v for k, v in io.items() if k.startswith(f"pool.{name}.")}

        def score(x, value=value):
            return pooled_score(x, value["in.generated_mask"] > 0, value["in.ground_truth_embedding"])

        got, grad = jax.value_and_grad(score)(jnp.asarray(value["in.generated_embedding"]))
        np.testing.assert_allclose(got, value["out.score"][0], atol=1e-6, err_msg=name)
        np.testing.assert_allclose(grad, value["grad.generated_embedding"], atol=1e-6, err_msg=name)


@pytest.mark.parametrize("order", ["rgb", "channel_swapped"])
def test_whole_reward(order):
    io = load_file(ROOT / "reward" / "full.safetensors")
    cfg = RewardConfig(compat="roll", channel_order="rgb" if order == "rgb" else "bgr")
    reward = FaceReward(
        scrfd.load(ROOT / "face" / "models" / "det_500m.onnx"),
        arcface.load(ROOT / "arcface" / "model_folded.onnx"),
        cfg,
    )
    generated, truth = (
        io[f"full.in.{n}_frames_u8"].transpose(0, 2, 3, 1).astype(np.float32) / 127.5 - 1
        for n in ("generated", "ground_truth")
    )
    pool, found = jax.jit(reward.pool)(truth)
    assert np.array_equal(found, io["full.out.ground_truth_mask"] > 0)
    assert relative(pool, io[f"full.{order}.out.ground_truth_embedding"]) < 2e-3

    @jax.jit
    def run(x):
        def score(x):
            out = reward(x[None], jnp.asarray(io[f"full.{order}.out.ground_truth_embedding"])[None])
            return out.score[0], out

        return jax.value_and_grad(score, has_aux=True)(x)

    (score, out), grad = run(generated)
    assert np.array_equal(out.mask[0], io["full.out.generated_mask"] > 0)
    assert np.abs(out.kps[0] - io["full.out.generated_kps"])[np.asarray(out.mask[0])].max() < 0.02
    assert abs(score - io[f"full.{order}.out.score"][0]) < 1e-4
    assert abs(reward_loss(score) - io[f"full.{order}.out.roll_loss_without_kl"][0]) < 1e-4
    # The stored gradient is with respect to unclamped pixels; 8-bit ones lie on the clamp's border at 0 and 255.
    inside = np.abs(generated) < 1
    want = io[f"full.{order}.grad.generated_pixels"].transpose(0, 2, 3, 1)
    assert relative(np.where(inside, grad, 0), np.where(inside, want, 0)) < 2e-2
    kps = jnp.asarray(io["full.out.generated_kps"])
    crops = align(jnp.asarray(generated), similarity(kps), roll=True)
    mask = io["full.out.generated_mask"] > 0
    assert np.abs(np.moveaxis(np.asarray(crops), -1, 1) - io["full.out.generated_crops"])[mask].max() < 1e-3

    def exact(x):
        embeddings = reward.embed(x, kps, jnp.asarray(mask))
        return pooled_score(embeddings[None], mask[None], io[f"full.{order}.out.ground_truth_embedding"][None])

    score, grad = jax.jit(jax.value_and_grad(exact))(generated)
    assert abs(score - io[f"full.{order}.out.score"][0]) < 1e-5
    # In one frame an activation lies on PReLU's kink to the last bit, and one pixel patch takes the other slope.
    errors = sorted(relative(g, w) for g, w, m in zip(grad, want, mask, strict=True) if m)
    assert errors[-2] < 1e-3
    assert relative(grad, want) < 2e-3
