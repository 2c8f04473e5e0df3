"""Warm start of stage two: a kernel ridge regression on a spot's features and the smoothed features around it.

Letters: N spots it is solved on, M landmarks, P parts of a spot's features, D width of a part, G genes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from utils.evaluation import ridge
from utils.features import dataset
from utils.features.dataset import SliceData
from utils.features.neighbourhoods import FeatureBank
from utils.training import initialisation
from utils.words import count_of

if TYPE_CHECKING:
    from model.stage_two import StageTwo

LANDMARKS = 2_000  # train spots that a spot is compared with; with no more train spots than that it is exact
GAMMAS = (0.03, 0.3, 1.0)  # of the kernel; the first is as good as linear
CLEARLY = 0.01  # a curved kernel must be better on validation by this fraction: a linear map generalises better
PENALTIES = tuple(np.logspace(-4, 3, 15))  # the kernel of a spot with itself is 1
Fit = tuple[ridge.Ridge, int, float, np.ndarray]  # regression, parts used, gamma, weights of the landmarks


def warm_start_decoder(
    model: StageTwo,
    bank: FeatureBank,
    slices: Sequence[SliceData],
    target: np.ndarray,
    truth: list[np.ndarray],
    batch_size: int,
    seed: int,
) -> str:
    """Solve the kernel ridge of the decoder.

    Number of bandwidths, gamma, penalty and rank are those with the best PCC per gene on the validation spots, or those
    of the best linear map where that is as good. Returns what was chosen, in words.

    Parameters
    ----------
    target : (S, G) standardised, NaN where a gene was not measured
    truth : per slice what predictions of the validation spots are compared with (n, G)
    """
    train = drawn(bank, slices, seed)
    val = [spots for spots in bank.spots_of(slices, "val") if len(spots)]
    print(f"warm start: kernel ridge on {count_of(sum(map(len, train)), 'train spot')}", flush=True)
    y_train, y_val = [np.nan_to_num(target[spots]) for spots in train], [y for y in truth if len(y)]
    kernel, spots = model.decoder.ridge, np.concatenate(train)
    spots = np.sort(np.random.default_rng(seed).choice(spots, len(kernel.landmarks), replace=False))
    landmarks = torch.cat(list(parts_of(bank, spots, batch_size)))

    def distances(spots: np.ndarray) -> np.ndarray:
        """(n,) spot numbers -> (n, M)"""
        return torch.cat([kernel.distances(part) for part in parts_of(bank, spots, batch_size)]).cpu().numpy()

    fits: list[Fit] = []
    for n_parts in range(1, landmarks.shape[1] + 1):
        kernel.set_landmarks(landmarks, n_parts)
        among, to_train, to_val = distances(spots), [distances(s) for s in train], [distances(s) for s in val]
        for gamma in GAMMAS:
            axes = kernel_axes(np.exp(-gamma * among.astype(float)))
            x_train, x_val = ([np.exp(-gamma * d) @ axes for d in part] for part in (to_train, to_val))
            fitted = ridge.fit_ridge(x_train, y_train, x_val, y_val, PENALTIES, ridge.RANKS)
            fits.append((fitted, n_parts, gamma, axes @ fitted.weights))
    best, n_parts, gamma, weights = clearly_best(fits)
    kernel.set_landmarks(landmarks, n_parts)
    bias = best.y_mean - best.x_mean @ best.weights
    model.decoder.initialise(gamma, torch.from_numpy(weights.T), torch.from_numpy(bias))
    rank = "full rank" if best.rank is None else f"rank {best.rank}"
    return (
        f"warm start by ridge: spot and {n_parts - 1} bandwidths around it, gamma {gamma}, "
        f"penalty {best.penalty:.3g}, {rank}, validation PCC per gene {best.val_pcc:.4f}"
    )


def clearly_best(fits: Sequence[Fit]) -> Fit:
    """The best fit, if it is clearly better than the best linear one, else that."""
    best = max(fits, key=lambda fit: fit[0].val_pcc)
    linear = max((fit for fit in fits if fit[2] == GAMMAS[0]), key=lambda fit: fit[0].val_pcc)
    gain = best[0].val_pcc - linear[0].val_pcc
    return best if gain > CLEARLY * abs(linear[0].val_pcc) else linear


def drawn(bank: FeatureBank, slices: Sequence[SliceData], seed: int) -> list[np.ndarray]:
    """Numbers in the bank of train spots, per slice that has any: the same fraction of each, one at least."""
    train, rng = bank.spots_of(slices, "train"), np.random.default_rng(seed)
    fraction = initialisation.fraction_of(sum(map(len, train)))
    return [dataset.draw(spots, fraction, rng) for spots in train if len(spots)]


def parts_of(bank: FeatureBank, spots: np.ndarray, batch_size: int) -> Iterator[Tensor]:
    """Features of spots (n,) and the smoothed features around them, in batches (B, P, D)."""
    for start in range(0, len(spots), batch_size):
        batch = bank.batch(spots[start : start + batch_size])
        yield torch.cat([batch["vector"][:, None], batch["smoothed"]], dim=1)


def kernel_axes(among: np.ndarray) -> np.ndarray:
    """Axes (M, R) that turn a row of kernel values into a point: inner products of two landmarks equal their kernel.

    With fewer landmarks than spots this is Nystroem's approximation (Williams and Seeger 2000)."""
    values, vectors = np.linalg.eigh(among)
    kept = values > 1e-7 * values[-1]
    return vectors[:, kept] / np.sqrt(values[kept])
