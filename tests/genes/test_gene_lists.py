"""lists.py: lists of genes as editors, R, pandas and spreadsheets write them; hints about unknown names; gene2vec."""

import gzip
import shutil

import anndata
import numpy as np
import pandas as pd
import pytest
from spaceranger_folders import refused
from tiny_runs import Work, rewrite_matrix, write_matrix

from utils.genes import lists as gene_lists
from utils.genes import panels as gene_panels
from utils.slices import visium

THREE = ["TP53", "HLA-A", "RP11-34P13.7"]


def read(tmp_path, content):
    path = tmp_path / "genes.txt"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return gene_lists.read_gene_list(path)


TABLE = pd.DataFrame({"symbol": THREE, "logFC": [0.5, -1.25, 3e-9], "cell type": ["T cell", "B cell", "T cell"]})
LISTS = {
    "one per line": "TP53\nHLA-A\nRP11-34P13.7\n",
    "Windows, a byte order mark, comments": "\ufeff# of a paper\r\nTP53\r\n\r\n  HLA-A  # MHC\r\nRP11-34P13.7",
    "old Mac": "TP53\rHLA-A\rRP11-34P13.7\r",
    "comma": "TP53,HLA-A,RP11-34P13.7",
    "comma and space": "TP53, HLA-A, RP11-34P13.7,\n",
    "quotes around all": '"TP53, HLA-A, RP11-34P13.7"',
    "semicolon": "TP53;HLA-A; RP11-34P13.7;",
    "tab": "TP53\tHLA-A\tRP11-34P13.7\n",
    "space": "TP53 HLA-A  RP11-34P13.7",
    "quotes and commas": '"TP53","HLA-A","RP11-34P13.7"',
    "single quotes": "'TP53', 'HLA-A', 'RP11-34P13.7'",
    "quotes, one per line": '"TP53"\n"HLA-A"\n"RP11-34P13.7"\n',
    "single quotes, one per line": "'TP53'\n'HLA-A'\n'RP11-34P13.7'",
    "curly quotes and hyphens": "\u201cTP53\u201d, \u201cHLA\u2011A\u201d, \u201cRP11\u201334P13.7\u201d",
    "no-break and zero-width spaces": "TP53\u00a0\nHLA-A\u200b\n\u2009RP11-34P13.7",
    "commas at the ends of lines": "TP53,\nHLA-A,\nRP11-34P13.7\n",
    "wrapped lines": "TP53, HLA-A,\nRP11-34P13.7",
    "a list of Python": "['TP53', 'HLA-A', 'RP11-34P13.7']",
    "an assignment over lines": 'genes = [\n    "TP53",\n    "HLA-A",\n    "RP11-34P13.7",\n]\n',
    "a vector of R": 'genes <- c("TP53", "HLA-A",\n  "RP11-34P13.7")',
    "a heading": "Gene Symbol\nTP53\nHLA-A\nRP11-34P13.7",
    "the heading of R's vectors": '"x"\n"TP53"\n"HLA-A"\n"RP11-34P13.7"',
    "the heading of a series of pandas": "0\nTP53\nHLA-A\nRP11-34P13.7",
    "a quoted heading": '"gene"\n"TP53"\n"HLA-A"\n"RP11-34P13.7"',
    "a heading above one line": "genes\nTP53, HLA-A, RP11-34P13.7",
    "a heading in one line": "genes: TP53, HLA-A, RP11-34P13.7",
    "a table without heading": "TP53,ENSG1,0.5\nHLA-A,ENSG2,0.7\nRP11-34P13.7,ENSG3,1",
    "a table of words": "TP53\ttumor protein p53\nHLA-A\tMHC, class I, A\nRP11-34P13.7\tnovel transcript",
    "a table of words that repeat": "TP53;up\nHLA-A;down\nRP11-34P13.7;up",
    "a table with some cells empty": "TP53\t1\nHLA-A\nRP11-34P13.7\t2",
    "an unknown heading above numbers": "What,logFC\nTP53,0.5\nHLA-A,-1\nRP11-34P13.7,NA",
    "the gene in a later column": "chr\tstart\tgene_name\n17\t7661\tTP53\n6\t2994\tHLA-A\n1\t89\tRP11-34P13.7",
    "ids beside symbols": "gene_id\tgene_name\nENSG1\tTP53\nENSG2\tHLA-A\nENSG3\tRP11-34P13.7",
    "symbols before ids": "gene\tensembl_id\nTP53\tENSG1\nHLA-A\tENSG2\nRP11-34P13.7\tENSG3",
    "cells of a spreadsheet that keeps them text": '="TP53"\n="HLA-A"\n="RP11-34P13.7"',
    "indented": "\tTP53\n\tHLA-A\n\tRP11-34P13.7",
    "Unicode text of a spreadsheet": "gene\tp\r\nTP53\t0.1\r\nHLA-A\t0.2\r\nRP11-34P13.7\t0.3\r\n".encode("utf-16"),
    "the same, big-endian": b"\xfe\xff" + "TP53\nHLA-A\nRP11-34P13.7".encode("utf-16-be"),
    "Latin-1 in a comment": "# Müller\nTP53\nHLA-A\nRP11-34P13.7".encode("latin-1"),
    "pandas, series": pd.Series(THREE).to_csv(),
    "pandas, named series": pd.Series(THREE, name="Gene").to_csv(sep="\t"),
    "pandas, table": TABLE.to_csv(),
    "pandas, table without index": TABLE.to_csv(index=False),
    "pandas, the genes as index": TABLE.set_index("symbol").to_csv(),
    "pandas, the genes as index without a name": TABLE.set_index("symbol").rename_axis(None).to_csv(sep=";"),
    "pandas, no known heading": TABLE.set_axis(["what", "logFC", "cell type"], axis=1).to_csv(),
    "pandas, no heading": TABLE.to_csv(header=False),
    "R, write.csv of a vector": '"","x"\n"1","TP53"\n"2","HLA-A"\n"3","RP11-34P13.7"\n',
    "R, write.table of a vector": '"x"\n"1" "TP53"\n"2" "HLA-A"\n"3" "RP11-34P13.7"\n',
    "R, write.table of a data frame": '"gene" "p"\n"1" "TP53" 0.1\n"2" "HLA-A" 0.2\n"3" "RP11-34P13.7" NA\n',
    "R, row names": '"p" "q"\n"TP53" 0.1 1\n"HLA-A" 0.2 1e-9\n"RP11-34P13.7" 0.3 1\n',
    "R, row names, write.csv": '"","p"\n"TP53",0.1\n"HLA-A",0.2\n"RP11-34P13.7",0.3\n',
    "R, ids as row names": '"symbol"\n"ENSG1" "TP53"\n"ENSG2" "HLA-A"\n"ENSG3" "RP11-34P13.7"\n',
    "a heading of one column above two": "gene\nTP53\t0.5\nHLA-A\t1\nRP11-34P13.7\t2",
    "scanpy, ranked genes": "names,scores,logfoldchanges\nTP53,5.1,2\nHLA-A,4,1\nRP11-34P13.7,3,1",
    "DESeq2": '"","baseMean","log2FoldChange"\n"TP53",17,2\n"HLA-A",4,1\n"RP11-34P13.7",3,1',
}


