"""Which image of a file is the scan, and how its pixels lie; flat files, whole slides."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import tifffile
from image_cases import EXACT, HEIGHT, LOSSY, TILED, WHOLE_TILES, WIDTH, add, expect_grey, grey, tag, tiff
from PIL import Image, PngImagePlugin
from sample_cases import APERIO, deep, jpeg_2000, pillow
from tiff_cases import JPEG, pyramid

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
    for words in ("Etikett", "Übersicht", "aperçu", "缩略图", "Navigation image", "type=label", "ImageType=MACRO",
                  '{"kind": "thumbnail", "um": 8}', '<image type="macro"/>'):  # fmt: skip
        other = [(LARGE, {"description": words.encode()})]
        add(ROW, f"large {words} {where}", "a.tif", partial(several, others=other, first=first), notes=note)
    other = [(LARGE, {"metadata": {"axes": "YXS", "Name": "label image"}})]
    how = {"ome": True, "metadata": {"axes": "YXS", "Name": "scan"}}
    add(ROW, f"ome label {where}", "a.ome.tif", partial(several, others=other, first=first, **how), notes=note)
    other = [(LARGE, {"extratags": [(285, 2, 0, "slide_label", True)]})]
    add(ROW, f"page name {where}", "a.tif", partial(several, others=other, first=first), notes=note)
    other = [(LARGE[..., 0], {"photometric": "minisblack"})]
    add(ROW, f"large grey {where}", "a.tif", partial(several, others=other, first=first), notes=note)
    other = [(LARGE, {"description": "Aperio Image Library v12\nmacro 400x300"})]
    add(ROW, f"Aperio macro {where}", "a.tif", partial(several, others=other, first=first), notes=note)

about_map = {"description": "tissue map 3"}
add(ROW, "label, and a scan described as map", "a.tif",
    lambda path, p: several(path, LARGE, [(p, about_map)], first=True, description="label"),
    notes="image 1 of 2")  # fmt: skip

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
ADOBE = PngImagePlugin.PngInfo()
ADOBE.add_itxt("XML:com.adobe.xmp", "x" * 2**21, zip=True)
add(ROW, "png with 2 MiB of XMP", "a.png", partial(pillow, pnginfo=ADOBE))
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
add(ROW, "bmp", "a.bmp", pillow)

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
add(ROW, "tiff named ndpi", "a.ndpi", tiff)
add(ROW, "bmp named png", "a.png", lambda path, p: Image.fromarray(p).save(path, "BMP"))
add(ROW, "png named ndpi", "a.ndpi", lambda path, p: Image.fromarray(p).save(path, "PNG"))
add(ROW, "without suffix", "a", tiff)
