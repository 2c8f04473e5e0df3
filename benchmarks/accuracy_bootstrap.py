"""Paired bootstrap of the mean PCC per gene, over genes and over blocks of neighbouring spots within their slices.

A resampled correlation is one of resampled moments: with the sums of each block at hand (spots, p, t, pp, tt, pt of
every gene) a draw is a product of how often each block was drawn with those sums, and no spot is touched again.
Shapes: S spots, G genes and K blocks of a slice, D draws.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from utils.evaluation import metrics

N_DRAWS = 2000
FLAT = 1e-12  # variance, of a gene standardised over its slice, under which it does not vary in a draw


@dataclass(frozen=True)
class Resamples:
    """What is drawn, once for all rows and seeds that are compared."""

    members: list[np.ndarray]  # per slice (S,) block of each spot, from 0 without gaps
    blocks: list[np.ndarray]  # per slice (D, K) times that a block was drawn
    genes: np.ndarray  # (D, G) times that a gene was drawn


def resample(block_ids: Sequence[np.ndarray], n_genes: int, n_draws: int = N_DRAWS, seed: int = 0) -> Resamples:
    """Blocks with replacement within each slice, genes with replacement over all. A slice of one block is resampled by
    spot: too narrow, yet better than no width at all."""
    rng = np.random.default_rng(seed)
    members = [np.arange(len(ids)) if ids.max() == 0 else np.asarray(ids) for ids in block_ids]
    numbers = [int(ids.max()) + 1 for ids in members]
    blocks = [rng.multinomial(n, np.full(n, 1 / n), size=n_draws) for n in numbers]
    return Resamples(members, blocks, rng.multinomial(n_genes, np.full(n_genes, 1 / n_genes), size=n_draws))


def _standardised(values: np.ndarray) -> np.ndarray:
    """Genes with mean 0 and deviation 1, flat ones 0: sums of squares of (S, G) then lose no digits."""
    values = np.asarray(values, dtype=np.float64)
    centred = np.where(metrics.is_flat(values), 0.0, values - values.mean(axis=0))
    deviation = centred.std(axis=0)
    return centred / np.where(deviation > 0, deviation, 1.0)


def block_correlations(pred: np.ndarray, true: np.ndarray, member: np.ndarray, times: np.ndarray) -> np.ndarray:
    """PCC of each gene in each draw: (S, G), (S, G), (S,), (D, K) -> (D, G), scored as by
    `metrics.scored_pearson_per_gene`: NaN where the measurement is flat or unknown, 0 where only the prediction is."""
    unknown = ~np.isfinite(true).all(axis=0)
    p, t = _standardised(pred), _standardised(np.where(unknown, 0.0, true))
    one_hot = (member[:, None] == np.arange(times.shape[1])).astype(np.float64)
    spots = (times @ one_hot.sum(axis=0))[:, None]
    mean_p, mean_t, pp, tt, pt = (times @ (one_hot.T @ x) / spots for x in (p, t, p * p, t * t, p * t))
    var_p, var_t = pp - mean_p**2, tt - mean_t**2
    flat = (var_p <= FLAT) | (var_t <= FLAT)
    r = np.where(flat, 0.0, (pt - mean_p * mean_t) / np.sqrt(np.where(flat, 1.0, var_p * var_t)))
    return np.where(unknown | (var_t <= FLAT), np.nan, r)


def pcc_draws(pred: Sequence[np.ndarray], true: Sequence[np.ndarray], drawn: Resamples) -> np.ndarray:
    """Mean PCC per gene, over the drawn genes, then over slices, in each draw: per slice (S, G) twice -> (D,)."""
    per_slice = []
    for p, t, member, times in zip(pred, true, drawn.members, drawn.blocks, strict=True):
        r = block_correlations(p, t, member, times)
        weight = np.where(np.isnan(r), 0, drawn.genes)
        per_slice.append((np.nan_to_num(r) * weight).sum(axis=1) / np.maximum(weight.sum(axis=1), 1))
    return np.mean(per_slice, axis=0)


def interval(one: Sequence[Sequence[float]], other: Sequence[Sequence[float]], level: float = 0.95) -> list[float]:
    """Percentile interval of the difference of two rows, each averaged over its seeds: draws (seeds, D) each."""
    difference = np.mean(one, axis=0) - np.mean(other, axis=0)
    return np.quantile(difference, [(1 - level) / 2, (1 + level) / 2]).tolist()
