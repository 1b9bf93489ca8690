"""SCRFD face detectors (deepinsight/insightface `detection/scrfd`): backbone, PAFPN neck, one head a stride.

For inference: batch norms and the per-stride scale of the box head are folded into the convolutions. The members of
the family differ only in the table of backbone layers and in the widths.
"""

import dataclasses

import jax
import jax.numpy as jnp
from einops import rearrange, repeat
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from rfl_jax.models.conv import SquareConv
from rfl_jax.models.layers import expand_to

STRIDES = (8, 16, 32)
ANCHORS = 2  # per location
KEYPOINTS = 5

Outputs = tuple[Float[Array, "b n"], Float[Array, "b n 4"], Float[Array, "b n 5 2"]]  # scores, boxes, points


@dataclasses.dataclass(frozen=True)
class ConvSpec:
    """A convolution (with the group norm of some heads, if `norm_groups`) and a ReLU."""

    width: int
    kernel: int = 3
    stride: int = 1
    groups: int = 1
    norm_groups: int = 0


@dataclasses.dataclass(frozen=True)
class PoolSpec:
    """Max pooling."""

    kernel: int
    stride: int
    padding: int


@dataclasses.dataclass(frozen=True)
class BlockSpec:
    """A basic residual block. A shortcut that changes resolution averages first (`avg_down`)."""

    width: int
    stride: int = 1
    shortcut: bool = False


@dataclasses.dataclass(frozen=True)
class SCRFDConfig:
    """Shape of a detector.

    Attributes:
        backbone: its layers in order.
        taps: after how many of them the features of strides 8, 16 and 32 leave.
        neck: channels of the neck.
        tower: the convolutions of a head before its three outputs.
        output_kernel: kernel of those outputs.
    """

    backbone: tuple[ConvSpec | PoolSpec | BlockSpec, ...]
    taps: tuple[int, int, int]
    neck: int
    tower: tuple[ConvSpec, ...]
    output_kernel: int = 3


@dataclasses.dataclass
class Detections:
    """Raw outputs of all anchors, strides 8, 16, 32 in turn, index (row * width + column) * 2 + anchor within each.

    Attributes:
        scores: [b, n] in [0, 1].
        boxes: [b, n, 4] distances left, top, right, bottom from the anchor, in units of the stride.
        kps: [b, n, 5, 2] offsets (x, y) of the five points from the anchor, in units of the stride.
    """

    scores: Float[Array, "b n"]
    boxes: Float[Array, "b n 4"]
    kps: Float[Array, "b n 5 2"]


jax.tree_util.register_dataclass(Detections, ["scores", "boxes", "kps"], [])


class GroupNorm(nnx.Module):
    """Group norm over space and the channels of each group, in float32, epsilon as exported by PyTorch."""

    def __init__(self, dim: int, groups: int) -> None:
        self.groups = groups
        self.scale = nnx.Param(jnp.ones(dim))
        self.bias = nnx.Param(jnp.zeros(dim))

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        y = rearrange(x.astype(jnp.float32), "b h w (g c) -> b h w g c", g=self.groups)
        mean = jnp.mean(y, (1, 2, 4), keepdims=True)
        variance = jnp.var(y, (1, 2, 4), keepdims=True)
        y = ((y - mean) * jax.lax.rsqrt(variance + 1e-5)).reshape(x.shape)
        return (y * expand_to(self.scale[...], y) + expand_to(self.bias[...], y)).astype(x.dtype)


class ConvReLU(nnx.Module):
    def __init__(self, c_in: int, spec: ConvSpec, *, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        self.conv = SquareConv(
            c_in, spec.width, spec.kernel, stride=spec.stride, groups=spec.groups, dtype=dtype, rngs=rngs
        )
        self.norm = GroupNorm(spec.width, spec.norm_groups) if spec.norm_groups else None

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 c2"]:
        x = self.conv(x)
        return jax.nn.relu(x if self.norm is None else self.norm(x))


class MaxPool(nnx.Module):
    def __init__(self, spec: PoolSpec) -> None:
        self.spec = spec

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 c2"]:
        k, s, p = self.spec.kernel, self.spec.stride, self.spec.padding
        window, strides, padding = (1, k, k, 1), (1, s, s, 1), ((0, 0), (p, p), (p, p), (0, 0))
        return jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, window, strides, padding)


