"""What the validation spots say of a decoder: correlation per gene, and how much less its predictions vary.

Letters: n spots of a slice, G target genes.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np

from utils.features.dataset import SliceData

FLATTEST = 0.1  # ratio of deviations from which a prediction is stretched no further


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


def widen(
    model: Any,
    bank: Any,
    slices: Sequence[SliceData],
    target: np.ndarray,
    sd: np.ndarray,
    accelerator: Any,
    args: Any,
) -> None:
    """Stretch each gene's predictions by a power of how much less they vary than what was measured of the validation
    spots: --keep_variance 0 leaves them, 1 makes the deviations alike. Correlations stay, errors grow.

    `target` (S, G) is standardised, NaN where not measured; `sd` (G,) is what it was divided by.
    """
    import torch

    if not args.keep_variance:
        return
    model.set_target_scale(model.target_mean, torch.from_numpy(sd))
    predicted = predict_val(model, bank, slices, accelerator, args)
    measured = [target[spots] * sd for spots in val_spots(bank, slices)]
    square = [
        np.nanmean(np.concatenate([x - np.nanmean(x, axis=0) for x in part]) ** 2, axis=0)
        for part in (predicted, measured)
    ]
    ratio = np.sqrt(square[0] / np.maximum(square[1], 1e-12))
    stretch = np.clip(np.nan_to_num(ratio, nan=1.0), FLATTEST, 1.0) ** -args.keep_variance
    model.set_target_scale(model.target_mean, torch.from_numpy((sd * stretch).astype(np.float32)))
