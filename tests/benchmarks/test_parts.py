"""benchmarks/parts.py: what is compared with what, the AUC's rivals, and a run that is resumed."""

import json

import numpy as np
import pytest

from benchmarks import parts, parts_run, parts_table


def record(values, seconds=2.0):
    """A run in which each patient has one value for all figures, None for a figure that it cannot have."""
    patients = {f"P{i}": dict.fromkeys(parts_table.FIGURES, value) for i, value in enumerate(values)}
    return {"per_patient": patients, "seconds": seconds, "steps": 10}


def test_seeds_are_averaged_before_patients_and_methods_are_compared_patient_by_patient():
    records = {
        "none": [record([0.1, 0.2, 0.3, 0.4]), record([0.3, 0.4, 0.5, 0.6])],
        "matching": [record([0.3, 0.4, 0.5, 0.6]), record([0.3, 0.4, 0.5, 0.6])],
        "none_mismatched": [record([0.1, 0.1, 0.1, 0.1])],
    }
    found = parts_table.summarise(records)
    none = found["methods"]["none"]
    assert none["recall_at_10"] == pytest.approx(0.35) and none["seeds"] == 2
    assert [patient["recall_at_10"] for patient in none["per_patient"]] == pytest.approx([0.2, 0.3, 0.4, 0.5])
    assert [seed["recall_at_10"] for seed in none["per_seed"]] == pytest.approx([0.25, 0.45])
    settings = vars(parts.parse_args(["--out", "x.json", "--seeds", "0", "1"])) | {"patients_told_apart": None}
    settings |= {"date": "", "machine": "", "chance": {"neighbours": 0.1, "recall_at_10": 0.1}}
    assert "| none | 0.250, 0.450 | 0.250, 0.450 |" in parts_table.markdown({"settings": settings, **found})
    difference = found["differences"]["matching - none"]["recall_at_10"]
    assert difference["mean"] == pytest.approx(0.1) and difference["interval"] == pytest.approx([0.1, 0.1])
    assert "none_mismatched - none" not in found["differences"], "their data differ"


def test_what_re_ranking_gains_on_the_contrast_alone():
    matching, none = record([0.5, 0.6, 0.7]), record([0.1, 0.2, 0.3])
    for name, of in matching["per_patient"].items():
        of["reranked_neighbours"] += 0.1 if name == "P0" else 0.2
    found = parts_table.summarise({"none": [none], "matching": [matching]})["differences"]
    own = found["matching: reranked_neighbours - contrastive_neighbours"]["reranked_neighbours"]
    alone = found["matching: reranked_neighbours - none: contrastive_neighbours"]["reranked_neighbours"]
    assert own["mean"] == pytest.approx(0.5 / 3) and alone["mean"] == pytest.approx(0.5 / 3 + 0.4)


def test_a_difference_is_null_where_a_method_has_no_figure():
    assert parts_table.difference([0.1, None], [0.2, 0.3]) is None
    assert parts_table.difference([0.1], [0.2]) is None
    found = parts_table.difference([0.5, 0.6, 0.1, 0.9], [0.4, 0.2, 0.3, 0.1])
    assert found["mean"] == pytest.approx(0.275) and found["interval"][0] < 0.275 < found["interval"][1]


def test_rivals_of_the_same_depth_are_the_nearest_in_rank():
    found = parts_run.depth_candidates(np.array([100, 5000, 110, 4000, 90]), 2)
    assert found[:, 0].tolist() == [0, 1, 2, 3, 4]
    assert [set(row[1:].tolist()) for row in found[[0, 4]]] == [{2, 4}, {0, 2}]


def test_the_curve_has_the_results_that_differ_in_train_patients_alone():
    settings = vars(parts.parse_args(["--out", "x.json"]))
    made = [{"train": 12}, {"train": 4, "batch_effects": 3.0}, {"train": 4}, {"train": 1}, {"steps": 9}, {"train": 12}]
    results = [{"settings": settings | changed, "number": i} for i, changed in enumerate(made)]
    assert [result["number"] for result in parts_table.curve_of(results)] == [3, 2, 0]


