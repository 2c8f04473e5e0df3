"""Tiles: cut from the picture around each spot, kept as one JPEG per spot and packed into one HDF5 file per slice.

Letters: S spots, Z tile side in pixels. Two rules of cutting: a physical square of `tile_um`, resampled to `tile_px`
(micrometres per pixel from the spot pitch), or the published crop of whole pixels of the hires image.
"""

from __future__ import annotations

import io
import json
import math
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import simplejpeg
from PIL import Image

Image.MAX_IMAGE_PIXELS = None  # full-resolution scans exceed Pillow's guard against decompression bombs by design

WHITE = (255, 255, 255)  # glass: what lies beyond the picture's edge
END_OF_JPEG = b"\xff\xd9"
PACK, RECORD, STARTED = "tiles.h5", "tiles.json", "started.json"


@dataclass(frozen=True)
class Cut:
    """How the tiles of one slice are cut. `crop` is in pixels of the source picture, `um_per_px` that of the tile."""

    source: str
    image: str
    um_per_px: float | None
    crop: float
    size: int
    resampled: bool

    @property
    def quality(self) -> int:
        """JPEG quality: Pillow's default, as published, for whole-pixel crops; near lossless for resampled tiles."""
        return 95 if self.resampled else 75


SLIDES = (".svs", ".ndpi")
BOMB_PX = 2**29  # decoded as a whole, 2 GiB in Pillow
Image.MAX_IMAGE_PIXELS = None  # Pillow's own limit is below the pictures of many slices; check_size stands for it


@contextmanager
def readable(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, SyntaxError, EOFError, OverflowError) as error:
        raise ValueError(
            f"{path}: expected a picture, found one that cannot be read ({error}); copy it anew"
        ) from error


def openslide_file(path: Path) -> Any:
    try:
        import openslide
    except ImportError as error:
        raise ValueError(f"{path}: whole-slide files need `pip install openslide-python openslide-bin`") from error
    try:
        return openslide.OpenSlide(path)
    except openslide.OpenSlideError as error:
        raise OSError(error) from error


def picture_size(path: Path) -> tuple[int, int]:
    """Width and height in pixels, from the head of the file."""
    with readable(path):
        if path.suffix.lower() in SLIDES:
            with openslide_file(path) as slide:
                return slide.dimensions
        with Image.open(path) as picture:
            return picture.size


def check_size(path: Path, width: int, height: int, huge: bool) -> None:
    """Raises ValueError for what would be decoded whole and is larger than any picture of a slice should be."""
    if width * height > BOMB_PX and not huge:
        raise ValueError(
            f"{path}: expected at most {BOMB_PX:,} pixels to decode at once, found {width:,} x {height:,}; "
            f"convert it to a tiled pyramidal TIFF, or allow it with --huge ({width * height * 4 / 2**30:.0f} GiB)"
        )


def open_picture(path: Path) -> Image.Image:
    """The picture as 8-bit RGB; transparent parts become white. Raises ValueError where it cannot be read."""
    with readable(path):
        if path.suffix.lower() in SLIDES:
            with openslide_file(path) as slide:
                return slide.read_region((0, 0), 0, slide.dimensions).convert("RGB")
        with Image.open(path) as picture:
            if picture.mode in ("I", "F") or picture.mode.startswith("I;16"):
                raise ValueError(f"{path}: expected 8 bits per channel, found mode {picture.mode}; convert it to RGB")
            if "A" in picture.getbands():
                backed = Image.new("RGBA", picture.size, (*WHITE, 255))
                return Image.alpha_composite(backed, picture.convert("RGBA")).convert("RGB")
            return picture.convert("RGB")


def check_scale(size: tuple[int, int], path: Path, root: Path, hires_scale: float) -> None:
    """The full-resolution picture must be the one that the positions are in: hires size = its size x scale factor."""
    hires = root / "spatial" / "tissue_hires_image.png"
    if not hires.exists():
        return
    expected = [side / hires_scale for side in picture_size(hires)]
    if any(abs(found - side) > 0.02 * side + 2 for found, side in zip(size, expected, strict=True)):
        raise ValueError(
            f"{path}: expected about {expected[0]:.0f} x {expected[1]:.0f} px (hires image / tissue_hires_scalef), "
            f"found {size[0]} x {size[1]}; name the picture that the positions refer to in slices.csv"
        )


def cut_tile(picture: Image.Image, centre_px: np.ndarray, cut: Cut) -> Image.Image:
    """One tile around `centre_px` (x, y of the source picture); beyond the picture's edge it is white."""
    x, y = float(centre_px[0]), float(centre_px[1])
    half = cut.crop / 2
    if not cut.resampled:
        return _crop(picture, tuple(round(edge) for edge in (x - half, y - half, x + half, y + half)))
    margin = 3 * max(cut.crop / cut.size, 1)  # reach of the bicubic filter, so that the edge pixels are right too
    left, top = math.floor(x - half - margin), math.floor(y - half - margin)
    right, bottom = math.ceil(x + half + margin), math.ceil(y + half + margin)
    box = (x - half - left, y - half - top, x + half - left, y + half - top)
    region = _crop(picture, (left, top, right, bottom))
    return region.resize((cut.size, cut.size), Image.Resampling.BICUBIC, box=box)


def _crop(picture: Image.Image, box: tuple[int, ...]) -> Image.Image:
    left, top, right, bottom = box
    if left >= 0 and top >= 0 and right <= picture.width and bottom <= picture.height:
        return picture.crop((left, top, right, bottom))
    canvas = Image.new("RGB", (right - left, bottom - top), WHITE)
    inside = max(left, 0), max(top, 0), min(right, picture.width), min(bottom, picture.height)
    if inside[0] < inside[2] and inside[1] < inside[3]:
        canvas.paste(picture.crop(inside), (max(-left, 0), max(-top, 0)))
    return canvas


