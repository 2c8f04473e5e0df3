"""The figures, diagnostics and draws of a run of accuracy.py whose scripts have been run."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import accuracy_bootstrap, accuracy_diagnostics
from benchmarks.accuracy_rows import SCALE, Row, Tissue, all_rows, check_rows, read_row
from benchmarks.accuracy_run import Run
from benchmarks.accuracy_table import CHEAP
from utils import distributed, settings
from utils.evaluation import expression

DRAWN = (*CHEAP, "stage_two_pretrained", "magic")  # rows whose differences are given with an interval


def figures(rows: Mapping[str, Row], tissue: Tissue) -> dict[str, dict[str, float | None]]:
    """Row -> mean PCC per gene against residuals and lognorm, given depth, and of the best 50; means over slices."""
    found = expression.evaluate({name: row.values for name, row in rows.items()}, tissue.measured, SCALE)
    return {
        name: {
            "residuals": found["residuals"][name]["pcc_gene_mean"],
            "lognorm": found["lognorm"][name]["pcc_gene_mean"],
            "given_depth": found["lognorm"][name]["pcc_gene_given_depth"],
            "top50": found["residuals"][name]["pcc_gene_top50"],
        }
        for name in rows
    }


def retrieval_figures(folder: Path) -> dict[str, Any]:
    """What get_accuracy_image.py found: the right one among its neighbours, R@10 of the slice as mean of both ways."""
    found = json.loads((folder / "metrics.json").read_text())
    neighbours, whole = found["neighbours"], found["slice"]
    return {
        "neighbours": {name: value for name, value in neighbours.items() if name != "interval"},
        "interval": neighbours["interval"],
        "R@10": (whole["image_to_gene"]["R@10"] + whole["gene_to_image"]["R@10"]) / 2,
        "R@10_chance": whole["chance"]["R@10"],
    }


def evaluate(run: Run) -> dict[str, Any]:
    """`rows`, `retrieval`, `diagnostics` and `draws` of a run whose steps are done; see accuracy_run.py."""
    args = run.parsed("train_mymodel")
    settings.check_training(args)
    accelerator = distributed.start(args.device, args.precision)
    tissue = Tissue(args)
    rows, told = all_rows(run, tissue, accelerator, args) if run.ablation == "default" else ({}, {})
    rows["magic"] = read_row(run.similarity())
    check_rows({"of the fold": tissue.row([]), **rows})
    truth = [tissue.targets[one.name] for one in tissue.test]
    drawn = accuracy_bootstrap.resample(tissue.blocks, len(tissue.genes))
    scores = figures(rows, tissue)
    similarity = json.loads((run.similarity() / "metrics.json").read_text())
    told |= {"losses": accuracy_diagnostics.losses(run.home / "logs")}
    told |= {"sd_ratio": similarity[SCALE]["model"]["sd_ratio"]}
    draws = {
        name: np.rint(accuracy_bootstrap.pcc_draws(row.values, truth, drawn) * 1e5).astype(int).tolist()
        for name, row in rows.items()
        if name in DRAWN and scores[name]["residuals"] is not None
    }
    return {
        "rows": scores,
        "retrieval": retrieval_figures(run.home / "retrieval"),
        "diagnostics": told,
        "draws": draws,
    }