@pytest.mark.parametrize("kind", LISTS)
def test_lists_of_three_genes(tmp_path, kind):
    assert read(tmp_path, LISTS[kind]) == THREE
    assert gene_lists.read_vocabulary(tmp_path / "genes.txt") == THREE


def test_lists_of_one_gene(tmp_path):
    for content in ("TP53", "TP53\n", "gene\nTP53\n", '"TP53"', "# a\nTP53 # b", "gene,p\nTP53,0.1", '"x"\n"1" "TP53"'):
        assert read(tmp_path, content) == ["TP53"]


def test_names_with_odd_characters_stay(tmp_path):
    names = ["Gt(ROSA)26Sor", "H2-K1", "si:dkey-1.1", "AL627309.1", "NA", "T", "7SK", "mt-Nd1", "ENSG00000141510.16"]
    for join in ("\n", ",", ", ", ";", "\t", " "):
        assert read(tmp_path, join.join(names)) == names
    assert read(tmp_path, "Gt(ROSA)26Sor") == ["Gt(ROSA)26Sor"]


def test_a_vocabulary_keeps_its_order_and_its_16906_names(tmp_path):
    names = [f"g{i}" for i in np.random.default_rng(0).permutation(16906)]
    assert read(tmp_path, "\n".join(names)) == names
    assert read(tmp_path, " ".join(names)) == names
    assert read(tmp_path, pd.Series(names).to_csv()) == names


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "expected one gene per line, found none"),
        (b"# nothing\n\n  \n", "expected one gene per line, found none"),
        (b"gene\n", "expected one gene per line, found none"),
        (b",,,\n", "expected one gene per line, found none"),
        (b"A\nB\nA\nC\nB\n", r"found 2 genes twice \(first: A\)"),
        (b"A,B,A", r"found 1 gene twice \(first: A\)"),
        (b"ENSG1.4\nENSG1.5\n", r"found 1 gene twice \(first: ENSG1\)"),
        (b"\xff\xfe\x00A", "expected gene names in ASCII letters, found"),
        ("TGF\u03b2".encode(), "expected gene names in ASCII letters, found TGF\u03b2"),
        (b"A\x00\x01B", "expected UTF-8 text .*found other bytes"),
        (b"PK\x03\x04rest", "found a workbook or archive; save it as text"),
        (gzip.compress(b"A\nB"), "found a packed file; save it as text"),
        (
            b"TP53,GAPDH\nACTB,KRT8\n",
            r"found lines of several names \(TP53, GAPDH, ...\) without a heading; put one on",
        ),
        (b"TP53 GAPDH\nACTB KRT8\n", "found lines of several names"),
        (b",n\n0,4\n1,5\n", "expected a column of genes, found numbers; head the column"),
        (b"id,gene\n1,TP53\n2,\n3,GAPDH\n", "expected a gene in each line, found none in 2; remove the line"),
    ],
    ids=range(16),
)
def test_lists_that_are_refused(tmp_path, content, words):
    refused(f"genes.txt: .*{words}", read, tmp_path, content)


