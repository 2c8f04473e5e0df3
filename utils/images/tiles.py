"""Tiles: cut from the image around each spot and packed into one HDF5 file per slice, the only store that is read.

    for batch in cut_tiles(image, centres_px, cut, batch_size=64):
        ...

Two rules of cutting: a physical square of `tile_um`, resampled to `tile_px` (um per pixel from the spot pitch),
or the published crop of whole pixels of the hires image. Training and prediction cut by the same function.

Letters: S spots, B batch, n a block of tiles, Z tile side in pixels.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import IO, Any

import numpy as np
from PIL import Image

from utils.files.atomic import whole_file, write_record
from utils.images.image import TissueImage

PACK, RECORD = "tiles.h5", "tiles.json"
JPEGS_PART = "jpeg.part"  # folder of the JPEGs until all of them are there
OPEN_PACKS = 128  # files that a process keeps open, of any number of slices: systems allow 1,024 or fewer
AT_A_TIME = 8  # tiles that a thread cuts before it looks for others


@dataclass(frozen=True)
class Cut:
    """How the tiles of one slice are cut.

    `crop` is in pixels of the source image, `um_per_px` that of the tile, `scale` the source image's pixels per
    full-resolution pixel, that of the positions.
    """

    source: str
    image: str
    um_per_px: float | None
    crop: float
    size: int
    resampled: bool
    scale: float = 1.0

    @property
    def quality(self) -> int:
        """JPEG quality: Pillow's default, as published, for whole-pixel crops; near lossless for resampled tiles."""
        return 95 if self.resampled else 75


# ---- cutting


def cut_tile(image: TissueImage, centre_px: np.ndarray, cut: Cut) -> np.ndarray:
    """One tile around `centre_px` (x, y of the image): (Z, Z, 3) uint8; beyond the image's edge it is white."""
    x, y = float(centre_px[0]) - cut.crop / 2, float(centre_px[1]) - cut.crop / 2
    if cut.resampled:
        return image.region(x, y, cut.crop, cut.size)
    left, top = round(x), round(y)  # as PIL rounds the edges of a crop: halves to even
    return image.crop(left, top, left + cut.size, top + cut.size)


def cut_tiles(
    image: TissueImage, centres_px: np.ndarray, cut: Cut, batch_size: int, workers: int | None = None
) -> Iterator[np.ndarray]:
    """Tiles in the order of their centres: batches (B, Z, Z, 3) uint8, the last one smaller.

    Parameters
    ----------
    centres_px : ndarray (S, 2), x and y, in pixels of the image
    batch_size : B
    workers : threads (up to four where None), which cut ahead of the consumer by a few batches: memory depends on the
        batch alone. An error is raised where its batch is due.
    """
    centres_px = np.asarray(centres_px, float)
    if centres_px.ndim != 2 or centres_px.shape[1] != 2 or not np.isfinite(centres_px).all():
        raise ValueError(f"{image.path}: expected finite centres (S, 2) in pixels, found {centres_px.shape}")
    workers = min(4, os.cpu_count() or 1) if workers is None else max(workers, 1)
    return _stream(image, centres_px, cut, batch_size, workers)


def _stream(
    image: TissueImage, centres_px: np.ndarray, cut: Cut, batch_size: int, workers: int
) -> Iterator[np.ndarray]:
    ahead = 1 + math.ceil(2 * workers * AT_A_TIME / batch_size)  # batches under way while the consumer has one
    waiting: deque[tuple[np.ndarray, list[Future]]] = deque()
    pool = ThreadPoolExecutor(workers, thread_name_prefix="tiles")

    def fill(out: np.ndarray, centres: np.ndarray) -> None:
        for tile, centre in zip(out, centres, strict=True):
            tile[:] = cut_tile(image, centre, cut)

    def begin(centres: np.ndarray) -> None:
        batch = np.empty((len(centres), cut.size, cut.size, 3), np.uint8)
        parts = [slice(start, start + AT_A_TIME) for start in range(0, len(batch), AT_A_TIME)]
        waiting.append((batch, [pool.submit(fill, batch[part], centres[part]) for part in parts]))

    def finished() -> np.ndarray:
        batch, parts = waiting.popleft()
        for part in parts:
            part.result()
        return batch

    try:
        for start in range(0, len(centres_px), batch_size):
            begin(centres_px[start : start + batch_size])
            if len(waiting) > ahead:
                yield finished()
        while waiting:
            yield finished()
    finally:  # also where the consumer stops early
        pool.shutdown(cancel_futures=True)


def reading_order(centres_px: np.ndarray, cut: Cut) -> np.ndarray:
    """Rows (S,) of the centres (S, 2) band by band, so that neighbouring tiles share what is decoded."""
    band = np.floor(centres_px[:, 1] / max(cut.crop, 1))
    return np.lexsort((centres_px[:, 0], band))


