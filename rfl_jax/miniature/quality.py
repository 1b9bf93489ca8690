"""What the pretrained networks of the miniature can do, on people and clips that none of them has seen.

    python -m rfl_jax.miniature.quality [--assets=DIR] [--people=1000] [--seed=7]

One line a figure. The generator's are those of `evaluation.json`, which every run writes.
"""

import argparse
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from convert import arcface as arcface_converter
from convert import scrfd as scrfd_converter
from convert import vae as vae_converter
from rfl_jax.chips import answer_libtpu
from rfl_jax.errors import ArgumentParser, UserError, refuse_in_one_line
from rfl_jax.miniature.faces import (
    HELD_OUT_PROMPTS,
    POSE,
    Scene,
    landmarks,
    render,
    sample_identity,
    sample_scene,
    visible,
)
from rfl_jax.miniature.stage_faces import ERASED
from rfl_jax.miniature.world import (
    ASSETS,
    COMPANY,
    DETECTOR_FILE,
    EMBEDDER_FILE,
    FRAMES,
    JUDGE_FILE,
    SIZE,
    VAE_FILE,
    blur,
    moment,
)
from rfl_jax.rewards.align import align, similarity
from rfl_jax.rewards.detect import detect, largest
from rfl_jax.rewards.face import FaceReward, RewardConfig

Figures = Iterator[tuple[str, float]]
BATCH = 50


def autoencoder(assets: Path, seed: int, clips: int = 16) -> Figures:
    """The round trip of clips: its error, in dB and of the background's colours, and what the judge says of the faces."""
    vae = vae_converter.load(assets / "vae" / VAE_FILE, dtype="float32")
    k1, k2 = jax.random.split(jax.random.key(seed))
    scene = sample_scene(k2, sample_identity(k1, clips), FRAMES, prompts=HELD_OUT_PROMPTS, company=COMPANY)
    video = np.asarray(render(scene, SIZE))
    trip = jax.jit(lambda v: jnp.clip(vae.decode_whole(vae.encode_whole(v)), -1, 1))
    back = np.concatenate([np.asarray(trip(video[i : i + 4])) for i in range(0, clips, 4)])
    yield "autoencoder: round trip, dB", float(-10 * np.log10(np.mean((back - video) ** 2) / 4))
    corner = np.abs((back - video)[:, :, :4, :4].mean((1, 2, 3))) * 127.5
    yield "autoencoder: worst error of a background's colour, of 255", float(corner.max())
    detector = scrfd_converter.load(assets / DETECTOR_FILE)
    for name, file in (("reward", EMBEDDER_FILE), ("judge", JUDGE_FILE)):
        reward = FaceReward(detector, arcface_converter.load(assets / file), RewardConfig(detector_size=SIZE))
        pool = jax.jit(lambda v, reward=reward: reward.pool(v)[0])
        pools = jnp.stack([pool(v) for v in video])
        score = jax.jit(lambda v, p, reward=reward: reward(v, p))
        real, trips = score(video, pools), score(back, pools)
        yield f"autoencoder: FaceSim of real clips, {name}", float(real.score.mean())
        yield f"autoencoder: FaceSim of their round trips, {name}", float(trips.score.mean())


def _moments(key: jax.Array, people: jax.Array) -> Scene:
    k1, k2 = jax.random.split(key)
    return moment(k1, sample_scene(k2, people, FRAMES, prompts=HELD_OUT_PROMPTS))


