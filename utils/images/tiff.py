"""TIFF through tifffile and imagecodecs: of each level only the tiles, strips or rows that a crop touches are read.

Letters: h, w rows and columns of a segment (a tile or a strip), C samples of a pixel. Sizes are in pixels of the level.
"""

from __future__ import annotations

import logging
import os
import struct
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from utils.images import scanner
from utils.images.checks import ImageError, check_size, reading
from utils.images.samples import Samples, largest_values, measured_depth
from utils.images.tiff_series import Series, find_scan, level_samples

MAGIC = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
CACHE_BYTES = 128 * 2**20  # decoded tiles of a row, which the next tiles of the row and the row below share
BLOCK_PX = 2**22  # of an image without segments, looked at together
TYPE_BYTES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4, 16: 8, 17: 8, 18: 8}
VENDORS = ("svs", "ndpi", "scn", "bif", "philips")  # tifffile's names of the formats that openslide reads


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


@dataclass(frozen=True)
class Mapped:
    """Uncompressed planes, each in one piece of the file: `offsets` of arrays of `shape` (rows, columns, C)."""

    path: Path
    offsets: list[int]
    shape: tuple[int, int, int]
    dtype: np.dtype
    at_once = (1, 1)

    @property
    def end(self) -> int:
        return max(self.offsets) + int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize

    def read(self, left: int, top: int, right: int, bottom: int) -> np.ndarray:
        """(rows, columns, C) in native byte order; mapped anew each time, so that no page stays with this process."""
        planes = [np.memmap(self.path, self.dtype, "r", offset, self.shape) for offset in self.offsets]
        parts = [plane[top:bottom, left:right] for plane in planes]
        return np.concatenate(parts, -1).astype(self.dtype.newbyteorder("="), copy=False)

    def pieces(self) -> Iterable[Callable[[], np.ndarray]]:
        """All of the image, piece by piece, to be called for."""
        height, width = self.shape[:2]
        step = max(1, BLOCK_PX // width)
        return [partial(self.read, 0, top, width, min(top + step, height)) for top in range(0, height, step)]


class Segmented:
    """Planes in tiles or strips, which are decoded one by one."""

    def __init__(self, pages: list[Any], lock: threading.Lock):
        key = pages[0].keyframe
        self.width, self.height = int(key.imagewidth), int(key.imagelength)
        self.w = int(key.tilewidth) if key.is_tiled else self.width
        self.h = int(key.tilelength) if key.is_tiled else min(int(key.rowsperstrip), self.height)
        self.columns, self.rows = -(-self.width // self.w), -(-self.height // self.h)
        n = self.columns * self.rows
        n_planes = int(key.samplesperpixel) if key.planarconfig == 2 else 1
        self.planes = [(page, plane * n) for page in pages for plane in range(n_planes)]
        self.n_samples = int(key.samplesperpixel) * len(pages)
        self._lock, self.at_once = lock, (self.w, self.h)
        for page in pages:
            if min(len(page.dataoffsets), len(page.databytecounts)) < n * n_planes:
                raise ValueError(f"{len(page.dataoffsets)} of {n * n_planes} tiles or strips")
            empty = next((a for a, b in zip(page.dataoffsets, page.databytecounts, strict=False) if a and not b), 0)
            if empty:  # not left out, which has no offset either: the writer never filled in its size
                raise ValueError(f"a tile or strip of 0 bytes at byte {empty:,}")

    @property
    def end(self) -> int:
        ends = [np.add(page.dataoffsets, page.databytecounts, dtype=np.int64) for page, _ in self.planes]
        return max(int(end.max(initial=0)) for end in ends)

    def contiguous(self, path: Path) -> Mapped | None:
        """The same planes as they can be mapped; None where they are compressed or lie in several pieces."""
        key = self.planes[0][0].keyframe
        n_samples = 1 if key.planarconfig == 2 else int(key.samplesperpixel)
        plain = key.compression == 1 and key.fillorder == 1 and key.predictor == 1 and not key.is_subsampled
        if not plain or key.is_tiled or key.bitspersample not in (8, 16):
            return None
        size = self.height * self.width * n_samples * key.dtype.itemsize
        offsets = []
        for page, first in self.planes:
            start = np.asarray(page.dataoffsets[first : first + self.rows], np.int64)
            length = np.asarray(page.databytecounts[first : first + self.rows], np.int64)
            if (start[1:] != start[:-1] + length[:-1]).any() or length.sum() != size:
                return None
            offsets.append(int(start[0]))
        dtype = key.dtype.newbyteorder(key.parent.byteorder)
        return Mapped(path, offsets, (self.height, self.width, n_samples), dtype)

    def decode(self, index: int) -> np.ndarray | None:
        """(h, w, C), at edges perhaps smaller or with padding; None where the file leaves the segment out."""
        found = [self._decode(page, first + index) for page, first in self.planes]
        parts = [part for part in found if part is not None]
        if not parts:
            return None
        if len(parts) < len(found):
            raise ValueError("a segment that some planes leave out")
        return parts[0] if len(parts) == 1 else np.concatenate(parts, -1)

    def _decode(self, page: Any, index: int) -> np.ndarray | None:
        offset, n_bytes = page.dataoffsets[index], page.databytecounts[index]
        if n_bytes == 0:
            return None
        with self._lock:
            file = page.parent.filehandle
            file.seek(offset)
            data = file.read(n_bytes)
        key = page.keyframe
        pixels = key.decode(data, index, jpegtables=page.jpegtables)[0][0]
        if pixels.dtype != key.dtype:
            raise ValueError(f"samples of kind {pixels.dtype}, not {key.dtype}")
        return pixels

    def pieces(self) -> Iterable[Callable[[], np.ndarray]]:
        """All of the image without the padding of its edges, piece by piece, to be called for."""

        def piece(index: int) -> np.ndarray:
            row, col = divmod(index, self.columns)
            found = self.decode(index)
            if found is None:
                return np.empty((0, 0, self.n_samples), np.uint8)
            return found[: self.height - row * self.h, : self.width - col * self.w]

        return [partial(piece, index) for index in range(self.rows * self.columns)]


class TiffLevel:
    """A level in RGB, read from several threads at once; segments that the file leaves out are white."""

    def __init__(self, path: Path, stored: Mapped | Segmented, samples: Samples, number: int, cache: SegmentCache):
        self.height, self.width = stored.shape[:2] if isinstance(stored, Mapped) else (stored.height, stored.width)
        self._path, self.stored, self.samples, self._number, self._cache = path, stored, samples, number, cache

    def crop(self, left: int, top: int, right: int, bottom: int) -> np.ndarray:
        with reading(self._path):
            if isinstance(self.stored, Mapped):
                return self.samples.to_rgb(self.stored.read(left, top, right, bottom))
            out, w, h = np.empty((bottom - top, right - left, 3), np.uint8), self.stored.w, self.stored.h
            for row in range(top // h, -(-bottom // h)):
                for col in range(left // w, -(-right // w)):
                    x, y = col * w, row * h
                    segment = self._segment(row * self.stored.columns + col)
                    part = segment[max(top - y, 0) : bottom - y, max(left - x, 0) : right - x]
                    place = out[max(y - top, 0) :, max(x - left, 0) :]
                    place[: part.shape[0], : part.shape[1]] = part
        return out

    def _segment(self, index: int) -> np.ndarray:
        """(h, w, 3) uint8."""
        return self._cache.get((self._number, index), lambda: self._decode(index))

    def _decode(self, index: int) -> np.ndarray:
        stored: Any = self.stored
        found = stored.decode(index)
        return np.full((stored.h, stored.w, 3), 255, np.uint8) if found is None else self.samples.to_rgb(found)


class TiffImage:
    """The scan of a TIFF file by its tags, with the attributes of flat.FlatImage."""

    def __init__(self, path: Path):
        import tifffile

        logging.getLogger("tifffile").addHandler(logging.NullHandler())  # its remarks would be further lines on stderr
        self.path, self._lock = path, threading.Lock()
        with reading(path):
            self._file = tifffile.TiffFile(path, is_ndpi=False)  # else the suffix .ndpi changes the offsets' width
        try:
            with reading(path):
                _check_vendor(path, self._file)
                _check_directories(path)
                self.scan = find_scan(path, self._file)
                self._stored = self._planes(self.scan.pages, self.scan)
        except BaseException:
            self._file.close()
            raise
        self.width, self.height = self.scan.width, self.scan.height
        self.um_per_px, self.notes = self.scan.um_per_px, self.scan.notes

    def _planes(self, pages: list[Any], series: Series | None = None) -> Mapped | Segmented:
        if series is not None and series.mapped is not None:
            dtype = series.key.dtype.newbyteorder(self._file.byteorder)
            stored: Mapped | Segmented = Mapped(self.path, *series.mapped, dtype)
        else:
            segmented = Segmented(pages, self._lock)
            stored = segmented.contiguous(self.path) or segmented
        size = self.path.stat().st_size
        if stored.end > size:
            raise OSError(f"its pixels end at byte {stored.end:,} of {size:,}")
        return stored

    def load(self, huge: bool) -> tuple[list[Any], tuple[str, ...]]:
        """Levels, finest first, and notes on their depth, for which all of an image of more than 8 bits is read."""
        check_size(self.path, *self._stored.at_once, huge)
        notes: tuple[str, ...] = ()
        assert self.scan.samples is not None
        with reading(self.path):
            if self.scan.samples.needs_depth:
                largest = _largest(self._stored, self.scan.samples)
                self.scan.samples, note = measured_depth(self.path, self.scan.samples, largest, self.scan.stated_depth)
                notes = (note,)
            found = {self.width: (self._stored, self.scan.samples)}
            for pages in self.scan.levels:
                samples = level_samples(self.scan, pages)
                level = None if samples is None else self._planes(pages)
                if samples and level and level.at_once[0] * level.at_once[1] <= BLOCK_PX:
                    found.setdefault(int(pages[0].keyframe.imagewidth), (level, samples))
        cache = SegmentCache(CACHE_BYTES)
        finest_first = [found[width] for width in sorted(found, reverse=True)]
        return [TiffLevel(self.path, *level, i, cache) for i, level in enumerate(finest_first)], notes

    def close(self) -> None:
        self._file.close()


def _check_directories(path: Path) -> None:
    """Raises OSError where a page or one of its tags lies beyond the end: readers would go on without it."""
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(16)
        order = "<" if head[:2] == b"II" else ">"
        big = struct.unpack_from(order + "H", head, 2)[0] == 43
        offset = struct.unpack_from(order + ("Q" if big else "I"), head, 8 if big else 4)[0]
        n_bytes, entry, inline, word = (8, "HHQ8s", 8, "Q") if big else (2, "HHI4s", 4, "I")
        entry_size, seen = struct.calcsize(order + entry), set[int]()
        while offset and offset not in seen:
            seen.add(offset)
            file.seek(offset)
            count = int.from_bytes(file.read(n_bytes), "little" if order == "<" else "big")
            directory = file.read(min(count, 2**16) * entry_size)
            following = file.read(inline)
            if len(following) < inline:
                raise OSError(f"page {len(seen)} ends beyond byte {size:,}")
            for code, kind, number, value in struct.iter_unpack(order + entry, directory):
                length = number * TYPE_BYTES.get(kind, 0)
                if length > inline and struct.unpack(order + word, value)[0] + length > size:
                    raise OSError(f"tag {code} of page {len(seen)} ends beyond byte {size:,}")
            offset = struct.unpack(order + word, following)[0]


def _check_vendor(path: Path, file: Any) -> None:
    """A scanner's file that openslide has not recognised is read only where its pages are plain images."""
    kinds = [kind for kind in VENDORS if getattr(file, f"is_{kind}")]
    if kinds and not scanner.is_installed():
        raise ImageError(f"{path}: {scanner.NEEDED}")
    if kinds and kinds != ["svs"]:
        raise ImageError(
            f"{path}: expected a slide that openslide reads, found a damaged or unknown {kinds[0]} file; convert it to "
            "a tiled RGB TIFF"
        )


def _largest(stored: Mapped | Segmented, samples: Samples) -> tuple[int, int]:
    """Largest colour and opacity of the whole image, piece by piece, by several threads."""
    with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
        found = list(pool.map(lambda piece: largest_values([piece()], samples), stored.pieces()))
    return max(colour for colour, _ in found), max(alpha for _, alpha in found)
