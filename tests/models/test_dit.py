"""The DiT against diffusers on small random models, and against itself: scan, loop and every remat policy."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import save_file

from convert import dit
from convert.mapping import unfill
from rfl_jax import remat
from rfl_jax.models.layers import int8_product
from rfl_jax.models.quantize import quantize, round_inputs
from rfl_jax.models.wan.config import DIT_PRESETS, VAE_PRESETS, DiTConfig, pixel_multiple, vae_preset
from rfl_jax.models.wan.dit import DiT, timestep_embedding
from rfl_jax.models.wan.rope import rope_freqs, split_pairs
from rfl_jax.models.weights import fill, get_arrays
from rfl_jax.sharding import shardings
from tests.devices import make_mesh
from tests.golden import relative

CFG = DiTConfig(
    in_dim=20, out_dim=8, dim=40, ffn_dim=56, num_heads=2, num_layers=3, freq_dim=32, text_dim=24, text_len=10
)


def random_model(cfg=CFG, **options):
    """No weight at its initial value."""
    model = DiT(cfg, rngs=nnx.Rngs(0), **options)
    rng = np.random.default_rng(1)
    arrays = {k: v + 0.1 * rng.normal(size=v.shape).astype(np.float32) for k, v in get_arrays(model).items()}
    return fill(model, arrays)


def inputs(cfg=CFG, seed=2):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(2, 3, 6, 4, cfg.in_dim)).astype(np.float32)
    context = rng.normal(size=(2, cfg.text_len, cfg.text_dim)).astype(np.float32)
    context[:, 6:] = 0
    return jnp.asarray(x), jnp.array([900.0, 416.7], jnp.float32), jnp.asarray(context)


@pytest.mark.parametrize("per_token", [False, True])
def test_agrees_with_diffusers_through_the_converter(tmp_path, per_token):
    torch = pytest.importorskip("torch")
    diffusers = pytest.importorskip("diffusers")
    model = random_model()
    # 20 channels a head: an uneven split of the rotary pairs.
    assert split_pairs(CFG.head_dim) == (4, 3, 3)
    source = unfill(dit.NAMINGS["diffusers"], {k: np.asarray(v) for k, v in get_arrays(model).items()})
    save_file(source, tmp_path / "diffusion_pytorch_model.safetensors")
    theirs = diffusers.WanTransformer3DModel(
        num_attention_heads=CFG.num_heads, attention_head_dim=CFG.head_dim, in_channels=CFG.in_dim, out_channels=CFG.out_dim,
        text_dim=CFG.text_dim, freq_dim=CFG.freq_dim, ffn_dim=CFG.ffn_dim, num_layers=CFG.num_layers, cross_attn_norm=True,
        qk_norm="rms_norm_across_heads", eps=CFG.eps,
    )  # fmt: skip
    theirs.load_state_dict({k: torch.from_numpy(v.copy()) for k, v in source.items()}, strict=True)
    x, t, context = map(np.array, inputs())
    if per_token:
        t = np.repeat(t[:, None], 18, 1) * (np.arange(18) >= 6)
        t = t.astype(np.float32)
    with torch.no_grad():
        want = theirs(
            torch.from_numpy(np.moveaxis(x, -1, 1).copy()),
            torch.from_numpy(t),
            torch.from_numpy(context),
            return_dict=False,
        )[0].numpy()
    ours = dit.load(tmp_path, num_heads=CFG.num_heads, text_len=CFG.text_len)
    assert ours.cfg == dataclasses.replace(CFG, boundary=0.9)
    assert relative(ours(*map(jnp.asarray, (x, t, context))), np.moveaxis(want, 1, -1)) < 1e-4


def test_scan_equals_loop():
    model = random_model(remat_policy="none")
    x, t, context = inputs()
    want = model(x, t, context)

    # The same network with its layers called one by one.
    tokens = model.patch_embedding(x.reshape(2, 3, 3, 2, 2, 2, -1).transpose(0, 1, 2, 4, 3, 5, 6).reshape(2, 18, -1))
    text = model.text_out(jax.nn.gelu(model.text_in(context), approximate=True))
    e = model.time_out(jax.nn.silu(model.time_in(timestep_embedding(t[:, None], CFG.freq_dim))))
    modulation = model.time_projection(jax.nn.silu(e)).reshape(2, 1, 6, -1)
    graph, layers = nnx.split(model.blocks)
    for i in range(CFG.num_layers):
        block = nnx.merge(graph, jax.tree.map(lambda w, i=i: w[i], layers))
        tokens = block(tokens, modulation, text, rope_freqs((3, 3, 2), CFG.head_dim), 18)
    empty = dataclasses.replace(CFG, num_layers=0)
    tail = DiT(empty, rngs=nnx.Rngs(0), remat_policy="none")
    shared = {k: v for k, v in get_arrays(model).items() if not k.startswith("blocks.")}
    tail = fill(tail, get_arrays(tail) | shared)
    # A network without layers that embeds these tokens as they are gives the head's output.
    tail.patch_embedding = lambda _: tokens
    assert relative(tail(x, t, context), want) < 1e-5


@pytest.mark.parametrize("policy", [p for p in remat.NAMES if p != "none"])
def test_every_remat_policy_equals_none(policy):
    x, t, context = inputs()

    def grads(policy):
        graph, params = nnx.split(random_model(remat_policy=policy))
        return jax.jit(jax.grad(lambda p, x: jnp.sum(nnx.merge(graph, p)(x, t, context) ** 2), (0, 1)))(params, x)

    for got, want in zip(jax.tree.leaves(grads(policy)), jax.tree.leaves(grads("none")), strict=True):
        assert relative(got, want) < 1e-5


@pytest.mark.parametrize("per_token", [False, True])
def test_tokens_over_a_mesh_equal_one_device(per_token):
    # 18 tokens over 4 devices: two of padding, to which nobody attends.
    x, t, context = inputs()
    if per_token:
        t = t[:, None] * (jnp.arange(18) >= 6)[None]
    graph, params = nnx.split(random_model())
    target = np.random.default_rng(1).normal(size=(*x.shape[:-1], CFG.out_dim))

    def loss(params, x):
        return jnp.sum(nnx.merge(graph, params)(x, t, context) * target)

    want = jax.jit(jax.value_and_grad(loss, (0, 1)))(params, x)
    mesh = make_mesh(1, 2, 4)
    placed = jax.device_put(params, shardings(params, "dit", mesh))
    with jax.set_mesh(mesh):
        found = jax.jit(jax.value_and_grad(loss, (0, 1)))(placed, x)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(want), strict=True):
        assert relative(a, b) < 1e-4


def test_offload_moves_the_block_inputs_to_the_host():
    x, t, context = inputs()
    graph, params = nnx.split(random_model(remat_policy="offload"))
    jaxpr = str(jax.make_jaxpr(jax.grad(lambda x: jnp.sum(nnx.merge(graph, params)(x, t, context))))(x))
    assert "Host" in jaxpr or "pinned_host" in jaxpr


def test_presets_have_the_published_parameter_counts():
    counts = {"wan2_2_i2v_a14b": 14_288_901_184, "wan2_2_t2v_a14b": 14_288_491_584, "wan2_2_ti2v_5b": 4_999_787_712}
    for name, count in counts.items():
        model = nnx.eval_shape(lambda name=name: DiT(DIT_PRESETS[name], rngs=nnx.Rngs(0)))
        assert sum(int(np.prod(x.shape)) for x in jax.tree.leaves(nnx.state(model, nnx.Param))) == count


def test_int8_weights_stay_close():
    x, t, context = inputs()
    want = random_model()(x, t, context)
    model = quantize(random_model())
    kernels = [v for k, v in get_arrays(model).items() if k.startswith("blocks.") and k.endswith(".kernel")]
    assert len(kernels) == 10
    assert all(kernel.dtype == jnp.int8 and jnp.max(jnp.abs(kernel)) == 127 for kernel in kernels)
    error = relative(model(x, t, context), want)
    print(f"velocity error of int8 weights: {error:.4f}")
    assert 0 < error < 0.02


def test_int8_products_are_those_of_exact_integers():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(3, 7, 200)).astype(np.float32) * np.logspace(-6, 6, 7, dtype=np.float32)[:, None]
    x[0, 0] = 0
    kernel, scale = rng.integers(-127, 128, (200, 30), np.int8), rng.uniform(1e-3, 1, 30).astype(np.float32)
    largest = np.maximum(np.abs(x).max(-1, keepdims=True), np.float32(1e-30))
    rounded = np.rint(x * (127 / largest)).astype(np.int64)
    assert np.all(np.abs(rounded).max(-1) == 127 * (x != 0).any(-1))
    step = largest / 127
    want = (rounded @ kernel.astype(np.int64)).astype(np.float32) * step * scale
    found = np.asarray(jax.jit(int8_product)(x, kernel, scale))
    np.testing.assert_allclose(found, want, rtol=1e-6)
    # A rounded value is off by half a step at most: a product by that times the sum of the weights.
    exact = x.astype(np.float64) @ (kernel * scale.astype(np.float64))
    assert np.all(np.abs(found - exact) <= 0.501 * step * np.abs(kernel * scale).sum(0))


def test_int8_inputs_stay_close_to_int8_weights_alone():
    x, t, context = inputs()
    weights, both = quantize(random_model(dtype=jnp.bfloat16)), round_inputs(quantize(random_model(dtype=jnp.bfloat16)))
    error = relative(both(x, t, context), weights(x, t, context))
    print(f"velocity error of int8 inputs: {error:.4f}")
    assert 0 < error < 0.02
    assert int8_products(both, x, t, context) == 10
    assert int8_products(weights, x, t, context) == 0
    # What is not rounded has no int8 inputs either.
    assert int8_products(round_inputs(random_model()), x, t, context) == 0


def int8_products(model, *args):
    """How many products of a layer take int8 on both sides and add up in 32 bits."""
    return str(jax.make_jaxpr(model)(*args)).count("preferred_element_type=int32")


def test_bfloat16_compute_stays_close():
    x, t, context = inputs()
    assert relative(random_model(dtype=jnp.bfloat16)(x, t, context), random_model()(x, t, context)) < 0.03


def test_the_published_autoencoder_of_a_network_has_its_channels():
    for name, vae, multiple in (("wan2_2_i2v_a14b", "wan2_1", 16), ("wan2_2_ti2v_5b", "wan2_2", 32)):
        assert vae_preset(DIT_PRESETS[name]) == VAE_PRESETS[vae]
        assert pixel_multiple(DIT_PRESETS[name]) == multiple
    with pytest.raises(ValueError, match="latents of 8 channels"):
        vae_preset(CFG)