# ---- the folder of a slice


def tile_files(folder: Path, barcodes: Iterable[str]) -> list[str]:
    """Where the spots' JPEGs lie. Raises ValueError where a barcode cannot be a file name."""
    files = [f"{folder}{os.sep}{barcode}.jpeg" for barcode in barcodes]
    for barcode in barcodes:
        if not barcode or barcode.startswith(".") or any(c in barcode for c in "/\\\0"):
            raise ValueError(
                f"{folder}: expected barcodes that can be file names, found {barcode!r}; rename it in counts and "
                "positions"
            )
    return files


def read_record(folder: Path) -> dict[str, Any] | None:
    """The content of `tiles.json`, None where there is none. Raises ValueError where it is not JSON."""
    path = folder / RECORD
    if not path.exists():
        return None
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path}: expected JSON, found {error}; delete it and run image_tilling.py again") from error


def changes(record: dict[str, Any], cut: Cut, image_hash: str) -> list[str]:
    """What of the cut and the image differs from a record, in words."""
    changed = [f"{key} {record.get(key)} -> {value}" for key, value in asdict(cut).items() if record.get(key) != value]
    return changed + (["another content of the image"] if record.get("image_hash") != image_hash else [])


def is_whole(pack: TilePack, barcodes: np.ndarray, xy_px: np.ndarray, jpeg: bool) -> bool:
    """Whether a pack holds exactly these spots (S,) at their centres (S, 2), with JPEGs beside it where asked for."""
    there = {str(path) for path in pack.folder.glob("*.jpeg")} if jpeg else set()
    same = np.array_equal(pack.barcodes, barcodes) and np.array_equal(pack.coords, xy_px)
    return same and (not jpeg or there.issuperset(tile_files(pack.folder, barcodes)))


def write_tiles(
    folder: Path,
    blocks: Iterable[np.ndarray],
    cut: Cut,
    barcodes: np.ndarray,
    xy_px: np.ndarray,
    about: dict[str, Any],
    order: np.ndarray,
    jpeg: bool = False,
) -> None:
    """Write the pack, the JPEGs where asked for, and the record of a slice; its old files stay until all are complete.

    Parameters
    ----------
    blocks : tiles (n, Z, Z, 3) uint8, in `order` (S,) of the barcodes
    barcodes, xy_px : (S,) and (S, 2), in the order of the pack
    about : what the record holds beside the cut
    """
    files = tile_files(folder / JPEGS_PART, barcodes[order])
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with whole_file(folder / PACK) as pack:
            if jpeg:
                (folder / JPEGS_PART).mkdir(exist_ok=True)
                blocks = _save_jpegs(files, blocks, cut.quality)
            _write_pack(pack, barcodes, xy_px, blocks, cut.size, order)
            (folder / RECORD).unlink(missing_ok=True)  # no record stands beside files of two runs
            for old in folder.glob("*.jpeg"):
                old.unlink()
            if jpeg:  # os.rename: a Path for each of some thousand files takes longer than moving it
                for file, final in zip(files, tile_files(folder, barcodes[order]), strict=True):
                    os.rename(file, final)  # noqa: PTH104
        write_record(folder / RECORD, asdict(cut) | about)
    finally:
        shutil.rmtree(folder / JPEGS_PART, ignore_errors=True)
        with suppress(OSError):  # not empty
            folder.rmdir()


def _save_jpegs(files: list[str], blocks: Iterable[np.ndarray], quality: int) -> Iterator[np.ndarray]:
    """Pass blocks (n, Z, Z, 3) on while their tiles are saved."""

    def save(names: list[str], part: np.ndarray) -> None:
        for name, tile in zip(names, part, strict=True):
            Image.fromarray(tile).save(name, "JPEG", quality=quality)

    done = 0
    with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
        for block in blocks:
            starts = range(0, len(block), AT_A_TIME)
            names = [files[done + start : done + min(start + AT_A_TIME, len(block))] for start in starts]
            saved = pool.map(save, names, [block[start : start + AT_A_TIME] for start in starts])
            done += len(block)
            yield block
            deque(saved, maxlen=0)  # raises what a thread raised


# ---- the pack


Version = tuple[int, int, int]  # a file that was replaced or changed has another one


def _version(status: os.stat_result) -> Version:
    return status.st_ino, status.st_size, status.st_mtime_ns


@lru_cache(OPEN_PACKS)
def _open_pack(path: Path, version: Version) -> IO[bytes]:
    """A pack as TilePack found it. Python closes what falls out of the cache once nobody reads it."""
    file = path.open("rb", buffering=0)
    if _version(os.fstat(file.fileno())) != version:
        file.close()
        raise ValueError(f"{path}: expected the tiles of the start of this run, found changed ones; start it again")
    return file


