"""Files of every format that utils.images.image reads or refuses, written from one RGB array.

CASES: name of a case -> Case. A writer takes a path and the pixels (h, w, 3) uint8, and gives what must be read of them
where that is not the pixels themselves.
"""

from __future__ import annotations

import copy
import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import imagecodecs
import numpy as np
import tifffile
from PIL import Image

HEIGHT, WIDTH = 160, 192
EXACT, LOSSY = 0, 3  # of 255
TILED, WHOLE_TILES = {"tile": (64, 80)}, {"tile": (32, 64)}  # JPEG blurs the padding of tiles that are cut off
NAMES = {"axes": "CYX", "Channel": {"Name": ["Red", "Green", "Blue"]}}


@dataclass(frozen=True)
class Case:
    """A file: its name, how it is written, and how far its pixels may be off or what its refusal holds.

    `row` is the first cell of the line of docs/images.md that it belongs to; `notes` what one of the notes must hold.
    """

    row: str
    file: str
    write: Callable[[Path, np.ndarray], Any]
    within: int = EXACT
    refused: str = ""
    notes: str = ""
    um_per_px: float | None = None


CASES: dict[str, Case] = {}


def coded() -> np.ndarray:
    """Smooth, different in every channel, no symmetry, and bright as glass in places: (h, w, 3) uint8."""
    y, x = np.mgrid[:HEIGHT, :WIDTH]
    ramps = [250 - 0.9 * x, 60 + y, 120 + 0.4 * x + 0.3 * y]
    return np.stack(ramps, -1).round().astype(np.uint8)


def add(row: str, name: str, file: str, write: Callable, **how: Any) -> None:
    assert name not in CASES, name
    CASES[name] = Case(row, file, write, **how)


def tiff(path: Path, pixels: np.ndarray, **how: Any) -> None:
    how = {"photometric": "rgb", "metadata": None} | how
    tifffile.imwrite(path, pixels, **copy.deepcopy(how))  # it writes into the arguments of a codec


def planes(path: Path, pixels: np.ndarray, **how: Any) -> None:
    """Channels as planes (3, h, w)."""
    tiff(path, np.moveaxis(pixels, -1, 0), **how)


def tag(code: int, value: Any, kind: int = 3, count: int = 1) -> dict[str, Any]:
    return {"extratags": [(code, kind, count, value, True)]}


def wrapped(write: Callable, change: Callable) -> Callable:
    """A writer of changed pixels, of which the unchanged ones are expected."""

    def write_changed(path: Path, pixels: np.ndarray) -> None:
        write(path, change(pixels))

    return write_changed


# ---- plain TIFF

ROW = "TIFF and BigTIFF, uncompressed"
for name, how in {
    "strips": {},
    "short strips": {"rowsperstrip": 7},
    "tiles": TILED,
    "big endian": {"byteorder": ">"},
    "big endian tiles": {"byteorder": ">"} | TILED,
    "bigtiff": {"bigtiff": True},
}.items():
    add(ROW, f"tiff {name}", "a.tif", partial(tiff, **how))
add(ROW, "btf", "a.btf", partial(tiff, bigtiff=True))
add(ROW, "tf8", "a.tf8", partial(tiff, bigtiff=True, **TILED))

ROW = "TIFF in LZW, Deflate, PackBits, Zstandard, LZMA"
for codec in ("lzw", "zlib", "packbits", "zstd", "lzma"):
    for order in "<>":
        for predictor in (False, True) if codec != "packbits" else (False,):
            for shape in ({"rowsperstrip": 16}, TILED):
                words = f"{codec} {order}{' predictor' if predictor else ''} {'tiles' if 'tile' in shape else 'strips'}"
                how = {"compression": codec, "predictor": predictor, "byteorder": order}
                add(ROW, f"tiff {words}", "a.tif", partial(tiff, **shape, **how))

ROW = "TIFF in JPEG"
JPEG = {"compression": "jpeg", "compressionargs": {"level": 98}}
for space in ("rgb", "ycbcr"):
    for sampling in ((1, 1), (2, 2)) if space == "ycbcr" else ((1, 1),):
        for shape in (WHOLE_TILES, {"rowsperstrip": 32}):
            args = {"compression": "jpeg", "compressionargs": {"level": 98, "outcolorspace": space}}
            words = f"{space} {sampling[0]} {'tiles' if 'tile' in shape else 'strips'}"
            how = args | shape | {"subsampling": sampling}
            add(ROW, f"tiff jpeg {words}", "a.tif", partial(tiff, **how), within=LOSSY)


