"""Each gene's PCC on patients that were left out, one after the other, by a refit of the decoder's kernel ridge.

The features are kept, so a refit is the initialisation of one run. The encoder is not trained again: it has seen the
patient, as has the scale of the target, so the figures are those of the decoder, and of the encoder an upper bound.
Letters: S spots, G genes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from model.stage_two import StageTwo
from utils.evaluation import metrics
from utils.features.dataset import SliceData
from utils.features.neighbourhoods import FeatureBank
from utils.training import targets
from utils.training.decoder_initialisation import LANDMARKS, warm_start_decoder

Predict = Callable[[StageTwo, np.ndarray], np.ndarray]  # model, spot numbers (n,) -> (n, G) in the target's units


def train_patients(slices: Sequence[SliceData]) -> list[str]:
    return sorted({slice_.patient for slice_ in slices if len(slice_.rows_of("train"))})


def without(slices: Sequence[SliceData], patient: str) -> list[SliceData]:
    """The slices with the patient's train spots set apart as part "left_out". Its validation spots are used for
    nothing, unless no other patient has any."""
    others = [s for s in slices if s.patient != patient and len(s.rows_of("val"))]
    unused = "gap" if others else "val"

    def part(slice_: SliceData) -> np.ndarray:
        if slice_.patient != patient:
            return slice_.part
        parts = np.where(slice_.part == "train", "left_out", slice_.part.astype("<U8"))
        return np.where(parts == "val", unused, parts)

    return [replace(slice_, part=part(slice_)) for slice_ in slices]


def left_out_pcc(
    model: StageTwo,
    bank: FeatureBank,
    slices: list[SliceData],
    target: np.ndarray,
    predict: Predict,
    batch_size: int,
    seed: int,
) -> np.ndarray:
    """PCC per gene against residuals on left-out patients, mean over their slices: (G,), NaN where never measured.

    Parameters
    ----------
    model : whose sizes the refits have; it is left as it is
    target : (S, G) standardised, NaN where a gene was not measured
    """
    per_slice = []
    for patient in train_patients(slices):
        fold = without(slices, patient)
        n_spots = sum(len(slice_.rows_of("train")) for slice_ in fold)
        refit = StageTwo(replace(model.sizes, landmarks=min(LANDMARKS, n_spots))).to(bank.device).eval()
        refit.set_target_scale(model.target_mean, model.target_sd)
        truth = targets.validation_residuals(fold)
        chosen = warm_start_decoder(refit, bank, fold, target, truth, batch_size, seed)
        pcc = [
            metrics.scored_pearson_per_gene(predict(refit, spots), targets.residuals(slice_)[rows])
            for slice_, spots in zip(fold, bank.spots_of(fold, "left_out"), strict=True)
            if len(rows := slice_.rows_of("left_out"))
        ]
        print(f"without {patient}: {chosen}; PCC per gene on {patient} {np.nanmean(pcc):.4f}", flush=True)
        per_slice += pcc
    known = np.isfinite(per_slice).sum(0)
    return np.where(known > 0, np.nansum(per_slice, axis=0) / np.maximum(known, 1), np.nan).astype(np.float32)
