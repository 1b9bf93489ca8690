"""Pictures as they are shown, and what is refused instead."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from rfl_jax.data.videos import read_image
from rfl_jax.errors import UserError

CASES = Path(__file__).parents[3] / "shared" / "cases"
RAMP = np.arange(32 * 48).reshape(32, 48) % 256


def colours():
    return Image.fromarray(np.stack([RAMP, RAMP[::-1], RAMP // 2], -1).astype(np.uint8))


def pixels(file):
    image = read_image(file)
    assert image.mode == "RGB"
    return np.asarray(image).astype(int)


@pytest.mark.parametrize("turn", range(1, 9))
@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "tif"])
def test_exif_puts_a_picture_upright(tmp_path, turn, suffix):
    stored = {
        1: lambda a: a, 2: lambda a: a[:, ::-1], 3: lambda a: a[::-1, ::-1], 4: lambda a: a[::-1],
        5: lambda a: a.swapaxes(0, 1), 6: lambda a: np.rot90(a), 7: lambda a: a[::-1, ::-1].swapaxes(0, 1), 8: lambda a: np.rot90(a, -1),
    }[turn]  # fmt: skip
    upright = np.full((64, 96, 3), 40, np.uint8)
    upright[:32, :48] = 220
    exif = Image.Exif()
    exif[274] = turn
    Image.fromarray(np.ascontiguousarray(stored(upright))).save(tmp_path / f"a.{suffix}", exif=exif)
    assert np.abs(pixels(tmp_path / f"a.{suffix}") - upright).mean() < 2


@pytest.mark.parametrize("suffix", ["png", "tif"])
@pytest.mark.parametrize("turned", [False, True])
def test_sixteen_bits_of_grey_keep_their_brightness(tmp_path, suffix, turned):
    exif = Image.Exif()
    exif[274] = 3 if turned else 1
    Image.fromarray((RAMP * 257).astype(np.uint16)).save(tmp_path / f"a.{suffix}", exif=exif)
    want = RAMP[::-1, ::-1] if turned else RAMP
    assert np.array_equal(pixels(tmp_path / f"a.{suffix}"), np.repeat(want[..., None], 3, -1))


def test_transparency_lies_over_white(tmp_path):
    alpha = np.where(np.arange(48) < 24, 0, 255)[None].repeat(32, 0).astype(np.uint8)
    half = np.where(alpha == 0, 128, 255).astype(np.uint8)
    solid = np.asarray(colours()).astype(int)
    for name, mode, mask in (
        ("a.png", "RGBA", alpha),
        ("b.png", "LA", alpha),
        ("c.webp", "RGBA", alpha),
        ("d.png", "RGBA", half),
    ):
        image = colours().convert("L" if mode == "LA" else "RGB")
        image.putalpha(Image.fromarray(mask))
        image.save(tmp_path / name, lossless=True)
        opaque = np.repeat(np.asarray(image)[..., :1], 3, -1).astype(int) if mode == "LA" else solid
        share = mask[..., None] / 255
        assert np.abs(pixels(tmp_path / name) - (opaque * share + 255 * (1 - share))).max() <= 1


def test_palettes_with_and_without_transparency(tmp_path):
    image = colours().quantize(16)
    plain = np.asarray(image.convert("RGB")).astype(int)
    image.save(tmp_path / "plain.png")
    image.save(tmp_path / "clear.png", transparency=3)
    image.save(tmp_path / "clear.gif", transparency=3)
    clear = np.where(np.asarray(image)[..., None] == 3, 255, plain)
    assert np.array_equal(pixels(tmp_path / "plain.png"), plain)
    assert np.array_equal(pixels(tmp_path / "clear.png"), clear)
    assert np.array_equal(pixels(tmp_path / "clear.gif"), clear)
    # A colour that stands for transparent, without a palette.
    key = Image.fromarray(np.where(RAMP[..., None] < 99, [1, 2, 3], [9, 8, 7]).astype(np.uint8))
    key.save(tmp_path / "key.png", transparency=(1, 2, 3))
    assert np.array_equal(pixels(tmp_path / "key.png"), np.where(RAMP[..., None] < 99, [255] * 3, [9, 8, 7]))


@pytest.mark.parametrize(
    ("mode", "suffix"), [("1", "png"), ("L", "jpg"), ("CMYK", "jpg"), ("CMYK", "tif"), ("LAB", "tif"), ("YCbCr", "jpg")]
)
def test_other_modes_become_rgb(tmp_path, mode, suffix):
    flat = Image.new("RGB", (48, 32), (200, 200, 200) if mode in ("L", "1") else (200, 120, 40))
    image = (
        flat.convert(mode, dither=Image.Dither.NONE) if mode != "LAB" else Image.new("LAB", (48, 32), (128, 128, 128))
    )
    image.save(tmp_path / f"a.{suffix}", quality=95)
    want = {"1": (255,) * 3, "LAB": (119,) * 3}.get(mode, flat.getpixel((0, 0)))
    assert np.abs(pixels(tmp_path / f"a.{suffix}") - want).max() <= 3


def test_the_first_frame_of_an_animation_is_taken(tmp_path):
    first, second = Image.new("RGB", (48, 32), (10, 200, 30)), Image.new("RGB", (48, 32), (200, 10, 30))
    for suffix in ("gif", "webp", "png"):
        first.save(tmp_path / f"a.{suffix}", save_all=True, append_images=[second], lossless=True)
        assert np.abs(pixels(tmp_path / f"a.{suffix}") - (10, 200, 30)).max() <= 1


def test_pixels_of_unknown_white_are_refused(tmp_path):
    Image.fromarray(RAMP.astype(np.float32)).save(tmp_path / "f.tif")
    Image.fromarray(RAMP.astype(np.int32)).save(tmp_path / "i.tif")
    Image.fromarray((RAMP * 257).astype(np.uint16)).save(tmp_path / "clear.png", transparency=257)
    for name in ("f.tif", "i.tif", "clear.png"):
        with pytest.raises(UserError, match=rf"{name}: pixels of mode .*, expected 8 or 16 bits a channel"):
            read_image(tmp_path / name)


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "gif", "bmp", "tif"])
@pytest.mark.parametrize("share", [0.0, 0.3, 0.9])
def test_pictures_that_stop_early_are_refused(tmp_path, suffix, share):
    file = tmp_path / f"a.{suffix}"
    noise = np.random.default_rng(0).integers(0, 256, (64, 96, 3), np.uint8)
    Image.fromarray(noise).save(file)
    file.write_bytes(file.read_bytes()[: int(file.stat().st_size * share)])
    with pytest.raises(UserError, match=rf"a\.{suffix}: expected a readable image"):
        read_image(file)


def test_bombs_are_refused_and_large_photos_are_not(tmp_path, monkeypatch):
    colours().save(tmp_path / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 32 * 48 - 1)
    assert read_image(tmp_path / "a.png").size == (48, 32)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 32 * 48 // 2 - 1)
    with pytest.raises(UserError, match=r"a\.png: expected a readable image \(.*exceeds limit"):
        read_image(tmp_path / "a.png")


def test_what_is_no_picture_is_refused(tmp_path):
    (tmp_path / "a.png").write_bytes(b"no picture")
    for name, message in (("a.png", "expected a readable image"), ("b.png", "no such image"), (".", "is a folder")):
        with pytest.raises(UserError, match=message):
            read_image(tmp_path / name)


@pytest.mark.skipif(not CASES.is_dir(), reason="no cases from bug reports on this machine")
def test_a_reported_picture_is_not_white():
    assert pixels(CASES / "images" / "g16.png").mean() == pytest.approx(128.5, abs=1)
