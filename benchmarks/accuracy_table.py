"""Finished runs of accuracy.py as Markdown: means and deviations over seeds, differences with their intervals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from benchmarks.accuracy_folds import LAST_CHANGE, RULES
from benchmarks.record import table_lines

BASELINES = ("mean", "depth", "ridge", "ridge_neighbours", "ridge_tta_lowrank", "knn")
STRONGER = ("ridge_scales", "ridge_finetuned", "st_net", "retrieval", "stage_two_pretrained")
METHODS = (*BASELINES, *STRONGER, "magic")
FIGURES = {
    "residuals": "PCC, residuals",
    "top50": "best 50 genes",
    "lognorm": "PCC, lognorm",
    "given_depth": "lognorm, given depth",
}
GALLERY = ("depth", "contrastive", "matching", "reranked")
LOSSES = ("contrast_loss", "contrast_chance", "matching_loss", "matching_chance")
INTERVALS = (
    "Intervals: 95 %, paired bootstrap over genes and over blocks of 5 x 5 pitches within slices, 2,000 draws. They "
    "hold for these slices; another patient may lie outside."
)
Record = Mapping[str, Any]  # of a run, see accuracy_run.py
Records = Sequence[Record]  # of the seeds of a fold


def scores(records: Records, method: str, figure: str = "residuals") -> list[float]:
    """A figure of each run; empty where the method has no such figure."""
    values = [record["methods"][method][figure] for record in records]
    return [] if None in values else values


def best_baseline(records: Records) -> str:
    means = {method: np.mean(values) for method in BASELINES if (values := scores(records, method))}
    return max(means, key=lambda method: means[method])


def interval(draws: Sequence[Sequence[float]], other: Sequence[Sequence[float]], level: float = 0.95) -> list[float]:
    """Percentile interval of the difference of two methods, each averaged over its seeds: draws (seeds, D) each."""
    difference = np.mean(draws, axis=0) - np.mean(other, axis=0)
    return np.quantile(difference, [(1 - level) / 2, (1 + level) / 2]).tolist()


def difference(records: Records, method: str, others: Records, other: str) -> tuple[float, list[float]]:
    """Mean over runs of one method minus another, and its interval; draws are stored in units of 1e-5."""
    ends = interval([record["draws"][method] for record in records], [record["draws"][other] for record in others])
    return float(np.mean(scores(records, method)) - np.mean(scores(others, other))), [end / 1e5 for end in ends]


def cell(values: Sequence[float]) -> str:
    """Mean and deviation over seeds; no deviation of a single seed."""
    if not values:
        return "-"
    return f"{np.mean(values):.3f}" + (f" ± {np.std(values, ddof=1):.3f}" if len(values) > 1 else "")


def between(ends: Sequence[float], digits: str = ".3f") -> str:
    return f"[{ends[0]:{digits}}, {ends[1]:{digits}}]"


def origin(records: Records, flags: str) -> str:
    """Command, dates and machines of runs, and a warning where the benchmark has changed since."""
    dates, machines = (sorted({record[name] for record in records}) for name in ("date", "machine"))
    text = f"`python benchmarks/accuracy.py --data DATA{flags}`, {' to '.join(dict.fromkeys((dates[0], dates[-1])))}, "
    text += "; ".join(machines) + "."
    if any(record["rules"] != RULES for record in records):
        text = f"**Out of date**: since these runs {LAST_CHANGE}; they are to be repeated.\n\n{text}"
    return text


def retrieval_line(records: Records) -> str:
    runs = [record["retrieval"] for record in records]
    gallery = []
    for name in GALLERY:
        ends = np.mean([run["interval"][name] for run in runs], axis=0)
        gallery.append(f"{name} {cell([run['neighbours'][name] for run in runs])} {between(ends)}")
    return (
        f"Retrieval among a spot's neighbours (chance {runs[0]['neighbours']['chance']:.3f}): {', '.join(gallery)}; "
        f"whole slice, R@10 {cell([run['R@10'] for run in runs])} (chance {runs[0]['R@10_chance']:.3f})."
    )


def fold_lines(name: str, records: Records, n_seeds: int) -> list[str]:
    rows = [
        [f"**{method}**" if method == "magic" else method, *(cell(scores(records, method, key)) for key in FIGURES)]
        for method in METHODS
    ]
    best = best_baseline(records)
    gain, ends = difference(records, "magic", records, best)
    means = {name: np.mean([record["losses"]["best"][name] for record in records]) for name in LOSSES}
    return [
        f"### {name}" + ("" if len(records) == n_seeds else f" ({len(records)} of {n_seeds} seeds)"),
        "",
        *table_lines(["method", *FIGURES.values()], rows),
        "",
        f"magic - {best}, the best baseline, against residuals: {gain:+.3f} {between(ends, '+.3f')}.",
        retrieval_line(records),
        "Best epoch of stage one: contrast {contrast_loss:.3g} (chance {contrast_chance:.3g}), matching "
        "{matching_loss:.3g} (chance {matching_chance:.3g}). Predicted over measured deviation of a gene: "
        "{sd_ratio:.3g}.".format(**means, sd_ratio=np.mean([record["sd_ratio"] for record in records])),
        "",
    ]


def markdown(folds: Mapping[str, Records], flags: str, n_seeds: int, shuffled: bool = False) -> str:
    """The table of all folds.

    Parameters
    ----------
    folds : fold -> records of its finished runs, at least one
    flags : of accuracy.py, beside --data
    n_seeds : runs of a complete fold
    shuffled : counts were shuffled against the tiles
    """
    lines = [
        origin([record for records in folds.values() for record in records], flags),
        f"Mean PCC per gene over genes, then over test slices, mean ± deviation over {n_seeds} seeds. All methods are "
        "fitted on Pearson residuals; signs are kept, a flat prediction counts as 0.",
        INTERVALS,
        "",
    ]
    if shuffled:
        lines += ["**Counts were shuffled against the tiles within each slice: expected of every method is 0.**", ""]
    return "\n".join(lines + [line for name in folds for line in fold_lines(name, folds[name], n_seeds)]).rstrip()


def ablation_markdown(records: Mapping[str, Record], flags: str) -> str:
    """What each part of the method is worth: a row per ablation, the default first. `no_stage_one` is a method of the
    default run."""
    default = records["default"]
    runs = {name: (record, "magic") for name, record in records.items()}
    rows = []
    for name, (record, method) in (runs | {"no_stage_one": (default, "stage_two_pretrained")}).items():
        cells, retrieval = [f"{record['methods'][method][key]:.3f}" for key in ("residuals", "lognorm")], ["-"] * 3
        if method == "magic":
            neighbours = record["retrieval"]["neighbours"]
            retrieval = [f"{x:.3f}" for x in (neighbours["reranked"], neighbours["contrastive"])]
            retrieval.append(f"{record['retrieval']['R@10']:.3f}")
        gain, ends = difference([record], method, [default], "magic")
        rows.append([name, *cells, *retrieval, "" if name == "default" else f"{gain:+.3f} {between(ends, '+.3f')}"])
    heads = ["part", "PCC, residuals", "PCC, lognorm", "neighbours, reranked", "contrastive", "R@10", "to the default"]
    return "\n".join(
        [
            origin(list(records.values()), flags),
            f"Fold {default['fold']}, seed {default['seed']}. {INTERVALS} The variation over seeds is not in them.",
            "",
            *table_lines(heads, rows),
        ]
    )
