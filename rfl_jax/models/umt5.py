"""The umT5 text encoder (Wan-Video/Wan2.2 `wan/modules/t5.py`: T5Encoder with shared_pos=False)."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from rfl_jax.models.layers import Linear, RMSNorm

Tokens = Int[Array | np.ndarray, "b s"]


@dataclasses.dataclass(frozen=True)
class UMT5Config:
    """Sizes of the encoder; the defaults of the last four are those of umt5-xxl.

    Attributes:
        dim_attn: width of all heads together, which may differ from `dim`.
        num_buckets, max_distance: how finely and how far the relative position bias (one table a layer) tells distances.
    """

    vocab: int
    dim: int
    dim_attn: int
    dim_ffn: int
    num_heads: int
    num_layers: int
    num_buckets: int = 32
    max_distance: int = 128
    eps: float = 1e-6


def relative_buckets(length: int, num_buckets: int, max_distance: int) -> Int[np.ndarray, "{length} {length}"]:
    """Bucket of each (query, key) pair: exact for near keys, logarithmic for far ones, one half per direction."""
    relative = np.arange(length)[None, :] - np.arange(length)[:, None]
    half = num_buckets // 2
    exact = half // 2
    distance = np.abs(relative)
    # float32 throughout: a bucket's border falls where the reference's rounding puts it.
    scale = np.float32(np.log(max_distance / exact))
    far = np.log(np.maximum(distance, 1).astype(np.float32) / np.float32(exact)) / scale * np.float32(half - exact)
    far = np.minimum(exact + far.astype(np.int32), half - 1)
    return np.where(relative > 0, half, 0) + np.where(distance < exact, distance, far)


class SelfAttention(nnx.Module):
    def __init__(self, cfg: UMT5Config, *, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        stack = (cfg.num_layers,)
        self.num_heads = cfg.num_heads
        self.q = Linear(cfg.dim, cfg.dim_attn, bias=False, stack=stack, dtype=dtype, rngs=rngs)
        self.k = Linear(cfg.dim, cfg.dim_attn, bias=False, stack=stack, dtype=dtype, rngs=rngs)
        self.v = Linear(cfg.dim, cfg.dim_attn, bias=False, stack=stack, dtype=dtype, rngs=rngs)
        self.o = Linear(cfg.dim_attn, cfg.dim, bias=False, stack=stack, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "b n d"], bias: Float[Array, "b k n n"]) -> Float[Array, "b n d"]:
        q, k, v = (rearrange(f(x), "b n (k d) -> b n k d", k=self.num_heads) for f in (self.q, self.k, self.v))
        # T5 does not scale by sqrt(d).
        scores = jnp.einsum("bnkd,bskd->bkns", q, k, preferred_element_type=jnp.float32) + bias
        weights = jax.nn.softmax(scores, -1).astype(x.dtype)
        return self.o(rearrange(jnp.einsum("bkns,bskd->bnkd", weights, v), "b n k d -> b n (k d)"))


class Block(nnx.Module):
    """One layer; as constructed it holds the weights of all layers, stacked on axis 0."""

    def __init__(self, cfg: UMT5Config, *, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        stack = (cfg.num_layers,)
        self.norm1 = RMSNorm(cfg.dim, eps=cfg.eps, stack=stack, rngs=rngs)
        self.attn = SelfAttention(cfg, dtype=dtype, rngs=rngs)
        self.norm2 = RMSNorm(cfg.dim, eps=cfg.eps, stack=stack, rngs=rngs)
        self.gate = Linear(cfg.dim, cfg.dim_ffn, bias=False, stack=stack, dtype=dtype, rngs=rngs)
        self.up = Linear(cfg.dim, cfg.dim_ffn, bias=False, stack=stack, dtype=dtype, rngs=rngs)
        self.down = Linear(cfg.dim_ffn, cfg.dim, bias=False, stack=stack, dtype=dtype, rngs=rngs)
        self.position_bias = nnx.Param(0.1 * jax.random.normal(rngs.params(), (*stack, cfg.num_buckets, cfg.num_heads)))

    def bias(self, buckets: Int[Array, "n n"]) -> Float[Array, "k n n"]:
        """This layer's position bias, float32."""
        return rearrange(self.position_bias[...].astype(jnp.float32)[buckets], "n s k -> k n s")

    def __call__(
        self, x: Float[Array, "b n d"], buckets: Int[Array, "n n"], mask: Bool[Array, "b n"]
    ) -> Float[Array, "b n d"]:
        # The lowest finite value: rows that see nothing but padding stay finite.
        bias = jnp.where(mask[:, None, None, :], self.bias(buckets)[None], jnp.finfo(jnp.float32).min)
        x = x + self.attn(self.norm1(x), bias)
        h = self.norm2(x)
        return x + self.down(jax.nn.gelu(self.gate(h), approximate=True) * self.up(h))


class UMT5Encoder(nnx.Module):
    """Token ids to text features.

    Args:
        cfg: sizes.
        dtype: compute dtype of the matrix products and of the residual stream; norms and softmax use float32.
    """

    def __init__(self, cfg: UMT5Config, *, dtype: DTypeLike = jnp.float32, rngs: nnx.Rngs) -> None:
        self.cfg = cfg
        self.dtype = dtype
        self.embedding = nnx.Param(jax.random.normal(rngs.params(), (cfg.vocab, cfg.dim)))
        self.blocks = Block(cfg, dtype=dtype, rngs=rngs)
        self.norm = RMSNorm(cfg.dim, eps=cfg.eps, rngs=rngs)

    def __call__(self, ids: Tokens, mask: Tokens) -> Float[Array, "b s d"]:
        """Hidden states of all rows; padding keys (mask 0) are not attended to.

        Args:
            ids: token ids, padded.
            mask: 1 where a token is real.
        """
        x = self.embedding[...][ids].astype(self.dtype)
        buckets = jnp.asarray(relative_buckets(ids.shape[1], self.cfg.num_buckets, self.cfg.max_distance))
        real = jnp.asarray(mask) > 0
        graph, layers = nnx.split(self.blocks)

        @jax.checkpoint
        def layer(x: Array, weights: nnx.State) -> tuple[Array, None]:
            return nnx.merge(graph, weights)(x, buckets, real), None

        x, _ = jax.lax.scan(layer, x, layers)
        return self.norm(x)

    def context(self, ids: Tokens, mask: Tokens) -> Float[Array, "b s d"]:
        """What the pipeline feeds to the DiT: hidden states with the rows past the prompt set to zero."""
        return jnp.where((mask > 0)[..., None], self(ids, mask), 0)
