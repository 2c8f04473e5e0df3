"""The out-of-domain score of a model: the statistics of its tiles beside their features, its bank, its limits.

A spot's score is its distance to the train spots over a limit, so that above 1 it is out of domain; a slide's score
likewise. Letters: B batch, S spots, R views, N rows of features, D their width, K statistics.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from model import domain
from utils.features import neighbourhoods
from utils.features.dataset import SliceData

QUANTILE = 0.99  # of the calibration spots' distances: the limit of a spot
CROP = 60  # spots that a slide has at least for its test; calibration slices are cut into crops of so many
SLIDE_MARGIN = 1.3  # on the largest of the calibration crops: they are few
CONTENT = f"{domain.N_STATISTICS} statistics of each tile"  # for the key of kept features
Domain = dict[str, Tensor]


def n_rows(width: int) -> int:
    """Rows of features that the statistics of a tile take."""
    return -(-domain.N_STATISTICS // width)


def with_statistics(features: Tensor, tiles: Tensor) -> Tensor:
    """Features (B, ..., N, D) of tiles (B, 3, Z, Z) with the tiles' statistics as last rows, padded with zeros."""
    width = features.shape[-1]
    rows = domain.tile_statistics(tiles)
    rows = torch.nn.functional.pad(rows, (0, n_rows(width) * width - rows.shape[1])).unflatten(1, (-1, width))
    between = features.shape[1:-2]
    rows = rows.reshape(len(rows), *(1 for _ in between), *rows.shape[1:]).expand(-1, *between, -1, -1)
    return torch.cat([features.float(), rows], dim=-2)  # half a float of bf16 would be too coarse for statistics


def split_statistics(kept: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """What `with_statistics` put together: features (S, ..., N, D), and statistics (S, K) float32."""
    n, statistics = n_rows(kept.shape[-1]), np.empty((len(kept), domain.N_STATISTICS), np.float32)
    first_view = kept[:, 0] if kept.ndim == 4 else kept
    for block in neighbourhoods.blocks(len(kept)):
        rows = first_view[block, -n:].reshape(block.stop - block.start, -1)
        statistics[block] = rows[:, : domain.N_STATISTICS]
        neighbourhoods.release(kept)
    return kept[..., :-n, :], statistics


def fit(slices: Sequence[SliceData], statistics: Sequence[np.ndarray], seed: int) -> tuple[Domain, str]:
    """Bank and limits of a model, and on which spots these were calibrated.

    Calibration spots are those of validation slices; where there are none, each train slice in turn by a bank of the
    others; of a single train slice, its validation strip.

    Parameters
    ----------
    statistics : per slice (S, K)
    """
    values = [torch.from_numpy(np.ascontiguousarray(of_slice)) for of_slice in statistics]
    rows = {part: [slice_.rows_of(part) for slice_ in slices] for part in ("train", "val")}
    train = [v[r] for v, r in zip(values, rows["train"], strict=True) if len(r)]
    whole = [len(v) > 0 and len(t) == 0 for v, t in zip(rows["val"], rows["train"], strict=True)]
    bank = domain.fit_bank(train, seed)
    if any(whole):
        name = "validation slices"
        found = [domain.distances(v[r], bank) for v, r, w in zip(values, rows["val"], whole, strict=True) if w]
    elif len(train) > 1:
        name = "left-out train slices"
        others = [domain.fit_bank(train[:i] + train[i + 1 :], seed) for i in range(len(train))]
        found = [domain.distances(spots, other) for spots, other in zip(train, others, strict=True)]
    else:
        name = "validation strip of the train slice"
        found = [domain.distances(v[r], bank) for v, r in zip(values, rows["val"], strict=True) if len(r)]
    return bank | limits(found), name


def limits(found: list[Tensor]) -> Domain:
    """Limits of a spot's and of a slide's distance, by the distances of calibration spots, per slice (S,)."""
    crops = [crop for of_slice in found for crop in of_slice.tensor_split(max(1, len(of_slice) // CROP))]
    slide = torch.stack([domain.slide_distance(crop) for crop in crops]).max()
    return {"limit": torch.quantile(torch.cat(found), QUANTILE), "slide_limit": SLIDE_MARGIN * slide}


def scores(statistics: np.ndarray, fitted: Domain) -> tuple[np.ndarray, float]:
    """Scores of the spots (S, K) of a slide, (S,), and of the slide; above 1 is out of domain."""
    distance = domain.distances(torch.from_numpy(np.ascontiguousarray(statistics)), fitted)
    return (distance / fitted["limit"]).numpy(), float(domain.slide_distance(distance) / fitted["slide_limit"])
