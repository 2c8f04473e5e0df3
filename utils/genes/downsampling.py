"""Spots thinned to a common depth: slices sequenced 15 times deeper than others then give bins of the same sharpness.

Letters: S spots, P genes of a panel.
"""

from __future__ import annotations

import hashlib

import numpy as np


def spot_seeds(slice_name: str, barcodes: np.ndarray) -> np.ndarray:
    """A number for each spot that its slice's name and its barcode alone decide: (S,) uint64."""
    digests = (hashlib.sha256(f"{slice_name}\n{barcode}".encode()).digest() for barcode in barcodes)
    return np.array([int.from_bytes(digest[:8], "little") for digest in digests], np.uint64)


def thin_counts(
    counts: np.ndarray, total_counts: np.ndarray, depth: int, seeds: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """`depth` of the molecules of each spot, drawn without replacement over all its genes; spots with fewer stay.

    What is drawn of each panel gene, and of all other genes together, is multivariate hypergeometric: the whole matrix
    is not needed. The same seeds give the same counts.

    Parameters
    ----------
    counts : (S, P) whole numbers, of the panel's genes
    total_counts : (S,) over all genes of the slice
    depth : what no spot's total is above afterwards
    seeds : (S,) of `spot_seeds`

    Returns
    -------
    Counts (S, P) and total counts (S,), of the types given. Raises ValueError where a total is below the panel's sum.
    """
    deeper = np.flatnonzero(total_counts > depth)
    thinned, totals = counts.copy(), np.minimum(total_counts, depth).astype(total_counts.dtype)
    for spot in deeper:
        found = np.flatnonzero(counts[spot])  # a few of 16,906
        own = counts[spot, found].astype(np.int64)
        rest = int(total_counts[spot]) - own.sum()
        if rest < 0:
            raise ValueError(f"spot {spot}: its panel genes sum to {own.sum()}, above its total {total_counts[spot]:g}")
        draws = np.random.default_rng(int(seeds[spot]))
        thinned[spot, found] = draws.multivariate_hypergeometric([*own, rest], depth, method="marginals")[:-1]
    return thinned, totals
