"""Images of a source: files opened by utils.images, and arrays of other libraries as 8-bit RGB.

Shapes: h, w pixels of an image.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from utils.images import image as image_files
from utils.images.image import SUFFIXES, open_image
from utils.images.samples import Samples, smallest_depth

LARGEST_PX = 2**27  # of an image that is decoded whole, 400 MB
# Resampling and compression leave values a little beyond the ends of the scale.
UNIT_RANGE, BYTE_RANGE = (-0.1, 1.1), (-26.0, 281.0)
DARKEST_WHITE = 32.0  # of 255: an H&E image has bright glass, so a smaller maximum belongs to another scale


def image_size(image: Path | np.ndarray) -> tuple[int, int]:
    """Width and height in pixels, of a file or of pixels (h, w, 3)."""
    if isinstance(image, Path):
        return image_files.image_size(image)
    return image.shape[1], image.shape[0]


def reduced_image(image: Path | np.ndarray, longest: int) -> Image.Image:
    """The image; of one too large to decode whole, an image of at most `longest` px."""
    if isinstance(image, np.ndarray):
        return Image.fromarray(image)
    with open_image(image, huge=True) as opened:
        if opened.width * opened.height <= LARGEST_PX:
            return Image.fromarray(opened.crop(0, 0, opened.width, opened.height))
        return Image.fromarray(opened.thumbnail(longest)[0])


@dataclass(frozen=True)
class Thumbnail:
    """An image made small.

    Attributes
    ----------
    pixels : ndarray (h, w, 3) uint8
    scale : float, its pixels per pixel of the image
    notes : tuple of str, on how the image is read
    """

    pixels: np.ndarray
    scale: float
    notes: tuple[str, ...] = ()


def make_thumbnail(image: Path | np.ndarray, longest: int) -> Thumbnail:
    """An image, of a file or of pixels, at most `longest` px long."""
    if isinstance(image, Path):
        with open_image(image, huge=True) as opened:
            return Thumbnail(*opened.thumbnail(longest), opened.notes)
    width, height = image_size(image)
    scale = min(1.0, longest / max(width, height))
    size = max(1, round(width * scale)), max(1, round(height * scale))
    return Thumbnail(np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BOX)), scale)


def check_image(image: Path | None) -> Path | None:
    """The file of --image. Raises ValueError where there is none, or one of a kind that no script reads."""
    if image is not None and (not image.is_file() or image.suffix.lower() not in SUFFIXES):
        found = f"a file {image.suffix or 'without suffix'}" if image.is_file() else "no such file"
        raise ValueError(f"--image {image}: expected an image ({', '.join(SUFFIXES)}), found {found}; give another")
    return image


def only_image(where: Path, images: list[Path], given: Path | None, name: str) -> Path:
    """--image where it is given, else the one image that was found."""
    if given is not None:
        return given
    if len(images) != 1:
        found = ", ".join(path.name for path in sorted(images)) or "none"
        raise ValueError(f"{where}: expected one H&E image of {name}, found {found}; name it with --image")
    return images[0]


def to_rgb(where: str, pixels: np.ndarray) -> tuple[np.ndarray, str | None]:
    """Pixels of any layout and depth as RGB (h, w, 3) uint8, and a note where their depth was measured.

    Parameters
    ----------
    where : what messages name
    pixels : ndarray (h, w), (h, w, C) or (C, h, w), C being 1 (grey), 2 (with alpha), 3 (RGB) or 4 (RGBA); numbers of
        0..1 or 0..255 in floating point, 8 bits, or 10 to 16 bits

    Raises
    ------
    ValueError for another number of channels, NaN, negative numbers, or an unknown scale.
    """
    values = _channels_last(where, np.asarray(pixels))
    n_channels = values.shape[2]
    n_colours = 1 if n_channels < 3 else 3
    values = _stored(where, values, n_colours)
    alpha = n_channels - 1 if n_channels in (2, 4) and values[..., -1].any() else None
    parts = values[..., :n_colours], values[..., n_colours:]
    depth, alpha_depth = (smallest_depth(int(part.max(initial=0))) for part in parts)
    kind, colours = ("grey", (0,)) if n_colours == 1 else ("rgb", (0, 1, 2))
    samples = Samples(kind, colours, alpha, bits=8 * values.itemsize, depth=depth, alpha_depth=alpha_depth)
    notes = ["grey, without the colours of the stain"] if n_colours == 1 else []
    notes += [f"read as {depth} bits (largest value {values[..., :n_colours].max():,})"] if depth > 8 else []
    return np.ascontiguousarray(samples.to_rgb(values)), ", ".join(notes) or None


def _channels_last(where: str, pixels: np.ndarray) -> np.ndarray:
    """Pixels as (h, w, C)."""
    if pixels.dtype.kind not in "iuf" or pixels.ndim not in (2, 3) or not pixels.size:
        found = f"an array of shape {pixels.shape} and type {pixels.dtype}"
        raise ValueError(f"{where}: expected an image (height, width, 3), found {found}; give the image with --image")
    if pixels.ndim == 2:
        return pixels[..., None]
    if pixels.shape[2] <= 4:
        return pixels
    if pixels.shape[0] <= 4:
        return np.moveaxis(pixels, 0, -1)
    raise ValueError(
        f"{where}: expected an image of 1, 3 or 4 channels, found the shape {pixels.shape}; give the H&E with --image"
    )


def _stored(where: str, pixels: np.ndarray, n_colours: int) -> np.ndarray:
    """Numbers (h, w, C) of any scale as uint8, or as uint16 where they are larger."""
    low, high = float(pixels.min()), float(pixels[..., :n_colours].max())
    of_floats = pixels.dtype.kind == "f"
    if of_floats and UNIT_RANGE[0] <= low and 0 < high <= UNIT_RANGE[1]:
        return np.rint(np.clip(pixels, 0, 1) * np.float32(255)).astype(np.uint8)
    least = BYTE_RANGE[0] if of_floats else 0
    if not (least <= low and DARKEST_WHITE <= high < 2**16 and pixels.max() < 2**16):  # NaN fails every comparison
        found = f"numbers from {low:.4g} to {high:.4g} ({pixels.dtype})"
        raise ValueError(
            f"{where}: expected an image with numbers of 0..1, 0..255 or up to 16 bits, found {found}; use --image"
        )
    if of_floats:
        pixels = np.rint(np.clip(pixels, 0, 255 if pixels.max() <= BYTE_RANGE[1] else None))
    return pixels.astype(np.uint8 if pixels.max() < 2**8 else np.uint16, copy=False)
