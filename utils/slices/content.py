"""Hashes of a slice: of its counts, by which the same section under two names is found, and of its files.

Shapes: S spots, G genes.
"""

import hashlib
import math
from pathlib import Path

import numpy as np
from scipy.sparse import csr_matrix

from utils.files.hashing import content_hash
from utils.slices.folders import POSITION_FILES
from utils.slices.matrix import StoredCounts, first_of, longest, matrix_files, runs, slice_matrix, spans


def _by_rank(counts: csr_matrix, rank: np.ndarray) -> csr_matrix:
    """Counts (S, names) int64 with genes in the places `rank` (G,), those of one place added, in ascending order."""
    by_place = csr_matrix(
        (counts.data.astype(np.int64), rank[counts.indices], counts.indptr), (len(counts.indptr) - 1, rank.max() + 1)
    )
    by_place.sum_duplicates()
    by_place.eliminate_zeros()
    return by_place


def counts_hash(
    counts: csr_matrix | StoredCounts, barcodes: np.ndarray, genes: np.ndarray, memory: float = math.inf
) -> str:
    """SHA-256 of what was counted: the same for any order of spots and genes, with or without genes never seen.

    Parameters
    ----------
    counts : (S, G) of whole numbers
    barcodes : ndarray (S,) of str, each once
    genes : ndarray (G,) of str; counts of a repeated name are added, so that their order is irrelevant too
    memory : bytes for the counts that are looked at together; the hash does not depend on it
    """
    names, rank = np.unique(np.asarray(genes, dtype=str), return_inverse=True)
    n_names, seen = np.zeros(counts.shape[0], np.int64), np.zeros(len(names), bool)
    for span in spans(counts, memory):
        part = _by_rank(counts[span], rank)
        n_names[span] = np.diff(part.indptr)
        seen[part.indices] = True
    spots = np.flatnonzero(n_names)
    spots = spots[np.argsort(np.asarray(barcodes, dtype=str)[spots])]
    stops = np.cumsum(n_names[spots])
    digest = hashlib.sha256("\n".join([*barcodes[spots], "", *names[seen], ""]).encode())
    digest.update(np.append(0, stops).astype("<i8").tobytes())  # one width on every machine
    lengths = np.diff(counts.indptr)[spots]
    stops, place = np.cumsum(lengths), (np.cumsum(seen) - 1).astype("<i8")
    in_order = [spots[run] for run in runs(stops - lengths, stops, longest(memory))]
    for rows in in_order:
        digest.update(place[_by_rank(counts[rows], rank).indices])
    for rows in in_order:  # read again: a digest has no second place to write to
        digest.update(_by_rank(counts[rows], rank).data.astype("<i8"))
    return digest.hexdigest()


def files_hash(root: Path) -> str | None:
    """SHA-256 of the files that spots and counts are read from, matrix and positions; None where there are no counts.

    Quick, where `counts_hash` reads the counts: what was made of a slice is checked by it before it is used.
    """
    matrix = slice_matrix(root)
    if matrix is None:
        return None
    positions = first_of(root / "spatial", POSITION_FILES)
    hashes = [content_hash(path) for path in (*matrix_files(matrix), positions) if path is not None]
    return hashlib.sha256("\n".join(hashes).encode()).hexdigest()
