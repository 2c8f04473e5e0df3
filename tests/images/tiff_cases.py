"""TIFF by compression and by the place of its planes: plain, OME-TIFF, ImageJ, tifffile's own description."""

from __future__ import annotations

import copy
import struct
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import tifffile
from image_cases import EXACT, HEIGHT, LOSSY, TILED, WHOLE_TILES, WIDTH, add, expect_grey, planes, tiff
from PIL import Image

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
add(ROW, "qptiff", "a.qptiff", partial(tiff, bigtiff=True, **TILED))

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


BLACK = {"photometric": "minisblack"}
add(ROW, "tiff jpeg grey", "a.tif", expect_grey(partial(tiff, **BLACK, **JPEG, **WHOLE_TILES)), within=LOSSY)

ROW = "TIFF in JPEG 2000, JPEG XL, WebP"
for codec, args in (("jpeg2000", {"level": 0}), ("jpegxl", {"lossless": True}), ("webp", {"lossless": True})):
    how = {"compression": codec, "compressionargs": args}
    add(ROW, f"tiff {codec}", "a.tif", partial(tiff, **how, tile=(64, 64)))
    add(ROW, f"ome {codec}", "a.ome.tif", partial(tiff, **how, tile=(64, 64), ome=True, metadata={"axes": "YXS"}))


def aperio_ycc(path: Path, pixels: np.ndarray) -> None:
    """YCbCr samples in JPEG 2000, which compression 33003 means whatever the photometric tag states."""
    stored = np.asarray(Image.fromarray(pixels).convert("YCbCr"))
    tiff(path, stored, compression=33003, tile=(64, 64), compressionargs={"level": 0})


add(ROW, "tiff jpeg2000 of YCbCr", "a.tif", aperio_ycc, refused="found Aperio's of YCbCr without its description")

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
