"""The table of both evaluations: which figure stands where, several runs, the ceiling of a simulation."""

import copy
import json

import anndata
import numpy as np
import pandas as pd
import pytest

from utils.report import __main__ as report_command
from utils.report import tables

GALLERY = {"chance": 0.111, "depth": 0.2, "contrastive": 0.3, "matching": 0.4, "reranked": 0.512}
RETRIEVAL = {
    "neighbours": GALLERY | {"interval": {row: [i / 100, 0.99] for i, row in enumerate(tables.RETRIEVAL_METHODS)}},
    "random10": GALLERY | {"reranked": 0.622, "interval": {row: [0.05, 0.98] for row in tables.RETRIEVAL_METHODS}},
    "slice": {
        way: {f"R@{k}": value * k for k in (1, 5, 10)} | {"median_rank": 9.0}
        for way, value in (("chance", 0.01), ("image_to_gene", 0.02), ("gene_to_image", 0.03))
    },
}
FIGURES = ("pcc_gene_mean", "pcc_gene_top50", "pcc_gene_given_depth", "mse")
SCALES = ("lognorm", "residuals", "counts")


def figures_of(scale, row):
    """1 for residuals, 0.1 for the third row, 0.01 for the second figure; null where a row cannot have one."""
    base = SCALES.index(scale) + ("model", "mean", "ridge").index(row) / 10
    found = {figure: base + k / 100 for k, figure in enumerate(FIGURES)}
    without = FIGURES[:3] if row == "mean" else ()
    return found | dict.fromkeys(without) | ({} if scale == "residuals" else {"mse": None})


SIMILARITY = {scale: {row: figures_of(scale, row) for row in ("model", "mean", "ridge")} for scale in SCALES}
SIMILARITY["per_slice"] = {"P05_1": {}, "P06_1": {}}


def write(folder, retrieval=RETRIEVAL, similarity=SIMILARITY):
    for name, metrics in (("retrieval", retrieval), ("similarity", similarity)):
        (folder / name).mkdir(parents=True)
        (folder / name / "metrics.json").write_text(json.dumps(metrics))
    return folder


@pytest.fixture
def results(tmp_path):
    return write(tmp_path / "results")


def printed(capsys, *argv):
    """Lines of the table: the words before the first figure, and the cells."""
    report_command.main([str(flag) for flag in argv])
    lines = [line for line in capsys.readouterr().out.splitlines() if line]
    return {line[:32].strip(): line[32:].split() for line in lines}


def test_the_figures_stand_beside_their_chance_and_interval(results, capsys):
    table = printed(capsys, results)
    assert table["among its neighbours"][:4] == ["0.111", "0.200", "[0.000,", "0.990]"]
    assert table["among its neighbours"][-3:] == ["0.512", "[0.030,", "0.990]"]
    assert table["among ten of the slice"][-3:] == ["0.622", "[0.050,", "0.980]"]
    assert table["image to gene"] == ["0.020", "0.100", "0.200"] and table["chance"] == ["0.010", "0.050", "0.100"]
    assert table["model"] == ["1.000", "1.010", "0.000", "0.020", "1.030"]
    assert table["ridge"] == ["1.200", "1.210", "0.200", "0.220", "1.230"]


def test_a_figure_that_a_row_cannot_have_is_a_dash(results, capsys):
    assert printed(capsys, results)["mean"] == ["-", "-", "-", "-", "1.130"]


def test_the_error_is_in_the_scale_that_was_fitted(results, capsys):
    report_command.main([str(results)])
    assert "MSE, residuals" in capsys.readouterr().out
    assert tables.fitted_scale({"lognorm": {"model": {"mse": 0.0}}}) == "lognorm", "an error of 0 is one"
    none = {scale: {"model": {"mse": None}} for scale in ("lognorm", "residuals", "counts")}
    assert tables.fitted_scale(none) == "residuals", "of a single spot no figure is defined"


def test_a_single_spot_has_no_interval():
    assert tables.over_runs([1.0], [None, None]) == "1.000"


def test_several_runs_give_mean_and_deviation(results, tmp_path, capsys):
    other = copy.deepcopy(SIMILARITY)
    other["residuals"]["model"]["pcc_gene_mean"] = 1.2
    other["residuals"]["mean"]["mse"] = None
    table = printed(capsys, results, write(tmp_path / "second", similarity=other))
    assert table["model"][:3] == ["1.100", "±", f"{np.std([1.0, 1.2], ddof=1):.3f}"]
    assert table["mean"][-1] == "1.130", "what one run lacks is not counted"
    assert table["among its neighbours"][-3:] == ["0.512", "±", "0.000"]


def test_the_ceiling_is_the_mean_over_slices_of_the_panel_genes(results, tmp_path, capsys):
    pd.DataFrame({"gene": ["b", "a"]}).to_csv(results / "similarity" / "genes.csv", index=False)
    for name, ceilings in (("P05_1", [2.0, 4.0, 90.0]), ("P06_1", [np.nan, 5.0, 90.0])):
        truth = anndata.AnnData(np.zeros((1, 3), np.float32))
        truth.var_names, truth.var["ceiling_residuals"] = ["a", "b", "c"], ceilings
        (tmp_path / "data" / name).mkdir(parents=True)
        truth.write_h5ad(tmp_path / "data" / name / "truth.h5ad")
    report_command.main([str(results), "--truth", str(tmp_path / "data")])
    expected = "ceiling of this simulation: PCC 4.000 against residuals; the model reaches 25% of it"
    assert capsys.readouterr().out.splitlines()[-1] == expected


@pytest.mark.parametrize("name", ["retrieval", "similarity"])
def test_missing_results_are_named_in_one_line(results, capsys, name):
    (results / name / "metrics.json").unlink()
    with pytest.raises(SystemExit) as stop:
        report_command.main([str(results)])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count("\n") == 1
    script = {"retrieval": "get_accuracy_image.py", "similarity": "decoder_similarity.py"}[name]
    assert f"{name}/metrics.json: expected results, found none; run {script}" in error


def test_a_leak_stands_below_the_tables(results, capsys):
    report_command.main([str(results)])
    assert "warning" not in capsys.readouterr().out
    path = results / "similarity" / "metrics.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"leak": ["C5"]}))
    report_command.main([str(results)])
    assert "warning: C5 seen in training (--allow_leak)" in capsys.readouterr().out.splitlines()[-1]
    assert tables.leak_note({"leak": ["C5", "B4"]}) == " (leak: C5, B4 seen in training)"
    assert tables.leak_note({"leak": []}) == tables.leak_note({}) == ""


def test_the_ceiling_of_real_slices_is_not_known(results, tmp_path, capsys):
    pd.DataFrame({"gene": ["a"]}).to_csv(results / "similarity" / "genes.csv", index=False)
    with pytest.raises(SystemExit) as stop:
        report_command.main([str(results), "--truth", str(tmp_path)])
    assert stop.value.code == 2 and "P05_1/truth.h5ad, found none" in capsys.readouterr().err
