"""The Wan2.2 diffusion transformer (Wan-Video/Wan2.2 `wan/modules/model.py`)."""

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from rfl_jax.models.attention import attention
from rfl_jax.models.layers import LayerNorm, Linear, RMSNorm, layer_norm
from rfl_jax.models.wan.config import DiTConfig
from rfl_jax.models.wan.rope import apply_rope, rope_freqs
from rfl_jax.remat import ATTENTION_OUTPUT, BLOCK_INPUT, checkpoint_name, remat
from rfl_jax.sharding import context_shards, gather, pin

MAX_PERIOD = 10_000.0


def timestep_embedding(t: Float[Array, "*b"], dim: int) -> Float[Array, "*b dim"]:
    """Sinusoidal embedding of timesteps in 0..1000: cosines, then sines (sinusoidal_embedding_1d)."""
    freqs = jnp.asarray(MAX_PERIOD ** -(np.arange(dim // 2) / (dim // 2)), jnp.float32)
    angles = t.astype(jnp.float32)[..., None] * freqs
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
        freqs: tuple[Array, Array] | None = None,
        length: int | None = None,
    ) -> Float[Array, "b n d"]:
        def heads(y: Array) -> Array:
            return rearrange(y, "b n (k d) -> b n k d", k=self.num_heads)

        q, k, v = self.norm_q(self.q(x)), self.norm_k(self.k(context)), self.v(context)
        q = heads(pin(q, "context"))
        # The prompt's keys are few and whole; a video's stay where its tokens are until attention exchanges them.
        k, v = (heads(y if freqs is None else pin(y, "context")) for y in (k, v))
        if freqs is not None:
            q, k = apply_rope(q, freqs), apply_rope(k, freqs)
        out = checkpoint_name(attention(q, k, v, kernel=self.kernel, length=length), ATTENTION_OUTPUT)
        return self.o(pin(rearrange(out, "b n k d -> b n (k d)"), "context"))


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
        modulation: Float[Array, "b m 6 d"],
        context: Float[Array, "b s d"],
        freqs: tuple[Array, Array],
        length: int,
    ) -> Float[Array, "b n d"]:
        x = checkpoint_name(x, BLOCK_INPUT)
        e = self.modulation[...].astype(jnp.float32) + modulation
        shift_1, scale_1, gate_1, shift_2, scale_2, gate_2 = (e[:, :, i] for i in range(6))

        h = layer_norm(x, self.eps) * (1 + scale_1) + shift_1
        x = _gated_add(x, self.self_attn(h, h, freqs, length), gate_1)
        x = x + self.cross_attn(self.norm3(x), context)
        h = layer_norm(x, self.eps) * (1 + scale_2) + shift_2
        return _gated_add(x, self.ffn(h), gate_2)


def _gated_add(x: Array, y: Array, gate: Array) -> Array:
    return (x.astype(jnp.float32) + y.astype(jnp.float32) * gate).astype(x.dtype)


class DiT(nnx.Module):
    """Predicts the flow-matching velocity of a latent video.

    Args:
        cfg: sizes.
        dtype: compute dtype of the matrix products. Norms, rotary and timestep embeddings and the modulation
            stay in float32, as in the reference.
        remat_policy: what the backward pass of a block keeps, see `rfl_jax.remat`.
        kernel: of attention, see `rfl_jax.models.attention`.
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
        patch_volume = int(np.prod(cfg.patch_size))
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
        x: Float[Array, "b t h w c_in"],
        t: Float[Array, "b ..."],
        context: Float[Array, "b s d_text"],
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
        cfg = self.cfg
        pt, ph, pw = cfg.patch_size
        grid = (x.shape[1] // pt, x.shape[2] // ph, x.shape[3] // pw)
        length = int(np.prod(grid))
        # Tokens that the mesh does not divide are padded at the end; no real token attends to them.
        extra = -length % context_shards()
        cos, sin = (jnp.pad(f, ((0, extra), (0, 0))) for f in rope_freqs(grid, cfg.head_dim))

        tokens = self.patch_embedding(
            rearrange(x, "b (t pt) (h ph) (w pw) c -> b (t h w) (pt ph pw c)", pt=pt, ph=ph, pw=pw)
        )
        tokens = pin(jnp.pad(tokens, ((0, 0), (0, extra), (0, 0))), "context")
        text = self.text_out(jax.nn.gelu(self.text_in(context), approximate=True))

        per_token = jnp.pad(t, ((0, 0), (0, extra))) if t.ndim == 2 else t[:, None]
        e = self.time_out(jax.nn.silu(self.time_in(timestep_embedding(per_token, cfg.freq_dim))))
        modulation = rearrange(self.time_projection(jax.nn.silu(e)), "b n (six d) -> b n six d", six=6)

        graph, layers = nnx.split(self.blocks)

        def layer(tokens: Array, weights: nnx.State) -> tuple[Array, None]:
            if self.remat_policy != "none":
                # Tied to the tokens. What depends on weights alone would be taken out of the loop over denoising steps,
                # for all layers at once: every gathered or fetched weight, in the memory of every device.
                tokens, weights = jax.lax.optimization_barrier((tokens, weights))
            if self.stream:
                weights = jax.device_put(weights, jax.memory.Space.Device)
            return pin(nnx.merge(graph, gather(weights))(tokens, modulation, text, (cos, sin), length), "context"), None

        tokens, _ = jax.lax.scan(remat(layer, self.remat_policy), tokens, layers)

        shift, scale = (self.head_modulation[...].astype(jnp.float32) + e[:, :, None]).transpose(2, 0, 1, 3)
        out = self.head(layer_norm(tokens, cfg.eps) * (1 + scale) + shift)
        return rearrange(
            out[:, :length],
            "b (t h w) (pt ph pw c) -> b (t pt) (h ph) (w pw) c",
            t=grid[0], h=grid[1], w=grid[2], pt=pt, ph=ph, pw=pw,
        )  # fmt: skip
