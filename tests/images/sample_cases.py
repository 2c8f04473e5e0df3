"""What the samples of a pixel mean: depth, palette, CMYK, grey, alpha, further channels, tiles left out."""

from __future__ import annotations

import copy
import struct
import zlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import imagecodecs
import numpy as np
import tifffile
from image_cases import HEIGHT, LOSSY, TILED, WIDTH, add, expect_grey, grey, planes, tag, tiff, wrapped
from PIL import Image
from tiff_cases import BLACK, CYX, JPEG, SEPARATE

# ---- more than 8 bits


def deep(write: Callable, bits: int, fill: bool = True, **how: Any) -> Callable:
    """Values of so many bits, of which the low ones say nothing, in 16."""

    def write_deep(path: Path, pixels: np.ndarray) -> None:
        low = np.arange(pixels.size, dtype=np.uint16).reshape(pixels.shape) % 2 ** (bits - 8) if fill else 0
        write(path, (pixels.astype(np.uint16) << (bits - 8)) + low, **how)

    return write_deep


ROW = "more than 8 bits per channel"
for bits in (10, 12, 14, 16):
    what = f"16 bits per channel read as {bits} "
    add(ROW, f"tiff {bits} bits", "a.tif", deep(tiff, bits), notes=what)
    add(ROW, f"tiff {bits} bits big endian deflate", "a.tif",
        deep(tiff, bits, byteorder=">", compression="zlib", predictor=True), notes=what)  # fmt: skip
    add(ROW, f"planar {bits} bits", "a.tif", deep(planes, bits, **SEPARATE, **TILED), notes=what)
    add(ROW, f"ome planes {bits} bits", "a.ome.tif", deep(planes, bits, **CYX), notes=what)
    add(ROW, f"png {bits} bits", "a.png", deep(lambda path, p: path.write_bytes(png(p)), bits), notes=what)
    for kind in ("jp2", "j2k"):
        add(ROW, f"{kind} {bits} bits", "a.jp2", deep(lambda path, p, kind=kind: jpeg_2000(path, p, kind), bits),
            notes=what)  # fmt: skip


def large_bits(path: Path, pixels: np.ndarray) -> np.ndarray:
    """8 bits in 16."""
    tiff(path, pixels.astype(np.uint16))
    return pixels


add(ROW, "tiff 8 bits in 16", "a.tif", large_bits, notes="16 bits per channel read as 8 (largest value 250)")


def dark(pixels: np.ndarray) -> np.ndarray:
    return pixels // 5


def stated(write: Callable, shift: int, **how: Any) -> Callable:
    """Dark pixels, whose largest value needs fewer bits than the file states."""

    def write_stated(path: Path, pixels: np.ndarray) -> np.ndarray:
        write(path, dark(pixels).astype(np.uint16) << shift, **how)
        return dark(pixels)

    return write_stated


add(ROW, "MaxSampleValue", "a.tif", stated(tiff, 4, **tag(281, (4095,) * 3, count=3)),
    notes="read as 12 by MaxSampleValue (largest value 800)")  # fmt: skip
add(ROW, "MaxSampleValue of one more", "a.tif", stated(tiff, 4, **tag(281, (4096,) * 3, count=3)),
    notes="read as 12 by MaxSampleValue (largest value 800)")  # fmt: skip
BITS_12 = {"ome": True, "metadata": {"axes": "YXS", "SignificantBits": 12}}
add(ROW, "SignificantBits", "a.ome.tif", stated(tiff, 4, **BITS_12),
    notes="read as 12 by SignificantBits (largest value 800)")  # fmt: skip
SBIT = b"\x0c\x0c\x0c"
add(ROW, "sBIT", "a.png", stated(lambda path, p: path.write_bytes(png(p, sBIT=SBIT)), 4),
    notes="read as 12 by sBIT (largest value 800)")  # fmt: skip


def scaled_png(path: Path, pixels: np.ndarray) -> None:
    """12 bits scaled up to 16 by copies of the high bits, as the PNG standard asks."""
    twelve = pixels.astype(np.uint16) << 4
    path.write_bytes(png((twelve << 4) | (twelve >> 8), sBIT=SBIT))


