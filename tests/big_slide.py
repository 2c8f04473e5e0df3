"""Writes a pyramidal TIFF of any size from a few encoded tiles: 40,000 x 40,000 pixels are a file of a few megabytes.

    write_big_slide(Path("big.tif"))      # tissue-like ellipse on glass, levels of 1, 4, 16 and 64

A tile that occurs again is stored once and pointed to again, which a TIFF may do and libraries that write them do not:
hence the plain writer below. Readers decode every tile as if it stood alone. Letters: T tile side, n tiles to a side.
"""

from __future__ import annotations

import io
import math
import struct
from pathlib import Path

import numpy as np
from PIL import Image
from scipy.ndimage import gaussian_filter

GLASS = 0  # kind of a tile; 1 to 4 are kinds of tissue, in a pattern of two by two
SHORT, LONG, RATIONAL = 3, 4, 5


def paint_kinds(tile: int, seed: int) -> np.ndarray:
    """Pixels of glass and of four kinds of tissue, grainy as a scan is: uint8 (5, T, T, 3)."""
    rng = np.random.default_rng(seed)
    kinds = [rng.normal(243, 1.5, (tile, tile, 3))]
    for strength in (0.6, 0.8, 1.0, 1.2):
        nuclei = gaussian_filter(rng.normal(size=(tile, tile)), 4, mode="wrap")
        fibres = gaussian_filter(rng.normal(size=(tile, tile)), (2, 12), mode="wrap")
        haematoxylin = 1.4 * (nuclei > 1.0 * nuclei.std()) + 0.1
        eosin = strength * (0.5 + 0.2 * fibres / fibres.std())
        density = haematoxylin[..., None] * [0.65, 0.70, 0.29] + eosin[..., None] * [0.07, 0.99, 0.11]
        kinds.append(
            243 * np.exp(-gaussian_filter(density, (1, 1, 0), mode="wrap")) + rng.normal(0, 4, (tile, tile, 3))
        )
    return np.clip(np.round(kinds), 0, 255).astype(np.uint8)


def lay_kinds(side: int, tile: int) -> np.ndarray:
    """Which kind each tile of level 0 is: (n, n), tissue where the tile's middle is in a disc of 0.84 of the side."""
    n = math.ceil(side / tile)
    middle = (np.arange(n) + 0.5) * tile - side / 2
    tissue = middle[:, None] ** 2 + middle**2 < (0.42 * side) ** 2
    pattern = 1 + np.arange(n) % 2 + 2 * (np.arange(n)[:, None] % 2)
    return np.where(tissue, pattern, GLASS)


def write_big_slide(
    path: Path,
    side: int = 40_000,
    tile: int = 512,
    um_per_px: float = 0.25,
    seed: int = 0,
    shrink: tuple = (1, 4, 16, 64),
    jpeg: bool = True,
) -> None:
    """A square slide of `side` pixels, in JPEG or uncompressed; each of `shrink` must divide it and the tile's side."""
    images, laid = [Image.fromarray(kind) for kind in paint_kinds(tile, seed)], lay_kinds(side, tile)
    with path.open("wb") as file:
        file.write(b"II*\0" + bytes(4))
        link = 4  # where the place of the next directory goes
        for factor in shrink:
            small = [kind.reduce(factor) for kind in images]
            n = math.ceil(side / factor / tile)
            padded = np.full((n * factor, n * factor), GLASS)
            padded[: len(laid), : len(laid)] = laid
            known: dict[bytes, tuple[int, int]] = {}
            places = []
            for row, col in np.ndindex(n, n):
                part = padded[row * factor : (row + 1) * factor, col * factor : (col + 1) * factor]
                key = part.tobytes()
                if key not in known:
                    data = _encode(small, part, tile, jpeg)
                    known[key] = file.tell(), len(data)
                    file.write(data)
                places.append(known[key])
            link = _write_directory(file, link, side // factor, tile, um_per_px * factor, factor > 1, places, jpeg)


def _encode(small: list[Image.Image], part: np.ndarray, tile: int, jpeg: bool) -> bytes:
    """A tile put together from shrunk ones."""
    image, step = Image.new("RGB", (tile, tile)), small[0].width
    for (row, col), kind in np.ndenumerate(part):
        image.paste(small[kind], (col * step, row * step))
    if not jpeg:
        return image.tobytes()
    out = io.BytesIO()
    image.save(out, "JPEG", quality=80)
    return out.getvalue()


def _write_directory(
    file, link: int, side: int, tile: int, um_per_px: float, reduced: bool, places: list, jpeg: bool
) -> int:
    """One page (TIFF 6.0, sections 2, 15 and 22); gives where the next one's place goes."""
    offsets, sizes = zip(*places, strict=True)
    per_cm = (round(1e4 / um_per_px), 1)
    compression, colours, sampling = (7, 6, 2) if jpeg else (1, 2, 1)
    tags = [
        (254, LONG, [int(reduced)]), (256, LONG, [side]), (257, LONG, [side]), (258, SHORT, [8, 8, 8]),
        (259, SHORT, [compression]), (262, SHORT, [colours]), (277, SHORT, [3]), (282, RATIONAL, per_cm),
        (283, RATIONAL, per_cm), (296, SHORT, [3]), (322, LONG, [tile]), (323, LONG, [tile]), (324, LONG, offsets),
        (325, LONG, sizes), (530, SHORT, [sampling, sampling]),
    ]  # fmt: skip
    entries = []
    for tag, kind, values in tags:
        data = struct.pack(f"<{len(values)}{'H' if kind == SHORT else 'I'}", *values)
        if len(data) > 4:
            file.write(bytes(file.tell() % 2))
            place = struct.pack("<I", file.tell())
            file.write(data)
            data = place
        entries.append(
            struct.pack("<HHI", tag, kind, len(values) // (2 if kind == RATIONAL else 1)) + data.ljust(4, b"\0")
        )
    file.write(bytes(file.tell() % 2))
    start = file.tell()
    file.write(struct.pack("<H", len(entries)) + b"".join(entries) + bytes(4))
    end = file.tell()
    file.seek(link)
    file.write(struct.pack("<I", start))
    file.seek(end)
    return end - 4
