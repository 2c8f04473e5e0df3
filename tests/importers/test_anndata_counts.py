"""Which matrix of an AnnData is taken as counts, what its genes are called, and what is no gene."""

import anndata
import numpy as np
import pandas as pd
import pytest
from scipy.sparse import csc_matrix, csr_matrix
from spaceranger_folders import refused

from utils.importers import anndata_counts
from utils.importers.anndata_counts import gene_names, read_counts

TRUE = np.array([[0, 3, 1, 0], [2, 0, 0, 5], [0, 4, 0, 7]])
GENES, IDS = ["A", "B", "C", "D"], [f"ENSG0000000000{i}" for i in range(4)]


def adata_of(x, raw=None, var=GENES, **layers):
    found = anndata.AnnData(None if x is None else np.asarray(x, np.float32), var=pd.DataFrame(index=var), shape=None)
    for name, values in layers.items():
        found.layers[name] = np.asarray(values, np.float32)
    if raw is not None:
        found.raw = anndata.AnnData(np.asarray(raw, np.float32), obs=found.obs, var=pd.DataFrame(index=GENES))
    return found


LOG, ONES, ZEROS = np.log1p(TRUE), TRUE > 0, np.zeros_like(TRUE)
FEWER = TRUE.copy()
FEWER[0, 1] = 2  # counts that were corrected


@pytest.mark.parametrize(
    ("adata", "where"),
    [
        (adata_of(TRUE), "X"),
        (adata_of(LOG, counts=TRUE), "layers['counts']"),
        (adata_of(LOG, raw_counts=TRUE), "layers['raw_counts']"),
        (adata_of(LOG, UMIs=TRUE), "layers['UMIs']"),
        (adata_of(LOG, raw=TRUE), "raw.X"),
        (adata_of(ONES, counts=TRUE), "layers['counts']"),
        (adata_of(ZEROS, raw=TRUE), "raw.X"),
        (adata_of(LOG, counts=TRUE, raw=LOG), "layers['counts']"),
        (adata_of(FEWER, counts=TRUE), "layers['counts']"),  # of one size: the layer of that name,
        (adata_of(FEWER, raw=TRUE), "raw.X"),  # else raw
        (adata_of(TRUE[:, :2], raw=TRUE, var=GENES[:2]), "raw.X"),  # the most genes
        (adata_of(TRUE[:, :2], raw=TRUE, var=GENES[:2], counts=TRUE[:, :2]), "raw.X"),
        (adata_of(TRUE, spliced=FEWER), "X"),
        (adata_of(TRUE, soupx_counts=FEWER), "X"),
    ],
)
def test_the_matrix_of_counts_with_most_genes(adata, where):
    found = read_counts("a.h5ad", adata)
    np.testing.assert_array_equal(found.counts.toarray(), TRUE)
    assert found.counts.dtype == np.int32 and found.genes.tolist() == GENES
    assert found.notes == ([] if where == "X" else [f"counts of {where}"]) and not found.warnings


@pytest.mark.parametrize("form", [csr_matrix, csc_matrix, np.asarray, lambda x: x.astype(np.uint16)])
def test_any_form_of_matrix_and_the_source_stays(form):
    adata = anndata.AnnData(form(TRUE), var=pd.DataFrame(index=GENES))
    np.testing.assert_array_equal(read_counts("x", adata).counts.toarray(), TRUE)
    left = adata.X if isinstance(adata.X, np.ndarray) else adata.X.toarray()
    np.testing.assert_array_equal(left, TRUE)


