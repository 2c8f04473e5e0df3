"""What cannot be read as it is meant, and is refused."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import tifffile
from image_cases import TILED, WHOLE_TILES, add, planes, tiff
from layout_cases import SVS, several
from PIL import Image
from sample_cases import jpeg_2000, pillow
from tiff_cases import BLACK, CYX, IJ, OME, imagej_tables, named

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


def no_byte_counts(path: Path, pixels: np.ndarray) -> None:
    tiff(path, pixels, rowsperstrip=40)
    with tifffile.TiffFile(path, mode="r+") as file:
        file.pages.first.tags[279].overwrite([0] * 4)


add(ROW, "byte counts of 0", "a.tif", no_byte_counts, refused="a tile or strip of 0 bytes")


def half(write: Callable) -> Callable:
    def write_half(path: Path, pixels: np.ndarray) -> None:
        write(path, np.random.default_rng(0).integers(0, 256, pixels.shape, np.uint8))
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])

    return write_half


for name, file, write in (("tiff", "a.tif", tiff), ("jpeg", "a.jpg", pillow), ("png", "a.png", pillow),
                          ("jp2", "a.jp2", jpeg_2000), ("ome", "a.ome.tif", partial(tiff, **OME, **TILED)),
                          ("svs", "a.svs", partial(tiff, **SVS, **WHOLE_TILES))):  # fmt: skip
    add(ROW, f"half of a {name}", file, half(write), refused="cannot be read")
