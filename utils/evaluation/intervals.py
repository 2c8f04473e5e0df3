"""Intervals that hold a measured value with a stated probability: split-conformal prediction, gene by gene.

    low, high = predicted + conformal_offsets(measured - predicted)          # on spots that did not train the model

If the spots of a new slide were drawn like the calibration spots, the interval would hold at least `level` of the
measured values (Lei et al. 2018, J. Am. Stat. Assoc. 113:1094). Spots of another patient are not.
Shapes: S spots, G genes.
"""

import numpy as np

LEVEL = 0.9


def conformal_offsets(errors: np.ndarray, level: float = LEVEL) -> np.ndarray:
    """What is added to a prediction for the ends of its interval: (S, G) -> (2, G), low and high.

    The ends are quantiles of the errors, each tail of (1 - level) / 2, with the ranks of split-conformal prediction:
    the k-th smallest and the k-th largest of n errors, k = floor((n + 1) (1 - level) / 2).

    Parameters
    ----------
    errors : (S, G)
        Measured minus predicted on calibration spots; NaN where a gene was not measured.

    Returns
    -------
    (2, G), NaN for a gene with so few errors that k is 0, under 19 at a level of 0.9.
    """
    if not 0 < level < 1:
        raise ValueError(f"level: expected a number between 0 and 1, found {level}")
    ordered = np.sort(np.asarray(errors), axis=0)  # NaN last
    n = np.isfinite(ordered).sum(axis=0)
    k = np.floor((n + 1) * (1 - level) / 2 + 1e-9).astype(int)
    places = np.stack([np.maximum(k, 1) - 1, np.maximum(n - k, 0)])
    ends = np.take_along_axis(ordered, np.minimum(places, max(len(ordered) - 1, 0)), axis=0) if len(ordered) else places
    return np.where(k > 0, ends, np.nan).astype(np.float32)


def coverage(measured: np.ndarray, low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """Fraction of the genes of each spot whose measured value lies in the interval: (S, G) each -> (S,).

    Genes that are NaN on either side are left out; the mean over spots is that over genes where none is.
    """
    known = np.isfinite(measured) & np.isfinite(low) & np.isfinite(high)
    inside = known & (measured >= low) & (measured <= high)
    return np.where(known.any(1), inside.sum(1) / np.maximum(known.sum(1), 1), np.nan)
