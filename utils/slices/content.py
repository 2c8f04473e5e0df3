"""Hashes of a slice: of its counts, by which the same section under two names is found, and of its files.

A section of which some spots or genes were left out is found by the total counts of its spots.
Shapes: S spots, G genes.
"""

import hashlib
import math
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from scipy.sparse import csr_matrix

from utils.files.hashing import content_hash
from utils.slices.folders import POSITION_FILES
from utils.slices.matrix import StoredCounts, first_of, longest, matrix_files, runs, slice_matrix, spans

# Totals of a copy, scaled by the median ratio, are within 2 % of the original's in all spots where spots or rare genes
# are left out, in 60 % and more where the gene of most counts is, in under 50 % where 2,000 genes remain; those of
# different sections, neighbouring ones too, in 8 % at most (five HER2+ sections, four simulated ones)
N_COMPARED, LEAST_SHARED = 128, 40  # spots of a slice, and how many of them the other one has too
TOLERANCE, COPIED = 0.02, 0.5  # relative difference, and the fraction of spots within it
BY_CHANCE = 0.15  # the fraction of pairs of any spots: where it is larger, all spots have about the same total


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


def copies(slices: Sequence[tuple[np.ndarray, np.ndarray]], groups: Sequence[str]) -> Iterator[tuple[int, int]]:
    """Pairs of slices of different groups whose spots have the same total counts, but for a factor.

    Parameters
    ----------
    slices : barcodes (S,) and total counts (S,) of each slice
    groups : of each slice; quick where most are in the first one
    """
    logs, group = _log_totals(slices), np.array(groups)
    for i in np.flatnonzero(group != group[0]):
        others = np.flatnonzero((group != group[i]) & ((group == group[0]) | (np.arange(len(group)) > i)))
        spots = np.isfinite(logs[i])
        ratios = np.sort(logs[others][:, spots] - logs[i, spots], axis=1)  # NaN last
        n_both = np.isfinite(ratios).sum(axis=1)
        for k in np.flatnonzero(n_both >= LEAST_SHARED):
            median = ratios[k, n_both[k] // 2]
            if np.mean(np.abs(ratios[k, : n_both[k]] - median) <= TOLERANCE) >= COPIED:
                of_any = np.subtract.outer(logs[others[k], spots], logs[i, spots]) - median
                if np.mean(np.abs(of_any[np.isfinite(of_any)]) <= TOLERANCE) <= BY_CHANCE:
                    yield int(others[k]), int(i)


def _log_totals(slices: Sequence[tuple[np.ndarray, np.ndarray]]) -> np.ndarray:
    """Logarithms of total counts, a row for each slice and a column for each barcode that some share; NaN without."""
    tables = [_first_totals(*slice_) for slice_ in slices]
    barcodes, number = np.unique(np.concatenate([list(table) for table in tables]), return_counts=True)
    place = {barcode: i for i, barcode in enumerate(barcodes[number > 1].tolist())}
    logs = np.full((len(tables), len(place)), np.nan, np.float32)
    for row, table in zip(logs, tables, strict=True):
        shared = {place[barcode]: total for barcode, total in table.items() if barcode in place}
        row[list(shared)] = np.log(list(shared.values()))
    return logs


def _first_totals(barcodes: np.ndarray, totals: np.ndarray) -> dict[str, float]:
    """Total counts of the first spots by barcode that have some; by barcode without -1 and the like if none repeats."""
    barcodes, totals = barcodes[totals > 0].astype(str), totals[totals > 0]
    first = np.argsort(barcodes)[:N_COMPARED]
    names, cores = barcodes[first].tolist(), [barcode.partition("-")[0] for barcode in barcodes[first]]
    return dict(zip(cores if len(set(cores)) == len(cores) else names, totals[first].tolist(), strict=True))
