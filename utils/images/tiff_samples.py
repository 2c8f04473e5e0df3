"""What the samples of a TIFF page mean: colours, alpha, depth; and what cannot be read as it is meant.

TIFF 6.0 (Adobe, 1992). `key` is a tifffile.TiffPage, the one whose tags hold for all pages of a series.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from utils.images.samples import Samples
from utils.words import count_of

# Photometric interpretations, compressions, extra samples and a tag
WHITE_IS_ZERO, BLACK_IS_ZERO, RGB, PALETTE, MASK, CMYK, YCBCR = 0, 1, 2, 3, 4, 5, 6
OLD_JPEG, JPEGS, APERIO_YCC = 6, (7, 33007, 34892), 33003
PREMULTIPLIED, UNASSOCIATED = 1, 2
INK_SET = 332
TO_RGB = "convert it to 8-bit RGB"


def channel_samples(key: Any, n_planes: int, order: list[int] | str) -> tuple[Samples | None, str]:
    """Of planes that are a channel each."""
    wanted = "expected red, green and blue, or grey"
    if isinstance(order, str):
        return None, f"{wanted}, found channels {order}; {TO_RGB}, or name the channels Red, Green and Blue"
    order = order or [0, 1, 2]
    is_single = key.samplesperpixel == 1 and key.photometric == BLACK_IS_ZERO
    if not is_single or len(order) != n_planes or sorted(order) not in ([0, 1, 2], [0, 1, 2, 3]):
        return None, f"{wanted}, found {n_planes} channels; {TO_RGB}"
    places = [order.index(primary) for primary in range(n_planes)]
    return plain_samples(key, "rgb", tuple(places[:3]), places[3] if n_planes == 4 else None)


def page_samples(key: Any) -> tuple[Samples | None, str, tuple[str, ...]]:
    """Of one page: its samples, or what about them cannot be read, and notes."""
    problem = _unreadable(key)
    if problem:
        return None, problem, ()
    n, extras = int(key.samplesperpixel), [int(value) for value in key.extrasamples]
    first = n - len(extras)
    alpha = next((first + i for i, value in enumerate(extras) if value in (PREMULTIPLIED, UNASSOCIATED)), None)
    premultiplied = alpha is not None and extras[alpha - first] == PREMULTIPLIED
    kind = {RGB: "rgb", YCBCR: "rgb", CMYK: "cmyk", PALETTE: "palette", WHITE_IS_ZERO: "inverted"}
    found = kind.get(key.photometric, "grey")
    n_colours = {"rgb": 3, "cmyk": 4}.get(found, 1)
    spare = n - n_colours - (alpha is not None)
    notes: tuple[str, ...] = ()
    if found == "grey" and spare == 2 and alpha in (None, 3):  # written by programs that state no colours
        found, n_colours, spare = "rgb", 3, 0
        notes = ("three samples without stated colours read as red, green, blue",)
    if spare < 0 or (n_colours == 1 and spare):
        return None, f"expected grey or RGB, and alpha where the file states it, found {n} channels; {TO_RGB}", ()
    if spare:
        notes = (*notes, f"{count_of(spare, 'further channel')} of no stated meaning ignored")
    samples, problem = plain_samples(key, found, tuple(range(n_colours)), alpha, premultiplied)
    return samples, problem, notes


def _unreadable(key: Any) -> str:
    """What about colours and compression of a page cannot be read."""
    photometric = getattr(key.photometric, "name", key.photometric)
    if key.photometric not in (WHITE_IS_ZERO, BLACK_IS_ZERO, RGB, PALETTE, CMYK, YCBCR):
        return f"expected grey or RGB pixels, found colours {photometric}; {TO_RGB}"
    jpeg = key.compression in JPEGS
    if key.compression == OLD_JPEG:
        return f"expected JPEG as of TIFF 6.0's supplement 2, found old-style JPEG; {TO_RGB}"
    if key.compression == APERIO_YCC and int(key.samplesperpixel) > 1:  # whatever its photometric tag states
        return f"expected JPEG 2000 of RGB samples, found Aperio's of YCbCr without its description; {TO_RGB}"
    if key.photometric == YCBCR and (not jpeg or key.planarconfig != 1 or key.extrasamples):
        how = getattr(key.compression, "name", key.compression)
        return f"expected YCbCr in JPEG, found it with compression {how} or in planes; {TO_RGB}"
    if key.photometric == CMYK and (jpeg or key.tags.valueof(INK_SET, 1) != 1):
        return f"expected CMYK inks without JPEG compression, found others; {TO_RGB}"
    if max(int(key.imagedepth), int(key.tiledepth or 1)) > 1:
        return f"expected a plane, found a volume {key.imagedepth} planes deep; {TO_RGB}"
    return ""


def plain_samples(
    key: Any, kind: str, colours: tuple[int, ...], alpha: int | None = None, premultiplied: bool = False
) -> tuple[Samples | None, str]:
    """Samples of the page's bits, where these can be read."""
    bits, dtype = key.bitspersample, key.dtype
    if dtype is None or isinstance(bits, tuple) or dtype.kind not in "ub" or dtype.itemsize > 2:
        kinds = {"f": "floating-point", "i": "signed", "c": "complex"}
        found = f"{kinds.get(dtype.kind if dtype is not None else '', 'unsigned')} samples of {bits} bits"
        return None, f"expected unsigned samples of up to 16 bits, found {found}; {TO_RGB}"
    palette = None
    if kind == "palette":
        table = key.colormap
        if table is None:
            return None, f"expected a colour map, found none; {TO_RGB}"
        palette = np.asarray(table).reshape(3, -1).T  # 16 bits; some writers use 8 of them
        palette = (palette >> 8 if palette.max(initial=0) > 255 else palette).astype(np.uint8)
    return Samples(kind, colours, alpha, premultiplied, int(bits), palette=palette), ""