def test_a_missing_list_is_named(tmp_path):
    refused("genes.txt: expected a text file", gene_lists.read_gene_list, tmp_path / "genes.txt")
    refused("genes.txt: expected a text file", gene_lists.read_vocabulary, tmp_path / "genes.txt")


# ---- vocabularies


def test_a_vocabulary_may_be_the_genes_of_an_h5ad(tmp_path):
    adata = anndata.AnnData(np.zeros((1, 3), np.float32))
    adata.var_names = ["C", "A", "B"]
    adata.write_h5ad(tmp_path / "panglao.h5ad")
    assert gene_lists.read_vocabulary(tmp_path / "panglao.h5ad") == ["C", "A", "B"]
    (tmp_path / "corrupt.h5ad").write_bytes((tmp_path / "panglao.h5ad").read_bytes()[:500])
    refused("corrupt.h5ad: expected an h5ad file", gene_lists.read_vocabulary, tmp_path / "corrupt.h5ad")
    refused("none.h5ad: expected an h5ad file", gene_lists.read_vocabulary, tmp_path / "none.h5ad")


@pytest.mark.filterwarnings("ignore:Variable names are not unique")
def test_a_vocabulary_may_have_a_heading_and_must_have_genes_once(tmp_path):
    (tmp_path / "v.tsv").write_text("Gene\tindex\nB\t0\nA\t1\n")
    assert gene_lists.read_vocabulary(tmp_path / "v.tsv") == ["B", "A"]
    for names, words in (([], "found none"), (["A", "B", "A"], r"found 1 gene twice \(first: A\)")):
        adata = anndata.AnnData(np.zeros((1, len(names)), np.float32))
        adata.var_names = names
        adata.write_h5ad(tmp_path / "v.h5ad")
        refused(f"v.h5ad.*{words}", gene_lists.read_vocabulary, tmp_path / "v.h5ad")


