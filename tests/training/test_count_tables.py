"""count_tables.py: h5ad files brought to the input panel, and what is refused because it is held out."""

import anndata
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from tiny_runs import data_flags, row

from utils.features import dataset
from utils.genes import panels as gene_panels
from utils.training.count_tables import read_tables

ROWS = row("P01_1"), row("P02_1", "val"), row("P03_1", "test")


@pytest.fixture(scope="module")
def slices(prepared):
    flags = data_flags(prepared)
    return [dataset.load_slice(one, flags, ("input",), val_strip=False) for one in ROWS[:2]]


@pytest.fixture(scope="module")
def panel(slices):
    return slices[0].panels["input"].genes


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "tables").mkdir()
    return tmp_path / "tables"


def write(path, counts, names, **obs):
    index = [f"spot{i}" for i in range(len(counts))]
    frame = pd.DataFrame(obs, index=index)
    anndata.AnnData(sp.csr_matrix(counts), obs=frame, var=pd.DataFrame(index=list(names))).write_h5ad(path)


def read(prepared, slices, folder, downsample_counts=None, **flags):
    return read_tables(folder, slices, list(ROWS), data_flags(prepared, **flags), downsample_counts)


def some_counts(n_genes, n_spots=8, seed=3):
    return np.random.default_rng(seed).poisson(3.0, size=(n_spots, n_genes)) + 1


def test_genes_are_matched_by_name_and_those_absent_are_zero_and_counted(prepared, slices, panel, folder, capsys):
    names = [*panel[40:10:-1], "NOT_IN_PANEL", panel[5]]
    counts = some_counts(len(names))
    write(folder / "MOB1.h5ad", counts, names)
    (one,) = read(prepared, slices, folder)
    expected = np.zeros((8, len(panel)), int)
    for column, name in enumerate(names):
        if name in panel:
            expected[:, panel.index(name)] += counts[:, column]
    assert one.name == "MOB1"
    np.testing.assert_array_equal(one.bins, gene_panels.bin_tokens(expected, counts.sum(1)))
    assert one.measured.tolist() == [gene in names for gene in panel]
    assert "MOB1.h5ad: 8 spots, 31 input genes, 19 of 50 input genes absent, read as zero" in capsys.readouterr().out


def test_controls_are_left_out_and_unique_names_merged(prepared, slices, panel, folder, capsys):
    names = [*panel, f"{panel[3]}-1", "BLANK_0006", "NegControlProbe_00042"]
    counts = some_counts(len(names))
    write(folder / "a.h5ad", counts, names)
    (table,) = read(prepared, slices, folder)
    expected = counts[:, : len(panel)].copy()
    expected[:, 3] += counts[:, len(panel)]
    np.testing.assert_array_equal(table.bins, gene_panels.bin_tokens(expected, expected.sum(1)))
    assert "a.h5ad: 2 control features left out\n" in capsys.readouterr().out


def test_total_counts_of_obs_go_before_sums_and_empty_spots_are_left_out(prepared, slices, panel, folder, capsys):
    counts = some_counts(len(panel))
    counts[2] = 0
    total = counts.sum(1) * 10
    write(folder / "a.h5ad", counts, panel, total_counts=total)
    (one,) = read(prepared, slices, folder)
    kept = np.delete(np.arange(8), 2)
    np.testing.assert_array_equal(one.bins, gene_panels.bin_tokens(counts[kept], total[kept]))
    assert "1 spot without a count left out" in capsys.readouterr().out


def test_counts_are_thinned_to_a_common_depth_before_they_are_binned(prepared, slices, panel, folder):
    counts = some_counts(len(panel))
    write(folder / "a.h5ad", counts, panel)
    (thin,), (again,), (deep,) = (read(prepared, slices, folder, depth) for depth in (20, 20, 10**6))
    assert ((thin.bins > 0).sum(1) <= 20).all() and (deep.bins > 0).all()
    np.testing.assert_array_equal(thin.bins, again.bins)


def test_files_come_in_the_order_of_their_names_and_others_are_not_read(prepared, slices, panel, folder):
    for name in ("b", "a"):
        write(folder / f"{name}.h5ad", some_counts(len(panel)), panel)
    (folder / "notes.txt").write_text("not a table")
    assert [one.name for one in read(prepared, slices, folder)] == ["a", "b"]


def test_train_slices_are_welcome(prepared, slices, panel, folder):
    write(folder / "again.h5ad", slices[0].panels["input"].read_counts(), panel)
    assert len(read(prepared, slices, folder)) == 1


