"""The table of both evaluations, as lines of text, read from the metrics.json of one or several runs."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from utils.evaluation.metrics import SCALES

RETRIEVAL_METHODS = ("depth", "contrastive", "matching", "reranked")
GALLERIES = {"neighbours": "among its neighbours", "random10": "among ten of the slice"}
SCRIPTS = {"similarity": "decoder_similarity.py", "retrieval": "get_accuracy_image.py"}
Metrics = dict[str, Any]


def results_file(results: Path, evaluation: str, name: str, flag: str = "") -> Path:
    """A file of "retrieval" or "similarity". Raises ValueError where it is missing."""
    path = results / evaluation / name
    if not path.exists():
        raise ValueError(
            f"{flag}{path}: expected results, found none; run {SCRIPTS[evaluation]} with --out {path.parent}"
        )
    return path


def read_metrics(results: Path, evaluation: str) -> Metrics:
    path = results_file(results, evaluation, "metrics.json")
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path}: expected JSON, found {error}; run {SCRIPTS[evaluation]} again") from error


def over_runs(values: Sequence[float | None], interval: Sequence[float] | None = None) -> str:
    """One run: the figure, with its interval where it has one; several: mean and deviation over runs."""
    known = [value for value in values if value is not None]
    if not known:
        return "-"
    if len(known) > 1:
        return f"{np.mean(known):.3f} ± {np.std(known, ddof=1):.3f}"
    return f"{known[0]:.3f}" + (f" [{interval[0]:.3f}, {interval[1]:.3f}]" if interval and None not in interval else "")


def line(cells: Sequence[str]) -> str:
    return f"{cells[0]:<32}" + "".join(f"{cell:>22}" for cell in cells[1:])


def retrieval_lines(runs: list[Metrics]) -> list[str]:
    """Accuracies with their 95 % intervals, beside chance."""
    lines = [line(["which profile is the image's?", "chance", *RETRIEVAL_METHODS])]
    for gallery, title in GALLERIES.items():
        scores = [run[gallery] for run in runs]
        cells = [over_runs([s[method] for s in scores], scores[0]["interval"][method]) for method in RETRIEVAL_METHODS]
        lines.append(line([title, f"{scores[0]['chance']:.3f}", *cells]))
    lines.append(line(["in the whole slice", *(f"R@{k}" for k in (1, 5, 10))]))
    for way in ("chance", "image_to_gene", "gene_to_image"):
        of_way = runs[:1] if way == "chance" else runs
        cells = [over_runs([run["slice"][way][f"R@{k}"] for run in of_way]) for k in (1, 5, 10)]
        lines.append(line([f"  {way.replace('_', ' ')}", *cells]))
    return lines


def fitted_scale(metrics: Metrics) -> str:
    """The scale that the methods were fitted in: the one that has errors; residuals where no gene varies."""
    return next((scale for scale in SCALES if metrics[scale]["model"]["mse"] is not None), "residuals")


def expression_lines(runs: list[Metrics]) -> list[str]:
    """Correlation per gene and error of each method, means over slices."""
    scale = fitted_scale(runs[0])
    columns = {
        "PCC, residuals": ("residuals", "pcc_gene_mean"),
        "best 50": ("residuals", "pcc_gene_top50"),
        "PCC, lognorm": ("lognorm", "pcc_gene_mean"),
        "given depth": ("lognorm", "pcc_gene_given_depth"),
        f"MSE, {scale}": (scale, "mse"),
    }
    lines = [line(["expression of each gene", *columns])]
    for method in runs[0]["residuals"]:
        lines.append(line([method, *(over_runs([run[s][method][f] for run in runs]) for s, f in columns.values())]))
    return lines


def leak_note(metrics: Metrics) -> str:
    """What a title says of evaluated slices that the model was trained on; empty without any."""
    return f" (leak: {', '.join(metrics['leak'])} seen in training)" if metrics.get("leak") else ""


def leak_lines(runs: list[Metrics]) -> list[str]:
    """A warning where evaluated slices were seen in training."""
    names = dict.fromkeys(name for run in runs for name in run.get("leak", []))
    if not names:
        return []
    return [f"warning: {', '.join(names)} seen in training (--allow_leak): the figures do not hold for new patients"]


def ceiling_line(results: Path, truth: Path, metrics: Metrics) -> str:
    """Mean over the evaluated slices of the simulation's ceiling on the panel's genes, and the fraction reached."""
    import anndata
    import pandas as pd

    genes = pd.read_csv(results / "similarity" / "genes.csv")["gene"]
    ceilings = []
    for name in metrics["per_slice"]:
        path = truth / name / "truth.h5ad"
        if not path.exists():
            raise ValueError(f"--truth: expected {path}, found none; it stands beside simulated slices only")
        ceilings.append(anndata.read_h5ad(path).var["ceiling_residuals"].reindex(genes).mean())
    ceiling = float(np.mean(ceilings))
    reached = metrics["residuals"]["model"]["pcc_gene_mean"] / ceiling
    return f"ceiling of this simulation: PCC {ceiling:.3f} against residuals; the model reaches {reached:.0%} of it"