class TilePack:
    """The packed tiles of one slice: uint8 (S, Z, Z, 3) read by row, by any process.

    It holds 8 bytes a spot, the places of the tiles in the file, and no open file: memory and open files of a process
    do not grow with the slices that it reads.
    """

    def __init__(self, folder: Path):
        import h5py

        self.folder, self.path = folder, folder / PACK
        record = read_record(folder)
        if record is None or not self.path.exists():
            raise ValueError(
                f"{folder}: expected {RECORD} and {PACK}, found none; run image_tilling.py, or give the folder of "
                "tiles with --tiles"
            )
        self.record: dict[str, Any] = record
        try:
            self._version = _version(self.path.stat())
            with h5py.File(self.path) as file:
                img, n_spots = file["img"], len(file["barcode"])
                self.size = int(img.shape[1])
                if img.chunks != (1, *img.shape[1:]) or img.id.get_create_plist().get_nfilters():
                    raise ValueError(f"chunks {img.chunks} or a filter instead of plain chunks of one tile")
                if not len(img) == n_spots == len(file["coords"]) == img.id.get_num_chunks():
                    raise ValueError(f"{img.id.get_num_chunks()} tiles of {n_spots} spots")
                self._places = np.empty(n_spots, np.int64)
                img.id.chunk_iter(self._note_place)
        except (OSError, KeyError, ValueError) as error:
            raise ValueError(
                f"{self.path}: expected packed tiles, found {error}; run image_tilling.py again"
            ) from error

    def _note_place(self, chunk: Any) -> None:
        """The byte of the file that a tile begins at."""
        self._places[chunk.chunk_offset[0]] = chunk.byte_offset

    @property
    def barcodes(self) -> np.ndarray:
        """(S,) str, read anew each time."""
        return self._read_columns()[0]

    @property
    def coords(self) -> np.ndarray:
        """(S, 2) centres in full-resolution pixels, read anew each time."""
        return self._read_columns()[1]

    def _read_columns(self) -> tuple[np.ndarray, np.ndarray]:
        import h5py

        _open_pack(self.path, self._version)  # raises where it has changed
        with h5py.File(self.path) as file:
            return file["barcode"].asstr()[:], file["coords"][:]

    @property
    def content(self) -> str:
        """Identifies the pixels by what they were cut from: image and cut by the record, centres, spots."""
        digest = hashlib.sha256(json.dumps(self.record, sort_keys=True).encode())
        barcodes, coords = self._read_columns()
        digest.update(np.ascontiguousarray(coords, "<f8").tobytes())
        digest.update("\n".join(barcodes).encode())
        return digest.hexdigest()

    def read(self, rows: np.ndarray) -> np.ndarray:
        """Rows (n,) in any order, repeated or not -> uint8 (n, Z, Z, 3). Raises ValueError where the file has changed
        since it was opened, or has no such row."""
        rows = np.asarray(rows)
        if ((rows < 0) | (rows >= len(self._places))).any():
            raise ValueError(
                f"{self.path}: expected rows of {len(self._places)} tiles, found {rows.min()}, {rows.max()}"
            )
        tiles, file = np.empty((len(rows), self.size * self.size * 3), np.uint8), _open_pack(self.path, self._version)
        for tile, place in zip(tiles, self._places[rows].tolist(), strict=True):
            if os.preadv(file.fileno(), [tile.data], place) < len(tile):
                raise ValueError(f"{self.path}: expected packed tiles, found its end; run image_tilling.py again")
        return tiles.reshape(-1, self.size, self.size, 3)


def write_pack(folder: Path, barcodes: np.ndarray, xy_px: np.ndarray, tiles: Iterable[np.ndarray], size: int) -> None:
    """Write a pack as img, coords, barcode (HEST's names).

    Parameters
    ----------
    barcodes, xy_px : (S,) and (S, 2), centres in full-resolution pixels
    tiles : blocks (n, Z, Z, 3) uint8 in the order of the barcodes
    size : Z
    """
    with whole_file(folder / PACK) as part:
        _write_pack(part, barcodes, xy_px, tiles, size, np.arange(len(barcodes)))


def _write_pack(
    path: Path, barcodes: np.ndarray, xy_px: np.ndarray, blocks: Iterable[np.ndarray], size: int, order: np.ndarray
) -> None:
    """`blocks` come in `order`: each tile is written to its row."""
    import h5py

    rows = iter(order.tolist())
    with h5py.File(path, "w") as file:
        img = file.create_dataset("img", (len(barcodes), size, size, 3), "uint8", chunks=(1, size, size, 3))
        for block in blocks:
            for tile in block:
                img.id.write_direct_chunk((next(rows), 0, 0, 0), tile.tobytes())
        file["coords"] = xy_px
        file.create_dataset("barcode", data=barcodes.astype(object), dtype=h5py.string_dtype())