@pytest.mark.parametrize(("place", "name"), [(1, "P02_1"), (2, "P03_1")], ids=["val", "test"])
@pytest.mark.parametrize("how", ["name", "counts", "spots"])
def test_what_is_held_out_is_refused_unless_a_leak_is_allowed(
    prepared, slices, panel, folder, capsys, how, place, name
):
    path = gene_panels.panel_path(prepared.data, prepared.panels, name, "input")
    if how == "name":
        write(folder / f"{name}.h5ad", some_counts(len(panel)), panel)
    elif how == "counts":
        from utils.slices import splits, visium

        whole = visium.read_slice(splits.slice_folder(prepared.data, ROWS[place]), name)
        adata = anndata.AnnData(whole.counts, var=pd.DataFrame(index=whole.genes))
        adata.obs_names = whole.spots.index.to_numpy(str)
        adata.write_h5ad(folder / "other.h5ad")
    else:  # some of its spots, under other barcodes and with fewer genes, among others
        counts = np.concatenate([some_counts(len(panel)), gene_panels.read_panel(path).read_counts()[10:40]])
        write(folder / "other.h5ad", counts[:, 5:], panel[5:])
    expected = {"name": "name of the slice", "counts": "has the counts of", "spots": r"has \d+ spots with the counts"}
    with pytest.raises(ValueError, match=rf"{expected[how]}.*{name}.*held out; take .*--pretrain_data"):
        read(prepared, slices, folder)
    assert len(read(prepared, slices, folder, allow_leak=True)) == 1
    assert "warning: " in capsys.readouterr().out


def test_a_validation_strip_is_held_out_too(prepared, folder, panel):
    flags = data_flags(prepared, val_strip=True)
    strip = [dataset.load_slice(ROWS[0], flags, ("input",), val_strip=True)]
    counts, kept = strip[0].panels["input"].read_counts(), strip[0].rows_of("train")
    write(folder / "rest.h5ad", counts[kept], panel)
    assert len(read_tables(folder, strip, [ROWS[0]], flags)) == 1
    write(folder / "whole.h5ad", counts, panel)
    with pytest.raises(ValueError, match=r"whole.h5ad: has \d+ spots with the counts of spots of P01_1"):
        read_tables(folder, strip, [ROWS[0]], flags)


def test_a_test_slice_without_its_panel_cannot_be_told_from(work, slices, folder, panel):
    write(folder / "a.h5ad", some_counts(len(panel)), panel)
    gene_panels.panel_path(work.data, work.panels, "P03_1", "input").unlink()
    with pytest.raises(ValueError, match=r"P03_1.*run make_decoder_data"):
        read(work, slices, folder)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda c, g: (c + 0.5, g, {}), r"expected raw counts .* found \d\.5"),
        (lambda c, g: (-c, g, {}), r"expected raw counts .* found -"),
        (lambda c, g: (c[:, :24], g[:24], {}), r"at least half of the 50 input genes .* found 24"),
        (lambda c, g: (c, [f"X{i}" for i in range(50)], {}), r"found 0 \(it has X0, .*rename its genes"),
        (lambda c, g: (c, g, {"total_counts": np.ones(8)}), r"total_counts'\] of at least .* found 1 where"),
        (lambda c, g: (c, g, {"total_counts": np.full(8, np.nan)}), r"found nan where"),
    ],
    ids=["shares", "negative", "under half", "other names", "total below", "no total"],
)
def test_files_that_are_not_counts_of_the_panel_are_refused(prepared, slices, panel, folder, edit, message):
    counts, names, obs = edit(some_counts(len(panel)), panel)
    write(folder / "a.h5ad", counts, names, **obs)
    with pytest.raises(ValueError, match=message) as error:
        read(prepared, slices, folder)
    assert "a.h5ad" in str(error.value) and "\n" not in str(error.value)


def test_a_torn_file_and_an_empty_folder_are_refused(prepared, slices, folder):
    with pytest.raises(ValueError, match="found no such file in it"):
        read(prepared, slices, folder)
    with pytest.raises(ValueError, match="found no such folder"):
        read(prepared, slices, folder / "none")
    (folder / "a.h5ad").write_bytes(b"corrupt")
    with pytest.raises(ValueError, match=r"a\.h5ad: expected an h5ad file with counts in X"):
        read(prepared, slices, folder)
