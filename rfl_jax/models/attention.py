"""Scaled dot-product attention: one function, kernels by name, on one device or a mesh."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from einops import rearrange
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float

from rfl_jax.models.flash import Tiles, flash_attention
from rfl_jax.remat import ATTENTION_OUTPUT, checkpoint_name
from rfl_jax.sharding import CONTEXT, context_shards, current_mesh, divided_batch

Queries = Float[Array, "b n k d"]
Keys = Float[Array, "b s k d"]  # and values
Kernel = Callable[[Queries, Keys, Keys, int], Queries]  # the last argument is the number of real keys

# Tiles from so many keys on, for heads 128 wide. Of those tried these take, forward and backward together, the fewest cycles on
# each of v5e, v5p and v6e within 2 % (python -m benchmarks.attention_tiles, at 18,900, 32,760 and 75,600 tokens); the larger
# ones 4 to 5 % fewer than the smaller ones on v6e, 1 to 2 % on v5p.
TILES = {32_000: Tiles(queries=1024, keys=2048, chunk=512), 0: Tiles(queries=1024, keys=1024, chunk=512)}


def tiles_for(keys: int) -> Tiles:
    """How flash attention is cut over so many keys."""
    return next(tiles for least, tiles in TILES.items() if keys >= least)


def _xla(q: Queries, k: Keys, v: Keys, length: int) -> Queries:
    lengths = None if length == k.shape[1] else jnp.full(q.shape[0], length, jnp.int32)
    out = jax.nn.dot_product_attention(q, k, v, key_value_seq_lengths=lengths, implementation="xla")
    return checkpoint_name(out, ATTENTION_OUTPUT)


def _cudnn(q: Queries, k: Keys, v: Keys, length: int) -> Queries:
    lengths = None if length == k.shape[1] else jnp.full(q.shape[0], length, jnp.int32)
    out = jax.nn.dot_product_attention(q, k, v, key_value_seq_lengths=lengths, implementation="cudnn")
    return checkpoint_name(out, ATTENTION_OUTPUT)


def _flash(q: Queries, k: Keys, v: Keys, length: int, *, interpret: bool = False) -> Queries:
    k, v = k[:, :length], v[:, :length]
    heads = (rearrange(x, "b n k d -> (b k) n d") for x in (q, k, v))
    out = flash_attention(*heads, tiles=tiles_for(length), interpret=interpret)
    return rearrange(out, "(b k) n d -> b n k d", b=q.shape[0])


KERNELS: dict[str, Kernel] = {
    "xla": _xla,
    "flash": _flash,
    "flash_interpret": functools.partial(_flash, interpret=True),
    "cudnn": _cudnn,
}


def kernel_for(name: str, platform: str) -> str:
    """The kernel that a configuration's name means on a platform: "auto" takes its fastest.

    Off the TPU flash attention runs in Pallas's interpreter, which is for tests.
    """
    if name == "auto":
        return {"tpu": "flash", "gpu": "cudnn"}.get(platform, "xla")
    return "flash_interpret" if name == "flash" and platform != "tpu" else name


def attention(q: Queries, k: Keys, v: Keys, *, kernel: str = "xla", length: int | None = None) -> Queries:
    """Softmax attention over all real keys, scaled by d**-0.5, softmax in float32.

    On a mesh (`jax.set_mesh`) the kernel runs on each device's share. Samples are spread over data and fsdp. Over
    the context axis, tokens become heads by an all-to-all before and after (Ulysses, arXiv 2309.14509) where the number of
    heads divides; otherwise each device keeps its queries and gathers the keys.

    Args:
        q: queries; as many tokens as the context axis divides.
        k, v: keys and values of `s` tokens: as many as queries, or the prompt's.
        kernel: a key of `KERNELS`.
        length: real keys, the others are padding; all by default.
    """
    real = k.shape[1] if length is None else length

    def run(q: Queries, k: Keys, v: Keys) -> Queries:
        return KERNELS[kernel](q, k, v, real)

    def exchanging(q: Queries, k: Keys, v: Keys) -> Queries:
        # Written out, so that what crosses is what the kernel takes, and not a wider form of it.
        q, k, v = (jax.lax.all_to_all(x, CONTEXT, split_axis=2, concat_axis=1, tiled=True) for x in (q, k, v))
        return jax.lax.all_to_all(run(q, k, v), CONTEXT, split_axis=1, concat_axis=2, tiled=True)

    mesh = current_mesh()
    if mesh is None or mesh.size == 1:
        return run(q, k, v)
    batch = divided_batch(q.shape[0], mesh)
    # The prompt's keys are few and on every device: queries stay where they are.
    ulysses = k.shape[1] == q.shape[1] and q.shape[2] % context_shards() == 0
    queries = PartitionSpec(batch, CONTEXT)
    keys = queries if ulysses else PartitionSpec(batch)
    body = exchanging if ulysses else run
    spread: Any = jax.shard_map(body, mesh=mesh, in_specs=(queries, keys, keys), out_specs=queries, check_vma=False)
    return spread(q, k, v)
