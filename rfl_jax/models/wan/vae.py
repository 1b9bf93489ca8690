"""The Wan2.1 and Wan2.2 causal video autoencoders (Wan-Video/Wan2.2 `wan/modules/vae2_1.py`, `vae2_2.py`).

Every layer is written once; the `Clock` it is handed says whether it sees all frames at once or one latent frame at a
time (`rfl_jax.models.wan.clock`).
"""

import itertools

import jax
import jax.numpy as jnp
from einops import rearrange, repeat
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from rfl_jax.models.conv import conv2d, conv3d
from rfl_jax.models.layers import Linear, expand_to, lecun_normal
from rfl_jax.models.wan.clock import Chunk, Clock, Retimed, Video, WholeClip
from rfl_jax.models.wan.config import VAEConfig
from rfl_jax.remat import OFFLOAD_VAE_CACHES, VAE_CACHE, checkpoint_name
from rfl_jax.sharding import pin_columns

Resized = Float[Array, "b t2 h2 w2 c2"]  # what a stage makes of a `Video`
Pixels = Float[Array, "b t h w 3"]
Latents = Float[Array, "b t2 h2 w2 c"]


class CausalConv(nnx.Module):
    """3-D convolution that sees the present and the past."""

    def __init__(
        self, c_in: int, c_out: int, kernel: tuple[int, int, int], *, stride: int = 1, dtype: DTypeLike, rngs: nnx.Rngs
    ) -> None:
        self.dtype = dtype
        self.stride = stride
        self.kernel = nnx.Param(lecun_normal(rngs, (*kernel, c_in, c_out), kernel[0] * kernel[1] * kernel[2] * c_in))
        self.bias = nnx.Param(jnp.zeros(c_out))

    def valid(self, x: Video) -> Retimed:
        """Without padding in time."""
        y = conv3d(x.astype(self.dtype), self.kernel[...].astype(self.dtype), temporal_stride=self.stride)
        return y + expand_to(self.bias[...].astype(self.dtype), y)

    def __call__(self, x: Video, clock: Clock) -> Retimed:
        return self.valid(clock.with_past(x.astype(self.dtype), self.kernel.shape[0] - 1))


