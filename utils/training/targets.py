"""Training targets from the target panel: standardised expression, Pearson residuals and their components.

Letters: S spots of all slices in turn, n spots of a part, G target genes. Genes are scaled a few at a time in float64,
so that what is held of all of them is float32.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from utils.evaluation import metrics
from utils.features.dataset import SliceData
from utils.files.arrays import ArrayStore

GENES_AT_ONCE = 16


def gene_groups(n_genes: int) -> list[slice]:
    return [slice(start, start + GENES_AT_ONCE) for start in range(0, n_genes, GENES_AT_ONCE)]


def standardised(slices: list[SliceData], scale: str, store: ArrayStore) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Standardised targets (S, G) of all slices in turn, NaN where a gene was not measured, and mean and deviation (G,)
    over the train spots that they were standardised by.

    Parameters
    ----------
    scale : --target
    store : takes the targets
    """
    n_genes = len(slices[0].panels["target"].genes)
    first = np.cumsum([0, *(len(slice_.barcodes) for slice_ in slices)])
    target = store.empty((int(first[-1]), n_genes), np.float32)
    train = np.concatenate([start + slice_.rows_of("train") for slice_, start in zip(slices, first, strict=False)])
    for slice_, start, stop in zip(slices, first, first[1:], strict=False):
        panel, counts = slice_.panels["target"], slice_.panels["target"].read_counts()
        for group in gene_groups(n_genes):
            scaled = metrics.to_scale(scale, counts[:, group], slice_.total_counts)
            target[start:stop, group] = np.where(panel.measured[group], scaled, np.nan)
    mean, sd = np.empty((2, n_genes), np.float32)
    for group in gene_groups(n_genes):
        of_train = target[train, group].astype(np.float64)
        mean[group], sd[group] = np.nanmean(of_train, axis=0), np.maximum(np.nanstd(of_train, axis=0), 1e-6)
        target[:, group] = (target[:, group] - mean[group]) / sd[group]
    return target, mean, sd


def train_depth(slices: list[SliceData]) -> tuple[float, np.ndarray]:
    """Median counts of the train spots over all genes, and the fraction (G,) of their counts that each target gene has,
    over the slices that measured it: what residuals are converted to counts by."""
    totals, n_genes = [], len(slices[0].panels["target"].genes)
    of_gene, of_all = np.zeros(n_genes), np.zeros(n_genes)
    for slice_ in slices:
        rows, panel = slice_.rows_of("train"), slice_.panels["target"]
        if len(rows):
            totals.append(slice_.total_counts[rows])
            of_gene += panel.read_counts()[rows].sum(0, dtype=np.float64) * panel.measured
            of_all += float(totals[-1].sum(dtype=np.float64)) * panel.measured
    return float(np.median(np.concatenate(totals))), of_gene / np.maximum(of_all, 1.0)


def validation_residuals(slices: list[SliceData]) -> list[np.ndarray]:
    """Per slice Pearson residuals (n, G) float32 of the validation spots, NaN where a gene was not measured."""
    per_slice = []
    for slice_ in slices:
        rows, panel = slice_.rows_of("val"), slice_.panels["target"]
        truth = np.full((len(rows), len(panel.genes)), np.nan, np.float32)
        if len(rows):
            counts = panel.read_counts()
            for group in gene_groups(len(panel.genes)):
                residuals = metrics.pearson_residuals(counts[:, group], slice_.total_counts)[rows]
                truth[:, group] = np.where(panel.measured[group], residuals, np.nan)
        per_slice.append(truth)
    return per_slice


@dataclass(frozen=True)
class Components:
    """The first principal components of the train spots' Pearson residuals, genes standardised: co-varying genes. The
    rest is mostly counting noise."""

    mean: np.ndarray  # (G,)
    sd: np.ndarray  # (G,)
    basis: np.ndarray  # (G, R), orthonormal
    score_sd: np.ndarray  # (R,)

    @property
    def weights(self) -> np.ndarray:
        """(R,) deviations over their root mean square: a component counts in the loss as it does in the genes."""
        return self.score_sd / np.sqrt(np.mean(self.score_sd**2))

    def scores(self, residuals: np.ndarray) -> np.ndarray:
        """Residuals (n, G), NaN where not measured -> (n, R), of deviation 1 over the train spots."""
        return np.nan_to_num((residuals - self.mean) / self.sd) @ self.basis / self.score_sd


def residuals(slice_: SliceData) -> np.ndarray:
    """Pearson residuals (S, G) float32 of a slice's target genes, NaN where not measured."""
    panel = slice_.panels["target"]
    of_all = metrics.pearson_residuals(panel.read_counts(), slice_.total_counts)
    return np.where(panel.measured, of_all, np.nan).astype(np.float32)


def components(slices: list[SliceData], rank: int) -> Components:
    """Of the train spots of all slices, which are read one slice at a time, three times."""
    train = [slice_ for slice_ in slices if len(slice_.rows_of("train"))]

    def total(function: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
        return sum(
            (function(residuals(slice_)[slice_.rows_of("train")].astype(np.float64)) for slice_ in train), np.zeros(())
        )

    number = np.maximum(total(lambda r: np.isfinite(r).sum(0)), 1)
    mean = total(lambda r: np.nansum(r, axis=0)) / number
    sd = np.sqrt(np.maximum(total(lambda r: np.nansum((r - mean) ** 2, axis=0)) / number, 1e-12))
    moment = total(lambda r: (z := np.nan_to_num((r - mean) / sd)).T @ z)
    values, vectors = np.linalg.eigh(moment / sum(len(slice_.rows_of("train")) for slice_ in train))
    rank = min(rank, int((values > 1e-9).sum()))
    return Components(mean, sd, vectors[:, ::-1][:, :rank], np.sqrt(values[::-1][:rank]))


def train_scores(slices: list[SliceData], components: Components, store: ArrayStore) -> np.ndarray:
    """Weighted scores (n, R) of the train spots of all slices in turn."""
    rows = [slice_.rows_of("train") for slice_ in slices]
    ends = np.cumsum([0, *map(len, rows)])
    scores = store.empty((int(ends[-1]), len(components.score_sd)), np.float32)
    for slice_, of_train, start, stop in zip(slices, rows, ends, ends[1:], strict=False):
        if len(of_train):
            scores[start:stop] = components.scores(residuals(slice_)[of_train]) * components.weights
    return scores