# ---- hints


SLICE = ["TP53", "ERBB2", "MARCHF1", "SEPT2", "TBCE", "C10orf10"]
MOUSE = ["Trp53", "Erbb2", "H2-K1", "1700001C02Rik"]


@pytest.mark.parametrize(
    ("unknown", "names", "hint"),
    [
        (["erbb2"], SLICE, "erbb2: did you mean ERBB2?"),
        (["NOSUCH", "Erbb2"], SLICE, "Erbb2: did you mean ERBB2?"),
        (["CD4", "ERBB2"], MOUSE, "ERBB2: did you mean Erbb2?"),
        (["C10ORF10"], SLICE, "C10ORF10: did you mean C10orf10?"),
        (["TBCE-1"], SLICE, "TBCE-1: did you mean TBCE?"),
        (["NOSUCH"], SLICE, ""),
        (["NKX2-1"], SLICE, ""),
    ],
)
def test_hints(unknown, names, hint):
    assert gene_lists.hint(unknown, names) == hint


# ---- lists of make_decoder_data.py


@pytest.fixture
def work(simulated, tmp_path):
    """The simulated slices without their images, with ids of genes; some genes are those of SLICE."""
    unread = shutil.ignore_patterns("*.jpg", "*.png", "truth.h5ad")
    data = shutil.copytree(simulated, tmp_path / "data", ignore=unread)
    others = [f"OTHER{i}" for i in range(60 - len(SLICE))]
    for folder in data.glob("P*"):
        rewrite_matrix(folder, lambda counts, barcodes, names: (counts, barcodes, [*SLICE, *others]))
    return Work(data, tmp_path / "tiles", tmp_path / "panels", tmp_path)


def make_panels(work, text, flag="--target_genes"):
    (work.out / "genes.txt").write_text(text)
    work.run("make_decoder_data", flag, work.out / "genes.txt")
    role = "target" if flag == "--target_genes" else "input"
    return gene_panels.read_panel(gene_panels.panel_path(work.data, work.panels, "P01_1", role))


@pytest.mark.parametrize("flag", ["--target_genes", "--input_genes"])
def test_a_list_on_one_line_is_the_panel(work, flag):
    panel = make_panels(work, '"ERBB2"; "TBCE"; "TP53"', flag)
    assert panel.genes == ["ERBB2", "TBCE", "TP53"]
    found = visium.read_slice(work.data / "P01_1").counts.toarray()
    np.testing.assert_array_equal(panel.read_counts(), found[:, [1, 4, 0]])


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("erbb2\nTP53", r"found 1 of 2 in none \(erbb2, ...\); erbb2: did you mean ERBB2\?"),
        ("Erbb2\nTp53", r"found 2 of 2 in none .*Erbb2: did you mean ERBB2\?"),
        ("HER2", "remove them, or name a table of aliases with --gene_aliases"),
    ],
)
def test_an_unknown_gene_is_refused_with_a_hint(work, text, words):
    refused(f"genes.txt: .*{words}", make_panels, work, text)
    assert not work.panels.exists()


def test_listed_ids_with_versions_are_the_slices_genes(work):
    """The slices' features have ids without versions; the panel is called as the list calls it."""
    for folder in work.data.glob("P*"):
        path = folder / "filtered_feature_bc_matrix.h5"
        with_ids(path)
    panel = make_panels(work, "ENSG00000000001.7\nENSG00000000004\n")
    found = visium.read_slice(work.data / "P01_1").counts.toarray()
    np.testing.assert_array_equal(panel.read_counts(), found[:, [1, 4]])
    assert panel.read_counts().sum() > 0 and panel.measured.all()


