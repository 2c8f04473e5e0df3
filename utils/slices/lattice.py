"""The array that spots lie on: stated places checked against the pixels, or measured from the pixels alone.

Visium's array is staggered (hexagonal): every other row is shifted by half a pitch and columns step by two. Legacy ST
and Visium HD lie on squares. Shapes: S spots. Coordinates are full-resolution pixels, x and y; places are row and
column.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from scipy.spatial import cKDTree

NEAR = 1.2  # nearest distances: between the first ring of neighbours and the second (1.41 or 1.73)
START_RADIUS = 6.0  # nearest distances around the middle, where the first fit is made
# A spot off its place, in pitches. Hand-printed legacy arrays wobble (one spot of section B4 lies .30 off): most spots
# are within a quarter, and none is nearer to another place than to its own.
MOST_WITHIN, ALL_WITHIN, MOST = 0.25, 0.5, 0.95
HEXAGONAL = math.sqrt(3)  # step of a row over that of a column on Visium's array
UNEVEN = 0.2  # by which that ratio, and the cosine between the steps, may be off: .11 on section MOB1
FLAT = 1e-9  # of the squared steps: the area of a place is below it for spots on one line
NO_NEIGHBOUR = 1.5  # pitches


@dataclass(frozen=True)
class Lattice:
    """The array of a slice's spots.

    Attributes
    ----------
    array : ndarray (S, 2) int, row and column
    pitch_px : float, between the centres of neighbouring spots
    staggered : bool, as Visium's
    measured : bool, whether the places were measured because none were stated or those did not fit the pixels
    mirrored : bool, whether the stated places and the pixels are mirror images: x and y swapped, or a flipped scan
    """

    array: np.ndarray
    pitch_px: float
    staggered: bool
    measured: bool
    mirrored: bool


def fit_lattice(where: str, xy_px: np.ndarray, array: np.ndarray | None = None) -> Lattice:
    """The lattice of spots: by their stated places where those fit the pixels, else by places measured from the pixels.

    Parameters
    ----------
    where : what messages name
    xy_px : ndarray (S, 2), centres of the spots, two of them at least
    array : ndarray (S, 2) int, stated row and column; None where none are stated

    Raises
    ------
    ValueError where two spots share a pixel, or the stated places do not fit and the pixels are on no lattice.
    """
    xy_px = np.asarray(xy_px, float)
    if len(xy_px) < 2:
        raise ValueError(f"{where}: expected two spots or more to measure their pitch, found {len(xy_px)}; give more")
    _check_apart(where, xy_px)
    if array is not None:
        stated = np.asarray(array)
        slopes, off = _fit(stated, xy_px)
        staggered = is_staggered(stated) or _step_ratio(slopes) == HEXAGONAL
        pitch_px = _pitch_px(slopes, staggered, xy_px)
        fits = _all_at_their_places(off / pitch_px) and not _repeated(stated)
        as_stated = Lattice(stated.astype(int), pitch_px, staggered, False, _area(slopes) < 0)
        if fits and _step_ratio(slopes) is not None and not _skips_places(xy_px, pitch_px):
            return as_stated
    try:
        measured = array_places(where, xy_px)
    except ValueError as error:
        if array is None:
            raise
        if fits:
            return as_stated
        worst = int(np.argmax(off))
        raise ValueError(
            f"{where}: expected array places that fit the pixels, found the spot at row {stated[worst, 0]}, column "
            f"{stated[worst, 1]} {off[worst] / pitch_px:.3g} pitches from its place, and pixels on no lattice either; "
            "take places and pixels from one file"
        ) from error
    staggered, slopes, _ = is_staggered(measured), *_fit(measured, xy_px)
    return Lattice(measured, _pitch_px(slopes, staggered, xy_px), staggered, True, False)


def is_staggered(array: np.ndarray) -> bool:
    """Whether places (S, 2) are those of Visium's array: row and column are both even or both odd, wherever they are
    counted from."""
    row, col = np.asarray(array).T
    return all(len(np.unique(parity)) == n for parity, n in (((row + col) % 2, 1), (row % 2, 2)))


def _fit(array: np.ndarray, xy_px: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Pixels per step of column and row (2, 2), and how far each spot (S,) lies from the fitted place, in pixels."""
    places = np.asarray(array, float)[:, ::-1]
    places, pixels = places - places.mean(0), xy_px - xy_px.mean(0)
    slopes, _, _, _ = np.linalg.lstsq(places, pixels, rcond=None)
    return slopes, np.linalg.norm(places @ slopes - pixels, axis=1)


def _step_ratio(slopes: np.ndarray) -> float | None:
    """The longer over the shorter step of row and column, 1 or HEXAGONAL; 1 too for spots on a line; None on an array
    that is neither square nor hexagonal, as of places in skewed or other units."""
    lengths = np.sort(np.linalg.norm(slopes, axis=1))
    if not _area(slopes):
        return 1.0
    if abs(slopes[0] @ slopes[1]) > UNEVEN * lengths.prod():
        return None
    return next((ratio for ratio in (1.0, HEXAGONAL) if abs(lengths[1] / lengths[0] / ratio - 1) <= UNEVEN), None)


def _area(slopes: np.ndarray) -> float:
    """Of a place, in square pixels; 0 for spots on one line, negative where places and pixels are mirror images."""
    area = float(np.linalg.det(slopes))
    return area if abs(area) > FLAT * np.square(slopes).sum() else 0.0


def _pitch_px(slopes: np.ndarray, staggered: bool, xy_px: np.ndarray) -> float:
    """Centre-to-centre distance between neighbouring spots (S, 2), from the affine map that _fit gives.

    Holes, turns and rounding hardly change that map. Its determinant is the area per place: pitch squared on a square
    array; on a staggered one, where a column is half a pitch and a row sqrt(3)/2 of it, sqrt(3)/4 of that. Spots on one
    line have no area: their closest pair is taken.
    """
    if area_px2 := abs(_area(slopes)):
        return math.sqrt(area_px2 * (4 / math.sqrt(3) if staggered else 1))
    return float(nearest_px(xy_px).min())


