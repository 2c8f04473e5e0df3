"""make_decoder_data.py: on which spots the panels are chosen, what the two files hold, which spots are dropped."""

import json
import shutil
import stat

import anndata
import numpy as np
import pytest
from spaceranger_folders import refused
from tiny_runs import Work, rewrite_matrix

import make_decoder_data
from utils.genes import panels as gene_panels
from utils.slices import splits, visium

PARTS = "slice,patient,part\nP01_1,P01,train\nP02_1,P02,train\nP03_1,P03,test\n"
NAMES = ("P01_1", "P02_1", "P03_1")


@pytest.fixture
def work(simulated, tmp_path):
    """The simulated slices without their images: two to train, one to test."""
    unread = shutil.ignore_patterns("*.jpg", "*.png", "truth.h5ad")
    data = shutil.copytree(simulated, tmp_path / "data", ignore=unread)
    (data / "slices.csv").write_text(PARTS)
    return Work(data, tmp_path / "tiles", tmp_path / "panels", tmp_path)


def panel(work, name, role="target"):
    return gene_panels.read_panel(gene_panels.panel_path(work.data, work.panels, name, role))


def chosen(work, *flags):
    work.run("make_decoder_data", *flags)
    return [panel(work, "P01_1", role).genes for role in ("input", "target")]


def scrambled(counts, barcodes, names):
    return np.random.default_rng(5).permuted(counts, axis=1), barcodes, names


# ---- what the panels depend on


@pytest.mark.parametrize("part", ["test", "val", ""])
def test_panels_do_not_depend_on_held_out_slices(work, part):
    (work.data / "slices.csv").write_text(PARTS.replace("test", part))
    before = chosen(work)
    rewrite_matrix(work.data / "P03_1", scrambled)
    rewrite_matrix(work.data / "P03_1", lambda c, b, names: (c[:, 30:], b, names[30:]))
    assert chosen(work) == before
    shutil.rmtree(work.data / "P03_1")
    (work.data / "slices.csv").write_text("\n".join(PARTS.splitlines()[:3]))
    assert chosen(work) == before


def test_panels_depend_on_train_slices(work):
    before = chosen(work)
    rewrite_matrix(work.data / "P02_1", scrambled)
    after = chosen(work)
    assert after[0] != before[0] and after[1] != before[1]


def test_the_validation_strip_has_no_say(work):
    """Counts of the strip's spots are moved to other genes: with --val_strip the panels stay, without they change."""
    found = visium.read_slice(work.data / "P01_1")
    xy = found.spots[["x_fullres_px", "y_fullres_px"]].to_numpy()
    strip = found.spots.index[splits.strip_parts(xy, found.pitch_px) != "train"]
    assert 0 < len(strip) < len(xy)
    with_strip, without = chosen(work, "--val_strip"), chosen(work)

    def change(counts, barcodes, names):
        counts[np.isin(barcodes, strip)] = counts[np.isin(barcodes, strip)][:, ::-1] * 9
        return counts, barcodes, names

    rewrite_matrix(work.data / "P01_1", change)
    assert chosen(work, "--val_strip") == with_strip
    assert chosen(work) != without


def test_the_target_panel_is_the_rule_of_highest_mean_total(work):
    totals = []
    for name in NAMES[:2]:
        found = visium.read_slice(work.data / name)
        totals.append(dict(zip(found.genes, np.asarray(found.counts.sum(0)).ravel(), strict=True)))
    mean = {gene: (totals[0][gene] + totals[1][gene]) / 2 for gene in totals[0]}
    assert chosen(work)[1] == sorted(mean, key=mean.get, reverse=True)[:20]


