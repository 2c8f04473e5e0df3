"""Means, differences with their intervals, table and figure of parts.py."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.record import table_lines
from utils.evaluation.bootstrap import block_bootstrap_interval
from utils.files.atomic import write_figure
from utils.words import count_of

FIGURES = {  # key: heading
    "contrastive_neighbours": "contrastive",
    "matching_neighbours": "matching",
    "reranked_neighbours": "re-ranked",
    "matching_auc": "AUC",
    "matching_auc_same_depth": "AUC, same depth",
    "recall_at_10": "R@10",
    "pcc_initialisation": "PCC, initialisation",
    "pcc_residuals": "PCC",
}
Patients = dict[str, dict[str, float | None]]  # figures of each patient


def over_seeds(records: Sequence[Mapping[str, Any]]) -> Patients:
    """Figures of each patient, means over the runs of a method."""
    patients = [record["per_patient"] for record in records]
    return {name: {key: _mean([of_run[name][key] for of_run in patients]) for key in FIGURES} for name in patients[0]}


def over_patients(record: Mapping[str, Any]) -> dict[str, float | None]:
    """Figures of a run, means over patients."""
    return {key: _mean([figures[key] for figures in record["per_patient"].values()]) for key in FIGURES}


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if len(known) == len(values) else None


def difference(a: Sequence[float | None], b: Sequence[float | None]) -> dict[str, Any] | None:
    """Mean of a - b over patients and its 95 % interval, of a bootstrap over patients; None where one has none."""
    pairs = [(x, y) for x, y in zip(a, b, strict=True) if x is not None and y is not None]
    if len(pairs) < len(a) or len(a) < 2:
        return None
    values = np.array([x - y for x, y in pairs])
    interval = block_bootstrap_interval(values, np.arange(len(values)))
    return {"mean": float(values.mean()), "interval": list(interval)}


def summarise(records: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, Any]:
    """`methods` and `differences` of the JSON: every method against `none`, a mismatched one against its own."""
    patients = {name: over_seeds(runs) for name, runs in records.items()}
    methods: dict[str, dict[str, Any]] = {}
    for name, of_patients in patients.items():
        column = {key: [figures[key] for figures in of_patients.values()] for key in FIGURES}
        per_patient = [{"patient": patient} | figures for patient, figures in of_patients.items()]
        methods[name] = {key: _mean(values) for key, values in column.items()}
        methods[name] |= {"seconds": _mean([run["seconds"] for run in records[name]])}
        methods[name] |= {"steps": records[name][0]["steps"], "seeds": len(records[name])}
        methods[name] |= {"per_seed": [over_patients(run) for run in records[name]], "per_patient": per_patient}
    return {"methods": methods, "differences": differences(patients)}


def differences(patients: Mapping[str, Patients]) -> dict[str, Any]:
    """Each method less `none` and less `matching`; its re-ranking less its own contrast and less that of `none`. What
    was trained on mismatched pairs is compared with the like."""
    found: dict[str, Any] = {}
    columns = {name: {key: [of[key] for of in people.values()] for key in FIGURES} for name, people in patients.items()}
    for name, own in columns.items():
        if name.startswith("none"):
            continue
        none, matching = (rival + "_mismatched" * name.endswith("_mismatched") for rival in ("none", "matching"))
        for rival in (none, matching):
            if rival in columns and rival != name:
                found[f"{name} - {rival}"] = {key: difference(own[key], columns[rival][key]) for key in FIGURES}
        reranked = own["reranked_neighbours"]
        gain = difference(reranked, own["contrastive_neighbours"])
        found[f"{name}: reranked_neighbours - contrastive_neighbours"] = {"reranked_neighbours": gain}
        if none in columns:
            gain = difference(reranked, columns[none]["contrastive_neighbours"])
            found[f"{name}: reranked_neighbours - {none}: contrastive_neighbours"] = {"reranked_neighbours": gain}
    return found


def _figure(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _seconds(value: float | None) -> str:
    return "-" if value is None else f"{value:.0f}"


def _difference(found: Mapping[str, Any] | None) -> str:
    return "-" if found is None else f"{found['mean']:+.3f} [{found['interval'][0]:+.3f}, {found['interval'][1]:+.3f}]"


def markdown(result: Mapping[str, Any]) -> str:
    """The tables of methods, of differences and, of several seeds, of each seed; and what they were made with."""
    s = result["settings"]
    told_apart, unseen = s["patients_told_apart"], s["patients"] - s["train"] - s["val"]
    trained_on = (
        "one train slice with a strip for validation" if s["one_slice"] else count_of(s["train"], "train patient")
    )
    head = (
        f"{trained_on} x {s['spots']} spots, {unseen} unseen, batch effects "
        f"{s['batch_effects']:g} (three patients told apart: {_figure(told_apart)}, chance 0.333), "
        f"seeds {', '.join(map(str, s['seeds']))}, {s['date']}, {s['machine']}. Chance: "
        f"{s['chance']['neighbours']:.3f} among neighbours, {s['chance']['recall_at_10']:.3f} for R@10, 0.5 for AUC."
    )
    rows = [
        [name, *(_figure(of[key]) for key in FIGURES), str(of["seeds"]), str(of["steps"]), _seconds(of["seconds"])]
        for name, of in result["methods"].items()
    ]
    keys = ("contrastive_neighbours", "recall_at_10", "reranked_neighbours", "pcc_residuals")
    against = [
        [name, *(_difference(of.get(key)) for key in keys)]
        for name, of in result["differences"].items()
        if any(of.get(key) for key in keys)
    ]
    headings = [FIGURES[key] for key in keys]
    lines = [head, "", *table_lines(["method", *FIGURES.values(), "seeds", "steps", "seconds"], rows)]
    lines += ["", *table_lines(["difference", *headings], against)]
    if len(s["seeds"]) > 1:
        by_seed = [
            [
                name,
                *("-" if of[key] is None else ", ".join(_figure(seed[key]) for seed in of["per_seed"]) for key in keys),
            ]
            for name, of in result["methods"].items()
        ]
        lines += ["", *table_lines(["each seed", *headings], by_seed)]
    return "\n".join(lines)


def curve_of(results: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The first result and those that differ from it in the number of train patients alone, by that number."""
    same = ("patients", "val", "spots", "steps", "batch_effects", "one_slice", "flags")
    first = results[0]["settings"]
    others = [result for result in results if all(result["settings"][key] == first[key] for key in same)]
    by_train = {result["settings"]["train"]: result for result in reversed(others)}
    return [by_train[train] for train in sorted(by_train)]


