"""names.py: symbols made unique by anndata, R and others get their repeated name back, and nothing else changes."""

import gzip
import shutil

import anndata
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from spaceranger_folders import refused
from tiny_runs import Work, write_matrix

from utils.genes import names as gene_names
from utils.genes import panels as gene_panels
from utils.slices import visium


def merged(names, ids=None, symbols=None):
    found = gene_names.without_unique_suffixes(np.array(names), None if ids is None else np.array(ids), symbols)
    return found.tolist()


# ---- one file


@pytest.mark.parametrize("mark", ["-", ".", "_"])
def test_numbered_copies_beside_their_symbol_are_that_symbol(mark):
    names = ["A", "TBCE", f"TBCE{mark}1", "HSPA14", f"HSPA14{mark}2", f"HSPA14{mark}1", "B"]
    assert merged(names) == ["A", "TBCE", "TBCE", "HSPA14", "HSPA14", "HSPA14", "B"]
    assert merged(names, ids=names) == merged(names), "names that stand for ids say nothing"


@pytest.mark.parametrize(
    "names",
    [
        ["NKX2-1", "NKX2-2", "A"],
        ["HLA-A", "HLA-DRB1", "HLA-DRB5"],
        ["KRTAP5-1", "KRTAP5-2", "ERVK3-1", "ERVW-1"],
        ["MIR3648-1", "MIR3648-2", "MIR3648"],
        ["Krtap13", "Krtap13-1"],
        ["IGHV1-69", "IGHV1-69-2", "IGHV3-30", "IGHV3-30-3"],
        ["Ighv1-62", "Ighv1-62-1", "Ighv1-62-2", "Ighv1-62-3"],
        ["SNORD115", "SNORD115-1", "RNU6", "RNU6-1", "NKX2", "NKX2-1", "H1", "H1-1"],
        ["AL627309.1", "AL627309.2", "AL627309.3"],
        ["AC000000", "AC000000.1", "AC000000.2", "RP11-34P13", "RP11-34P13.1", "RP11-34P13.7"],
        ["ENSG00000141510", "ENSG00000141510.1", "ENSG00000141510.16"],
        ["TBCE-1", "A"],
        ["TBCE", "TBCE-2"],
        ["TBCE", "TBCE-1", "TBCE-3"],
        ["TBCE", "TBCE-0", "TBCE-01", "TBCE-AS1", "TBCE1"],
        ["TRAF3IP2", "TRAF3IP2-AS1", "HOXA10", "HOXA10-AS"],
        ["A", "A", "TBCE", "TBCE-1"],
    ],
    ids=[
        *("no symbol without number", "HLA", "families", "microRNAs", "a gene of the mouse", "human antibodies"),
        *("antibodies of the mouse", "further families", "clones", "clones without version", "versions of an id"),
        *("the symbol is not there", "the first number is not there", "a gap", "other endings", "antisense"),
        "another name repeats: none was made unique",
    ],
)
def test_symbols_of_their_own_stay(names):
    assert merged(names) == names
    assert merged(names[::-1]) == names[::-1]


def test_copies_of_a_clone_are_that_clone():
    assert merged(["AL627309.1", "AL627309.2", "AL627309.1-1"]) == ["AL627309.1", "AL627309.2", "AL627309.1"]
    assert merged(["AL627309.1", "AL627309.2", "AL627309.1.1"]) == ["AL627309.1", "AL627309.2", "AL627309.1"]
    assert merged(["RP11-34P13.7", "RP11-34P13.7-1"]) == ["RP11-34P13.7", "RP11-34P13.7"]


def test_an_id_behind_the_symbol_is_taken_away():
    names = ["TBCE_ENSG00000284770", "TBCE_ENSG00000116957.13", "H2-K1-ENSMUSG00000061232", "Y_RNA", "ENSG00000284770"]
    assert merged(names) == ["TBCE", "TBCE", "H2-K1", "Y_RNA", "ENSG00000284770"]


IDS = ["ENSG00000284770", "ENSG00000116957"]


def test_ids_that_other_tables_know_decide():
    names = ["TBCE", "TBCE-1"]
    assert merged(names, IDS) == ["TBCE", "TBCE"]
    assert merged(names, IDS, {IDS[1]: "TBCE"}) == ["TBCE", "TBCE"]
    assert merged(names, IDS, {IDS[1]: "TBCE-1"}) == names
    assert merged(names, [IDS[0], f"{IDS[1]}.13"], {IDS[1]: "TBCE-1"}) == names
    assert merged(names, IDS, {IDS[0]: "TBCE-1"}) == ["TBCE", "TBCE"], "of another feature"
    assert merged(["MIR3648", "MIR3648-1"], IDS, {IDS[1]: "MIR3648"}) == ["MIR3648", "MIR3648"]
    assert merged(["A", "TBCE-4"], IDS, {IDS[1]: "TBCE"}) == ["A", "TBCE"]


def test_ids_that_are_the_symbols_of_the_source_decide():
    assert merged(["TBCE", "TBCE-3"], ["TBCE", "TBCE"]) == ["TBCE", "TBCE"]
    assert merged(["KRTAP5", "KRTAP5-1"], ["ENSG1", "ENSG1.2"]) == ["KRTAP5", "KRTAP5"]
    assert merged(["KRTAP5", "KRTAP5-1"], ["nan", "nan"]) == ["KRTAP5", "KRTAP5-1"], "an id that is none"


