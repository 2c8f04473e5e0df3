"""The baselines of every evaluation: mean profile, depth, ridge, ridge with neighbours, kNN.

Shapes: S spots of one slice, N train spots, P features, G genes, R rank of the train features.
A linear probe on a strong encoder equals the best trained heads (HEST-bench). All take features that were standardised
per slice by `standardise`, as stain differs between slices. Penalties and the number of neighbours are chosen on
validation slices.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TypedDict

import numpy as np
from scipy.sparse import csr_array
from scipy.spatial import KDTree
from sklearn.neighbors import NearestNeighbors

from utils.evaluation.ridge import Ridge, Slices, check_tables, fit_ridge, mean_over_spots, validation_pcc

RINGS = ((0.0, 1.2), (1.2, 2.3))  # in pitches: on a Visium array the 6 nearest spots and the 12 behind them


class Images(TypedDict):
    """Features of some spots of one slice."""

    features: np.ndarray  # (S, P) standardised
    rings: np.ndarray  # (S, 3 P) of `ring_features`, with all of the slice's spots as neighbours


class Slice(Images):
    """The same with what was measured, to fit on."""

    target: np.ndarray  # (S, G) in the scale to predict, NaN where the slice lacks a gene
    log_depth: np.ndarray  # (S,) log total counts


def standardise(
    features: Sequence[np.ndarray], n_trained: int, min_spots: int = 0, min_sd: float = 1e-3
) -> list[np.ndarray]:
    """Features with mean 0 and deviation 1 over the spots of each slice: per slice (S, P) -> (S, P), half precision to
    single.

    A slice of fewer than `min_spots` spots takes the mean and deviation of the first `n_trained` slices together, those
    of training. A feature with a smaller deviation than `min_sd` is divided by that, or its noise would become a
    signal.
    """
    small = any(len(of_slice) < min_spots for of_slice in features)
    trained = _moments(np.concatenate(features[:n_trained])) if small else None
    done = []
    for of_slice in map(np.asarray, features):
        mean, sd = trained if trained is not None and len(of_slice) < min_spots else _moments(of_slice)
        done.append(((of_slice - mean) / np.maximum(sd, min_sd)).astype(np.result_type(of_slice, np.float32)))
    return done


def _moments(features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    mean = features.mean(axis=0, dtype=np.float64)
    return mean, (features - mean).std(axis=0)


def images_of(features: np.ndarray, xy: np.ndarray, pitch: float, rows: np.ndarray) -> Images:
    """What the baselines read of some spots (S,) of a slice, from standardised features (A, P) and centres (A, 2), in
    the unit of `pitch`, of all its spots."""
    return {"features": features[rows], "rings": ring_features(features, xy, pitch)[rows]}


def ring_features(features: np.ndarray, xy: np.ndarray, pitch: float) -> np.ndarray:
    """A spot's features and the means over its two rings of neighbours.

    Parameters
    ----------
    features : (S, P)
        Standardised: the zeros of an empty ring are the average.
    xy : (S, 2)
        Spot centres, in the unit of `pitch`.
    pitch : float
        Distance of neighbouring spots.

    Returns
    -------
    (S, 3 P): of the spot, within 1.2 pitches, within 1.2 to 2.3 pitches.
    """
    n_spots = len(features)
    pairs = KDTree(xy).query_pairs(RINGS[-1][1] * pitch, output_type="ndarray")
    distance = np.linalg.norm(np.asarray(xy)[pairs[:, 0]] - np.asarray(xy)[pairs[:, 1]], axis=1) / pitch
    parts = [features]
    for inner, outer in RINGS:
        left, right = pairs[((distance > inner) | (inner == 0)) & (distance <= outer)].T
        ends = np.concatenate([left, right]), np.concatenate([right, left])
        near = csr_array((np.ones(len(ends[0]), dtype=features.dtype), ends), shape=(n_spots, n_spots))
        number = np.bincount(ends[0], minlength=n_spots).astype(features.dtype)
        parts.append((near @ features) / np.maximum(number, 1)[:, None])
    return np.concatenate(parts, axis=1)


@dataclass(frozen=True)
class Knn:
    """Mean target of the `k` train spots with the most similar features. val_pcc is the score `k` was chosen on."""

    search: NearestNeighbors  # over the N train spots, features of unit length where cosine
    y_train: np.ndarray  # (N, G)
    k: int
    cosine: bool
    val_pcc: float

    def predict(self, x: np.ndarray) -> np.ndarray:
        """(S, P) -> (S, G)"""
        return self.predict_each(x, [self.k])[0]

    def predict_each(self, x: np.ndarray, ks: Sequence[int]) -> list[np.ndarray]:
        """Predictions for several numbers of neighbours, with one search: (S, P) -> (S, G) for each of `ks`."""
        x = _unit_length(x) if self.cosine else x
        nearest = self.search.kneighbors(x, max(ks), return_distance=False)
        total, means = np.zeros((len(x), self.y_train.shape[1])), {}
        for k in range(1, max(ks) + 1):  # one neighbour at a time: (S, k, G) would not fit
            total += self.y_train[nearest[:, k - 1]]
            if k in ks:
                means[k] = total / k
        return [means[k] for k in ks]


def fit_knn(
    x_train: Slices,
    y_train: Slices,
    x_val: Slices,
    y_val: Slices,
    ks: Sequence[int] = (10, 25, 50),
    cosine: bool = True,
) -> Knn:
    """Nearest neighbours over all train spots; `ks`, capped by their number, are tried on validation.

    Parameters
    ----------
    x_train, x_val : per slice (S, P)
    y_train, y_val : per slice (S, G)
    cosine : similarity by angle (Euclidean distance of unit vectors); otherwise by Euclidean distance.
    """
    check_tables(x_train, y_train, x_val, y_val)
    x, y = np.concatenate(x_train), np.concatenate(y_train)
    ks = sorted({min(k, len(x)) for k in ks}, reverse=True)  # of equally good ones the smoothest
    search = NearestNeighbors(algorithm="brute").fit(_unit_length(x) if cosine else x)
    knn = Knn(search, y, ks[0], cosine, np.nan)
    tried = [knn.predict_each(features, ks) for features in x_val]  # per slice, per k
    scores = [validation_pcc([predicted[i] for predicted in tried], y_val) for i in range(len(ks))]
    best = int(np.argmax(scores))
    return replace(knn, k=ks[best], val_pcc=scores[best])


def fit_depth(x_train: Slices, log_depth_train: Slices, x_val: Slices, log_depth_val: Slices) -> Ridge:
    """Ridge from features, per slice (S, P), to log total counts, per slice (S,); it predicts (S, 1).

    Each slice's depths are taken relative to their mean: the depth of sequencing of a slice does not show in the image.
    """
    train, val = ([(d - np.mean(d))[:, None] for d in depths] for depths in (log_depth_train, log_depth_val))
    return fit_ridge(x_train, train, x_val, val)


def mean_profile(targets: Slices) -> np.ndarray:
    """Mean of each gene over all train spots: per slice (S, G) -> (G,)."""
    return mean_over_spots(targets)


def fit_baselines(train: Sequence[Slice], val: Sequence[Slice]) -> dict[str, Callable[[Images], np.ndarray]]:
    """All baselines, fitted on the same slices as the model.

    Returns
    -------
    {"mean", "depth", "ridge", "ridge_neighbours", "knn"}: each a function of a slice's images that
    predicts (S, G) in the scale of `target`, "depth" in log total counts, the same column for every gene.
    """
    x_train, x_val = [s["features"] for s in train], [s["features"] for s in val]
    y_train, y_val = _filled([s["target"] for s in train]), [s["target"] for s in val]
    rings_train, rings_val = [s["rings"] for s in train], [s["rings"] for s in val]
    profile = mean_profile(y_train)
    depth = fit_depth(rings_train, [s["log_depth"] for s in train], rings_val, [s["log_depth"] for s in val])
    ridge = fit_ridge(x_train, y_train, x_val, y_val)
    ridge_neighbours = fit_ridge(rings_train, y_train, rings_val, y_val)
    knn = fit_knn(x_train, y_train, x_val, y_val)
    return {
        "mean": lambda s: np.tile(profile, (len(s["features"]), 1)),
        "depth": lambda s: np.repeat(depth.predict(s["rings"]), len(profile), axis=1),
        "ridge": lambda s: ridge.predict(s["features"]),
        "ridge_neighbours": lambda s: ridge_neighbours.predict(s["rings"]),
        "knn": lambda s: knn.predict(s["features"]),
    }


def _filled(targets: Slices) -> Slices:
    """Targets with the train mean of a gene wherever a slice lacks it, which leaves the fit unchanged there."""
    known = np.sum([np.isfinite(t).sum(axis=0) for t in targets], axis=0)
    mean = np.sum([np.nansum(t, axis=0, dtype=np.float64) for t in targets], axis=0) / np.maximum(known, 1)
    return [np.where(np.isfinite(t), t, mean) for t in targets]


def _unit_length(x: np.ndarray) -> np.ndarray:
    length = np.linalg.norm(x, axis=1, keepdims=True)
    return x / np.where(length > 0, length, 1)
