"""The k best matches of each query in a gallery of any size, exactly: by blocks, so that the scores fit into memory.

Letters: Q queries, N gallery rows, D width, M numbers to choose from.
"""

from __future__ import annotations

import torch
from torch import Tensor

QUERIES_AT_ONCE = 1024  # 16 MB of scores in blocks of 4096 rows


@torch.no_grad()
def top_k(queries: Tensor, gallery: Tensor, k: int, block: int = 4096) -> tuple[Tensor, Tensor]:
    """The k largest scalar products of each query with rows of the gallery, best first, of equal ones the lower row.

    Parameters
    ----------
    queries : (Q, D) on the device and in the precision of the products
    gallery : (N, D) of any precision, on any device, also memory-mapped: it is read once, by blocks
    k : from 1 to N
    block : rows of the gallery to take at a time

    Returns
    -------
    scores (Q, k) and rows (Q, k) of the gallery. A score that is NaN counts as -inf.
    """
    if queries.ndim != 2 or gallery.ndim != 2 or queries.shape[1] != gallery.shape[1]:
        shapes = f"{tuple(queries.shape)} and {tuple(gallery.shape)}"
        raise ValueError(f"expected queries (Q, D) and a gallery (N, D) of one width D, found shapes {shapes}")
    if not 1 <= k <= len(gallery):
        raise ValueError(f"expected k from 1 to the {len(gallery)} rows of the gallery, found {k}; take a smaller k")
    parts = list(queries.split(QUERIES_AT_ONCE))
    best = [
        (part.new_empty(len(part), 0), torch.empty(len(part), 0, dtype=torch.long).to(part.device)) for part in parts
    ]
    for first in range(0, len(gallery), block):
        rows = gallery[first : first + block].to(queries)
        best = [_merged(part @ rows.T, first, k, *kept) for part, kept in zip(parts, best, strict=True)]
    return torch.cat([scores for scores, _ in best]), torch.cat([rows for _, rows in best])


def _merged(found: Tensor, first: int, k: int, scores: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """The best so far, scores and rows (Q, k), and those of a block, whose scores (Q, M) begin with row `first`."""
    if found.isnan().any():
        found = found.nan_to_num(-torch.inf, torch.inf, -torch.inf)
    columns = _largest(found, k)
    both = torch.cat([scores, found.gather(1, columns)], 1)  # earlier rows on the left: they win a tie
    both_rows = torch.cat([rows, columns + first], 1)
    order = _largest(both, k)
    return both.gather(1, order), both_rows.gather(1, order)


def _largest(values: Tensor, k: int) -> Tensor:
    """Columns of the k largest of each row, best first, of equal ones the left: (Q, M) -> (Q, k)."""
    best, columns = values.topk(min(k + 1, values.shape[1]), dim=1)
    tied = (best[:, 1:] == best[:, :-1]).any(1)  # topk may have kept any of those that are equal, in any order
    if tied.any():
        columns[tied] = values[tied].sort(dim=1, descending=True, stable=True).indices[:, : columns.shape[1]]
    return columns[:, :k]
