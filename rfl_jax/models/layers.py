"""The few layers every network here is made of.

Each takes a `stack` of leading axes: the blocks of a transformer keep one array per weight, layers on axis 0,
and `jax.lax.scan` hands each block its slice. Weights are stored in whatever dtype they were loaded in and are
cast to the layer's compute dtype where they are used.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int8

Stack = tuple[int, ...]


def lecun_normal(rngs: nnx.Rngs, shape: Sequence[int], fan_in: int) -> Array:
    """Normal samples of variance 1/fan_in, float32."""
    return jax.random.normal(rngs.params(), shape, jnp.float32) * fan_in**-0.5


def expand_to(values: Array, x: Array | np.ndarray) -> Array:
    """The values with leading axes of size one, as many axes as `x` has: what broadcasts over the leading axes of `x`."""
    return jnp.expand_dims(values, range(x.ndim - values.ndim))


class Linear(nnx.Module):
    """`x @ kernel + bias`, plus the adapter's `(alpha / rank) * x @ lora_a @ lora_b` where one was added. A kernel of int8
    (`rfl_jax.models.quantize`) has a scale per output channel; its inputs are then rounded to int8 as well where
    `rounds_inputs` says so, which has no gradient.
    """

    def __init__(
        self,
        d_in: int,
        d_out: int,
        *,
        bias: bool = True,
        stack: Stack = (),
        dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ) -> None:
        self.dtype = dtype
        self.kernel = nnx.Param(lecun_normal(rngs, (*stack, d_in, d_out), d_in))
        self.bias = nnx.Param(jnp.zeros((*stack, d_out))) if bias else None
        self.kernel_scale: nnx.Param | None = nnx.data(None)
        self.rounds_inputs = False
        self.lora_a: nnx.LoRAParam | None = nnx.data(None)
        self.lora_b: nnx.LoRAParam | None = nnx.data(None)
        self.lora_scale = 1.0

    def __call__(self, x: Float[Array, "*b d_in"]) -> Float[Array, "*b d_out"]:
        x = x.astype(self.dtype)
        if self.kernel_scale is not None and self.rounds_inputs:
            y = int8_product(x, self.kernel[...], self.kernel_scale[...]).astype(self.dtype)
        else:
            y = x @ self.kernel[...].astype(self.dtype)
            if self.kernel_scale is not None:
                y = y * expand_to(self.kernel_scale[...].astype(self.dtype), y)
        if self.bias is not None:
            y = y + expand_to(self.bias[...].astype(self.dtype), y)
        if self.lora_a is not None and self.lora_b is not None:
            low = x @ self.lora_a[...].astype(self.dtype)
            y = y + self.lora_scale * (low @ self.lora_b[...].astype(self.dtype))
        return y


def int8_product(
    x: Float[Array, "*b d_in"], kernel: Int8[Array, "d_in d_out"], scale: Float[Array, " d_out"]
) -> Float[Array, "*b d_out"]:
    """`x @ (kernel * scale)` in float32, with each row of `x` rounded to int8: its largest value becomes 127. Products are
    of integers, added up exactly (in 32 bits, up to 130,000 of them).
    """
    x = x.astype(jnp.float32)
    largest = jnp.maximum(jnp.max(jnp.abs(x), -1, keepdims=True), 1e-30)
    # One division a row.
    rounded = jnp.rint(x * (127 / largest)).astype(jnp.int8)
    y = jnp.matmul(rounded, kernel, preferred_element_type=jnp.int32)
    return y.astype(jnp.float32) * (largest / 127) * expand_to(scale.astype(jnp.float32), y)


class RMSNorm(nnx.Module):
    """Root-mean-square norm over the last axis, in float32, with a scale."""

    def __init__(self, dim: int, *, eps: float, stack: Stack = (), rngs: nnx.Rngs) -> None:
        del rngs
        self.eps = eps
        self.scale = nnx.Param(jnp.ones((*stack, dim)))

    def __call__(self, x: Float[Array, "*b d"]) -> Float[Array, "*b d"]:
        y = x.astype(jnp.float32)
        y = y * jax.lax.rsqrt(jnp.mean(y * y, -1, keepdims=True) + self.eps)
        # Cast before the scale, as WanRMSNorm and T5LayerNorm do.
        return y.astype(x.dtype) * expand_to(self.scale[...].astype(x.dtype), x)


def layer_norm(x: Float[Array, "*b d"], eps: float) -> Float[Array, "*b d"]:
    """Layer norm without parameters, returned in float32."""
    x = x.astype(jnp.float32)
    mean = jnp.mean(x, -1, keepdims=True)
    centred = x - mean
    return centred * jax.lax.rsqrt(jnp.mean(centred * centred, -1, keepdims=True) + eps)


class LayerNorm(nnx.Module):
    """Layer norm with scale and bias, in float32."""

    def __init__(self, dim: int, *, eps: float, stack: Stack = (), rngs: nnx.Rngs) -> None:
        del rngs
        self.eps = eps
        self.scale = nnx.Param(jnp.ones((*stack, dim)))
        self.bias = nnx.Param(jnp.zeros((*stack, dim)))

    def __call__(self, x: Float[Array, "*b d"]) -> Float[Array, "*b d"]:
        scale, bias = (expand_to(p[...].astype(jnp.float32), x) for p in (self.scale, self.bias))
        return (layer_norm(x, self.eps) * scale + bias).astype(x.dtype)
