"""The frozen prefix: denoising steps before the first network that trains, computed once for every clip and noise.

They depend on nothing but the clip and its noise. With their result in the cache, training neither repeats them nor
holds the network that takes them.
"""

import dataclasses
import functools
import hashlib
import json
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from tqdm import tqdm

from convert import store
from rfl_jax import hosts
from rfl_jax.config import Config
from rfl_jax.data.prepare import Prepared, Sample, fingerprint, write_arrays
from rfl_jax.models.attention import kernel_for
from rfl_jax.models.quantize import quantize
from rfl_jax.sampling.rollout import rollout
from rfl_jax.sharding import BATCH, batch_shards, shardings
from rfl_jax.sources import Sources
from rfl_jax.training.state import Frozen, Networks
from rfl_jax.training.step import Sampler, bind_experts, latent_shape, start_noise


def noises_of(cfg: Config) -> int:
    """Different noises of a clip; 0: no end of them."""
    return 1 if cfg.noise.mode == "fixed" else cfg.noise.per_sample


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
        "guidance": [sampler.guidance, cfg.sampling.negative_prompt],
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

    kernel = kernel_for(cfg.attention, mesh.devices.flat[0].platform)
    graphs, weights = {}, {}
    for name, paths in files.items():
        module = store.open_component(
            "dit",
            paths,
            weights_dtype=cfg.dtype,
            dtype=jnp.dtype(cfg.dtype),
            remat_policy="none",
            kernel=kernel,
            stream=cfg.streams(name),
        )
        graphs[name], state = nnx.split(quantize(module) if cfg.quantizes(name) else module)
        memory = "pinned_host" if cfg.streams(name) else None
        weights[name] = jax.tree.map(hosts.place, state, shardings(state, "dit", mesh, blocks_memory=memory))
    networks = Networks(graphs, graphs, ())

    # Weights are arguments: what a jitted function closes over becomes a constant of its program.
    @functools.partial(jax.jit, out_shardings=NamedSharding(mesh, PartitionSpec()))
    def run(frozen: Frozen, batch: dict[str, jax.Array], key: jax.Array) -> jax.Array:
        experts, keep = bind_experts(networks, sampler, {}, frozen, batch)
        noise = start_noise(key, batch["sample"], batch["noise_index"], latent_shape(sampler, batch), mode)
        return rollout(experts, noise, sampler.levels, sampler.phases, keep=keep).latents

    size = cfg.per_device_train_batch_size * batch_shards(mesh)
    spread = NamedSharding(mesh, BATCH)
    shared = {name: hosts.place(x, NamedSharding(mesh, PartitionSpec())) for name, x in constants.items()}

    def flush(group: list[tuple[int, int]], loaded: dict[int, Sample]) -> None:
        # A batch that is not full is filled up with its last sample.
        rows = [group[min(i, len(group) - 1)] for i in range(size)]
        batch = {name: np.stack([loaded[number][name] for number, _ in rows]) for name in ("y", "context")}
        batch |= {
            name: np.array(x, np.int32)
            for name, x in zip(("sample", "noise_index"), zip(*rows, strict=True), strict=True)
        }
        with jax.set_mesh(mesh):
            placed = {name: hosts.place(x, spread) for name, x in batch.items()}
            latents = np.asarray(run(Frozen(weights, {}), placed | shared, key))
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
