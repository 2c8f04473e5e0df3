"""An image checked against its slice: sizes, content, spots on it and on its tissue, um per px.

Each check raises a ValueError of one line where the image cannot be the one that the positions refer to, and returns
warnings where something is odd. Shapes: S spots; h, w pixels of a thumbnail. Coordinates are x, y.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from utils.images import tissue
from utils.images.image import TissueImage, open_image
from utils.slices.visium import DISAGREE, FEW, FEW_FRACTION, SIZE, Slice, SourceImage

# Correlation of two grey images of SIDE x SIDE px. The five HER2+ sections and a Visium one have .99 with themselves in
# other colours, .80 at most with one another (neighbouring sections), .85 mirrored, .89 to .95 shifted by 2 % of a side
SIDE, SAME, RESEMBLING = 64, 0.9, 0.97
COLOURS = 12.0  # of 255: mean difference of an export from the small image; a crop of it has other colours
FLAT = 2.0  # grey levels: standard deviation of an image that shows nothing
GREY = 0.1  # of the colour of its small image, below which an image has lost it
THUMBNAIL_PX = 1000
# Fraction of the positions in tissue that lie on it, less that of the others: .6 to 1 on real and simulated slices as
# they stand, where no other scale gives .1 more; mostly under .5 at .8 or 1.25 times the scale, and .7 at the right one
MISFIT, FIT = 0.5, 0.65
SCALES = np.geomspace(1 / 3, 3, 31)
LEAST, MOST = 40, 5000  # positions to tell by on either side; more are thinned
Thumbnail = tuple[np.ndarray, float]  # an image (h, w, 3) uint8 made small, and its pixels per pixel of the image
# Fractions of spots with half of their disc on tissue: .90 and more on all real slices at hand, as they stand
HARDLY, MOSTLY, LARGELY, BETTER = 0.1, 0.5, 0.9, 0.05


def check_image(
    slice_: Slice, source: SourceImage, image: TissueImage, thumbnail: Thumbnail
) -> tuple[np.ndarray, list[str]]:
    """All checks of the image that tiles are to be cut from.

    Parameters
    ----------
    slice_, source : the slice, and which of its images it is
    image : that image, open
    thumbnail : the image (h, w, 3) uint8 made small, and its pixels per pixel of the image

    Returns
    -------
    which spots (S,) have their centre on the image, and warnings
    """
    xy_px, size = slice_.xy_fullres_px * source.scale, (image.width, image.height)
    inside = spots_on_image(f"{source.path}", xy_px, size)
    check_not_blank(f"{source.path}", thumbnail)
    warnings = _check_scale(slice_, source, image)
    exported = source.kind == "fullres" and source.scale != 1
    if exported:
        warnings.append(
            f"{source.path}: has {source.scale:.4g} times the size of the image that the positions refer to; they are "
            "scaled with it"
        )
    fullres_px = (size[0] / source.scale, size[1] / source.scale)
    for kind, small in slice_.small.items():
        if kind != source.kind:
            warnings += check_small(source.path, fullres_px, thumbnail[0], small, exported)
    if source.kind != "fullres" or not slice_.small:  # else the small images have shown its scale
        warnings += check_positions(slice_, source, size, thumbnail)
    if source.kind == "fullres" and not slice_.small and image.metadata_um_per_px is None:
        warnings.append(
            f"{source.path}: expected a hires or lowres image, or a pixel size in the file, to check its scale by, "
            "found none; look at the spots on it"
        )
    radius_px = slice_.scalefactors["spot_diameter_fullres"] / 2 * source.scale
    hd = "bin_size_um" in slice_.scalefactors  # whose array is a mirror image of the pixels by itself
    mirrored = slice_.lattice is not None and slice_.lattice.mirrored and not hd
    warnings += check_not_black(f"{source.path}", xy_px[inside], radius_px, thumbnail)
    return inside, warnings + check_axes(f"{source.path}", xy_px[inside], size, radius_px, thumbnail, mirrored)


def check_not_blank(where: str, thumbnail: Thumbnail) -> None:
    """Raises ValueError where there is nothing on an image that tiles are to be cut from."""
    if np.ptp(thumbnail[0]) < FLAT:
        raise ValueError(
            f"{where}: expected tissue under the spots, found an image of one colour, transparent or empty everywhere; "
            "export it again, without alpha"
        )


def check_not_black(where: str, xy_px: np.ndarray, radius_px: float, thumbnail: Thumbnail) -> list[str]:
    """A warning where spots lie on parts that are exactly black: readers give that for what a file lost.

    Parameters are those of check_axes. Raises ValueError where most of the spots do.
    """
    n_black = int(tissue.on_tissue(xy_px, thumbnail[0].max(axis=2) == 0, thumbnail[1], radius_px).sum())
    found = f"black (0, 0, 0) under {n_black} of {len(xy_px)} spots"
    if n_black > MOSTLY * len(xy_px):
        raise ValueError(f"{where}: expected tissue under the spots, found {found}; copy or export the image again")
    if n_black > max(FEW, FEW_FRACTION * len(xy_px)):
        return [f"{where}: is {found}, as where parts of the file are missing; copy or export it again"]
    return []


def spots_on_image(where: str, xy_px: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Which spots (S,) have their centre on an image.

    Parameters
    ----------
    where : what messages name
    xy_px : ndarray (S, 2), centres in pixels of the image
    size : its width and height

    Raises
    ------
    ValueError where more than a few (3, or 2 %) have not: it is another image, another scale, or swapped axes.
    """
    inside = np.asarray(((xy_px >= 0) & (xy_px < size)).all(axis=1))
    n_outside = int((~inside).sum())
    if n_outside > max(FEW, FEW_FRACTION * len(inside)) or not inside.any():
        swapped = int(((xy_px[:, ::-1] >= 0) & (xy_px[:, ::-1] < size)).all(axis=1).sum())
        hint = "; with x and y swapped all would lie on it" if swapped == len(inside) else ""
        farthest = ", ".join(f"{value:.0f}" for value in xy_px.max(axis=0))
        raise ValueError(
            f"{where}: expected {len(inside)} spots on its {size[0]} x {size[1]} px, found {n_outside} outside "
            f"(farthest x, y: {farthest}){hint}; give the image that the positions refer to, at its full size"
        )
    return inside