def test_lists_replace_the_rules(work, tmp_path, capsys):
    some = visium.read_matrix(work.data / "P01_1").genes[[7, 3, 5]].tolist()
    (tmp_path / "list.txt").write_text("\n".join(some))
    rules = chosen(work)
    assert chosen(work, "--target_genes", tmp_path / "list.txt") == [rules[0], some]
    assert chosen(work, "--input_genes", tmp_path / "list.txt") == [some, rules[1]]
    assert "input panel: the list list.txt of 2 slices" in capsys.readouterr().out
    (tmp_path / "list.txt").write_text("\n".join([*some, "NOSUCH", "NEITHER"]))
    for flag in ("--target_genes", "--input_genes"):
        refused(
            r"list.txt: expected genes of the train slices, found 2 of 5 in none \(NOSUCH",
            chosen,
            work,
            flag,
            tmp_path / "list.txt",
        )


def test_a_listed_gene_of_held_out_slices_alone_is_an_error(work, tmp_path):
    rewrite_matrix(work.data / "P03_1", lambda c, b, names: (c, b, ["ONLY_HERE", *names[1:]]))
    (tmp_path / "list.txt").write_text("ONLY_HERE")
    refused("found 1 of 1 in none", chosen, work, "--target_genes", tmp_path / "list.txt")


def test_more_genes_asked_for_than_there_are(work, capsys):
    """All that the train slices have in common are taken, with a warning that gives both numbers."""
    rewrite_matrix(work.data / "P02_1", lambda c, b, names: (c[:, 1:], b, names[1:]))
    found = visium.read_slice(work.data / "P03_1")
    inputs, targets = chosen(work, "--n_top_genes", 60, "--n_input_genes", 500)
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning: ")]
    asked = "genes asked for, the train slices have 59 in common: all are taken"
    assert said == [f"warning: 500 input {asked}", f"warning: 60 target {asked}"]
    assert sorted(inputs) == sorted(targets) == sorted(found.genes[1:])
    place = [found.genes.tolist().index(gene) for gene in targets]
    np.testing.assert_array_equal(panel(work, "P03_1").read_counts(), found.counts.toarray()[:, place])
    chosen(work, "--n_top_genes", 59, "--n_input_genes", 59)
    assert "warning" not in capsys.readouterr().out


def test_stage_two_and_its_evaluation_take_a_panel_of_all_genes(trained, tmp_path):
    """One of which no slice has a count."""
    unread = shutil.ignore_patterns("*.jpg", "*.png", "truth.h5ad")
    data = shutil.copytree(trained.data, tmp_path / "data", ignore=unread)
    for name in NAMES:
        rewrite_matrix(data / name, lambda counts, b, names: (counts * (np.arange(60) != 7), b, names))
    input_genes = gene_panels.read_panel(gene_panels.panel_path(data, trained.panels, "P01_1", "input")).genes
    (tmp_path / "inputs.txt").write_text("\n".join(input_genes))
    work = Work(data, trained.tiles, tmp_path / "panels", tmp_path)
    work.run("make_decoder_data", "--n_top_genes", 300, "--input_genes", tmp_path / "inputs.txt")
    work.run("train_decoder", "--Epoch", 1, "--encoder", trained.encoder)
    work.run("decoder_similarity")
    metrics = json.loads((tmp_path / "results" / "similarity" / "metrics.json").read_text())
    predicted = anndata.read_h5ad(tmp_path / "results" / "similarity" / "predictions.h5ad")
    genes = visium.read_matrix(data / "P01_1").genes
    assert metrics["n_genes"] == 60 and sorted(predicted.var_names) == sorted(genes)
    assert np.isfinite(predicted.X).all()
    unseen = predicted.var_names.get_loc(genes[7])
    assert np.abs(predicted.X[:, unseen]).max() < 1e-6


def test_train_slices_of_two_species_have_no_panel(work):
    rewrite_matrix(work.data / "P02_1", lambda c, b, names: (c, b, [f"mouse_{name}" for name in names]))
    refused("expected gene names that all train slices share, found none", chosen, work)


def test_without_a_train_slice_there_is_no_panel(work):
    (work.data / "slices.csv").write_text(PARTS.replace("train", "val"))
    refused("expected a slice of part train", chosen, work)
    (work.data / "slices.csv").write_text(PARTS)
    refused("expected a slice of part val", chosen, work, "--part", "val")
    assert not work.panels.exists()


# ---- what the files hold


