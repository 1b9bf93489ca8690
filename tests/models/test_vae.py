"""Both autoencoders against diffusers on small random models, and chunks against the whole clip."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import save_file

from convert import vae
from convert.mapping import unfill
from rfl_jax.models.wan.conditioning import Concatenated
from rfl_jax.models.wan.config import DIT_PRESETS, VAE_PRESETS, VAEConfig
from rfl_jax.models.wan.vae import VAE
from rfl_jax.models.weights import fill, get_arrays
from tests.devices import make_mesh
from tests.golden import relative

CONFIGS = {
    "2.1": VAEConfig("2.1", 4, 4, 16, VAE_PRESETS["wan2_1"].latent_mean, VAE_PRESETS["wan2_1"].latent_std),
    "2.2": VAEConfig("2.2", 4, 6, 48, VAE_PRESETS["wan2_2"].latent_mean, VAE_PRESETS["wan2_2"].latent_std),
}


def random_vae(version):
    model = VAE(CONFIGS[version], rngs=nnx.Rngs(0))
    rng = np.random.default_rng(1)
    return fill(
        model, {k: v + 0.05 * rng.normal(size=v.shape).astype(np.float32) for k, v in get_arrays(model).items()}
    )


def clip(seed=2):
    return np.random.default_rng(seed).uniform(-1, 1, (1, 9, 32, 32, 3)).astype(np.float32)


@pytest.mark.parametrize("version", CONFIGS)
def test_agrees_with_diffusers_through_the_converter(tmp_path, version):
    torch = pytest.importorskip("torch")
    diffusers = pytest.importorskip("diffusers")
    cfg, model = CONFIGS[version], random_vae(version)
    source = unfill(vae.NAMINGS[f"diffusers {version}"], {k: np.asarray(v) for k, v in get_arrays(model).items()})
    save_file(source, tmp_path / "diffusion_pytorch_model.safetensors")
    extra = (
        {"decoder_base_dim": 6, "is_residual": True, "in_channels": 12, "out_channels": 12, "patch_size": 2}
        if version == "2.2"
        else {}
    )
    theirs = diffusers.AutoencoderKLWan(
        base_dim=4, z_dim=cfg.z_dim, latents_mean=list(cfg.latent_mean), latents_std=list(cfg.latent_std),
        scale_factor_spatial=cfg.stride[1], **extra,
    )  # fmt: skip
    theirs.load_state_dict({k: torch.from_numpy(v.copy()) for k, v in source.items()}, strict=True)
    video = clip()
    ours = vae.load(tmp_path)
    mean, std = np.array(cfg.latent_mean, np.float32), np.array(cfg.latent_std, np.float32)
    with torch.no_grad():
        raw = theirs.encode(torch.from_numpy(np.moveaxis(video, -1, 1).copy())).latent_dist.mode()
        decoded = theirs.decode(raw).sample.numpy()
    z = (np.moveaxis(raw.numpy(), 1, -1) - mean) / std
    assert relative(jax.jit(ours.encode)(video), z) < 1e-4
    # diffusers clamps.
    assert relative(jnp.clip(jax.jit(ours.decode)(z), -1, 1), np.moveaxis(decoded, 1, -1)) < 1e-4


@pytest.mark.parametrize("version", CONFIGS)
def test_chunks_equal_the_whole_clip(version):
    model = random_vae(version)
    video = clip()
    z = jax.jit(model.encode_whole)(video)
    assert relative(jax.jit(model.encode)(video), z) < 1e-5
    c = np.random.default_rng(3).normal(size=video.shape).astype(np.float32)

    def run(decode):
        return jax.jit(jax.value_and_grad(lambda z: jnp.sum(decode(z) * c)))(z)

    (value, grad), (whole_value, whole_grad) = run(model.decode), run(model.decode_whole)
    assert abs(value - whole_value) < 1e-4 * abs(whole_value) + 1e-3
    assert relative(grad, whole_grad) < 1e-4
    # Where nothing is rematerialised there is no need of chunks.
    assert "scan" in str(jax.make_jaxpr(model.decode)(z))
    model.remat = False
    assert "scan" not in str(jax.make_jaxpr(model.decode)(z))


@pytest.mark.parametrize("caches", ["offload", "recompute"])
def test_caches_anywhere_give_the_same_gradient(caches):
    z = np.random.default_rng(3).normal(size=(1, 4, 2, 2, 16)).astype(np.float32)
    model = random_vae("2.1")

    def grad(model):
        return jax.jit(jax.grad(lambda z: jnp.sum(model.decode(z) ** 2)))

    want = grad(model)(z)
    model.caches = caches
    assert relative(grad(model)(z), want) < 1e-5
    program = str(jax.make_jaxpr(grad(model))(z))
    # In pinned host memory; or two groups of two latent frames, one loop in the other.
    assert ("Host" in program or "pinned_host" in program) == (caches == "offload")
    assert ("f32[2,2,1,1,2,2,16]" in program) == (caches == "recompute")


def test_a_window_has_the_pixels_and_the_gradient_of_the_whole_clip():
    sizes = VAEConfig("2.1", 4, 4, 2, (0.1, 0.2), (2.0, 3.0), (1, 1), num_res_blocks=0, temporal_downsample=(True,))
    model = VAE(sizes, rngs=nnx.Rngs(0))
    z = np.random.default_rng(3).normal(size=(1, 5, 2, 2, 2)).astype(np.float32)
    of_window = jax.jit(jax.value_and_grad(lambda z, first: pulled(model.decode_window(z, first, 2)), has_aux=True))
    pull = np.random.default_rng(4).normal(size=(1, 4, 4, 4, 3)).astype(np.float32)

    def pulled(pixels):
        return jnp.sum(pixels * pull), pixels

    def of_clip(z, first):
        pixels = jax.lax.dynamic_slice_in_dim(model.decode_whole(z), 2 * first - 1, 4, 1)
        return pulled(pixels)

    of_clip = jax.jit(jax.value_and_grad(of_clip, has_aux=True))
    for first in (1, 3):
        (_, want), whole = of_clip(z, first)
        later = z.copy()
        later[:, first + 2 :] = np.nan  # what lies behind the window is not looked at
        (_, found), grad = of_window(later, first)
        assert relative(found, want) < 1e-5
        inside = slice(first, first + 2)
        assert relative(grad[:, inside], whole[:, inside]) < 1e-4
        # The gradient that the caches would hand on to what lies before is left out.
        assert np.any(whole[:, :first] != 0)
        assert np.all(grad[:, :first] == 0)


def test_columns_over_a_mesh_equal_one_device():
    model = random_vae("2.1")
    z = jnp.asarray(np.random.default_rng(3).normal(size=(2, 3, 3, 8, model.cfg.z_dim)), jnp.float32)
    graph, params = nnx.split(model)
    c = np.random.default_rng(4).normal(size=(2, 9, 24, 64, 3)).astype(np.float32)

    def loss(z, params):
        return jnp.sum(nnx.merge(graph, params).decode(z) * c)

    want = jax.jit(jax.value_and_grad(loss))(z, params)
    mesh = make_mesh(1, 2, 4)
    with jax.set_mesh(mesh):
        program = jax.jit(jax.value_and_grad(loss)).lower(z, params).compile()
        found = program(z, params)
    # Neighbours exchange their edges; nobody gathers a picture.
    assert "collective-permute" in program.as_text()
    assert abs(found[0] - want[0]) < 1e-4 * abs(want[0]) + 1e-3
    assert relative(found[1], want[1]) < 1e-4


def test_condition_is_the_mask_and_the_latents_of_the_first_frame():
    model = random_vae("2.1")
    video = clip()
    alone = np.zeros_like(video)
    alone[:, 0] = video[:, 0]
    y = jax.jit(lambda v: Concatenated(DIT_PRESETS["wan2_2_i2v_a14b"]).encode(model, v[:, 0], 9))(video)
    assert np.array_equal(y[0, :, 0, 0, :4], [[1] * 4, [0] * 4, [0] * 4])
    assert relative(y[..., 4:], model.encode(jnp.asarray(alone))) < 1e-5
    alone[:, -1] = video[:, -1]
    y = jax.jit(lambda v: Concatenated(DIT_PRESETS["wan2_2_i2v_a14b"]).encode(model, v[:, 0], 9, v[:, -1]))(video)
    assert np.array_equal(y[0, :, 0, 0, :4], [[1] * 4, [0] * 4, [0, 0, 0, 1]])
    assert relative(y[..., 4:], model.encode(jnp.asarray(alone))) < 1e-5
