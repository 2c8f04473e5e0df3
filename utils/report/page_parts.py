"""What both evaluations put on `report.html`: their metrics as tables, and retrieval examples.

Shapes: S spots of a slice.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from utils.evaluation.metrics import SCALES, UNITS
from utils.report.page import Table
from utils.report.tables import GALLERIES, RETRIEVAL_METHODS, over_runs
from utils.words import count_of

SCALE_NOTES = {
    "lognorm": "For comparison with the literature. This scale contains sequencing depth, which is predictable from "
    "the image: the score of the method depth is not a prediction of genes.",
    "residuals": "The scale to compare methods by: sequencing depth is taken out.",
    "counts": "Spots with high counts dominate here.",
}
FIGURES = {
    "pcc_gene_mean": "PCC per gene",
    "pcc_gene_median": "median",
    "pcc_gene_top50": "best 50",
    "pcc_gene_given_depth": "given depth",
    "spearman_gene_mean": "Spearman",
    "pcc_spot_mean": "PCC per spot",
    "mse": "MSE",
    "mae": "MAE",
    "sd_ratio": "SD ratio",
    "undefined_genes": "undefined",
}
KINDS = {"best": "among the first", "median": "a median rank", "missed": "missed"}
EXAMPLES_NOTE = (
    "The examples are chosen by a rule: the spots of each slice are sorted by the rank of their own profile among all "
    "profiles of the slice (ties in an order drawn with seed {seed}); shown are the first two, the two in the middle, "
    "and two drawn with the same seed from those whose own profile is not among the ten most similar, or else the last "
    "two. Each image stands beside the tissue of the {n} most similar profiles, best first, and of its own profile "
    "where that is not among them. Scores are cosines."
)


def similarity_tables(metrics: Mapping[str, Any]) -> list[Table]:
    """Every method in each scale, means over slices: metrics.json of the expression evaluation."""
    several = len(metrics["per_slice"])
    tables = []
    for scale in sorted(SCALES, key=lambda scale: scale != "residuals"):
        rows = [[method, *(values[figure] for figure in FIGURES)] for method, values in metrics[scale].items()]
        note = f"{SCALE_NOTES[scale]} Means over {count_of(several, 'slice')}; errors in the fitted scale only."
        tables.append(Table(f"Expression, {UNITS[scale]}", ["method", *FIGURES.values()], rows, note))
    return tables


def retrieval_tables(metrics: Mapping[str, Any]) -> list[Table]:
    """Accuracies with intervals beside chance, and recall in the whole slice: metrics.json of the retrieval."""
    rows: list[list[str | float | int | None]] = []
    for gallery, title in GALLERIES.items():
        scores = metrics[gallery]
        cells = [over_runs([scores[method]], scores["interval"][method]) for method in RETRIEVAL_METHODS]
        rows.append([title, scores["chance"], *cells])
    note = "Fraction of images that pick their own profile; 95 % intervals over blocks of neighbouring spots."
    columns = ["R@1", "R@5", "R@10", "median_rank"]
    whole = [
        [way.replace("_", " "), *(metrics["slice"][way][column] for column in columns)]
        for way in ("chance", "image_to_gene", "gene_to_image")
    ]
    return [
        Table("Retrieval: which profile is the image's?", ["gallery", "chance", *RETRIEVAL_METHODS], rows, note),
        Table("Retrieval in the whole slice", ["direction", "R@1", "R@5", "R@10", "median rank"], whole),
    ]


def choose_examples(ranks: np.ndarray, nearest: int, seed: int) -> list[tuple[str, int]]:
    """The spots that EXAMPLES_NOTE describes: ranks (S,) of the own profile -> (kind, spot), each spot once."""
    rng = np.random.default_rng(seed)
    mixed = rng.permutation(len(ranks))
    order = mixed[np.argsort(ranks[mixed], kind="stable")]
    middle = max(0, len(order) // 2 - 1)
    missed = rng.permutation(np.flatnonzero(ranks > nearest))
    by_kind = {"best": order[:2], "median": order[middle : middle + 2]}
    by_kind["missed"] = missed[:2] if len(missed) >= 2 else order[-2:]
    chosen: dict[int, str] = {}
    for kind, spots in by_kind.items():
        for spot in spots.tolist():
            chosen.setdefault(spot, kind)
    return [(kind, spot) for spot, kind in chosen.items()]
