"""OME-TIFF and plain TIFF through tifffile: of each level only the tiles or strips that a crop touches are decoded.

Letters: h, w rows and columns of a segment (a tile or a strip), C its channels. Sizes are in pixels of the level.
"""

from __future__ import annotations

import math
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
from PIL import Image

from utils.images import tiles

GREY, RGB, YCBCR = 1, 2, 6  # tag PhotometricInterpretation
JPEG, NO_ALPHA, PREMULTIPLIED = 7, 0, 1  # tags Compression and ExtraSamples
UM = {"m": 1e6, "cm": 1e4, "mm": 1e3, "µm": 1.0, "μm": 1.0, "um": 1.0, "nm": 1e-3}  # micro sign and Greek mu


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """tifffile and its codecs raise what they like where a file is damaged."""
    with tiles.readable(path):
        try:
            yield
        except (ValueError, RuntimeError, LookupError, TypeError) as error:
            text = " ".join(str(error).split())
            if "imagecodecs" in text:
                raise ValueError(f"{path}: this compression needs `pip install imagecodecs` ({text})") from error
            raise OSError(text) from error


class SegmentCache:
    """Decoded segments, those first out that were not used for longest; who wants one being decoded waits for it."""

    def __init__(self, n_bytes: int):
        self._room, self._kept, self._lock = n_bytes, OrderedDict[Any, Future](), threading.Lock()

    def get(self, key: Any, decode: Callable[[], np.ndarray]) -> np.ndarray:
        with self._lock:
            kept = self._kept.pop(key, None)
            future = self._kept[key] = Future() if kept is None else kept
        if kept is None:
            try:
                segment = decode()
            except BaseException as error:
                with self._lock:
                    self._kept.pop(key, None)
                future.set_exception(error)
                raise
            future.set_result(segment)
            self._make_room(segment.nbytes)
        return future.result()

    def _make_room(self, added: int) -> None:
        with self._lock:
            self._room -= added
            while self._room < 0 and len(self._kept) > 1 and next(iter(self._kept.values())).done():
                self._room += self._kept.popitem(last=False)[1].result().nbytes


