"""Gene names made unique, the two rules that choose panels, scBERT's bins, lists of genes, the panel file."""

import anndata
import numpy as np
import pytest
import scanpy
import scipy.sparse as sp
from spaceranger_folders import refused

from utils.slices import genes

# ---- names


def test_counts_of_one_name_are_summed():
    counts = sp.csr_matrix([[1, 2, 4, 8], [0, 1, 0, 3]])
    summed, names, n = genes.unique_genes(counts, np.array(["B", "A", "B", "C"]), {})
    assert names.tolist() == ["B", "A", "C"] and n == 1, "in the order of first appearance"
    assert summed.toarray().tolist() == [[5, 2, 8], [0, 1, 3]]
    assert summed.dtype == counts.dtype


def test_unique_names_are_left_alone():
    counts = sp.csr_matrix([[1, 2]])
    same, names, n = genes.unique_genes(counts, np.array(["B", "A"]), {})
    assert same is counts and names.tolist() == ["B", "A"] and n == 0


def test_ensembl_ids_become_the_symbols_that_another_slice_knows():
    symbols = genes.symbols_by_id(
        np.array(["TP53", "GAPDH", "ENSG3", "X"]), np.array(["ENSG1.4", "ENSMUSG2", "ENSG3", "not_an_id"])
    )
    assert symbols == {"ENSG1": "TP53", "ENSMUSG2": "GAPDH"}
    counts = sp.csr_matrix([[1, 2, 4, 8, 16]])
    names = np.array(["ENSG1", "ENSG1.7", "TP53", "ENSMUSG2.1", "ENSG9"])
    summed, mapped, n = genes.unique_genes(counts, names, symbols)
    assert mapped.tolist() == ["TP53", "GAPDH", "ENSG9"] and n == 2
    assert summed.toarray().tolist() == [[7, 8, 16]]


@pytest.mark.parametrize(("name", "is_one"), [("ENSG00000141510", True), ("ENSA", False), ("TP53", False)])
def test_a_symbol_may_begin_like_an_id(name, is_one):
    assert genes.is_ensembl(name) == is_one


def test_places_of_genes():
    assert genes.columns_of(np.array(["a", "b", "c"]), ["c", "x", "a"]).tolist() == [2, -1, 0]
    shared = genes.common_genes([np.array(["c", "a", "b"]), np.array(["b", "c", "d"])])
    assert shared == ["c", "b"], "in the order of the first slice"


# ---- the two rules


def test_highest_expressed_by_hand():
    """Mean over slices of the slice's total: e has the most counts and is not common; ties in the first one's order."""
    first = sp.csr_matrix([[1, 9, 0, 4], [2, 3, 3, 1]]), np.array(["a", "b", "c", "d"])  # totals 3, 12, 3, 5
    second = sp.csr_matrix([[3, 90, 0, 0, 9], [2, 9, 1, 5, 0]]), np.array(["a", "e", "b", "c", "d"])  # 5, 99, 1, 5, 9
    assert genes.highest_expressed([first, second], 4) == ["d", "b", "a", "c"]  # means 7, 6.5, 4, 4
    assert genes.highest_expressed([first, second], 1) == ["d"]
    assert genes.highest_expressed([second], 2) == ["e", "d"]


def test_each_slice_weighs_by_its_counts_not_by_its_spots():
    """One spot with a total of 10 beats a hundred spots with a total of 9."""
    few = sp.csr_matrix([[10, 0]]), np.array(["a", "b"])
    many = sp.csr_matrix(np.eye(100, 2, k=-50, dtype=int) * 9), np.array(["a", "b"])
    assert genes.highest_expressed([few, many], 1) == ["a"]


def noisy_slices(rng, n_genes=120):
    """Two slices, genes in another order and one of them alone in the second, a few much noisier than Poisson."""
    names = np.array([f"g{i}" for i in range(n_genes)])
    slices = []
    for i, n_spots in enumerate((60, 80)):
        rate = rng.gamma(np.linspace(0.05, 4, n_genes), 3.0, (n_spots, n_genes)) * rng.gamma(4, 0.3, (n_spots, 1))
        counts = rng.poisson(rate)
        order = np.arange(n_genes) if i == 0 else rng.permutation(n_genes)
        slices.append((sp.csr_matrix(counts[:, order]), names[order]))
    own = sp.hstack([slices[1][0], sp.csr_matrix(rng.poisson(50, (80, 1)))], format="csr")
    slices[1] = own, np.append(slices[1][1], "only_here")
    return slices


def test_highly_variable_genes_are_those_of_scanpy(rng):
    slices = noisy_slices(rng)
    blocks = []
    for counts, names in slices:
        adata = anndata.AnnData(counts.astype(np.float64))
        adata.var_names = names
        scanpy.pp.normalize_total(
            adata, target_sum=1e4
        )  # over all genes of the slice, before the common ones are taken
        scanpy.pp.log1p(adata)
        blocks.append(adata)
    both = anndata.concat(blocks, join="inner", label="slice", keys=["0", "1"], index_unique="-")
    scanpy.pp.highly_variable_genes(both, flavor="seurat", batch_key="slice", n_top_genes=30)
    expected = set(both.var_names[both.var["highly_variable"]])
    chosen = genes.highly_variable(slices, 30)
    assert set(chosen) == expected and len(chosen) == 30
    assert "only_here" not in chosen
    assert chosen == sorted(chosen, key=slices[0][1].tolist().index), "in the order of the first slice"


