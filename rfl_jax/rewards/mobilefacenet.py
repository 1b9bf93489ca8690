"""MobileFaceNet (deepinsight/insightface `recognition/arcface_torch/backbones/mobilefacenet.py`), for inference.

Each batch norm follows a convolution and is folded into it. The members of the family differ only in the table of layers.
"""

import dataclasses

import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from rfl_jax.models.conv import SquareConv
from rfl_jax.models.layers import Linear, expand_to, lecun_normal
from rfl_jax.rewards.arcface import CROP, PReLU

SPREAD = 3  # pixels: the kernel between a bottleneck's two pointwise convolutions


@dataclasses.dataclass(frozen=True)
class ConvPReLUSpec:
    """A convolution and a PReLU."""

    width: int
    kernel: int
    stride: int
    groups: int


@dataclasses.dataclass(frozen=True)
class BottleneckSpec:
    """A pointwise convolution to `inner` channels, a depthwise one, and a pointwise one to `width` without PReLU; its input
    is added where it is `residual`.
    """

    width: int
    inner: int
    stride: int
    residual: bool


@dataclasses.dataclass(frozen=True)
class MobileFaceNetConfig:
    """Sizes of a MobileFaceNet.

    Attributes:
        layers: in order, of a 112x112 crop; the last one's channels are each summed up over the map that is left.
        embedding: size of the face embedding.
    """

    layers: tuple[ConvPReLUSpec | BottleneckSpec, ...]
    embedding: int

    @property
    def side(self) -> int:
        """Height and width of the last layer's map."""
        side = CROP
        for layer in self.layers:
            side = -(-side // layer.stride)
        return side


class ConvPReLU(nnx.Module):
    def __init__(self, c_in: int, spec: ConvPReLUSpec, *, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        self.conv = SquareConv(
            c_in, spec.width, spec.kernel, stride=spec.stride, groups=spec.groups, dtype=dtype, rngs=rngs
        )
        self.prelu = PReLU(spec.width)

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 c2"]:
        return self.prelu(self.conv(x))


class Bottleneck(nnx.Module):
    def __init__(self, c_in: int, spec: BottleneckSpec, *, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        expand = ConvPReLUSpec(spec.inner, 1, 1, 1)
        spread = ConvPReLUSpec(spec.inner, SPREAD, spec.stride, spec.inner)
        self.residual = spec.residual
        self.expand = ConvPReLU(c_in, expand, dtype=dtype, rngs=rngs)
        self.spread = ConvPReLU(spec.inner, spread, dtype=dtype, rngs=rngs)
        self.project = SquareConv(spec.inner, spec.width, 1, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 c2"]:
        h = self.project(self.spread(self.expand(x)))
        return h + x if self.residual else h


class MapSum(nnx.Module):
    """Each channel's weighted sum over the map: a depthwise convolution as large as its input."""

    def __init__(self, side: int, dim: int, *, rngs: nnx.Rngs) -> None:
        self.kernel = nnx.Param(lecun_normal(rngs, (side, side, dim), side * side))
        self.bias = nnx.Param(jnp.zeros(dim))

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b c"]:
        y = jnp.einsum("bhwc,hwc->bc", x, self.kernel[...].astype(x.dtype))
        return y + expand_to(self.bias[...].astype(x.dtype), y)


class MobileFaceNet(nnx.Module):
    """Aligned face crops to embeddings (not normalised)."""

    def __init__(self, cfg: MobileFaceNetConfig, *, dtype: DTypeLike = jnp.float32, rngs: nnx.Rngs) -> None:
        self.cfg = cfg
        layers, c = [], 3
        for spec in cfg.layers:
            if isinstance(spec, BottleneckSpec):
                layers.append(Bottleneck(c, spec, dtype=dtype, rngs=rngs))
            else:
                layers.append(ConvPReLU(c, spec, dtype=dtype, rngs=rngs))
            c = spec.width
        self.layers = nnx.List(layers)
        self.sum = MapSum(cfg.side, c, rngs=rngs)
        self.fc = Linear(c, cfg.embedding, rngs=rngs)

    def __call__(self, crops: Float[Array, "b 112 112 3"]) -> Float[Array, "b e"]:
        """Embeddings, float32, of RGB crops in [-1, 1]."""
        x = crops
        for layer in self.layers:
            x = layer(x)
        return self.fc(self.sum(x.astype(jnp.float32)))