def test_points_of_the_curve_are_of_the_same_patients():
    many, few = ({"methods": {"none": {"per_patient": []}}} for _ in range(2))
    for result, figures in ((many, {"P3": 0.5, "P4": 0.7}), (few, {"P2": 0.0, "P3": 0.4, "P4": 0.2})):
        rows = [{"patient": patient, "recall_at_10": value} for patient, value in figures.items()]
        result["methods"]["none"]["per_patient"] = rows
    found = parts_table.unseen_in_all([few, many], "recall_at_10")
    assert [of["none"] for of in found] == pytest.approx([0.3, 0.6])


def test_auc_of_a_gallery():
    scores = np.array([[2.0, 1.0, 0.0], [0.5, 3.0, 0.5]])
    assert parts_run.auc_of(scores, np.array([0, 1])) == 1.0
    assert parts_run.auc_of(scores, np.array([2, 0])) == 0.5 / 8


def test_every_method_differs_in_the_flags_of_its_part_alone():
    flags = {name: set(parts_run.PARTS[name].replace("--", "|").split("|")) for name in parts_run.PARTS}
    assert len({frozenset(f) for f in flags.values()}) == len(flags)
    cohort = parts_run.Cohort(parts_run.Path("x"), 6, ["train"] * 3, 2, 64, 1.0, False)
    run = parts_run.Run(cohort, "queue_mismatched", 1, 60)
    assert "--queue_size 1024" in run.stage_one_flags() and "--Epoch 10 " in run.stage_one_flags()
    assert not run.matching and parts_run.Run(cohort, "full", 0, 60).matching


@pytest.mark.slow
def test_a_quick_benchmark_has_the_stated_keys_and_is_not_repeated(tmp_path, capsys):
    out = tmp_path / "parts.json"
    settings = parts.parse_args(["--out", str(out), "--quick"])
    parts.main(settings)
    result, printed = json.loads(out.read_text()), capsys.readouterr().out
    assert set(result) == {"settings", "methods", "differences"}
    keys = {*parts_table.FIGURES, "seconds", "steps", "per_patient", "per_seed", "seeds"}
    for name, figures in result["methods"].items():
        assert set(figures) == keys and len(figures["per_patient"]) == 2, name
        assert 0 <= figures["contrastive_neighbours"] <= 1
    assert result["methods"]["none"]["matching_auc"] is None and 0 <= result["methods"]["full"]["matching_auc"] <= 1
    assert "full - none" in result["differences"] and "| full |" in printed
    parts.main(settings)
    assert "full_seed0" not in capsys.readouterr().out and json.loads(out.read_text()) == result
    more = result | {"settings": result["settings"] | {"train": 4}}
    parts_table.draw_curve(parts_table.curve_of([result, more]), tmp_path / "parts.png")
    assert (tmp_path / "parts.png").stat().st_size > 1000


@pytest.mark.parametrize("unused", [None, "P02_1"])
def test_patients_are_told_apart_whatever_part_they_belong_to(trained, tmp_path, unused):
    """Of a checkpoint of one train slice: what is told apart are slices of the table, not those it was trained on."""
    parts_of = {"P01_1": "train", "P02_1": "val", "P03_1": "test"}
    lines = [f"{name},{name[:3]},{part}" for name, part in parts_of.items() if name != unused]
    (tmp_path / "slices.csv").write_text("\n".join(["slice,patient,part", *lines]) + "\n")
    flags = [word for name in ("data", "tiles", "panels") for word in (f"--{name}", str(getattr(trained, name)))]
    told = parts_run.patients_told_apart(trained.encoder, [*flags, "--slices", str(tmp_path / "slices.csv")])
    assert told is None if unused else 1 / 3 < told <= 1
