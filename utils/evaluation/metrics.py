"""Correlations, errors and the scales in which expression is scored.

Shapes: S spots, G genes. Everything is computed and returned in float64.

Log-normalised genes depend on sequencing depth: low counts leave zeros, so log1p(counts per 10,000) of nearly every
gene rises with the depth of its spot. Analytic Pearson residuals remove this and are the main scale.
Source: Lause, Berens and Kobak 2021, Genome Biology 22:258, doi 10.1186/s13059-021-02451-7.
"""

from collections.abc import Callable

import numpy as np

UNITS = {"lognorm": "log1p counts per 10,000", "residuals": "Pearson residuals", "counts": "counts per 10,000"}
SCALES = tuple(UNITS)
PREDICTABLE_PCC = 0.1  # validation PCC from which a gene counts as predictable; below it the report greys the gene
THETA = 100.0  # overdispersion of the negative binomial behind Pearson residuals, shared by all genes
# A covariate that explains all but this fraction of a variance leaves rounding noise, which has no correlation.
_LEAST_VARIANCE_LEFT = 1e-12


def is_flat(values: np.ndarray) -> np.ndarray:
    """Which columns hold a single value: (S, G) -> (G,) bool. By range: the deviation of a constant 0.1 is not 0."""
    return np.ptp(np.asarray(values, dtype=np.float64), axis=0) == 0


def pearson_per_gene(pred: np.ndarray, true: np.ndarray) -> np.ndarray:
    """Pearson r of each gene over spots.

    Parameters
    ----------
    pred, true : (S, G)
        Predicted and measured values, in any scale.

    Returns
    -------
    (G,) r, signs kept. A gene that is flat, or holds a NaN, on either side gives NaN, for the caller to count.
    """
    pred, true = _pair(pred, true)
    flat = is_flat(pred) | is_flat(true)
    pred, true = pred - pred.mean(axis=0), true - true.mean(axis=0)
    norm = np.linalg.norm(pred, axis=0) * np.linalg.norm(true, axis=0)
    flat |= norm == 0  # a deviation so small that its square underflows
    return np.where(flat, np.nan, (pred * true).sum(axis=0) / np.where(flat, 1.0, norm))


def scored_pearson_per_gene(pred: np.ndarray, true: np.ndarray) -> np.ndarray:
    """Pearson r of each gene as it is scored: (S, G), (S, G) -> (G,).

    A gene that is flat or missing in the measurement gives NaN and is left out of means. A gene that is undefined only
    because of the prediction gives 0: a constant prediction must not raise a mean by being left out.
    """
    r = pearson_per_gene(pred, true)
    left_out = is_flat(true) | ~np.isfinite(true).all(axis=0)
    return np.where(left_out, np.nan, np.nan_to_num(r, nan=0.0))


def scored_pearson_per_spot(pred: np.ndarray, true: np.ndarray) -> np.ndarray:
    """Pearson r of each spot as it is scored, by the rule of `scored_pearson_per_gene`: (S, G), (S, G) -> (S,)."""
    return scored_pearson_per_gene(np.transpose(pred), np.transpose(true))


def spearman_per_gene(pred: np.ndarray, true: np.ndarray) -> np.ndarray:
    """Spearman rho of each gene over spots, ties sharing their mean rank: (S, G), (S, G) -> (G,). NaN as in Pearson."""
    from scipy.stats import rankdata

    pred, true = _pair(pred, true)
    return pearson_per_gene(rankdata(pred, axis=0), rankdata(true, axis=0))


def partial_pearson_per_gene(pred: np.ndarray, true: np.ndarray, given: np.ndarray) -> np.ndarray:
    """Correlation of each gene after one covariate is regressed out of both sides.

    Parameters
    ----------
    pred, true : (S, G)
    given : (S,)
        The covariate, here log total counts. A flat one changes nothing.

    Returns
    -------
    (G,) partial r. NaN where Pearson is, and where either side is nothing but the covariate.
    """
    pred, true = _pair(pred, true)
    covariate = np.broadcast_to(np.asarray(given, dtype=np.float64)[:, None], true.shape)
    r = pearson_per_gene(pred, true)
    r_pred, r_true = pearson_per_gene(pred, covariate), pearson_per_gene(true, covariate)
    if np.ptp(given) == 0:
        r_pred, r_true = np.zeros_like(r), np.zeros_like(r)
    left_pred, left_true = 1 - r_pred**2, 1 - r_true**2
    nothing_left = np.minimum(left_pred, left_true) < _LEAST_VARIANCE_LEFT
    left = np.sqrt(np.where(nothing_left, 1.0, left_pred * left_true))
    return np.clip(np.where(nothing_left, np.nan, (r - r_pred * r_true) / left), -1, 1)


def mse(pred: np.ndarray, true: np.ndarray) -> float:
    """Mean squared error over all spots and genes: (S, G), (S, G) -> number, in squared units of the scale."""
    pred, true = _pair(pred, true)
    return float(np.mean((pred - true) ** 2))


def mae(pred: np.ndarray, true: np.ndarray) -> float:
    """Mean absolute error over all spots and genes: (S, G), (S, G) -> number, in units of the scale."""
    pred, true = _pair(pred, true)
    return float(np.mean(np.abs(pred - true)))


