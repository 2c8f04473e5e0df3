"""What a careful user asks of a stage-one model before its scores: did it learn, collapse, or just learn the slide?

Shapes: S spots, D width of the embeddings, K candidates.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

FLAT = 1e-6  # deviation under which a unit is dead
N_OTHERS = 2  # non-pairs to a pair, as in training


def effective_rank(embeddings: np.ndarray) -> float:
    """exp of the entropy of the normalised singular values of (S, D) (Garrido et al. 2023, RankMe): 1 to min(S, D)."""
    values = np.linalg.svd(np.asarray(embeddings, np.float64), compute_uv=False)
    share = values[values > 0] / values.sum()
    return float(np.exp(-(share * np.log(share)).sum()))


def dead_units(embeddings: np.ndarray) -> float:
    """Share of the D units that do not vary over the spots."""
    return float((np.std(embeddings, axis=0, dtype=np.float64) < FLAT).mean())


def slice_accuracy(embeddings: Sequence[np.ndarray]) -> dict[str, float] | None:
    """How well logistic regression tells the slice of a spot, cross-validated by spots, beside guessing the largest.

    Per slice (S, D); None where there is one slice alone.
    """
    if len(embeddings) < 2:
        return None
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import cross_val_score
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    x, slices = np.concatenate(embeddings), np.repeat(np.arange(len(embeddings)), list(map(len, embeddings)))
    classifier = make_pipeline(StandardScaler(), LogisticRegression(C=0.01, max_iter=200))
    accuracy = cross_val_score(classifier, x, slices, cv=min(5, int(np.bincount(slices).min()))).mean()
    return {"accuracy": float(accuracy), "chance": float(np.bincount(slices).max() / len(slices))}


def calibration_error(logits: np.ndarray, is_pair: np.ndarray, n_bins: int = 10) -> float:
    """Expected calibration error of sigmoid(logit): |share of pairs - mean score|, mean over bins of equal width."""
    score = 1 / (1 + np.exp(-np.asarray(logits, np.float64)))
    which = np.minimum((score * n_bins).astype(int), n_bins - 1)
    gaps = np.bincount(which, np.asarray(is_pair) - score, n_bins)  # of each bin, times its number
    return float(np.abs(gaps).sum() / len(score))


def matching_calibration(model: Any, encoded: Sequence[Any], accelerator: Any, seed: int) -> float:
    """Of each image with its own profile and two others of its slice: a third are pairs, as in training."""
    from get_accuracy_image import match_scores
    from utils.evaluation import retrieval

    logits, pairs = [], []
    for one in encoded:
        gallery = retrieval.random_candidates(len(one.image), N_OTHERS, seed)
        there = gallery.candidates >= 0
        logits.append(match_scores(model, one, gallery.candidates, accelerator)[there])
        own = np.arange(gallery.candidates.shape[1]) == np.asarray(gallery.truth)[:, None]
        pairs.append(own[there])
    return calibration_error(np.concatenate(logits), np.concatenate(pairs))


def losses(logs: Path) -> dict[str, Any]:
    """Last and best epoch of the newest log.jsonl of stage one below `logs`: all its losses, beside their chance."""
    newest = max((logs / "stage_one").glob("*/log.jsonl"), key=lambda path: path.stat().st_mtime)
    rows = [json.loads(line) for line in newest.read_text().splitlines()]
    return {"last": rows[-1], "best": max(rows, key=lambda row: row["val_R@5"])}


def of_stage_one(
    encoded: Mapping[str, Sequence[Any]], pretrained: Sequence[np.ndarray], model: Any, accelerator: Any, seed: int
) -> dict[str, Any]:
    """Diagnostics of the embeddings.

    Parameters
    ----------
    encoded : "train", "test": per slice features.EncodedPairs, the test ones with tokens
    pretrained : per train slice, features (S, C) of the encoder before stage one, of its train spots
    """
    image, gene = (np.concatenate([getattr(one, side) for one in encoded["test"]]) for side in ("image", "gene"))
    return {
        "slice_classifier": {
            "before": slice_accuracy(pretrained),
            "after": slice_accuracy([one.image for one in encoded["train"]]),
        },
        "effective_rank": {"image": effective_rank(image), "gene": effective_rank(gene)},
        "dead_units": {"image": dead_units(image), "gene": dead_units(gene)},
        "matching_calibration_error": matching_calibration(model, encoded["test"], accelerator, seed),
    }
