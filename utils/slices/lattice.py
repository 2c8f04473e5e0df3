"""Places on an array from the pixels of its spots, for data that keep coordinates only.

Shapes: S spots.
"""

from __future__ import annotations

import numpy as np

NEAR = 1.2  # nearest distances: between the first ring of neighbours and the second (1.41 or 1.73)
FARTHEST = 0.25  # nearest distances that a spot may lie off its place
START_RADIUS = 6.0  # nearest distances around the middle, where the first fit is made


def _basis(xy_px: np.ndarray) -> tuple[np.ndarray, bool]:
    """Two vectors (2, 2) between neighbours, and whether spots have six of them (else four)."""
    from scipy.spatial import KDTree

    tree = KDTree(xy_px)
    nearest_px = float(np.median(tree.query(xy_px, k=2)[0][:, 1]))
    pairs = tree.query_pairs(NEAR * nearest_px, output_type="ndarray")
    steps = (xy_px[pairs[:, 1]] - xy_px[pairs[:, 0]]) @ np.array([1, 1j])
    # On a lattice with n neighbours all n directions are alike after multiplication by n. Spots at a border lack some
    # of theirs, so the count of neighbours says little; that the directions agree says all.
    agree = {n: np.mean((steps / np.abs(steps)) ** n) if len(steps) else 0j for n in (4, 6)}
    n = max(agree, key=lambda n: abs(agree[n]))
    turn = np.angle(agree[n]) / n  # the direction nearest to the x axis
    length = np.median(np.abs(steps)) if len(steps) else nearest_px
    first, second = length * np.exp(1j * turn), length * np.exp(1j * (turn + 2 * np.pi / n))
    return np.array([[first.real, first.imag], [second.real, second.imag]]), n == 6


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
    mend = "give array_row and array_col with the spots"
    if len(xy_px) < 3 or len(np.unique(xy_px, axis=0)) < len(xy_px):
        raise ValueError(f"{where}: expected three spots or more at different pixels, found {len(xy_px)} spots; {mend}")
    basis, is_staggered = _basis(xy_px)
    length = float(np.linalg.norm(basis[0]))
    middle = np.median(xy_px, axis=0)
    origin = xy_px[np.argmin(np.linalg.norm(xy_px - middle, axis=1))]
    distance = np.linalg.norm(xy_px - origin, axis=1)
    radius = START_RADIUS * length
    while True:  # from the middle outwards: a small error of the first vectors would grow to whole places at the border
        near = distance <= radius
        steps = np.rint((xy_px[near] - origin) @ np.linalg.inv(basis))
        fit, _, rank, _ = np.linalg.lstsq(np.column_stack([steps, np.ones(near.sum())]), xy_px[near], rcond=None)
        if rank == 3:
            basis, origin = fit[:2], fit[2]
        if near.all():
            break
        radius *= 1.5
    steps = np.rint((xy_px - origin) @ np.linalg.inv(basis))
    off = np.linalg.norm(steps @ basis + origin - xy_px, axis=1) / length
    if off.max() > FARTHEST or len(np.unique(steps, axis=0)) < len(steps):
        found = f"one {off.max():.2f} pitches off its place" if off.max() > FARTHEST else "two at one place"
        raise ValueError(f"{where}: expected spots on a square or a staggered array, found {found}; {mend}")
    column, row = steps.astype(int).T
    if not is_staggered:
        return np.column_stack([row - row.min(), column - column.min()])
    row, column = row - row.min(), 2 * column + row
    column = column - column.min()
    return np.column_stack([row, column + (row + column)[0] % 2])
