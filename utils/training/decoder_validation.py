"""Correlation per gene of a decoder's predictions on the validation spots.

Letters: n spots of a slice, G target genes.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np

from utils.features.dataset import SliceData


def predict_val(model: Any, bank: Any, slices: Sequence[SliceData], accelerator: Any, args: Any) -> list[np.ndarray]:
    """Per slice with validation spots their expression (n, G), in the units of the target."""
    from utils import distributed
    from utils.features.neighbourhoods import predict

    model.eval()
    autocast = partial(distributed.decoder_autocast, accelerator, args.precision)
    return [predict(model, bank, spots, autocast, args.batch_size) for spots in val_spots(bank, slices)]


def val_spots(bank: Any, slices: Sequence[SliceData]) -> list[np.ndarray]:
    """Per slice with validation spots their numbers in the bank (n,)."""
    rows = [start + one.rows_of("val") for one, start in zip(slices, bank.first, strict=False)]
    return [spots for spots in rows if len(spots)]


def validate(
    model: Any, bank: Any, slices: Sequence[SliceData], truth: list[np.ndarray], accelerator: Any, args: Any
) -> np.ndarray:
    """PCC per gene against residuals on validation spots, mean over slices: (G,); an undefined one counts as 0."""
    from utils.evaluation import metrics

    found = []
    predicted, measured = predict_val(model, bank, slices, accelerator, args), [one for one in truth if len(one)]
    for one, true in zip(predicted, measured, strict=True):
        pcc = metrics.scored_pearson_per_gene(one, np.nan_to_num(true))
        found.append(np.where(np.isfinite(true).all(0), pcc, np.nan))
    known = np.isfinite(found)
    return np.nansum(found, axis=0) / np.maximum(known.sum(0), 1)
