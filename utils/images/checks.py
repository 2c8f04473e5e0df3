"""What every reader of images shares: one line for what cannot be read, and the limit of what is decoded whole."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from PIL import Image, PngImagePlugin

from utils.words import cut

BOMB_PX = 2**29  # decoded as a whole, 2 GiB in Pillow
PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY  # 64 MiB: profiles and XMP are larger than 1 MiB
Image.MAX_IMAGE_PIXELS = None  # Pillow's own limit is below many full-resolution scans; check_size replaces it


class ImageError(ValueError):
    """An image that is refused: one line with its file, what was expected, what was found, and how to fix it."""


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turn whatever a library raises on a damaged file into one line."""
    try:
        yield
    except ImageError:
        raise
    except Exception as error:  # tifffile, imagecodecs, Pillow and openslide raise what they like
        text = " ".join(str(error).split()) or type(error).__name__
        if "imagecodecs" in text and "requires" in text:
            raise ImageError(
                f"{path}: expected a compression that the installed imagecodecs knows, found another ({text}); pip "
                "install --upgrade imagecodecs, or convert it to LZW"
            ) from error
        raise ImageError(
            f"{path}: expected an image, found one that cannot be read ({cut(text)}); copy it anew, or convert it to "
            "8-bit RGB"
        ) from error


def check_size(path: Path, width: int, height: int, huge: bool) -> None:
    """Raises ImageError for what would be decoded whole and is larger than any image of a slice should be."""
    if width * height > BOMB_PX and not huge:
        raise ImageError(
            f"{path}: expected at most {BOMB_PX:,} pixels to decode at once, found {width:,} x {height:,}; "
            f"convert it to a tiled pyramidal TIFF, or allow it with --huge ({width * height * 4 / 2**30:.0f} GiB)"
        )
