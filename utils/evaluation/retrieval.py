"""Retrieval: whether an image finds its own expression profile among others.

Shapes: S spots, K candidates per spot, D embedding width. Higher scores are better. Ties and NaN are misses, and tied
candidates rank above the true one.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from scipy.spatial import KDTree

from utils.evaluation.bootstrap import block_bootstrap_interval

CUTOFFS = (1, 5, 10)
WEIGHTS = np.linspace(0, 1, 21)  # of the matching logit, that are tried; 1 adds it to the log softmax as it is
_TIE = 1e-12  # of the largest possible product: equal vectors may differ by rounding in a matrix product


class Gallery(NamedTuple):
    """Candidates of each spot of one slice, in shuffled order.

    candidates : (S, K) spot numbers, -1 where the slice has too few spots.
    truth : (S,) the column that holds the spot itself.
    """

    candidates: np.ndarray
    truth: np.ndarray


def neighbour_candidates(xy: np.ndarray, k: int = 8, seed: int = 0) -> Gallery:
    """Each spot and its `k` nearest neighbours in the slice: (S, 2), in any unit of length -> K = k + 1."""
    n_spots = len(xy)
    n_near = min(k + 1, n_spots)
    near = KDTree(xy).query(xy, k=n_near)[1].reshape(n_spots, n_near)
    # Spots may coincide, so the spot itself need not come first, nor at all: move it last and cut the last one off.
    itself = near == np.arange(n_spots)[:, None]
    others = np.take_along_axis(near, np.argsort(itself, axis=1, kind="stable"), axis=1)[:, : n_near - 1]
    return _shuffled(others, k, seed)


def random_candidates(n_spots: int, n: int = 9, seed: int = 0) -> Gallery:
    """Each spot and `n` others of its slice, drawn without replacement; the same for the same seed: K = n + 1."""
    rng = np.random.default_rng(seed)
    n_drawn = min(n, n_spots - 1)
    drawn = np.array([rng.choice(n_spots - 1, n_drawn, replace=False) for _ in range(n_spots)], dtype=np.int64)
    others = drawn.reshape(n_spots, n_drawn)
    return _shuffled(others + (others >= np.arange(n_spots)[:, None]), n, seed + 1)  # step over the spot itself


def _shuffled(others: np.ndarray, n: int, seed: int) -> Gallery:
    """Spot and others, padded to `n` others, each row shuffled: the column must not reveal the spot."""
    n_spots = len(others)
    padding = np.full((n_spots, n - others.shape[1]), -1)
    rows = np.concatenate([np.arange(n_spots)[:, None], others, padding], axis=1)
    candidates = np.random.default_rng(seed).permuted(rows, axis=1)
    return Gallery(candidates, np.argmax(candidates == np.arange(n_spots)[:, None], axis=1))


def chance(candidates: np.ndarray) -> float:
    """Accuracy of a guess: mean over spots of 1 / number of candidates. (S, K), padding -1 -> number."""
    return float(np.mean(1 / (np.asarray(candidates) >= 0).sum(axis=1)))


def hits(scores: np.ndarray, truth: np.ndarray, candidates: np.ndarray | None = None) -> np.ndarray:
    """Which spots score their true candidate strictly above every other.

    Parameters
    ----------
    scores : (S, K)
        NaN, on either side of the comparison, is a miss.
    truth : (S,)
        Column of the true candidate.
    candidates : (S, K) or None
        Columns that are -1 here are padding and are ignored, whatever their score.

    Returns
    -------
    (S,) bool
    """
    scores, column = np.asarray(scores, dtype=np.float64), np.asarray(truth)[:, None]
    true = np.take_along_axis(scores, column, axis=1)
    beaten = scores < true  # False wherever NaN is involved
    if candidates is not None:
        beaten |= np.asarray(candidates) < 0
    np.put_along_axis(beaten, column, ~np.isnan(true), axis=1)
    return np.asarray(beaten.all(axis=1))


def depth_scores(predicted_log_depth: np.ndarray, candidate_log_depth: np.ndarray) -> np.ndarray:
    """The baseline: minus the distance of log total counts to those predicted from the image: (S,), (S, K) -> (S, K).

    Slices are sequenced to different depths: give both relative to their slice's mean (see `baselines.fit_depth`).
    """
    return -np.abs(np.asarray(predicted_log_depth)[:, None] - np.asarray(candidate_log_depth))


def log_softmax(scores: np.ndarray, candidates: np.ndarray) -> np.ndarray:
    """Over the candidates of each spot, padding left out: (S, K), (S, K) -> (S, K)."""
    present = np.where(np.asarray(candidates) >= 0, scores, -np.inf)
    top = present.max(axis=1, keepdims=True)
    return scores - top - np.log(np.exp(present - top).sum(axis=1, keepdims=True))


def reranking_weight(
    similarity: Sequence[np.ndarray], matching: Sequence[np.ndarray], galleries: Sequence[Gallery]
) -> float:
    """The weight w of WEIGHTS for which log softmax(similarity) + w matching ranks the true candidates best, by the
    mean reciprocal rank, mean over slices: per slice (S, K), (S, K), gallery -> w; 0 without any spot.

    Not by the likelihood: on other patients both scores are too confident, and any sum of them is more so.
    """
    if not galleries:
        return 0.0
    softmaxes = [log_softmax(s, g.candidates) for s, g in zip(similarity, galleries, strict=True)]

    def mean_reciprocal_rank(weight: float) -> float:
        scored = zip(softmaxes, matching, galleries, strict=True)
        return float(np.mean([reciprocal_ranks(s + weight * m, g).mean() for s, m, g in scored]))

    return float(WEIGHTS[int(np.argmax([mean_reciprocal_rank(weight) for weight in WEIGHTS]))])


def reciprocal_ranks(scores: np.ndarray, gallery: Gallery) -> np.ndarray:
    """1 / rank of the true candidate, tied ones and NaN above it: (S, K) -> (S,)."""
    true = np.take_along_axis(scores, gallery.truth[:, None], axis=1)
    return 1 / np.sum(~(scores < true) & (gallery.candidates >= 0), axis=1)


def ranks_from_embeddings(a: np.ndarray, b: np.ndarray, block: int = 1024) -> np.ndarray:
    """Rank of row i of `b` among all rows of `b` by scalar product with row i of `a`.

    Parameters
    ----------
    a, b : (S, D)
        Embeddings of the same spots, normalised by the caller if cosines are wanted.
    block : int
        Rows of either that are multiplied at a time, in double precision: 8 block (2 D + block) bytes.

    Returns
    -------
    (S,) ranks, 1 is best, tied candidates above the true one, S where the similarity is NaN.
    """
    if np.shape(a) != np.shape(b):
        raise ValueError(f"expected two embeddings of each spot, found shapes {np.shape(a)} and {np.shape(b)}")
    tie = _TIE * (_longest(a) * _longest(b))
    parts = [slice(i, i + block) for i in range(0, len(a), block)]
    ranks = np.zeros(len(a), dtype=np.int64)
    for rows in parts:
        queries = np.asarray(a[rows], dtype=np.float64)
        least = np.einsum("sd,sd->s", queries, np.asarray(b[rows], dtype=np.float64)) - tie
        for others in parts:
            ranks[rows] += _not_below(queries @ np.asarray(b[others], dtype=np.float64).T, least)
    return ranks


def _longest(vectors: np.ndarray) -> float:
    """The greatest length of a row: (S, D) -> number. A row with NaN has none."""
    squares = np.einsum("sd,sd->s", vectors, vectors, dtype=np.float64)
    return float(np.nan_to_num(np.sqrt(squares)).max())


def _not_below(similarity: np.ndarray, least: np.ndarray) -> np.ndarray:
    """How many of the candidates (rows, S) reach the `least` (rows,), the true one being among them: (rows,)."""
    below = similarity < least[:, None]  # False wherever NaN is involved: such a candidate ranks above
    return np.asarray(below.shape[1] - below.sum(axis=1))


def recall_at(ranks: np.ndarray, k: int) -> float:
    """Fraction of spots whose true candidate is among the first `k`: (S,) -> 0..1."""
    return float(np.mean(np.asarray(ranks) <= k))


def slice_figures(ranks_i2g: np.ndarray, ranks_g2i: np.ndarray) -> dict[str, dict[str, float]]:
    """Recall and median rank of one slice, both directions, and chance: (S,), (S,) -> the figures."""
    n_spots = len(ranks_i2g)
    guess = {f"R@{k}": min(1.0, k / n_spots) for k in CUTOFFS} | {"median_rank": (n_spots + 1) / 2}
    return {"image_to_gene": _direction(ranks_i2g), "gene_to_image": _direction(ranks_g2i), "chance": guess}


def mean_slice_figures(per_slice: Sequence[Mapping[str, Mapping[str, float]]]) -> dict[str, dict[str, float]]:
    """Means over slices of each figure of `slice_figures`: every slice counts alike, whatever its size."""
    first = per_slice[0]
    return {way: {key: float(np.mean([s[way][key] for s in per_slice])) for key in first[way]} for way in first}


def _direction(ranks: np.ndarray) -> dict[str, float]:
    return {f"R@{k}": recall_at(ranks, k) for k in CUTOFFS} | {"median_rank": float(np.median(ranks))}


def evaluate_gallery(
    scores: Mapping[str, Sequence[np.ndarray]],
    galleries: Sequence[Gallery],
    block_ids: Sequence[np.ndarray],
    n_draws: int = 2000,
    seed: int = 0,
) -> dict:
    """Accuracy of each method, mean over slices, with 95 % intervals, and chance.

    Parameters
    ----------
    scores : method -> per slice (S, K)
    galleries : per slice
    block_ids : per slice (S,)
        From `bootstrap.blocks`: the units that are resampled, within their slice.

    Returns
    -------
    {"chance": 0..1, method: 0..1, ..., "interval": {method: [low, high]}}
    """
    figures: dict = {"chance": float(np.mean([chance(g.candidates) for g in galleries]))}
    intervals: dict[str, list[float]] = {}
    strata = np.repeat(np.arange(len(galleries)), [len(g.truth) for g in galleries])
    for method, per_slice in scores.items():
        found = [hits(s, g.truth, g.candidates) for s, g in zip(per_slice, galleries, strict=True)]
        figures[method] = float(np.mean([h.mean() for h in found]))
        interval = block_bootstrap_interval(
            np.concatenate(found), np.concatenate(block_ids), n_draws=n_draws, seed=seed, strata=strata
        )
        intervals[method] = np.clip(interval, 0, 1).tolist()
    return figures | {"interval": intervals}
