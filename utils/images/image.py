"""One way to open any image of tissue: size, micrometres per pixel, levels, a crop, a region at a scale.

    with open_image(Path("slide.svs")) as image:
        pixels = image.region(x, y, side=448, out_px=224)

The content of a file decides how it is read, not its name: the formats of scanners by openslide, TIFF by tifffile
and imagecodecs (only the tiles, strips or rows that are needed are decoded), JPEG, PNG, WebP, JPEG 2000 and BMP by
Pillow and imagecodecs (decoded whole). docs/images.md has the table. Pixels lie as they are stored: Orientation is not
followed. Transparent parts, what a slide leaves out, and what lies beyond the edge are white.

Letters: h, w a block's sides. Without another word, px are level-0 pixels.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image

from utils.images import flat, scanner, tiff
from utils.images.checks import ImageError, reading
from utils.images.units import plausible

FLAT = (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".jp2", ".j2k", ".jpx", ".jpf", ".webp", ".bmp")
TIFF = (".tif", ".tiff", ".btf", ".tf2", ".tf8", ".qptiff")
SCANNERS = (".svs", ".ndpi", ".mrxs", ".scn", ".bif", ".svslide", ".vms", ".vmu", ".dcm", ".czi")
REFUSED = (".jxl", ".avif", ".heic", ".gif")  # found in a folder, so that no other image is taken in its place
TO_CONVERT = (".vsi", ".isyntax", ".lif", ".nd2", ".zvi", ".oir", ".psd")  # refused too, unless another image is there
SUFFIXES: tuple[str, ...] = (*TIFF, *FLAT, *SCANNERS, *REFUSED, *TO_CONVERT)  # by which an image is found in a folder
ONLY_SCANNERS = (".mrxs", ".vms", ".vmu", ".dcm", ".czi", ".svslide")  # what they hold besides is no scan
AS_FINE = 1.01  # levels of odd sides are a little coarser than they are meant to be
BLOCK_PX = 1024  # of a level, read at a time for the thumbnail
FILTER_REACH = 3  # pixels of the coarser side that the bicubic filter takes in, and one to spare
WHITE = 255


class Level(Protocol):
    """One level of the pyramid."""

    @property
    def width(self) -> int: ...

    @property
    def height(self) -> int: ...

    def crop(self, left: int, top: int, right: int, bottom: int) -> np.ndarray:
        """(h, w, 3) uint8 between these edges, all on the level."""
        ...


class Source(Protocol):
    """A file by its head: flat.FlatImage, tiff.TiffImage or scanner.ScannerImage."""

    width: int
    height: int
    um_per_px: float | None
    notes: tuple[str, ...]

    def load(self, huge: bool) -> tuple[list[Any], tuple[str, ...]]: ...

    def close(self) -> None: ...


class TissueImage:
    """An image of any size, level by level; closes its file as a context manager or by `close`.

    Attributes
    ----------
    path : Path
    width, height : int, level-0 pixels
    um_per_px : float or None, micrometres per level-0 pixel: as given, else of the file
    metadata_um_per_px : float or None, what the file states, where that is plausible
    levels : list of Level, finest first
    notes : tuple of str, what a script prints once about how the file is read
    """

    def __init__(self, path: Path, source: Source, huge: bool = False):
        self.levels: Sequence[Level]
        self.levels, notes = source.load(huge)
        self.path, self._source = path, source
        self.width, self.height = source.width, source.height
        self.metadata_um_per_px = self.um_per_px = _plausible(source.um_per_px)
        self.notes = (*source.notes, *notes)

    def __enter__(self) -> TissueImage:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._source.close()

    def level_for(self, px_per_pixel: float) -> Level:
        """The coarsest level that is still as fine as asked: at most so many level-0 pixels per pixel."""
        fine = [level for level in self.levels if self.width / level.width <= px_per_pixel * AS_FINE]
        return min(fine, key=lambda level: level.width, default=self.levels[0])

    def crop(self, left: int, top: int, right: int, bottom: int) -> np.ndarray:
        """(h, w, 3) uint8 of level 0 between these edges, in whole pixels; white outside."""
        return _crop(self.levels[0], left, top, right, bottom)

    def region(self, x: float, y: float, side: float, out_px: int) -> np.ndarray:
        """The square with its upper left corner at (x, y) and sides of `side` px: (out_px, out_px, 3) uint8.

        Resampled (bicubic, antialiased) from the coarsest level that is still as fine as asked; white outside. Raises
        ValueError where the file is damaged.
        """
        level = self.level_for(side / out_px)
        px = self.width / level.width, self.height / level.height
        side_px = side / math.sqrt(px[0] * px[1])
        left, top = ((a + side / 2) / p - side_px / 2 for a, p in zip((x, y), px, strict=True))
        margin = FILTER_REACH * max(side_px / out_px, 1)  # so that the pixels at the edge are right, too
        corner = math.floor(left - margin), math.floor(top - margin)
        end = math.ceil(left + side_px + margin), math.ceil(top + side_px + margin)
        box = (left - corner[0], top - corner[1], left - corner[0] + side_px, top - corner[1] + side_px)
        pixels = Image.fromarray(_crop(level, *corner, *end))
        return np.asarray(pixels.resize((out_px, out_px), Image.Resampling.BICUBIC, box=box))

    def thumbnail(self, longest: int = 2000) -> tuple[np.ndarray, float]:
        """The whole image, at most `longest` pixels long: (h, w, 3) uint8, and its pixels per level-0 pixel.

        Put together from blocks, so that an image of one level never lies in memory as a whole.
        """
        scale = min(1.0, longest / max(self.width, self.height))
        level = self.level_for(1 / scale)
        width, height = (max(1, round(side * scale)) for side in (self.width, self.height))
        block = min(max(width, height), max(1, round(BLOCK_PX * scale * self.width / level.width)))
        corners = [(left, top) for top in range(0, height, block) for left in range(0, width, block)]
        out = np.empty((height, width, 3), np.uint8)

        def read(corner: tuple[int, int]) -> None:
            left, top = corner
            place = out[top : top + block, left : left + block]
            pixels = self.region(left / scale, top / scale, block / scale, block)
            place[:] = pixels[: place.shape[0], : place.shape[1]]

        with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
            list(pool.map(read, corners))  # raises what a thread raised
        return out, scale


def _crop(level: Level, left: int, top: int, right: int, bottom: int) -> np.ndarray:
    """A crop of a level that may reach beyond it, where it is white."""
    if left >= 0 and top >= 0 and right <= level.width and bottom <= level.height:
        return level.crop(left, top, right, bottom)
    out = np.full((bottom - top, right - left, 3), WHITE, np.uint8)
    inside = max(left, 0), max(top, 0), min(right, level.width), min(bottom, level.height)
    if inside[0] < inside[2] and inside[1] < inside[3]:
        out[inside[1] - top : inside[3] - top, inside[0] - left : inside[2] - left] = level.crop(*inside)
    return out


def open_image(path: Path, um_per_px: float | None = None, huge: bool = False) -> TissueImage:
    """Open an image of tissue.

    Parameters
    ----------
    um_per_px : micrometres per level-0 pixel, before what the file states (`metadata_um_per_px`)
    huge : allow images that are decoded whole to be of more than checks.BOMB_PX pixels

    Raises
    ------
    ValueError in one line: no file, an unknown or damaged one, or one whose pixels cannot be read as they are meant.
    """
    path = Path(path)
    source = _source(path)
    try:
        image = TissueImage(path, source, huge)
    except BaseException:
        source.close()
        raise
    image.um_per_px = image.metadata_um_per_px if um_per_px is None else um_per_px
    return image


def image_size(path: Path) -> tuple[int, int]:
    """Width and height of the image that open_image opens, from the head of the file. Raises ValueError as it does."""
    with closing(_source(Path(path))) as source:
        return source.width, source.height


def stated_um_per_px(path: Path) -> float | None:
    """Micrometres per pixel as the file states them; None where it does not, not plausibly, or cannot be read.

    TIFF and scanners' files: OME-XML, ImageJ's unit, the scanner's properties, resolution tags of the image that is the
    scan; others: dots per inch above 1,000.
    """
    with suppress(ValueError), closing(_source(Path(path))) as source:
        return _plausible(source.um_per_px)
    return None


def _plausible(um_per_px: float | None) -> float | None:
    return um_per_px if plausible(um_per_px) else None


def images_in(folder: Path) -> list[Path]:
    """The files of images that lie directly in a folder, by name; hidden ones aside, none where there is no folder.

    A link to nothing is listed, so that whoever opens it names it. A file of TO_CONVERT is listed only if there is no
    other image: that may be what it was converted to.
    """
    files = sorted(folder.iterdir()) if folder.is_dir() else []
    images = [path for path in files if path.suffix.lower() in SUFFIXES and path.name[0] != "." and not path.is_dir()]
    return [path for path in images if path.suffix.lower() not in TO_CONVERT] or images


# ---- which reader


def _source(path: Path) -> Source:
    """The file by its head."""
    source = _reader(path)
    if source.width < 1 or source.height < 1:
        source.close()
        raise ImageError(f"{path}: expected an image, found {source.width} x {source.height} pixels; copy it anew")
    return source


def _reader(path: Path) -> Source:
    """The reader of a file, by its content."""
    if not path.is_file():
        raise ImageError(
            f"{path}: expected an image, found {'a folder' if path.is_dir() else 'no such file'}; correct the path"
        )
    with reading(path), path.open("rb") as file:
        head = file.read(512)
    is_tiff, suffix = head.startswith(tiff.MAGIC), path.suffix.lower()
    if (is_tiff or suffix in SCANNERS or not flat.is_flat(head)) and scanner.vendor(path):
        return scanner.ScannerImage(path)
    if is_tiff:
        return tiff.TiffImage(path)
    if flat.is_flat(head) and suffix not in ONLY_SCANNERS:
        return flat.FlatImage(path)
    if suffix in SCANNERS and not scanner.is_installed():
        raise ImageError(f"{path}: {scanner.NEEDED}")
    raise ImageError(f"{path}: expected an image ({_known()}), found {_kind_of(path, head)}")


def _known() -> str:
    return "TIFF, JPEG, PNG, WebP, JPEG 2000, or a scanner's " + " ".join(suffix[1:] for suffix in SCANNERS)


def _kind_of(path: Path, head: bytes) -> str:
    """What a file is that no reader takes, and what to do about it."""
    if not head:
        return "an empty file; copy it anew"
    if head.startswith(b"version https://git-lfs"):
        return "a pointer of Git LFS; fetch the file by `git lfs pull`"
    text = head.decode("utf-8", "ignore").lstrip("\ufeff \r\n\t")
    if text.startswith("<"):
        return "a page of HTML or XML, perhaps an error of the download; download it anew"
    if all(char.isprintable() or char.isspace() for char in text) and b"\0" not in head:
        return "text; copy the image anew"
    if path.suffix.lower() == ".mrxs":
        return f"an index without its folder {path.stem}; put the folder beside it"
    return "another format; convert it to a tiled RGB TIFF"
