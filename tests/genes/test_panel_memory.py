"""Gene panels under --memory: counts left in their file, their hash, the panel files, and how much is held at once."""

import hashlib
import shutil
import tracemalloc

import anndata
import h5py
import numpy as np
import pytest
import scipy.sparse as sp
from spaceranger_folders import refused, write_folder
from tiny_runs import Work, rewrite_matrix, write_matrix

from utils.genes import panels as gene_panels
from utils.slices import matrix, visium

SMALL = [1, 64, 64 * 40, 64 * 300]  # bytes: of one number and less, of a spot, of a few


@pytest.fixture
def stored(tmp_path, rng):
    """A matrix of 50 spots, some of them empty, and 30 features with names that repeat."""
    counts = rng.poisson(0.8, (50, 30))
    counts[[0, 7, 8, 49]] = 0
    names = np.char.add("g", rng.integers(0, 22, 30).astype(str))
    barcodes = np.char.add("b", rng.permutation(50).astype(str))
    write_matrix(tmp_path / "m.h5", counts, barcodes, names)
    return tmp_path / "m.h5"


def changed(path, **datasets):
    with h5py.File(path, "a") as file:
        for key, values in datasets.items():
            del file[f"matrix/{key}"]
            file[f"matrix/{key}"] = values
    return path


# ---- counts that stay in their file


@pytest.mark.parametrize("memory", SMALL)
def test_spots_read_from_the_file_are_those_of_the_matrix_in_memory(stored, memory, rng):
    whole, left = visium.read_matrix(stored), visium.read_matrix(stored, memory)
    assert isinstance(left.counts, visium.StoredCounts) and left.counts.shape == whole.counts.shape
    np.testing.assert_array_equal(left.counts.indptr, whole.counts.indptr)
    for spots in (slice(0, 50), slice(3, 4), slice(7, 9), rng.permutation(50), rng.permutation(50)[:9], np.array([8])):
        found = left.counts[spots]
        np.testing.assert_array_equal(found.toarray(), whole.counts[spots].toarray())
        assert found.dtype == np.int32 and found.has_canonical_format
    some = np.sort(rng.permutation(50)[:20])
    np.testing.assert_array_equal(left.counts.select(some)[5:15].toarray(), whole.counts[some[5:15]].toarray())
    assert [left.genes.tolist(), left.gene_ids.tolist()] == [whole.genes.tolist(), whole.gene_ids.tolist()]


def test_features_of_other_kinds_and_zeros_in_the_file_are_left_out(stored):
    with h5py.File(stored, "a") as file:
        kinds = np.array([b"Gene Expression", b"Antibody Capture"] * 15)
        data = file["matrix/data"][:]
    data[::3] = 0
    changed(stored, data=data.astype(float), **{"features/feature_type": kinds})
    whole, left = visium.read_matrix(stored), visium.read_matrix(stored, 640)
    found = left.counts[slice(0, 50)]
    np.testing.assert_array_equal(found.toarray(), whole.counts.toarray())
    assert found.shape == (50, 15) and found.nnz == whole.counts.nnz
    assert [values.tolist() for values in matrix.read_genes(stored)] == [whole.genes.tolist(), whole.gene_ids.tolist()]


def test_genes_alone_of_a_folder(tmp_path):
    folder = write_folder(tmp_path / "m", zipped=True)
    (folder / "matrix.mtx.gz").write_bytes(b"unread")
    assert [values[1] for values in matrix.read_genes(folder)] == ["TP53", "ENSG1"]


def test_what_fits_is_read_at_once(stored):
    numbers = visium.read_matrix(stored).counts.nnz
    assert isinstance(visium.read_matrix(stored, numbers * 64 - 1).counts, visium.StoredCounts)
    assert sp.issparse(visium.read_matrix(stored, numbers * 64).counts)


@pytest.mark.parametrize("memory", SMALL)
def test_spans_hold_all_spots_once_and_what_they_may(stored, memory):
    counts = visium.read_matrix(stored).counts
    spans = visium.spans(counts, memory)
    assert np.concatenate([np.arange(50)[span] for span in spans]).tolist() == list(range(50))
    assert all(counts[span].nnz * 64 <= memory or span.stop - span.start == 1 for span in spans)
    assert visium.spans(counts, np.inf) == [slice(0, 50)] and visium.spans(counts[:0], 64) == []


@pytest.mark.parametrize("value", [0.5, -1, np.nan, 3e9])
def test_counts_that_are_no_counts_are_refused_when_they_are_read(stored, value):
    with h5py.File(stored) as file:
        data = file["matrix/data"][:].astype(float)
    data[100] = value
    counts = visium.read_matrix(changed(stored, data=data), 64 * 40).counts
    refused("m.h5: expected raw counts", lambda: [counts[span] for span in visium.spans(counts, 64 * 40)])


def test_matrices_that_contradict_themselves_are_refused(stored):
    with h5py.File(stored) as file:
        indices, indptr = file["matrix/indices"][:], file["matrix/indptr"][:]
    far = indices.copy()
    far[9] = 30
    counts = visium.read_matrix(changed(stored, indices=far), 640).counts
    refused("m.h5: expected a 10x matrix in HDF5", lambda: counts[slice(0, 50)])
    for places in (indptr[:-1], indptr + 1, np.where(np.arange(51) == 9, 999, indptr)):
        path = changed(stored, indices=indices, indptr=places)
        refused("m.h5: expected a 10x matrix in HDF5", visium.read_matrix, path, 640)
    refused("m.h5: expected a 10x", visium.read_matrix, changed(stored, indptr=indptr, indices=indices[:-1]), 640)