@pytest.mark.parametrize(
    ("adata", "found"),
    [
        (adata_of(LOG), r"found X with fractions \(1.38629\); save them as layers"),
        (adata_of(LOG - 1, raw=LOG), r"raw.X with fractions .*, X with negative numbers \(-1\)"),
        (adata_of(ZEROS), "X with zeros only"),
        (adata_of(ONES), "X with 0 and 1 only"),
        (adata_of(LOG, counts=ONES), r"layers\['counts'\] with 0 and 1 only, X with fractions"),
        (adata_of(np.where(TRUE == 3, np.nan, TRUE)), r"X with NaN \(nan\)"),
        (adata_of(np.where(TRUE == 3, np.inf, TRUE)), "X with numbers too large for counts"),
        (adata_of(LOG, spliced=TRUE), r"if layers\['spliced'\] holds them, name it layers\['counts'\]"),
    ],
)
def test_what_holds_no_counts_is_refused_and_named(adata, found):
    refused(f"a.h5ad: expected raw counts .* {found}", read_counts, "a.h5ad", adata)


@pytest.mark.parametrize("form", [csr_matrix, csc_matrix])
@pytest.mark.parametrize("part", ["indices", "data", "indptr"])
def test_a_damaged_matrix_is_refused(form, part):
    adata = anndata.AnnData(form(TRUE), var=pd.DataFrame(index=GENES))
    values = getattr(adata.X, part)
    setattr(adata.X, part, np.append(values[:-1], 10**6) if part == "indices" else values[:-1])
    refused("a.h5ad: expected a matrix in X, found", read_counts, "a.h5ad", adata)


def test_names_of_layers_that_say_counts_and_nothing_else():
    taken = ["counts", "count", "raw", "raw_counts", "counts_raw", "UMI", "X_counts", "rawcounts", "integer counts"]
    left = [
        "normalized_counts",
        "log_counts",
        "spliced",
        "unspliced",
        "counts_unspliced",
        "soupx_counts",
        "scaled",
        "x",
    ]
    left += ["data", "lognorm", "corrected_counts", "decontX_counts", "ambiguous"]
    assert all(map(anndata_counts.is_named_counts, taken)) and not any(map(anndata_counts.is_named_counts, left))


def test_a_subset_of_the_genes_is_said():
    found = read_counts("x", adata_of(TRUE[:, :2], raw=LOG, var=GENES[:2]))
    assert found.counts.shape == (3, 2) and found.warnings[0].startswith("2 of 4 genes: X holds counts of these only")
    adata = adata_of(TRUE)
    adata.var["highly_variable"] = [True, True, True, False]
    assert not read_counts("x", adata).warnings
    chosen = adata[:, :3].copy()
    assert "all 3 genes are marked highly variable" in read_counts("x", chosen).warnings[0]


@pytest.mark.parametrize("column", ["total_counts", "n_counts", "nCount_Spatial"])
def test_totals_that_contradict_the_counts_are_said(column):
    adata = adata_of(TRUE)
    adata.obs[column] = TRUE.sum(1)
    assert not read_counts("x", adata).warnings
    (line,) = read_counts("x", adata[:, 1:].copy()).warnings
    assert line == f"obs['{column}'] sums to 22 counts and X to 20; a subset of the genes was kept"
    adata.obs[column] = [1, 1, 1]
    assert read_counts("x", adata).warnings[0].endswith("3 counts and X to 22; the column is of another matrix")


def named(index, **columns):
    return pd.DataFrame(columns, index=[str(name) for name in index])


VERSIONS = [f"{gene_id}.7" for gene_id in IDS]
ENTREZ = [7157, 672, 675, 1956]


