"""The frozen prefix: denoising steps before the first network that trains.

They depend on nothing but the clip and its noise. With their result in the cache, training neither repeats them nor
holds the network that takes them; without, the same program runs before every update.
"""

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import jax
import numpy as np
from etils import epath
from jax.sharding import Mesh
from tqdm import tqdm

from rfl_jax import hosts
from rfl_jax.chips import compiler_options
from rfl_jax.config import Config
from rfl_jax.data.batching import Batches, filled, in_batches
from rfl_jax.data.cache import PreparedClip, write_arrays
from rfl_jax.fingerprint import fingerprint
from rfl_jax.networks.parts import Frozen, Networks, split_placed
from rfl_jax.networks.table import open_network
from rfl_jax.sampling.phases import phase_scope
from rfl_jax.sampling.rollout import rollout
from rfl_jax.sampling.sampler import Batch, Sampler, bind_experts, latent_shape, start_noise
from rfl_jax.sharding import micro_batches, replicated
from rfl_jax.sources import Sources

T = TypeVar("T")
# Arrays that the prefix is a function of.
INPUTS = ("y", "context")


def jit_prefix(networks: Networks, sampler: Sampler, mesh: Mesh, *, mode: str, options: dict[str, str]) -> Any:
    """`(frozen, batch, key) -> latents` after the sampler's steps, jitted, to be called under `jax.set_mesh`.

    Args:
        networks: the sampler's experts among them.
        sampler: with the spans of the prefix.
        mesh: devices.
        mode: of `start_noise`.
        options: of the compiler.
    """

    def one(frozen: Frozen, batch: Batch, key: jax.Array) -> jax.Array:
        experts, keep = bind_experts(networks, sampler, {}, frozen, batch)
        noise = start_noise(key, batch["clip"], batch["noise_index"], latent_shape(sampler, batch), mode)
        with phase_scope("prefix"):
            return rollout(experts, noise, sampler.sigmas, sampler.spans, keep=keep).latents

    def run(frozen: Frozen, batch: Batch, key: jax.Array) -> jax.Array:
        return jax.lax.map(lambda micro: one(frozen, micro, key), batch)

    return jax.jit(run, out_shardings=micro_batches(mesh), compiler_options=options)


def prefix_arguments(sampler: Sampler, frozen: Frozen, batch: Mapping[str, T]) -> tuple[Frozen, dict[str, T]]:
    """The parts of a run's frozen weights and of its batch that `jit_prefix` takes."""
    rest = {name: frozen.rest[name] for name in sampler.experts}
    names = ("clip", "noise_index", *INPUTS, "negative_context")
    return Frozen(rest, {}), {name: batch[name] for name in names if name in batch}


def cache_prefix(
    cfg: Config,
    sources: Sources,
    sampler: Sampler,
    clips: Sequence[PreparedClip],
    cache: epath.Path,
    batches: Batches,
    *,
    key: jax.Array,
    noises: int,
    mode: str,
) -> list[PreparedClip]:
    """Clips with the latents after the sampler's steps, from the cache where they are there already.

    Args:
        cfg: the run.
        sources: where the networks are; opened only if something is missing.
        sampler: with the spans of the prefix.
        clips: in the order that numbers them.
        cache: folder of prepared clips.
        batches: of training: what runs is the same program.
        key: of the noise.
        noises: of each clip.
        mode: of `start_noise`.
    """
    settings = _settings(cfg, sources, sampler, key, mode)
    found = [
        dataclasses.replace(clip, prefix=tuple(_file(cache, settings, clip, i, noise) for noise in range(noises)))
        for i, clip in enumerate(clips)
    ]
    missing = [(i, noise) for i, clip in enumerate(found) for noise in range(noises) if not clip.prefix[noise].exists()]
    # All hosts look before any of them writes, and compute the same: another preparation may write meanwhile.
    missing = sorted({(i, noise) for of_host in hosts.exchange(missing) for i, noise in of_host})
    if missing:
        _fill_cache(cfg, sources, sampler, found, missing, batches, key=key, mode=mode)
        hosts.wait("frozen prefix")
    return found


def _settings(cfg: Config, sources: Sources, sampler: Sampler, key: jax.Array, mode: str) -> dict[str, Any]:
    """Everything besides the clip and its noise that its latents depend on."""
    return {
        "weights": {name: [fingerprint(file) for file in sources.files(name)] for name in sampler.experts},
        "spans": [dataclasses.astuple(span) for span in sampler.spans],
        "sigmas": sampler.sigmas.tolist(),
        "guidance": [cfg.sampling.guidance_scale, cfg.sampling.negative_prompt],
        "key": jax.random.key_data(key).tolist(),
        # The last of them only where it is set: prefixes of earlier releases are good without.
        "dtype": [cfg.dtype, cfg.frozen_weights, *filter(None, [cfg.frozen_activations])],
        "mode": mode,
    }


def _file(cache: epath.Path, settings: dict[str, Any], clip: PreparedClip, number: int, noise: int) -> epath.Path:
    text = json.dumps([settings, clip.file.name, number, noise], sort_keys=True)
    return cache / f"{hashlib.sha256(text.encode()).hexdigest()[:32]}.prefix.npz"


def _fill_cache(
    cfg: Config,
    sources: Sources,
    sampler: Sampler,
    clips: Sequence[PreparedClip],
    missing: Sequence[tuple[int, int]],
    batches: Batches,
    *,
    key: jax.Array,
    mode: str,
) -> None:
    """Computes and writes what is missing: pairs of a clip's number and its noise's."""
    mesh = batches.mesh
    graphs, weights = {}, {}
    for name in sampler.experts:
        module = open_network(cfg, name, sources.files(name), "sample", mesh)
        graphs[name], weights[name] = split_placed(cfg, name, module, mesh)
    options = compiler_options(mesh, cfg.compiler_options)
    run = hosts.together(jit_prefix(Networks(graphs, graphs, ()), sampler, mesh, mode=mode, options=options))
    everywhere = jax.jit(lambda x: x, out_shardings=replicated(mesh))
    shapes = {number: clips[number].latent_shape for number, _ in missing}
    with tqdm(total=len(missing), desc="frozen prefix", disable=None) as bar:
        # Clips of one size go together.
        for group in in_batches(missing, [shapes[number] for number, _ in missing], batches.samples):
            rows = filled(group, batches.samples)
            loaded = {number: clips[number].load(INPUTS) for number in {number for number, _ in rows}}
            arrays = {name: np.stack([loaded[number][name] for number, _ in rows]) for name in INPUTS}
            arrays["clip"], arrays["noise_index"] = np.array(rows, np.int32).T
            with jax.set_mesh(mesh):
                latents = np.asarray(everywhere(run(Frozen(weights, {}), batches.place_update(arrays), key)))
            latents = latents.reshape(batches.samples, *latents.shape[2:])
            for (number, noise), x in zip(group, latents, strict=False):
                if hosts.is_writer():
                    write_arrays(clips[number].prefix[noise], {"latents": x})
            bar.update(len(group))
