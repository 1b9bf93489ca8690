"""Pretraining of the miniature's two experts: flow matching on clips whose people change, then distillation.

Clips of the data keep their first frame's person no better than released image-to-video models do: on the way to the
last frame she becomes somebody more ordinary. So the experts learn this flaw as theirs do, from data, with everything
else sharp; the reward is there to mend it. A teacher learns the velocities; the experts learn to go in one step where
the teacher goes in several, as the released ones are distilled to the few steps they are sampled with.
"""

import dataclasses
import itertools
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float
from tqdm import trange

from convert import dit as dit_converter
from convert import umt5 as umt5_converter
from convert import vae as vae_converter
from rfl_jax.data.text import PromptTokenizer
from rfl_jax.miniature.faces import prompt, render, sample_identity, sample_scene, wander
from rfl_jax.miniature.fit import fit
from rfl_jax.miniature.world import (
    COMPANY,
    DIT_FILES,
    FRAMES,
    SHIFT,
    SIZE,
    STEPS,
    T5_FILE,
    TOKENIZER_FILE,
    VAE_FILE,
    save_original,
)  # fmt: skip
from rfl_jax.models.wan.conditioning import Concatenated
from rfl_jax.models.wan.config import DIT_PRESETS
from rfl_jax.models.wan.dit import DiT
from rfl_jax.sampling.schedule import TRAIN_TIMESTEPS, experts_at, make_sigmas

CLIPS = 3072
BATCH = 32
# Least and most of the way to an ordinary person that somebody has gone by the last frame.
DRIFT = (0.3, 1.0)
# Noise on the conditioning latents while the teacher learns (Stable Video Diffusion's conditioning augmentation): so
# little that what the frame shows is taken over, so much that latents which are not quite an encoder's do no harm.
CONDITION_NOISE = 0.02
SUBSTEPS = 6  # of the teacher in one step of the experts

Data = tuple[Float[Array, "n t h w c"], Float[Array, "n t h w y"], Float[Array, "n l d"]]