def test_the_files_hold_the_raw_counts_of_the_named_genes(work):
    work.run("make_decoder_data")
    for name in NAMES:
        found = visium.read_slice(work.data / name)
        for role, n in (("input", 50), ("target", 20)):
            one = panel(work, name, role)
            place = [found.genes.tolist().index(gene) for gene in one.genes]
            np.testing.assert_array_equal(one.read_counts(), found.counts.toarray()[:, place])
            assert one.read_counts().shape == (70, n) and one.read_counts().dtype == np.int32 and one.measured.all()
            assert one.barcodes.tolist() == found.spots.index.tolist()
            np.testing.assert_array_equal(one.total_counts, found.counts.toarray().sum(1), "over all genes")
            np.testing.assert_array_equal(one.xy_fullres_px, found.spots[["x_fullres_px", "y_fullres_px"]])
            assert one.pitch_fullres_px == pytest.approx(100, abs=1) and one.train_slices == list(NAMES[:2])
            assert one.counts_hash == visium.counts_hash(found.counts, one.barcodes, found.genes)


def test_the_files_say_how_their_panel_was_chosen(work):
    work.run("make_decoder_data")
    adata = anndata.read_h5ad(gene_panels.panel_path(work.data, work.panels, "P03_1", "target"))
    note = adata.uns["magic"]
    assert note["panel"].tolist() == adata.var_names.tolist() and note["role"] == "target"
    assert note["panel_hash"] == gene_panels.panel_hash(adata.var_names.tolist())
    assert note["how"] == "20 genes by highest_expressed on train spots"
    assert note["train_hashes"].tolist() == [panel(work, name).counts_hash for name in NAMES[:2]]
    assert {"array_row", "array_col", "total_counts"} <= set(adata.obs)


def test_a_gene_that_a_slice_lacks_is_zero_and_not_measured(work, capsys):
    lost = chosen(work)[1][4]
    rewrite_matrix(work.data / "P03_1", lambda c, b, names: (c[:, names != lost], b, names[names != lost]))
    before = {role: panel(work, "P03_1", role) for role in gene_panels.FILES}
    counts = {role: one.read_counts() for role, one in before.items()}  # read now: the files are about to be replaced
    work.run("make_decoder_data")
    said = capsys.readouterr().out
    assert "P03_1: 1 of 20 target genes are not in this slice" in said
    assert "P03_1: 1 of 50 input genes are not in this slice" in said
    for role in gene_panels.FILES:
        after = panel(work, "P03_1", role)
        column = after.genes.index(lost)
        assert not after.measured[column] and after.measured.sum() == len(after.genes) - 1
        assert not after.read_counts()[:, column].any() and counts[role][:, column].any()
        others = np.arange(len(after.genes)) != column
        np.testing.assert_array_equal(after.read_counts()[:, others], counts[role][:, others])
        np.testing.assert_array_equal(after.total_counts, before[role].total_counts - counts[role][:, column])


def test_duplicate_names_are_summed_and_counted(work, capsys):
    top = chosen(work)[1][0]
    before = panel(work, "P02_1").read_counts()

    def divide(counts, barcodes, names):
        """The gene's counts in two columns of its name, a few in the second."""
        own = counts[:, names == top]
        few = own // 3
        return np.hstack([counts - (names == top) * few, few]), barcodes, [*names, top]

    rewrite_matrix(work.data / "P02_1", divide)
    work.run("make_decoder_data")
    assert "P02_1: 70 spots, 60 genes, 10476 counts, 1 duplicate gene name summed" in capsys.readouterr().out
    np.testing.assert_array_equal(panel(work, "P02_1").read_counts(), before)


# ---- which spots


def thin(counts, barcodes, names):
    """The first spot has no count, the second three."""
    counts[:2] = 0
    counts[1, 0] = 3
    return counts, barcodes, names


