"""The k best matches of each query in a gallery of any size, exactly and with little memory.

Letters: Q queries, N gallery rows, D width, B rows of a block, C consecutive rows of a chunk, W queries whose best a
block may still change, M numbers to choose from.

Choosing must cost little beside the products. So a block's scores are read once, for the highest of each chunk, and
only where that beats a query's k-th best so far the few chunks in question are looked into. In random order a block
that comes after t others changes the best of about k / t queries.
"""

from __future__ import annotations

import torch
from torch import Tensor

CHUNK = 16
QUERIES_AT_ONCE = 1024  # 16 MB of scores in blocks of 4096 rows


@torch.no_grad()
def top_k(
    queries: Tensor, gallery: Tensor, k: int, bias: Tensor | None = None, block: int = 4096
) -> tuple[Tensor, Tensor]:
    """The k largest scalar products of each query with rows of the gallery, best first, of equal ones the lower row.

    Parameters
    ----------
    queries : (Q, D) on the device and in the precision of the products
    gallery : (N, D) of any precision, on any device, also memory-mapped: it is read once, by blocks
    k : from 1 to N
    bias : (N,) added to the scores; with -|row|^2 / 2 the best are the nearest by Euclidean distance
    block : rows of the gallery to take at a time

    Returns
    -------
    scores (Q, k) and rows (Q, k) of the gallery. A score that is NaN counts as -inf.
    """
    _check(queries, gallery, k, bias)
    block = -(-max(k, min(block, len(gallery))) // CHUNK) * CHUNK  # the first block fills all k places
    scores = queries.new_full((len(queries), k), torch.nan)
    rows = torch.zeros_like(scores, dtype=torch.long)
    buffer = queries.new_empty(block * min(QUERIES_AT_ONCE, len(queries)))
    for first in range(0, len(gallery), block):
        part = gallery[first : first + block].to(queries)
        added = None if bias is None else bias[first : first + block, None].to(queries)
        for some, *best in zip(*(each.split(QUERIES_AT_ONCE) for each in (queries, scores, rows)), strict=True):
            found = buffer[: block * len(some)].view(block, len(some))
            _products(part, some, added, found)
            _merge(found, first, *best)
    return scores, rows


def _check(queries: Tensor, gallery: Tensor, k: int, bias: Tensor | None) -> None:
    if queries.ndim != 2 or gallery.ndim != 2 or queries.shape[1] != gallery.shape[1]:
        shapes = f"{tuple(queries.shape)} and {tuple(gallery.shape)}"
        raise ValueError(f"expected queries (Q, D) and a gallery (N, D) of one width D, found shapes {shapes}")
    if not 1 <= k <= len(gallery):
        raise ValueError(f"expected k from 1 to the {len(gallery)} rows of the gallery, found {k}; take a smaller k")
    if bias is not None and bias.shape != gallery.shape[:1]:
        raise ValueError(f"expected a bias for each of {len(gallery)} gallery rows, found shape {tuple(bias.shape)}")


def _products(part: Tensor, queries: Tensor, bias: Tensor | None, found: Tensor) -> None:
    """Scores of up to B rows (<= B, D) and queries (Q, D) into `found` (B, Q), -inf for rows that the last block lacks.

    A query per column: the highest of a chunk is then taken over whole lines of memory.
    """
    torch.mm(part, queries.T, out=found[: len(part)])
    if bias is not None:
        found[: len(part)] += bias
    found[len(part) :] = -torch.inf


def _merge(found: Tensor, first: int, scores: Tensor, rows: Tensor) -> None:
    """Enter a block's scores (B, Q) into the best so far, scores and rows (Q, k); it begins with gallery row `first`.

    Scores of NaN stand for "none yet": everything beats them. A tie beats nothing, the lower row came earlier.
    """
    k, peaks = scores.shape[1], _peaks(found)
    which = (~(peaks.amax(0) <= scores[:, -1])).nonzero().squeeze(1)  # (W,)
    if not len(which):
        return
    peaks = peaks[:, which].T
    n_beating = int((~(peaks <= scores[which, -1:])).sum(1).max())
    chunks = _largest(peaks, min(k, n_beating))
    seen = (chunks[:, :, None] * CHUNK + torch.arange(CHUNK, device=found.device)).flatten(1)
    new, seen = found[seen, which[:, None]], seen + first
    if first:  # rows ascend from left to right among equal scores, so that the left one wins a tie
        new, seen = torch.cat([scores[which], new], 1), torch.cat([rows[which], seen], 1)
    best = _largest(new, k)
    scores[which], order = new.gather(1, best).sort(dim=1, descending=True, stable=True)
    rows[which] = seen.gather(1, best.gather(1, order))


def _peaks(found: Tensor) -> Tensor:
    """The highest score of each chunk: (B, Q) -> (B / C, Q). NaN in `found` becomes -inf."""
    peaks = found.unflatten(0, (-1, CHUNK)).amax(1)
    if peaks.isnan().any():
        peaks = found.nan_to_num_(-torch.inf, torch.inf, -torch.inf).unflatten(0, (-1, CHUNK)).amax(1)
    return peaks


def _largest(values: Tensor, k: int) -> Tensor:
    """Columns of the k largest of each row, ascending; of equal ones the left: (W, M) -> (W, k)."""
    best, columns = values.topk(min(k + 1, values.shape[1]), dim=1)
    if (best[:, k - 1 : k] == best[:, k:]).any():  # topk may have kept any of those that are equal
        columns = values.sort(dim=1, descending=True, stable=True).indices
    return columns[:, :k].sort(dim=1).values