def encoded_clips(out: Path, seed: int, count: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Latents, conditioning and text features of random clips, encoded with the stages before this one."""
    vae = vae_converter.load(out / "vae" / VAE_FILE, dtype="float32")
    encoder = umt5_converter.load(out / "umt5" / T5_FILE, dtype="float32")
    tokenizer = PromptTokenizer(out / TOKENIZER_FILE, DIT_PRESETS["mini"].text_len)
    batch = 16

    @jax.jit
    def encode(key: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        k1, k2, k3 = jax.random.split(key, 3)
        scene = wander(k3, sample_scene(k2, sample_identity(k1, batch), FRAMES, company=COMPANY), DRIFT)
        video = render(scene, SIZE)
        return vae.encode_whole(video), Concatenated(DIT_PRESETS["mini"]).encode(vae, video[:, 0], FRAMES), scene.words

    latents, conditions, contexts = [], [], []
    for i in trange(count // batch, desc="encoding clips", mininterval=5):
        z, y, words = encode(jax.random.fold_in(jax.random.key(seed), i))
        latents.append(np.asarray(z, np.float16))
        conditions.append(np.asarray(y, np.float16))
        ids, mask = tokenizer([prompt(w) for w in words.tolist()])
        contexts.append(np.asarray(encoder.context(jnp.asarray(ids), jnp.asarray(mask)), np.float16))
    return np.concatenate(latents), np.concatenate(conditions), np.concatenate(contexts)


def flow_matching(graph: nnx.GraphDef, data: Data, low: float, high: float) -> Callable:
    """The teacher's loss at noise levels between two, uniform on the shifted schedule."""
    ends = [s / (SHIFT - (SHIFT - 1) * s) for s in (low, high)]

    def loss(params: nnx.State, key: jax.Array) -> tuple[jax.Array, dict]:
        k1, k2, k3, k4 = jax.random.split(key, 4)
        rows = jax.random.randint(k1, (BATCH,), 0, data[0].shape[0])
        x, y, context = (d[rows].astype(jnp.float32) for d in data)
        y = y.at[..., 4:].add(CONDITION_NOISE * jax.random.normal(k4, x.shape))
        s = jax.random.uniform(k2, (BATCH,), minval=ends[0], maxval=ends[1])
        sigma = SHIFT * s / (1 + (SHIFT - 1) * s)
        noise = jax.random.normal(k3, x.shape)
        level = sigma[:, None, None, None, None]
        noisy = (1 - level) * x + level * noise
        v = nnx.merge(graph, params)(jnp.concatenate([noisy, y], -1), TRAIN_TIMESTEPS * sigma, context)
        return jnp.mean((v - (noise - x)) ** 2), {}

    return loss


def trajectories(
    graph: nnx.GraphDef, teachers: dict[str, nnx.State], data: Data, sigmas: Float[np.ndarray, " s"], seed: int
) -> np.ndarray:
    """The teacher's way from noise to video for every clip's conditioning, at each of `sigmas` [s, n, t, h, w, c]."""
    _, y, context = data
    shape = (*y.shape[1:4], y.shape[4] - 4)
    # Two experts take turns at the boundary, as in sampling.
    fine = [np.linspace(a, b, SUBSTEPS + 1)[:-1] for a, b in itertools.pairwise(sigmas)]
    names = experts_at(sigmas[:-1] * TRAIN_TIMESTEPS, DIT_PRESETS["mini"].boundary)

    @jax.jit
    def way(key: jax.Array, y: jax.Array, context: jax.Array) -> jax.Array:
        x = jax.random.normal(key, (y.shape[0], *shape))
        reached = [x]
        for name, levels, end in zip(names, fine, sigmas[1:], strict=True):
            model = nnx.merge(graph, teachers[name])

            def move(x: jax.Array, pair: tuple[jax.Array, jax.Array], model: DiT = model) -> tuple[jax.Array, None]:
                t = jnp.full(x.shape[0], TRAIN_TIMESTEPS * pair[0])
                v = model(jnp.concatenate([x, y], -1), t, context)
                return x + (pair[1] - pair[0]) * v, None

            x, _ = jax.lax.scan(move, x, (jnp.asarray(levels), jnp.append(levels[1:], end)))
            reached.append(x)
        return jnp.stack(reached)

    found = []
    for i in trange(0, y.shape[0], BATCH, desc="teacher's videos", mininterval=5):
        rows = slice(i, i + BATCH)
        key = jax.random.fold_in(jax.random.key(seed), i)
        found.append(np.asarray(way(key, *(d[rows].astype(jnp.float32) for d in (y, context))), np.float16))
    return np.concatenate(found, 1)


def distillation(
    graph: nnx.GraphDef,
    data: Data,
    ways: Float[Array, "s n t h w c"],
    sigmas: Float[np.ndarray, " s"],
    steps: list[int],
) -> Callable:
    """The loss of an expert that takes these steps: one step each from where the teacher was to where it went."""
    levels, first = jnp.asarray(sigmas), min(steps)

    def loss(params: nnx.State, key: jax.Array) -> tuple[jax.Array, dict]:
        k1, k2 = jax.random.split(key)
        rows = jax.random.randint(k1, (BATCH,), 0, ways.shape[1])
        step = jax.random.randint(k2, (BATCH,), first, max(steps) + 1)
        y, context = (d[rows].astype(jnp.float32) for d in data[1:])
        x, target = (ways[step + i, rows].astype(jnp.float32) for i in (0, 1))
        change = (levels[step + 1] - levels[step])[:, None, None, None, None]
        v = nnx.merge(graph, params)(jnp.concatenate([x, y], -1), TRAIN_TIMESTEPS * levels[step], context)
        return jnp.mean((v - (target - x) / change) ** 2), {}

    return loss


def _kept_clips(out: Path, seed: int) -> Data:
    """`encoded_clips`, kept beside the checkpoints for who resumes."""
    kept = out / "checkpoints" / f"clips_{seed}.npz"
    if not kept.exists():
        kept.parent.mkdir(parents=True, exist_ok=True)
        unfinished = kept.with_name(f".{kept.name}")
        np.savez(unfinished, *encoded_clips(out, seed, CLIPS))
        unfinished.rename(kept)
    with np.load(kept) as found:
        latents, conditions, contexts = (jnp.asarray(found[name]) for name in found.files)
    return latents, conditions, contexts


def train_dit(out: Path, seed: int, scale: float) -> None:
    """Both experts, each with its teacher; the low-noise one first, from which the high-noise one starts."""
    cfg = DIT_PRESETS["mini"]
    data = _kept_clips(out, seed + 300)
    edge = cfg.boundary or 0.9
    model = DiT(cfg, remat_policy="none", rngs=nnx.Rngs(seed))
    # The head starts at zero: the first prediction is no velocity at all.
    model.head.kernel[...] = jnp.zeros_like(model.head.kernel[...])
    graph, params = nnx.split(model)

    def train(loss: Callable, params: nnx.State, steps: int, rate: float, offset: int, label: str) -> nnx.State:
        return fit(
            loss, params, steps=int(steps * scale), learning_rate=rate, seed=seed + 400 + offset, label=label, ema=0.999,
            folder=out / "checkpoints", stacked=True,
        )  # fmt: skip

    low = train(flow_matching(graph, data, 0.0, edge), params, 3000, 2e-3, 0, "teacher: low noise")
    high = train(flow_matching(graph, data, edge, 1.0), low, 600, 1e-3, 1, "teacher: high noise")

    sigmas = make_sigmas(STEPS, SHIFT)
    ways = jnp.asarray(trajectories(graph, {"dit": high, "dit2": low}, data, sigmas, seed + 500))
    names = experts_at(sigmas[:-1] * TRAIN_TIMESTEPS, cfg.boundary)
    config = {
        "_class_name": "WanModel",
        "model_type": "i2v",
        **{k: v for k, v in dataclasses.asdict(cfg).items() if k not in ("patch_size", "first_frame_in_latents")},
    }
    for expert, teacher, steps, offset, label in (
        ("dit", high, 600, 2, "student: high noise"), ("dit2", low, 2000, 3, "student: low noise"),
    ):  # fmt: skip
        own = [i for i, name in enumerate(names) if name == expert]
        loss = distillation(graph, data, ways, sigmas, own)
        student = train(loss, teacher, steps, 1e-3, offset, label)
        save_original(nnx.merge(graph, student), dit_converter.NAMINGS["original"], out / DIT_FILES[expert], config)
