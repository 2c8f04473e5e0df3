"""The images of a TIFF file, which of them is the scan, and what its samples mean.

TIFF 6.0 (Adobe, 1992); OME-TIFF 6.3 (docs.openmicroscopy.org); ImageJ hyperstacks as tifffile describes them.
A plane is a page (IFD) of one image; a series is all that belongs to one image: its planes and its coarser levels.
Letters: h, w rows and columns, C samples of a pixel.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np

from utils.images.checks import ImageError
from utils.images.flat import orientation_note
from utils.images.samples import Samples
from utils.images.tiff_samples import (
    CMYK,
    MASK,
    PALETTE,
    RGB,
    TO_RGB,
    YCBCR,
    channel_samples,
    page_samples,
    plain_samples,
)
from utils.images.tiff_tags import (
    ASIDE,
    ONLY_ASIDE,
    ORIENTATION,
    max_sample_depth,
    page_name,
    per_pixel,
    tag_um_per_px,
    titles,
)
from utils.images.units import UM

REDUCED, TRANSPARENCY = 1, 4  # bits of NewSubfileType
ONE_PLANE = "save one plane as a file of its own, by tifffile or ImageJ"
UNNAMED_AXES = {"Q": "without a name", "I": "pages"}
NUMBERED = re.compile(r"(channel|ch|c|bf|tl|brightfield)?[\s_:#-]*(\d+([:/]\d+)*)?")  # channel names without meaning
PRIMARY = re.compile(r"(r|red|g|green|b|blue|a|alpha)([\s_-]*(channel|ch))?")


@dataclass
class Series:
    """One image of a file.

    Attributes
    ----------
    name : as the file names it
    width, height : int
    pages : one page, or a page per channel, in the order red, green, blue, alpha
    samples : what its samples mean, None where `problem` is why it cannot be read
    levels : pages of its coarser levels
    mapped : offset and (h, w, C) of each plane, where they lie in one piece without a page of their own
    stated_depth : bits of a channel that the file states, and where
    titles : what name and descriptions call it
    is_reduced, is_mask : whether it is a coarser copy of another image, or a transparency mask
    looks_rgb : whether it is in colour, also where a problem hinders
    """

    name: str
    width: int
    height: int
    pages: list[Any]
    samples: Samples | None = None
    problem: str = ""
    levels: list[list[Any]] = field(default_factory=list)
    mapped: tuple[list[int], tuple[int, int, int]] | None = None
    um_per_px: float | None = None
    stated_depth: tuple[int, str] | None = None
    notes: tuple[str, ...] = ()
    titles: tuple[str, ...] = ()
    is_reduced: bool = False
    is_mask: bool = False
    looks_rgb: bool = False

    @property
    def key(self) -> Any:
        return self.pages[0].keyframe

    @property
    def area(self) -> int:
        return self.width * self.height

    def is_aside(self, alone: bool) -> bool:
        """Whether it is called label, macro, thumbnail, overview or map; `alone`: by nothing else than such a word."""
        if alone:
            return any(re.fullmatch(ONLY_ASIDE, title, re.IGNORECASE) for title in self.titles)
        return any(re.search(ASIDE, title, re.IGNORECASE) for title in self.titles)


# ---- which image


def find_scan(path: Path, file: Any) -> Series:
    """The largest RGB series of an open tifffile.TiffFile, else the largest grey one. Raises ImageError."""
    images = read_series(path, file)
    whole = [series for series in images if not (series.is_reduced or series.is_mask)]
    wanted = [series for series in whole if len(images) > 1 and not series.is_aside(alone=False)]
    wanted = wanted or [series for series in whole if not series.is_aside(alone=True)]
    wanted = [series for series in wanted if series.looks_rgb] or wanted
    if not wanted:
        names = ", ".join(title for series in images for title in series.titles if title) or "coarser copies"
        raise ImageError(f"{path}: expected the scan, found no image but {names}; export the scan itself")
    area = max(series.area for series in wanted)
    largest = [series for series in wanted if series.area == area]
    scan = largest[0]
    if len(largest) > 1:
        names = ", ".join(_called(series, images) for series in largest[:4]) + (", ..." if len(largest) > 4 else "")
        raise ImageError(
            f"{path}: expected one scan, found {len(largest)} planes of equal size, "
            f"{scan.width:,} x {scan.height:,} px ({names}); {ONE_PLANE}"
        )
    if scan.problem:
        raise ImageError(f"{path}: {scan.problem}")
    if any(mask.is_mask and (mask.width, mask.height) == (scan.width, scan.height) for mask in images):
        raise ImageError(
            f"{path}: expected alpha or opaque pixels, found a transparency mask of its own; flatten it onto white"
        )
    if len(images) > 1:
        what = "RGB" if scan.looks_rgb else "grey"
        place = images.index(scan) + 1
        scan.notes = (*scan.notes, f"image {place} of {len(images)} in the file, the largest {what} one")
    return scan


def _called(series: Series, images: list[Series]) -> str:
    return series.name or f"image {images.index(series) + 1}"


def read_series(path: Path, file: Any) -> list[Series]:
    """All images of a file, in its order."""
    if file.is_lsm:
        raise ImageError(f"{path}: expected an H&E image, found a confocal stack (LSM); give the H&E image")
    for kind, read in (("ome", _ome_series), ("imagej", _imagej_series), ("shaped", _shaped_series)):
        if getattr(file, f"is_{kind}") and file.series and file.series[0].kind == kind:
            return read(path, file)
        if kind == "imagej" and file.is_imagej:
            raise ValueError("ImageJ states more planes than the file holds")
    images = _plain_series(file)
    if file.is_ome:  # OME-XML that does not fit: only pages in RGB are an image by themselves
        problem = f"expected all channels in this file, found pages that its OME-XML does not explain; {TO_RGB}"
        for image in (image for image in images if not image.looks_rgb):
            image.problem = problem
    return images


# ---- OME-TIFF, ImageJ, tifffile's own description


def _ome_series(path: Path, file: Any) -> list[Series]:
    elements = list(ElementTree.fromstring(file.ome_metadata).iterfind("{*}Image"))
    images = []
    for series in file.series:
        element = _ome_image(elements, series)
        pixels = None if element is None else element.find("{*}Pixels")
        channels = [] if pixels is None else list(pixels.iterfind("{*}Channel"))
        name = "" if element is None else element.get("Name") or ""
        image = _from_tifffile(path, series, name, _ome_order(channels))
        if pixels is not None:
            image.um_per_px = _ome_um_per_px(pixels) or image.um_per_px
            bits = pixels.get("SignificantBits", "")
            image.stated_depth = (int(bits), "SignificantBits") if bits.isdigit() and int(bits) else image.stated_depth
        images.append(image)
    most = max((image.area for image in images), default=0)
    for element in elements:  # which tifffile has left out
        pixels = element.find("{*}Pixels")
        width, height = (0, 0) if pixels is None else (int(pixels.get("SizeX", 0)), int(pixels.get("SizeY", 0)))
        if width * height > most:
            image = Series(element.get("Name") or "", width, height, [file.pages.first], looks_rgb=True)
            image.titles = (image.name,)
            image.problem = f"expected the planes of its largest image, found none that fit its OME-XML; {TO_RGB}"
            images.append(image)
    return images


def _ome_image(elements: list[Any], series: Any) -> Any:
    """The element that a series was made from, which is taken out of the list: first of its name and size."""
    sizes = dict(zip(series.get_axes(False), series.get_shape(False), strict=True))
    for element in elements:
        pixels = element.find("{*}Pixels")
        size = None if pixels is None else (pixels.get("SizeX"), pixels.get("SizeY"))
        if size == (str(sizes.get("X")), str(sizes.get("Y"))) and (element.get("Name") or series.name) == series.name:
            elements.remove(element)
            return element
    return None


def _ome_um_per_px(pixels: Any) -> float | None:
    try:
        sides = [float(pixels.get(f"PhysicalSize{a}")) * UM[pixels.get(f"PhysicalSize{a}Unit", "µm")] for a in "XY"]
    except (TypeError, ValueError, KeyError):  # not stated, or in no known unit
        return None
    return math.sqrt(sides[0] * sides[1]) if min(sides) > 0 else None


def _ome_order(channels: list[Any]) -> list[int] | str:
    """Which primary each channel is, by name, else by colour; empty where neither is known, text where others."""
    names = [(channel.get("Name") or channel.get("ID", "").split(":")[-1]).strip().lower() for channel in channels]
    primaries = [PRIMARY.fullmatch(name) for name in names]
    if primaries and all(primaries):
        return ["rgba".index(match[1][0]) for match in primaries if match]
    dyes = [channel.get("Fluor") or channel.get("EmissionWavelength") for channel in channels]
    fluorescent = any(dyes) or any(channel.get("ContrastMethod") == "Fluorescence" for channel in channels)
    if fluorescent or not all(NUMBERED.fullmatch(name) for name in names):
        return ", ".join(channel.get("Name") or str(dye) for channel, dye in zip(channels, dyes, strict=True))
    colours = [int(channel.get("Color", "-1")) % 2**32 >> 8 for channel in channels]
    return _order_of_colours([((c >> 16) & 255, (c >> 8) & 255, c & 255) for c in colours])


def _order_of_colours(colours: list[tuple[int, int, int]]) -> list[int] | str:
    """Which primary each colour is; empty where all are alike, text where they are others."""
    if len(set(colours)) <= 1:
        return []
    primaries = [(255, 0, 0), (0, 255, 0), (0, 0, 255)]
    order = [primaries.index(colour) if colour in primaries else -1 for colour in colours]
    if sorted(order) == list(range(len(colours))):
        return order
    return "coloured " + ", ".join("#{:02x}{:02x}{:02x}".format(*colour) for colour in colours)


def _imagej_series(path: Path, file: Any) -> list[Series]:
    meta = file.imagej_metadata or {}
    tables = [np.asarray(table) for table in meta.get("LUTs", [])]
    order = _order_of_colours([(int(table[0, -1]), int(table[1, -1]), int(table[2, -1])) for table in tables])
    image = _from_tifffile(path, file.series[0], "", order)
    unit = str(meta.get("unit", "")).strip()
    if unit in UM:
        image.um_per_px = per_pixel(image.key, UM[unit])
    return [image]


def _shaped_series(path: Path, file: Any) -> list[Series]:
    return [_from_tifffile(path, series, series.name, []) for series in file.series]


def _from_tifffile(path: Path, series: Any, name: str, order: list[int] | str) -> Series:
    """A series as tifffile sees it. `order` is which primary each channel is, or why they are none."""
    sizes = dict(zip(series.get_axes(False), series.get_shape(False), strict=True))
    key, width, height = series.keyframe, int(sizes.get("X", 1)), int(sizes.get("Y", 1))
    image = Series(name, width, height, [key], um_per_px=tag_um_per_px(key), stated_depth=max_sample_depth(key))
    image.titles, image.is_reduced = titles(key, name), len(key.parent.series) > 1 and bool(key.subfiletype & REDUCED)
    others = {axis: size for axis, size in sizes.items() if axis not in "YXSC" and size > 1}
    channels = math.prod(series.get_shape(False)) // max(1, math.prod(others.values()) * width * height)
    n_planes = max(1, channels // int(key.samplesperpixel))
    if (width, height) != (int(key.imagewidth), int(key.imagelength)) and not others:
        return _interleaved(image, series, channels)
    _read_samples(image, n_planes, order)
    if others:
        planes = math.prod(others.values())
        axes = ", ".join(f"{size} {UNNAMED_AXES.get(axis, axis)}" for axis, size in others.items())
        image.problem = f"expected one plane, found {planes} planes ({axes}); {ONE_PLANE}"
        return image
    if image.samples is None:
        return image
    pages = list(series) if n_planes > 1 else [series[0]]
    if n_planes > 1 and len(pages) < n_planes and series.dataoffset is not None:
        plane = width * height * key.dtype.itemsize
        image.mapped = [series.dataoffset + plane * number for number in range(n_planes)], (height, width, 1)
    elif len(pages) < n_planes or any(page is None or page.parent is not key.parent for page in pages):
        image.problem = f"expected all its planes in this file, found {n_planes} of which some are elsewhere; {TO_RGB}"
        return image
    else:
        image.pages = pages
    levels = [list(level) if n_planes > 1 else [level[0]] for level in series.levels[1:]]
    image.levels = [pages for pages in levels if len(pages) == len(image.pages) and None not in pages]
    return image


def _interleaved(image: Series, series: Any, channels: int) -> Series:
    """Pixels (h, w, C) that were written as h planes of w x C."""
    image.looks_rgb = channels == 3
    axes = series.get_axes(True)
    if axes not in ("YXC", "YXS") or series.dataoffset is None or channels not in (1, 3):
        image.problem = f"expected planes that are images, found axes {axes} of {series.get_shape(True)}; {TO_RGB}"
        return image
    colours = (0, 1, 2) if channels == 3 else (0,)
    image.samples, image.problem = plain_samples(image.key, "rgb" if channels == 3 else "grey", colours)
    image.mapped = [series.dataoffset], (image.height, image.width, channels)
    return image


# ---- plain TIFF


def _plain_series(file: Any) -> list[Series]:
    """A series per page; pages of reduced resolution and sub-pages are levels of the scan they fit."""
    file.pages.useframes = False
    pages = [file.pages[number].aspage() for number in range(len(file.pages))]
    sub_pages = {page.index: [sub.aspage() for sub in page.pages or []] for page in pages}
    larger = [sub for page in pages for sub in sub_pages[page.index] if sub.imagewidth > page.imagewidth]
    images, reduced = [], []
    for page in [*pages, *larger]:
        is_reduced = bool(page.subfiletype & REDUCED) and not page.subfiletype & TRANSPARENCY
        if is_reduced and len(pages) + len(larger) > 1:
            reduced.append(page)
        else:
            images.append(_page_series(page, sub_pages.get(page.index, []) if page in pages else []))
    levels = [[page] for page in reduced if not any(re.search(ASIDE, t, re.IGNORECASE) for t in titles(page, ""))]
    for image in images:
        image.levels += levels
    return images


def _page_series(page: Any, sub_pages: list[Any]) -> Series:
    name = page_name(page)
    image = Series(name, int(page.imagewidth), int(page.imagelength), [page])
    image.titles, image.is_mask = titles(page, name), page.photometric == MASK
    image.um_per_px, image.stated_depth = tag_um_per_px(page), max_sample_depth(page)
    image.levels = [[sub] for sub in sub_pages]
    _read_samples(image, 1, [])
    return image


def level_samples(scan: Series, pages: list[Any]) -> Samples | None:
    """Samples of a coarser level; None where it is no level of the scan, by its shape to a pixel or by its samples."""
    key = pages[0].keyframe
    width, height = int(key.imagewidth), int(key.imagelength)
    if scan.samples is None or not (0 < width < scan.width and 0 < height < scan.height) or key.dtype != scan.key.dtype:
        return None
    factor = scan.width / width
    if abs(height * factor - scan.height) > factor * (1 + height / width):
        return None
    if len(pages) > 1:
        return scan.samples if key.photometric == scan.key.photometric else None
    samples = page_samples(key)[0]
    return samples and replace(samples, depth=scan.samples.depth, alpha_depth=scan.samples.alpha_depth)


def _read_samples(image: Series, n_planes: int, order: list[int] | str) -> None:
    """Fill in samples, problem, notes and looks_rgb of a series of so many planes."""
    key = image.key
    if n_planes == 1:
        image.samples, image.problem, notes = page_samples(key)
    else:
        image.samples, image.problem = channel_samples(key, n_planes, order)
        notes = ()
    image.looks_rgb = image.samples is not None and image.samples.is_colour
    if image.samples is None:
        image.looks_rgb = key.photometric in (RGB, PALETTE, CMYK, YCBCR) and n_planes == 1
    image.notes = (*orientation_note(key.tags.valueof(ORIENTATION)), *notes)
