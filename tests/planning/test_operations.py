"""Operations are counted as often as they are executed."""

import jax
import jax.numpy as jnp
import pytest

from rfl_jax.planning.operations import count_flops

MATRIX = jax.ShapeDtypeStruct((16, 16), jnp.float32)
PRODUCT = 2 * 16**3


def test_what_is_in_a_loop_counts_at_each_turn_also_in_loops_of_loops():
    def inner(x, _):
        return x @ x, None

    def outer(x, _):
        return jax.lax.scan(inner, x, length=3)[0] @ x, None

    def program(x):
        y = jax.jit(lambda x: jax.lax.scan(inner, x, length=5)[0])(x)
        return jax.lax.scan(jax.checkpoint(outer), y, length=7)[0] @ x

    assert count_flops(lambda x: x @ x, MATRIX) == pytest.approx(PRODUCT, rel=0.01)
    assert count_flops(program, MATRIX) == pytest.approx((5 + 7 * (3 + 1) + 1) * PRODUCT, rel=0.02)


def test_a_gradient_through_recomputed_layers_costs_three_passes_by_the_input():
    def layer(x, weight):
        return jnp.tanh(x @ weight), None

    def program(x, weights):
        return jnp.sum(jax.lax.scan(jax.checkpoint(layer), x, weights)[0])

    weights = jax.ShapeDtypeStruct((6, 16, 16), jnp.float32)
    found = count_flops(jax.grad(program), MATRIX, weights)
    assert found == pytest.approx(3 * 6 * PRODUCT, rel=0.15)