def jpeg_tables(path: Path, pixels: np.ndarray) -> None:
    """Strips that share the tables of tag JPEGTables, as libtiff writes them."""
    Image.fromarray(pixels).save(path, compression="jpeg", quality=98)


add(ROW, "tiff jpeg tables", "a.tif", jpeg_tables, within=LOSSY)


def grey(pixels: np.ndarray) -> np.ndarray:
    return pixels[..., 0]


def expect_grey(write: Callable) -> Callable:
    def write_grey(path: Path, pixels: np.ndarray) -> np.ndarray:
        write(path, grey(pixels))
        return np.repeat(grey(pixels)[..., None], 3, -1)

    return write_grey


BLACK = {"photometric": "minisblack"}
add(ROW, "tiff jpeg grey", "a.tif", expect_grey(partial(tiff, **BLACK, **JPEG, **WHOLE_TILES)), within=LOSSY)

ROW = "TIFF in JPEG 2000, JPEG XL, WebP"
for codec, args in (("jpeg2000", {"level": 0}), ("jpegxl", {"lossless": True}), ("webp", {"lossless": True})):
    how = {"compression": codec, "compressionargs": args}
    add(ROW, f"tiff {codec}", "a.tif", partial(tiff, **how, tile=(64, 64)))
    add(ROW, f"ome {codec}", "a.ome.tif", partial(tiff, **how, tile=(64, 64), ome=True, metadata={"axes": "YXS"}))

# ---- separate planes

ROW = "TIFF, planar configuration 2"
SEPARATE = {"planarconfig": "separate"}
for name, how in {
    "strips": {},
    "short strips": {"rowsperstrip": 7},
    "tiles": TILED,
    "deflate": {"compression": "zlib", "predictor": True} | TILED,
    "lzw strips": {"compression": "lzw", "rowsperstrip": 10},
    "jpeg": JPEG | WHOLE_TILES,
    "big endian": {"byteorder": ">"},
}.items():
    add(ROW, f"planar {name}", "a.tif", partial(planes, **SEPARATE, **how), within=LOSSY if "jpeg" in name else EXACT)


def pyramid(path: Path, pixels: np.ndarray, sub: bool, planar: bool = False, **how: Any) -> None:
    """Three levels, as SubIFDs or as pages of reduced resolution."""
    levels = [pixels, pixels[::2, ::2], pixels[::4, ::4]]
    levels = [np.moveaxis(level, -1, 0) if planar else level for level in levels]
    how = {"photometric": "rgb", "tile": (32, 32)} | ({"planarconfig": "separate"} if planar else {}) | how
    metadata = how.pop("metadata", None)
    with tifffile.TiffWriter(path, ome=how.pop("ome", False)) as file:
        for number, level in enumerate(levels):
            page = {"subifds": 2} if sub and number == 0 else {}
            about = {"metadata": metadata} if number == 0 else {"subfiletype": 1}
            about = about if metadata or number else {"metadata": None}
            if number and not metadata:
                about |= {"metadata": None}
            file.write(np.ascontiguousarray(level), **page, **about, **copy.deepcopy(how))


add(ROW, "planar pyramid", "a.tif", partial(pyramid, sub=True, planar=True, compression="zlib"))

ROW = "OME-TIFF"
OME = {"ome": True, "metadata": {"axes": "YXS", "PhysicalSizeX": 0.5, "PhysicalSizeY": 0.5}}
add(ROW, "ome", "a.ome.tif", partial(tiff, **OME), um_per_px=0.5)
add(ROW, "ome tiles", "a.ome.tif", partial(tiff, **OME, **TILED, compression="zlib"), um_per_px=0.5)
add(ROW, "ome pyramid", "a.ome.tif", partial(pyramid, sub=True, ome=True, metadata={"axes": "YXS"}))
CYX = {"ome": True, "photometric": "minisblack", "metadata": {"axes": "CYX"}}
add(ROW, "ome planes", "a.ome.tif", partial(planes, **CYX))
add(ROW, "ome planes deflate", "a.ome.tif", partial(planes, **CYX, compression="zlib"))
add(ROW, "ome planes tiles", "a.ome.tif", partial(planes, **CYX, compression="lzw", **TILED))
add(ROW, "ome planar", "a.ome.tif", partial(planes, ome=True, metadata={"axes": "SYX"}, planarconfig="separate"))