def test_a_spot_without_a_count_is_dropped_and_counted(work, capsys):
    rewrite_matrix(work.data / "P01_1", thin)
    work.run("make_decoder_data")
    assert "P01_1: 69 spots, 60 genes" in (said := capsys.readouterr().out) and "1 spot below 1 count dropped" in said
    barcodes = visium.read_slice(work.data / "P01_1").spots.index
    assert panel(work, "P01_1").barcodes.tolist() == barcodes[1:].tolist()
    assert len(panel(work, "P02_1").barcodes) == 70, "no spot is dropped by default"


def test_min_counts(work, capsys):
    total = np.asarray(visium.read_slice(work.data / "P02_1").counts.sum(1)).ravel()
    least = int(np.sort(total)[30])
    work.run("make_decoder_data", "--min_counts", least)
    kept = panel(work, "P02_1").total_counts
    assert kept.tolist() == total[total >= least].tolist() and len(kept) == 40
    assert f"30 spots below {least} count" in capsys.readouterr().out
    refused("P01_1: expected spots of at least 999999 counts, found none", chosen, work, "--min_counts", 999999)


def test_dropped_spots_do_not_choose(work):
    """Of a slice whose other spots are dropped, what is left chooses alone."""

    def loud(counts, barcodes, names):
        counts[:35] = counts[:35] // 400
        counts[:35, -1] = 40  # the last gene would be the highest expressed
        counts[35:, -1] = 0
        return counts, barcodes, names

    for name in NAMES[:2]:
        rewrite_matrix(work.data / name, loud)
    last = visium.read_matrix(work.data / "P01_1").genes[-1]
    assert last in chosen(work)[1]
    assert last not in chosen(work, "--min_counts", 70)[1]


# ---- where they go


def test_files_lie_beside_the_counts_unless_told(work):
    make_decoder_data.main(make_decoder_data.parse_args(["--data", str(work.data)]))
    assert (work.data / "P01_1" / "filtered_feature_bc_matrix_one.h5ad").exists() and not work.panels.exists()
    assert gene_panels.read_panel(gene_panels.panel_path(work.data, None, "P03_1", "target")).genes


def test_read_only_data_is_not_written(work):
    for path in [work.data, *work.data.rglob("*")]:
        path.chmod(path.stat().st_mode & ~(stat.S_IWUSR | stat.S_IWGRP | stat.S_IWOTH))
    before = {path: path.stat().st_mtime_ns for path in work.data.rglob("*")}
    work.run("make_decoder_data")
    assert {path: path.stat().st_mtime_ns for path in work.data.rglob("*")} == before
    for path in [work.data, *work.data.rglob("*")]:
        path.chmod(path.stat().st_mode | stat.S_IWUSR)


def test_one_part_alone(work):
    work.run("make_decoder_data", "--part", "test")
    assert [path.name for path in work.panels.iterdir()] == ["P03_1"]
    assert panel(work, "P03_1").train_slices == list(NAMES[:2])


def test_identical_slices_in_two_parts_stop_the_run(work, capsys):
    """The same counts under another name, genes and spots in another order."""
    spots = np.random.default_rng(0).permutation(70)

    def reordered(counts, barcodes, names):
        return counts[spots][:, ::-1], barcodes[spots], names[::-1]

    shutil.rmtree(work.data / "P03_1")
    shutil.copytree(work.data / "P02_1", work.data / "P03_1")
    rewrite_matrix(work.data / "P03_1", reordered)
    refused(r"identical counts in two parts: P02_1 \(train\), P03_1 \(test\)", chosen, work)
    assert not work.panels.exists()
    chosen(work, "--allow_leak")
    assert "warning: slices with identical counts" in capsys.readouterr().out
    rewrite_matrix(work.data / "P03_1", lambda counts, barcodes, names: (counts[1:], barcodes[1:], names))
    refused(r"found slices with the same spots in two parts: P02_1 \(train\), P03_1 \(test\)", chosen, work)


def test_the_same_slices_give_the_same_files_twice(work):
    work.run("make_decoder_data")
    before = {name: panel(work, name, "input").read_counts() for name in NAMES}
    work.run("make_decoder_data")
    for name, old in before.items():
        np.testing.assert_array_equal(panel(work, name, "input").read_counts(), old)
    assert not [path for path in work.panels.rglob("*") if ".part" in path.name]
