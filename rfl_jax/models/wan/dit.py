"""The Wan2.2 diffusion transformer (Wan-Video/Wan2.2 `wan/modules/model.py`)."""

import math

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from rfl_jax.models.attention import attention
from rfl_jax.models.layers import LayerNorm, Linear, RMSNorm, expand_to, layer_norm
from rfl_jax.models.wan.config import DiTConfig
from rfl_jax.models.wan.rope import Freqs, apply_rope, rope_freqs
from rfl_jax.remat import BLOCK_INPUT, checkpoint_name, remat
from rfl_jax.sharding import context_shards, gather, pin_samples, pin_tokens

MAX_PERIOD = 10_000.0

# One for all tokens of a sample, or one a token.
Modulation = Float[Array, "b #n 6 d"]
Gate = Float[Array, "b #n d"]


def timestep_embedding(t: Float[Array, "*b"], dim: int) -> Float[Array, "*b {dim}"]:
    """Sinusoidal embedding of timesteps in 0..1000: cosines, then sines (sinusoidal_embedding_1d)."""
    freqs = jnp.asarray(MAX_PERIOD ** -(np.arange(dim // 2) / (dim // 2)), jnp.float32)
    t = t.astype(jnp.float32)[..., None]
    angles = t * expand_to(freqs, t)
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], -1)


class Attention(nnx.Module):
    """Self- or cross-attention with RMS-normed queries and keys."""

    def __init__(self, cfg: DiTConfig, *, kernel: str, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        stack = (cfg.num_layers,)
        self.num_heads = cfg.num_heads
        self.kernel = kernel
        self.q = Linear(cfg.dim, cfg.dim, stack=stack, dtype=dtype, rngs=rngs)
        self.k = Linear(cfg.dim, cfg.dim, stack=stack, dtype=dtype, rngs=rngs)
        self.v = Linear(cfg.dim, cfg.dim, stack=stack, dtype=dtype, rngs=rngs)
        self.o = Linear(cfg.dim, cfg.dim, stack=stack, dtype=dtype, rngs=rngs)
        self.norm_q = RMSNorm(cfg.dim, eps=cfg.eps, stack=stack, rngs=rngs)
        self.norm_k = RMSNorm(cfg.dim, eps=cfg.eps, stack=stack, rngs=rngs)

    def __call__(
        self,
        x: Float[Array, "b n d"],
        context: Float[Array, "b s d"],
        freqs: Freqs | None = None,
        length: int | None = None,
    ) -> Float[Array, "b n d"]:
        def heads(y: Float[Array, "b n d"]) -> Float[Array, "b n k d2"]:
            return rearrange(y, "b n (k d) -> b n k d", k=self.num_heads)

        q, k, v = self.norm_q(self.q(x)), self.norm_k(self.k(context)), self.v(context)
        q = heads(pin_tokens(q))
        # The prompt's keys are few and whole; a video's stay where its tokens are until attention exchanges them.
        k, v = (heads(y if freqs is None else pin_tokens(y)) for y in (k, v))
        if freqs is not None:
            q, k = apply_rope(q, freqs), apply_rope(k, freqs)
        out = attention(q, k, v, kernel=self.kernel, length=length)
        return self.o(pin_tokens(rearrange(out, "b n k d -> b n (k d)")))


class FeedForward(nnx.Module):
    def __init__(self, cfg: DiTConfig, *, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        stack = (cfg.num_layers,)
        self.up = Linear(cfg.dim, cfg.ffn_dim, stack=stack, dtype=dtype, rngs=rngs)
        self.down = Linear(cfg.ffn_dim, cfg.dim, stack=stack, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "b n d"]) -> Float[Array, "b n d"]:
        return self.down(jax.nn.gelu(self.up(x), approximate=True))


class Block(nnx.Module):
    """One layer; as constructed it holds the weights of all layers, stacked on axis 0."""

    def __init__(self, cfg: DiTConfig, *, kernel: str, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        stack = (cfg.num_layers,)
        self.eps = cfg.eps
        self.modulation = nnx.Param(jax.random.normal(rngs.params(), (*stack, 6, cfg.dim)) * cfg.dim**-0.5)
        self.self_attn = Attention(cfg, kernel=kernel, dtype=dtype, rngs=rngs)
        self.norm3 = LayerNorm(cfg.dim, eps=cfg.eps, stack=stack, rngs=rngs)
        self.cross_attn = Attention(cfg, kernel=kernel, dtype=dtype, rngs=rngs)
        self.ffn = FeedForward(cfg, dtype=dtype, rngs=rngs)

    def __call__(
        self,
        x: Float[Array, "b n d"],
        modulation: Modulation,
        context: Float[Array, "b s d"],
        freqs: Freqs,
        length: int,
    ) -> Float[Array, "b n d"]:
        x = checkpoint_name(x, BLOCK_INPUT)
        e = self.modulation[...].astype(jnp.float32)[None, None] + modulation
        shift_1, scale_1, gate_1, shift_2, scale_2, gate_2 = (e[:, :, i] for i in range(6))

        h = layer_norm(x, self.eps) * (1 + scale_1) + shift_1
        x = _gated_add(x, self.self_attn(h, h, freqs, length), gate_1)
        x = x + self.cross_attn(self.norm3(x), context)
        h = layer_norm(x, self.eps) * (1 + scale_2) + shift_2
        return _gated_add(x, self.ffn(h), gate_2)


def _gated_add(x: Float[Array, "b n d"], y: Float[Array, "b n d"], gate: Gate) -> Float[Array, "b n d"]:
    return (x.astype(jnp.float32) + y.astype(jnp.float32) * gate).astype(x.dtype)


class DiT(nnx.Module):
    """Predicts the flow-matching velocity of a latent video.

    Args:
        cfg: sizes.
        dtype: compute dtype of the matrix products. Norms, rotary and timestep embeddings and the modulation
            stay in float32, as in the reference.
        remat_policy: what the backward pass of a block keeps, see `rfl_jax.remat`.
        kernel: how attention is computed, see `rfl_jax.models.attention`.
        stream: the blocks' weights may lie in pinned host memory; each is brought to the device as its layer runs.
    """

    def __init__(
        self,
        cfg: DiTConfig,
        *,
        dtype: DTypeLike = jnp.float32,
        remat_policy: str = "full",
        kernel: str = "xla",
        stream: bool = False,
        rngs: nnx.Rngs,
    ) -> None:
        self.cfg = cfg
        self.stream = stream
        self.dtype = dtype
        self.remat_policy = remat_policy
        patch_volume = math.prod(cfg.patch_size)
        f32 = jnp.float32
        self.patch_embedding = Linear(cfg.in_dim * patch_volume, cfg.dim, dtype=dtype, rngs=rngs)
        self.text_in = Linear(cfg.text_dim, cfg.dim, dtype=dtype, rngs=rngs)
        self.text_out = Linear(cfg.dim, cfg.dim, dtype=dtype, rngs=rngs)
        self.time_in = Linear(cfg.freq_dim, cfg.dim, dtype=f32, rngs=rngs)
        self.time_out = Linear(cfg.dim, cfg.dim, dtype=f32, rngs=rngs)
        self.time_projection = Linear(cfg.dim, 6 * cfg.dim, dtype=f32, rngs=rngs)
        self.blocks = Block(cfg, kernel=kernel, dtype=dtype, rngs=rngs)
        self.head_modulation = nnx.Param(jax.random.normal(rngs.params(), (2, cfg.dim)) * cfg.dim**-0.5)
        self.head = Linear(cfg.dim, cfg.out_dim * patch_volume, dtype=f32, rngs=rngs)

    def __call__(
        self,
        x: Float[Array, "b t h w c"],
        t: Float[Array, " b"] | Float[Array, "b n"],
        context: Float[Array, "b s c_text"],
    ) -> Float[Array, "b t h w c_out"]:
        """Velocity of latents `x`.

        Args:
            x: latents, conditioning channels last; t, h and w are multiples of the patch size.
            t: timesteps in 0..1000, one a sample [b] or one a token [b, n].
            context: text features, zero rows up to text_len. They are not masked: as in the reference the zero
                rows pass through the text projection and take part in cross-attention.

        Returns:
            The velocity, float32.
        """
        grid = self._grid(x)
        length = math.prod(grid)
        # Tokens that the mesh does not divide are padded at the end; no real token attends to them.
        extra = -length % context_shards()
        cos, sin = (jnp.pad(f, ((0, extra), (0, 0))) for f in rope_freqs(grid, self.cfg.head_dim))
        # The grid, which is narrow, is whole before tokens are cut and after they are joined. Left to itself the compiler spreads
        # frames and rows together where frames alone do not divide, and libtpu 0.0.50 may end the process at such an exchange.
        patches = pin_samples(self._patchify(x))
        tokens = pin_tokens(_pad_tokens(self.patch_embedding(patches), extra))
        text = self._embed_text(context)
        e, modulation = self._embed_time(_pad_tokens(t, extra) if t.ndim == 2 else t[:, None])
        tokens = self._run_blocks(tokens, modulation, text, (cos, sin), length)

        shift, scale = (self.head_modulation[...].astype(jnp.float32)[None, None] + e[:, :, None]).transpose(2, 0, 1, 3)
        # Pinned, so that what is gathered for the grid is the narrow output and not the wide tokens.
        out = pin_tokens(self.head(layer_norm(tokens, self.cfg.eps) * (1 + scale) + shift))
        return self._unpatchify(pin_samples(out)[:, :length], grid)

    def _grid(self, x: Float[Array, "b t h w c"]) -> tuple[int, int, int]:
        """Frames, rows and columns of tokens."""
        (t, h, w), (pt, ph, pw) = x.shape[1:4], self.cfg.patch_size
        return t // pt, h // ph, w // pw

    def _patchify(self, x: Float[Array, "b t h w c"]) -> Float[Array, "b n c2"]:
        pt, ph, pw = self.cfg.patch_size
        return rearrange(x, "b (t pt) (h ph) (w pw) c -> b (t h w) (pt ph pw c)", pt=pt, ph=ph, pw=pw)

    def _unpatchify(self, x: Float[Array, "b n c2"], grid: tuple[int, int, int]) -> Float[Array, "b t h w c"]:
        (t, h, w), (pt, ph, pw) = grid, self.cfg.patch_size
        return rearrange(x, "b (t h w) (pt ph pw c) -> b (t pt) (h ph) (w pw) c", t=t, h=h, w=w, pt=pt, ph=ph, pw=pw)

    def _embed_text(self, context: Float[Array, "b s c"]) -> Float[Array, "b s d"]:
        return self.text_out(jax.nn.gelu(self.text_in(context), approximate=True))

    def _embed_time(self, t: Float[Array, "b n"]) -> tuple[Float[Array, "b n d"], Float[Array, "b n 6 d"]]:
        """What the timesteps are to the head, and the modulation of the blocks; n is 1 or the number of tokens."""
        e = self.time_out(jax.nn.silu(self.time_in(timestep_embedding(t, self.cfg.freq_dim))))
        return e, rearrange(self.time_projection(jax.nn.silu(e)), "b n (six d) -> b n six d", six=6)

    def _run_blocks(
        self,
        tokens: Float[Array, "b n d"],
        modulation: Modulation,
        text: Float[Array, "b s d"],
        freqs: Freqs,
        length: int,
    ) -> Float[Array, "b n d"]:
        """All layers in turn, each rematerialised in the backward pass."""
        graph, layers = nnx.split(self.blocks)

        def layer(tokens: Array, weights: nnx.State) -> tuple[Array, None]:
            if self.remat_policy != "none":
                # Tied to the tokens. What depends on weights alone would be taken out of the loop over denoising steps,
                # for all layers at once: every gathered or fetched weight, in the memory of every device.
                tokens, weights = jax.lax.optimization_barrier((tokens, weights))
            if self.stream:
                weights = jax.device_put(weights, jax.memory.Space.Device)
            block = nnx.merge(graph, gather(weights))
            return pin_tokens(block(tokens, modulation, text, freqs, length)), None

        return jax.lax.scan(remat(layer, self.remat_policy), tokens, layers)[0]


def _pad_tokens(x: Float[Array, "b n *c"], extra: int) -> Float[Array, "b n+{extra} *c"]:
    return jnp.pad(x, ((0, 0), (0, extra), *[(0, 0)] * (x.ndim - 2)))