def ome_planes_pyramid(path: Path, pixels: np.ndarray) -> None:
    """A page per channel, each with coarser levels of its own as SubIFDs."""
    how = {"photometric": "minisblack", "tile": (32, 32), "compression": "zlib"}
    with tifffile.TiffWriter(path, ome=True) as file:
        file.write(np.moveaxis(pixels, -1, 0), subifds=1, metadata={"axes": "CYX"}, **how)
        file.write(np.ascontiguousarray(np.moveaxis(pixels[::2, ::2], -1, 0)), subfiletype=1, **how)


add(ROW, "ome planes pyramid", "a.ome.tif", ome_planes_pyramid)


def named(path: Path, pixels: np.ndarray, names: list[str | None], order: str = "rgb", **channel: Any) -> None:
    """Planes in the order of letters of "rgb", and names for them."""
    stored = np.stack([pixels[..., "rgb".index(letter)] for letter in order])
    about = {"Channel": {"Name": names, **channel}} if names[0] is not None else {"Channel": channel}
    tiff(path, stored, ome=True, photometric="minisblack", metadata={"axes": "CYX"} | about)


add(ROW, "ome names", "a.ome.tif", partial(named, names=["Blue", "Red", "Green"], order="brg"))
add(ROW, "ome initials", "a.ome.tif", partial(named, names=["B", "G", "R"], order="bgr"))
COLOURS = [-(2**24), 16711935, 65535]  # red, green, blue as signed RGBA
COLOURS[0] = -16776961
add(ROW, "ome colours", "a.ome.tif", partial(named, names=[None], order="bgr", Color=COLOURS[::-1]))
add(ROW, "ome numbers", "a.ome.tif", partial(named, names=["Channel 0", "Channel 1", "Channel 2"]))


def ome_alpha(path: Path, pixels: np.ndarray) -> np.ndarray:
    """Four planes, of which one is named alpha."""
    alpha = np.where(np.arange(WIDTH) < 60, 0, 255).astype(np.uint8) * np.ones((HEIGHT, 1), np.uint8)
    stored = np.concatenate([alpha[None], np.moveaxis(pixels, -1, 0)])
    names = {"Channel": {"Name": ["Alpha", "Red", "Green", "Blue"]}}
    tiff(path, stored, ome=True, photometric="minisblack", metadata={"axes": "CYX"} | names)
    return np.where(alpha[..., None] > 0, pixels, 255)


add(ROW, "ome alpha", "a.ome.tif", ome_alpha)

ROW = "ImageJ hyperstack"
IJ = {"imagej": True, "photometric": "minisblack", "metadata": {"axes": "CYX"}}
add(ROW, "imagej", "a.tif", partial(planes, **IJ))
MICRON = {"resolution": (2.0, 2.0), "metadata": {"axes": "CYX", "unit": "micron"}}
add(ROW, "imagej micron", "a.tif", partial(planes, **IJ | MICRON), um_per_px=0.5)
add(ROW, "imagej rgb", "a.tif", partial(tiff, imagej=True, metadata={}))