def sd_ratio(pred: np.ndarray, true: np.ndarray) -> float:
    """Predicted over measured deviation, mean over the genes not flat in the measurement: 1 is right, 0 a constant."""
    pred, true = _pair(pred, true)
    varies = ~is_flat(true)
    return float(np.mean(pred[:, varies].std(axis=0) / true[:, varies].std(axis=0))) if varies.any() else float("nan")


def counts_per_10k(counts: np.ndarray, total_counts: np.ndarray) -> np.ndarray:
    """Counts per 10,000 counts of the spot.

    Parameters
    ----------
    counts : (S, G)
        Raw counts of the panel's genes. A column of NaN (a gene the slice lacks) stays NaN.
    total_counts : (S,)
        Counts of the spot over ALL genes of the slice, not over the panel.
    """
    counts, total = _counts(counts, total_counts)
    return counts * (1e4 / np.where(total > 0, total, 1.0))[:, None]  # a spot without counts stays zero


def log1p_cp10k(counts: np.ndarray, total_counts: np.ndarray) -> np.ndarray:
    """log(1 + counts per 10,000), natural logarithm: (S, G), (S,) -> (S, G)."""
    return np.log1p(counts_per_10k(counts, total_counts))


def pearson_residuals(counts: np.ndarray, total_counts: np.ndarray, theta: float = THETA) -> np.ndarray:
    """Analytic Pearson residuals of the panel's genes in ONE slice (Lause et al. 2021, equations 3 to 5).

    Equal to `scanpy.experimental.pp.normalize_pearson_residuals` of the whole matrix, restricted to the panel: the
    other genes enter through `total_counts` alone. A gene without any count is 0 (scanpy: NaN).

    Parameters
    ----------
    counts : (S, G)
        Raw counts of all spots of the slice: a gene's sum over them is part of its expectation.
    total_counts : (S,)
        Counts of the spot over ALL genes of the slice.
    theta : float
        Overdispersion of the negative binomial shared by all genes.
    """
    counts, total = _counts(counts, total_counts)
    expected = total[:, None] * (counts.sum(axis=0) / total.sum())
    deviation = np.sqrt(expected + expected**2 / theta)
    residuals = np.divide(counts - expected, deviation, out=np.zeros_like(counts), where=deviation != 0)
    limit = np.sqrt(len(counts))
    return np.clip(residuals, -limit, limit)


def to_scale(name: str, counts: np.ndarray, total_counts: np.ndarray) -> np.ndarray:
    """Raw counts of one slice in the scale `name`, one of `SCALES`: (S, G), (S,) -> (S, G)."""
    scales: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
        "lognorm": log1p_cp10k,
        "residuals": pearson_residuals,
        "counts": counts_per_10k,
    }
    if name not in scales:
        raise ValueError(f"scale: expected one of {', '.join(SCALES)}, found {name!r}")
    return scales[name](counts, total_counts)


def to_lognorm(name: str, values: np.ndarray, total_counts: float, fraction: np.ndarray) -> np.ndarray:
    """Predicted values of the scale `name`, one of `SCALES`, as log1p counts per 10,000: (S, G) -> (S, G).

    Residuals r are inverted at one depth n for all spots: mu = n p, counts x = max(0, mu + r sqrt(mu + mu^2 / theta)),
    log1p(1e4 x / n). Counts below zero are taken as zero.

    Parameters
    ----------
    total_counts : float
        n, counts of a spot over all genes; read for residuals alone, as is `fraction`.
    fraction : (G,)
        p, the gene's fraction of all counts.
    """
    values = np.asarray(values, dtype=np.float64)
    if name == "lognorm":
        return values
    if name == "counts":
        return np.log1p(np.maximum(values, 0.0))
    expected = total_counts * np.asarray(fraction, dtype=np.float64)
    counts = np.maximum(expected + values * np.sqrt(expected + expected**2 / THETA), 0.0)
    return np.log1p(counts * (1e4 / total_counts))


def _pair(pred: np.ndarray, true: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    pred, true = np.asarray(pred, dtype=np.float64), np.asarray(true, dtype=np.float64)
    if pred.shape != true.shape or pred.ndim != 2:
        raise ValueError(f"expected two tables of equal shape (spots, genes), found {pred.shape} and {true.shape}")
    return pred, true


def _counts(counts: np.ndarray, total_counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    counts, total = np.asarray(counts, dtype=np.float64), np.asarray(total_counts, dtype=np.float64)
    if counts.ndim != 2 or total.shape != counts.shape[:1]:
        raise ValueError(f"expected counts (spots, genes) and one total per spot, found {counts.shape}, {total.shape}")
    if (counts < 0).any():
        raise ValueError(f"expected raw counts, found a negative value: {np.nanmin(counts):g}")
    too_few = np.nansum(counts, axis=1) > total * (1 + 1e-6)
    if too_few.any():
        raise ValueError(
            f"total_counts: expected sums over all genes, found {too_few.sum()} spots with less than the sum of the "
            "panel; sum over all genes of the slice"
        )
    return counts, total
