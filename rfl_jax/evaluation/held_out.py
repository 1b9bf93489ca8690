"""Held-out clips: sampled with given weights, scored by the reward's embedder and by one that only judges."""

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array

from rfl_jax import hosts
from rfl_jax.chips import compiler_options
from rfl_jax.config import Config
from rfl_jax.data.batching import Batches, filled, in_batches
from rfl_jax.data.cache import ClipArrays, PreparedClip
from rfl_jax.data.sizes import clip_settings
from rfl_jax.data.videos import read_clip, to_uint8
from rfl_jax.evaluation.measures import ByPerson, ByTerm, Scored, term_measures
from rfl_jax.networks.faces import open_judge
from rfl_jax.networks.parts import Frozen, Networks, States, untrained
from rfl_jax.networks.table import REWARD, TERMS
from rfl_jax.networks.terms import build_terms, prepared_for, shown_as, term_keys
from rfl_jax.rewards.face import FaceReward, Score, cosine_with_pool, usable_people, usable_pool
from rfl_jax.rewards.people import NOBODY, likenesses, mean_of_frames, of_people, own
from rfl_jax.rewards.term import TermScore
from rfl_jax.sampling.rollout import rollout
from rfl_jax.sampling.sampler import Batch, Sampler, bind_experts, latent_shape, start_noise
from rfl_jax.sharding import replicated
from rfl_jax.terminal import waiting

# What the networks say of videos: the face's score, each frame's similarity by the judging embedder, the terms by name, and where
# all people count the judging embedder's similarity of each one's face to everybody's.
Judged = tuple[Score, Array, dict[str, TermScore], Array | None]

# Folded into the run's key, so that no clip is judged on a noise it was trained on.
EVALUATION = 0x5EED


def evaluation_key(key: jax.Array) -> jax.Array:
    """The randomness of a run's evaluation."""
    return jax.random.fold_in(key, EVALUATION)


