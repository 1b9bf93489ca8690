"""Pretraining of the miniature's detector and of its two embedders."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
from flax import nnx

from convert.onnx_export import export_iresnet, export_scrfd
from rfl_jax.miniature.faces import IDENTITY, POSE, landmarks, render, sample_identity, sample_scene
from rfl_jax.miniature.fit import fit
from rfl_jax.miniature.world import DETECTOR_FILE, EMBEDDER_FILE, JUDGE_FILE, SIZE, degrade
from rfl_jax.rewards.align import align, similarity
from rfl_jax.rewards.arcface import IResNet, IResNetConfig
from rfl_jax.rewards.detect import anchor_points
from rfl_jax.rewards.scrfd import SCRFD, ConvSpec, resnet

DETECTOR = resnet((8, 8, 16), (16, 24, 32, 48), (1, 1, 1, 1), 16, (ConvSpec(32), ConvSpec(32)))


def train_scrfd(out: Path, seed: int, scale: float) -> None:
    """A detector of the 10g layout. An anchor near the middle of the face is positive; a tenth of images have none."""
    graph, params = nnx.split(SCRFD(DETECTOR, rngs=nnx.Rngs(seed)))
    points, strides = (jnp.asarray(x)[None] for x in anchor_points(SIZE))

    def loss(params: nnx.State, key: jax.Array) -> tuple[jax.Array, dict]:
        k1, k2, k3, k4 = jax.random.split(key, 4)
        scene = sample_scene(k2, sample_identity(k1, 64), 1)
        gone = jax.random.bernoulli(k3, 0.1, (64,))
        pose = scene.pose.at[..., POSE.index("y")].add(jnp.where(gone, 3.0, 0.0)[:, None])
        scene = dataclasses.replace(scene, pose=pose)
        images = degrade(k4, render(scene, SIZE)[:, 0])
        kps, box = (x[:, 0] for x in landmarks(scene, SIZE))
        logits = nnx.merge(graph, params).logits(images * (127.5 / 128))
        scores, boxes, offsets = (jnp.concatenate(parts, 1) for parts in zip(*logits, strict=True))

        centre, half = (box[:, None, :2] + box[:, None, 2:]) / 2, (box[:, None, 2:] - box[:, None, :2]) / 2
        near = jnp.all(jnp.abs(points - centre) < 0.45 * half, -1) & ~gone[:, None]
        # Each stride has anchors enough at this size; the coarsest sees the whole face but places it worst.
        positive = near & (strides < 32)
        left = jnp.concatenate([points - box[:, None, :2], box[:, None, 2:] - points], -1) / strides[..., None]
        shape = (kps[:, None] - points[:, :, None]) / strides[..., None, None]
        probability = jax.nn.sigmoid(scores)
        focal = -jnp.where(
            positive,
            (1 - probability) ** 2 * jax.nn.log_sigmoid(scores),
            probability**2 * jax.nn.log_sigmoid(-scores),
        )
        count = jnp.sum(positive)
        box_error = jnp.sum(jnp.where(positive[..., None], jnp.abs(boxes - left), 0)) / count
        kps_error = jnp.sum(jnp.where(positive[..., None, None], jnp.abs(offsets - shape), 0)) / count
        value = jnp.sum(focal) / count + box_error / 4 + kps_error / 5
        return value, {"box": box_error / 4, "kps": kps_error / 10}

    params = fit(loss, params, steps=int(1200 * scale), learning_rate=2e-3, seed=seed, label="scrfd")
    export_scrfd(nnx.merge(graph, params), out / DETECTOR_FILE)


def pairs(key: jax.Array, people: int, turn: float) -> tuple[jax.Array, jax.Array]:
    """Two aligned crops each of `people` persons [2 * people, 112, 112, 3], and who they are [people, i]."""
    k1, k2, k3, k4 = jax.random.split(key, 4)
    identity = sample_identity(k1, people)
    scene = sample_scene(k2, jnp.concatenate([identity, identity]), 1)
    images = degrade(k3, render(scene, SIZE)[:, 0])
    kps = landmarks(scene, SIZE)[0][:, 0]
    kps = kps + turn * jax.random.normal(k4, kps.shape)
    return align(images + 1, similarity(kps)) - 1, identity


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
) -> None:
    """Contrastive training on people that never repeat, so that no identity is held in.

    Args:
        cfg: sizes.
        file: ONNX file to write.
        seed: random seed of weights and data.
        steps: optimisation steps.
        temperature: divides the cosines before the softmax.
        factors: also regress the identity's factors from the embedding, which spreads it over all of them.
        jitter: noise on the landmarks in pixels.
        label: shown beside the progress bar.
    """
    graph, params = nnx.split(IResNet(cfg, rngs=nnx.Rngs(seed)))
    readout = 0.02 * jax.random.normal(jax.random.key(seed), (cfg.embedding, len(IDENTITY)))

    def loss(weights: tuple[nnx.State, jax.Array], key: jax.Array) -> tuple[jax.Array, dict]:
        params, readout = weights
        people = 16
        crops, identity = pairs(key, people, jitter)
        e = nnx.merge(graph, params)(crops)
        unit = e / (jnp.linalg.norm(e, axis=-1, keepdims=True) + 1e-6)
        cosine = unit @ unit.T - 2.0 * jnp.eye(2 * people)
        partner = (jnp.arange(2 * people) + people) % (2 * people)
        # A margin, as in CosFace: the true pair must win by 0.1.
        margin = 0.1 * jax.nn.one_hot(partner, 2 * people)
        log_p = jax.nn.log_softmax((cosine - margin) / temperature, -1)
        value = -jnp.mean(log_p[jnp.arange(2 * people), partner])
        hit = jnp.mean(jnp.argmax(cosine, -1) == partner)
        # Strangers' cosines centred on zero, so that similarity has a natural origin.
        stranger = (jnp.sum(cosine) + 4 * people - 2 * jnp.sum(cosine[jnp.arange(people), partner[:people]])) / (
            2 * people * (2 * people - 2)
        )
        value = value + stranger**2
        if factors:
            value = value + 4 * jnp.mean((unit @ readout - (jnp.concatenate([identity, identity]) - 0.5)) ** 2)
        pair = jnp.mean(cosine[jnp.arange(2 * people), partner])
        return value, {"top1": hit, "same": pair, "other": stranger}

    params, _ = fit(loss, (params, readout), steps=steps, learning_rate=2e-3, seed=seed, label=label)
    export_iresnet(nnx.merge(graph, params), file)


def train_arcface(out: Path, seed: int, scale: float) -> None:
    """The embedder that is the reward."""
    cfg = IResNetConfig(widths=(8, 16, 32, 64), layers=(1, 2, 2, 1), stem=8, embedding=64)
    train_embedder(
        cfg, out / EMBEDDER_FILE,
        seed=seed + 100, steps=int(280 * scale), temperature=0.1, factors=False, jitter=0.6, label="arcface",
    )  # fmt: skip


def train_judge(out: Path, seed: int, scale: float) -> None:
    """The embedder that only judges: other sizes, other seed, another objective."""
    cfg = IResNetConfig(widths=(12, 16, 24, 48), layers=(1, 1, 2, 2), stem=12, embedding=48)
    train_embedder(
        cfg, out / JUDGE_FILE,
        seed=seed + 200, steps=int(280 * scale), temperature=0.15, factors=True, jitter=0.4, label="judge",
    )  # fmt: skip
