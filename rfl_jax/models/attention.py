"""Scaled dot-product attention: one function, kernels by name, on one device or a mesh."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel, splash_attention_mask
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float

from rfl_jax.sharding import CONTEXT, context_shards, current_mesh, divided_batch

Queries = Float[Array, "b n k d"]
Keys = Float[Array, "b s k d"]  # and values
Kernel = Callable[[Queries, Keys, Keys, int], Queries]  # the last argument is the number of real keys

LANES = 128  # of a TPU's vector unit
SPLASH_BLOCK = 512  # tokens a tile; the fastest that fitted in the compilations made so far


def _xla(q: Queries, k: Keys, v: Keys, length: int) -> Queries:
    lengths = None if length == k.shape[1] else jnp.full(q.shape[0], length, jnp.int32)
    return jax.nn.dot_product_attention(q, k, v, key_value_seq_lengths=lengths, implementation="xla")


def _cudnn(q: Queries, k: Keys, v: Keys, length: int) -> Queries:
    lengths = None if length == k.shape[1] else jnp.full(q.shape[0], length, jnp.int32)
    return jax.nn.dot_product_attention(q, k, v, key_value_seq_lengths=lengths, implementation="cudnn")


def _splash(q: Queries, k: Keys, v: Keys, length: int, *, interpret: bool = False) -> Queries:
    """Pallas flash attention for TPU. Tokens are padded to whole tiles; padding is told apart by segment ids. Channels
    of narrow heads are padded with zeros, which change no product.
    """
    n, s, d = q.shape[1], k.shape[1], q.shape[-1]
    tiles = [min(SPLASH_BLOCK, -(-tokens // LANES) * LANES) for tokens in (n, s)]
    block_q, block_kv = tiles
    blocks = splash_attention_kernel.BlockSizes(
        block_q=block_q, block_kv=block_kv, block_kv_compute=block_kv,
        block_q_dkv=block_q, block_kv_dkv=block_kv, block_kv_dkv_compute=block_kv, use_fused_bwd_kernel=True,
    )  # fmt: skip

    def tiled(x: Array, block: int) -> Array:
        x = jnp.pad(x, ((0, 0), (0, -x.shape[1] % block), (0, 0), (0, -d % LANES)))
        return x.transpose(0, 2, 1, 3)

    q, k, v = tiled(q, block_q), tiled(k, block_kv), tiled(v, block_kv)
    full = splash_attention_mask.FullMask((q.shape[2], k.shape[2]))
    kernel = splash_attention_kernel.make_splash_mha(
        splash_attention_mask.MultiHeadMask([full] * q.shape[1]),
        block_sizes=blocks, head_shards=1, q_seq_shards=1, interpret=interpret,
    )  # fmt: skip
    # Queries beyond the last token attend to real keys as well: their rows are cut off, and none is empty.
    segments = None
    if length < k.shape[2]:
        segments = splash_attention_kernel.SegmentIds(
            q=jnp.zeros(q.shape[2], jnp.int32), kv=(jnp.arange(k.shape[2]) >= length).astype(jnp.int32)
        )
    scale = d**-0.5
    run: Any = jax.vmap(lambda q, k, v: kernel(q * jnp.asarray(scale, q.dtype), k, v, segment_ids=segments))
    out: Array = run(q, k, v)
    return out.transpose(0, 2, 1, 3)[:, :n, :, :d].astype(v.dtype)


KERNELS: dict[str, Kernel] = {
    "xla": _xla,
    "splash": _splash,
    "splash_interpret": functools.partial(_splash, interpret=True),
    "cudnn": _cudnn,
}


def kernel_for(name: str, platform: str) -> str:
    """The kernel that a configuration's name means on a platform: "auto" takes its fastest.

    Off the TPU splash runs in Pallas's interpreter, which is for tests.
    """
    if name == "auto":
        return {"tpu": "splash", "gpu": "cudnn"}.get(platform, "xla")
    return "splash_interpret" if name == "splash" and platform != "tpu" else name


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

    mesh = current_mesh()
    if mesh is None or mesh.size == 1:
        return run(q, k, v)
    batch = divided_batch(q.shape[0], mesh)
    # The prompt's keys are few and on every device: queries stay where they are.
    ulysses = k.shape[1] == q.shape[1] and q.shape[2] % context_shards() == 0
    queries = PartitionSpec(batch, None, CONTEXT) if ulysses else PartitionSpec(batch, CONTEXT)
    keys = queries if ulysses else PartitionSpec(batch)
    spread: Any = jax.shard_map(run, mesh=mesh, in_specs=(queries, keys, keys), out_specs=queries, check_vma=False)
    return spread(q, k, v)
