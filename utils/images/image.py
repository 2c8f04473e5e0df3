"""Whole slides: any part of a picture at any scale, and its tiles streamed ahead of whoever uses them.

    with open_slide(Path("slide.svs")) as slide:
        for batch in stream_tiles(slide, centres_px, crop_px=448, tile_px=224, batch_size=64):
            ...

openslide reads svs, ndpi, mrxs and the other scanners' files and tiled TIFF; tifffile OME-TIFF and plain TIFF, of which
only the tiles or strips that are needed are decoded; Pillow jpg and png, which are decoded whole. Pixels lie as they
are stored: as in tiling, a jpg's EXIF rotation is ignored. Transparent parts and what lies beyond the edge are white.

Letters: S centres, B batch, Z tile side in pixels, h, w a block's sides. Without another word, px are level-0 pixels.
"""

from __future__ import annotations

import math
import os
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image

from utils.images import tiles

FLAT, TIFF = (".jpg", ".jpeg", ".png"), (".tif", ".tiff")
SCANS = (".svs", ".ndpi", ".mrxs", ".scn", ".bif", ".svslide", ".vms", ".vmu", ".dcm", ".czi")  # openslide's
PLAUSIBLE_UM_PER_PX = (0.02, 20.0)  # beyond it, a resolution is a screen's or a printer's
SUFFIXES = (".tif", ".tiff", ".btf", ".jpg", ".jpeg", ".png", ".svs", ".ndpi")
AS_FINE = 1.01  # levels of odd sides are a little coarser than they are meant to be
CACHE_BYTES = 128 * 2**20  # decoded tiles of a row, which the next tiles of the row and the row below share
BLOCK_PX = 1024  # of a level, read at a time for the thumbnail


class Level(Protocol):
    """One level of the pyramid; a Pillow picture is one, too."""

    @property
    def width(self) -> int: ...

    @property
    def height(self) -> int: ...

    def crop(self, box: Any, /) -> Image.Image:
        """RGB between left, top, right, bottom, all on the level."""
        ...


class OpenSlideLevel:
    """A level of an openslide file; openslide reads from several threads at once."""

    def __init__(self, slide: Any, number: int, path: Path):
        self.width, self.height = slide.level_dimensions[number]
        self._slide, self._number, self._path = slide, number, path
        self._px = slide.dimensions[0] / self.width, slide.dimensions[1] / self.height

    def crop(self, box: tuple[int, int, int, int], /) -> Image.Image:
        import openslide

        size = box[2] - box[0], box[3] - box[1]
        corner = round(box[0] * self._px[0]), round(box[1] * self._px[1])
        with tiles.readable(self._path):
            try:
                picture = self._slide.read_region(corner, self._number, size)
            except openslide.OpenSlideError as error:
                raise OSError(str(error)) from error
        if picture.getchannel("A").getextrema()[0] == 255:
            return picture.convert("RGB")
        return Image.alpha_composite(Image.new("RGBA", size, (*tiles.WHITE, 255)), picture).convert("RGB")


class Slide:
    """A picture of any size, level by level; closes its file as a context manager or by `close`.

    Attributes
    ----------
    path : Path
    width, height : int, level-0 pixels
    um_per_px : float or None, micrometres per level-0 pixel: as given, else of the metadata
    metadata_um_per_px : float or None, what the file says of itself, where that is plausible
    levels : list of Level, finest first
    """

    def __init__(
        self,
        path: Path,
        levels: list[Level],
        metadata_um_per_px: float | None = None,
        close: Callable[[], None] = lambda: None,
    ):
        low, high = PLAUSIBLE_UM_PER_PX
        self.path, self.levels, self._close = path, levels, close
        self.width, self.height = levels[0].width, levels[0].height
        known = metadata_um_per_px is not None and low <= metadata_um_per_px <= high
        self.metadata_um_per_px = metadata_um_per_px if known else None
        self.um_per_px = self.metadata_um_per_px
        self.notes: tuple[str, ...] = ()

    def __enter__(self) -> Slide:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._close()

    def level_for(self, px_per_pixel: float) -> Level:
        """The coarsest level that is still as fine as asked: at most so many level-0 pixels per pixel."""
        fine = [level for level in self.levels if self.width / level.width <= px_per_pixel * AS_FINE]
        return min(fine, key=lambda level: level.width, default=self.levels[0])

    def region(self, x: float, y: float, side: float, out_px: int) -> np.ndarray:
        """The square with its upper left corner at (x, y) and sides of `side` px: (out_px, out_px, 3) uint8.

        Cut by the function that cuts tiles for training, from the coarsest level that is still as fine as asked: the
        rest is an antialiased resize. Outside the slide it is white. Raises ValueError where the file is damaged.
        """
        level: Any = self.level_for(side / out_px)
        px = self.width / level.width, self.height / level.height
        centre = np.array([(x + side / 2) / px[0], (y + side / 2) / px[1]])
        cut = tiles.Cut("fullres", self.path.name, None, side / math.sqrt(px[0] * px[1]), out_px, True)
        return np.asarray(tiles.cut_tile(level, centre, cut))

    def thumbnail(self, longest: int = 2000) -> tuple[np.ndarray, float]:
        """The whole slide, at most `longest` pixels long: (h, w, 3) uint8, and its pixels per level-0 pixel.

        Put together from blocks, so that a slide of one level never lies in memory as a whole.
        """
        scale = min(1.0, longest / max(self.width, self.height))
        level = self.level_for(1 / scale)
        width, height = (max(1, round(side * scale)) for side in (self.width, self.height))
        block = min(max(width, height), max(1, round(BLOCK_PX * scale * self.width / level.width)))
        rows, cols = (np.arange(0, side, block) for side in (height, width))
        corners = np.stack(np.meshgrid(cols, rows), axis=-1).reshape(-1, 2)
        out = np.empty((height, width, 3), np.uint8)
        blocks = stream_tiles(self, (corners + block / 2) / scale, block / scale, block, batch_size=1)
        for (left, top), (found,) in zip(corners, blocks, strict=True):
            place = out[top : top + block, left : left + block]
            place[:] = found[: place.shape[0], : place.shape[1]]
        return out, scale


