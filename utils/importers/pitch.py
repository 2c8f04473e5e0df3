"""The distance between neighbouring spots in um, from whichever of the stated sizes fits the spots.

A pixel size s (um per px) and a distance d (um from spot to spot) say the same of spots that are p px apart where
s p = d. Files state several of both, some of them wrong: HEST-1k repeats what a resolution tag made up, and gives the
distance of the smallest bins for pooled ones.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from utils.slices.lattice import Lattice
from utils.slices.visium import VISIUM_PITCH_UM

PLAUSIBLE_UM_PER_PX = (0.05, 20.0)  # of microscopes
SQUARE_PITCHES_UM = (2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 100.0, 200.0)  # bins of Visium HD, arrays of legacy ST
AGREE = 0.05


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
    def plausible(self) -> bool:
        return PLAUSIBLE_UM_PER_PX[0] <= self.um_per_px <= PLAUSIBLE_UM_PER_PX[1]


def positive(value: Any) -> float | None:
    """A positive finite number, None where something else or nothing is stated."""
    try:
        number = float(value)
    except (TypeError, ValueError):
        return None
    return number if 0 < number < math.inf else None


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
    plausible = [one for one in stated if one.plausible]
    if not plausible:
        raise ValueError(
            f"{where}: expected a staggered array or a stated pixel size, found a square array and none; "
            "use --spot_pitch_um"
        )
    best = max(plausible, key=lambda one: _evidence(one, plausible, lattice.pitch_px))  # the first of equals
    distances = (one.distance_um for one in plausible if one.distance_um and agree(one.um_per_px, best.um_per_px))
    return next(distances, best.um_per_px * lattice.pitch_px)


def _evidence(one: Stated, others: list[Stated], pitch_px: float) -> int:
    """Number of other origins that agree, and one more where the pitch is that of a known array."""
    agreeing = {other.origin for other in others if agree(one.um_per_px, other.um_per_px)} - {one.origin}
    known = any(agree(one.um_per_px * pitch_px, pitch_um) for pitch_um in SQUARE_PITCHES_UM)
    return len(agreeing) + known


def agree(one: float, other: float) -> bool:
    """Whether two sizes are the same within a few percent."""
    return abs(one - other) <= AGREE * other


def contradictions(stated: Iterable[Stated]) -> dict[str, float]:
    """Statements to compare with the spots, um per px by where they stand: all distances, and plausible pixel sizes."""
    return {one.where: one.um_per_px for one in stated if one.plausible or one.distance_um}
