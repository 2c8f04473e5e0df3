"""What was measured of given genes on a slice that has counts: read straight from its matrix, without panel files.

Letters: S spots, G genes of the slice, P wanted genes.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from utils.genes import names as gene_names
from utils.genes import panels as gene_panels
from utils.slices import visium
from utils.slices.visium import Slice


@dataclass(frozen=True)
class MeasuredGenes:
    """Counts of the wanted genes; a gene that the slice lacks is a column of zeros, not `measured`."""

    counts: np.ndarray  # (S, P)
    total_counts: np.ndarray  # (S,) over all genes of the slice
    measured: np.ndarray  # (P,) bool
    content: str  # hash of all the slice's counts: the same section under another name is found by it


def read_measured(slice_: Slice, wanted: list[str], barcodes: np.ndarray, memory: float) -> MeasuredGenes | None:
    """Of the spots `barcodes` (S,), in their order; None where the slice has no counts.

    Parameters
    ----------
    memory : bytes that the whole matrix may take; more of it is read by spans of spots
    """
    if slice_.matrix is None:
        return None
    source = slice_.with_counts(memory)
    symbols = gene_names.symbols_by_id(source.genes, source.gene_ids)
    names = gene_names.mapped_names(source.genes, symbols)
    names = gene_names.renamed(names, wanted, gene_names.known_names(None, symbols))
    gathering = gene_panels.gather(names, wanted)
    counts, total = np.zeros((len(source.spots), len(wanted)), np.int32), np.zeros(len(source.spots), np.int64)
    for span in visium.spans(source.counts, memory):
        part = source.counts[span]
        counts[span], total[span] = (part @ gathering).toarray(), np.asarray(part.sum(1)).ravel()
    names_of_spots = source.spots.index.to_numpy(str)
    place = {barcode: i for i, barcode in enumerate(names_of_spots)}
    rows = np.array([place[barcode] for barcode in barcodes])
    content = visium.counts_hash(source.counts, names_of_spots, source.genes, memory)
    return MeasuredGenes(counts[rows], total[rows], np.isin(wanted, names), content)
