"""A slice measured with another panel: brought onto a model's genes, evaluated on what they share, which is said."""

import json
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import pytest
from spaceranger_folders import refused
from tiny_runs import data_flags

from utils.genes import panels as gene_panels
from utils.training import checkpoint, split


def target_panel(work, name="P03_1", role="target"):
    return gene_panels.read_panel(gene_panels.panel_path(work.data, work.panels, name, role))


# ---- a panel onto other genes


def slow_onto(panel, wanted):
    """Gene by gene."""
    columns, measured = [], []
    for gene in wanted:
        known = gene in panel.genes
        columns.append(panel.read_counts()[:, panel.genes.index(gene)] if known else np.zeros(len(panel.barcodes), int))
        measured.append(known and bool(panel.measured[panel.genes.index(gene)]))
    return np.stack(columns, axis=1), measured


def test_a_panel_onto_other_genes(prepared, rng):
    panel = target_panel(prepared)
    panel.measured[2] = False
    orders = [panel.genes[::-1], ["X1", *panel.genes[5:9], "X2"], [*rng.permutation(panel.genes).tolist(), "X"], ["X"]]
    for wanted in orders:
        for one in (panel, panel.select_spots(np.array([7, 3, 11]))):
            found = one.select_genes(wanted)
            counts, measured = slow_onto(one, wanted)
            assert found.genes == wanted and found.measured.tolist() == measured
            assert found.read_counts().dtype == np.int32 and np.array_equal(found.read_counts(), counts)
            assert np.array_equal(one.select_genes(wanted).select_spots(np.arange(2)).read_counts(), counts[:2])
            twice = found.select_genes(panel.genes)
            assert np.array_equal(twice.read_counts(), slow_onto(found, panel.genes)[0])
            assert twice.measured.tolist() == slow_onto(found, panel.genes)[1]


def test_a_panel_onto_its_own_genes_is_itself(prepared):
    panel = target_panel(prepared)
    assert panel.select_genes(list(panel.genes)) is panel


def panel_with(n, measured):
    known = np.arange(n) < measured
    return gene_panels.Panel(
        Path("p.h5ad"), np.zeros(0), [f"g{i}" for i in range(n)], known, *[np.zeros(0)] * 3, 1.0, [], "h"
    )


@pytest.mark.parametrize(
    ("role", "n", "measured", "says"),
    [
        ("target", 300, 300, ""),
        ("target", 300, 212, "S: evaluated on 212 of the model's 300 genes; the slice's panel lacks 88\n"),
        ("target", 300, 10, "S: evaluated on 10 of"),
        ("target", 300, 9, None),
        ("target", 3, 3, ""),
        ("target", 3, 2, None),
        ("input", 50, 50, ""),
        ("input", 50, 25, "S: has 25 of the model's 50 input genes; the 25 it lacks are read as zero\n"),
        ("input", 50, 24, None),
        ("input", 51, 25, None),
    ],
)
def test_how_much_must_be_shared(capsys, role, n, measured, says):
    panel = panel_with(n, measured)
    if says is None:
        line = refused(
            f"p.h5ad: expected at least .* of the {n} {role} genes of --w, found {measured};",
            split.check_genes,
            panel,
            role,
            "S",
            "--w",
        )
        assert f"make its panel with --{role}_genes" in line
    else:
        split.check_genes(panel, role, "S", "--w")
        assert capsys.readouterr().out.startswith(says)


# ---- evaluations


def other_panel(work, role, keep):
    """The test slice's panel of another choice: some of its genes, in another order, and others beside them."""
    own = target_panel(work, role=role).genes
    others = [gene for gene in target_panel(work, role="input").genes if gene not in own][:4]
    kept = own[::-1][:keep]
    (work.out / "list.txt").write_text("\n".join([*others, *kept]))
    work.run("make_decoder_data", "--part", "test", f"--{role}_genes", work.out / "list.txt")
    return kept


def test_stage_two_is_evaluated_on_the_overlap(evaluated, work, tmp_path, capsys):
    """What is shared gets the figures it has with the whole panel; what is not, has none."""
    kept = other_panel(work, "target", 13)
    work.run("decoder_similarity", "--decoder", evaluated.decoder, "--out", tmp_path / "part")
    assert "P03_1: evaluated on 13 of the model's 20 genes; the slice's panel lacks 7\n" in capsys.readouterr().out
    folders = tmp_path / "part", evaluated.out / "results" / "similarity"
    part, whole = (pd.read_csv(folder / "genes.csv", index_col="gene") for folder in folders)
    assert part.index.tolist() == whole.index.tolist()
    assert (part.n_slices == part.index.isin(kept)).all()
    columns = [name for name in part if name.startswith("pcc_")]
    np.testing.assert_allclose(part.loc[kept, columns], whole.loc[kept, columns], rtol=1e-12)
    assert part.drop(kept)[columns].isna().all(axis=None)
    metrics = json.loads((tmp_path / "part" / "metrics.json").read_text())
    assert metrics["n_genes"] == 13
    expected = part.loc[kept, "pcc_residuals_model"].mean()
    assert metrics["residuals"]["model"]["pcc_gene_mean"] == pytest.approx(expected, rel=1e-9)
    predicted = [anndata.read_h5ad(folder / "predictions.h5ad") for folder in folders]
    assert np.array_equal(predicted[0].X, predicted[1].X), "all of the model's genes are predicted"


def test_stage_one_reads_genes_that_a_slice_lacks_as_zero(trained, work, tmp_path, capsys):
    kept = other_panel(work, "input", 30)
    work.run("get_accuracy_image", "--encoder", trained.encoder, "--out", tmp_path / "results")
    assert "P03_1: has 30 of the model's 50 input genes; the 20 it lacks are read as zero\n" in capsys.readouterr().out
    read = anndata.read_h5ad(tmp_path / "results" / "predictions.h5ad")
    own = checkpoint.load(trained.encoder, "stage_one", "--encoder")["genes"]
    panel = target_panel(trained, role="input")
    expected = gene_panels.bin_tokens(panel.read_counts(), panel.total_counts) * np.isin(own, kept)
    assert read.var_names.tolist() == own and np.array_equal(read.X, expected)


def test_slices_of_several_panels_are_evaluated_together(trained, work, capsys):
    """The slices of the training keep the model's panel; the test slice has another."""
    other_panel(work, "target", 15)
    state = checkpoint.load(trained.decoder, "stage_two", "--decoder")
    flags = data_flags(work, part="all", allow_leak=True)
    slices, trained_on = split.load_evaluation(flags, state, "--decoder", ("target",))
    assert capsys.readouterr().out.count("evaluated on") == 1
    assert [one.panels["target"].measured.sum() for one in slices] == [20, 20, 15]
    assert all(one.panels["target"].genes == state["genes"] for one in (*slices, *trained_on))
