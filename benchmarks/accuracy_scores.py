"""Figures and resamples of a run of accuracy.py whose scripts have been run.

Intervals come from a paired bootstrap of the mean PCC per gene, over genes and over blocks of neighbouring spots within
their slices. A resampled correlation is one of resampled moments: with the sums of each block at hand (spots, p, t, pp,
tt, pt of every gene) a draw is a product of how often each block was drawn with those sums.
Letters: S spots, G genes and K blocks of a slice, D draws.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.accuracy_methods import SCALE, Table, Tissue, check_tables, predict_all, read_table
from benchmarks.accuracy_run import Run
from benchmarks.accuracy_table import BASELINES
from utils import distributed
from utils.evaluation import bootstrap, expression, metrics

DRAWN = (*BASELINES, "stage_two_pretrained", "magic")  # methods whose differences are given with an interval
N_DRAWS = 2000
FLAT = 1e-12  # variance, of a gene standardised over its slice, under which it does not vary in a draw


# ---- paired bootstrap


@dataclass(frozen=True)
class Resamples:
    """What is drawn, once for all methods and seeds that are compared."""

    members: list[np.ndarray]  # per slice (S,) block of each spot, from 0 without gaps
    blocks: list[np.ndarray]  # per slice (D, K) times that a block was drawn
    genes: np.ndarray  # (D, G) times that a gene was drawn


def resample(block_ids: Sequence[np.ndarray], n_genes: int, n_draws: int = N_DRAWS, seed: int = 0) -> Resamples:
    """Blocks with replacement within each slice, genes with replacement over all. A slice of one block is resampled by
    spot: too narrow, yet better than no width at all."""
    rng = np.random.default_rng(seed)
    members = [bootstrap.units(ids) for ids in block_ids]
    blocks = [bootstrap.draw(int(ids.max()) + 1, n_draws, rng) for ids in members]
    return Resamples(members, blocks, bootstrap.draw(n_genes, n_draws, rng))


def _standardised(values: np.ndarray) -> np.ndarray:
    """Genes with mean 0 and deviation 1, flat ones 0: sums of squares of (S, G) then lose no digits."""
    values = np.asarray(values, dtype=np.float64)
    centred = np.where(metrics.is_flat(values), 0.0, values - values.mean(axis=0))
    deviation = centred.std(axis=0)
    return centred / np.where(deviation > 0, deviation, 1.0)


def block_correlations(pred: np.ndarray, true: np.ndarray, member: np.ndarray, times: np.ndarray) -> np.ndarray:
    """PCC of each gene in each draw: (S, G), (S, G), (S,), (D, K) -> (D, G), scored as by
    `metrics.scored_pearson_per_gene`: NaN where the measurement is flat or unknown, 0 where only the prediction is."""
    unknown = ~np.isfinite(true).all(axis=0)
    p, t = _standardised(pred), _standardised(np.where(unknown, 0.0, true))
    one_hot = (member[:, None] == np.arange(times.shape[1])).astype(np.float64)
    spots = (times @ one_hot.sum(axis=0))[:, None]
    mean_p, mean_t, pp, tt, pt = (times @ (one_hot.T @ x) / spots for x in (p, t, p * p, t * t, p * t))
    var_p, var_t = pp - mean_p**2, tt - mean_t**2
    flat = (var_p <= FLAT) | (var_t <= FLAT)
    r = np.where(flat, 0.0, (pt - mean_p * mean_t) / np.sqrt(np.where(flat, 1.0, var_p * var_t)))
    return np.where(unknown | (var_t <= FLAT), np.nan, r)


def pcc_draws(pred: Sequence[np.ndarray], true: Sequence[np.ndarray], drawn: Resamples) -> np.ndarray:
    """Mean PCC per gene, over the drawn genes, then over slices, in each draw: per slice (S, G) twice -> (D,)."""
    per_slice = []
    for p, t, member, times in zip(pred, true, drawn.members, drawn.blocks, strict=True):
        r = block_correlations(p, t, member, times)
        weight = np.where(np.isnan(r), 0, drawn.genes)
        per_slice.append((np.nan_to_num(r) * weight).sum(axis=1) / np.maximum(weight.sum(axis=1), 1))
    return np.mean(per_slice, axis=0)


# ---- a run


def stage_one_losses(logs: Path) -> dict[str, Any]:
    """Last and best epoch of the log of stage one below `logs`: all its losses, with their chance levels."""
    (path,) = (logs / "stage_one").glob("*/log.jsonl")
    epochs = [json.loads(line) for line in path.read_text().splitlines()]
    return {"last": epochs[-1], "best": max(epochs, key=lambda epoch: epoch["val_R@5"])}


def figures(tables: Mapping[str, Table], measured: list[expression.MeasuredSlice]) -> dict[str, dict[str, float]]:
    """Method -> mean PCC per gene against residuals and lognorm, given depth, and of the best 50; means over slices."""
    scores = expression.evaluate({name: table.values for name, table in tables.items()}, measured, SCALE)
    return {
        name: {
            "residuals": scores["residuals"][name]["pcc_gene_mean"],
            "lognorm": scores["lognorm"][name]["pcc_gene_mean"],
            "given_depth": scores["lognorm"][name]["pcc_gene_given_depth"],
            "top50": scores["residuals"][name]["pcc_gene_top50"],
        }
        for name in tables
    }


def retrieval_figures(folder: Path) -> dict[str, Any]:
    """Retrieval among neighbours as get_accuracy_image.py scored it; R@10 in the slice, mean of both directions."""
    scores = json.loads((folder / "metrics.json").read_text())
    neighbours, whole = scores["neighbours"], scores["slice"]
    return {
        "neighbours": {name: value for name, value in neighbours.items() if name != "interval"},
        "interval": neighbours["interval"],
        "R@10": (whole["image_to_gene"]["R@10"] + whole["gene_to_image"]["R@10"]) / 2,
        "R@10_chance": whole["chance"]["R@10"],
    }


def evaluate(run: Run) -> dict[str, Any]:
    """What the JSON of a run holds of its results, of a run whose steps are done; see accuracy_run.py."""
    settings = run.stage_one_settings()
    accelerator = distributed.start(settings.device, settings.precision)
    tissue = Tissue(settings)
    tables = predict_all(run, tissue, accelerator, settings) if run.ablation == "default" else {}
    tables["magic"] = read_table(run.similarity())
    check_tables({"the fold": tissue.table([]), **tables})
    measured = [
        expression.MeasuredSlice(
            name=slice_.name,
            counts=slice_.panels["target"].read_counts(),
            total_counts=slice_.total_counts,
            rows=slice_.rows_of("test"),
            measured=slice_.panels["target"].measured,
        )
        for slice_ in tissue.test
    ]
    scores = figures(tables, measured)
    blocks = [bootstrap.blocks(slice_.xy_fullres_px, slice_.pitch_fullres_px) for slice_ in tissue.test]
    drawn, truth = resample(blocks, len(tissue.genes)), tissue.of_part("test", tissue.targets)
    similarity = json.loads((run.similarity() / "metrics.json").read_text())
    return {
        "methods": scores,
        "retrieval": retrieval_figures(run.folder / "retrieval"),
        "losses": stage_one_losses(run.folder / "logs"),
        "sd_ratio": similarity[SCALE]["model"]["sd_ratio"],
        "draws": {
            name: np.rint(pcc_draws(table.values, truth, drawn) * 1e5).astype(int).tolist()
            for name, table in tables.items()
            if name in DRAWN and scores[name]["residuals"] is not None
        },
    }
