"""Attention by any kernel on any mesh equals plain softmax attention, values and gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params

from rfl_jax.models.attention import attention, kernel_for
from rfl_jax.remat import remat
from tests.devices import make_mesh
from tests.golden import relative


def plain(q, k, v, length):
    k, v = k[:, :length], v[:, :length]
    weights = jax.nn.softmax(jnp.einsum("bnkd,bskd->bkns", q, k) * q.shape[-1] ** -0.5, -1)
    return jnp.einsum("bkns,bskd->bnkd", weights, v)


def random_heads(tokens, keys, heads, width, seed=0):
    rng = np.random.default_rng(seed)
    return [jnp.asarray(rng.normal(size=(4, n, heads, width)), jnp.float32) for n in (tokens, keys, keys)]


def check(mesh, kernel, *, tokens, keys, heads, length, width=16):
    q, k, v = random_heads(tokens, keys, heads, width)
    target = np.random.default_rng(1).normal(size=q.shape)
    # Padded queries have no meaning of their own: neither their value nor a gradient through them counts.
    target[:, length if tokens == keys else tokens :] = 0

    def loss(f):
        return jax.value_and_grad(lambda args: jnp.sum(f(*args) * target), argnums=0)

    want, want_grads = loss(lambda q, k, v: plain(q, k, v, length))((q, k, v))
    with jax.set_mesh(mesh):
        found, grads = jax.jit(loss(lambda q, k, v: attention(q, k, v, kernel=kernel, length=length)))((q, k, v))
    np.testing.assert_allclose(found, want, rtol=1e-4, atol=1e-3)
    for a, b in zip(grads, want_grads, strict=True):
        assert relative(a, b) < 1e-4


@pytest.mark.parametrize("shape", [(1, 1, 1), (8, 1, 1), (1, 2, 4), (2, 2, 2)])
@pytest.mark.parametrize("heads", [4, 3])  # heads that context divides, and that it does not
def test_meshes_equal_plain_attention(shape, heads):
    mesh = make_mesh(*shape)
    check(mesh, "xla", tokens=24, keys=24, heads=heads, length=21)
    check(mesh, "xla", tokens=24, keys=10, heads=heads, length=10)


@pytest.mark.parametrize(("shape", "heads"), [((1, 1, 1), 2), ((1, 2, 4), 4), ((1, 1, 4), 3)])
def test_flash_equals_plain_attention(shape, heads):
    kernel = kernel_for("flash", "cpu")
    check(make_mesh(*shape), kernel, tokens=152, keys=152, heads=heads, length=149)
    check(make_mesh(*shape), kernel, tokens=24, keys=130, heads=heads, length=130)


def test_the_fastest_kernel_of_a_platform_is_chosen():
    assert [kernel_for("auto", platform) for platform in ("tpu", "gpu", "cpu")] == ["flash", "cudnn", "xla"]
    assert kernel_for("xla", "tpu") == "xla"


def test_heads_are_exchanged_where_they_divide_and_keys_gathered_where_not():
    mesh = make_mesh(1, 1, 8)
    tokens = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(None, "context"))

    def program(heads):
        args = [jax.ShapeDtypeStruct((1, 64, heads, 16), jnp.float32, sharding=tokens)] * 3
        with jax.set_mesh(mesh):
            return jax.jit(attention, out_shardings=tokens).lower(*args).compile().as_text()

    divided, other = program(8), program(6)
    assert "all-to-all" in divided
    assert "all-gather" not in divided
    assert "all-gather" in other
    assert "all-to-all" not in other


def kernels(jaxpr):
    """Names of the kernels of which a value is used; the compiler removes the others."""
    used = {id(x) for eqn in jaxpr.eqns for x in eqn.invars} | {id(x) for x in jaxpr.outvars}
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "pallas_call":
            if any(id(x) in used for x in eqn.outvars):
                yield eqn.params["name"]
        else:
            for inner in jaxprs_in_params(eqn.params):
                yield from kernels(inner)


@pytest.mark.parametrize(("policy", "forward"), [("none", 1), ("full", 2), ("save_attention", 1)])
def test_saved_attention_is_not_computed_again(policy, forward):
    q, k, v = random_heads(24, 24, 2, 16)

    def loss(q):
        layer = remat(lambda q: jnp.sin(attention(q, k, v, kernel="flash_interpret")), policy)
        return jnp.sum(jnp.sin(layer(q)))

    found = list(kernels(jax.make_jaxpr(jax.grad(loss))(q).jaxpr))
    assert (found.count("flash_forward"), found.count("flash_backward")) == (forward, 1)
