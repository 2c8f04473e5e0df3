"""The distance between neighbouring spots in um, from whichever of the stated sizes fits the spots.

A pixel size s (um per px) and a distance d (um from spot to spot) agree for spots that are p px apart where
s p = d. Files state several of both, some of them wrong: HEST-1k repeats what a resolution tag made up, and gives the
distance of the smallest bins for pooled ones.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from utils.images.units import plausible
from utils.slices.lattice import Lattice
from utils.slices.spatial_files import positive
from utils.slices.visium import DISAGREE, VISIUM_PITCH_UM

SQUARE_PITCHES_UM = (2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 100.0, 200.0)  # bins of Visium HD, arrays of legacy ST


@dataclass(frozen=True)
class Stated:
    """A size that a file states.

    Attributes
    ----------
    where : str, what messages name
    um_per_px : float, size of a full-resolution pixel, of a distance as the spots translate it
    origin : str, statements of one origin repeat each other and are no evidence of each other
    distance_um : float, the distance between spots where it is stated; None for the size of a pixel
    """

    where: str
    um_per_px: float
    origin: str
    distance_um: float | None = None

    @property
    def is_plausible(self) -> bool:
        return plausible(self.um_per_px)


def pixel_size(where: str, value: Any, origin: str) -> list[Stated]:
    """A stated um per px; nothing where there is no positive number."""
    number = positive(value)
    return [] if number is None else [Stated(where, number, origin)]


def distance(where: str, value: Any, pitch_px: float) -> list[Stated]:
    """A stated distance between spots that are `pitch_px` apart; nothing where there is no positive number."""
    number = positive(value)
    return [] if number is None else [Stated(f"{where} {number:g} um", number / pitch_px, "distance", number)]


def choose_pitch_um(where: str, lattice: Lattice, given: float | None, stated: Iterable[Stated]) -> float:
    """The distance between spots in um: as given, Visium's on a staggered array, else of the statement that fits best.

    A statement fits by each other origin that agrees with it, and by the pitch being that of a known array. Raises
    ValueError where nothing plausible is stated.
    """
    if given is not None:
        return given
    if lattice.staggered:
        return VISIUM_PITCH_UM
    candidates = [size for size in stated if size.is_plausible]
    if not candidates:
        raise ValueError(
            f"{where}: expected a staggered array or a stated pixel size, found a square array and none; "
            "use --spot_pitch_um"
        )
    best = max(candidates, key=lambda size: _evidence(size, candidates, lattice.pitch_px))  # the first of equals
    distances = (size.distance_um for size in candidates if size.distance_um and agree(size.um_per_px, best.um_per_px))
    return next(distances, best.um_per_px * lattice.pitch_px)


def _evidence(size: Stated, others: list[Stated], pitch_px: float) -> int:
    """Number of other origins that agree, and one more where the pitch is that of a known array."""
    agreeing = {other.origin for other in others if agree(size.um_per_px, other.um_per_px)} - {size.origin}
    known = any(agree(size.um_per_px * pitch_px, pitch_um) for pitch_um in SQUARE_PITCHES_UM)
    return len(agreeing) + known


def agree(size: float, other: float) -> bool:
    """Whether two sizes are the same within a few percent."""
    return abs(size - other) <= DISAGREE * other


def contradictions(stated: Iterable[Stated]) -> dict[str, float]:
    """Statements to compare with the spots, um per px by where they stand: all distances, and plausible pixel sizes."""
    return {size.where: size.um_per_px for size in stated if size.is_plausible or size.distance_um}