def nearest_px(xy_px: np.ndarray) -> np.ndarray:
    """Distance of each spot (S, 2) to its nearest neighbour: (S,), in the unit of `xy_px`."""
    return neighbour_tree(xy_px).query(xy_px, k=2)[0][:, 1]


def neighbour_tree(xy_px: np.ndarray) -> cKDTree:
    """For the search of neighbours among spots (S, 2)."""
    from scipy.spatial import cKDTree  # a quarter of a second, which `--help` does not need

    return cKDTree(xy_px)


def _all_at_their_places(off: np.ndarray) -> bool:
    """Whether spots that lie `off` (S,) pitches from their places are still nearest to these."""
    return bool(off.max() < ALL_WITHIN and np.mean(off < MOST_WITHIN) >= MOST)


def _skips_places(xy_px: np.ndarray, pitch_px: float) -> bool:
    """Whether no two spots (S, 2) are neighbours, as of places in pixels or bins numbered in units of smaller bins;
    ten spots or more do not lie so by chance."""
    return len(xy_px) >= 10 and bool(nearest_px(xy_px).min() > NO_NEIGHBOUR * pitch_px)


def _repeated(rows: np.ndarray) -> bool:
    return len(np.unique(np.ascontiguousarray(rows, float).view(complex))) < len(rows)


def _check_apart(where: str, xy_px: np.ndarray) -> None:
    """Raises ValueError where two spots have their centre on one pixel."""
    if _repeated(xy_px):
        places, counts = np.unique(xy_px, axis=0, return_counts=True)
        x, y = places[np.argmax(counts)]
        raise ValueError(
            f"{where}: expected spots at different pixels, found {counts.max()} at x {x:g}, y {y:g}; several sections "
            "may be joined here: give each section a folder of its own"
        )


def array_places(where: str, xy_px: np.ndarray) -> np.ndarray:
    """Row and column of each spot on a square array, or on a staggered one as Visium counts it (their sum is even).

    Parameters
    ----------
    where : what messages name
    xy_px : ndarray (S, 2), centres of the spots, three of them at least

    Returns
    -------
    ndarray (S, 2) int. Raises ValueError where the spots lie on neither array.
    """
    remedy = "give array_row and array_col with the spots"
    if len(xy_px) < 3 or _repeated(xy_px):
        found = f"{len(xy_px)} spots" if len(xy_px) < 3 else "two spots at one pixel"
        raise ValueError(f"{where}: expected three spots or more at different pixels, found {found}; {remedy}")
    steps, off, staggered = _steps(xy_px)
    if not _all_at_their_places(off) or _repeated(steps):
        found = "two at one place" if _all_at_their_places(off) else f"one {off.max():.2f} pitches off its place"
        raise ValueError(f"{where}: expected spots on a square or a staggered array, found {found}; {remedy}")
    column, row = steps.astype(int).T
    if not staggered:
        return np.column_stack([row - row.min(), column - column.min()])
    row, column = row - row.min(), 2 * column + row
    column = column - column.min()
    return np.column_stack([row, column + (row + column)[0] % 2])


def _steps(xy_px: np.ndarray) -> tuple[np.ndarray, np.ndarray, bool]:
    """Whole steps (S, 2) along the two vectors of the lattice, how far spots are off (S,) in pitches, if staggered.

    The fit grows from the middle outwards: a small error of the first vectors would be whole places at the border.
    """
    basis, staggered = _basis(xy_px)
    length = float(np.linalg.norm(basis[0]))
    origin = xy_px[np.argmin(np.linalg.norm(xy_px - np.median(xy_px, axis=0), axis=1))]
    distance = np.linalg.norm(xy_px - origin, axis=1)
    radius = START_RADIUS * length
    while True:
        near = distance <= radius
        steps = np.rint((xy_px[near] - origin) @ np.linalg.inv(basis))
        fit, _, rank, _ = np.linalg.lstsq(np.column_stack([steps, np.ones(near.sum())]), xy_px[near], rcond=None)
        if rank == 3:
            basis, origin = fit[:2], fit[2]
        if near.all():
            break
        radius *= 1.5
    steps = np.rint((xy_px - origin) @ np.linalg.inv(basis))
    return steps, np.linalg.norm(steps @ basis + origin - xy_px, axis=1) / length, staggered


def _basis(xy_px: np.ndarray) -> tuple[np.ndarray, bool]:
    """Two vectors (2, 2) between neighbours, and whether spots have six of them (else four)."""
    usual_px = float(np.median(nearest_px(xy_px)))
    pairs = neighbour_tree(xy_px).query_pairs(NEAR * usual_px, output_type="ndarray")
    steps = (xy_px[pairs[:, 1]] - xy_px[pairs[:, 0]]) @ np.array([1, 1j])
    # On a lattice with n neighbours all n directions are alike after multiplication by n. Spots at a border lack some
    # of theirs, so the agreement of the directions decides, not the count of neighbours.
    agree = {n: np.mean((steps / np.abs(steps)) ** n) if len(steps) else 0j for n in (4, 6)}
    n = max(agree, key=lambda n: abs(agree[n]))
    turn = np.angle(agree[n]) / n  # the direction nearest to the x axis
    length = np.median(np.abs(steps)) if len(steps) else usual_px
    first, second = length * np.exp(1j * turn), length * np.exp(1j * (turn + 2 * np.pi / n))
    return np.array([[first.real, first.imag], [second.real, second.imag]]), n == 6
