"""Weights that never train as 8-bit integers: half the memory of bfloat16, and products at twice its rate where a chip has them
and the inputs are rounded too.
"""

from typing import TypeVar

import jax.numpy as jnp
from flax import nnx

from rfl_jax.models.layers import Linear

M = TypeVar("M", bound=nnx.Module)


def quantize(model: M) -> M:
    """Rounds the kernels of the linear layers inside `blocks` to int8 in place, with one scale per output channel (and
    layer): the largest weight becomes 127. The scale is applied after the product.
    """
    for path, layer in nnx.iter_modules(model):
        if not isinstance(layer, Linear) or path[0] != "blocks":
            continue
        kernel = layer.kernel[...].astype(jnp.float32)
        scale = jnp.max(jnp.abs(kernel), -2) / 127
        layer.kernel = nnx.Param(jnp.rint(kernel / jnp.maximum(scale, 1e-30)[..., None, :]).astype(jnp.int8))
        layer.kernel_scale = nnx.Param(scale)
    return model


def round_inputs(model: M) -> M:
    """Has the layers that `quantize` rounded round their inputs as well, in place: for forward passes without gradient."""
    for _, layer in nnx.iter_modules(model):
        if isinstance(layer, Linear) and layer.kernel_scale is not None:
            layer.rounds_inputs = True
    return model