def open_slide(path: Path, um_per_px: float | None = None, huge: bool = False) -> Slide:
    """Open a picture of tissue.

    Parameters
    ----------
    um_per_px : micrometres per level-0 pixel, before what the file says of itself (`metadata_um_per_px`)
    huge : allow pictures that are decoded whole to be of more than tiles.BOMB_PX pixels

    Raises
    ------
    ValueError in one line: no file, an unknown or torn one, not 8 bits per channel, too large to be decoded whole.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path}: expected a slide, found {'a folder' if path.is_dir() else 'no such file'}")
    kind = path.suffix.lower()
    if kind not in (*FLAT, *TIFF, *SCANS):
        known = " ".join(suffix[1:] for suffix in (*SCANS, *TIFF, *FLAT))
        raise ValueError(f"{path}: expected a slide ({known}), found {kind or 'no suffix'}; convert it to a tiled TIFF")
    slide = _open_flat(path, huge) if kind in FLAT else _open_tiff(path, huge) if kind in TIFF else _open_scan(path)
    slide.um_per_px = slide.metadata_um_per_px if um_per_px is None else um_per_px
    return slide


def _open_flat(path: Path, huge: bool) -> Slide:
    tiles.check_size(path, *tiles.picture_size(path), huge)
    return Slide(path, [tiles.open_picture(path)])


def _open_tiff(path: Path, huge: bool) -> Slide:
    from utils.images import tiff

    if not tiff.check_file(path):
        try:
            import openslide
        except ImportError:  # tifffile reads these, too, as long as no scanner wrote them
            pass
        else:
            if openslide.OpenSlide.detect_format(path):
                return _open_scan(path)
    levels, um_per_px, close = tiff.open_levels(path, CACHE_BYTES)
    try:
        for level in levels:
            tiles.check_size(path, *level.decoded_at_once, huge)
    except ValueError:
        close()
        raise
    return Slide(path, list(levels), um_per_px, close)


def _open_scan(path: Path) -> Slide:
    """What openslide reads; the last pixel of each level is read, which tells a torn file."""
    with tiles.readable(path):
        slide = tiles.openslide_file(path)
    import openslide

    slide.set_cache(openslide.OpenSlideCache(CACHE_BYTES))
    levels: list[Level] = [OpenSlideLevel(slide, number, path) for number in range(slide.level_count)]
    try:
        for level in levels:
            level.crop((level.width - 1, level.height - 1, level.width, level.height))
    except ValueError:
        slide.close()
        raise
    sides_um = [slide.properties.get(f"openslide.mpp-{axis}") for axis in "xy"]
    um_per_px = math.sqrt(float(sides_um[0]) * float(sides_um[1])) if all(sides_um) else None
    return Slide(path, levels, um_per_px, slide.close)


def stream_tiles(
    slide: Slide,
    centres_px: np.ndarray,
    crop_px: float,
    tile_px: int,
    batch_size: int,
    workers: int | None = None,
) -> Iterator[np.ndarray]:
    """Tiles around `centres_px` (S, 2), x and y, in their order: batches (B, Z, Z, 3) uint8, the last one smaller.

    Squares of `crop_px` become tiles of `tile_px`. `workers` threads (up to four where None) read ahead of the consumer
    by a few batches: memory depends on the batch alone. A reader's error is raised where its batch is due.
    """
    centres_px = np.asarray(centres_px, float)
    if centres_px.ndim != 2 or centres_px.shape[1] != 2 or not np.isfinite(centres_px).all():
        raise ValueError(f"{slide.path}: expected finite centres (S, 2) in pixels, found {centres_px.shape}")
    workers = min(4, os.cpu_count() or 1) if workers is None else max(workers, 1)
    return _stream(slide, centres_px - crop_px / 2, crop_px, tile_px, batch_size, workers)


def _stream(
    slide: Slide, corners: np.ndarray, crop_px: float, tile_px: int, batch_size: int, workers: int
) -> Iterator[np.ndarray]:
    ahead = 1 + math.ceil(2 * workers / batch_size)  # batches under way while the consumer has one
    waiting: deque[tuple[np.ndarray, list[Future]]] = deque()
    pool = ThreadPoolExecutor(workers, thread_name_prefix="tiles")

    def read(out: np.ndarray, x: float, y: float) -> None:
        out[:] = slide.region(x, y, crop_px, tile_px)

    def begin(some: np.ndarray) -> None:
        batch = np.empty((len(some), tile_px, tile_px, 3), np.uint8)
        waiting.append((batch, [pool.submit(read, out, x, y) for out, (x, y) in zip(batch, some, strict=True)]))

    def finished() -> np.ndarray:
        batch, reading = waiting.popleft()
        for tile in reading:
            tile.result()
        return batch

    try:
        for start in range(0, len(corners), batch_size):
            begin(corners[start : start + batch_size])
            if len(waiting) > ahead:
                yield finished()
        while waiting:
            yield finished()
    finally:  # also where the consumer stops early
        pool.shutdown(cancel_futures=True)


TissueImage = Slide
open_image = open_slide
image_size = tiles.picture_size
