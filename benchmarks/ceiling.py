"""How well could any predictor do? The highest correlation per gene that counting noise leaves on each section.

    python benchmarks/ceiling.py --data data/Breast_cancer

A perfect prediction of a gene's expected count correlates with the measured count at the root of the count's
reliability. That is measured by splitting the counts into two halves, count by count: residuals of the halves correlate
at r, those of the whole with another such whole at 2 r / (1 + r) (Spearman 1910, Brown 1910). The root of the mean over
genes is not below their mean ceiling, and does not take noise for signal. Both halves share all variation but that of
counting, so this is an upper bound of what an image can predict.

Prints a table, for the genes of the highest total count in all slices of the folder; --keep puts it into
benchmarks/RESULTS.md.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.record import machine_name, put_into, table_lines
from utils import arguments
from utils import settings as shared_settings
from utils.evaluation import metrics
from utils.genes import panels as gene_panels
from utils.slices import splits, visium

DRAWS = 20  # splits that r is a mean of


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The flags of ceiling.py."""

    data: Path
    n_top_genes: int
    seed: int
    keep: bool
    debug: bool


def parse_args(argv: list[str] | None = None) -> Settings:
    parser = arguments.Parser(__doc__)
    parser.add_argument("--data", type=Path, required=True, help="folder of slices")
    parser.add_argument("--n_top_genes", type=arguments.count, default=300, help="genes, highest count first")
    parser.add_argument("--seed", type=arguments.count_or_zero, default=0)
    parser.add_argument("--keep", action="store_true", help="put the table into benchmarks/RESULTS.md")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return Settings(**vars(parser.parse_args(argv)))


def halves_correlation(counts: np.ndarray, total_counts: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """PCC per gene between Pearson residuals of two random halves of one slice's counts: (S, G), (S,) -> (G,)."""
    first = rng.binomial(counts, 0.5)
    total = first.sum(1) + rng.binomial(total_counts - counts.sum(1), 0.5)
    second = metrics.pearson_residuals(counts - first, total_counts - total)
    return metrics.scored_pearson_per_gene(metrics.pearson_residuals(first, total), second)


def ceiling(counts: np.ndarray, total_counts: np.ndarray, seed: int) -> float:
    """Highest PCC against the slice's residuals: counts (S, G) of some genes, (S,) of all."""
    rng = np.random.default_rng(seed)
    r = np.mean([halves_correlation(counts, total_counts, rng) for _ in range(DRAWS)], axis=0)
    return float(np.sqrt(max(np.nanmean(2 * r / (1 + r)), 0.0)))


def main(settings: Settings) -> None:
    rows, warnings = splits.read_table(settings.data, split=False)
    shared_settings.warn(warnings)
    slices = [visium.read_slice(splits.slice_folder(settings.data, row), row.slice) for row in rows]
    profiles = [gene_panels.profile(slice_.counts, slice_.genes) for slice_ in slices]
    panel = gene_panels.highest_expressed(profiles, settings.n_top_genes)
    lines = [
        f"`python benchmarks/ceiling.py --data {settings.data.name}`, {date.today().isoformat()}, "
        f"{machine_name('cpu')}, seed {settings.seed}: highest mean correlation per gene against residuals that "
        f"counting noise leaves, {len(panel)} genes, {DRAWS} splits.",
        "",
    ]
    cells = []
    for slice_ in slices:
        all_counts: Any = slice_.counts  # sparse
        total = np.asarray(all_counts.sum(1)).ravel()
        counts = (all_counts @ gene_panels.gather(slice_.genes, panel)).toarray()
        r = ceiling(counts, total, settings.seed)
        cells.append((slice_.name, f"{len(total)}", f"{np.median(total):,.0f}", f"{r:.3f}"))
    lines += table_lines(("slice", "spots", "counts a spot, median", "ceiling"), cells)
    text = "\n".join(lines)
    print(text)
    if settings.keep:
        put_into(Path(__file__).parent / "RESULTS.md", "ceiling", text)


if __name__ == "__main__":
    shared_settings.run(main, parse_args())