class Conv2D(nnx.Module):
    """3x3 convolution of every frame."""

    def __init__(self, c_in: int, c_out: int, *, stride: int = 1, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        self.dtype = dtype
        self.stride = stride
        self.kernel = nnx.Param(lecun_normal(rngs, (3, 3, c_in, c_out), 9 * c_in))
        self.bias = nnx.Param(jnp.zeros(c_out))

    def __call__(self, x: Video) -> Float[Array, "b t h2 w2 c2"]:
        side = (0, 1) if self.stride == 2 else (1, 1)
        y = conv2d(x.astype(self.dtype), self.kernel[...].astype(self.dtype), stride=self.stride, padding=(side, side))
        return y + expand_to(self.bias[...].astype(self.dtype), y)


class ChannelNorm(nnx.Module):
    """L2-normalised channels times sqrt(c) and a scale (the reference's RMS_norm), in float32."""

    def __init__(self, dim: int) -> None:
        self.scale = nnx.Param(jnp.ones(dim))

    def __call__(self, x: Float[Array, "*b c"]) -> Float[Array, "*b c"]:
        y = x.astype(jnp.float32)
        # max() on the square: the norm's own gradient is undefined on the junk frames' zeros.
        inverse = jax.lax.rsqrt(jnp.maximum(jnp.sum(y * y, -1, keepdims=True), 1e-24))
        return (y * inverse * x.shape[-1] ** 0.5 * expand_to(self.scale[...].astype(jnp.float32), y)).astype(x.dtype)


class ResidualBlock(nnx.Module):
    def __init__(self, c_in: int, c_out: int, *, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        self.norm1 = ChannelNorm(c_in)
        self.conv1 = CausalConv(c_in, c_out, (3, 3, 3), dtype=dtype, rngs=rngs)
        self.norm2 = ChannelNorm(c_out)
        self.conv2 = CausalConv(c_out, c_out, (3, 3, 3), dtype=dtype, rngs=rngs)
        self.shortcut = Linear(c_in, c_out, dtype=dtype, rngs=rngs) if c_in != c_out else None

    def __call__(self, x: Video, clock: Clock) -> Float[Array, "b t h w c2"]:
        h = self.conv1(jax.nn.silu(self.norm1(x)), clock)
        h = self.conv2(jax.nn.silu(self.norm2(h)), clock)
        return h + (x if self.shortcut is None else self.shortcut(x))


class FrameAttention(nnx.Module):
    """Single-head self-attention among the positions of each frame."""

    def __init__(self, dim: int, *, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        self.norm = ChannelNorm(dim)
        self.qkv = Linear(dim, 3 * dim, dtype=dtype, rngs=rngs)
        self.proj = Linear(dim, dim, dtype=dtype, rngs=rngs)

    def __call__(self, x: Video) -> Video:
        b, t, h, w, c = x.shape
        qkv = rearrange(self.qkv(self.norm(x)), "b t h w (three c) -> three (b t) (h w) 1 c", three=3)
        y = jax.nn.dot_product_attention(*qkv, implementation="xla")
        return x + self.proj(y.reshape(b, t, h, w, c))


class Downsample(nnx.Module):
    def __init__(self, dim: int, *, temporal: bool, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        self.conv = Conv2D(dim, dim, stride=2, dtype=dtype, rngs=rngs)
        self.time_conv = CausalConv(dim, dim, (3, 1, 1), stride=2, dtype=dtype, rngs=rngs) if temporal else None

    def __call__(self, x: Video, clock: Clock) -> Resized:
        x = self.conv(x)
        return x if self.time_conv is None else clock.halve(x, self.time_conv.valid)


class Upsample(nnx.Module):
    def __init__(self, c_in: int, c_out: int, *, temporal: bool, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        self.time_conv = CausalConv(c_in, 2 * c_in, (3, 1, 1), dtype=dtype, rngs=rngs) if temporal else None
        self.conv = Conv2D(c_in, c_out, dtype=dtype, rngs=rngs)

    def __call__(self, x: Video, clock: Clock) -> Resized:
        if self.time_conv is not None:
            x = clock.double(x, self.time_conv.valid)
        return self.conv(repeat(x, "b t h w c -> b t (h h2) (w w2) c", h2=2, w2=2))


def average_down(x: Video, c_out: int, clock: Clock, *, time: int, space: int) -> Float[Array, "b t2 h2 w2 {c_out}"]:
    """Wan2.2's shortcut around a downsampling stage (AvgDown3D): means over neighbouring pixels and channels."""
    x = clock.in_groups(x, time) if time > 1 else x
    x = rearrange(x, "b (t ft) (h fh) (w fw) c -> b t h w (c ft fh fw)", ft=time, fh=space, fw=space)
    return jnp.mean(rearrange(x, "b t h w (c group) -> b t h w c group", c=c_out), -1)


def duplicate_up(x: Video, c_out: int, clock: Clock, *, time: int, space: int) -> Float[Array, "b t2 h2 w2 {c_out}"]:
    """Wan2.2's shortcut around an upsampling stage (DupUp3D): channels laid out as neighbouring pixels."""
    x = repeat(x, "b t h w c -> b t h w (c copies)", copies=c_out * time * space * space // x.shape[-1])
    x = rearrange(x, "b t h w (c ft fh fw) -> b (t ft) (h fh) (w fw) c", ft=time, fh=space, fw=space)
    return clock.keep_first(x, time)


class DownStage(nnx.Module):
    """Residual blocks, then a downsampling unless it is the last stage."""

    def __init__(
        self, c_in: int, c_out: int, cfg: VAEConfig, *, down: bool, temporal: bool, dtype: DTypeLike, rngs: nnx.Rngs
    ) -> None:
        self.c_out = c_out
        self.factors = (2 if temporal else 1, 2 if down else 1)
        self.shortcut = cfg.version == "2.2"
        widths = [c_in] + [c_out] * cfg.num_res_blocks
        self.blocks = nnx.List(ResidualBlock(a, b, dtype=dtype, rngs=rngs) for a, b in itertools.pairwise(widths))
        self.resample = Downsample(c_out, temporal=temporal, dtype=dtype, rngs=rngs) if down else None

    def __call__(self, x: Video, clock: Clock) -> Resized:
        h = x
        for block in self.blocks:
            h = block(h, clock)
        if self.resample is not None:
            h = self.resample(h, clock)
        if self.shortcut:
            h = h + average_down(x, self.c_out, clock, time=self.factors[0], space=self.factors[1])
        return h


class UpStage(nnx.Module):
    """Residual blocks, then an upsampling unless it is the last stage."""

    def __init__(
        self, c_in: int, c_out: int, cfg: VAEConfig, *, up: bool, temporal: bool, dtype: DTypeLike, rngs: nnx.Rngs
    ) -> None:
        self.c_out = c_out
        self.factors = (2 if temporal else 1, 2)
        self.shortcut = cfg.version == "2.2" and up
        widths = [c_in] + [c_out] * (cfg.num_res_blocks + 1)
        self.blocks = nnx.List(ResidualBlock(a, b, dtype=dtype, rngs=rngs) for a, b in itertools.pairwise(widths))
        # Wan2.1 halves the width while upsampling, Wan2.2 in the next stage's first block.
        up_out = c_out if cfg.version == "2.2" else c_out // 2
        self.resample = Upsample(c_out, up_out, temporal=temporal, dtype=dtype, rngs=rngs) if up else None

    def __call__(self, x: Video, clock: Clock) -> Resized:
        h = x
        for block in self.blocks:
            h = block(h, clock)
        if self.resample is not None:
            h = self.resample(h, clock)
        if self.shortcut:
            h = h + duplicate_up(x, self.c_out, clock, time=self.factors[0], space=self.factors[1])
        return h


class Middle(nnx.Module):
    def __init__(self, dim: int, *, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        self.block1 = ResidualBlock(dim, dim, dtype=dtype, rngs=rngs)
        self.attention = FrameAttention(dim, dtype=dtype, rngs=rngs)
        self.block2 = ResidualBlock(dim, dim, dtype=dtype, rngs=rngs)

    def __call__(self, x: Video, clock: Clock) -> Video:
        return self.block2(self.attention(self.block1(x, clock)), clock)


class Encoder(nnx.Module):
    def __init__(self, cfg: VAEConfig, *, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        widths = [cfg.dim * m for m in (1, *cfg.dim_mult)]
        last = len(cfg.dim_mult) - 1
        self.conv_in = CausalConv(3 * cfg.patch**2, widths[0], (3, 3, 3), dtype=dtype, rngs=rngs)
        self.stages = nnx.List(
            DownStage(
                widths[i], widths[i + 1], cfg,
                down=i < last, temporal=i < last and cfg.temporal_downsample[i], dtype=dtype, rngs=rngs,
            )
            for i in range(last + 1)
        )  # fmt: skip
        self.middle = Middle(widths[-1], dtype=dtype, rngs=rngs)
        self.norm_out = ChannelNorm(widths[-1])
        self.conv_out = CausalConv(widths[-1], 2 * cfg.z_dim, (3, 3, 3), dtype=dtype, rngs=rngs)

    def __call__(self, x: Video, clock: Clock) -> Resized:
        x = self.conv_in(x, clock)
        for stage in self.stages:
            x = stage(x, clock)
        x = self.middle(x, clock)
        return self.conv_out(jax.nn.silu(self.norm_out(x)), clock)


class Decoder(nnx.Module):
    def __init__(self, cfg: VAEConfig, *, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        widths = [cfg.decoder_dim * m for m in (cfg.dim_mult[-1], *reversed(cfg.dim_mult))]
        temporal = tuple(reversed(cfg.temporal_downsample))
        last = len(cfg.dim_mult) - 1
        self.conv_in = CausalConv(cfg.z_dim, widths[0], (3, 3, 3), dtype=dtype, rngs=rngs)
        self.middle = Middle(widths[0], dtype=dtype, rngs=rngs)
        halved = cfg.version == "2.1"
        self.stages = nnx.List(
            UpStage(
                widths[i] // 2 if halved and i else widths[i], widths[i + 1], cfg,
                up=i < last, temporal=i < last and temporal[i], dtype=dtype, rngs=rngs,
            )
            for i in range(last + 1)
        )  # fmt: skip
        self.norm_out = ChannelNorm(widths[-1])
        self.conv_out = CausalConv(widths[-1], 3 * cfg.patch**2, (3, 3, 3), dtype=dtype, rngs=rngs)

    def __call__(self, x: Video, clock: Clock) -> Resized:
        x = self.middle(self.conv_in(x, clock), clock)
        for stage in self.stages:
            x = stage(x, clock)
        return self.conv_out(jax.nn.silu(self.norm_out(x)), clock)


class VAE(nnx.Module):
    """Video in [-1, 1] <-> normalised latents.

    Args:
        cfg: sizes and latent statistics.
        dtype: compute dtype of the convolutions; norms and outputs are float32.
        remat: recompute each latent frame's activations in the backward pass instead of keeping them.
        caches: where the caches that one latent frame leaves to the next wait for the backward pass, which needs all of
            them: "keep" them on the device, "offload" them to pinned host memory, or "recompute" them in groups.
            The last two only with `remat`.
    """

    def __init__(
        self,
        cfg: VAEConfig,
        *,
        dtype: DTypeLike = jnp.float32,
        remat: bool = True,
        caches: str = "keep",
        rngs: nnx.Rngs,
    ) -> None:
        self.cfg = cfg
        self.remat = remat
        self.caches = caches
        self.encoder = Encoder(cfg, dtype=dtype, rngs=rngs)
        self.quant = Linear(2 * cfg.z_dim, 2 * cfg.z_dim, dtype=dtype, rngs=rngs)
        self.post_quant = Linear(cfg.z_dim, cfg.z_dim, dtype=dtype, rngs=rngs)
        self.decoder = Decoder(cfg, dtype=dtype, rngs=rngs)

    def encode(self, video: Pixels) -> Latents:
        """Normalised latent means, chunk by chunk.

        Args:
            video: [b, 4n+1, h, w, 3] in [-1, 1]; h and w are multiples of the spatial stride.

        Returns:
            [b, n+1, h/stride, w/stride, z], float32.
        """
        t = self.cfg.stride[0]
        # The first frame goes in last place of a chunk of its own.
        padded = jnp.pad(self._patchify(video), ((0, 0), (t - 1, 0), (0, 0), (0, 0), (0, 0)))
        chunks = rearrange(padded, "b (n t) h w c -> n b t h w c", t=t)
        out = self._scan(self.encoder, chunks)
        return self._normalise(rearrange(out, "n b t h w c -> b (n t) h w c"))

    def encode_moments(self, video: Pixels) -> tuple[Latents, Latents]:
        """Mean and log-variance of the unnormalised latents of a whole clip (what training an autoencoder needs)."""
        moments = self.quant(self.encoder(self._patchify(video), WholeClip()))
        mean, log_variance = jnp.split(moments.astype(jnp.float32), 2, -1)
        return mean, log_variance

    def encode_whole(self, video: Pixels) -> Latents:
        """`encode` without chunks: the simplest form, and the one with the largest memory."""
        return self._normalise(self.encoder(self._patchify(video), WholeClip()))

    def encode_first_frame(
        self, image: Float[Array, "b h w 3"], frames: int, end_image: Float[Array, "b h w 3"] | None = None
    ) -> Latents:
        """Latents of a clip that shows `image`, then mid-grey zeros, and `end_image` last if given."""
        video = jnp.zeros((image.shape[0], frames, *image.shape[1:]), image.dtype).at[:, 0].set(image)
        if end_image is not None:
            video = video.at[:, -1].set(end_image)
        return self.encode(video)

    def decode(self, latents: Latents) -> Pixels:
        """Video of normalised latents, one latent frame at a time, each rematerialised in the backward pass if `remat`.

        Args:
            latents: [b, n+1, h, w, z].

        Returns:
            [b, 4n+1, h*stride, w*stride, 3], float32, about [-1, 1] but not clamped.
        """
        # Columns are spread over the mesh: pins at both ends suffice, the compiler exchanges halos in between.
        latents = pin_columns(latents)
        if not self.remat:
            return pin_columns(self.decode_whole(latents))
        z = rearrange(self.post_quant(self._denormalise(latents)), "b n h w c -> n b 1 h w c")
        out = rearrange(self._scan(self.decoder, z), "n b t h w c -> b (n t) h w c")
        return pin_columns(self._unpatchify(out[:, self.cfg.stride[0] - 1 :]))

    def decode_window(self, latents: Latents, first: Int[Array, ""], count: int) -> Pixels:
        """The frames that `decode` makes of `count` latent frames from number `first` on, which is 1 at least.

        The latent frames before are decoded too, without gradient, for the caches that they leave; those after are not. So
        the pixels are the same, and the gradient with respect to these latent frames is; that with respect to earlier ones,
        through the caches, is left out.

        Args:
            latents: [b, n+1, h, w, z].
            first: traced, so that one program serves all windows.
            count: at most n.

        Returns:
            [b, 4*count, h*stride, w*stride, 3], as `decode`.
        """
        z = rearrange(self.post_quant(self._denormalise(pin_columns(latents))), "b n h w c -> n b 1 h w c")
        out = rearrange(self._scan(self.decoder, z, (first, count)), "n b t h w c -> b (n t) h w c")
        return pin_columns(self._unpatchify(out))

    def decode_whole(self, latents: Latents) -> Pixels:
        """`decode` of all frames at once."""
        return self._unpatchify(self.decoder(self.post_quant(self._denormalise(latents)), WholeClip()))

    def _scan(
        self,
        network: nnx.Module,
        chunks: Float[Array, "n b t h w c"],
        window: tuple[Int[Array, ""], int] | None = None,
    ) -> Float[Array, "n2 b t2 h2 w2 c2"]:
        """The network over the chunks; over so many from one of them on where a window is given, those before it without
        gradient.
        """
        graph, weights = nnx.split(network)

        def run(
            chunk: Video, first: Bool[Array, ""], caches: list[Array] | None, weights: nnx.State = weights
        ) -> tuple[list[Array], Resized]:
            clock = Chunk(first, caches)
            out = nnx.merge(graph, weights)(chunk, clock)
            return clock.caches, out

        def step(caches: list[Array], x: tuple[Array, Array]) -> tuple[list[Array], Array]:
            return run(*x, [checkpoint_name(c, VAE_CACHE) for c in caches])

        shapes, _ = jax.eval_shape(lambda c: run(c, jnp.bool_(True), None), chunks[0])
        caches = [jnp.zeros(s.shape, s.dtype) for s in shapes]
        first = jnp.arange(chunks.shape[0]) == 0
        if window is not None:
            begin, count = window
            still_chunks, still_weights = jax.lax.stop_gradient((chunks, weights))

            def before(i: Array, caches: list[Array]) -> list[Array]:
                return run(still_chunks[i], i == 0, caches, still_weights)[0]

            caches = jax.lax.fori_loop(0, begin, before, caches)
            chunks = jax.lax.dynamic_slice_in_dim(chunks, begin, count)
            first = jnp.zeros(count, bool)
        if not self.remat:
            return jax.lax.scan(step, caches, (chunks, first))[1]
        policy = OFFLOAD_VAE_CACHES if self.caches == "offload" else None
        step = jax.checkpoint(step, policy=policy, prevent_cse=False)
        count = chunks.shape[0]
        # Groups as even as the number of frames allows: 21 latent frames are 3 times 7.
        groups = max((n for n in range(1, count + 1) if count % n == 0 and n * n <= count), default=1)
        if self.caches != "recompute" or groups == 1:
            return jax.lax.scan(step, caches, (chunks, first))[1]

        def group(caches: list[Array], x: tuple[Array, Array]) -> tuple[list[Array], Array]:
            return jax.lax.scan(step, caches, x)

        split = jax.tree.map(lambda x: x.reshape(groups, -1, *x.shape[1:]), (chunks, first))
        out = jax.lax.scan(jax.checkpoint(group, prevent_cse=False), caches, split)[1]
        return out.reshape(count, *out.shape[2:])

    def _statistics(self) -> tuple[Float[Array, "1 1 1 1 z"], Float[Array, "1 1 1 1 z"]]:
        mean, std = (jnp.asarray(s, jnp.float32) for s in (self.cfg.latent_mean, self.cfg.latent_std))
        return mean[None, None, None, None], std[None, None, None, None]

    def _normalise(self, encoded: Video) -> Float[Array, "b t h w c//2"]:
        mean, std = self._statistics()
        return (self.quant(encoded)[..., : self.cfg.z_dim].astype(jnp.float32) - mean) / std

    def _denormalise(self, latents: Video) -> Video:
        mean, std = self._statistics()
        return latents * std + mean

    def _patchify(self, video: Pixels) -> Float[Array, "b t h2 w2 c"]:
        p = self.cfg.patch
        return rearrange(video, "b t (h q) (w r) c -> b t h w (c r q)", q=p, r=p)

    def _unpatchify(self, x: Video) -> Float[Array, "b t h2 w2 3"]:
        p = self.cfg.patch
        return rearrange(x, "b t h w (c r q) -> b t (h q) (w r) c", q=p, r=p).astype(jnp.float32)
