"""Finished runs of accuracy.py put together: means and deviations over seeds, intervals, JSON and Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from benchmarks.accuracy_folds import LAST_CHANGE, RULES

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
INTERVALS = (
    "Intervals: 95 %, paired bootstrap over genes and over blocks of 5 x 5 pitches within slices, 2,000 draws. They "
    "hold for these slices; another patient may lie outside."
)
LOSSES = ("contrast_loss", "contrast_chance", "matching_loss", "matching_chance")
Record = Mapping[str, Any]


# ---- numbers


def over_seeds(values: Sequence[float | None]) -> dict[str, Any]:
    """Mean and deviation over seeds; null where a method has no such figure, no deviation of a single seed."""
    known = [value for value in values if value is not None]
    sd = float(np.std(known, ddof=1)) if len(known) > 1 else None
    return {"mean": float(np.mean(known)) if known else None, "sd": sd, "seeds": list(values)}


def interval(draws: Sequence[Sequence[float]], other: Sequence[Sequence[float]], level: float = 0.95) -> list[float]:
    """Percentile interval of the difference of two methods, each averaged over its seeds: draws (seeds, D) each."""
    difference = np.mean(draws, axis=0) - np.mean(other, axis=0)
    return np.quantile(difference, [(1 - level) / 2, (1 + level) / 2]).tolist()


def difference(records: Sequence[Record], method: str, others: Sequence[Record], baseline: str) -> dict[str, Any]:
    """Mean over runs of one method minus another, with its interval; draws are stored in units of 1e-5."""
    pairs = ((records, method), (others, baseline))
    means = [np.mean([record["methods"][name]["residuals"] for record in runs]) for runs, name in pairs]
    ends = interval(*([record["draws"][name] for record in runs] for runs, name in pairs))
    return {"difference": float(means[0] - means[1]), "interval": (np.array(ends) / 1e5).tolist()}


def retrieval_summary(records: Sequence[Record]) -> dict[str, Any]:
    runs = [record["retrieval"] for record in records]
    accuracy = {name: over_seeds([run["neighbours"][name] for run in runs]) for name in GALLERY}
    return {
        "neighbours": {"chance": runs[0]["neighbours"]["chance"], **accuracy},
        "interval": {name: np.mean([run["interval"][name] for run in runs], axis=0).tolist() for name in GALLERY},
        "R@10": over_seeds([run["R@10"] for run in runs]),
        "R@10_chance": runs[0]["R@10_chance"],
    }


def fold_summary(records: Sequence[Record]) -> dict[str, Any]:
    """One fold: the runs of its seeds -> figures of each method, the best baseline, the difference to it."""
    scores = {
        method: {name: over_seeds([record["methods"][method][name] for record in records]) for name in FIGURES}
        for method in METHODS
    }
    means = {method: scores[method]["residuals"]["mean"] for method in BASELINES}
    best = max((method for method in BASELINES if means[method] is not None), key=lambda method: means[method])
    return {
        "methods": scores,
        "best_baseline": best,
        **difference(records, "magic", records, best),
        "retrieval": retrieval_summary(records),
        "losses": {name: np.mean([record["losses"]["best"][name] for record in records]) for name in LOSSES},
        "sd_ratio": np.mean([record["sd_ratio"] for record in records]),
    }


def ablation_summary(records: Mapping[str, Record]) -> dict[str, Any]:
    """Ablation -> figures of its run, difference to the default; `no_stage_one` is a method of the default run."""
    default = records["default"]
    runs = {name: (record, "magic") for name, record in records.items()}
    runs["no_stage_one"] = default, "stage_two_pretrained"
    return {
        name: {
            "residuals": record["methods"][method]["residuals"],
            "lognorm": record["methods"][method]["lognorm"],
            "retrieval": None if name == "no_stage_one" else record["retrieval"],
            **difference([record], method, [default], "magic"),
        }
        for name, (record, method) in runs.items()
    }


# ---- Markdown


def cell(summary: Mapping[str, Any]) -> str:
    if summary["mean"] is None:
        return "-"
    return f"{summary['mean']:.3f}" + ("" if summary["sd"] is None else f" ± {summary['sd']:.3f}")


def between(ends: Sequence[float], digits: str = ".3f") -> str:
    return f"[{ends[0]:{digits}}, {ends[1]:{digits}}]"


def table_lines(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(cells)} |" for cells in (heads, ["---"] * len(heads), *rows)]


def origin(records: Sequence[Record], flags: str) -> str:
    """Command, dates and machines of runs, and a warning where the benchmark has changed since."""
    dates, machines = (sorted({record[name] for record in records}) for name in ("date", "machine"))
    text = f"`python benchmarks/accuracy.py --data DATA{flags}`, {' to '.join({dates[0]: 0, dates[-1]: 0})}, "
    text += "; ".join(machines) + "."
    if any(record["rules"] != RULES for record in records):
        text = f"**Out of date**: since these runs {LAST_CHANGE}; they are to be repeated.\n\n{text}"
    return text


def fold_markdown(name: str, fold: Mapping[str, Any], n_seeds: int) -> list[str]:
    scores, retrieval = fold["methods"], fold["retrieval"]
    done = len(scores["magic"]["residuals"]["seeds"])
    rows = [[f"**{m}**" if m == "magic" else m, *(cell(scores[m][f]) for f in FIGURES)] for m in METHODS]
    neighbours, ends = retrieval["neighbours"], retrieval["interval"]
    gallery = [f"{method} {cell(neighbours[method])} {between(ends[method])}" for method in GALLERY]
    return [
        f"### {name}" + ("" if done == n_seeds else f" ({done} of {n_seeds} seeds)"),
        "",
        *table_lines(["method", *FIGURES.values()], rows),
        "",
        f"magic - {fold['best_baseline']}, the best baseline, against residuals: {fold['difference']:+.3f} "
        f"{between(fold['interval'], '+.3f')}.",
        f"Retrieval among a spot's neighbours (chance {neighbours['chance']:.3f}): {', '.join(gallery)}; whole slice, "
        f"R@10 {cell(retrieval['R@10'])} (chance {retrieval['R@10_chance']:.3f}).",
        "Best epoch of stage one: contrast {contrast_loss:.3g} (chance {contrast_chance:.3g}), matching "
        "{matching_loss:.3g} (chance {matching_chance:.3g}). Predicted over measured deviation of a gene: "
        "{sd_ratio:.3g}.".format(**fold["losses"], sd_ratio=fold["sd_ratio"]),
        "",
    ]


def markdown(folds: Mapping[str, Sequence[Record]], flags: str, n_seeds: int, shuffled: bool = False) -> str:
    """The table of all folds.

    Parameters
    ----------
    folds : fold -> records of its finished runs, at least one
    flags : of accuracy.py, beside --data
    n_seeds : runs of a complete fold
    shuffled : counts were shuffled against the tiles
    """
    records = [record for runs in folds.values() for record in runs]
    lines = [
        origin(records, flags),
        f"Mean PCC per gene over genes, then over test slices, mean ± deviation over {n_seeds} seeds. All methods are "
        "fitted on Pearson residuals; signs are kept, a flat prediction counts as 0.",
        INTERVALS,
        "",
    ]
    if shuffled:
        lines += ["**Counts were shuffled against the tiles within each slice: expected of every method is 0.**", ""]
    for name, runs in folds.items():
        lines += fold_markdown(name, fold_summary(runs), n_seeds)
    return "\n".join(lines).rstrip()


def ablation_markdown(records: Mapping[str, Record], flags: str) -> str:
    """What each part of the method is worth: a row per ablation, the default first."""
    rows = []
    for name, part in ablation_summary(records).items():
        retrieval, shown = part["retrieval"], ["-"] * 3
        if retrieval is not None:
            shown = [f"{retrieval['neighbours'][key]:.3f}" for key in ("reranked", "contrastive")]
            shown.append(f"{retrieval['R@10']:.3f}")
        against = "" if name == "default" else f"{part['difference']:+.3f} {between(part['interval'], '+.3f')}"
        rows.append([name, f"{part['residuals']:.3f}", f"{part['lognorm']:.3f}", *shown, against])
    heads = ["part", "PCC, residuals", "PCC, lognorm", "neighbours, reranked", "contrastive", "R@10", "to the default"]
    default = records["default"]
    return "\n".join(
        [
            origin(list(records.values()), flags),
            f"Fold {default['fold']}, seed {default['seed']}. {INTERVALS} The variation over seeds is not in them.",
            "",
            *table_lines(heads, rows),
        ]
    )