add(ROW, "sBIT scaled", "a.png", scaled_png, notes="sBIT 12, scaled up to 16 as PNG asks")
add(ROW, "above MaxSampleValue", "a.tif", deep(tiff, 12, **tag(281, (1023,) * 3, count=3)),
    refused="expected values below 1,024 (10 bits by MaxSampleValue), found")  # fmt: skip
BITS_10 = {"ome": True, "metadata": {"axes": "YXS", "SignificantBits": 10}}
add(ROW, "above SignificantBits", "a.ome.tif", deep(tiff, 12, **BITS_10),
    refused="expected values below 1,024 (10 bits by SignificantBits), found")  # fmt: skip
add(ROW, "above sBIT", "a.png", deep(lambda path, p: path.write_bytes(png(p, sBIT=b"\x0a\x0a\x0a")), 12),
    refused="expected values below 1,024 (10 bits by sBIT), found")  # fmt: skip
add(ROW, "tiff 16 bits grey", "a.tif", expect_grey(lambda path, p: tiff(path, p.astype(np.uint16) << 4, **BLACK)),
    notes="read as 12")  # fmt: skip
add(ROW, "png 16 bits grey", "a.png", expect_grey(lambda path, p: path.write_bytes(png(p.astype(np.uint16) << 4))),
    notes="read as 12")  # fmt: skip


def png(stored: np.ndarray, **chunks: bytes) -> bytes:
    """PNG of 8 or 16 bits, grey, grey and alpha, RGB or RGBA, with further chunks before the pixels."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    stored = np.atleast_3d(stored)
    bits, kind = stored.dtype.itemsize * 8, {1: 0, 2: 4, 3: 2, 4: 6}[stored.shape[2]]
    head = struct.pack(">IIBBBBB", stored.shape[1], stored.shape[0], bits, kind, 0, 0, 0)
    rows = b"".join(b"\0" + row.astype(">u2" if bits == 16 else "u1").tobytes() for row in stored)
    extra = b"".join(chunk(name.encode(), data) for name, data in chunks.items())
    parts = chunk(b"IHDR", head) + extra + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + parts


def jpeg_2000(path: Path, stored: np.ndarray, kind: str = "jp2") -> None:
    path.write_bytes(imagecodecs.jpeg2k_encode(stored, level=0, reversible=True, codecformat=kind))


# ---- colours

ROW = "palette"


def few_colours(pixels: np.ndarray) -> Image.Image:
    return Image.fromarray(pixels).quantize(200)


def palette(path: Path, pixels: np.ndarray, **how: Any) -> np.ndarray:
    image = few_colours(pixels)
    image.save(path, **how)
    return np.asarray(image.convert("RGB"))


def palette_tiff(path: Path, pixels: np.ndarray, factor: int = 257, **how: Any) -> np.ndarray:
    image = few_colours(pixels)
    table = np.zeros((3, 256), np.uint16)
    table[:, :200] = np.asarray(image.getpalette()[:600], np.uint16).reshape(-1, 3).T * factor
    tifffile.imwrite(path, np.asarray(image), photometric="palette", colormap=table, metadata=None, **how)
    return np.asarray(image.convert("RGB"))


def palette_transparent(path: Path, pixels: np.ndarray) -> np.ndarray:
    """tRNS: two of the palette's colours are transparent, one half so."""
    image = few_colours(pixels)
    alpha = np.full(256, 255)
    alpha[[3, 7, 11]] = 0, 0, 128
    image.save(path, transparency=bytes(alpha.astype(np.uint8)))
    opacity = alpha[np.asarray(image)][..., None] / 255
    return np.round(np.asarray(image.convert("RGB")) * opacity + 255 * (1 - opacity)).astype(np.uint8)


add(ROW, "palette png", "a.png", palette)
add(ROW, "palette png tRNS", "a.png", palette_transparent, within=1)
add(ROW, "palette tiff", "a.tif", palette_tiff)
add(ROW, "palette tiff lzw tiles", "a.tif", partial(palette_tiff, compression="lzw", **TILED))
add(ROW, "palette tiff of 8 bits", "a.tif", partial(palette_tiff, factor=1))
add(ROW, "palette tiff by Pillow", "a.tif", palette)