def test_fewer_common_genes_than_asked_for_are_all_taken(rng):
    slices = noisy_slices(rng)
    assert genes.highly_variable(slices, 120) == genes.common_genes([names for _, names in slices])


def test_an_empty_spot_does_no_harm(rng):
    counts, names = noisy_slices(rng)[0]
    emptied = sp.diags((np.arange(counts.shape[0]) != 3).astype(int)) @ counts
    assert len(genes.highly_variable([(emptied.tocsr(), names)], 10)) == 10


# ---- bins


def test_bins_by_hand():
    """floor(log2(1 + counts per 10,000)): 1 per 10,000 is the first that counts, 31 and more are all 5."""
    per_10k = np.array([[0, 0.99, 1, 2.99, 3, 7, 15, 30.99, 31, 63, 9999]])
    total = np.array([1e4])
    assert genes.bin_tokens(per_10k, total).tolist() == [[0, 0, 1, 1, 2, 3, 4, 4, 5, 5, 5]]


def test_bins_are_of_the_share_of_all_counts():
    counts = np.array([[3, 1, 0], [30, 10, 0]], np.int32)
    found = genes.bin_tokens(counts, np.array([1e4, 1e5]))
    assert found.tolist() == [[2, 1, 0], [2, 1, 0]] and found.dtype == np.uint8
    assert genes.bin_tokens(counts, np.array([1e5, 1e5])).tolist() == [[0, 0, 0], [2, 1, 0]]


# ---- lists of genes


@pytest.mark.parametrize(
    "text",
    [
        "TP53\nGAPDH\n",
        "\ufeff# from a paper\nTP53\r\n\r\n  GAPDH  \r\n",
        "TP53,ENSG1,0.5\nGAPDH,ENSG2,0.7",
        "TP53\tENSG1\nGAPDH\tENSG2\n",
    ],
)
def test_lists_of_genes(tmp_path, text):
    (tmp_path / "genes.txt").write_bytes(text.encode())
    assert genes.read_gene_list(tmp_path / "genes.txt") == ["TP53", "GAPDH"]
    assert genes.read_vocabulary(tmp_path / "genes.txt") == ["TP53", "GAPDH"]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "expected one gene per line, found none"),
        (b"# nothing\n\n  \n", "expected one gene per line, found none"),
        (b"A\nB\nA\nC\nB\n", r"2 genes stand twice \(first: A\)"),
        (b"\xff\xfe\x00A", "expected UTF-8 text"),
    ],
)
def test_bad_lists_of_genes(tmp_path, content, words):
    (tmp_path / "genes.txt").write_bytes(content)
    refused(f"genes.txt.*{words}", genes.read_gene_list, tmp_path / "genes.txt")


def test_a_missing_list_is_named(tmp_path):
    refused("genes.txt: expected a text file", genes.read_gene_list, tmp_path / "genes.txt")
    refused("genes.txt: expected a text file", genes.read_vocabulary, tmp_path / "genes.txt")


def test_a_vocabulary_may_be_the_genes_of_an_h5ad(tmp_path):
    adata = anndata.AnnData(np.zeros((1, 3), np.float32))
    adata.var_names = ["C", "A", "B"]
    adata.write_h5ad(tmp_path / "panglao.h5ad")
    assert genes.read_vocabulary(tmp_path / "panglao.h5ad") == ["C", "A", "B"]
    (tmp_path / "torn.h5ad").write_bytes((tmp_path / "panglao.h5ad").read_bytes()[:500])
    refused("torn.h5ad: expected an h5ad file", genes.read_vocabulary, tmp_path / "torn.h5ad")
    refused("none.h5ad: expected an h5ad file", genes.read_vocabulary, tmp_path / "none.h5ad")


# ---- the panel file


def test_where_a_panel_lies(tmp_path):
    name = "filtered_feature_bc_matrix_decoder.h5ad"
    assert genes.panel_path(tmp_path / "data", None, "A/outs", "target") == tmp_path / "data" / "A" / "outs" / name
    assert genes.panel_path(tmp_path / "data", tmp_path / "p", "A", "target") == tmp_path / "p" / "A" / name
    assert genes.panel_path(tmp_path, None, "A", "input").name == "filtered_feature_bc_matrix_one.h5ad"


def test_the_hash_of_a_panel_depends_on_its_order():
    assert genes.panel_hash(["a", "b"]) != genes.panel_hash(["b", "a"])


def test_a_missing_torn_or_foreign_panel_file_is_refused(tmp_path, prepared):
    path = genes.panel_path(prepared.data, prepared.panels, "P01_1", "target")
    assert len(genes.read_panel(path).genes) == 20
    refused("run make_decoder_data.py first", genes.read_panel, tmp_path / "none.h5ad")
    (tmp_path / "torn.h5ad").write_bytes(path.read_bytes()[:3000])
    refused("torn.h5ad: expected a file of make_decoder_data.py", genes.read_panel, tmp_path / "torn.h5ad")
    anndata.AnnData(np.zeros((1, 3), np.float32)).write_h5ad(tmp_path / "foreign.h5ad")
    refused("foreign.h5ad: expected a file of make_decoder_data.py", genes.read_panel, tmp_path / "foreign.h5ad")
