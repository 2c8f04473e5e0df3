"""What both evaluations put on `report.html`: their metrics as tables, and which spots stand as examples.

Letters: S spots of a slice.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from utils.evaluation.metrics import SCALES
from utils.report.html import Table
from utils.report.tables import GALLERIES, RETRIEVAL_ROWS

SCALE_NAMES = {"lognorm": "log1p counts per 10,000", "residuals": "Pearson residuals", "counts": "counts per 10,000"}
SCALE_NOTES = {
    "lognorm": "For comparison with the literature. This scale carries sequencing depth, which the row depth reads off "
    "the image: what that row scores here is no prediction of genes.",
    "residuals": "The scale to steer by: sequencing depth is taken out.",
    "counts": "Spots with high counts weigh most here.",
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
KINDS = {"best": "its own profile among the first", "median": "a median rank", "missed": "missed"}
EXAMPLES_NOTE = (
    "Nobody picked these: of each slice's spots, sorted by the rank of their own profile among all profiles of the "
    "slice (equal ranks in an order drawn with seed {seed}), the first two, the two in the middle, and two drawn with "
    "the same seed from those whose own profile is not among the ten most similar, or else the last two. Beside each "
    "image stand the {n} most similar profiles, best first, as the tissue they came from, and its own where it is "
    "not among them. Scores are cosines."
)


def similarity_tables(metrics: Mapping[str, Any]) -> list[Table]:
    """Every row against each scale, means over slices: metrics.json of the expression evaluation."""
    several = len(metrics["per_slice"])
    found = []
    for scale in sorted(SCALES, key=lambda scale: scale != "residuals"):
        rows = [[row, *(values[figure] for figure in FIGURES)] for row, values in metrics[scale].items()]
        note = f"{SCALE_NOTES[scale]} Means over {several} slice{'s'[: several != 1]}; errors in the fitted scale only."
        found.append(Table(f"Expression, {SCALE_NAMES[scale]}", ["row", *FIGURES.values()], rows, note))
    return found


def retrieval_tables(metrics: Mapping[str, Any]) -> list[Table]:
    """Accuracies with intervals beside chance, and recall in the whole slice: metrics.json of the retrieval."""
    rows: list[list[str | float | int | None]] = []
    for gallery, words in GALLERIES.items():
        one = metrics[gallery]
        spans = {row: "{:.3f} to {:.3f}".format(*one["interval"][row]) for row in RETRIEVAL_ROWS}
        rows.append([words, one["chance"], *(f"{one[row]:.3f} ({spans[row]})" for row in RETRIEVAL_ROWS)])
    note = "Share of images that pick their own profile; in brackets 95 % intervals over blocks of neighbouring spots."
    columns = ["R@1", "R@5", "R@10", "median_rank"]
    whole = [
        [way.replace("_", " "), *(metrics["slice"][way][column] for column in columns)]
        for way in ("chance", "image_to_gene", "gene_to_image")
    ]
    return [
        Table("Retrieval: which profile is the image's?", ["gallery", "chance", *RETRIEVAL_ROWS], rows, note),
        Table("Retrieval in the whole slice", ["direction", "R@1", "R@5", "R@10", "median rank"], whole),
    ]


def choose_examples(ranks: np.ndarray, nearest: int, seed: int) -> list[tuple[str, int]]:
    """The spots that EXAMPLES_NOTE describes: ranks (S,) of the own profile -> (kind, spot), each spot once."""
    rng = np.random.default_rng(seed)
    mixed = rng.permutation(len(ranks))
    order = mixed[np.argsort(ranks[mixed], kind="stable")]
    middle = max(0, len(order) // 2 - 1)
    missed = rng.permutation(np.flatnonzero(ranks > nearest))
    wanted = {"best": order[:2], "median": order[middle : middle + 2]}
    wanted["missed"] = missed[:2] if len(missed) >= 2 else order[-2:]
    found: dict[int, str] = {}
    for kind, spots in wanted.items():
        for spot in spots.tolist():
            found.setdefault(spot, kind)
    return [(kind, spot) for spot, kind in found.items()]