class HeldOut:
    """The held-out clips of a run, ready to be sampled: each from a noise of its own, the same for all weights.

    Args:
        cfg: of the run; `cfg.eval` names the judge.
        clips: held out, prepared.
        batches: how clips make batches.
        networks: static halves of the networks.
        frozen: their weights that do not train.
        sampler: all denoising steps that are not cached.
        key: of the run.
    """

    def __init__(
        self,
        cfg: Config,
        clips: Sequence[PreparedClip],
        batches: Batches,
        networks: Networks,
        frozen: Frozen,
        sampler: Sampler,
        key: jax.Array,
    ) -> None:
        self.clips = clips
        self._cfg = cfg
        self._batches = batches
        self._networks = networks
        self._frozen = frozen
        self._sampler = sampler
        self._key = evaluation_key(key)
        self._whole = replicated(batches.mesh)
        self._options = compiler_options(batches.mesh, cfg.compiler_options)
        self._terms = term_keys(cfg)
        self._people = (*cfg.people_arrays, "judge_people_pool") if cfg.people_arrays else ()
        self.term_measures = term_measures(cfg)
        reward = networks.build(REWARD, {}, frozen)
        self._judge_graph, judge = nnx.split(open_judge(cfg, reward, cfg.eval.judge_model_path))
        self._judge = jax.tree.map(lambda x: hosts.place(x, self._whole), judge)

    def in_batches(self, count: int | None = None) -> Iterator[list[int]]:
        """Numbers of the clips that are sampled together: those of one size, as many as in training.

        Args:
            count: at most so many clips, the first; all by default.
        """
        shapes = self._shapes[:count]
        return in_batches(range(len(shapes)), shapes, self._batches.micro)

    @functools.cached_property
    def _shapes(self) -> list[tuple[int, int, int]]:
        """The latents' size of each clip; read once, however often the clips are judged."""
        return [clip.latent_shape for clip in self.clips]

    def untrained(self, params: States) -> States:
        """Weights in the structure of `params` as they were before training."""
        return untrained(self._networks, self._frozen, params)

    def judge(self, params: States, numbers: Sequence[int]) -> list[Scored]:
        """These clips, sampled with these weights from their noises and scored.

        Args:
            params: the trainable weights.
            numbers: from `in_batches`.
        """
        rows = filled(numbers, self._batches.micro)
        names = (*self._batches.names, "judge_pool")
        loaded = [self.clips[i].load(names) for i in rows]
        loaded = [{name: x[name] for name in names} for x in loaded]
        loaded = [x | self._besides(self.clips[i]) for x, i in zip(loaded, rows, strict=True)]
        arrays = {name: np.stack([x[name] for x in loaded]) for name in loaded[0]}
        if self.clips[rows[0]].prefix:
            arrays["prefix"] = np.stack([self.clips[i].load_prefix(0) for i in rows])
        arrays["clip"] = np.array(rows, np.int32)
        batch = self._batches.place(arrays)
        first = "_sample" not in vars(self)
        compiles = waiting("compile the judging of held-out clips", show=first and hosts.is_writer())
        with compiles, jax.set_mesh(self._batches.mesh):
            video, judged = self._sample(params, self._frozen, self._judge, batch, self._key)
        return _scored(np.asarray(video), judged)[: len(numbers)]

    def real(self, number: int) -> Scored:
        """The real clip, scored against its own faces."""
        clip = self.clips[number]
        video = read_clip(clip.clip.video, **clip_settings(self._cfg))[None]
        names = ("pool", "judge_pool")
        arrays = clip.load(names)
        arrays = {name: arrays[name] for name in names} | self._besides(clip)
        kept = Frozen({name: self._frozen.rest[name] for name in (REWARD, TERMS) if name in self._frozen.rest}, {})
        with jax.set_mesh(self._batches.mesh):
            judged = self._score(kept, self._judge, video, {name: x[None] for name, x in arrays.items()})
        return _scored(video, judged)[0]

    def _besides(self, clip: PreparedClip) -> ClipArrays:
        """What is compared with besides the largest face: for the reward's terms, and all people."""
        return clip.load_terms(self._terms) | clip.load_people(self._people)

    # All weights are arguments: what a jitted function closes over becomes a constant of its program.
    @functools.cached_property
    def _sample(self) -> Any:
        networks, sampler = self._networks, self._sampler

        def sample(params: States, frozen: Frozen, judge: nnx.State, batch: Batch, key: Array) -> tuple[Array, Judged]:
            experts, keep = bind_experts(networks, sampler, params, frozen, batch)
            start = batch.get("prefix")
            if start is None:
                first = jnp.zeros_like(batch["clip"])
                start = start_noise(key, batch["clip"], first, latent_shape(sampler, batch), "fresh")
            # Without references: the KL is not asked for.
            experts = {name: dataclasses.replace(e, reference=None) for name, e in experts.items()}
            latents = rollout(experts, start, sampler.sigmas, sampler.spans, keep=keep).latents
            video = jnp.clip(networks.build("vae", params, frozen).decode(latents), -1, 1)
            return video, self._judged(frozen, judge, video, batch)

        return hosts.together(jax.jit(sample, out_shardings=self._whole, compiler_options=self._options))

    @functools.cached_property
    def _score(self) -> Any:
        return hosts.together(jax.jit(self._judged, out_shardings=self._whole, compiler_options=self._options))

    def _judged(self, frozen: Frozen, judge: nnx.State, video: Array, batch: Batch) -> Judged:
        """What the networks say of videos, whose faces are looked for once."""
        reward: FaceReward = self._networks.build(REWARD, {}, frozen)
        seen = reward.see(video)
        score = reward.score(seen, batch)
        other: FaceReward = nnx.merge(self._judge_graph, judge)
        first = self._cfg.reward.use_first_frame
        each = None
        if score.people is None:
            frames = video.reshape(-1, *video.shape[2:])
            embeddings = other.embed(frames, score.kps.reshape(-1, 5, 2), score.mask.reshape(-1))
            mask = usable_pool(batch["judge_pool"], use_first_frame=first)
            judged = cosine_with_pool(embeddings.reshape(*score.mask.shape, -1), batch["judge_pool"], mask)
        else:
            pool = batch["judge_people_pool"]
            alike = likenesses(seen.by(other).crowd_embeddings, pool, usable_people(pool, use_first_frame=first))
            each = of_people(alike, score.people.face)
            _, judged = mean_of_frames(own(each), score.people.counts)
        terms = build_terms(self._cfg, self._networks, {}, frozen)
        return score, judged, {name: term(seen, prepared_for(name, term, batch)) for name, term in terms.items()}, each


def _scored(video: np.ndarray, judged: Judged) -> list[Scored]:
    """The clips of a batch one by one, off the devices."""
    score, by_judge, terms, each = judged
    found = score.people
    people = None if found is None else (found.similarity, each, found.face != NOBODY, found.counts, found.boxes)
    people = jax.device_get(people)
    fields = jax.device_get((score.per_frame, by_judge, score.mask, score.kps, score.boxes))
    by_term = jax.device_get({shown_as(name): (found.score, found.per_frame) for name, found in terms.items()})
    return [
        Scored(
            to_uint8(frames),
            *values,
            terms={name: ByTerm(float(scores[i]), by_frame[i]) for name, (scores, by_frame) in by_term.items()},
            people=None if people is None else ByPerson(*(x[i] for x in people)),
        )
        for i, (frames, *values) in enumerate(zip(video, *fields, strict=True))
    ]
