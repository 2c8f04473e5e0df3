"""The figures of predicted expression: per slice, mean over slices, pooled, and per gene.

Shapes: S spots (of one slice), G genes (of the panel). A method is the model or a baseline.
The figures at the top are means over slices of the slice's own figure; pooling spots of several slices inflates
correlations, so pooled figures are separate.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, TypedDict

import numpy as np
import pandas as pd

from utils.evaluation import metrics

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
# What a method cannot have: the mean profile is flat in every gene, depth is one column in a unit of its own.
WITHOUT = {"mean": {"per_gene": False}, "depth": {"errors": False, "per_spot": False}}

Figures = dict[str, float | None]
Predictions = Mapping[str, Sequence[np.ndarray]]  # by method, per slice (S, G)


class MeasuredSlice(TypedDict):
    """What was measured on one slice: A spots, of which S are evaluated. Residuals need all of them."""

    name: str
    counts: np.ndarray  # (A, G) raw counts of the panel
    total_counts: np.ndarray  # (A,) over ALL genes of the slice
    rows: np.ndarray  # (S,) the evaluated spots
    measured: np.ndarray  # (G,) bool: the slice has this gene


def truth_of(slice_: MeasuredSlice, scale: str) -> np.ndarray:
    """What was measured in the evaluated spots (S, G), in one of `metrics.SCALES`."""
    return metrics.to_scale(scale, slice_["counts"], slice_["total_counts"])[slice_["rows"]]


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
    """All figures of one method on one slice in one scale.

    Parameters
    ----------
    pred, true : (S, G)
    log_depth : (S,)
        Logarithm of the total counts.
    defined : (G,) bool
        Genes that the slice measured. Of these, the ones flat in the measurement are left out of every figure.
    errors, per_gene, per_spot : bool
        Which figures the method can have. `sd_ratio` needs `errors` and `per_gene`, correlation given depth `per_gene`
        and `per_spot` (predictions that differ between genes).

    Returns
    -------
    dict with the keys `FIGURES`; None where the method cannot have the figure or it is undefined.
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
    return json_values(found)


def _gene_figures(pred: np.ndarray, true: np.ndarray) -> dict[str, float]:
    r = metrics.scored_pearson_per_gene(pred, true)
    return {
        "pcc_gene_mean": float(np.mean(r)),
        "pcc_gene_median": float(np.median(r)),
        "pcc_gene_top50": float(np.mean(np.sort(r)[-50:])),
        "spearman_gene_mean": _mean_or_zero(metrics.spearman_per_gene(pred, true)),
    }


def evaluate(predictions: Predictions, slices: Sequence[MeasuredSlice], fitted_scale: str) -> dict[str, Any]:
    """The body of the expression evaluation's metrics.json.

    Parameters
    ----------
    predictions : method -> per slice (S, G)
        All in the scale they were fitted in: correlations need no conversion. What the methods "mean" and "depth"
        cannot have is null.
    slices : per slice
        What was measured, in the order of the predictions.
    fitted_scale : str
        One of `metrics.SCALES`: errors are given there and nowhere else.

    Returns
    -------
    {"n_spots", "n_genes", scale: {method: figures}, "pooled": {scale: {method: figures}},
    "per_slice": {slice: {scale: {method: figures}}}}, ready for json. `undefined_genes` is a sum over slices. Pooled
    figures use the genes measured in all slices.
    """
    _check(predictions, slices, fitted_scale)
    result: dict[str, Any] = {
        "n_spots": sum(len(s["rows"]) for s in slices),
        "n_genes": int(np.any([s["measured"] for s in slices], axis=0).sum()),
        "pooled": {},
        "per_slice": {s["name"]: {} for s in slices},
    }
    log_depth = [np.log(np.maximum(s["total_counts"][s["rows"]], 1)) for s in slices]
    measured_in_all = np.all([s["measured"] for s in slices], axis=0)
    for scale in metrics.SCALES:
        errors = scale == fitted_scale
        truth = [truth_of(s, scale) for s in slices]
        for i, slice_ in enumerate(slices):
            of_slice = {method: preds[i] for method, preds in predictions.items()}
            result["per_slice"][slice_["name"]][scale] = _figures_by_method(
                of_slice, truth[i], log_depth[i], slice_["measured"], errors
            )
        result[scale] = {
            method: mean_figures([result["per_slice"][s["name"]][scale][method] for s in slices])
            for method in predictions
        }
        together = {method: np.concatenate(list(preds)) for method, preds in predictions.items()}
        result["pooled"][scale] = _figures_by_method(
            together, np.concatenate(truth), np.concatenate(log_depth), measured_in_all, errors
        )
    return json_values(result)