@given(st.lists(st.sampled_from(["TBCE", "MATR3", "GAPDH", "AL627309.1", "HLA-A", "NKX2-1"]), min_size=1, max_size=12))
@pytest.mark.filterwarnings("ignore")
def test_what_anndata_makes_unique_comes_back(names):
    adata = anndata.AnnData(np.zeros((1, len(names)), np.float32))
    adata.var_names = names
    adata.var_names_make_unique()
    assert merged(adata.var_names) == names


@pytest.mark.realdata
@pytest.mark.filterwarnings("ignore:Variable names are not unique")
def test_real_tables_come_back(real_data):
    """Symbols of Visium's reference made unique by R; a mouse table, whose Krtap13-1 is a gene, by anndata."""
    path = real_data / "visium_1142243F" / "feature_lists" / "features.tsv.gz"
    names = gzip.decompress(path.read_bytes()).decode().split()
    found = merged(names)
    assert sorted(name for name, old in zip(names, found, strict=True) if name != old) == [
        *("CYB561D2.1", "GGT1.1", "GOLGA8M.1", "HSPA14.1", "LINC01238.1", "MATR3.1", "TBCE.1", "TMSB15B.1")
    ]
    path = real_data / "spaceranger_samples" / "mouse_embryo_3.0.0" / "filtered_feature_bc_matrix" / "features.tsv.gz"
    names = [line.split("\t")[1] for line in gzip.decompress(path.read_bytes()).decode().splitlines()]
    adata = anndata.AnnData(np.zeros((1, len(names)), np.float32))
    adata.var_names = names
    adata.var_names_make_unique()
    assert len(set(names)) == len(names) - 11 and merged(adata.var_names) == names


# ---- several slices

FEATURES = (["TBCE", "A", "TBCE"], ["ENSG1", "ENSG2", "ENSG3"]), (["TBCE", "A", "TBCE-1"], ["s1", "s2", "s3"])


def agreed(features):
    features = [(np.array(names), np.array(ids)) for names, ids in features]
    names = gene_names.slice_names(features)
    return [names.agreed(*feature).tolist() for feature in features]


def test_slices_agree_by_a_symbol_that_repeats_in_one():
    assert agreed(FEATURES) == [["TBCE", "A", "TBCE"]] * 2
    assert agreed(FEATURES[::-1]) == [["TBCE", "A", "TBCE"]] * 2
    assert agreed([FEATURES[1], FEATURES[1]]) == [["TBCE", "A", "TBCE-1"]] * 2, "each as it stands"
    more = ["TBCE", "TBCE-1", "TBCE-2"], ["s1", "s2", "s3"]
    assert agreed([FEATURES[0], more])[1] == ["TBCE", "TBCE", "TBCE-2"], "it repeats once"
    without = ["A", "TBCE-1"], ["s1", "s2"]
    assert agreed([FEATURES[0], without])[1] == ["A", "TBCE-1"]
    its_own = ["TBCE", "TBCE", "TBCE-1"], ["s1", "s2", "s3"]
    assert agreed([its_own, more]) == [its_own[0], more[0]]


def test_slices_agree_by_ids():
    one, other = (["TBCE", "TBCE-1"], ["ENSG1", "ENSG3.5"]), (["TBCE", "A"], ["ENSG3", "ENSG2"])
    assert agreed([one, other]) == [["TBCE", "TBCE"], ["TBCE", "A"]]
    assert agreed([other, one]) == [["TBCE", "A"], ["TBCE", "TBCE"]]
    by_id = ["ENSG3.7", "ENSG1"], ["ENSG3.7", "ENSG1"]
    assert agreed([one, other, by_id])[2] == ["TBCE", "TBCE"]


# ---- panels


@pytest.fixture
def work(simulated, tmp_path):
    """Three slices in whose first two a symbol stands twice; the last has the same counts under unique names."""
    unread = shutil.ignore_patterns("*.jpg", "*.png", "truth.h5ad")
    data = shutil.copytree(simulated, tmp_path / "data", ignore=unread)
    for name in ("P01_1", "P02_1", "P03_1"):
        path = data / name / "filtered_feature_bc_matrix.h5"
        found = visium.read_matrix(path)
        names = found.genes.tolist()
        names[5], names[6] = "TBCE", "TBCE-1" if name == "P03_1" else "TBCE"
        path.unlink()
        write_matrix(path, found.counts.toarray(), found.barcodes, names)
    (data / "slices.csv").write_text("slice,patient,part\nP01_1,P01,train\nP02_1,P02,train\nP03_1,P03,test\n")
    return Work(data, tmp_path / "tiles", tmp_path / "panels", tmp_path)


def test_a_panel_does_not_depend_on_names_made_unique(work, tmp_path):
    (tmp_path / "genes.txt").write_text("TBCE\n")
    work.run("make_decoder_data", "--target_genes", tmp_path / "genes.txt")
    for name in ("P01_1", "P02_1", "P03_1"):
        panel = gene_panels.read_panel(gene_panels.panel_path(work.data, work.panels, name, "target"))
        expected = visium.read_slice(work.data / name).counts[:, [5, 6]].sum(1)
        np.testing.assert_array_equal(panel.read_counts(), expected)
        assert panel.read_counts().sum() > 0


def test_a_listed_name_with_a_suffix_gets_a_hint(work, tmp_path):
    (tmp_path / "genes.txt").write_text("TBCE-1\n")
    words = r"genes.txt: .* found 1 of 1 in none \(TBCE-1, ...\); TBCE-1: did you mean TBCE\?"
    refused(words, work.run, "make_decoder_data", "--target_genes", tmp_path / "genes.txt")
