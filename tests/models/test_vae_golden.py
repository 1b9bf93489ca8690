"""Both autoencoders agree with the official ones, through the converter, in both ways of running."""

import jax
import jax.numpy as jnp
import pytest

from convert import vae
from tests.golden import case, channels_last, needs_golden, relative


@needs_golden
@pytest.mark.parametrize("name", ["vae21", "vae22"])
def test_encode_decode_and_gradients(name):
    folder, _, io = case(name)
    model = vae.load(folder / "weights.safetensors")
    video, latents, c = (channels_last(io[k]) for k in ("in.video", "in.latents", "in.c"))

    for encode in (model.encode, model.encode_whole):
        assert relative(jax.jit(encode)(video), channels_last(io["out.encode_mean_normalized"])) < 1e-4
    mean, _ = jax.jit(model.encode_moments)(video)
    assert relative(mean, channels_last(io["out.encode_mean_raw"])) < 1e-4

    for decode in (model.decode, model.decode_whole):

        @jax.jit
        def run(z, decode=decode):
            out, pull = jax.vjp(decode, z)
            inside = (out >= -1) & (out <= 1)
            return out, pull(jnp.asarray(c))[0], pull(jnp.where(inside, c, 0))[0]

        out, grad, clamped_grad = run(latents)
        assert relative(out, channels_last(io["out.decode_video"])) < 1e-4
        assert relative(jnp.clip(out, -1, 1), channels_last(io["out.decode_video_clamped"])) < 1e-4
        assert relative(grad, channels_last(io["grad.latents"])) < 1e-3
        assert relative(clamped_grad, channels_last(io["grad.latents_through_clamp"])) < 1e-3