def mean_figures(per_slice: Sequence[Figures]) -> Figures:
    """Mean over slices of each figure, over the slices that have it; `undefined_genes` is added up."""
    means: Figures = {}
    for key in FIGURES:
        values = [value for of_slice in per_slice if (value := of_slice[key]) is not None]
        means[key] = float(np.mean(values)) if values else None
    means["undefined_genes"] = sum(of_slice["undefined_genes"] or 0 for of_slice in per_slice)
    return means


def per_gene_table(predictions: Predictions, slices: Sequence[MeasuredSlice], genes: Sequence[str]) -> pd.DataFrame:
    """One line per gene: how much there is of it and how well each method predicts it.

    Columns: gene; n_slices that measured it; counts_per_10k, the mean over slices of the slice's mean;
    pcc_<scale>_<method>, the mean over the slices where the gene varies (signs kept; a flat prediction is 0). The mean
    profile has no correlation per gene and no column.
    """
    measured = np.array([s["measured"] for s in slices], dtype=bool)
    depth = [truth_of(s, "counts").mean(axis=0) for s in slices]
    columns: dict[str, Any] = {
        "gene": list(genes),
        "n_slices": measured.sum(axis=0),
        "counts_per_10k": _mean_of_rows(np.where(measured, depth, np.nan)),
    }
    for scale in metrics.SCALES:
        truth = [truth_of(s, scale) for s in slices]
        for method, preds in predictions.items():
            if method != "mean":
                r = [metrics.scored_pearson_per_gene(p, t) for p, t in zip(preds, truth, strict=True)]
                columns[f"pcc_{scale}_{method}"] = _mean_of_rows(np.where(measured, r, np.nan))
    return pd.DataFrame(columns)


def json_values(obj: Any) -> Any:
    """A copy of Python numbers, lists and dicts only, with NaN and infinity, which JSON lacks, as None."""
    if isinstance(obj, Mapping):
        return {str(key): json_values(value) for key, value in obj.items()}
    if isinstance(obj, np.ndarray | np.generic):
        return json_values(obj.tolist())
    if isinstance(obj, list | tuple):
        return [json_values(value) for value in obj]
    if isinstance(obj, float):
        return float(obj) if math.isfinite(obj) else None
    return obj


def _figures_by_method(
    preds: Mapping[str, np.ndarray], true: np.ndarray, log_depth: np.ndarray, defined: np.ndarray, errors: bool
) -> dict[str, Figures]:
    by_method = {}
    for method, pred in preds.items():
        families = {"errors": errors, "per_gene": True, "per_spot": True} | WITHOUT.get(method, {})
        families["errors"] = errors and families["errors"]
        by_method[method] = figures(pred, true, log_depth, defined=defined, **families)
    return by_method


def _check(predictions: Predictions, slices: Sequence[MeasuredSlice], fitted_scale: str) -> None:
    if fitted_scale not in metrics.SCALES:
        raise ValueError(f"fitted_scale: expected one of {', '.join(metrics.SCALES)}, found {fitted_scale!r}")
    names = [s["name"] for s in slices]
    if not names or len(set(names)) < len(names):
        raise ValueError(f"slices: expected at least one, with names of their own, found {names}")
    for method, preds in predictions.items():
        shapes, expected = [np.shape(p) for p in preds], [(len(s["rows"]), np.shape(s["counts"])[1]) for s in slices]
        if shapes != expected:
            raise ValueError(f"{method}: expected predictions of shapes {expected}, found {shapes}")


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