def palette_1_bit(path: Path, pixels: np.ndarray) -> np.ndarray:
    """Two colours, purple and pink."""
    colours = np.array([[90, 60, 140], [240, 200, 220]], np.uint8)
    on = grey(pixels) > 150
    tiff(path, on, **BLACK, extratags=[(320, 3, 6, tuple(int(value) * 257 for value in colours.T.ravel()), True)])
    with tifffile.TiffFile(path, mode="r+") as file:
        file.pages.first.tags[262].overwrite(3)
    return colours[on.astype(int)]


add(ROW, "palette tiff of 1 bit", "a.tif", palette_1_bit)

ROW = "CMYK"


def inks(pixels: np.ndarray) -> np.ndarray:
    """Cyan, magenta, yellow and black: (h, w, 4) uint8."""
    return np.asarray(Image.fromarray(pixels).convert("CMYK"))


add(ROW, "cmyk tiff", "a.tif", wrapped(partial(tiff, photometric="separated"), inks))
add(ROW, "cmyk tiff tiles", "a.tif", wrapped(partial(tiff, photometric="separated", compression="lzw", **TILED), inks))


def cmyk_jpeg(path: Path, pixels: np.ndarray) -> None:
    Image.fromarray(pixels).convert("CMYK").save(path, quality=98, subsampling=0)


add(ROW, "cmyk jpeg, Adobe's", "a.jpg", cmyk_jpeg, within=LOSSY)


def cmyk_jpeg_unmarked(path: Path, pixels: np.ndarray) -> None:
    cmyk_jpeg(path, pixels)
    data = path.read_bytes()
    start = data.index(b"\xff\xee")
    size = struct.unpack_from(">H", data, start + 2)[0]
    path.write_bytes(data[:start] + data[start + 2 + size :])


add(ROW, "cmyk jpeg without marker", "a.jpg", cmyk_jpeg_unmarked, refused="does not state whether it is inverted")

ROW = "grey, 1 to 8 bits"
add(ROW, "grey tiff", "a.tif", expect_grey(partial(tiff, **BLACK)))
add(ROW, "grey png", "a.png", expect_grey(lambda path, p: Image.fromarray(p).save(path)))
add(ROW, "grey jpeg", "a.jpg", expect_grey(lambda path, p: Image.fromarray(p).save(path, quality=98)), within=LOSSY)
WHITE = {"photometric": "miniswhite"}
add(ROW, "min is white", "a.tif", expect_grey(lambda path, p: tiff(path, 255 - p, **WHITE)))
add(ROW, "min is white tiles", "a.tif", expect_grey(lambda path, p: tiff(path, 255 - p, **WHITE, **TILED)))
MAX_12 = tag(281, 4095)
add(ROW, "min is white, 12 bits stated", "a.tif",
    expect_grey(lambda path, p: tiff(path, (255 - p).astype(np.uint16) << 4, **WHITE, **MAX_12)),
    notes="12 by MaxSampleValue")  # fmt: skip
add(ROW, "min is white, 16 bits", "a.tif",
    expect_grey(lambda path, p: tiff(path, (255 - p).astype(np.uint16) << 4, **WHITE)),
    refused="expected the depth of 16-bit samples of which zero is white")  # fmt: skip


def one_bit(path: Path, pixels: np.ndarray, inverted: bool = False, **how: Any) -> np.ndarray:
    on = grey(pixels) > 150
    tiff(path, ~on if inverted else on, **({"photometric": "miniswhite"} if inverted else BLACK), **how)
    return np.repeat(np.where(on, 255, 0).astype(np.uint8)[..., None], 3, -1)


add(ROW, "1 bit tiff", "a.tif", one_bit)
add(ROW, "1 bit tiff, min is white, deflate", "a.tif", partial(one_bit, inverted=True, compression="zlib"))