def embedder(model: nnx.Module, name: str, people: int, seed: int) -> Figures:
    """One picture of each person to recognise another by, both not behind a hand and in any pose."""

    @jax.jit
    def shown(key: jax.Array) -> tuple[jax.Array, ...]:
        k1, k2, k3 = jax.random.split(key, 3)
        identity = sample_identity(k1, BATCH)
        found = []
        for k in (k2, k3):
            scene = _moments(k, identity)
            images, kps = render(scene, SIZE)[:, 0], landmarks(scene, SIZE)[0][:, 0, 0]
            e = [model(align(x + 1, similarity(kps)) - 1) for x in (images, blur(images, ERASED))]
            found += [
                *(x / jnp.linalg.norm(x, axis=-1, keepdims=True) for x in e),
                scene.pose[:, 0, 0, POSE.index("yaw")],
                visible(scene)[:, 0, 0],
            ]
        return tuple(found)

    keys = jax.random.split(jax.random.key(seed), -(-people // BATCH))
    columns = (np.concatenate(x)[:people] for x in zip(*(shown(k) for k in keys), strict=True))
    first, _, yaw1, there1, second, erased, yaw2, there2 = columns
    cosines = first @ second.T
    seen = there1 & there2
    same, strangers = np.diag(cosines)[seen], cosines[~np.eye(len(cosines), dtype=bool)]
    yield f"{name}: recognised, share", float(np.mean(cosines.argmax(1) == np.arange(len(cosines)), where=seen))
    yield f"{name}: cosine of the same person", float(same.mean())
    yield f"{name}: the same person's lowest twentieth", float(np.quantile(same, 0.05))
    yield f"{name}: cosine of strangers", float(strangers.mean())
    yield f"{name}: strangers' spread", float(strangers.std())
    turn = np.abs(yaw1 - yaw2)[seen]
    yield f"{name}: change of the same person's cosine by radian of turn", float(np.polyfit(turn, same, 1)[0])
    yield f"{name}: cosine with the person blurred away", float(np.mean(np.sum(first * erased, -1), where=seen))


def detector(assets: Path, seed: int, count: int = 400) -> Figures:
    """Faces found where they are, and none where none are."""
    model = scrfd_converter.load(assets / DETECTOR_FILE)
    k1, k2 = jax.random.split(jax.random.key(seed))
    scene = _moments(k1, sample_identity(k2, count))
    images = np.asarray(render(scene, SIZE)[:, 0])
    true, there = landmarks(scene, SIZE)[0][:, 0, 0], np.asarray(visible(scene)[:, 0, 0])
    find = jax.jit(lambda x: largest(detect(model, x, size=SIZE)))
    kps, _, found = (
        np.concatenate(x) for x in zip(*(find(images[i : i + BATCH]) for i in range(0, count, BATCH)), strict=True)
    )
    yield "detector: faces found, share", float(np.mean(found, where=there))
    yield "detector: error of points, median, px", float(np.median(np.linalg.norm(kps - true, axis=-1)[found & there]))
    yield "detector: found behind a hand, share", float(np.mean(found, where=~there))
    erased = np.asarray(blur(jnp.asarray(images), ERASED))
    gone = np.concatenate([np.asarray(find(erased[i : i + BATCH])[2]) for i in range(0, count, BATCH)])
    yield "detector: found in pictures blurred until none is left, share", float(gone.mean())


def figures(assets: Path, people: int, seed: int) -> Figures:
    """All of them.

    Args:
        assets: folder of the pretrained networks.
        people: among whom one is to be recognised.
        seed: of people and clips.
    """
    yield from detector(assets, seed)
    for name, file in (("reward's embedder", EMBEDDER_FILE), ("judge", JUDGE_FILE)):
        yield from embedder(arcface_converter.load(assets / file), name, people, seed)
    yield from autoencoder(assets, seed)


def main() -> None:
    parser = ArgumentParser(
        prog="python -m rfl_jax.miniature.quality",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--assets", type=Path, default=ASSETS, help="folder of the networks (default: the miniature's)")
    parser.add_argument("--people", type=int, default=1000, help="among whom one is to be recognised (default: 1000)")
    parser.add_argument("--seed", type=int, default=7, help="of people and clips (default: 7)")
    args = parser.parse_args()
    if args.people < 2:
        raise UserError(f"--people: {args.people}: expected at least 2")
    for name, value in figures(args.assets, args.people, args.seed):
        print(f"{name:75} {value:8.3f}", flush=True)


if __name__ == "__main__":
    answer_libtpu()
    with refuse_in_one_line("quality"):
        main()