class TiffLevel:
    """A level as tifffile describes it, read from several threads at once."""

    def __init__(self, page: Any, number: int, path: Path, cache: SegmentCache, lock: threading.Lock):
        key = page.keyframe
        self.width, self.height = int(key.imagewidth), int(key.imagelength)
        self._page, self._number, self._path, self._cache, self._lock = page, number, path, cache, lock
        self._w = int(key.tilewidth) if key.is_tiled else self.width
        self._h = int(key.tilelength) if key.is_tiled else min(int(key.rowsperstrip), self.height)
        self._as_is = bool(key.is_memmappable)

    @property
    def decoded_at_once(self) -> tuple[int, int]:
        """Width and height of what one pixel needs: its segment, or itself where pixels lie uncompressed in a row."""
        return (1, 1) if self._as_is else (self._w, self._h)

    def crop(self, box: tuple[int, int, int, int], /) -> Image.Image:
        left, top, right, bottom = box
        with _reading(self._path):
            if self._as_is:  # mapped anew each time: pages that were read do not stay with this process
                key = self._page.keyframe
                pixels = np.memmap(self._path, np.uint8, "r", int(self._page.dataoffsets[0]), key.shape)
                return Image.fromarray(to_rgb(np.atleast_3d(pixels[top:bottom, left:right]), key))
            out = np.empty((bottom - top, right - left, 3), np.uint8)
            for row in range(top // self._h, -(-bottom // self._h)):
                for col in range(left // self._w, -(-right // self._w)):
                    x, y = col * self._w, row * self._h
                    segment = self._segment(row * -(-self.width // self._w) + col)
                    part = segment[max(top - y, 0) : bottom - y, max(left - x, 0) : right - x]
                    place = out[max(y - top, 0) :, max(x - left, 0) :]
                    place[: part.shape[0], : part.shape[1]] = part
        return Image.fromarray(out)

    def _segment(self, index: int) -> np.ndarray:
        """(h, w, 3) uint8; white where the file leaves it out."""
        return self._cache.get((self._number, index), lambda: self._decode(index))

    def _decode(self, index: int) -> np.ndarray:
        page = self._page
        offset, n_bytes = page.dataoffsets[index], page.databytecounts[index]
        if n_bytes == 0:
            return np.full((self._h, self._w, 3), 255, np.uint8)
        with self._lock:
            file = page.parent.filehandle
            file.seek(offset)
            data = file.read(n_bytes)
        return to_rgb(page.decode(data, index, jpegtables=page.jpegtables)[0][0], page.keyframe)


def to_rgb(pixels: np.ndarray, key: Any) -> np.ndarray:
    """Grey, RGB, or one of them with further channels (h, w, C) -> (h, w, 3) uint8, on white where transparent."""
    colours = 1 if key.photometric == GREY else 3
    out = np.repeat(pixels[..., :1], 3, -1) if colours == 1 else np.ascontiguousarray(pixels[..., :3])
    if pixels.shape[-1] == colours or not key.extrasamples or key.extrasamples[0] == NO_ALPHA:
        return out
    alpha = pixels[..., colours : colours + 1].astype(np.uint16)
    light = out if key.extrasamples[0] == PREMULTIPLIED else (out * alpha + 127) // 255
    return np.minimum(light + (255 - alpha), 255).astype(np.uint8)


def check_file(path: Path) -> bool:
    """Whether it is an OME-TIFF. Raises ValueError where it is no whole TIFF of 8 bits per channel."""
    import tifffile

    with _reading(path), tifffile.TiffFile(path) as file:
        key = file.series[0].keyframe
        if key.dtype != np.uint8 or key.bitspersample != 8:
            bits = f"{key.bitspersample} bits ({key.dtype})"
        else:
            bits = ""
            for level in file.series[0].levels:
                page: Any = level.pages[0]
                ends = np.add(page.dataoffsets, page.databytecounts, dtype=np.int64)
                if ends.max(initial=0) > path.stat().st_size:
                    raise OSError(f"its pixels end at byte {ends.max():,} of {path.stat().st_size:,}")
        ome = bool(file.is_ome)
    if bits:
        raise ValueError(f"{path}: expected 8 bits per channel, found {bits}; convert it to 8-bit RGB")
    return ome


def open_levels(path: Path, cache_bytes: int) -> tuple[list[TiffLevel], float | None, Callable[[], None]]:
    """Levels of the first picture of the file, finest first, its micrometres per pixel, and what closes it."""
    import tifffile

    with _reading(path):
        file = tifffile.TiffFile(path)
        series = file.series[0]
        um_per_px = _ome_um_per_px(file.ome_metadata or "") if file.is_ome else _tag_um_per_px(series.keyframe)
    found = _unusable(series)
    if found:
        file.close()
        raise ValueError(
            f"{path}: expected grey or RGB pixels, channels side by side, found {found}; convert it to RGB"
        )
    cache, lock = SegmentCache(cache_bytes), threading.Lock()
    levels = [TiffLevel(level.pages[0], number, path, cache, lock) for number, level in enumerate(series.levels)]
    return levels, um_per_px, file.close


def _unusable(series: Any) -> str:
    """What about the pixels cannot be read; empty where all can."""
    key = series.keyframe
    if series.axes.replace("S", "") != "YX" or len(series.pages) != 1:
        return f"axes {series.axes} of sizes {' x '.join(map(str, series.shape))}"
    if key.samplesperpixel > 1 and key.planarconfig != 1:
        return "channels one after the other (planar)"
    if key.photometric not in (GREY, RGB, YCBCR) or (key.photometric == YCBCR and key.compression != JPEG):
        return f"colours {getattr(key.photometric, 'name', key.photometric)}"
    return ""


def _tag_um_per_px(key: Any) -> float | None:
    try:
        per_um = key.get_resolution("micrometer")
    except (ValueError, ArithmeticError):
        return None
    return 1 / math.sqrt(per_um[0] * per_um[1]) if min(per_um) > 0 else None


def _ome_um_per_px(text: str) -> float | None:
    """Physical size of the first picture's pixels, from OME-XML."""
    try:
        pixels = ElementTree.fromstring(text).find(".//{*}Pixels")
        sides = [float(pixels.get(f"PhysicalSize{a}")) * UM[pixels.get(f"PhysicalSize{a}Unit", "µm")] for a in "XY"]  # type: ignore[union-attr, arg-type]
    except (ElementTree.ParseError, AttributeError, TypeError, ValueError, KeyError):  # not stated, or in no known unit
        return None
    return math.sqrt(sides[0] * sides[1])
