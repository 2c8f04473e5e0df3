"""Where stage two starts: a kernel ridge regression on a spot's features and the means around it.

Letters: N spots it is solved on, M landmarks, P parts seen of a spot, D width of a part, G genes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from utils.evaluation import ridge
from utils.features.dataset import SliceData
from utils.training.decoder_validation import val_spots

START_SPOTS = 20_000  # of the train spots, drawn by the seed, serve to solve it
LANDMARKS = 2_000  # of those are what a spot is compared with; with no more train spots than that it is exact
SHARPNESS = (0.03, 0.3, 1.0)  # of the kernel; the first is as good as linear
CLEARLY = 0.01  # better on validation, as a share, must a sharp kernel be: a linear map carries over to more
PENALTIES = tuple(np.logspace(-4, 3, 15))  # the kernel of a spot with itself is 1


def start_from_ridge(
    model: Any, bank: Any, slices: Sequence[SliceData], target: np.ndarray, truth: list[np.ndarray], args: Any
) -> str:
    """Solve the decoder's start. How far around a spot it looks, sharpness, penalty and rank are those with the best
    PCC per gene on the validation spots, or those of the best linear map where that is as good. Returns what was found.

    Parameters
    ----------
    target : (S, G) standardised, NaN where a gene was not measured
    truth : per slice what validation spots are judged by (n, G)
    """
    import torch

    train, val = drawn(bank, slices, args.seed), val_spots(bank, slices)
    y_train, y_val = [np.nan_to_num(target[one]) for one in train], [one for one in truth if len(one)]
    kernel, spots = model.decoder.ridge, np.concatenate(train)
    spots = np.sort(np.random.default_rng(args.seed).choice(spots, len(kernel.landmarks), replace=False))
    landmarks = torch.cat(list(seen(bank, spots, args.batch_size)))

    def distances(spots: np.ndarray) -> np.ndarray:
        """(n,) spot numbers -> (n, M)"""
        return torch.cat([kernel.distances(part) for part in seen(bank, spots, args.batch_size)]).cpu().numpy()

    found = []
    for n_parts in range(1, landmarks.shape[1] + 1):
        kernel.set_landmarks(landmarks, n_parts)
        among, of_train, of_val = distances(spots), [distances(one) for one in train], [distances(one) for one in val]
        for sharpness in SHARPNESS:
            axes = kernel_axes(np.exp(-sharpness * among.astype(float)))
            x_train, x_val = ([np.exp(-sharpness * one) @ axes for one in part] for part in (of_train, of_val))
            fitted = ridge.fit_ridge(x_train, y_train, x_val, y_val, PENALTIES, ridge.RANKS)
            found.append((fitted, n_parts, sharpness, axes @ fitted.weights))
    best, n_parts, sharpness, weights = clearly_best(found)
    kernel.set_landmarks(landmarks, n_parts)
    bias = best.y_mean - best.x_mean @ best.weights
    model.decoder.initialise(sharpness, torch.from_numpy(weights.T), torch.from_numpy(bias))
    rank = "full rank" if best.rank is None else f"rank {best.rank}"
    return (
        f"ridge to start from: spot and {n_parts - 1} means around it, sharpness {sharpness}, "
        f"penalty {best.penalty:.3g}, {rank}, validation PCC per gene {best.val_pcc:.4f}"
    )


def clearly_best(found: Sequence[tuple[ridge.Ridge, int, float, np.ndarray]]) -> tuple[ridge.Ridge, int, float, Any]:
    """Of fits, parts seen, sharpness and weights: those of the best fit, if it is clearly better than the best linear
    one."""
    best = max(found, key=lambda one: one[0].val_pcc)
    linear = max((one for one in found if one[2] == SHARPNESS[0]), key=lambda one: one[0].val_pcc)
    gain = best[0].val_pcc - linear[0].val_pcc
    return best if gain > CLEARLY * abs(linear[0].val_pcc) else linear


def drawn(bank: Any, slices: Sequence[SliceData], seed: int) -> list[np.ndarray]:
    """Per slice with train spots the numbers in the bank of START_SPOTS of them, in alike shares, one at least."""
    rows = [start + one.rows_of("train") for one, start in zip(slices, bank.first, strict=False)]
    share, rng = min(1.0, START_SPOTS / sum(map(len, rows))), np.random.default_rng(seed)
    return [np.sort(rng.choice(one, int(np.ceil(share * len(one))), replace=False)) for one in rows if len(one)]


def seen(bank: Any, spots: np.ndarray, batch_size: int) -> Iterator[Any]:
    """Of spot numbers (n,) their features and the means around them, in batches (B, P, D)."""
    import torch

    for start in range(0, len(spots), batch_size):
        batch = bank.batch(spots[start : start + batch_size])
        yield torch.cat([batch["vector"][:, None], batch["smoothed"]], dim=1)


def kernel_axes(among: np.ndarray) -> np.ndarray:
    """Axes (M, R) on which a row of kernel values becomes a point: inner products of two landmarks' are their kernel.

    With fewer landmarks than spots this is Nystroem's approximation (Williams and Seeger 2000)."""
    values, vectors = np.linalg.eigh(among)
    kept = values > 1e-7 * values[-1]
    return vectors[:, kept] / np.sqrt(values[kept])
