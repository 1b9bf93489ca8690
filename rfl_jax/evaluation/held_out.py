"""Held-out clips: sampled with given weights, scored by the reward's embedder and by one that only judges."""

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding
from jaxtyping import Array

from rfl_jax import hosts
from rfl_jax.data.prepare import Prepared, clip_settings, open_judge
from rfl_jax.data.videos import read_clip, to_uint8
from rfl_jax.evaluation.figures import Scored
from rfl_jax.rewards.face import FaceReward, Score, cosine_with_pool, usable_pool
from rfl_jax.sampling.rollout import rollout
from rfl_jax.sharding import BATCH, batch_shards, replicated
from rfl_jax.training.setup import Setup, evaluation_key
from rfl_jax.training.state import Frozen, States
from rfl_jax.training.step import bind_experts, latent_shape, start_noise


class HeldOut:
    """The held-out clips of a run, ready to be sampled: each from a noise of its own, the same for all weights.

    Args:
        run: whose `cfg.eval` names clips and judge.
    """

    def __init__(self, run: Setup) -> None:
        self.run = run
        self.items = run.held_out
        self._key = evaluation_key(run.key)
        self._whole = replicated(run.mesh)
        reward = run.networks.build("reward", {}, run.frozen)
        self._judge_graph, judge = nnx.split(open_judge(reward, run.cfg.eval.judge_model_path))
        self._judge = jax.tree.map(lambda x: hosts.place(x, self._whole), judge)

    def batches(self, clips: int | None = None) -> Iterator[list[int]]:
        """Numbers of the clips that are sampled together: those of one size, as many as in training.

        Args:
            clips: at most so many, the first; all by default.
        """
        size = self.run.cfg.per_device_train_batch_size * batch_shards(self.run.mesh)
        shapes = self._shapes[:clips]
        for shape in dict.fromkeys(shapes):
            same = [i for i, found in enumerate(shapes) if found == shape]
            for start in range(0, len(same), size):
                yield same[start : start + size]

    @functools.cached_property
    def _shapes(self) -> list[tuple[int, ...]]:
        """Of each clip's latents; read once, however often the clips are judged."""
        return [item.load()["y"].shape for item in self.items]

    def sample(self, params: States, numbers: Sequence[int]) -> list[Scored]:
        """These clips, sampled with these weights from their noises and scored.

        Args:
            params: the trainable weights.
            numbers: from `batches`.
        """
        run, shards = self.run, batch_shards(self.run.mesh)
        # A batch that is not full is filled up with its last clip.
        size = run.cfg.per_device_train_batch_size * shards
        rows = [numbers[min(i, len(numbers) - 1)] for i in range(size)]
        loaded = [self.items[i].load() for i in rows]
        batch = {name: np.stack([x[name] for x in loaded]) for name in (*run.batch_names, "judge_pool")}
        if self.items[rows[0]].prefix:
            batch["prefix"] = np.stack([self.items[i].load_prefix(0) for i in rows])
        batch["sample"] = np.array(rows, np.int32)
        samples = NamedSharding(run.mesh, BATCH)
        placed = {name: hosts.place(x, samples) for name, x in batch.items()}
        placed |= {name: hosts.place(x, self._whole) for name, x in run.constants.items()}
        with jax.set_mesh(run.mesh):
            found = jax.tree.map(np.asarray, self._sample(params, run.frozen, self._judge, placed, self._key))
        return _scored(*found)[: len(numbers)]

    def real(self, number: int) -> Scored:
        """The real clip, scored against its own faces."""
        item: Prepared = self.items[number]
        video = read_clip(item.row.video, **clip_settings(self.run.cfg))[None]
        pools = (item.load()[name][None] for name in ("pool", "judge_pool"))
        with jax.set_mesh(self.run.mesh):
            weights = self.run.frozen.rest["reward"]
            found = jax.tree.map(np.asarray, self._score(weights, self._judge, video, *pools))
        return _scored(video, *found)[0]

    # All weights are arguments: what a jitted function closes over becomes a constant of its program.
    @functools.cached_property
    def _sample(self) -> Any:
        run, sampler = self.run, self.run.rollout

        def sample(
            params: States, frozen: Frozen, judge: nnx.State, batch: dict[str, Array], key: Array
        ) -> tuple[Array, Score, Array]:
            experts, keep = bind_experts(run.networks, sampler, params, frozen, batch)
            start = batch.get("prefix")
            if start is None:
                first = jnp.zeros_like(batch["sample"])
                start = start_noise(key, batch["sample"], first, latent_shape(sampler, batch), "fresh")
            # Without references: the KL is not asked for.
            experts = {name: dataclasses.replace(e, reference=None) for name, e in experts.items()}
            latents = rollout(experts, start, sampler.levels, sampler.phases, keep=keep).latents
            video = jnp.clip(run.networks.build("vae", params, frozen).decode(latents), -1, 1)
            reward = run.networks.build("reward", params, frozen)
            return video, *self._judged(reward, judge, video, batch["pool"], batch["judge_pool"])

        return jax.jit(sample, out_shardings=self._whole)

    @functools.cached_property
    def _score(self) -> Any:
        def score(reward: nnx.State, judge: nnx.State, video: Array, pool: Array, judge_pool: Array) -> Any:
            return self._judged(self.run.networks.merge("reward", reward), judge, video, pool, judge_pool)

        return jax.jit(score, out_shardings=self._whole)

    def _judged(
        self, reward: FaceReward, judge: nnx.State, video: Array, pool: Array, judge_pool: Array
    ) -> tuple[Score, Array]:
        """The reward's score, and each frame's similarity by the judging embedder."""
        score = reward(video, pool)
        other: FaceReward = nnx.merge(self._judge_graph, judge)
        frames = video.reshape(-1, *video.shape[2:])
        embeddings = other.embed(frames, score.kps.reshape(-1, 5, 2), score.mask.reshape(-1))
        mask = usable_pool(judge_pool, use_first_frame=self.run.cfg.reward.use_first_frame)
        return score, cosine_with_pool(embeddings.reshape(*score.mask.shape, -1), judge_pool, mask)


def _scored(video: np.ndarray, score: Score, judged: np.ndarray) -> list[Scored]:
    return [
        Scored(
            to_uint8(video[i]),
            np.asarray(score.per_frame[i]),
            judged[i],
            np.asarray(score.mask[i]),
            np.asarray(score.kps[i]),
            np.asarray(score.boxes[i]),
        )
        for i in range(len(video))
    ]


def untrained(run: Setup, params: States) -> States:
    """The trainable weights as they were before training: adapters whose product is zero, or the frozen copies."""

    def without_product(path: tuple, x: jax.Array) -> jax.Array:
        return jnp.zeros_like(x) if "lora_b" in jax.tree_util.keystr(path) else x

    return {
        name: jax.tree_util.tree_map_with_path(without_product, part)
        if name in run.networks.adapted
        else jax.tree.map(lambda x: x.astype(jnp.float32), run.frozen.reference[name])
        for name, part in params.items()
    }
