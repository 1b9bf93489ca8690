"""CLIP against transformers on a small random network, values and gradients; images as PIL prepares them."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import save_file

from convert import clip
from convert.verify import clip_config
from rfl_jax.models.clip import PIXEL_MEAN, PIXEL_STD, prepare_images
from rfl_jax.rewards.embedder import unit
from tests.clips import SMALL, random_state, torch_clip
from tests.golden import relative


@pytest.mark.parametrize("quick", [True, False])
def test_both_towers_agree_with_transformers_values_and_gradients(tmp_path, quick):
    torch = pytest.importorskip("torch")
    pytest.importorskip("transformers")
    cfg, state = dataclasses.replace(SMALL, quick_gelu=quick), random_state()
    theirs = torch_clip(state, cfg)
    save_file(state, tmp_path / "model.safetensors")
    told = {"quick_gelu": quick, "vision_heads": cfg.vision_heads, "text_heads": cfg.text_heads}
    model = clip.load(tmp_path, **told)
    assert model.cfg == cfg
    rng = np.random.default_rng(0)
    images = rng.normal(size=(3, cfg.image_size, cfg.image_size, 3)).astype(np.float32)
    ids = rng.integers(0, cfg.vocab - 2, (3, cfg.text_len))
    # After the end marker anything may follow.
    ids[0, -1] = ids[1, 3] = ids[2, 1] = cfg.vocab - 1

    pixels = torch.from_numpy(np.moveaxis(images, -1, 1).copy()).requires_grad_()
    out = theirs(torch.from_numpy(ids), pixels)
    cosines = torch.sum(out.image_embeds * out.text_embeds, 1)
    cosines.sum().backward()

    @jax.jit
    def ours(images):
        seen, read = unit(model.vision(images)), unit(model.text(ids))
        return jnp.sum(seen * read), (seen, read)

    (total, (seen, read)), slope = jax.value_and_grad(ours, has_aux=True)(images)
    assert relative(seen, out.image_embeds.detach().numpy()) < 1e-4
    assert relative(read, out.text_embeds.detach().numpy()) < 1e-4
    assert float(total) == pytest.approx(cosines.sum().item(), abs=1e-4)
    assert relative(slope, np.moveaxis(pixels.grad.numpy(), 1, -1)) < 1e-3
    assert clip_config(cfg).vision_config.num_attention_heads == cfg.vision_heads


@pytest.mark.parametrize(("fit", "height", "width"), [("crop", 60, 90), ("crop", 90, 50), ("crop", 28, 40), ("pad", 90, 50), ("pad", 20, 24)])  # fmt: skip
def test_images_are_prepared_as_pil_does(fit, height, width):
    size = 28
    rng = np.random.default_rng(3)
    # Smooth and with edges, so that the bicubic overshoots.
    small = rng.integers(0, 256, (height // 5, width // 5, 3)).astype(np.uint8)
    picture = Image.fromarray(small).resize((width, height), Image.Resampling.NEAREST)
    pixels = np.asarray(picture)
    if fit == "crop":
        shorter = min(height, width)
        resized = picture.resize((size * width // shorter, size * height // shorter), Image.Resampling.BICUBIC)
        left, top = (resized.width - size) // 2, (resized.height - size) // 2
        want = np.asarray(resized.crop((left, top, left + size, top + size)))
    else:
        scale = size / max(height, width)
        resized = picture.resize((round(width * scale), round(height * scale)), Image.Resampling.BICUBIC)
        want = np.zeros((size, size, 3), np.uint8)
        top, left = (size - resized.height) // 2, (size - resized.width) // 2
        want[top : top + resized.height, left : left + resized.width] = np.asarray(resized)
    frames = pixels[None].astype(np.float32) / 127.5 - 1
    found = np.asarray(prepare_images(jnp.asarray(frames), size, fit))[0] * PIXEL_STD + PIXEL_MEAN
    # PIL rounds twice.
    assert np.abs(found * 255 - want).max() < 2.1
    assert np.abs(found * 255 - want).mean() < 0.5


def test_what_an_image_is_made_of_has_a_gradient():
    frames = jnp.asarray(np.random.default_rng(0).uniform(-0.5, 0.5, (2, 40, 60, 3)), jnp.float32)
    slope = jax.grad(lambda x: jnp.sum(prepare_images(x, 28, "pad") ** 2))(frames)
    assert np.abs(slope).reshape(2, -1).mean(1).min() > 0.01
    # The middle alone is looked at.
    slope = np.asarray(jax.grad(lambda x: jnp.sum(prepare_images(x, 28, "crop") ** 2))(frames))
    assert not slope[:, :, :6].any()
    assert slope[:, :, 15:45].any((0, 1, 3)).all()
