"""Convolutions, channels last."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from rfl_jax.models.layers import expand_to, lecun_normal

_DIMENSIONS_2D = ("NHWC", "HWIO", "NHWC")
_DIMENSIONS_3D = ("NDHWC", "DHWIO", "NDHWC")

Padding = tuple[tuple[int, int], tuple[int, int]]  # before and behind, of rows and of columns


def conv2d(
    x: Float[Array, "*b h w c"],
    kernel: Float[Array, "kh kw c_in c2"],
    *,
    stride: int = 1,
    padding: Padding,
    groups: int = 1,
) -> Float[Array, "*b h2 w2 c2"]:
    """2-D convolution over the last three axes (h, w, c); all leading axes are batch. `c_in` is c / groups."""
    lead = x.shape[:-3]
    y: Any = _conv2d(x.reshape(-1, *x.shape[-3:]), kernel, stride, padding, groups)
    return y.reshape(*lead, *y.shape[1:])


def _plain2d(stride: int, padding: Padding, groups: int, x: Array, kernel: Array) -> Array:
    return jax.lax.conv_general_dilated(
        x, kernel, (stride, stride), padding, dimension_numbers=_DIMENSIONS_2D, feature_group_count=groups
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def _conv2d(x: Array, kernel: Array, stride: int, padding: Padding, groups: int) -> Array:
    return _plain2d(stride, padding, groups, x, kernel)


def _conv2d_forward(
    x: Array, kernel: Array, stride: int, padding: Padding, groups: int
) -> tuple[Array, tuple[Array, Array]]:
    return _conv2d(x, kernel, stride, padding, groups), (x, kernel)


def _conv2d_backward(
    stride: int, padding: Padding, groups: int, kept: tuple[Array, Array], g: Array
) -> tuple[Array, Array]:
    def automatic(x: Array, kernel: Array, g: Array) -> tuple[Array, Array]:
        return jax.vjp(functools.partial(_plain2d, stride, padding, groups), x, kernel)[1](g)

    if groups > 1:
        return automatic(*kept, g)
    explicit = functools.partial(_gradients_as_forward, stride=stride, padding=padding)
    return jax.lax.platform_dependent(*kept, g, cpu=explicit, default=automatic)


_conv2d.defvjp(_conv2d_forward, _conv2d_backward)


def _gradients_as_forward(
    x: Float[Array, "b h w c"], kernel: Float[Array, "kh kw c c2"], g: Float[Array, "b h2 w2 c2"],
    *, stride: int, padding: Padding,
) -> tuple[Float[Array, "b h w c"], Float[Array, "kh kw c c2"]]:  # fmt: skip
    """Gradients of input and kernel, each as a forward convolution with its axes in the usual order.

    XLA's CPU backend has a fast convolution for that order alone. It rewrites others, but not inside loops, where those of
    automatic differentiation are ten to sixty times slower.
    """
    spread = jax.lax.pad(g, jnp.zeros((), g.dtype), [(0, 0, 0), (0, 0, stride - 1), (0, 0, stride - 1), (0, 0, 0)])
    sides = [
        (low, size, k, reach)
        for (low, _), size, k, reach in zip(padding, x.shape[1:3], kernel.shape[:2], spread.shape[1:3], strict=True)
    ]
    around = [(k - 1 - low, size + low - reach) for low, size, k, reach in sides]
    dx = _plain2d(1, _pair(around), 1, spread, kernel[::-1, ::-1].swapaxes(2, 3))
    # Batch and channels change places: the kernel's gradient correlates the input with `g` over space and batch.
    around = [(low, k + reach - 1 - size - low) for low, size, k, reach in sides]
    dk = _plain2d(1, _pair(around), 1, x.transpose(3, 1, 2, 0), spread.transpose(1, 2, 0, 3))
    return dx, dk.transpose(1, 2, 0, 3)


def _pair(sides: list[tuple[int, int]]) -> Padding:
    rows, columns = sides
    return rows, columns


def conv3d(
    x: Float[Array, "b t h w c"], kernel: Float[Array, "kt kh kw c c2"], *, temporal_stride: int = 1
) -> Float[Array, "b t2 h w c2"]:
    """3-D convolution, zero padding that keeps h and w, none in time.

    XLA's CPU backend runs 3-D convolutions several times slower than the same arithmetic as 2-D ones, so there the
    temporal taps become input channels of one 2-D convolution; accelerators get the native operation.
    """
    return jax.lax.platform_dependent(
        x,
        kernel,
        cpu=functools.partial(_conv3d_as_2d, temporal_stride=temporal_stride),
        default=functools.partial(_conv3d_native, temporal_stride=temporal_stride),
    )


def _conv3d_native(x: Array, kernel: Array, *, temporal_stride: int) -> Array:
    kh, kw = kernel.shape[1:3]
    return jax.lax.conv_general_dilated(
        x,
        kernel,
        (temporal_stride, 1, 1),
        ((0, 0), (kh // 2, kh // 2), (kw // 2, kw // 2)),
        dimension_numbers=_DIMENSIONS_3D,
    )


def _conv3d_as_2d(x: Array, kernel: Array, *, temporal_stride: int) -> Array:
    taps, kh, kw = kernel.shape[:3]
    frames = (x.shape[1] - taps) // temporal_stride + 1
    last = (frames - 1) * temporal_stride + 1
    windows = [jax.lax.slice_in_dim(x, i, i + last, temporal_stride, axis=1) for i in range(taps)]
    stacked = jnp.concatenate(windows, -1)
    flat = rearrange(kernel, "t h w i o -> h w (t i) o")
    return (
        stacked @ flat[0, 0]
        if kh == kw == 1
        else conv2d(stacked, flat, padding=((kh // 2, kh // 2), (kw // 2, kw // 2)))
    )


class SquareConv(nnx.Module):
    """Square 2-D convolution with bias, zero padding of half the kernel."""

    def __init__(
        self,
        c_in: int,
        c_out: int,
        kernel: int,
        *,
        stride: int = 1,
        groups: int = 1,
        dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ) -> None:
        self.dtype = dtype
        self.stride = stride
        self.groups = groups
        fan_in = kernel * kernel * c_in // groups
        self.kernel = nnx.Param(lecun_normal(rngs, (kernel, kernel, c_in // groups, c_out), fan_in))
        self.bias = nnx.Param(jnp.zeros(c_out))

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 c2"]:
        half = self.kernel.shape[0] // 2
        y = conv2d(
            x.astype(self.dtype),
            self.kernel[...].astype(self.dtype),
            stride=self.stride,
            padding=((half, half), (half, half)),
            groups=self.groups,
        )
        return y + expand_to(self.bias[...].astype(self.dtype), y)