def with_ids(path):
    found = visium.read_matrix(path)
    path.unlink()
    ids = [f"ENSG{i:011d}" for i in range(len(found.genes))]
    write_matrix(path, found.counts.toarray(), found.barcodes, found.genes, ids)


def test_slices_named_by_ids_of_other_versions_have_genes_in_common(work):
    counts = {}
    for version, folder in enumerate(sorted(work.data.glob("P*"))):
        path = folder / "filtered_feature_bc_matrix.h5"
        found = visium.read_matrix(path)
        path.unlink()
        ids = [f"ENSG{i:011d}.{version + 1}" for i in range(len(found.genes))]
        write_matrix(path, found.counts.toarray(), found.barcodes, ids, ids)
        counts[folder.name] = found.counts.toarray()
    work.run("make_decoder_data", "--n_top_genes", 60, "--n_input_genes", 60)
    for name, expected in counts.items():
        panel = gene_panels.read_panel(gene_panels.panel_path(work.data, work.panels, name, "input"))
        assert panel.genes == [f"ENSG{i:011d}" for i in range(60)]
        np.testing.assert_array_equal(panel.read_counts(), expected)


# ---- gene2vec


@pytest.mark.parametrize("heading", ["", "2 3\n"])
def test_gene2vec_of_text_names_its_genes(tmp_path, heading):
    (tmp_path / "g.txt").write_text(heading + "TP53\t0.5 -1 2e-1 \nGAPDH\t1 2 3 \n")
    names, table = gene_lists.read_gene2vec(tmp_path / "g.txt")
    assert names == ["TP53", "GAPDH"]
    np.testing.assert_array_equal(table, np.array([[0.5, -1, 0.2], [1, 2, 3]], np.float32))


def test_gene2vec_of_an_array_does_not(tmp_path):
    rows = np.random.default_rng(0).standard_normal((5, 4))
    np.save(tmp_path / "g.npy", rows)
    names, table = gene_lists.read_gene2vec(tmp_path / "g.npy")
    assert names is None
    np.testing.assert_array_equal(table, rows)


def save_objects(path):
    np.save(path, np.array([{"a": 1}], object), allow_pickle=True)


def save_archive(path):
    with path.open("wb") as file:
        np.savez(file, a=np.zeros(3))


@pytest.mark.parametrize(
    ("name", "write", "words"),
    [
        ("g.npy", lambda path: path.write_bytes(b"\x93NUMPY\x01\x00torn"), "expected an .npy table, or .txt lines"),
        ("g.npy", save_objects, "Object arrays cannot be loaded"),
        ("g.npy", save_archive, "expected a row of numbers per gene, found an archive"),
        ("g.npy", lambda path: np.save(path, np.zeros(3)), r"found float64 of shape \(3,\)"),
        ("g.npy", lambda path: np.save(path, np.zeros((3, 2), int)), r"found int64 of shape \(3, 2\)"),
        ("g.txt", lambda path: path.write_text(""), "found no gene"),
        ("g.txt", lambda path: path.write_text("just\nnames\n"), "found just"),
        ("g.txt", lambda path: path.write_text("A 1 2\nB 1\n"), "B with 1 numbers, A with 2"),
        ("g.txt", lambda path: path.write_text("A 1 2\nB 1 x\n"), "could not convert string to float: 'x'"),
        ("g.txt", lambda path: path.write_text("A 1 2\nA 1 3\n"), "found A twice"),
    ],
)
def test_a_wrong_gene2vec_is_refused(tmp_path, name, write, words):
    write(tmp_path / name)
    refused(f"--gene2vec: .*{name}: .*{words}", gene_lists.read_gene2vec, tmp_path / name)
