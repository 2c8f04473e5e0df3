"""Whole slides in the formats of scanners, through openslide.

Aperio svs, Hamamatsu ndpi vms vmu, Mirax mrxs, Leica scn, Ventana bif, Philips tiff, Sakura svslide, Trestle,
Zeiss czi, DICOM
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np

from utils.images.checks import reading
from utils.images.samples import on_white

CACHE_BYTES = 128 * 2**20  # decoded tiles of a row, which the next tiles of the row and the row below share
NOT_OURS = (None, "generic-tiff", "synthetic")  # what openslide calls files that are read otherwise
NEEDED = "expected openslide, which reads whole-slide files, found none; pip install openslide-python openslide-bin"


def vendor(path: Path) -> str | None:
    """The scanner's format by openslide; None where it is none, or where openslide is not installed."""
    try:
        import openslide
    except ImportError:
        return None
    with reading(path):
        found = openslide.OpenSlide.detect_format(path)
    return None if found in NOT_OURS else found


def is_installed() -> bool:
    try:
        import openslide  # noqa: F401
    except ImportError:
        return False
    return True


class ScannerLevel:
    """A level of an openslide file, which reads from several threads at once; what was not scanned is white."""

    def __init__(self, slide: Any, number: int, path: Path):
        self.width, self.height = slide.level_dimensions[number]
        self._slide, self._number, self._path = slide, number, path
        self._px = slide.dimensions[0] / self.width, slide.dimensions[1] / self.height

    def crop(self, left: int, top: int, right: int, bottom: int) -> np.ndarray:
        corner = round(left * self._px[0]), round(top * self._px[1])
        with reading(self._path):
            rgba = np.asarray(self._slide.read_region(corner, self._number, (right - left, bottom - top)))
        if rgba[..., 3].min() == 255:
            return np.ascontiguousarray(rgba[..., :3])
        return on_white(rgba[..., :3], rgba[..., 3:], premultiplied=False)


class ScannerImage:
    """A slide that openslide reads, with the attributes of flat.FlatImage."""

    def __init__(self, path: Path):
        with reading(path):
            import openslide

            slide = openslide.OpenSlide(path)
            slide.set_cache(openslide.OpenSlideCache(CACHE_BYTES))
        self.path, self._slide = path, slide
        self.notes: tuple[str, ...] = ()
        self.width, self.height = slide.dimensions
        sides_um = [float(slide.properties.get(f"openslide.mpp-{axis}") or 0) for axis in "xy"]
        self.um_per_px = math.sqrt(sides_um[0] * sides_um[1]) if min(sides_um) > 0 else None

    def load(self, huge: bool) -> tuple[list[Any], tuple[str, ...]]:
        """All levels; the last pixel of each is read, which shows whether the file is whole."""
        levels = [ScannerLevel(self._slide, number, self.path) for number in range(self._slide.level_count)]
        for level in levels:
            level.crop(level.width - 1, level.height - 1, level.width, level.height)
        return list(levels), ()

    def close(self) -> None:
        self._slide.close()