class BasicBlock(nnx.Module):
    def __init__(self, c_in: int, spec: BlockSpec, *, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        self.stride = spec.stride
        self.conv1 = SquareConv(c_in, spec.width, 3, stride=spec.stride, dtype=dtype, rngs=rngs)
        self.conv2 = SquareConv(spec.width, spec.width, 3, dtype=dtype, rngs=rngs)
        self.shortcut = SquareConv(c_in, spec.width, 1, dtype=dtype, rngs=rngs) if spec.shortcut else None

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 c2"]:
        h = self.conv2(jax.nn.relu(self.conv1(x)))
        if self.shortcut is not None:
            if self.stride > 1:
                s = self.stride
                x = jnp.mean(rearrange(x, "b (h i) (w j) c -> b h w c (i j)", i=s, j=s), -1)
            x = self.shortcut(x)
        return jax.nn.relu(h + x)


class Head(nnx.Module):
    def __init__(self, cfg: SCRFDConfig, *, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        widths = [cfg.neck, *(spec.width for spec in cfg.tower)]
        self.tower = nnx.List(
            ConvReLU(c, spec, dtype=dtype, rngs=rngs) for c, spec in zip(widths, cfg.tower, strict=False)
        )
        k = cfg.output_kernel
        self.cls = SquareConv(widths[-1], ANCHORS, k, dtype=dtype, rngs=rngs)
        self.reg = SquareConv(widths[-1], ANCHORS * 4, k, dtype=dtype, rngs=rngs)
        self.kps = SquareConv(widths[-1], ANCHORS * KEYPOINTS * 2, k, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "b h w c"]) -> Outputs:
        """Score logits, box distances and keypoint offsets, float32."""
        for layer in self.tower:
            x = layer(x)
        cls, reg, kps = (f(x).astype(jnp.float32) for f in (self.cls, self.reg, self.kps))
        return (
            rearrange(cls, "b h w a -> b (h w a)"),
            rearrange(reg, "b h w (a four) -> b (h w a) four", a=ANCHORS),
            rearrange(kps, "b h w (a p xy) -> b (h w a) p xy", a=ANCHORS, xy=2),
        )


class SCRFD(nnx.Module):
    """Face detector. The input's height and width are multiples of 32."""

    def __init__(self, cfg: SCRFDConfig, *, dtype: DTypeLike = jnp.float32, rngs: nnx.Rngs) -> None:
        self.cfg = cfg
        layers, widths, c = [], [], 3
        for spec in cfg.backbone:
            match spec:
                case ConvSpec():
                    layers.append(ConvReLU(c, spec, dtype=dtype, rngs=rngs))
                    c = spec.width
                case PoolSpec():
                    layers.append(MaxPool(spec))
                case BlockSpec():
                    layers.append(BasicBlock(c, spec, dtype=dtype, rngs=rngs))
                    c = spec.width
            widths.append(c)
        self.backbone = nnx.List(layers)

        def conv(c_in: int, kernel: int, stride: int = 1) -> SquareConv:
            return SquareConv(c_in, cfg.neck, kernel, stride=stride, dtype=dtype, rngs=rngs)

        self.lateral = nnx.List(conv(widths[tap - 1], 1) for tap in cfg.taps)
        self.fpn = nnx.List(conv(cfg.neck, 3) for _ in STRIDES)
        self.downsample = nnx.List(conv(cfg.neck, 3, 2) for _ in STRIDES[1:])
        self.pafpn = nnx.List(conv(cfg.neck, 3) for _ in STRIDES[1:])
        self.heads = nnx.List(Head(cfg, dtype=dtype, rngs=rngs) for _ in STRIDES)

    def logits(self, images: Float[Array, "b h w 3"]) -> list[Outputs]:
        """The outputs of each stride's head, before the sigmoid of the scores."""
        x, features = images, []
        for i, layer in enumerate(self.backbone, 1):
            x = layer(x)
            if i in self.cfg.taps:
                features.append(x)
        down = [conv(x) for conv, x in zip(self.lateral, features, strict=True)]
        for i in (1, 0):
            down[i] = down[i] + repeat(down[i + 1], "b h w c -> b (h h2) (w w2) c", h2=2, w2=2)
        up = [conv(x) for conv, x in zip(self.fpn, down, strict=True)]
        for i in (0, 1):
            up[i + 1] = up[i + 1] + self.downsample[i](up[i])
        up = [up[0], self.pafpn[0](up[1]), self.pafpn[1](up[2])]
        return [head(x) for head, x in zip(self.heads, up, strict=True)]

    def __call__(self, images: Float[Array, "b h w 3"]) -> Detections:
        """Raw detections of images that are already letterboxed and scaled."""
        scores, boxes, kps = (jnp.concatenate(parts, 1) for parts in zip(*self.logits(images), strict=True))
        return Detections(jax.nn.sigmoid(scores), boxes, kps)


def family(base: str) -> SCRFDConfig:
    """The published members, by name: 500m (MobileNet), 2.5g and 10g (ResNet)."""
    return _FAMILY[base]


def resnet(
    stem: tuple[int, ...], widths: tuple[int, ...], blocks: tuple[int, ...], neck: int, tower: tuple[ConvSpec, ...]
) -> SCRFDConfig:
    """A ResNet backbone: three stem convolutions, max pooling, four stages of basic blocks."""
    layers: list[ConvSpec | PoolSpec | BlockSpec] = [ConvSpec(w, stride=1 if i else 2) for i, w in enumerate(stem)]
    layers.append(PoolSpec(2, 2, 0))
    c, ends = stem[-1], []
    for stage, (width, count) in enumerate(zip(widths, blocks, strict=True)):
        for i in range(count):
            stride = 2 if stage and not i else 1
            layers.append(BlockSpec(width, stride, shortcut=stride > 1 or c != width))
            c = width
        ends.append(len(layers))
    return SCRFDConfig(tuple(layers), (ends[1], ends[2], ends[3]), neck, tower)


def mobilenet(widths: tuple[int, ...], blocks: tuple[int, ...], neck: int, tower: tuple[ConvSpec, ...]) -> SCRFDConfig:
    """A MobileNet backbone: one strided convolution, then depthwise-separable pairs; stages 2 to 5 halve space."""
    layers = [ConvSpec(widths[0], stride=2)]
    c, ends = widths[0], []
    for stage, (width, count) in enumerate(zip(widths, (1, *blocks), strict=True)):
        for i in range(count):
            layers += [ConvSpec(c, stride=2 if stage and not i else 1, groups=c), ConvSpec(width, kernel=1)]
            c = width
        ends.append(len(layers))
    return SCRFDConfig(tuple(layers), (ends[-3], ends[-2], ends[-1]), neck, tower)


_FAMILY = {
    "500m": mobilenet(
        (16, 40, 72, 152, 288),
        (2, 3, 2, 6),
        16,
        (ConvSpec(16, groups=16), ConvSpec(64, kernel=1), ConvSpec(64, groups=64), ConvSpec(64, kernel=1)),
    ),
    "2.5g": resnet((12, 12, 24), (24, 48, 48, 80), (3, 5, 3, 2), 24, (ConvSpec(64), ConvSpec(64))),
    "10g": resnet((28, 28, 56), (56, 88, 88, 224), (3, 4, 2, 3), 56, (ConvSpec(80), ConvSpec(80), ConvSpec(80))),
}
