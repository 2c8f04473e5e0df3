"""Intervals of a mean over spots by resampling blocks of neighbouring spots.

Shapes: S spots, K blocks. Neighbouring spots see overlapping tissue, so their hits and errors are correlated, and a
bootstrap over single spots gives intervals that are far too narrow. Blocks are nearly independent of each other.
Sources: Künsch 1989, Ann. Stat. 17:1217 (block bootstrap); McCarthy and Snowden 1985, Vital Health Stat. 2:95 (draws of
K - 1 units); Hesterberg 2015, Am. Stat. 69:371 (percentiles are too narrow for few units); Satterthwaite 1946,
Biometrics Bull. 2:110 (degrees of freedom).
"""

import math

import numpy as np
from scipy.special import stdtrit

_DRAWS_AT_ONCE = 200  # bounds memory: 200 x 20,000 blocks of a Visium HD slice are 32 MB


def blocks(xy: np.ndarray, pitch: float, side: float = 5) -> np.ndarray:
    """Cut one slice into square blocks.

    Parameters
    ----------
    xy : (S, 2)
        Spot centres, in any unit of length.
    pitch : float
        Distance of neighbouring spots, in the same unit.
    side : float
        Side of a block, in pitches.

    Returns
    -------
    (S,) block of each spot, numbered from 0 without gaps.
    """
    xy = np.asarray(xy, dtype=np.float64)
    if not pitch > 0:
        raise ValueError(f"pitch: expected a length above 0, found {pitch}")
    # half a pitch of margin: spots of a regular grid then lie off the borders, where rounding would decide
    column, row = np.floor(((xy - xy.min(axis=0)) / pitch + 0.5) / side).astype(np.int64).T
    return np.unique(column * (row.max() + 1) + row, return_inverse=True)[1].reshape(-1)


def block_bootstrap_interval(
    values: np.ndarray,
    block_ids: np.ndarray,
    n_draws: int = 2000,
    level: float = 0.95,
    seed: int = 0,
    strata: np.ndarray | None = None,
) -> tuple[float, float]:
    """Interval of the mean of `values`, or, with `strata`, of the mean over slices of each slice's own mean.

    Blocks are drawn with replacement within their slice; a mean is a ratio of sums, as blocks at the tissue's edge
    are small. The interval is the mean and, on both sides, Student's quantile times the deviation of the resampled
    means: percentiles are far too narrow for few blocks. It may reach below 0 or above 1 for fractions. The slices'
    degrees of freedom are joined by Satterthwaite's rule: where a small slice makes most of the variance, it also sets
    how well that is known. A slice of one block is resampled by spot. Its interval is too narrow, and so is any
    interval where spots are correlated over more than a block.

    Parameters
    ----------
    values : (S,)
        Hits or errors per spot.
    block_ids : (S,)
        From `blocks`; equal numbers in different slices are different blocks.
    strata : (S,) or None
        Slice of each spot; None: one slice.

    Returns
    -------
    low, high. Both NaN where a value is, and where a slice has a single spot.
    """
    values, block_ids = np.asarray(values, dtype=np.float64), np.asarray(block_ids)
    strata = np.zeros(len(values)) if strata is None else np.asarray(strata)
    if not len(values) == len(block_ids) == len(strata):
        raise ValueError(
            f"expected a block and a slice per value, found {len(values)}, {len(block_ids)}, {len(strata)}"
        )
    rng = np.random.default_rng(seed)
    slices = [(values[strata == name], units(block_ids[strata == name])) for name in np.unique(strata)]
    n_units = np.array([int(unit.max()) + 1 for _, unit in slices])
    if n_units.min() < 2:
        return math.nan, math.nan
    variances = np.array([_resampled_means(in_slice, unit, n_draws, rng).var() for in_slice, unit in slices])
    mean = np.mean([in_slice.mean() for in_slice, _ in slices])
    if not variances.any():
        return float(mean), float(mean)
    freedom = variances.sum() ** 2 / np.sum(variances**2 / (n_units - 1))
    half = stdtrit(freedom, (1 + level) / 2) * np.sqrt(variances.sum()) / len(slices)
    return float(mean - half), float(mean + half)


def units(block_ids: np.ndarray) -> np.ndarray:
    """The unit to resample that each spot of ONE slice belongs to, from 0 without gaps: its block, or the spot itself
    where the slice has a single block: (S,) -> (S,)."""
    unit = np.unique(block_ids, return_inverse=True)[1].reshape(-1)
    return unit if unit.max() > 0 else np.arange(len(unit))


def draw(n_units: int, n_draws: int, rng: np.random.Generator) -> np.ndarray:
    """How often each of K units is drawn when K - 1 are drawn with replacement: (n_draws, K).

    The means of K - 1 have the variance of the mean of K: those of K draws would have (K - 1) / K of it.
    """
    return rng.multinomial(max(n_units - 1, 1), np.full(n_units, 1 / n_units), size=n_draws)


def _resampled_means(values: np.ndarray, unit: np.ndarray, n_draws: int, rng: np.random.Generator) -> np.ndarray:
    """Means of `n_draws` resampled slices, each a ratio of sums: (S,), (S,) of `units` -> (n_draws,)."""
    sums, sizes, means = np.bincount(unit, weights=values), np.bincount(unit).astype(np.float64), []
    for start in range(0, n_draws, _DRAWS_AT_ONCE):
        times = draw(len(sums), min(_DRAWS_AT_ONCE, n_draws - start), rng)
        means.append((times @ sums) / (times @ sizes))
    return np.concatenate(means)
