"""ArcFace IResNet (deepinsight/insightface `recognition/arcface_torch/backbones/iresnet.py`), for inference.

A batch norm that follows a convolution is folded into it. The one that precedes a block's first convolution cannot
be (the convolution pads with zeros after it) and stays as a scale and a bias per channel.
"""

import dataclasses

import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from rfl_jax.models.conv import SquareConv
from rfl_jax.models.layers import Linear, expand_to

CROP = 112  # pixels: width and height of an aligned face


@dataclasses.dataclass(frozen=True)
class IResNetConfig:
    """Sizes of an IResNet.

    Attributes:
        stem: channels after the first convolution.
        widths: channels of the four stages, each of which halves the resolution.
        layers: blocks a stage: (2, 2, 2, 2) is IResNet-18, (3, 13, 30, 3) IResNet-100.
        embedding: size of the face embedding.
    """

    widths: tuple[int, ...] = (64, 128, 256, 512)
    layers: tuple[int, ...] = (3, 13, 30, 3)
    stem: int = 64
    embedding: int = 512


class Affine(nnx.Module):
    """A scale and a bias per channel: a batch norm with fixed statistics."""

    def __init__(self, dim: int) -> None:
        self.scale = nnx.Param(jnp.ones(dim))
        self.bias = nnx.Param(jnp.zeros(dim))

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        scale, bias = (expand_to(p[...].astype(x.dtype), x) for p in (self.scale, self.bias))
        return x * scale + bias


class PReLU(nnx.Module):
    def __init__(self, dim: int) -> None:
        self.slope = nnx.Param(jnp.full(dim, 0.25))

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        return jnp.where(x >= 0, x, x * expand_to(self.slope[...].astype(x.dtype), x))


class Block(nnx.Module):
    def __init__(self, c_in: int, c_out: int, *, stride: int, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        self.norm = Affine(c_in)
        self.conv1 = SquareConv(c_in, c_out, 3, dtype=dtype, rngs=rngs)
        self.prelu = PReLU(c_out)
        self.conv2 = SquareConv(c_out, c_out, 3, stride=stride, dtype=dtype, rngs=rngs)
        self.shortcut = (
            SquareConv(c_in, c_out, 1, stride=stride, dtype=dtype, rngs=rngs) if stride != 1 or c_in != c_out else None
        )

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 c2"]:
        h = self.conv2(self.prelu(self.conv1(self.norm(x))))
        return h + (x if self.shortcut is None else self.shortcut(x))


class IResNet(nnx.Module):
    """Aligned face crops to embeddings (not normalised)."""

    def __init__(self, cfg: IResNetConfig, *, dtype: DTypeLike = jnp.float32, rngs: nnx.Rngs) -> None:
        self.cfg = cfg
        self.conv1 = SquareConv(3, cfg.stem, 3, dtype=dtype, rngs=rngs)
        self.prelu = PReLU(cfg.stem)
        blocks, c_in = [], cfg.stem
        for width, count in zip(cfg.widths, cfg.layers, strict=True):
            for i in range(count):
                blocks.append(Block(c_in, width, stride=1 if i else 2, dtype=dtype, rngs=rngs))
                c_in = width
        self.blocks = nnx.List(blocks)
        self.norm = Affine(c_in)
        side = CROP // 2 ** len(cfg.widths)
        self.fc = Linear(side * side * c_in, cfg.embedding, rngs=rngs)

    def __call__(self, crops: Float[Array, "b 112 112 3"]) -> Float[Array, "b e"]:
        """Embeddings, float32, of RGB crops in [-1, 1]."""
        x = self.prelu(self.conv1(crops))
        for block in self.blocks:
            x = block(x)
        x = self.norm(x).astype(jnp.float32)
        return self.fc(x.reshape(x.shape[0], -1))