def few_bits(path: Path, pixels: np.ndarray, bits: int) -> np.ndarray:
    """TIFF of 2 or 4 bits: one of 8 bits whose bytes hold several values each."""
    values = grey(pixels) >> (8 - bits)
    packed = packed_bits(values, bits)
    tiff(path, packed, **BLACK)
    with tifffile.TiffFile(path, mode="r+") as file:
        tags = file.pages.first.tags
        tags[256].overwrite(WIDTH), tags[258].overwrite(bits)
    return np.repeat((values * (255 // (2**bits - 1)))[..., None], 3, -1)


def packed_bits(values: np.ndarray, bits: int) -> np.ndarray:
    per_byte = 8 // bits
    return (values.reshape(HEIGHT, -1, per_byte) << (8 - bits * (1 + np.arange(per_byte)))).sum(-1).astype(np.uint8)


def few_bits_png(path: Path, pixels: np.ndarray, bits: int, transparent: int | None = None) -> np.ndarray:
    """PNG of 1, 2 or 4 bits, of which one value may be transparent."""
    values = grey(pixels) >> (8 - bits)
    data = png(packed_bits(values, bits), **({} if transparent is None else {"tRNS": struct.pack(">H", transparent)}))
    head = struct.pack(">IIBBBBB", WIDTH, HEIGHT, bits, 0, 0, 0, 0)
    path.write_bytes(data[:16] + head + struct.pack(">I", zlib.crc32(b"IHDR" + head)) + data[33:])
    shown = np.where(values == (-1 if transparent is None else transparent), 255, values * (255 // (2**bits - 1)))
    return np.repeat(shown.astype(np.uint8)[..., None], 3, -1)


add(ROW, "2 bits tiff", "a.tif", partial(few_bits, bits=2))
add(ROW, "4 bits tiff", "a.tif", partial(few_bits, bits=4))
for bits in (1, 2, 4):
    add(ROW, f"{bits} bits png", "a.png", partial(few_bits_png, bits=bits))
    add(ROW, f"{bits} bits png tRNS", "a.png", partial(few_bits_png, bits=bits, transparent=1))

# ---- transparency

ROW = "alpha"


def clear() -> np.ndarray:
    """Opacity: none to the left, all of it to the right, half between: (h, w) uint8."""
    column = np.select([np.arange(WIDTH) < 60, np.arange(WIDTH) < 90], [0, 128], 255)
    return np.tile(column, (HEIGHT, 1)).astype(np.uint8)


def shown(pixels: np.ndarray) -> np.ndarray:
    opacity = clear()[..., None] / 255
    return np.round(pixels * opacity + 255 * (1 - opacity)).astype(np.uint8)


def with_alpha(write: Callable, premultiplied: bool = False, depth: int = 8, **how: Any) -> Callable:
    """A writer of RGBA, whose pixels are black where they are transparent."""

    def write_alpha(path: Path, pixels: np.ndarray) -> np.ndarray:
        colours = np.where(clear()[..., None] > 0, pixels, 0)
        if premultiplied:
            colours = np.round(pixels * (clear()[..., None] / 255)).astype(np.uint8)
        stored = np.dstack([colours, clear()])
        if depth > 8:
            stored = stored.astype(np.uint16) << (depth - 8)
            stored[..., 3] |= stored[..., 3] >> 8
        write(path, stored, **how)
        return shown(pixels)

    return write_alpha


def grey_alpha(write: Callable, **how: Any) -> Callable:
    def write_grey(path: Path, pixels: np.ndarray) -> np.ndarray:
        write(path, np.dstack([np.where(clear() > 0, grey(pixels), 0), clear()]), **how)
        return np.repeat(shown(pixels)[..., :1], 3, -1)

    return write_grey


def pillow(path: Path, stored: np.ndarray, **how: Any) -> None:
    Image.fromarray(stored).save(path, **how)


UNASSOCIATED, PREMULTIPLIED = {"extrasamples": ["unassalpha"]}, {"extrasamples": ["assocalpha"]}
add(ROW, "rgba tiff", "a.tif", with_alpha(tiff, **UNASSOCIATED), within=1)
add(ROW, "rgba tiff premultiplied", "a.tif", with_alpha(tiff, premultiplied=True, **PREMULTIPLIED), within=1)
add(ROW, "rgba tiff tiles", "a.tif", with_alpha(tiff, **UNASSOCIATED, compression="zlib", **TILED), within=1)
add(ROW, "rgba tiff 16 bits", "a.tif", with_alpha(tiff, depth=16, **UNASSOCIATED), within=1, notes="read as 16")
add(ROW, "rgba tiff planar", "a.tif", with_alpha(planes, **UNASSOCIATED, planarconfig="separate"), within=1)
add(ROW, "rgba png", "a.png", with_alpha(pillow), within=1)
add(ROW, "rgba png 16 bits", "a.png", with_alpha(lambda path, p: path.write_bytes(png(p)), depth=16), within=1,
    notes="read as 16")  # fmt: skip
add(ROW, "rgba webp", "a.webp", with_alpha(pillow, lossless=True, exact=True), within=1)
add(ROW, "rgba jp2", "a.jp2", with_alpha(pillow, irreversible=False), within=1)
add(ROW, "rgba webp tiff", "a.tif", with_alpha(tiff, **UNASSOCIATED, compression="webp", tile=(64, 64),
    compressionargs={"lossless": True}), within=LOSSY)  # fmt: skip
add(ROW, "grey alpha png", "a.png", grey_alpha(pillow), within=1)
add(ROW, "grey alpha tiff", "a.tif", grey_alpha(tiff, **BLACK, planarconfig="contig", **UNASSOCIATED), within=1)


def deep_colours_alpha(path: Path, pixels: np.ndarray) -> np.ndarray:
    """Colours of 12 bits, opacity of 16."""
    stored = np.dstack([np.where(clear()[..., None] > 0, pixels, 0).astype(np.uint16) << 4, clear() * np.uint16(257)])
    tiff(path, stored, **UNASSOCIATED)
    return shown(pixels)


add(ROW, "rgb of 12 bits, alpha of 16", "a.tif", deep_colours_alpha, within=1, notes="read as 12")


def transparent_colour(path: Path, pixels: np.ndarray, deep: bool = False) -> np.ndarray:
    """tRNS: one colour is transparent."""
    key = pixels[40, 50]
    stored = pixels.astype(np.uint16) * 257 if deep else pixels
    path.write_bytes(png(stored, tRNS=struct.pack(">3H", *(int(value) * (257 if deep else 1) for value in key))))
    return np.where((pixels == key).all(-1, keepdims=True), 255, pixels).astype(np.uint8)


add(ROW, "png tRNS", "a.png", transparent_colour)
add(ROW, "png tRNS 16 bits", "a.png", partial(transparent_colour, deep=True), notes="read as 16")


def fifth_channel(path: Path, pixels: np.ndarray, extras: list[str]) -> np.ndarray:
    spare = [np.full((HEIGHT, WIDTH), 77, np.uint8)] * len(extras)
    tiff(path, np.dstack([pixels, *spare]), extrasamples=extras)
    return pixels


ROW = "further channels of no stated meaning"
add(ROW, "unspecified", "a.tif", partial(fifth_channel, extras=["unspecified"]), notes="further channel of no stated")

ROW = "tiles that the file leaves out"


def left_out(
    path: Path, pixels: np.ndarray, side: int = 64, change: Callable = lambda pixels: pixels, **how: Any
) -> np.ndarray:
    """The tile in the second row and column is not stored."""
    stored = change(pixels)

    def blocks():
        for top in range(0, HEIGHT, side):
            for left in range(0, WIDTH, side):
                block, part = np.full((side, side, stored.shape[2]), 255), stored[top : top + side, left : left + side]
                block = block.astype(stored.dtype)
                block[: part.shape[0], : part.shape[1]] = part
                yield None if (top, left) == (side, side) else block

    how = {"photometric": "rgb", "tile": (side, side), "metadata": None} | how
    ome = how.pop("ome", False)
    with tifffile.TiffWriter(path, ome=ome) as file:
        file.write(blocks(), shape=stored.shape, dtype=stored.dtype, **copy.deepcopy(how))
    expected = pixels.copy()
    expected[side : 2 * side, side : 2 * side] = 255
    return expected


APERIO = "Aperio Image Library v11.2.1\n192x160 JPEG/RGB Q=98|AppMag = 20|MPP = 0.5"
add(ROW, "sparse tiff", "a.tif", partial(left_out, compression="zlib"))
add(ROW, "sparse ome", "a.ome.tif", partial(left_out, ome=True, metadata={"axes": "YXS"}))


def opaque_16_bits(pixels: np.ndarray) -> np.ndarray:
    return np.dstack([pixels, np.full((HEIGHT, WIDTH), 255)]).astype(np.uint16) * 257


add(ROW, "sparse rgba of 16 bits", "a.tif", partial(left_out, change=opaque_16_bits, **UNASSOCIATED),
    notes="read as 16")  # fmt: skip
add(ROW, "sparse svs", "a.svs", partial(left_out, **JPEG, description=APERIO, side=32), within=LOSSY, um_per_px=0.5)