def _check_scale(slice_: Slice, source: SourceImage, image: TissueImage) -> list[str]:
    """Micrometres per pixel as the file of the image states them, compared with those of the spots."""
    stated, known = image.metadata_um_per_px, slice_.um_per_px
    known = None if known is None else known / source.scale
    if stated is None or known is None or source.kind != "fullres" or abs(stated / known - 1) <= DISAGREE:
        return []
    return [
        f"{source.path}: a pixel has {known:.4g} um by the spots ({slice_.pitch_um:g} um apart) but {stated:.4g} um by "
        "the file itself; the former is used: check the image and --spot_pitch_um"
    ]


def check_positions(slice_: Slice, source: SourceImage, size: tuple[int, int], thumbnail: Thumbnail) -> list[str]:
    """A line where positions in and off tissue are told apart by the image at another scale, and not at its own.

    Only scales that bring the array closer to the middle of the image are compared: others may shift a section onto its
    neighbour where several share a capture area.
    """
    sides = [xy[:: len(xy) // MOST + 1] * source.scale for xy in (slice_.xy_fullres_px, slice_.off_tissue_px)]
    if min(map(len, sides)) < LEAST:
        return []
    mask = tissue.tissue_mask(thumbnail[0])

    def on_tissue(scale: float) -> list[float]:
        return [float(tissue.on_tissue(xy_px * scale, mask, thumbnail[1], 0.0).mean()) for xy_px in sides]

    def fit(scale: float) -> float:
        under, beside = on_tissue(scale)
        return under - beside

    def off_centre(scale: float) -> float:
        corners = np.array([np.min([xy.min(0) for xy in sides], 0), np.max([xy.max(0) for xy in sides], 0)])
        return float(np.linalg.norm(corners.mean(0) * scale / size - 0.5))

    best = max((scale for scale in SCALES if off_centre(scale) < off_centre(1)), key=fit, default=1.0)
    if fit(1) >= MISFIT or fit(best) < FIT:
        return []
    (under, beside), (best_under, best_beside) = on_tissue(1), on_tissue(best)
    what = "the full-resolution image" if source.kind == "fullres" else f"tissue_{source.kind}_scalef"
    return [
        f"{source.path}: {under:.0%} of the positions in tissue and {beside:.0%} of the others lie on what looks like "
        f"tissue, {best_under:.0%} and {best_beside:.0%} at {best:.2f} times the scale: check {what}"
    ]


def check_small(
    path: Path, fullres_px: tuple[float, float], thumbnail: np.ndarray, small: SourceImage, exported: bool = False
) -> list[str]:
    """Size and content of an image against one of the small images that were made of it.

    Parameters
    ----------
    path, thumbnail : the image, and its pixels (h, w, 3) made small
    fullres_px : its width and height in full-resolution pixels
    small : the small image, which is opened
    exported : whether the image has another size than the scan

    Raises
    ------
    ValueError where the small image was made of another image.
    """
    with open_image(small.path) as image:
        check_size(path, fullres_px, (image.width, image.height), small)
        return check_content(path, thumbnail, image.thumbnail(THUMBNAIL_PX)[0], small.path.name, exported)


def check_size(path: Path, fullres_px: tuple[float, float], small_px: tuple[int, int], small: SourceImage) -> None:
    """Raises ValueError where the sides of an image are not those of its small one over that one's scale factor."""
    expected = [side / small.scale for side in small_px]
    rounding = 1.5 / small.scale
    if any(abs(side - wanted) > SIZE * wanted + rounding for side, wanted in zip(fullres_px, expected, strict=True)):
        raise ValueError(
            f"{path}: expected about {expected[0]:.0f} x {expected[1]:.0f} full-resolution px ({small.path.name} over "
            f"its scale factor), found {fullres_px[0]:.0f} x {fullres_px[1]:.0f}; give the image that the positions "
            "refer to (column image of slices.csv), at its full size"
        )


def check_content(
    path: Path, thumbnail: np.ndarray, small: np.ndarray, small_name: str, exported: bool = False
) -> list[str]:
    """Warnings where an image hardly shows what its small one shows.

    Parameters
    ----------
    path, thumbnail : the image, and its pixels (h, w, 3) made small
    small, small_name : pixels (h, w, 3) of the small image, and what messages call it
    exported : whether the image has another size than the scan

    Raises
    ------
    ValueError where it does not show the same, or shows it much better turned or with exchanged colours.

    A blank small image allows no comparison. Where it has to confirm that the image was `exported` at another size,
    a blank one is refused, and the colours have to agree too: a correlation does not separate a smooth image from a
    part of it.
    """
    pixels = [_made_small(thumbnail), _made_small(small)]
    grey, least = [colours.mean(2) for colours in pixels], RESEMBLING if exported else SAME
    blank = [bool(values.std() < FLAT) for values in grey]
    if blank[1] and not exported:
        return []
    off = _difference(*pixels)
    other_colours = exported and off > COLOURS
    alike = 0.0 if any(blank) or other_colours else _correlation(*grey)
    turned = [] if any(blank) else sorted(_turned(pixels[0]), key=lambda named: _difference(named[1], pixels[1]))
    better = [name for name, other in turned[:1] if off > FLAT and _difference(other, pixels[1]) < off / 2]
    if alike < least or better:
        differs = "one colour" if blank[0] else "other colours" if other_colours else f"correlation {alike:.2f}"
        better += [name for name, other in turned if _correlation(other.mean(2), grey[1]) >= SAME]
        hint = f"; it fits {better[0]}" if better else ""
        raise ValueError(
            f"{path}: expected the image that {small_name} was made of, found another ({differs}; of the "
            f"same image the correlation is above {least}){hint}; give the image that the positions refer to, unchanged"
        )
    colour = [np.ptp(colours, axis=2).mean() for colours in pixels]
    if colour[0] < GREY * colour[1]:
        return [f"{path}: is grey, {small_name} is coloured; tiles of it have no stain, give the image in colour"]
    if alike < RESEMBLING:
        return [f"{path}: resembles {small_name} (correlation {alike:.2f}) but may be shifted or cropped against it"]
    return []


def _made_small(pixels: np.ndarray) -> np.ndarray:
    """(h, w, 3) uint8 -> (SIDE, SIDE, 3)."""
    return np.asarray(Image.fromarray(pixels).resize((SIDE, SIDE), Image.Resampling.BOX), float)


def _difference(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.abs(a - b).mean())


def _correlation(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.corrcoef(a.ravel(), b.ravel())[0, 1])


def _turned(pixels: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
    """An image (SIDE, SIDE, 3) as it would be after a mistake, and what mistake."""
    yield "mirrored left to right", pixels[:, ::-1]
    yield "mirrored top to bottom", pixels[::-1]
    yield "turned by 180 degrees", pixels[::-1, ::-1]
    yield "with x and y swapped", pixels.swapaxes(0, 1)
    yield "with x and y swapped and both mirrored", pixels.swapaxes(0, 1)[::-1, ::-1]
    yield "turned by 90 degrees", np.rot90(pixels)
    yield "turned by 270 degrees", np.rot90(pixels, 3)
    yield "with red and blue exchanged", pixels[..., ::-1]


def check_axes(
    where: str, xy_px: np.ndarray, size: tuple[int, int], radius_px: float, thumbnail: Thumbnail, mirrored: bool
) -> list[str]:
    """Spots against the tissue, as they stand and with swapped or mirrored axes.

    Raises ValueError where hardly a spot lies on tissue and there is enough of it elsewhere, or where most would with
    swapped or mirrored axes and do not now. Fat, which is nearly as pale as glass, is no reason to refuse.

    Parameters
    ----------
    where : what messages name
    xy_px : ndarray (S, 2), centres of spots under tissue, in pixels of the image
    size : width and height of the image
    radius_px : of a spot
    thumbnail : the image (h, w, 3) uint8 made small, and its pixels per pixel of the image
    mirrored : whether array places and pixels are mirror images of each other
    """
    mask = tissue.tissue_mask(thumbnail[0])

    def on_tissue(centres_px: np.ndarray) -> float:
        return float(tissue.on_tissue(centres_px, mask, thumbnail[1], radius_px).mean())

    as_given = on_tissue(xy_px)
    if as_given < MOSTLY or mirrored:
        name, best = max(
            ((name, on_tissue(centres)) for name, centres in _other_axes(xy_px, size).items()),
            key=lambda named: named[1],
        )
        if best >= LARGELY and (as_given < MOSTLY or best - as_given > BETTER):
            raise ValueError(
                f"{where}: expected spots on tissue, found {as_given:.0%} of {len(xy_px)} there and {best:.0%} with "
                f"{name}; correct the axes of the positions, or give the image that they refer to"
            )
    discs = len(xy_px) * np.pi * (radius_px * thumbnail[1]) ** 2
    if as_given < HARDLY and _area_beyond(mask, xy_px * thumbnail[1]) >= discs:
        raise ValueError(
            f"{where}: expected spots on tissue, found {as_given:.0%} of {len(xy_px)} there; give the image that the "
            "positions refer to"
        )
    if mirrored:
        return [
            f"{where}: array places and pixels are mirror images of each other: axes swapped or mirrored, or a flipped "
            f"scan ({as_given:.0%} of the spots lie on tissue as they stand)"
        ]
    if as_given < MOSTLY and mask.any():
        return [
            f"{where}: {as_given:.0%} of the spots under tissue lie on what looks like tissue; are axes and image "
            "right?"
        ]
    return []


def _area_beyond(mask: np.ndarray, xy_px: np.ndarray) -> int:
    """Tissue of a mask (h, w) outside the rectangle around the centres (S, 2), all in pixels of the mask."""
    (left, top), (right, bottom) = xy_px.min(axis=0).astype(int), np.ceil(xy_px.max(axis=0)).astype(int)
    return int(mask.sum() - mask[top:bottom, left:right].sum())


def _other_axes(xy_px: np.ndarray, size: tuple[int, int]) -> dict[str, np.ndarray]:
    """Centres (S, 2) with swapped or mirrored axes, by how."""
    x, y = xy_px.T
    return {
        "x and y swapped": np.column_stack([y, x]),
        "x mirrored": np.column_stack([size[0] - x, y]),
        "y mirrored": np.column_stack([x, size[1] - y]),
        "x and y mirrored": np.column_stack([size[0] - x, size[1] - y]),
    }
