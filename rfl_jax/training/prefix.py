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
import jax.numpy as jnp
import numpy as np
from etils import epath
from flax import nnx
from jax.sharding import Mesh
from tqdm import tqdm

from convert import store
from rfl_jax import hosts
from rfl_jax.config import Config
from rfl_jax.data.prepare import Prepared, Sample, fingerprint, write_arrays
from rfl_jax.models.attention import kernel_for
from rfl_jax.models.quantize import quantize
from rfl_jax.models.wan.dit import DiT
from rfl_jax.sampling.rollout import phase_scope, rollout
from rfl_jax.sharding import batch_shards, micro_batches, replicated, shardings
from rfl_jax.sources import Sources
from rfl_jax.training.state import Frozen, Networks
from rfl_jax.training.step import Batch, Sampler, bind_experts, latent_shape, start_noise

T = TypeVar("T")


def noises_of(cfg: Config) -> int:
    """Different noises of a clip; 0: no end of them."""
    return 1 if cfg.noise.mode == "fixed" else cfg.noise.per_sample


def jit_prefix(networks: Networks, sampler: Sampler, mesh: Mesh, *, mode: str) -> Any:
    """`(frozen, batch, key) -> latents` after the sampler's steps, jitted, to be called under `jax.set_mesh`.

    Args:
        networks: the sampler's experts among them.
        sampler: with the phases of the prefix.
        mesh: devices.
        mode: of `start_noise`.
    """

    def one(frozen: Frozen, batch: Batch, key: jax.Array) -> jax.Array:
        experts, keep = bind_experts(networks, sampler, {}, frozen, batch)
        noise = start_noise(key, batch["sample"], batch["noise_index"], latent_shape(sampler, batch), mode)
        with phase_scope("prefix"):
            return rollout(experts, noise, sampler.levels, sampler.phases, keep=keep).latents

    def run(frozen: Frozen, batch: Batch, key: jax.Array) -> jax.Array:
        return jax.lax.map(lambda micro: one(frozen, micro, key), batch)

    return jax.jit(run, out_shardings=micro_batches(mesh))


def prefix_arguments(sampler: Sampler, frozen: Frozen, batch: Mapping[str, T]) -> tuple[Frozen, dict[str, T]]:
    """What `jit_prefix` takes of a run's frozen weights and of its batch."""
    rest = {name: frozen.rest[name] for name in sorted({phase.expert for phase in sampler.phases})}
    names = ("sample", "noise_index", "y", "context", "negative_context")
    return Frozen(rest, {}), {name: batch[name] for name in names if name in batch}


def open_dit(cfg: Config, name: str, files: list[str], mesh: Mesh, *, stored: str | None) -> DiT:
    """A DiT with its weights on the mesh, as 8-bit integers where the run asks for that; each process reads the pieces
    of its own devices.

    Args:
        cfg: the run.
        name: "dit" or "dit2".
        files: its weights.
        mesh: devices.
        stored: dtype of the weights; None keeps the source's.
    """
    # What waits in host memory is quantised on the devices first.
    memory = "pinned_host" if cfg.streams(name) and not cfg.quantizes(name) else None
    module = store.open_component(
        "dit",
        files,
        weights_dtype=stored,
        places=lambda state: shardings(state, "dit", mesh, blocks_memory=memory),
        dtype=jnp.dtype(cfg.dtype),
        remat_policy=cfg.policy,
        kernel=kernel_for(cfg.attention, mesh.devices.flat[0].platform),
        stream=cfg.streams(name),
    )
    return quantize(module) if cfg.quantizes(name) else module