@pytest.mark.parametrize(
    ("var", "genes", "ids"),
    [
        (named(GENES), GENES, GENES),
        (named(GENES, gene_ids=IDS), GENES, IDS),
        (named(GENES, gene_ids=IDS, symbol=["other"] * 4), GENES, IDS),
        *((named(IDS, **{column: GENES}), GENES, IDS) for column in ("feature_name", "gene_name", "gene_names")),
        *((named(IDS, **{column: GENES}), GENES, IDS) for column in ("symbol", "symbols", "SYMBOL", "hgnc_symbol")),
        *((named(IDS, **{column: GENES}), GENES, IDS) for column in ("gene_symbol", "gene_symbols", "gene", "name")),
        (named(IDS, **{"Gene Symbol": pd.Categorical(GENES)}), GENES, IDS),
        (named(VERSIONS, gene_name=GENES), GENES, VERSIONS),
        (named(VERSIONS), VERSIONS, VERSIONS),
        (named(IDS, feature_name=["A", None, "", np.nan]), ["A", *IDS[1:]], IDS),
        (named(IDS, gene_name=["A", "", "", ""], symbol=GENES), GENES, IDS),
        (named(IDS, name=["tumour protein", "a kinase", "a b", "c d"], symbol=GENES), GENES, IDS),
        (named(IDS, gene_name=IDS, symbol=GENES), GENES, IDS),
        (named(range(4), gene_symbols=GENES, gene_ids=IDS), GENES, IDS),
        (named(range(4), gene=GENES), GENES, GENES),
        (named(range(4), gene_ids=IDS), IDS, IDS),
        (named(ENTREZ, symbol=GENES), GENES, [str(i) for i in ENTREZ]),
        (named(["A", "ENSG00000000001", "C", "D"], gene_ids=IDS), ["A", IDS[1], "C", "D"], IDS),
        (named(["TBCE", "TBCE-1", "C", "NKX2-1"], gene_ids=IDS), ["TBCE", "TBCE", "C", "NKX2-1"], IDS),
        (named(IDS, feature_name=["A", "B", f"B_{IDS[2]}", "D"]), ["A", "B", "B", "D"], IDS),
        *((named(IDS, **{column: GENES}), GENES, IDS) for column in ("feature", "original_gene_symbols", "symbol-0")),
        (named(IDS, alias_symbol=GENES, prev_symbols=GENES), IDS, IDS),
        (named(IDS, symbol_source=["HGNC"] * 4, has_symbol=[True] * 4), IDS, IDS),
        (named(IDS, gene_name=["A", "B", "", "D"], human_symbol=GENES), ["A", "B", IDS[2], "D"], IDS),
        (named(IDS, gene_name=["A", "nan", "None", "-"]), ["A", *IDS[1:]], IDS),
        (named(["A", "nan", "nan-1", "NA"], gene_ids=IDS), ["A", *IDS[1:]], IDS),  # missing symbols, made unique
        (named(range(1, 5), gene_symbols=GENES, gene_ids=IDS), GENES, IDS),
    ],
)
def test_names_and_ids(var, genes, ids):
    assert [found.tolist() for found in gene_names("x", var)] == [genes, ids]


def test_numbers_are_no_names():
    refused("a.h5ad: expected gene names in var, found the numbers 0, 1, 2", gene_names, "a.h5ad", named(range(4)))
    refused("a.h5ad: expected gene names in var, found the numbers 1, 2, 3", gene_names, "a.h5ad", named(range(1, 5)))


def test_genes_without_any_name_are_refused():
    var = named(["A", "", "C", "D"])
    refused("a.h5ad: expected a name or an id for each gene, found 1 without; name them", gene_names, "a.h5ad", var)
    assert gene_names("x", var.assign(gene_ids=IDS))[0].tolist() == ["A", IDS[1], "C", "D"]


def test_raw_takes_the_symbols_that_only_var_has():
    adata = adata_of(LOG[:, :3], var=IDS[:3])
    adata.var["feature_name"] = GENES[:3]
    adata.raw = anndata.AnnData(TRUE.astype(np.float32), obs=adata.obs, var=pd.DataFrame(index=IDS))
    found = read_counts("x", adata)
    assert found.genes.tolist() == [*GENES[:3], IDS[3]] and found.gene_ids.tolist() == IDS


def test_what_is_no_gene_is_left_out_and_counted():
    adata = adata_of(TRUE)
    adata.var["feature_types"] = ["Gene Expression", "Antibody Capture", "Gene Expression", "Gene Expression"]
    found = read_counts("x", adata)
    assert found.genes.tolist() == ["A", "C", "D"] and found.notes == ["1 features that are no genes left out"]
    adata.var = pd.DataFrame({"feature_biotype": ["gene", "gene", "spike-in", "gene"]}, index=GENES)
    assert read_counts("x", adata).genes.tolist() == ["A", "B", "D"]