def tile_files(folder: Path, barcodes: Iterable[str]) -> list[str]:
    """Where the spots' tiles lie. Raises ValueError where a barcode cannot be a file name."""
    files = [f"{folder}{os.sep}{barcode}.jpeg" for barcode in barcodes]
    for barcode in barcodes:
        if not barcode or barcode.startswith(".") or any(c in barcode for c in "/\\\0"):
            raise ValueError(f"{folder}: barcode {barcode!r} cannot be a file name; rename it in counts and positions")
    return files


def ensure_tiles(
    picture: Image.Image, centres_px: np.ndarray, cut: Cut, files: list[str], there: np.ndarray, out: np.ndarray
) -> None:
    """Pixels of the JPEGs `files` into `out` (n, Z, Z, 3) uint8, each written first where it is not `there` (n,) or is
    torn."""
    for tile, centre, file, found in zip(out, centres_px, files, there, strict=True):
        data = Path(file).read_bytes() if found else b""
        if not data.endswith(END_OF_JPEG):  # not there, or an earlier run was stopped in the middle of the file
            data = cut_tile(picture, centre, cut).tobytes("jpeg", *_encoder_settings(cut.quality))
            with open(file, "wb", buffering=0) as target:  # noqa: PTH123 (a Path costs as much as writing the tile)
                target.write(data)  # in place, which is cheaper than a rename: its end tells that it is whole
        _decode(data, file, tile)


def _decode(data: bytes, file: str, out: np.ndarray) -> None:
    """Pixels of a JPEG into `out` (Z, Z, 3): those that Pillow gives, from the same library, without its set-up."""
    try:
        height, width = simplejpeg.decode_jpeg_header(data)[:2]
        if (height, width) == out.shape[:2]:
            simplejpeg.decode_jpeg(data, buffer=out)
            return
        found = f"{width} x {height}"
    except ValueError as error:
        found = f"one that cannot be read ({error})"
    size = f"{out.shape[1]} x {out.shape[0]} px"
    raise ValueError(f"{file}: expected a tile of {size}, found {found}; delete it and run image_tilling.py again")


@cache
def _encoder_settings(quality: int) -> tuple[Any, ...]:
    """What `Image.save` hands to its encoder: called directly, this takes three quarters of the time per small tile."""
    probe: Any = Image.new("RGB", (8, 8))
    probe.save(io.BytesIO(), "JPEG", quality=quality)
    return ("RGB", *probe.encoderconfig)


def read_record(folder: Path) -> dict[str, Any] | None:
    """What `tiles.json` says, None where there is none. Raises ValueError where it is not JSON."""
    path = folder / RECORD
    if not path.exists():
        return None
    try:
        return json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: expected JSON, found {error}; delete it and run image_tilling.py again") from error


def same_cut(record: dict[str, Any], cut: Cut) -> bool:
    return all(record.get(key) == value for key, value in asdict(cut).items())


class TilePack:
    """The packed tiles of one slice: uint8 (S, Z, Z, 3) read by row. Opened anew in each process that reads it."""

    def __init__(self, folder: Path):
        import h5py

        self.folder, self.path = folder, folder / PACK
        self.record = read_record(folder)
        if self.record is None or not self.path.exists():
            raise ValueError(f"{folder}: expected {RECORD} and {PACK}, found none; run image_tilling.py first")
        try:
            with h5py.File(self.path) as file:
                self.barcodes = file["barcode"].asstr()[:]
                img = file["img"]
                self.size = int(img.shape[1])
                if img.chunks != (1, *img.shape[1:]) or img.id.get_create_plist().get_nfilters():
                    raise ValueError(f"chunks {img.chunks} or a filter instead of plain chunks of one tile")
        except (OSError, KeyError, ValueError) as error:
            raise ValueError(
                f"{self.path}: expected packed tiles, found {error}; run image_tilling.py again"
            ) from error
        self._file: Any = None
        self._pid = 0

    def read(self, rows: np.ndarray) -> np.ndarray:
        """Rows (n,) in any order, repeated or not -> uint8 (n, Z, Z, 3)."""
        import h5py

        if self._file is None or self._pid != os.getpid():  # HDF5 handles must not cross a fork
            self._file, self._pid = h5py.File(self.path), os.getpid()
        img = self._file["img"].id
        tiles = np.empty((len(rows), self.size * self.size * 3), np.uint8)
        for tile, row in zip(tiles, rows.tolist(), strict=True):  # h5py's own fancy indexing is 300 times slower
            img.read_direct_chunk((row, 0, 0, 0), out=tile)
        return tiles.reshape(-1, self.size, self.size, 3)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_file": None}


def write_pack(folder: Path, barcodes: np.ndarray, xy_px: np.ndarray, tiles: Any, size: int) -> None:
    """Write `tiles` as img, coords, barcode (HEST's names): uint8 in the order of `barcodes`, either single ones
    (Z, Z, 3) or, which is faster, blocks of them (n, Z, Z, 3)."""
    import h5py

    part = folder / (PACK + ".part")
    try:
        with h5py.File(part, "w") as file:
            img = file.create_dataset("img", (len(barcodes), size, size, 3), "uint8", chunks=(1, size, size, 3))
            end = 0
            for block in tiles:
                start, end = end, end + block.size // (size * size * 3)
                img[start:end] = block
            file["coords"] = xy_px
            file.create_dataset("barcode", data=barcodes.astype(object), dtype=h5py.string_dtype())
        part.replace(folder / PACK)
    finally:
        part.unlink(missing_ok=True)  # half a pack
