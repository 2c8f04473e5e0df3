"""Ridge regression for several penalties at once, and its prediction along few components of the target.

Shapes: S spots of one slice, N train spots, P features, G genes, R rank of the train features. A prediction along the
target's first principal components leaves out directions of mostly noise. scikit-learn's Ridge gives the same weights
(tests), but fits one penalty at a time, twice as slow for all of PENALTIES, and needs all spots in one array.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from utils.evaluation import metrics

PENALTIES = tuple(np.logspace(0, 7, 15))  # absolute: a standardised feature has a squared norm of N
RANKS = (5, 10, 20, 40, None)

Slices = Sequence[np.ndarray]


@dataclass(frozen=True)
class Ridge:
    """A fitted linear map. val_pcc is the score on which `penalty` and `rank` (None: full) were chosen."""

    x_mean: np.ndarray  # (P,)
    y_mean: np.ndarray  # (G,)
    weights: np.ndarray  # (P, G)
    penalty: float
    val_pcc: float
    rank: int | None = None

    def predict(self, x: np.ndarray) -> np.ndarray:
        """(S, P) -> (S, G)"""
        return (x - self.x_mean) @ self.weights + self.y_mean


def fit_ridge(
    x_train: Slices,
    y_train: Slices,
    x_val: Slices,
    y_val: Slices,
    penalties: Sequence[float] = PENALTIES,
    ranks: Sequence[int | None] = (None,),
    by: Callable[[Slices, Slices], float] | None = None,
) -> Ridge:
    """Least squares with a penalty on the squared weights, both sides centred, for all penalties at once.

    One eigendecomposition serves every penalty: with A = V diag(e) V', (A + c I)^-1 = V diag(1 / (e + c)) V'.

    Parameters
    ----------
    x_train, x_val : per slice (S, P)
    y_train, y_val : per slice (S, G)
        A validation gene that is flat or NaN in a slice is left out there; train holds no NaN.
    penalties, ranks : of which those with the highest PCC per gene, mean over genes and validation slices, are taken. A
        rank is the number of principal components of the train target, genes standardised, that are predicted.
    by : another score of predicted and measured validation slices to choose by; a correlation does not see the scale.
    """
    check_tables(x_train, y_train, x_val, y_val)
    x_mean, y_mean = mean_over_spots(x_train), mean_over_spots(y_train)
    eigenvalues, basis, target = _decompose(x_train, y_train, x_mean, y_mean)
    projected = [(x - x_mean) @ basis for x in x_val]
    kept = {rank: _kept_components(y_train, y_mean, rank) for rank in ranks if rank is not None}

    def predicted(penalty: float, rank: int | None) -> list[np.ndarray]:
        centred = [(x / (eigenvalues + penalty)) @ target for x in projected]
        return [y_mean + (pred if rank is None else pred @ kept[rank]) for pred in centred]

    # of equally good ones the strongest penalty and the lowest rank
    tried = [(penalty, rank) for penalty in sorted(penalties, reverse=True) for rank in ranks]
    penalty, rank = tried[int(np.argmax([(by or validation_pcc)(predicted(*choice), y_val) for choice in tried]))]
    val_pcc = validation_pcc(predicted(penalty, rank), y_val)
    weights = (basis / (eigenvalues + penalty)) @ target
    return Ridge(x_mean, y_mean, weights if rank is None else weights @ kept[rank], float(penalty), val_pcc, rank)


def _kept_components(y: Slices, y_mean: np.ndarray, rank: int) -> np.ndarray:
    """Map (G, G) of centred predictions onto the first principal components of the standardised target."""
    moment = np.zeros((len(y_mean), len(y_mean)))
    for y_slice in y:
        moment += (y_slice - y_mean).T @ (y_slice - y_mean)
    sd = np.sqrt(moment.diagonal() / sum(map(len, y)))
    sd = np.where(sd > 0, sd, 1.0)
    first = np.linalg.eigh(moment / np.outer(sd, sd))[1][:, -rank:]
    return (first / sd[:, None]) @ (first * sd[:, None]).T


def _decompose(
    x: Slices, y: Slices, x_mean: np.ndarray, y_mean: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Eigenvalues (R,), basis (P, R) and target (R, G) with weights = basis / (eigenvalues + penalty) @ target."""
    n_train, width = sum(map(len, x)), x[0].shape[1]
    if n_train < width:  # the dual: an N x N problem
        centred = np.concatenate(x) - x_mean
        values, vectors = np.linalg.eigh(centred @ centred.T)
        return values.clip(0), centred.T @ vectors, vectors.T @ (np.concatenate(y) - y_mean)
    gram, cross = np.zeros((width, width)), np.zeros((width, y[0].shape[1]))
    for x_slice, y_slice in zip(x, y, strict=True):  # slice by slice: all spots in double precision need not fit
        centred = x_slice - x_mean
        gram += centred.T @ centred
        cross += centred.T @ (y_slice - y_mean)
    values, vectors = np.linalg.eigh(gram)
    return values.clip(0), vectors, vectors.T @ cross


def validation_pcc(predicted: Slices, measured: Slices) -> float:
    """PCC per gene, mean over genes of a slice, then over slices: per slice (S, G) each. Undefined is worst: -inf."""
    found = [metrics.scored_pearson_per_gene(p, m) for p, m in zip(predicted, measured, strict=True)]
    means = [r[~np.isnan(r)].mean() for r in found if not np.isnan(r).all()]
    return float(np.mean(means)) if means else -np.inf


def minus_squared_error(predicted: Slices, measured: Slices) -> float:
    """Mean over targets of a slice, then over slices: per slice (S, G) each, no NaN."""
    return -float(np.mean([np.mean((p - m) ** 2) for p, m in zip(predicted, measured, strict=True)]))


def mean_over_spots(parts: Slices) -> np.ndarray:
    return np.sum([np.sum(part, axis=0, dtype=np.float64) for part in parts], axis=0) / sum(map(len, parts))


def check_tables(x_train: Slices, y_train: Slices, x_val: Slices, y_val: Slices) -> None:
    if not x_train or not x_val:
        raise ValueError(f"expected train and validation slices, found {len(x_train)} and {len(x_val)}")
    for x, y in zip([*x_train, *x_val], [*y_train, *y_val], strict=True):
        if x.ndim != 2 or y.ndim != 2 or len(x) != len(y):
            raise ValueError(f"expected tables with a row per spot, found features {x.shape} and targets {y.shape}")
    if not all(np.isfinite(part).all() for part in [*x_train, *y_train, *x_val]):
        raise ValueError("expected finite features and train targets, found NaN or infinity")
