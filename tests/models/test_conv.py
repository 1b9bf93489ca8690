"""The convolutions' own gradients on a CPU against those of automatic differentiation."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rfl_jax.chips import compiler_options
from rfl_jax.models.conv import conv2d

SHAPES = {  # height, width, kernel, stride, padding
    "same": (9, 8, 3, 1, ((1, 1), (1, 1))),
    "halved": (9, 8, 3, 2, ((1, 1), (1, 1))),
    "halved as autoencoders do": (8, 10, 3, 2, ((0, 1), (0, 1))),
    "points": (7, 6, 1, 2, ((0, 0), (0, 0))),
    "uneven": (10, 11, (5, 3), 3, ((1, 0), (0, 2))),
}


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_gradients_are_those_of_the_plain_convolution(shape):
    height, width, kernel, stride, padding = shape
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(2, height, width, 3)), jnp.float32)
    weights = jnp.asarray(rng.normal(size=(*np.broadcast_to(kernel, 2), 3, 4)), jnp.float32)
    plain = functools.partial(
        jax.lax.conv_general_dilated,
        window_strides=(stride, stride), padding=padding, dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )  # fmt: skip
    want, back_plain = jax.vjp(plain, x, weights)
    got, back = jax.vjp(functools.partial(conv2d, stride=stride, padding=padding), x, weights)
    np.testing.assert_array_equal(got, want)
    g = jnp.asarray(rng.normal(size=want.shape), jnp.float32)
    for ours, theirs in zip(back(g), back_plain(g), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)


def test_an_option_has_convolutions_on_a_cpu_computed_by_all_threads():
    def convolve(x, kernel):
        return conv2d(x, kernel, padding=((1, 1), (1, 1)))

    def library(**options):
        x, kernel = jnp.ones((8, 32, 32, 48)), jnp.ones((3, 3, 48, 16))
        return "ynn_fusion" in jax.jit(convolve, **options).lower(x, kernel).compile().as_text()

    # YNNPACK computes each with one thread. Where XLA no longer leaves them to it, the advice in docs/train.md may go.
    assert library()
    option = "xla_cpu_experimental_ynn_fusion_type=LIBRARY_FUSION_TYPE_DOT"
    assert not library(compiler_options=compiler_options(more=[option]))
