"""The table of both evaluations, as lines of text, read from the metrics.json of one or several runs."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

RETRIEVAL_ROWS = ("depth", "contrastive", "matching", "reranked")
GALLERIES = {"neighbours": "among its neighbours", "random10": "among ten of the slice"}
Metrics = dict[str, Any]


def read_metrics(results: Path, name: str) -> Metrics:
    """metrics.json of "retrieval" or "similarity". Raises ValueError where it is missing."""
    path = results / name / "metrics.json"
    if not path.exists():
        script = "get_accuracy_image.py" if name == "retrieval" else "decoder_similarity.py"
        raise ValueError(f"{path}: expected results, found none; run {script} with --out {path.parent}")
    return json.loads(path.read_text())


def over_runs(values: Sequence[float | None], interval: Sequence[float] | None = None) -> str:
    """One run: the figure, with its interval where there is one; several: mean and deviation over runs."""
    known = [value for value in values if value is not None]
    if not known:
        return "-"
    if len(known) > 1:
        return f"{np.mean(known):.3f} ± {np.std(known, ddof=1):.3f}"
    return f"{known[0]:.3f}" + (f" [{interval[0]:.3f}, {interval[1]:.3f}]" if interval else "")


def line(cells: Sequence[str]) -> str:
    return f"{cells[0]:<32}" + "".join(f"{cell:>22}" for cell in cells[1:])


def retrieval_lines(runs: list[Metrics]) -> list[str]:
    """Accuracies with their 95 % intervals, beside chance."""
    lines = [line(["which profile is the image's?", "chance", *RETRIEVAL_ROWS])]
    for gallery, words in GALLERIES.items():
        found = [run[gallery] for run in runs]
        cells = [over_runs([one[row] for one in found], found[0]["interval"][row]) for row in RETRIEVAL_ROWS]
        lines.append(line([words, f"{found[0]['chance']:.3f}", *cells]))
    lines.append(line(["in the whole slice", *(f"R@{k}" for k in (1, 5, 10))]))
    for way in ("chance", "image_to_gene", "gene_to_image"):
        seen = runs[:1] if way == "chance" else runs
        cells = [over_runs([run["slice"][way][f"R@{k}"] for run in seen]) for k in (1, 5, 10)]
        lines.append(line([f"  {way.replace('_', ' ')}", *cells]))
    return lines


def fitted_scale(metrics: Metrics) -> str:
    """The scale that the rows were fitted in: the one that has errors."""
    return next(scale for scale in ("lognorm", "residuals", "counts") if metrics[scale]["model"]["mse"] is not None)


def expression_lines(runs: list[Metrics]) -> list[str]:
    """Correlation per gene and error of each row, means over slices."""
    scale = fitted_scale(runs[0])
    columns = {
        "PCC, residuals": ("residuals", "pcc_gene_mean"),
        "best 50": ("residuals", "pcc_gene_top50"),
        "PCC, lognorm": ("lognorm", "pcc_gene_mean"),
        "given depth": ("lognorm", "pcc_gene_given_depth"),
        f"MSE, {scale}": (scale, "mse"),
    }
    lines = [line(["expression of each gene", *columns])]
    for row in runs[0]["residuals"]:
        lines.append(line([row, *(over_runs([run[s][row][f] for run in runs]) for s, f in columns.values())]))
    return lines


def ceiling_line(results: Path, truth: Path, metrics: Metrics) -> str:
    """Mean over the evaluated slices of the simulation's ceiling on the panel's genes, and the model's share of it."""
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
    share = metrics["residuals"]["model"]["pcc_gene_mean"] / ceiling
    return f"ceiling of this simulation: PCC {ceiling:.3f} against residuals; the model reaches {share:.0%} of it"


def write_html(path: Path, results: Path) -> None:
    """Maps, genes, examples and tables of both evaluations on one page. Raises ValueError where one has none."""
    from utils.report import html

    pages = {"expression": results / "similarity" / "report.html", "retrieval": results / "retrieval" / "report.html"}
    for page, script in zip(pages.values(), ("decoder_similarity.py", "get_accuracy_image.py"), strict=True):
        if not page.exists():
            raise ValueError(f"--html: expected {page}, found none; run {script} with --out {page.parent}")
    html.join_reports(path, "Magic: expression and retrieval from the image", pages)
