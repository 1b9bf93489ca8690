"""The DiT agrees with the official one, outputs and all gradients, through the converter."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file

from convert import dit
from convert.mapping import lazy_arrays, plan, whole
from rfl_jax.models.weights import flat_shapes, get_arrays
from tests.golden import case, channels_last, needs_golden, relative


@needs_golden
@pytest.mark.parametrize("name", ["dit_i2v", "dit_ti2v"])
def test_velocity_and_gradients(name):
    folder, config, io = case(name)
    model = dit.load(
        folder / "weights.safetensors", num_heads=config["model"]["num_heads"], text_len=config["model"]["text_len"]
    )
    graph, params = nnx.split(model)
    x, c = channels_last(io["in.x"]), channels_last(io["in.c"])
    y = channels_last(io["in.y"]) if "in.y" in io else np.zeros((*x.shape[:-1], 0), np.float32)
    x_dim = x.shape[-1]

    t = jnp.asarray(io["in.t"])

    def objective(params, xy, context):
        v = nnx.merge(graph, params)(xy, t, context)
        return jnp.sum(v * c), v

    grads, v = jax.jit(jax.grad(objective, (0, 1, 2), has_aux=True))(
        params, np.concatenate([x, y], -1), io["in.context"]
    )
    assert relative(v, channels_last(io["out.velocity"])) < 1e-4
    assert relative(grads[1][..., :x_dim], channels_last(io["grad.x"])) < 1e-3
    if "grad.y" in io:
        assert relative(grads[1][..., x_dim:], channels_last(io["grad.y"])) < 1e-3
    rows = np.arange(io["in.context"].shape[1])[None, :, None] < io["in.context_len"][:, None, None]
    assert relative(grads[2] * rows, io["grad.context"]) < 1e-3

    # The reference's weight gradients go through the same key map as weights.
    weights = {k.removeprefix("grad.weight."): v for k, v in io.items() if k.startswith("grad.weight.")}
    target = flat_shapes(model)
    shapes = {k: v.shape for k, v in weights.items()}
    assert shapes == {k: v.shape for k, v in load_file(folder / "weights.safetensors").items()}
    places = plan(dit.NAMINGS["original"], shapes, target, what="gradients")
    want = lazy_arrays(places, target, lambda key, index: weights[key][index], lambda key: weights[key].dtype)
    got = get_arrays(nnx.merge(graph, grads[0]))
    assert got.keys() == want.keys()
    assert max(relative(got[k], whole(want[k])) for k in want) < 1e-3
