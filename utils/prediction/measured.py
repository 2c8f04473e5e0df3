"""What was measured of the predicted genes on a slice that has counts, and the metrics of the prediction.

The counts are read straight from the slice's matrix, without panel files.
Shapes: S predicted spots, G genes of the slice, P predicted genes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from utils.evaluation import expression
from utils.genes import names as gene_names
from utils.genes import panels as gene_panels
from utils.slices import visium
from utils.slices.visium import Slice


@dataclass(frozen=True)
class MeasuredGenes:
    """Counts of the predicted genes; a gene that the slice lacks is a column of zeros, not `measured`."""

    slice: expression.MeasuredSlice
    content: str  # hash of all the slice's counts, which is the same for the section under another name

    @property
    def counts(self) -> np.ndarray:
        """Of the predicted spots: (S, P)."""
        return self.slice["counts"][self.slice["rows"]]

    @property
    def total_counts(self) -> np.ndarray:
        """Of the predicted spots, over all genes: (S,)."""
        return self.slice["total_counts"][self.slice["rows"]]

    def in_scale(self, target: str) -> np.ndarray:
        """(S, P) in the units of the target; NaN for a gene that the slice lacks."""
        return np.where(self.slice["measured"], expression.truth_of(self.slice, target), np.nan)


def read_measured(slice_: Slice, genes: list[str], barcodes: np.ndarray, memory: float) -> MeasuredGenes | None:
    """Of the spots `barcodes` (S,), in their order; None where the slice has no counts.

    Parameters
    ----------
    genes : the P names, or Ensembl ids
    memory : bytes that the whole matrix may take; more of it is read by spans of spots
    """
    if slice_.matrix is None:
        return None
    source = slice_.with_counts(memory)
    symbols = gene_names.symbols_by_id(source.genes, source.gene_ids)
    names = gene_names.mapped_names(source.genes, symbols)
    names = gene_names.renamed(names, genes, gene_names.known_names(None, symbols))
    gathering = gene_panels.gather(names, genes)
    counts, total = np.zeros((len(source.spots), len(genes)), np.int32), np.zeros(len(source.spots), np.int64)
    for span in visium.spans(source.counts, memory):
        part = source.counts[span]
        counts[span], total[span] = (part @ gathering).toarray(), np.asarray(part.sum(1)).ravel()
    rows = source.spots.index.get_indexer(pd.Index(barcodes))
    content = visium.counts_hash(source.counts, source.spots.index.to_numpy(str), source.genes, memory)
    measured = expression.MeasuredSlice(
        name=slice_.name, counts=counts, total_counts=total, rows=rows, measured=np.isin(genes, names)
    )
    return MeasuredGenes(measured, content)


def evaluate(
    measured: MeasuredGenes,
    predicted: np.ndarray,
    target_mean: np.ndarray,
    val_pcc: np.ndarray,
    state: dict[str, Any],
) -> tuple[dict[str, Any], pd.DataFrame]:
    """The body of metrics.json, and the table of genes.

    Parameters
    ----------
    predicted : (S, P), in the units of the target
    target_mean : (P,), the mean profile of the train slices, which is the baseline; of several models the mean
    val_pcc : (P,), validation PCC, of several models the mean
    state : the checkpoint, of which genes and target are read
    """
    truth = [measured.slice]
    mean = np.broadcast_to(target_mean, predicted.shape)
    metrics = expression.evaluate({"model": [predicted], "mean": [mean]}, truth, state["target"])
    table = expression.per_gene_table({"model": [predicted]}, truth, state["genes"])
    table.insert(1, "val_pcc", val_pcc)
    return metrics, table
