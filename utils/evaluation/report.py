"""The table of both evaluations, read from their metrics.json.

python -m utils.evaluation.report results
python -m utils.evaluation.report demo/results --truth demo/data     # simulated slices: beside the known ceiling
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np

RETRIEVAL_ROWS = ("depth", "contrastive", "matching", "reranked")


def read_metrics(results: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """metrics.json of retrieval and of similarity. Raises ValueError where one is missing."""
    found = []
    for name, script in (("retrieval", "get_accuracy_image.py"), ("similarity", "decoder_similarity.py")):
        path = results / name / "metrics.json"
        if not path.exists():
            raise ValueError(f"{path}: expected results, found none; run {script} with --out {path.parent}")
        found.append(json.loads(path.read_text()))
    return found[0], found[1]


def retrieval_lines(metrics: dict[str, Any]) -> list[str]:
    """Accuracies with their 95 % intervals, beside chance."""
    head = ("which profile is the picture's?", "chance", *RETRIEVAL_ROWS)
    lines = ["".join(f"{cell:<32}" if i == 0 else f"{cell:>22}" for i, cell in enumerate(head))]
    for gallery, words in (("neighbours", "among its neighbours"), ("random10", "among ten of the slice")):
        found = metrics[gallery]
        cells = [f"{found['chance']:.3f}"]
        for row in RETRIEVAL_ROWS:
            low, high = found["interval"][row]
            cells.append(f"{found[row]:.3f} [{low:.3f}, {high:.3f}]")
        lines.append(f"{words:<32}" + "".join(f"{cell:>22}" for cell in cells))
    return lines


def expression_lines(metrics: dict[str, Any]) -> list[str]:
    """Correlation per gene and error of each row, means over slices."""
    scale = next(s for s in ("lognorm", "residuals", "counts") if metrics[s]["model"]["mse"] is not None)
    head = ("expression of each gene", "PCC, residuals", "PCC, lognorm", "PCC given depth", f"MSE, {scale}")
    lines = ["".join(f"{cell:<32}" if i == 0 else f"{cell:>22}" for i, cell in enumerate(head))]
    for row in metrics["residuals"]:
        values = [metrics["residuals"][row]["pcc_gene_mean"], metrics["lognorm"][row]["pcc_gene_mean"]]
        values += [metrics["residuals"][row]["pcc_gene_given_depth"], metrics[scale][row]["mse"]]
        lines.append(f"{row:<32}" + "".join("-".rjust(22) if v is None else f"{v:>22.3f}" for v in values))
    return lines


def ceiling_line(results: Path, truth: Path, metrics: dict[str, Any]) -> str:
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


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, help="folder with retrieval/ and similarity/")
    parser.add_argument("--truth", type=Path, help="folder of simulated slices")
    args = parser.parse_args(argv)
    try:
        retrieval, similarity = read_metrics(args.results)
        lines = [*retrieval_lines(retrieval), "", *expression_lines(similarity)]
        if args.truth:
            lines += ["", ceiling_line(args.results, args.truth, similarity)]
    except ValueError as error:
        parser.exit(2, f"report: {error}\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
