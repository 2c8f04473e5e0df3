"""Arrays of other libraries as RGB: every layout and depth gives the same pixels, or is refused by name."""

import numpy as np
import pytest
from importer_sources import image_of, write_tiff
from PIL import Image
from spaceranger_folders import refused

from utils.images.image import stated_um_per_px
from utils.importers import images


@pytest.fixture
def pixels(rng):
    """An image with glass, tissue and the extremes of the scale."""
    found = rng.integers(0, 256, (20, 30, 3), dtype=np.uint8)
    found[0, 0], found[0, 1] = 0, 255
    return found


LAYOUTS = {
    "8 bits": lambda p: p,
    "of a wider type": lambda p: p.astype(np.int64),
    "floats of 0..255": lambda p: p.astype(np.float32),
    "floats of 0..1": lambda p: (p / 255).astype(np.float32),
    "double of 0..1": lambda p: p / 255,
    "channels first": lambda p: np.moveaxis(p, -1, 0),
    "channels first, floats": lambda p: np.moveaxis(p / 255, -1, 0),
    "16 bits": lambda p: p.astype(np.uint16) * 257,
    "12 bits": lambda p: p.astype(np.uint16) * 16,
    "10 bits": lambda p: p.astype(np.uint16) * 4,
    "floats of 16 bits": lambda p: p * 257.0,
    "8 bits in 16": lambda p: p.astype(np.uint16),
    "RGBA, opaque": lambda p: np.dstack([p, np.full(p.shape[:2], 255, np.uint8)]),
    "RGBA, floats": lambda p: np.dstack([p / 255, np.ones(p.shape[:2])]),
    "RGBA, 12 bits": lambda p: np.dstack([p.astype(np.uint16) * 16, np.full(p.shape[:2], 4095, np.uint16)]),
    "a fourth channel of zeros": lambda p: np.dstack([p, np.zeros(p.shape[:2], np.uint8)]),
    "read-only": lambda p: np.broadcast_to(p, p.shape),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_the_same_pixels(pixels, layout):
    found, note = images.to_rgb("x", LAYOUTS[layout](pixels))
    np.testing.assert_array_equal(found, pixels)
    assert found.dtype == np.uint8 and found.flags.c_contiguous
    depth = next((bits for bits in ("10", "12", "16") if f"{bits} bits" in layout), None)
    assert note == (depth and f"read as {depth} bits (largest value {255 * {'10': 4, '12': 16, '16': 257}[depth]:,})")


def test_transparent_parts_are_white(pixels):
    alpha = np.full((20, 30), 255, np.uint8)
    alpha[:5], alpha[5] = 0, 128
    found, _ = images.to_rgb("x", np.dstack([pixels, alpha]))
    assert (found[:5] == 255).all()
    np.testing.assert_array_equal(found[6:], pixels[6:])
    np.testing.assert_allclose(found[5], pixels[5] * (128 / 255) + 127, atol=1)


def test_grey_is_said_to_be_grey(pixels):
    for grey in (pixels[..., 0], pixels[..., :1], np.dstack([pixels[..., 0], np.full((20, 30), 255, np.uint8)])):
        found, note = images.to_rgb("x", grey)
        np.testing.assert_array_equal(found, np.repeat(pixels[..., :1], 3, axis=2))
        assert note == "grey, without the colours of the stain"


def test_a_little_beyond_the_scale_is_clipped(pixels):
    found, _ = images.to_rgb("x", np.where(pixels == 255, 1.03, np.where(pixels == 0, -0.02, pixels / 255)))
    np.testing.assert_array_equal(found, pixels)
    found, _ = images.to_rgb("x", np.where(pixels == 255, 262.0, np.where(pixels == 0, -9.0, pixels)))
    np.testing.assert_array_equal(found, pixels)


@pytest.mark.parametrize(
    ("spoil", "match"),
    [
        (lambda p: np.dstack([p, p]), r"1, 3 or 4 channels, found the shape \(20, 30, 6\)"),
        (lambda p: np.where(p == 255, np.nan, p), "numbers from nan"),
        (lambda p: (p / 255).astype(np.uint8), "numbers from 0 to 1"),  # 0..1 that lost its fractions
        (lambda p: p / 127.5 - 1, "numbers from -1 to 1"),
        (lambda p: (p - 180.0) / 40, "numbers from -4.5 to 1.875"),
        (lambda p: p.astype(np.int64) - 5, "numbers from -5"),
        (lambda p: p.astype(np.int64) * 1000, "to 2.55e[+]05"),
        (lambda p: p[None], "expected an image"),
        (lambda p: p.astype(str), "expected an image"),
        (lambda p: p > 9, "expected an image"),
        (lambda p: p[:0], "expected an image"),
    ],
)
def test_what_is_no_image_is_refused(pixels, spoil, match):
    refused(f"a.h5ad: .*{match}", images.to_rgb, "a.h5ad", spoil(pixels))


def test_a_thumbnail_of_a_file_and_of_its_pixels(rng, tmp_path):
    blocks = np.kron(rng.integers(0, 256, (6, 9, 3), dtype=np.uint8), np.ones((50, 50, 1), np.uint8))
    Image.fromarray(blocks).save(tmp_path / "a.png")
    for image in (tmp_path / "a.png", blocks):
        assert images.image_size(image) == (450, 300)
        found = images.make_thumbnail(image, 45)
        assert found.pixels.shape == (30, 45, 3) and found.scale == 0.1
        np.testing.assert_array_equal(found.pixels[2::5, 2::5], blocks[25::50, 25::50])


def test_stated_sizes_of_images(simulated, tmp_path):
    image = image_of(simulated / "P01_1")
    assert stated_um_per_px(write_tiff(tmp_path / "a.tif", image, 0.5)) == pytest.approx(0.5, rel=1e-3)
    blank = Image.new("RGB", (32, 32))
    for name, dpi, um in (("b.jpg", 72, None), ("c.jpg", 25400, 1.0), ("d.png", 50800, 0.5), ("e.png", 300, None)):
        blank.save(tmp_path / name, dpi=(dpi, dpi))
        assert stated_um_per_px(tmp_path / name) == (um and pytest.approx(um, rel=1e-3))
    blank.save(tmp_path / "f.tif", dpi=(72, 72))
    blank.save(tmp_path / "g.tif")
    assert stated_um_per_px(tmp_path / "f.tif") is None and stated_um_per_px(tmp_path / "g.tif") is None
    import tifffile

    ome = {"axes": "YXS", "PhysicalSizeX": 0.25, "PhysicalSizeY": 0.25, "PhysicalSizeXUnit": "µm"}
    tifffile.imwrite(tmp_path / "h.ome.tif", np.zeros((32, 32, 3), np.uint8), photometric="rgb", metadata=ome)
    assert stated_um_per_px(tmp_path / "h.ome.tif") == pytest.approx(0.25)
