"""Flat images, which are decoded whole: JPEG, PNG, WebP, BMP by Pillow, JPEG 2000 and deep PNG by imagecodecs.

PNG: W3C Recommendation, third edition, chunks IHDR, sBIT and tRNS. JPEG 2000: ISO/IEC 15444-1, boxes colr and cdef,
marker SIZ. Letters: h, w rows and columns, C samples of a pixel.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
from PIL import Image

from utils.images.checks import ImageError, check_size, reading
from utils.images.samples import Samples, largest_values, measured_depth, on_white
from utils.images.units import UM_PER_INCH

MAGIC = (b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"\0\0\0\x0cjP  ", b"\xff\x4f\xff\x51", b"BM")
FORMATS = ("JPEG", "PNG", "WEBP", "JPEG2000", "BMP")
MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK")
LEAST_DPI = 1000.0  # 72 or 300 dots per inch was written by a program that knew no microscope
ORIENTATION = 0x0112
TEXT = (b"eXIf", b"tEXt", b"zTXt", b"iTXt")  # PNG chunks of EXIF and of text, in which some programs keep it
GREY, COLOUR = (0, 4), (2, 6)  # PNG colour types, the second of each with alpha
SRGB, GREYSCALE, SYCC = 16, 17, 18  # JPEG 2000, enumerated colour spaces that decode to grey or RGB
ROWS_AT_ONCE = 512


def is_flat(head: bytes) -> bool:
    """Whether a file that begins like this is one of FORMATS."""
    return head.startswith(MAGIC) or (head[:4] == b"RIFF" and head[8:12] == b"WEBP")


def orientation_note(value: Any) -> tuple[str, ...]:
    """A note on tag Orientation, which is not followed: positions are in stored pixels."""
    if not isinstance(value, int) or not 2 <= value <= 8:
        return ()
    return (f"Orientation {int(value)} ignored: positions are in stored pixels",)


class PillowLevel:
    """A decoded image in the mode of its file; what is cropped becomes RGB on white."""

    def __init__(self, image: Image.Image):
        self.width, self.height = image.size
        self._image = image

    def crop(self, left: int, top: int, right: int, bottom: int) -> np.ndarray:
        part = self._image.crop((left, top, right, bottom))
        if not part.has_transparency_data:
            return np.asarray(part.convert("RGB"))
        rgba = np.asarray(part.convert("RGBA"))
        return on_white(rgba[..., :3], rgba[..., 3:], premultiplied=False)


class ArrayLevel:
    """Decoded pixels (h, w, 3) uint8."""

    def __init__(self, pixels: np.ndarray):
        self.height, self.width = pixels.shape[:2]
        self._pixels = pixels

    def crop(self, left: int, top: int, right: int, bottom: int) -> np.ndarray:
        return self._pixels[top:bottom, left:right]


class FlatImage:
    """A flat file by its head; `load` decodes it.

    Attributes
    ----------
    width, height : int, pixels as they are stored
    um_per_px : float or None, from dots per inch above 1,000
    notes : what is remarkable about the file, in words
    """

    def __init__(self, path: Path):
        self.path = path
        with reading(path), path.open("rb") as file:
            image = Image.open(file, formats=FORMATS)
            self.width, self.height = image.size
            self._format = image.format
            self.um_per_px = _um_per_px(image)
            value = None
            if image.format != "PNG" or _has_text(path):
                with suppress(Exception):  # damaged EXIF is no reason to refuse the pixels
                    value = image.getexif().get(ORIENTATION)
            _check_kind(path, image)
        self.notes = orientation_note(value)

    def load(self, huge: bool) -> tuple[list[Any], tuple[str, ...]]:
        """The only level, and notes on its depth. Raises ImageError where the file is damaged or too large."""
        check_size(self.path, self.width, self.height, huge)
        with reading(self.path):
            if self._format == "JPEG2000":
                return self._deep(*_decode_jpeg_2000(self.path))
            if self._format == "PNG":
                head = PngHead.read(self.path)
                if head.bits == 16 or (head.bits < 8 and head.is_grey and head.has_trns):
                    return self._deep(*_decode_png(self.path, head))
            with self.path.open("rb") as file:
                image = Image.open(file, formats=FORMATS)
                image.load()
        return [PillowLevel(image)], ()

    def close(self) -> None:
        """Nothing is open between reads."""

    def _deep(
        self, stored: np.ndarray, samples: Samples, stated: tuple[int, str] | None
    ) -> tuple[list[Any], tuple[str, ...]]:
        notes: tuple[str, ...] = ()
        if samples.needs_depth:
            samples, note = measured_depth(self.path, samples, largest_values(_rows(stored), samples), stated)
            notes = (note,)
        pixels = np.empty((*stored.shape[:2], 3), np.uint8)
        for start, rows in enumerate(_rows(stored)):
            pixels[start * ROWS_AT_ONCE :][: len(rows)] = samples.to_rgb(rows)
        return [ArrayLevel(pixels)], notes


def _rows(stored: np.ndarray) -> Iterator[np.ndarray]:
    return (stored[start : start + ROWS_AT_ONCE] for start in range(0, len(stored), ROWS_AT_ONCE))


def _um_per_px(image: Image.Image) -> float | None:
    dpi = image.info.get("dpi", (0, 0))[0]
    return UM_PER_INCH / float(dpi) if LEAST_DPI < dpi < math.inf else None


def _check_kind(path: Path, image: Image.Image) -> None:
    n_frames = getattr(image, "n_frames", 1)
    if n_frames > 1 and image.format != "MPO":  # the first of an MPO is the image itself, as every viewer shows it
        raise ImageError(f"{path}: expected one image, found an animation of {n_frames}; save one as a file of its own")
    if image.format in ("JPEG", "MPO") and image.mode == "CMYK" and "adobe" not in image.info:
        raise ImageError(
            f"{path}: expected RGB, grey or Adobe's CMYK, found CMYK that does not state whether it is inverted; "
            "convert it to RGB"
        )
    if image.format not in ("JPEG2000", "PNG") and image.mode not in MODES:
        raise ImageError(f"{path}: expected grey or RGB pixels, found mode {image.mode}; convert it to RGB")


def _png_chunks(file: IO[bytes]) -> Iterator[tuple[bytes, int]]:
    """Name and size of each chunk of a PNG, the file at its content; the content need not be read."""
    file.seek(8)
    while len(head := file.read(8)) == 8:
        size, name = struct.unpack(">I4s", head)
        following = file.tell() + size + 4
        yield name, size
        file.seek(following)


def _has_text(path: Path) -> bool:
    """Whether a PNG has a chunk in which Orientation may stand; Pillow decodes all pixels to look for one."""
    with path.open("rb") as file:
        return any(name in TEXT for name, _ in _png_chunks(file))


@dataclass(frozen=True)
class PngHead:
    """What the chunks before the pixels state: bits of a sample, colour type, sBIT and tRNS."""

    bits: int
    colour_type: int
    significant: int | None
    has_trns: bool

    @property
    def is_grey(self) -> bool:
        return self.colour_type in GREY

    @classmethod
    def read(cls, path: Path) -> PngHead:
        found: dict[bytes, bytes] = {}
        with path.open("rb") as file:
            for name, size in _png_chunks(file):
                if name == b"IDAT":
                    break
                found[name] = file.read(size)
        bits, colour_type = found[b"IHDR"][8:10]
        n_colours = 1 if colour_type in GREY else 3
        sbit = found.get(b"sBIT", b"")[:n_colours]
        return cls(bits, colour_type, max(sbit, default=None), b"tRNS" in found)


def _decode_png(path: Path, head: PngHead) -> tuple[np.ndarray, Samples, tuple[int, str] | None]:
    """(h, w, C) uint8 or uint16, of which libpng has made the transparent colour an alpha sample."""
    import imagecodecs

    stored = np.atleast_3d(imagecodecs.png_decode(path.read_bytes()))
    n_colours = 1 if head.is_grey else 3
    alpha = n_colours if stored.shape[-1] > n_colours else None
    kind = "grey" if head.is_grey else "rgb"
    samples = Samples(kind, tuple(range(n_colours)), alpha, bits=stored.dtype.itemsize * 8)
    bits = head.significant
    if bits is None or head.bits < 16:
        return stored, samples, None
    if largest_values(_rows(stored), samples)[0] >= 2**bits and _is_scaled(stored[..., :n_colours], bits):
        return stored, samples, (16, f"sBIT {bits}, scaled up to 16 as PNG asks")
    return stored, samples, (bits, "sBIT")


def _is_scaled(values: np.ndarray, bits: int) -> bool:
    """Whether 16-bit values are those of `bits` scaled up, as the PNG standard asks: by zeros, copies or a factor."""
    for rows in _rows(values):
        exact = (rows >> (16 - bits)) * (65535 / (2**bits - 1))
        if (rows & (2 ** (16 - bits) - 1)).any() and np.abs(rows - exact).max() > 1:
            return False
    return True


def _decode_jpeg_2000(path: Path) -> tuple[np.ndarray, Samples, None]:
    import imagecodecs

    data = path.read_bytes()
    bits = _jpeg_2000_bits(path, data)
    space, alpha, premultiplied = _jpeg_2000_channels(data)
    stored = np.atleast_3d(imagecodecs.jpeg2k_decode(data))
    n_colours = stored.shape[-1] - (alpha is not None)
    if space not in (None, SRGB, GREYSCALE, SYCC) or n_colours not in (1, 3) or alpha not in (None, n_colours):
        found = f"{stored.shape[-1]} channels" if space in (None, SRGB, GREYSCALE, SYCC) else f"colour space {space}"
        raise ImageError(f"{path}: expected grey or RGB, and alpha where the file states it, found {found}; "
                         "convert it to RGB")  # fmt: skip
    kind = "grey" if n_colours == 1 else "rgb"
    samples = Samples(kind, tuple(range(n_colours)), alpha, premultiplied, bits if bits < 8 else stored.itemsize * 8)
    return stored, samples, None


def _jpeg_2000_bits(path: Path, data: bytes) -> int:
    """Bits of a sample by the marker SIZ."""
    start = data.find(b"\xff\x4f\xff\x51")
    (n,) = struct.unpack_from(">H", data, start + 40)
    components = [data[start + 42 + 3 * i] for i in range(n)]
    bits = {(value & 0x7F) + 1 for value in components}
    if any(value & 0x80 for value in components) or len(bits) > 1 or max(bits) > 16:
        found = "signed samples" if any(value & 0x80 for value in components) else f"{sorted(bits)} bits"
        raise ImageError(f"{path}: expected unsigned samples of up to 16 bits, found {found}; convert it to 8-bit RGB")
    return bits.pop()


def _jpeg_2000_channels(data: bytes) -> tuple[Any, int | None, bool]:
    """Colour space (a number, an ICC signature, None where none is stated), place of alpha, whether premultiplied."""
    space, alpha, premultiplied = None, None, False
    for name, box in _boxes(data):
        if name == b"colr" and box[:1] == b"\x01":
            space = struct.unpack_from(">I", box, 3)[0]
        elif name == b"colr" and box[:1] == b"\x02":
            signature = box[3 + 16 : 3 + 20].decode("latin-1").strip()
            space = None if signature in ("RGB", "GRAY") else signature
        elif name == b"cdef":
            for place, kind, _ in struct.iter_unpack(">HHH", box[2:]):
                if kind in (1, 2):
                    alpha, premultiplied = place, kind == 2
    return space, alpha, premultiplied


def _boxes(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Boxes of a JP2 file up to its pixels, those inside jp2h too; none of a bare codestream."""
    place = 0 if data[4:8] == b"jP  " else len(data)
    while place + 8 <= len(data):
        size, name = struct.unpack_from(">I4s", data, place)
        if name == b"jp2c":
            return
        if name == b"jp2h":
            place += 8
            continue
        if size < 8:
            raise ValueError(f"box {name!r} of {size} bytes")
        yield name, data[place + 8 : place + size]
        place += size
