"""What the training scripts learn from the target panel: standardised expression, Pearson residuals, by slice.

Letters: S spots of all slices in turn, n spots of a part, G target genes. Genes are scaled a few at a time in float64,
so that what is held of all of them is float32.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from utils.evaluation import metrics
from utils.features.dataset import SliceData
from utils.files.arrays import ArrayStore

GENES_AT_ONCE = 16


def gene_groups(n_genes: int) -> list[slice]:
    return [slice(start, start + GENES_AT_ONCE) for start in range(0, n_genes, GENES_AT_ONCE)]


def standardised(slices: list[SliceData], scale: str, store: ArrayStore) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Standardised targets (S, G) of all slices in turn, NaN where a gene was not measured, and what they were
    standardised by: mean and deviation (G,) over the train spots in the scale of --target."""
    n_genes = len(slices[0].panels["target"].genes)
    target = store.empty((sum(len(one.barcodes) for one in slices), n_genes), np.float32)
    first = np.cumsum([0, *(len(one.barcodes) for one in slices)])
    train = np.concatenate([start + one.rows_of("train") for start, one in zip(first, slices, strict=False)])
    for one, start, stop in zip(slices, first, first[1:], strict=False):
        panel, counts = one.panels["target"], one.panels["target"].read_counts()
        for group in gene_groups(n_genes):
            scaled = metrics.to_scale(scale, counts[:, group], one.total_counts)
            target[start:stop, group] = np.where(panel.measured[group], scaled, np.nan)
    mean, sd = np.empty((2, n_genes), np.float32)
    for group in gene_groups(n_genes):
        taught = target[train, group].astype(np.float64)
        mean[group], sd[group] = np.nanmean(taught, axis=0), np.maximum(np.nanstd(taught, axis=0), 1e-6)
        target[:, group] = (target[:, group] - mean[group]) / sd[group]
    return target, mean, sd


def validation_residuals(slices: list[SliceData]) -> list[np.ndarray]:
    """Per slice Pearson residuals (n, G) float32 of the validation spots, NaN where a gene was not measured."""
    found = []
    for one in slices:
        rows, panel = one.rows_of("val"), one.panels["target"]
        truth = np.full((len(rows), len(panel.genes)), np.nan, np.float32)
        if len(rows):
            counts = panel.read_counts()
            for group in gene_groups(len(panel.genes)):
                residuals = metrics.pearson_residuals(counts[:, group], one.total_counts)[rows]
                truth[:, group] = np.where(panel.measured[group], residuals, np.nan)
        found.append(truth)
    return found


@dataclass(frozen=True)
class Components:
    """The first principal components of the train spots' Pearson residuals, genes standardised: what genes do together.
    What is left out is mostly the noise of counting."""

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


def residuals(one: SliceData) -> np.ndarray:
    """Pearson residuals (S, G) float32 of a slice's target genes, NaN where not measured."""
    panel = one.panels["target"]
    found = metrics.pearson_residuals(panel.read_counts(), one.total_counts)
    return np.where(panel.measured, found, np.nan).astype(np.float32)


def components(slices: list[SliceData], rank: int) -> Components:
    """Of the train spots of all slices, which are read one slice at a time, three times."""
    taught = [one for one in slices if len(one.rows_of("train"))]

    def total(function: Any) -> Any:
        return sum(function(residuals(one)[one.rows_of("train")].astype(np.float64)) for one in taught)

    number = np.maximum(total(lambda r: np.isfinite(r).sum(0)), 1)
    mean = total(lambda r: np.nansum(r, axis=0)) / number
    sd = np.sqrt(np.maximum(total(lambda r: np.nansum((r - mean) ** 2, axis=0)) / number, 1e-12))
    moment = total(lambda r: (z := np.nan_to_num((r - mean) / sd)).T @ z)
    values, vectors = np.linalg.eigh(moment / len(np.concatenate([one.rows_of("train") for one in taught])))
    rank = min(rank, int((values > 1e-9).sum()))
    return Components(mean, sd, vectors[:, ::-1][:, :rank], np.sqrt(values[::-1][:rank]))


def train_scores(slices: list[SliceData], of: Components, store: ArrayStore) -> np.ndarray:
    """Weighted scores (n, R) of the train spots of all slices in turn."""
    rows = [one.rows_of("train") for one in slices]
    ends = np.cumsum([0, *map(len, rows)])
    found = store.empty((int(ends[-1]), len(of.score_sd)), np.float32)
    for one, chosen, start, stop in zip(slices, rows, ends, ends[1:], strict=False):
        if len(chosen):
            found[start:stop] = of.scores(residuals(one)[chosen]) * of.weights
    return found