def imagej_one_page(path: Path, pixels: np.ndarray, dtype: str = ">u1", factor: int = 1) -> None:
    """As ImageJ itself writes a large stack: one page, all planes behind it."""
    text = b"ImageJ=1.53t\nimages=3\nchannels=3\nhyperstack=true\nmode=composite\nunit=micron\n\0"
    bits = np.dtype(dtype).itemsize * 8
    per_um = struct.pack(">II", 4, 1)
    entries = [(256, 4, 1, WIDTH), (257, 4, 1, HEIGHT), (258, 3, 1, bits << 16), (259, 3, 1, 1 << 16)]
    entries += [(262, 3, 1, 1 << 16), (270, 2, len(text), 0), (273, 4, 1, 0), (277, 3, 1, 1 << 16)]
    entries += [(278, 4, 1, HEIGHT), (279, 4, 1, HEIGHT * WIDTH * bits // 8), (282, 5, 1, 0), (283, 5, 1, 0)]
    start = 8 + 2 + 12 * len(entries) + 4
    places = {270: start, 282: start + len(text), 283: start + len(text), 273: start + len(text) + 8}
    ifd = b"".join(struct.pack(">HHII", code, kind, n, places.get(code, value)) for code, kind, n, value in entries)
    head = b"MM\0*" + struct.pack(">IH", 8, len(entries)) + ifd + bytes(4)
    stored = np.moveaxis(pixels, -1, 0).astype(dtype) * factor
    path.write_bytes(head + text + per_um + stored.astype(dtype).tobytes())


add(ROW, "imagej one page", "a.tif", imagej_one_page, um_per_px=0.25)
add(ROW, "imagej one page 16 bit", "a.tif", partial(imagej_one_page, dtype=">u2", factor=16), um_per_px=0.25,
    notes="read as 12")  # fmt: skip


def imagej_tables(path: Path, pixels: np.ndarray, order: str, colours: list[tuple[int, int, int]]) -> None:
    """Channels with lookup tables."""
    stored = np.stack([pixels[..., "rgb".index(letter)] for letter in order])
    ramp = np.arange(256)
    tables = [np.stack([ramp * part // 255 for part in colour]).astype(np.uint8) for colour in colours]
    tiff(path, stored, imagej=True, photometric="minisblack", metadata={"axes": "CYX", "LUTs": tables})


PRIMARIES = {"r": (255, 0, 0), "g": (0, 255, 0), "b": (0, 0, 255)}
add(ROW, "imagej colours", "a.tif", partial(imagej_tables, order="gbr", colours=[PRIMARIES[c] for c in "gbr"]))

ROW = "TIFF described by tifffile: CYX, YXC, SYX"
add(ROW, "cyx", "a.tif", partial(planes, photometric="minisblack", metadata={"axes": "CYX"}))
how = {"photometric": "minisblack", "metadata": {"axes": "CYX"}}
add(ROW, "cyx deflate", "a.tif", partial(planes, **how, compression="zlib"))
add(ROW, "cyx one page", "a.tif", partial(planes, **how, truncate=True))
YXC = {"photometric": "minisblack", "metadata": {"axes": "YXC"}}
add(ROW, "yxc rows", "a.tif", partial(tiff, **YXC))
add(ROW, "yxc", "a.tif", partial(tiff, **YXC, planarconfig="contig"), notes="three samples without stated colours")
add(ROW, "syx", "a.tif", partial(planes, metadata={"axes": "SYX"}))

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


def left_out(path: Path, pixels: np.ndarray, side: int = 64, **how: Any) -> np.ndarray:
    """The tile in the second row and column is not stored."""

    def blocks():
        for top in range(0, HEIGHT, side):
            for left in range(0, WIDTH, side):
                block, part = np.full((side, side, 3), 255, np.uint8), pixels[top : top + side, left : left + side]
                block[: part.shape[0], : part.shape[1]] = part
                yield None if (top, left) == (side, side) else block

    how = {"photometric": "rgb", "tile": (side, side), "metadata": None} | how
    ome = how.pop("ome", False)
    with tifffile.TiffWriter(path, ome=ome) as file:
        file.write(blocks(), shape=pixels.shape, dtype=np.uint8, **copy.deepcopy(how))
    expected = pixels.copy()
    expected[side : 2 * side, side : 2 * side] = 255
    return expected


APERIO = "Aperio Image Library v11.2.1\n192x160 JPEG/RGB Q=98|AppMag = 20|MPP = 0.5"
add(ROW, "sparse tiff", "a.tif", partial(left_out, compression="zlib"))
add(ROW, "sparse ome", "a.ome.tif", partial(left_out, ome=True, metadata={"axes": "YXS"}))
add(ROW, "sparse svs", "a.svs", partial(left_out, **JPEG, description=APERIO, side=32), within=LOSSY, um_per_px=0.5)

# ---- position of the pixels, several images

ROW = "Orientation"
for value in range(2, 9):
    note = f"Orientation {value} ignored"
    add(ROW, f"tiff orientation {value}", "a.tif", partial(tiff, **tag(274, value)), notes=note)
    add(ROW, f"tiff orientation {value} lzw tiles", "a.tif",
        partial(tiff, **tag(274, value), compression="lzw", **TILED), notes=note)  # fmt: skip
    exif = Image.Exif()
    exif[274] = value
    for file, how in (("a.jpg", {"quality": 98, "subsampling": 0}), ("a.png", {}), ("a.webp", {"lossless": True})):
        add(ROW, f"{file[2:]} orientation {value}", file, partial(pillow, exif=exif, **how), notes=note,
            within=LOSSY if file == "a.jpg" else EXACT)  # fmt: skip

ROW = "several images in a TIFF"


def several(path: Path, pixels: np.ndarray, others: list[tuple[np.ndarray, dict]], first: bool, **how: Any) -> None:
    """Further images before or behind the scan."""
    scan = [(pixels, {})]
    ome = how.pop("ome", False)
    with tifffile.TiffWriter(path, ome=ome) as file:
        for image, about in others + scan if first else scan + others:
            file.write(np.ascontiguousarray(image), **({"photometric": "rgb", "metadata": None} | how | about))


SMALL, LARGE = np.full((40, 60, 3), 90, np.uint8), np.full((300, 400, 3), 90, np.uint8)
for first in (True, False):
    where = "first" if first else "last"
    note = f"image {2 if first else 1} of 2 in the file, the largest RGB one"
    add(ROW, f"small image {where}", "a.tif", partial(several, others=[(SMALL, {})], first=first), notes=note)
    for word in ("label", "Macro image", "thumbnail", "Overview", "map"):
        other = [(LARGE, {"description": word})]
        add(ROW, f"large {word} {where}", "a.tif", partial(several, others=other, first=first), notes=note)
    other = [(LARGE, {"metadata": {"axes": "YXS", "Name": "label image"}})]
    how = {"ome": True, "metadata": {"axes": "YXS", "Name": "scan"}}
    add(ROW, f"ome label {where}", "a.ome.tif", partial(several, others=other, first=first, **how), notes=note)
    other = [(LARGE, {"extratags": [(285, 2, 0, "slide_label", True)]})]
    add(ROW, f"page name {where}", "a.tif", partial(several, others=other, first=first), notes=note)
    other = [(LARGE[..., 0], {"photometric": "minisblack"})]
    add(ROW, f"large grey {where}", "a.tif", partial(several, others=other, first=first), notes=note)
    other = [(LARGE, {"description": "Aperio Image Library v12\nmacro 400x300"})]
    add(ROW, f"Aperio macro {where}", "a.tif", partial(several, others=other, first=first), notes=note)

SCANS = [(np.full((HEIGHT, WIDTH, 3), 99, np.uint8), {})]
add(ROW, "two of one size", "a.tif", partial(several, others=SCANS, first=True),
    refused="found 2 planes of equal size, 192 x 160 px (image 1, image 2)")  # fmt: skip
ome_two = {"ome": True, "metadata": {"axes": "YXS", "Name": "left"}}
NAMED = [(SCANS[0][0], {"metadata": {"axes": "YXS", "Name": "right"}})]
add(ROW, "two of one size, ome", "a.ome.tif", partial(several, others=NAMED, first=True, **ome_two),
    refused="found 2 planes of equal size, 192 x 160 px (right, left)")  # fmt: skip
add(ROW, "a label alone", "a.tif", partial(tiff, description="label"), refused="expected the scan, found no image but")


def um_of_the_scan(path: Path, pixels: np.ndarray) -> None:
    """Each image of an OME-TIFF with a pixel size of its own."""
    with tifffile.TiffWriter(path, ome=True) as file:
        for image, name, um in ((SMALL, "first", 8.0), (pixels, "second", 0.25), (SMALL[:9, :9], "third", 4.0)):
            sizes = {"PhysicalSizeX": um, "PhysicalSizeY": um}
            file.write(image, photometric="rgb", metadata={"axes": "YXS", "Name": name, **sizes})


def um_of_the_page(path: Path, pixels: np.ndarray) -> None:
    with tifffile.TiffWriter(path) as file:
        for image, per_cm in ((SMALL, 1250), (pixels, 20000)):
            how = {"resolution": (per_cm, per_cm), "resolutionunit": "CENTIMETER", "metadata": None}
            file.write(image, photometric="rgb", **how)


add(ROW, "um per px of the second, ome", "a.ome.tif", um_of_the_scan, um_per_px=0.25, notes="image 2 of 3")
add(ROW, "um per px of the second", "a.tif", um_of_the_page, um_per_px=0.5, notes="image 2 of 2")

for words in ("Overview of a section, H&E", "tissue map 3"):
    add(ROW, f"an image alone, described as {words}", "a.tif", partial(tiff, description=words))
LONE = {"ome": True, "metadata": {"axes": "YXS", "Name": "overview scan 7.ome.tif"}}
add(ROW, "an image alone, named overview scan", "a.ome.tif", partial(tiff, **LONE))
LONE = {"ome": True, "metadata": {"axes": "YXS", "Name": "Macro image"}}
add(ROW, "a macro image alone", "a.ome.tif", partial(tiff, **LONE), refused="found no image but Macro image")


def larger_sub_page(path: Path, pixels: np.ndarray) -> None:
    """The scan as a SubIFD of its thumbnail."""
    with tifffile.TiffWriter(path) as file:
        file.write(SMALL, photometric="rgb", subfiletype=1, subifds=1, metadata=None)
        file.write(pixels, photometric="rgb", metadata=None)


add(ROW, "scan below its thumbnail", "a.tif", larger_sub_page)


def with_xml(path: Path, pixels: np.ndarray, change: Callable[[str], str], **how: Any) -> None:
    """An OME-TIFF with other XML."""
    tiff(path, pixels, ome=True, **how)
    text = tifffile.tiffcomment(path)
    tifffile.tiffcomment(path, change(text).encode())


def other_size(text: str) -> str:
    return text.replace(f'SizeX="{WIDTH}"', 'SizeX="9000"').replace(f'SizeY="{HEIGHT}"', 'SizeY="8000"')


ROW = "OME-TIFF"
add(ROW, "ome of another size", "a.ome.tif", partial(with_xml, change=other_size, metadata={"axes": "YXS"}))
COMPANION = '<OME xmlns="http://www.openmicroscopy.org/Schemas/OME/2016-06"><BinaryOnly MetadataFile="a.ome"/></OME>'
add(ROW, "a channel of several files", "a.ome.tif",
    lambda path, p: with_xml(path, grey(p), lambda _: COMPANION, photometric="minisblack", metadata={"axes": "YX"}),
    refused="expected all channels in this file, found pages that its OME-XML does not explain")  # fmt: skip


def second_missing(text: str) -> str:
    """The XML of one more image, larger, whose planes are not there."""
    start, end = text.index("<Image"), text.index("</Image>") + len("</Image>")
    image = text[start:end].replace('ID="Image:0"', 'ID="Image:1"').replace('Name="Image0"', 'Name="Image1"')
    return text[:end] + other_size(image).replace('IFD="0"', 'IFD="7"') + text[end:]


add(ROW, "the largest image is missing", "a.ome.tif",
    partial(with_xml, change=second_missing, metadata={"axes": "YXS"}),
    refused="expected the planes of its largest image, found none that fit its OME-XML")  # fmt: skip

ROW = "pyramids: SubIFDs or pages of reduced resolution"
add(ROW, "pyramid of subifds", "a.tif", partial(pyramid, sub=True))
add(ROW, "pyramid of pages", "a.tif", partial(pyramid, sub=False))
add(ROW, "pyramid of pages in jpeg", "a.tif", partial(pyramid, sub=False, **JPEG), within=LOSSY)
add(ROW, "pyramid of 12 bits", "a.tif", deep(partial(pyramid, sub=True), 12), notes="read as 12")


def reduced_first(path: Path, pixels: np.ndarray) -> None:
    """A page of reduced resolution that is larger than the scan."""
    several(path, pixels, [(LARGE, {"subfiletype": 1})], first=True)


def unmarked_pyramid(path: Path, pixels: np.ndarray) -> None:
    """Levels that no tag marks, smallest first."""
    several(path, pixels, [(pixels[::4, ::4], {}), (pixels[::2, ::2], {})], first=True)


add(ROW, "reduced page first", "a.tif", reduced_first)
add(ROW, "pyramid without marks", "a.tif", unmarked_pyramid, notes="image 3 of 3")

# ---- flat files

ROW = "JPEG"
add(ROW, "jpeg", "a.jpg", partial(pillow, quality=98, subsampling=0), within=LOSSY)
add(ROW, "jpeg subsampled", "a.jpeg", partial(pillow, quality=98), within=LOSSY)
add(ROW, "jpeg progressive", "a.jpg", partial(pillow, quality=98, progressive=True), within=LOSSY)
add(ROW, "jpeg with dpi", "a.jpg", partial(pillow, quality=98, dpi=(50800, 50800)), within=LOSSY, um_per_px=0.5)
add(ROW, "jpeg of a screen", "a.jpg", partial(pillow, quality=98, dpi=(300, 300)), within=LOSSY)
ROW = "PNG"
add(ROW, "png", "a.png", pillow)
add(ROW, "png with dpi", "a.png", partial(pillow, dpi=(50800, 50800)), um_per_px=0.5)
ROW = "WebP"
add(ROW, "webp", "a.webp", partial(pillow, lossless=True))


def webp_lossy(path: Path, pixels: np.ndarray) -> np.ndarray:
    pillow(path, pixels, quality=100)
    return np.asarray(Image.open(path))


add(ROW, "webp lossy", "a.webp", webp_lossy)
ROW = "JPEG 2000"
add(ROW, "jp2", "a.jp2", jpeg_2000)
add(ROW, "j2k", "a.jp2", partial(jpeg_2000, kind="j2k"))
add(ROW, "jp2 grey", "a.jp2", expect_grey(jpeg_2000))
add(ROW, "jp2 sYCC", "a.jp2", lambda path, p: Image.fromarray(p).convert("YCbCr").save(path, "JPEG2000"), within=LOSSY)
add(ROW, "jp2 of four channels", "a.jp2", lambda path, p: jpeg_2000(path, np.dstack([p, p[..., 0]]), "j2k"),
    refused="expected grey or RGB, and alpha where the file states it, found 4 channels")  # fmt: skip
ROW = "BMP"
add(ROW, "bmp", "a.png", lambda path, p: Image.fromarray(p).save(path, "BMP"))

ROW = "whole slides"
SVS = {"description": APERIO} | JPEG
add(ROW, "svs", "a.svs", partial(tiff, **SVS, **WHOLE_TILES), within=LOSSY, um_per_px=0.5)
add(ROW, "svs named tif", "a.tif", partial(tiff, **SVS, **WHOLE_TILES), within=LOSSY, um_per_px=0.5)
add(ROW, "svs of strips", "a.svs", partial(tiff, description=APERIO))

ROW = "another format than the suffix says"
add(ROW, "png named jpg", "a.jpg", lambda path, p: Image.fromarray(p).save(path, "PNG"))
add(ROW, "jpeg named tif", "a.tif", lambda path, p: Image.fromarray(p).save(path, "JPEG", quality=98), within=LOSSY)
add(ROW, "tiff named png", "a.png", partial(tiff, **TILED))
add(ROW, "tiff named svs", "a.svs", tiff)
add(ROW, "png named ndpi", "a.ndpi", lambda path, p: Image.fromarray(p).save(path, "PNG"))
add(ROW, "without suffix", "a", tiff)

# ---- refused

ROW = "signed, 32-bit or floating-point samples"
KINDS = {"int8": "signed samples of 8", "int16": "signed samples of 16", "uint32": "unsigned samples of 32"}
for dtype, words in (KINDS | {"float32": "floating-point samples of 32"}).items():
    write = partial(lambda path, p, dtype: tiff(path, (p >> 1).astype(dtype)), dtype=dtype)
    add(ROW, f"tiff {dtype}", "a.tif", write, refused=f"found {words} bits")
add(ROW, "imagej float", "a.tif", lambda path, p: planes(path, p.astype(np.float32), **IJ), refused="floating-point")
add(ROW, "jp2 signed", "a.jp2", lambda path, p: jpeg_2000(path, p.astype(np.int16) - 100), refused="signed samples")
ROW = "2 channels, or more than 3 without stated alpha"


def channels(path: Path, pixels: np.ndarray, n: int, **how: Any) -> None:
    tiff(path, np.stack([pixels[..., i % 3] for i in range(n)]), **how)


for n in (2, 4, 5):
    add(ROW, f"ome {n} planes", "a.ome.tif", partial(channels, n=n, **CYX), refused=f"found {n} channels")
    add(ROW, f"imagej {n} planes", "a.tif", partial(channels, n=n, **IJ), refused=f"found {n} channels")
add(ROW, "grey and more", "a.tif", lambda path, p: tiff(path, p[..., :2], **BLACK, planarconfig="contig"),
    refused="found 2 channels")  # fmt: skip
ROW = "fluorescence"
add(
    ROW,
    "ome dyes",
    "a.ome.tif",
    partial(named, names=["DAPI", "FITC", "Cy3"]),
    refused="found channels DAPI, FITC, Cy3",
)
WAVELENGTHS = {"EmissionWavelength": [450.0, 520.0, 600.0]}
add(ROW, "ome wavelengths", "a.ome.tif", partial(named, names=["0", "1", "2"], **WAVELENGTHS),
    refused="expected red, green and blue, or grey, found channels")  # fmt: skip
add(ROW, "imagej other colours", "a.tif",
    partial(imagej_tables, order="rgb", colours=[(255, 0, 255), (255, 255, 0), (0, 255, 255)]),
    refused="found channels coloured #ff00ff")  # fmt: skip
ROW = "CIELab and other colour spaces"
add(ROW, "cielab", "a.tif", partial(tiff, photometric="cielab"), refused="found colours CIELAB")
ROW = "YCbCr without JPEG"
add(ROW, "ycbcr", "a.tif", partial(tiff, photometric="ycbcr"), refused="expected YCbCr in JPEG")
add(ROW, "ycbcr lzw", "a.tif", partial(tiff, photometric="ycbcr", compression="lzw"), refused="expected YCbCr in JPEG")
ROW = "z-stacks, time series, pages of equal size"


def stack(path: Path, pixels: np.ndarray, n: int, **how: Any) -> None:
    tiff(path, np.stack([pixels] * n), **how)


for axes, n, words in (("ZYXS", 4, "found 4 planes (4 Z)"), ("TYXS", 3, "found 3 planes (3 T)")):
    add(ROW, f"ome {axes}", "a.ome.tif", partial(stack, n=n, ome=True, metadata={"axes": axes}), refused=words)
add(ROW, "ome ZCYX", "a.ome.tif", lambda path, p: tiff(path, np.stack([np.moveaxis(p, -1, 0)] * 2), ome=True,
    photometric="minisblack", metadata={"axes": "ZCYX"}), refused="found 2 planes (2 Z)")  # fmt: skip
add(ROW, "imagej ZYX", "a.tif", lambda path, p: tiff(path, np.stack([p[..., 0]] * 5), imagej=True, photometric=None,
    metadata={"axes": "ZYX"}), refused="found 5 planes (5 Z)")  # fmt: skip
add(ROW, "pages", "a.tif", partial(stack, n=6), refused="found 6 planes")
add(ROW, "pages without description", "a.tif", lambda path, p: several(path, p, [(p, {})] * 3, first=True),
    refused="found 4 planes of equal size")  # fmt: skip
add(ROW, "three grey pages", "a.tif", partial(planes, photometric="minisblack", metadata={}), refused="found 3 planes")


def animation(path: Path, pixels: np.ndarray) -> None:
    frames = [Image.fromarray(pixels), Image.fromarray(pixels[::-1].copy())]
    frames[0].save(path, save_all=True, append_images=frames[1:])


ROW = "animations"
add(ROW, "animated png", "a.png", animation, refused="found an animation of 2")
add(ROW, "animated webp", "a.webp", animation, refused="found an animation of 2")


def masked(path: Path, pixels: np.ndarray) -> None:
    mask = {"photometric": "mask", "subfiletype": 4}
    several(path, pixels, [(pixels[..., 0] > 99, mask)], first=False)


ROW = "transparency masks as pages"
add(ROW, "mask", "a.tif", masked, refused="found a transparency mask")
ROW = "damaged files and what is no image"
add(ROW, "empty", "a.tif", lambda path, p: path.write_bytes(b""), refused="found an empty file")
add(ROW, "text", "a.jpg", lambda path, p: path.write_text("no image\n" * 100), refused="found text")
add(ROW, "html", "a.tif", lambda path, p: path.write_text("<!DOCTYPE html><html>404</html>"), refused="HTML")
add(ROW, "lfs", "a.svs", lambda path, p: path.write_text("version https://git-lfs.github.com/spec/v1\n"),
    refused="git lfs pull")  # fmt: skip
add(ROW, "zeros", "a.png", lambda path, p: path.write_bytes(bytes(5000)), refused="another format")


def half(write: Callable) -> Callable:
    def write_half(path: Path, pixels: np.ndarray) -> None:
        write(path, np.random.default_rng(0).integers(0, 256, pixels.shape, np.uint8))
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])

    return write_half


for name, file, write in (("tiff", "a.tif", tiff), ("jpeg", "a.jpg", pillow), ("png", "a.png", pillow),
                          ("jp2", "a.jp2", jpeg_2000), ("ome", "a.ome.tif", partial(tiff, **OME, **TILED)),
                          ("svs", "a.svs", partial(tiff, **SVS, **WHOLE_TILES))):  # fmt: skip
    add(ROW, f"half of a {name}", file, half(write), refused="cannot be read")
