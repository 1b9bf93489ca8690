"""Pretraining of the miniature's detector and of its two embedders."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from convert.onnx_export import export_iresnet, export_scrfd
from rfl_jax.miniature.faces import IDENTITY, POSE, landmarks, render, sample_identity, sample_scene, visible
from rfl_jax.miniature.fit import fit
from rfl_jax.miniature.world import (
    COMPANY,
    DETECTOR_FILE,
    EMBEDDER_FILE,
    FRAMES,
    JUDGE_FILE,
    SIZE,
    blur,
    degrade,
    moment,
)
from rfl_jax.rewards.align import align, similarity
from rfl_jax.rewards.arcface import IResNet, IResNetConfig
from rfl_jax.rewards.detect import anchor_points
from rfl_jax.rewards.scrfd import SCRFD, ConvSpec, resnet

DETECTOR = resnet((8, 8, 16), (16, 24, 32, 48), (1, 1, 1, 1), 16, (ConvSpec(32), ConvSpec(32)))
# Blur of this many pixels leaves the outline of a head, but no eyes, nose or mouth: no face to detect, nobody to know.
ERASED = 8


def train_scrfd(out: Path, seed: int, scale: float) -> None:
    """A detector of the 10g layout.

    An anchor near the middle of a face is positive. A tenth of people are out of the picture, a tenth of images are
    blurred until no face is left, and some faces are behind a hand.
    """
    graph, params = nnx.split(SCRFD(DETECTOR, rngs=nnx.Rngs(seed)))
    points, strides = (jnp.asarray(x)[None] for x in anchor_points(SIZE))
    count = 64

    def loss(params: nnx.State, key: jax.Array) -> tuple[jax.Array, dict]:
        keys = jax.random.split(key, 6)
        scene = sample_scene(keys[0], sample_identity(keys[1], count), FRAMES, company=COMPANY)
        scene = moment(keys[2], scene)
        gone, erased = jax.random.bernoulli(keys[3], 0.1, (2, count))
        pose = scene.pose.at[:, 0, :, POSE.index("y")].add(jnp.where(gone, 3.0, 0.0)[:, None])
        scene = dataclasses.replace(scene, pose=pose)
        images = render(scene, SIZE)[:, 0]
        images = degrade(keys[4], jnp.where(erased[:, None, None, None], blur(images, ERASED), images))
        kps, box = (x[:, :, 0] for x in landmarks(scene, SIZE))
        there = visible(scene)[..., 0] & ~erased[:, None]
        logits = nnx.merge(graph, params).logits(images * (127.5 / 128))
        scores, boxes, offsets = (jnp.concatenate(parts, 1) for parts in zip(*logits, strict=True))

        centre, half = (box[..., :2] + box[..., 2:]) / 2, (box[..., 2:] - box[..., :2]) / 2
        distance = jnp.abs(points[:, None] - centre[:, :, None])
        near = jnp.all(distance < 0.45 * half[:, :, None], -1) & there[..., None]
        # Each stride has anchors enough at this size; the coarsest sees the whole face but places it worst.
        positive = jnp.any(near, 1) & (strides < 32)
        # Where two faces meet, the anchor belongs to the one in front.
        owner = jnp.argmax(near, 1)
        kps = jnp.take_along_axis(kps, owner[:, :, None, None], 1)
        box = jnp.take_along_axis(box, owner[:, :, None], 1)
        left = jnp.concatenate([points - box[..., :2], box[..., 2:] - points], -1) / strides[..., None]
        shape = (kps - points[:, :, None]) / strides[..., None, None]
        probability = jax.nn.sigmoid(scores)
        focal = -jnp.where(
            positive,
            (1 - probability) ** 2 * jax.nn.log_sigmoid(scores),
            probability**2 * jax.nn.log_sigmoid(-scores),
        )
        total = jnp.sum(positive)
        box_error = jnp.sum(jnp.where(positive[..., None], jnp.abs(boxes - left), 0)) / total
        kps_error = jnp.sum(jnp.where(positive[..., None, None], jnp.abs(offsets - shape), 0)) / total
        value = jnp.sum(focal) / total + box_error / 4 + kps_error / 5
        return value, {"box": box_error / 4, "kps": kps_error / 10}

    params = fit(
        loss, params,
        steps=int(1200 * scale), learning_rate=2e-3, seed=seed, label="scrfd", folder=out / "checkpoints",
    )  # fmt: skip
    export_scrfd(nnx.merge(graph, params), out / DETECTOR_FILE)


def crops(
    key: jax.Array, identity: Float[Array, "b i"], jitter: float, *, erased: int = 0
) -> Float[Array, "c 112 112 3"]:
    """An aligned face of each of these people, in a random moment of a random clip.

    Args:
        key: random.
        identity: who they are.
        jitter: noise on the landmarks in pixels.
        erased: how many of them are shown once more at the end, blurred until nobody is left to be known.
    """
    k1, k2, k3, k4 = jax.random.split(key, 4)
    scene = moment(k1, sample_scene(k2, identity, FRAMES))
    cover = POSE.index("cover")
    scene = dataclasses.replace(scene, pose=scene.pose.at[..., cover].min(0.45))
    images, kps = render(scene, SIZE)[:, 0], landmarks(scene, SIZE)[0][:, 0, 0]
    images = degrade(k3, jnp.concatenate([images, blur(images[:erased], ERASED)]))
    kps = jnp.concatenate([kps, kps[:erased]])
    kps = kps + jitter * jax.random.normal(k4, kps.shape)
    return align(images + 1, similarity(kps)) - 1


def relatives(key: jax.Array, people: int) -> Float[Array, "b i"]:
    """Random people of whom person n + people / 2 has two thirds of the factors of person n."""
    k1, k2 = jax.random.split(key)
    first, second = jnp.split(sample_identity(k1, people), 2)
    return jnp.concatenate([first, jnp.where(jax.random.bernoulli(k2, 2 / 3, first.shape), first, second)])


def train_embedder(
    cfg: IResNetConfig,
    file: Path,
    *,
    seed: int,
    steps: int,
    temperature: float,
    factors: bool,
    jitter: float,
    label: str,
    folder: Path,
) -> None:
    """Contrastive training on people that never repeat, so that no identity is held in.

    Relatives are told apart by a few features only, so that all features count; faces that are blurred away resemble
    nobody, so that a video without features has no one's face.

    Args:
        cfg: sizes.
        file: ONNX file to write.
        seed: random seed of weights and data.
        steps: optimisation steps.
        temperature: divides the cosines before the softmax.
        factors: also regress the identity's factors from the embedding, which spreads it over all of them.
        jitter: noise on the landmarks in pixels.
        label: shown beside the progress bar.
        folder: for checkpoints.
    """
    graph, params = nnx.split(IResNet(cfg, rngs=nnx.Rngs(seed)))
    readout = 0.02 * jax.random.normal(jax.random.key(seed), (cfg.embedding, len(IDENTITY)))
    people, erased = 24, 8
    who = jnp.tile(jnp.arange(people), 2)
    same = who[:, None] == who[None]
    itself = jnp.eye(2 * people, dtype=bool)
    related = who[:, None] % (people // 2) == who[None] % (people // 2)

    def loss(weights: tuple[nnx.State, jax.Array], key: jax.Array) -> tuple[jax.Array, dict]:
        params, readout = weights
        k1, k2 = jax.random.split(key)
        identity = relatives(k1, people)[who]
        e = nnx.merge(graph, params)(crops(k2, identity, jitter, erased=erased))
        unit = e / (jnp.linalg.norm(e, axis=-1, keepdims=True) + 1e-6)
        cosine = unit[: 2 * people] @ unit.T
        known = cosine[:, : 2 * people]
        # A margin, as in CosFace: the true pair must win by 0.1.
        competing = jnp.concatenate([jnp.where(itself, -2.0, known - 0.1 * same), cosine[:, 2 * people :]], 1)
        log_p = jax.nn.log_softmax(competing / temperature, -1)[:, : 2 * people]
        pair = same & ~itself
        value = -jnp.mean(jnp.sum(log_p * pair, -1))
        # Strangers' cosines centred on zero, so that similarity has a natural origin.
        stranger = jnp.mean(known, where=~related)
        value = value + stranger**2
        if factors:
            value = value + 4 * jnp.mean((unit[: 2 * people] @ readout - (identity - 0.5)) ** 2)
        hit = jnp.mean(pair[jnp.arange(2 * people), jnp.argmax(competing[:, : 2 * people], -1)])
        return value, {
            "top1": hit, "same": jnp.mean(known, where=pair), "other": stranger,
            "related": jnp.mean(known, where=related & ~same), "erased": jnp.mean(cosine[:, 2 * people :]),
        }  # fmt: skip

    params, _ = fit(loss, (params, readout), steps=steps, learning_rate=2e-3, seed=seed, label=label, folder=folder)
    export_iresnet(nnx.merge(graph, params), file)


def train_arcface(out: Path, seed: int, scale: float) -> None:
    """The embedder that is the reward."""
    cfg = IResNetConfig(widths=(8, 16, 32, 64), layers=(1, 2, 2, 1), stem=8, embedding=64)
    train_embedder(
        cfg, out / EMBEDDER_FILE, seed=seed + 100, steps=int(900 * scale), temperature=0.07, factors=False, jitter=0.6,
        label="arcface", folder=out / "checkpoints",
    )  # fmt: skip


def train_judge(out: Path, seed: int, scale: float) -> None:
    """The embedder that only judges: other sizes, other seed, another objective."""
    cfg = IResNetConfig(widths=(12, 16, 24, 48), layers=(1, 1, 2, 2), stem=12, embedding=48)
    train_embedder(
        cfg, out / JUDGE_FILE, seed=seed + 200, steps=int(900 * scale), temperature=0.1, factors=True, jitter=0.4,
        label="judge", folder=out / "checkpoints",
    )  # fmt: skip