def unseen_in_all(results: Sequence[Mapping[str, Any]], key: str) -> list[dict[str, float]]:
    """Mean of a figure by method, of each result, over the patients that every result has."""
    by_patient = [
        {name: {row["patient"]: row[key] for row in of["per_patient"]} for name, of in result["methods"].items()}
        for result in results
    ]
    shared = set.intersection(*(set(of) for methods in by_patient for of in methods.values()))
    return [
        {name: float(np.mean([of[patient] for patient in shared])) for name, of in methods.items()}
        for methods in by_patient
    ]


def draw_curve(results: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Retrieval of each method over the number of train patients, of the results of `curve_of`: means over the patients
    that are unseen in all of them."""
    from utils.evaluation import plotting

    shared = [name for name in results[0]["methods"] if all(name in result["methods"] for result in results)]
    patients = np.array([result["settings"]["train"] for result in results])
    keys = {"contrastive_neighbours": "neighbours", "recall_at_10": "recall_at_10"}
    figure, panels = plotting.new_figure(9.0, 3.6, columns=len(keys))
    for axes, (key, chance) in zip(panels, keys.items(), strict=True):
        values = unseen_in_all(results, key)
        for i, name in enumerate(shared):
            plotting.curve(axes, i, name, patients, np.array([of_result[name] for of_result in values]))
        axes.axhline(results[0]["settings"]["chance"][chance], color=plotting.FAINT, ls="--", lw=1.2, label="chance")
        axes.set(xscale="log", xticks=patients, xticklabels=patients, ylim=(0, None))
        axes.minorticks_off()
        plotting.label(axes, "Train patients", "Fraction of spots", FIGURES[key])
    plotting.legend(panels[-1])
    write_figure(path, figure)
