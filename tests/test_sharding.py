"""What the compiler makes of the sharding tables: pieces stay pieces, and memory falls with the number of devices."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from rfl_jax.errors import UserError
from rfl_jax.models.lora import add_lora
from rfl_jax.models.wan.config import DIT_PRESETS
from rfl_jax.models.wan.dit import DiT
from rfl_jax.sharding import BATCH, make_mesh, shardings, spec_of
from tests import devices

WIDE = dataclasses.replace(DIT_PRESETS["wan2_2_i2v_a14b"], num_layers=2)
LATENTS = (2, 2, 64, 96)  # samples, frames, rows, columns: 3072 tokens a sample


def compiled(mesh):
    """The gradient of the adapters of two layers of full width through two denoising steps."""

    def build():
        return add_lora(
            DiT(WIDE, dtype=jnp.bfloat16, rngs=nnx.Rngs(0)), rank=32, targets=["q", "ffn.0"], key=jax.random.key(0)
        )

    graph, adapters, weights = nnx.split(nnx.eval_shape(build), nnx.LoRAParam, ...)

    def placed(state, dtype):
        places = shardings(state, "dit", mesh)
        return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, dtype, sharding=s), state, places)

    def spread(*shape):
        return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, BATCH))

    def loss(adapters, weights, x, t, context):
        def step(x, _):
            v = nnx.merge(graph, adapters, weights)(x, t, context)
            return x.at[..., : WIDE.out_dim].add(v), None

        return jnp.sum(jax.lax.scan(step, x, length=2)[0] ** 2)

    args = (
        placed(adapters, jnp.float32),
        placed(weights, jnp.bfloat16),
        spread(*LATENTS, WIDE.in_dim),
        spread(2),
        spread(2, WIDE.text_len, WIDE.text_dim),
    )
    with jax.set_mesh(mesh):
        return jax.jit(jax.grad(loss), out_shardings=shardings(adapters, "dit", mesh)).lower(*args).compile()


def test_weights_of_all_layers_are_never_whole_on_a_device():
    text = compiled(devices.make_mesh(1, 2, 4)).as_text()
    pieces = {tuple(map(int, shape.split(","))) for shape in re.findall(r"\w\[(2,\d+,\d+)\]", text)}
    kernels = {tuple(sorted(shape[1:])) for shape in pieces}
    d, ffn = WIDE.dim, WIDE.ffn_dim
    assert kernels & {(d // 8, d), (d // 8, ffn)}
    # Neither gathered at once, nor taken layer by layer out of the loop over denoising steps.
    assert not kernels & {(d, d), (d, ffn)}


def test_neither_activations_nor_weight_stacks_are_gathered_whole():
    program = compiled(devices.make_mesh(1, 2, 4))
    gathered = re.findall(r"= \(?\w+\[([\d,]*)\]\S* all-gather", program.as_text())
    assert gathered
    shapes = [tuple(map(int, shape.split(","))) for shape in gathered]
    tokens, d = 3072, WIDE.dim
    for shape in shapes:
        # One layer's kernel at a time, in whatever layout.
        assert sorted(shape)[-2:] not in ([d, d], [d, WIDE.ffn_dim]) or 2 not in shape[:-2], shape
        assert not (tokens in shape and (d in shape or WIDE.ffn_dim in shape)), shape
    one, eight = (compiled(devices.make_mesh(*shape)).memory_analysis() for shape in ((1, 1, 1), (1, 2, 4)))
    assert eight.argument_size_in_bytes / one.argument_size_in_bytes == pytest.approx(1 / 8, rel=0.1)
    # Besides an eighth of the activations there is one layer of whole weights.
    assert eight.temp_size_in_bytes < 0.25 * one.temp_size_in_bytes


def test_an_axis_that_does_not_divide_stays_whole():
    mesh = devices.make_mesh(1, 2, 4)
    rules = [(r"kernel", PartitionSpec(None, ("fsdp", "context"), None))]
    assert spec_of("kernel", (2, 16, 3), rules, mesh) == PartitionSpec(None, ("fsdp", "context"), None)
    assert spec_of("kernel", (2, 12, 3), rules, mesh) == PartitionSpec(None, None, None)


def test_a_mesh_fills_the_devices():
    assert dict(make_mesh({"data": 2, "fsdp": -1, "context": 2}).shape) == {"data": 2, "fsdp": 2, "context": 2}
    with pytest.raises(UserError, match="does not fill 8 devices"):
        make_mesh({"data": 3, "fsdp": 1, "context": 1})
