"""The text encoder agrees with the official one, through the converter."""

import jax.numpy as jnp
from flax import nnx

from convert import umt5
from rfl_jax.models.umt5 import relative_buckets
from tests.golden import case, needs_golden, relative


@needs_golden
def test_hidden_states_and_bias():
    folder, config, io = case("t5")
    model = umt5.load(folder / "weights.safetensors", max_distance=config["max_distance"])
    assert relative(model(io["in.ids"], io["in.mask"]), io["out.hidden_raw"]) < 1e-4
    assert relative(model.context(io["in.ids"], io["in.mask"]), io["out.hidden_zero_padded"]) < 1e-4

    table = nnx.state(model.blocks)["position_bias"][...][0]
    buckets = relative_buckets(io["in.ids"].shape[1], model.cfg.num_buckets, model.cfg.max_distance)
    bias = jnp.moveaxis(table[buckets], -1, 0)[None]
    assert relative(bias, io["out.block0_position_bias"]) < 1e-6
