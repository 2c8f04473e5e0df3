"""Ways in which a slide can be unlike those of training, for domain.py: they change the pixels of an image, at its own
resolution, before tiles are cut.

Shapes: h, w pixels; S spots.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from utils.images import tissue
from utils.images.image import TissueImage, open_image

BLUR_UM, JPEG_QUALITY, HUE = 3.0, 10, 25 / 256  # deviation; -; of a turn
PEN_UM, STROKES = 120.0, 3
INKS = ((35, 60, 175), (30, 140, 80), (28, 26, 30))
AFFECTED = 0.1  # fraction of a tile that ink must cover
GLASS_TISSUE = 0.02  # of a tile, at most, that is called glass


class Pixels:
    """An image in memory as the file and the only level that TissueImage reads."""

    um_per_px: float | None = None
    notes: tuple[str, ...] = ()

    def __init__(self, pixels: np.ndarray):
        self.pixels, (self.height, self.width) = pixels, pixels.shape[:2]

    def load(self, huge: bool) -> tuple[list[Any], tuple[str, ...]]:
        return [self], ()

    def crop(self, left: int, top: int, right: int, bottom: int) -> np.ndarray:
        return self.pixels[top:bottom, left:right]

    def close(self) -> None:
        """Nothing to close."""


def in_memory(pixels: np.ndarray) -> TissueImage:
    return TissueImage(Path("memory"), Pixels(pixels))


@lru_cache(maxsize=1)
def read(path: Path) -> np.ndarray:
    """All pixels (h, w, 3) uint8 of level 0."""
    with open_image(path) as image:
        return image.crop(0, 0, image.width, image.height)


def region(pixels: np.ndarray, xy_px: np.ndarray, margin_px: float) -> tuple[np.ndarray, np.ndarray]:
    """Spots (S, 2) in the rectangle that holds them with a margin, and its pixels; wide enough for tiles of twice the
    side where the margin is a side."""
    low = np.maximum(np.floor(xy_px.min(0) - margin_px), 0).astype(int)
    high = np.ceil(xy_px.max(0) + margin_px).astype(int)
    return xy_px - low, pixels[low[1] : high[1], low[0] : high[0]]


def by_pillow(function: Callable[[Image.Image], Image.Image]) -> Callable[..., np.ndarray]:
    return lambda pixels, um_per_px, rng: np.asarray(function(Image.fromarray(pixels)).convert("RGB"))


def blur(pixels: np.ndarray, um_per_px: float, rng: np.random.Generator) -> np.ndarray:
    return np.asarray(Image.fromarray(pixels).filter(ImageFilter.GaussianBlur(BLUR_UM / um_per_px)))


def jpeg(image: Image.Image) -> Image.Image:
    file = io.BytesIO()
    image.save(file, "JPEG", quality=JPEG_QUALITY)
    return Image.open(file)


def shift_hue(image: Image.Image) -> Image.Image:
    hue, saturation, value = image.convert("HSV").split()
    turned = hue.point(lambda h: (h + round(256 * HUE)) % 256)
    return Image.merge("HSV", (turned, saturation, value))


def coarse(pixels: np.ndarray, um_per_px: float, rng: np.random.Generator) -> np.ndarray:
    """A scan of 4 um per pixel, enlarged."""
    image = Image.fromarray(pixels)
    small = [max(1, round(side * um_per_px / 4)) for side in image.size]
    return np.asarray(image.resize(small, Image.Resampling.BOX).resize(image.size, Image.Resampling.BICUBIC))


def cast(pixels: np.ndarray, um_per_px: float, rng: np.random.Generator) -> np.ndarray:
    """Warm white balance: red 10 % up, blue 20 % down."""
    return np.clip(pixels * np.array([1.1, 1.0, 0.8]), 0, 255).astype(np.uint8)


def faint(pixels: np.ndarray, um_per_px: float, rng: np.random.Generator) -> np.ndarray:
    """Half of the stain: half of the optical density."""
    return (np.sqrt(pixels / 255) * 255).astype(np.uint8)


def noise(pixels: np.ndarray, um_per_px: float, rng: np.random.Generator) -> np.ndarray:
    return rng.integers(0, 256, pixels.shape, dtype=np.uint8)


def pen(pixels: np.ndarray, um_per_px: float, rng: np.random.Generator) -> np.ndarray:
    """Strokes of blue, green and black ink across the image."""
    image = Image.fromarray(pixels)
    drawing, sides = ImageDraw.Draw(image), np.array(image.size)
    for i in range(STROKES):
        ends = rng.uniform(0, 1, (4, 2)) * sides
        drawing.line([tuple(end) for end in ends.tolist()], INKS[i % len(INKS)], round(PEN_UM / um_per_px), "curve")
    return np.asarray(image)


KINDS: dict[str, Callable[..., np.ndarray]] = {
    "swap": lambda pixels, um_per_px, rng: pixels[..., [1, 0, 2]],
    "bgr": lambda pixels, um_per_px, rng: pixels[..., ::-1],
    "grey": by_pillow(lambda image: image.convert("L")),
    "blur": blur,
    "jpeg": by_pillow(jpeg),
    "hue": by_pillow(shift_hue),
    "noise": noise,
    "pen": pen,
    "coarse": coarse,
    "cast": cast,
    "faint": faint,
}
SCALES = {"x2": 2.0, "x0.5": 0.5}  # side of the tiles, by a scale that is wrong by so much
LOCAL = ("pen",)
LABELS = {
    "clean slice": "held-out slice",
    "clean": "crop of a held-out slice",
    "swap": "red and green swapped",
    "bgr": "red and blue swapped",
    "blur": f"blur of {BLUR_UM:g} um",
    "jpeg": f"JPEG at quality {JPEG_QUALITY}",
    "hue": f"hue shifted by {360 * HUE:.0f} degrees",
    "noise": "white noise",
    "pen": "spots under pen marks",
    "glass": "spots on glass",
    "x2": "scale x 2",
    "x0.5": "scale x 0.5",
    "coarse": "a scan of 4 um per px, enlarged *",
    "cast": "warm white balance *",
    "faint": "half of the stain *",
}


def changed(before: np.ndarray, after: np.ndarray, xy_px: np.ndarray, side_px: float) -> np.ndarray:
    """Fraction (S,) of each tile whose pixels differ."""
    return tissue.tissue_fraction(xy_px, (before != after).any(2), 1.0, side_px)


def glass_spots(pixels: np.ndarray, side_px: float) -> np.ndarray:
    """Centres (S, 2) on a grid where a tile is glass, those nearest to the tissue first."""
    with in_memory(pixels) as image:
        thumbnail, scale = image.thumbnail()
    mask = tissue.tissue_mask(thumbnail)
    centres, _ = tissue.grid(pixels.shape[1], pixels.shape[0], side_px, "square")
    bare = tissue.tissue_fraction(centres, mask, scale, side_px) <= GLASS_TISSUE
    near = tissue.tissue_fraction(centres, mask, scale, 5 * side_px)
    return centres[bare][np.argsort(-near[bare], kind="stable")]