def roll_out_prefix(
    cfg: Config,
    sources: Sources,
    sampler: Sampler,
    prepared: Sequence[Prepared],
    cache: epath.Path,
    mesh: Mesh,
    *,
    key: jax.Array,
    noises: int,
    mode: str,
    constants: dict[str, np.ndarray],
) -> list[Prepared]:
    """Samples with the latents after the sampler's steps, from the cache where they are there already.

    Args:
        cfg: the run.
        sources: where the networks are; opened only if something is missing.
        sampler: with the phases of the prefix.
        prepared: samples in the order that numbers them.
        cache: folder of prepared samples.
        mesh: devices.
        key: of the noise.
        noises: of each sample.
        mode: of `start_noise`.
        constants: arrays that all samples share (the negative prompt's features).
    """
    names = sorted({phase.expert for phase in sampler.phases})
    files = {name: sources.dit if name == "dit" else sources.dit2 for name in names}
    settings = {
        "weights": {name: [fingerprint(f) for f in paths] for name, paths in files.items()},
        "phases": [dataclasses.astuple(phase) for phase in sampler.phases],
        "levels": sampler.levels.tolist(),
        "guidance": [cfg.sampling.guidance_scale, cfg.sampling.negative_prompt],
        "key": jax.random.key_data(key).tolist(),
        "dtype": [cfg.dtype, cfg.frozen_weights],
        "mode": mode,
    }

    def file_of(item: Prepared, number: int, index: int) -> epath.Path:
        text = json.dumps([settings, item.file.name, number, index], sort_keys=True)
        return cache / f"{hashlib.sha256(text.encode()).hexdigest()[:32]}.prefix.npz"

    found = [
        dataclasses.replace(item, prefix=tuple(file_of(item, number, index) for index in range(noises)))
        for number, item in enumerate(prepared)
    ]
    # All hosts look before any of them writes.
    missing = [
        (number, index)
        for number, item in enumerate(found)
        for index, file in enumerate(item.prefix)
        if not file.exists()
    ]
    hosts.wait("looked for prefixes")
    if not missing:
        return found

    graphs, weights = {}, {}
    for name, paths in files.items():
        memory = "pinned_host" if cfg.streams(name) else None
        module = open_dit(cfg, name, paths, mesh, stored=cfg.dtype)
        graphs[name], state = nnx.split(module)
        weights[name] = jax.tree.map(hosts.place, state, shardings(state, "dit", mesh, blocks_memory=memory))
    run = jit_prefix(Networks(graphs, graphs, ()), sampler, mesh, mode=mode)
    everywhere = jax.jit(lambda x: x, out_shardings=replicated(mesh))

    # The batches of training: what runs is the same program.
    count, micro = cfg.gradient_accumulation_steps, cfg.per_device_train_batch_size * batch_shards(mesh)
    size = count * micro
    shared = {name: hosts.place(np.stack([x] * count), replicated(mesh)) for name, x in constants.items()}

    def flush(group: list[tuple[int, int]], loaded: dict[int, Sample]) -> None:
        # A batch that is not full is filled up with its last sample.
        rows = [group[min(i, len(group) - 1)] for i in range(size)]
        batch = {name: np.stack([loaded[number][name] for number, _ in rows]) for name in ("y", "context")}
        batch |= {
            name: np.array(x, np.int32)
            for name, x in zip(("sample", "noise_index"), zip(*rows, strict=True), strict=True)
        }
        with jax.set_mesh(mesh):
            placed = {
                name: hosts.place(x.reshape(count, micro, *x.shape[1:]), micro_batches(mesh))
                for name, x in batch.items()
            }
            latents = np.asarray(everywhere(run(Frozen(weights, {}), placed | shared, key)))
        latents = latents.reshape(size, *latents.shape[2:])
        for i, (number, index) in enumerate(group if hosts.is_writer() else []):
            write_arrays(found[number].prefix[index], {"latents": latents[i]})

    # Noises and clips of one size go together.
    group: list[tuple[int, int]] = []
    loaded: dict[int, Sample] = {}
    for number, index in tqdm(missing, desc="frozen prefix", disable=None):
        if number not in loaded:
            values = found[number].load()
            if group and (len(group) == size or values["y"].shape != loaded[group[0][0]]["y"].shape):
                flush(group, loaded)
                group, loaded = [], {}
            loaded[number] = values
        if len(group) == size:
            flush(group, loaded)
            group, loaded = [], {number: loaded[number]}
        group.append((number, index))
    flush(group, loaded)
    hosts.wait("frozen prefix")
    return found
