"""The figures of predicted expression: per slice, mean over slices, pooled, and per gene.

Shapes: S spots (of one slice), G genes (of the panel). A row is one predictor: the model, or a cheap one beside it.
The figures at the top are means over slices of the slice's own figure; pooling spots of several slices inflates
correlations, so pooled figures stand apart.
"""

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypedDict

import numpy as np

from utils.evaluation import metrics

if TYPE_CHECKING:
    import pandas as pd

FIGURES = (
    "pcc_gene_mean",
    "pcc_gene_median",
    "pcc_gene_top50",
    "pcc_gene_given_depth",
    "pcc_spot_mean",
    "spearman_gene_mean",
    "mse",
    "mae",
    "sd_ratio",
    "undefined_genes",
)
# What a row cannot have: the mean profile is flat in every gene, the depth row is one column in a unit of its own.
WITHOUT = {"mean": {"per_gene": False}, "depth": {"errors": False, "per_spot": False}}

Figures = dict[str, float | None]
Rows = Mapping[str, Sequence[np.ndarray]]


class MeasuredSlice(TypedDict):
    """What was measured on one slice."""

    name: str
    counts: np.ndarray  # (S, G) raw counts of the panel
    total_counts: np.ndarray  # (S,) over ALL genes of the slice
    measured: np.ndarray  # (G,) bool: the slice has this gene


def figures(
    pred: np.ndarray,
    true: np.ndarray,
    log_depth: np.ndarray,
    *,
    defined: np.ndarray,
    errors: bool,
    per_gene: bool,
    per_spot: bool,
) -> Figures:
    """All figures of one row on one slice in one scale.

    Parameters
    ----------
    pred, true : (S, G)
    log_depth : (S,)
        Logarithm of the total counts.
    defined : (G,) bool
        Genes that the slice measured. Of these, the ones flat in the measurement leave every figure.
    errors, per_gene, per_spot : bool
        Which families the row can have. `sd_ratio` needs errors and genes; correlation given depth needs more than
        one column for all genes, which is what `per_spot` says.

    Returns
    -------
    dict with the keys `FIGURES`; None where the row cannot have the figure or nothing defines it.
    """
    true = np.asarray(true, dtype=np.float64)
    keep = np.asarray(defined, dtype=bool) & ~metrics.is_flat(true)
    found: dict[str, Any] = dict.fromkeys(FIGURES) | {"undefined_genes": 0}
    if not keep.any():
        return found
    pred, true = np.asarray(pred, dtype=np.float64)[:, keep], true[:, keep]
    found["undefined_genes"] = int(np.isnan(metrics.pearson_per_gene(pred, true)).sum())
    if per_gene:
        found |= _gene_figures(pred, true)
    if per_gene and per_spot:
        found["pcc_gene_given_depth"] = _mean_or_zero(metrics.partial_pearson_per_gene(pred, true, log_depth))
    if per_spot:
        found["pcc_spot_mean"] = _mean(metrics.scored_pearson_per_spot(pred, true))
    if errors:
        found |= {"mse": metrics.mse(pred, true), "mae": metrics.mae(pred, true)}
    if errors and per_gene:
        found["sd_ratio"] = metrics.sd_ratio(pred, true)
    return plain(found)


def _gene_figures(pred: np.ndarray, true: np.ndarray) -> dict[str, float]:
    r = metrics.scored_pearson_per_gene(pred, true)
    return {
        "pcc_gene_mean": float(np.mean(r)),
        "pcc_gene_median": float(np.median(r)),
        "pcc_gene_top50": float(np.mean(np.sort(r)[-50:])),
        "spearman_gene_mean": _mean_or_zero(metrics.spearman_per_gene(pred, true)),
    }


def evaluate(rows: Rows, slices: Sequence[MeasuredSlice], fitted_scale: str) -> dict[str, Any]:
    """The body of the expression evaluation's metrics.json.

    Parameters
    ----------
    rows : row -> per slice (S, G)
        Predictions, all in the scale they were fitted in: correlations need no conversion. The rows "mean" and
        "depth" are known by name for what they cannot have.
    slices : per slice
        What was measured, in the order of the predictions.
    fitted_scale : str
        One of `metrics.SCALES`: errors are given there and nowhere else.

    Returns
    -------
    {"n_spots", "n_genes", scale: {row: figures}, "pooled": {scale: {row: figures}},
    "per_slice": {slice: {scale: {row: figures}}}}, ready for json. `undefined_genes` is a sum over slices. Pooled
    figures use the genes measured in all slices.
    """
    _check(rows, slices, fitted_scale)
    result: dict[str, Any] = {
        "n_spots": sum(len(s["counts"]) for s in slices),
        "n_genes": int(np.any([s["measured"] for s in slices], axis=0).sum()),
        "pooled": {},
        "per_slice": {s["name"]: {} for s in slices},
    }
    log_depth = [np.log(np.maximum(s["total_counts"], 1)) for s in slices]
    measured_in_all = np.all([s["measured"] for s in slices], axis=0)
    for scale in metrics.SCALES:
        errors = scale == fitted_scale
        truth = [metrics.to_scale(scale, s["counts"], s["total_counts"]) for s in slices]
        for i, one in enumerate(slices):
            here = {row: preds[i] for row, preds in rows.items()}
            result["per_slice"][one["name"]][scale] = _rows(here, truth[i], log_depth[i], one["measured"], errors)
        result[scale] = {
            row: mean_figures([result["per_slice"][s["name"]][scale][row] for s in slices]) for row in rows
        }
        together = {row: np.concatenate(list(preds)) for row, preds in rows.items()}
        result["pooled"][scale] = _rows(
            together, np.concatenate(truth), np.concatenate(log_depth), measured_in_all, errors
        )
    return plain(result)


