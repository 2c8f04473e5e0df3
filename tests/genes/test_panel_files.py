"""panels.py: counts gathered by name, scBERT's bins, the panel file."""

import anndata
import numpy as np
import scipy.sparse as sp
from spaceranger_folders import refused

from utils.genes import panels as gene_panels

# ---- names


def test_counts_of_one_name_are_summed_and_those_not_wanted_left_out():
    counts = sp.csr_matrix([[1, 2, 4, 8], [0, 1, 0, 3]], dtype=np.int32)
    found = counts @ gene_panels.gather(np.array(["B", "A", "B", "C"]), ["C", "none", "B"])
    assert found.toarray().tolist() == [[8, 0, 5], [3, 0, 0]]
    assert found.dtype == np.int32 and found.has_canonical_format


def test_places_of_genes():
    assert gene_panels.columns_of(np.array(["a", "b", "c"]), ["c", "x", "a"]).tolist() == [2, -1, 0]
    shared = gene_panels.common_genes([np.array(["c", "a", "b"]), np.array(["b", "c", "d"])])
    assert shared == ["c", "b"], "in the order of the first slice"


# ---- bins


def test_bins_by_hand():
    """floor(log2(1 + counts per 10,000)): 1 per 10,000 is the first that counts, 31 and more are all 5."""
    per_10k = np.array([[0, 0.99, 1, 2.99, 3, 7, 15, 30.99, 31, 63, 9999]])
    total = np.array([1e4])
    assert gene_panels.bin_tokens(per_10k, total).tolist() == [[0, 0, 1, 1, 2, 3, 4, 4, 5, 5, 5]]


def test_bins_are_of_the_share_of_all_counts():
    counts = np.array([[3, 1, 0], [30, 10, 0]], np.int32)
    found = gene_panels.bin_tokens(counts, np.array([1e4, 1e5]))
    assert found.tolist() == [[2, 1, 0], [2, 1, 0]] and found.dtype == np.uint8
    assert gene_panels.bin_tokens(counts, np.array([1e5, 1e5])).tolist() == [[0, 0, 0], [2, 1, 0]]


def test_bins_by_blocks_of_spots_are_those_of_the_whole_formula(rng):
    counts = rng.poisson(rng.gamma(0.2, 20, (3000, 301))).astype(np.int32)
    total = counts.sum(1) + rng.integers(1, 5000, 3000)
    expected = np.minimum(np.floor(np.log2(1 + counts * (1e4 / total[:, None]))), gene_panels.HIGHEST_BIN).astype(
        np.uint8
    )
    np.testing.assert_array_equal(gene_panels.bin_tokens(counts, total), expected)
    out = np.full((3002, 301), 9, np.uint8)
    given = gene_panels.bin_tokens(counts, total, out=out[1:-1])
    assert np.shares_memory(given, out) and (out[[0, -1]] == 9).all()
    np.testing.assert_array_equal(out[1:-1], expected)


def test_bins_of_no_spot_and_of_no_gene():
    assert gene_panels.bin_tokens(np.zeros((0, 3), np.int32), np.zeros(0)).shape == (0, 3)
    assert gene_panels.bin_tokens(np.zeros((3, 0), np.int32), np.ones(3)).shape == (3, 0)


# ---- lists of genes


# ---- the panel file


def test_where_a_panel_lies(tmp_path):
    name = "filtered_feature_bc_matrix_decoder.h5ad"
    assert (
        gene_panels.panel_path(tmp_path / "data", None, "A/outs", "target") == tmp_path / "data" / "A" / "outs" / name
    )
    assert gene_panels.panel_path(tmp_path / "data", tmp_path / "p", "A", "target") == tmp_path / "p" / "A" / name
    assert gene_panels.panel_path(tmp_path, None, "A", "input").name == "filtered_feature_bc_matrix_one.h5ad"


def test_the_hash_of_a_panel_depends_on_its_order():
    assert gene_panels.panel_hash(["a", "b"]) != gene_panels.panel_hash(["b", "a"])


def test_a_missing_torn_or_foreign_panel_file_is_refused(tmp_path, prepared):
    path = gene_panels.panel_path(prepared.data, prepared.panels, "P01_1", "target")
    assert len(gene_panels.read_panel(path).genes) == 20
    refused(
        "run make_decoder_data.py, or give the folder with --panels", gene_panels.read_panel, tmp_path / "none.h5ad"
    )
    (tmp_path / "corrupt.h5ad").write_bytes(path.read_bytes()[:3000])
    refused("corrupt.h5ad: expected a file of make_decoder_data.py", gene_panels.read_panel, tmp_path / "corrupt.h5ad")
    anndata.AnnData(np.zeros((1, 3), np.float32)).write_h5ad(tmp_path / "foreign.h5ad")
    refused("foreign.h5ad: expected a file of make_decoder_data.py", gene_panels.read_panel, tmp_path / "foreign.h5ad")
