"""What a run works on, before the weights of its step are loaded: devices, sampling schedule, prepared clips."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
from etils import epath
from jax.sharding import Mesh

from rfl_jax import hosts
from rfl_jax.config import Config
from rfl_jax.data.batching import Batches, micro_batch, samples_per_update
from rfl_jax.data.dataset import check_shapes
from rfl_jax.data.encoding import ClipEncoder, negative_context
from rfl_jax.data.metadata import read_metadata
from rfl_jax.data.preparation import Clips, prepare_clips
from rfl_jax.evaluation.held_out import evaluation_key
from rfl_jax.networks.check import check_trainable, check_weights
from rfl_jax.networks.terms import check_terms
from rfl_jax.runs import RunFolder
from rfl_jax.sampling.prefix import cache_prefix
from rfl_jax.sampling.sampler import Sampler, caches_prefix, different_noises, make_sampler, split_prefix
from rfl_jax.sharding import make_mesh
from rfl_jax.sources import Sources, experts_of, find_sources


@dataclasses.dataclass(frozen=True)
class Inputs:
    """What a run works on.

    Attributes:
        sources: where its weights are.
        clips: prepared.
        batches: how clips make batches.
        prefix: denoising steps that run before every update; none of them where their result is cached.
        sampler: denoising steps of the update itself.
        key: of all randomness.
        steps: of `train_batch_size` videos, in all.
        updates_per_step: optimizer updates a step.
    """

    sources: Sources
    clips: Clips
    batches: Batches
    prefix: Sampler
    sampler: Sampler
    key: jax.Array
    steps: int
    updates_per_step: int

    @property
    def mesh(self) -> Mesh:
        """The run's devices."""
        return self.batches.mesh

    @property
    def whole_sampler(self) -> Sampler:
        """All denoising steps that run in an update."""
        return dataclasses.replace(self.sampler, spans=self.prefix.spans + self.sampler.spans)


def cache_of(cfg: Config, folder: RunFolder) -> epath.Path:
    """The folder of a run's prepared clips."""
    return epath.Path(cfg.data.cache_dir) if cfg.data.cache_dir else folder.cache


def prepare_inputs(cfg: Config, folder: RunFolder, devices: Sequence[Any] | None = None) -> Inputs:
    """Prepares every clip and its frozen prefix, as far as they are not in the cache.

    Args:
        cfg: of the run.
        folder: of the run.
        devices: this machine's by default.

    Raises:
        UserError: anything in the configuration or the data that cannot be used.
    """
    check_trainable(cfg)
    sources = find_sources(cfg, experts=experts_of(cfg))
    check_weights(cfg, sources)
    check_terms(cfg)
    prefix, sampler = split_prefix(cfg, make_sampler(cfg))
    cached = caches_prefix(cfg, prefix)
    mesh = make_mesh(dataclasses.asdict(cfg.mesh), devices)
    updates_per_step = cfg.train_batch_size // samples_per_update(cfg, mesh)
    cache = cache_of(cfg, folder)
    clips = _prepare_clips(cfg, sources, cache)
    check_shapes(clips.training, micro_batch(cfg, mesh))
    batches = Batches(
        mesh,
        names=("y", "pool", *(("ids", "mask") if "text_encoder" in cfg.trained else ("context",))),
        constants={"negative_context": negative_context(cfg, sources)[None]} if sampler.guided else {},
        micro=micro_batch(cfg, mesh),
        accumulation=cfg.gradient_accumulation_steps,
    )
    clips_per_step = cfg.train_batch_size // cfg.noises_at_once
    steps_per_epoch = max(1, len(clips.training) // clips_per_step)
    steps = cfg.max_steps if cfg.max_steps > 0 else cfg.num_train_epochs * steps_per_epoch
    key = hosts.random_key(cfg.seed, mesh)
    if cached:
        epochs = -(-steps * clips_per_step // len(clips.training))
        noises = min(different_noises(cfg), epochs * cfg.noises_at_once)
        clips = Clips(
            cache_prefix(
                cfg, sources, prefix, clips.training, cache, batches, key=key, noises=noises, mode=cfg.noise.mode
            ),
            cache_prefix(
                cfg, sources, prefix, clips.held_out, cache, batches, key=evaluation_key(key), noises=1, mode="fresh"
            ),
        )
        prefix = dataclasses.replace(prefix, spans=())
    return Inputs(sources, clips, batches, prefix, sampler, key, steps, updates_per_step)


def _prepare_clips(cfg: Config, sources: Sources, cache: epath.Path) -> Clips:
    """The clips to train on and those held out. Both before training: a bad held-out row is found now, not at the end."""
    encoder = ClipEncoder(cfg, sources, cfg.eval.judge_model_path)
    rows, listed_in = read_metadata(cfg.file_name), cfg.file_name
    training = prepare_clips(encoder, rows, cache, listed_in=listed_in, real=cfg.real_arrays)
    if not cfg.eval.file_name:
        return Clips(training, [])
    rows = read_metadata(cfg.eval.file_name)[: cfg.eval.num_samples]
    return Clips(training, prepare_clips(encoder, rows, cache, listed_in=cfg.eval.file_name))