def mean_figures(per_slice: Sequence[Figures]) -> Figures:
    """Mean over slices of each figure, over the slices that have it; `undefined_genes` is added up."""
    means: Figures = {}
    for key in FIGURES:
        values = [value for one in per_slice if (value := one[key]) is not None]
        means[key] = float(np.mean(values)) if values else None
    means["undefined_genes"] = sum(one["undefined_genes"] or 0 for one in per_slice)
    return means


def per_gene_table(rows: Rows, slices: Sequence[MeasuredSlice], genes: Sequence[str]) -> "pd.DataFrame":
    """One line per gene: how much there is of it and how well each row predicts it.

    Columns: gene; n_slices that measured it; counts_per_10k, the mean over slices of the slice's mean;
    pcc_<scale>_<row>, the mean over the slices where the gene varies (signs kept; a flat prediction is 0). The mean
    profile has no correlation per gene and no column.
    """
    import pandas as pd

    measured = np.array([s["measured"] for s in slices], dtype=bool)
    depth = [np.asarray(metrics.to_scale("counts", s["counts"], s["total_counts"])).mean(axis=0) for s in slices]
    columns: dict[str, Any] = {
        "gene": list(genes),
        "n_slices": measured.sum(axis=0),
        "counts_per_10k": _mean_of_rows(np.where(measured, depth, np.nan)),
    }
    for scale in metrics.SCALES:
        truth = [metrics.to_scale(scale, s["counts"], s["total_counts"]) for s in slices]
        for row in rows:
            if row != "mean":
                r = [metrics.scored_pearson_per_gene(p, t) for p, t in zip(rows[row], truth, strict=True)]
                columns[f"pcc_{scale}_{row}"] = _mean_of_rows(np.where(measured, r, np.nan))
    return pd.DataFrame(columns)


def plain(obj: Any) -> Any:
    """The same with Python numbers, lists and dicts only, NaN and infinity as None: JSON has no word for them."""
    if isinstance(obj, Mapping):
        return {str(key): plain(value) for key, value in obj.items()}
    if isinstance(obj, np.ndarray | np.generic):
        return plain(obj.tolist())
    if isinstance(obj, list | tuple):
        return [plain(value) for value in obj]
    if isinstance(obj, float):
        return float(obj) if math.isfinite(obj) else None
    return obj


def _rows(
    preds: Mapping[str, np.ndarray], true: np.ndarray, log_depth: np.ndarray, defined: np.ndarray, errors: bool
) -> dict[str, Figures]:
    found = {}
    for row, pred in preds.items():
        families = {"errors": errors, "per_gene": True, "per_spot": True} | WITHOUT.get(row, {})
        families["errors"] = errors and families["errors"]
        found[row] = figures(pred, true, log_depth, defined=defined, **families)
    return found


def _check(rows: Rows, slices: Sequence[MeasuredSlice], fitted_scale: str) -> None:
    if fitted_scale not in metrics.SCALES:
        raise ValueError(f"fitted_scale: expected one of {', '.join(metrics.SCALES)}, found {fitted_scale!r}")
    names = [s["name"] for s in slices]
    if not names or len(set(names)) < len(names):
        raise ValueError(f"slices: expected at least one, with names of their own, found {names}")
    for row, preds in rows.items():
        shapes, expected = [np.shape(p) for p in preds], [np.shape(s["counts"]) for s in slices]
        if shapes != expected:
            raise ValueError(f"row {row}: expected predictions of shapes {expected}, found {shapes}")


def _mean(values: np.ndarray) -> float:
    """Mean of what is defined; NaN, without numpy's warning, when nothing is."""
    defined = values[~np.isnan(values)]
    return float(defined.mean()) if len(defined) else math.nan


def _mean_or_zero(r: np.ndarray) -> float:
    """Mean of correlations, those that are undefined counting as 0."""
    return float(np.mean(np.nan_to_num(r, nan=0.0)))


def _mean_of_rows(table: np.ndarray) -> np.ndarray:
    """Mean over slices of what is defined: (slices, G) -> (G,), NaN where nothing is."""
    number = (~np.isnan(table)).sum(axis=0)
    return np.where(number > 0, np.nansum(table, axis=0) / np.maximum(number, 1), np.nan)
