"""Finished runs of accuracy.py put together: means and deviations over seeds, intervals, JSON and Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from benchmarks.accuracy_bootstrap import interval

CHEAP = ("mean", "depth", "ridge", "ridge_neighbours", "ridge_turns_lowrank", "knn")
STRONGER = ("ridge_scales", "ridge_tuned", "st_net", "retrieval", "stage_two_pretrained")
ROWS = (*CHEAP, *STRONGER, "magic")
FIGURES = {
    "residuals": "PCC, residuals",
    "top50": "best 50 genes",
    "lognorm": "PCC, lognorm",
    "given_depth": "lognorm, given depth",
}
GALLERY = ("depth", "contrastive", "matching", "reranked")
PUBLISHED = {  # leave one patient out: mean PCC, PCC of highly predictive genes; as mclSTExp, TRIPLEX and DKAN report
    "ST-Net": (0.150, 0.287),
    "BLEEP": (0.151, 0.277),
    "mclSTExp": (0.163, 0.289),
    "HisToGene": (0.150, 0.295),
    "EGN": (0.204, 0.364),
    "TRIPLEX": (0.304, 0.491),
    "DKAN": (0.330, 0.531),
}
INTERVALS = (
    "Intervals: 95 %, paired bootstrap over genes and over blocks of 5 x 5 pitches within slices, 2,000 draws. They "
    "speak of these slices, not of patients: another patient may lie outside of them."
)
Record = Mapping[str, Any]


def spread(values: Sequence[float | None]) -> dict[str, Any]:
    """Mean and deviation over seeds; null where a row has no such figure, no deviation of a single seed."""
    known = [value for value in values if value is not None]
    sd = float(np.std(known, ddof=1)) if len(known) > 1 else None
    return {"mean": float(np.mean(known)) if known else None, "sd": sd, "seeds": list(values)}


def retrieval_of(records: Sequence[Record]) -> dict[str, Any]:
    found = [record["retrieval"] for record in records]
    accuracy = {row: spread([one["neighbours"][row] for one in found]) for row in GALLERY}
    return {
        "neighbours": {"chance": found[0]["neighbours"]["chance"], **accuracy},
        "interval": {row: np.mean([one["interval"][row] for one in found], axis=0).tolist() for row in GALLERY},
        "R@10": spread([one["R@10"] for one in found]),
        "R@10_chance": found[0]["R@10_chance"],
    }


def fold_table(records: Sequence[Record]) -> dict[str, Any]:
    """One fold: the runs of its seeds -> rows, best baseline, ratio to it, and the interval of the difference."""
    rows: dict[str, Any] = {
        row: {name: spread([record["rows"][row][name] for record in records]) for name in FIGURES} for row in ROWS
    }
    for row in ROWS:
        rows[row]["retrieval"] = retrieval_of(records) if row == "magic" else None
    scores = {row: rows[row]["residuals"]["mean"] for row in (*CHEAP, "magic")}
    best = max((row for row in CHEAP if scores[row] is not None), key=lambda row: scores[row])
    return {
        "rows": rows,
        "best_baseline": best,
        "ratio": scores["magic"] / scores[best] if scores[best] > 0 else None,
        "difference_interval": difference(records, "magic", records, best),
        "diagnostics": diagnostics_of(records),
    }


def diagnostics_of(records: Sequence[Record]) -> dict[str, Any]:
    """Means over seeds of what tells whether stage one learnt, collapsed, or learnt the slide."""
    found = [record["diagnostics"] for record in records]

    def mean(*path: str) -> float | None:
        values: list[Any] = found
        for key in path:
            values = [one and one[key] for one in values]
        return None if None in values else float(np.mean(values))

    return {
        "contrast_loss": mean("losses", "best", "contrast_loss"),
        "contrast_chance": mean("losses", "best", "contrast_chance"),
        "matching_loss": mean("losses", "best", "matching_loss"),
        "matching_chance": mean("losses", "best", "matching_chance"),
        "slice_before": mean("slice_classifier", "before", "accuracy"),
        "slice_after": mean("slice_classifier", "after", "accuracy"),
        "slice_chance": mean("slice_classifier", "after", "chance"),
        "rank_image": mean("effective_rank", "image"),
        "rank_gene": mean("effective_rank", "gene"),
        "dead_units": mean("dead_units", "image"),
        "calibration_error": mean("matching_calibration_error"),
        "sd_ratio": mean("sd_ratio"),
    }


def diagnostics_markdown(told: Mapping[str, float | None]) -> str:
    shown = {name: "-" if value is None else f"{value:.3g}" for name, value in told.items()}
    return (
        "Stage one: contrast {contrast_loss} (chance {contrast_chance}), matching {matching_loss} (chance "
        "{matching_chance}) at the best epoch; a linear classifier tells the train slices apart at {slice_before} "
        "before and {slice_after} after (chance {slice_chance}); effective rank of the test embeddings {rank_image} "
        "(images), {rank_gene} (profiles); dead units {dead_units}; calibration error of matching "
        "{calibration_error}. Predicted over measured deviation of a gene: {sd_ratio}."
    ).format(**shown)


def difference(ones: Sequence[Record], row: str, others: Sequence[Record], other_row: str) -> list[float]:
    """Interval of one row minus another, each averaged over its runs; the draws are stored in units of 1e-5."""
    draws = ([record["draws"][name] for record in some] for some, name in ((ones, row), (others, other_row)))
    return (np.array(interval(*draws)) / 1e5).tolist()


def ablation_table(records: Mapping[str, Record]) -> dict[str, Any]:
    """Ablation -> figures of its run and its difference to the default; `no_stage_one` is a row of the default run."""
    default = records["default"]
    runs = {name: (record, "magic") for name, record in records.items()}
    runs["no_stage_one"] = default, "stage_two_pretrained"
    return {
        name: {
            "residuals": record["rows"][row]["residuals"],
            "lognorm": record["rows"][row]["lognorm"],
            "retrieval": None if name == "no_stage_one" else record["retrieval"],
            "difference": record["rows"][row]["residuals"] - default["rows"]["magic"]["residuals"],
            "difference_interval": difference([record], row, [default], "magic"),
        }
        for name, (record, row) in runs.items()
    }


def cell(found: Mapping[str, Any]) -> str:
    if found["mean"] is None:
        return "-"
    return f"{found['mean']:.3f}" + ("" if found["sd"] is None else f" ± {found['sd']:.3f}")


def between(ends: Sequence[float], digits: str = ".3f") -> str:
    return f"[{ends[0]:{digits}}, {ends[1]:{digits}}]"


def lines_of(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(cells)} |" for cells in (heads, ["---"] * len(heads), *rows)]


def fold_markdown(name: str, fold: Mapping[str, Any], n_seeds: int) -> list[str]:
    rows, magic = fold["rows"], fold["rows"]["magic"]["retrieval"]
    done = len(rows["magic"]["residuals"]["seeds"])
    table = [[f"**{row}**" if row == "magic" else row, *(cell(rows[row][f]) for f in FIGURES)] for row in ROWS]
    ratio = "" if fold["ratio"] is None else f"{fold['ratio']:.2f} x {fold['best_baseline']}, the best cheap row; "
    neighbours, chance = magic["neighbours"], magic["neighbours"]["chance"]
    gallery = [f"{row} {cell(neighbours[row])} {between(magic['interval'][row])}" for row in GALLERY]
    return [
        f"### {name}" + ("" if done == n_seeds else f" ({done} of {n_seeds} seeds)"),
        "",
        *lines_of(["row", *FIGURES.values()], table),
        "",
        f"magic against residuals: {ratio}magic - {fold['best_baseline']} "
        f"{between(fold['difference_interval'], '+.3f')}.",
        f"Retrieval among a spot's neighbours (chance {chance:.3f}): {', '.join(gallery)}; whole slice, R@10 "
        f"{cell(magic['R@10'])} (chance {magic['R@10_chance']:.3f}).",
        diagnostics_markdown(fold["diagnostics"]),
        "",
    ]


def published_markdown() -> list[str]:
    return [
        "### Published figures",
        "",
        "HER2+ breast, eight patients, one left out at a time. **Another protocol**: 250 genes in place of ours, "
        "targets of the kind of lognorm (they carry depth: see the row `depth`, and `given depth`), encoders of their "
        "own. To be set beside the column `PCC, lognorm`, never to be ranked with it.",
        "",
        *lines_of(
            ["method", "mean PCC", "PCC of highly predictive genes"],
            [[name, f"{mean:.3f}", f"{high:.3f}"] for name, (mean, high) in PUBLISHED.items()],
        ),
        "",
    ]


def markdown(result: Mapping[str, Any]) -> str:
    """The whole table of a run of accuracy.py; `result` is what accuracy.json holds."""
    lines = [
        f"`{result['command']}`, {result['date']}, {result['machine']}: mean PCC per gene over genes, then over test "
        f"slices, mean ± deviation over seeds {', '.join(map(str, result['seeds']))}. All rows are fitted on Pearson "
        "residuals; signs are kept, a flat prediction counts as 0.",
        INTERVALS,
        "",
    ]
    if result["shuffled"]:
        lines += ["**Counts shuffled against the tiles within each slice: every row must come to chance, 0.**", ""]
    for name, fold in result["folds"].items():
        lines += fold_markdown(name, fold, len(result["seeds"]))
    if result["protocol"] == "patients":
        lines += published_markdown()
    return "\n".join(lines).rstrip()


def ablation_markdown(result: Mapping[str, Any]) -> str:
    """What each part is worth: one row per ablation, beside the default."""
    table = []
    for name, found in result["rows"].items():
        got = found["retrieval"]
        shown = ["-"] * 3
        if got is not None:
            shown = [f"{x:.3f}" for x in (got["neighbours"]["reranked"], got["neighbours"]["contrastive"], got["R@10"])]
        against = (
            "" if name == "default" else f"{found['difference']:+.3f} {between(found['difference_interval'], '+.3f')}"
        )
        table.append([name, f"{found['residuals']:.3f}", f"{found['lognorm']:.3f}", *shown, against])
    heads = ["part", "PCC, residuals", "PCC, lognorm", "neighbours, reranked", "contrastive", "R@10", "to the default"]
    return "\n".join(
        [
            f"What each part is worth: `{result['command']}`, {result['date']}, {result['machine']}, fold "
            f"{result['fold']}, seed {result['seed']}.",
            f"{INTERVALS} Nor do they hold the spread over seeds.",
            "",
            *lines_of(heads, table),
        ]
    )