# ---- the hash


def slow_hash(counts, barcodes, names):
    """Spots and names with a count sorted, then row starts, places and counts of their dense table."""
    unique = sorted(set(names))
    summed = np.column_stack([counts[:, names == name].sum(1) for name in unique])[np.argsort(barcodes)]
    summed, seen = summed[summed.any(1)], summed.any(0)
    table = summed[:, seen]
    kept = [*np.sort(barcodes[counts.any(1)]), "", *np.array(unique)[seen], ""]
    row, column = np.nonzero(table)
    numbers = [np.searchsorted(row, np.arange(len(table) + 1)), column, table[row, column]]
    text = "\n".join(kept).encode()
    return hashlib.sha256(text + b"".join(part.astype("<i8").tobytes() for part in numbers)).hexdigest()


@pytest.mark.parametrize("memory", [*SMALL, np.inf])
def test_the_hash_does_not_depend_on_spans(stored, memory):
    whole, left = visium.read_matrix(stored), visium.read_matrix(stored, memory)
    expected = slow_hash(whole.counts.toarray(), whole.barcodes, whole.genes)
    assert visium.counts_hash(left.counts, left.barcodes, left.genes, memory) == expected
    assert visium.counts_hash(whole.counts, whole.barcodes, whole.genes, memory) == expected


# ---- the panel files


@pytest.fixture
def work(simulated, tmp_path):
    """Two slices to train on and one to test, with spots in no order, names that repeat and spots without a count."""
    unread = shutil.ignore_patterns("*.jpg", "*.png", "truth.h5ad")
    data = shutil.copytree(simulated, tmp_path / "data", ignore=unread)
    (data / "slices.csv").write_text("slice,patient,part\nP01_1,P01,train\nP02_1,P02,train\nP03_1,P03,test\n")

    def odd(counts, barcodes, names):
        order = np.random.default_rng(4).permutation(70)
        counts[:3] = 0
        return counts[order], barcodes[order], [*names[:-1], names[0]]

    for name in ("P02_1", "P03_1"):
        rewrite_matrix(data / name, odd)
    return Work(data, tmp_path / "tiles", tmp_path / "panels", tmp_path)


def written(work, *flags):
    shutil.rmtree(work.panels, ignore_errors=True)
    work.run("make_decoder_data", *flags)
    return {str(path.relative_to(work.panels)): anndata.read_h5ad(path) for path in sorted(work.panels.rglob("*.h5ad"))}


@pytest.mark.parametrize("flags", [(), ("--val_strip", "--min_counts", 30)])
def test_the_files_and_what_is_said_do_not_depend_on_memory(work, flags, capsys):
    roomy = written(work, *flags)
    said = capsys.readouterr().out
    for memory in (1e-9, 1e-4):
        tight = written(work, *flags, "--memory", memory)
        assert capsys.readouterr().out == said and "67 spots, 59 genes" in said
        assert tight.keys() == roomy.keys() and len(roomy) == 6
        for name, one in tight.items():
            assert one.X.dtype == roomy[name].X.dtype == np.int32 and one.X.has_canonical_format
            np.testing.assert_array_equal(one.X.toarray(), roomy[name].X.toarray())
            assert one.obs.equals(roomy[name].obs) and one.var.equals(roomy[name].var)
            np.testing.assert_array_equal(one.obsm["spatial"], roomy[name].obsm["spatial"])
            assert {k: np.array(v).tolist() for k, v in one.uns["magic"].items()} == {
                k: np.array(v).tolist() for k, v in roomy[name].uns["magic"].items()
            }


def test_an_interrupted_write_leaves_the_old_file_whole(tmp_path):
    adata = anndata.AnnData(obs={"spot": ["a", "b"]}, var={"gene": ["g"]})

    def corrupt():
        yield sp.csr_matrix([[1]], dtype=np.int32)
        raise OSError("no room")

    path = tmp_path / "new" / "panel.h5ad"
    gene_panels.write_panel(path, adata, iter([sp.csr_matrix([[5]]), sp.csr_matrix([[7]])]))
    with pytest.raises(OSError, match="no room"):
        gene_panels.write_panel(path, adata, corrupt())
    assert anndata.read_h5ad(path).X.toarray().tolist() == [[5], [7]]


# ---- how much is held at once


def peak_bytes(function, *args):
    tracemalloc.start()
    function(*args)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak


def test_a_matrix_larger_than_the_budget_is_never_in_memory(tmp_path, rng):
    """400,000 numbers and a budget for 16,384 of them; per spot a few words remain."""
    places = np.sort(rng.random((4000, 300)).argsort(1)[:, :100], axis=1).ravel()
    counts = sp.csr_matrix((np.ones(len(places), np.int32), places, np.arange(0, len(places) + 1, 100)), (4000, 300))
    names, barcodes = np.arange(300).astype(str), np.arange(4000).astype(str)
    write_matrix(tmp_path / "m.h5", counts.toarray(), barcodes, names)

    def survey(memory):
        found = visium.read_matrix(tmp_path / "m.h5", memory)
        for span in visium.spans(found.counts, memory):
            gene_panels.profile(found.counts[span], found.genes)
        visium.counts_hash(found.counts, np.sort(found.barcodes), found.genes, memory)

    assert peak_bytes(survey, np.inf) > 8e6, "the control: all in memory"
    assert peak_bytes(survey, 2**20) < 4e6


def test_bins_need_little_beyond_the_tokens():
    counts, total = np.ones((20000, 200), np.int32), np.full(20000, 300.0)
    assert peak_bytes(gene_panels.bin_tokens, counts, total) < counts.size + 10e6 < counts.size * 8
