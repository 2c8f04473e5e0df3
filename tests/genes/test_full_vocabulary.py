"""make_decoder_data.py --full_vocabulary: a whole vocabulary as input, some of whose genes no slice has."""

import shutil

import anndata
import numpy as np
import pytest
from spaceranger_folders import refused
from tiny_runs import Work, rewrite_matrix

from utils.genes import panels as gene_panels
from utils.slices import visium


@pytest.fixture
def work(simulated, tmp_path):
    """The simulated slices without their images: two to train, one to test."""
    unread = shutil.ignore_patterns("*.jpg", "*.png", "truth.h5ad")
    data = shutil.copytree(simulated, tmp_path / "data", ignore=unread)
    (data / "slices.csv").write_text("slice,patient,part\nP01_1,P01,train\nP02_1,P02,train\nP03_1,P03,test\n")
    return Work(data, tmp_path / "tiles", tmp_path / "panels", tmp_path)


def input_panel(work, name):
    return gene_panels.read_panel(gene_panels.panel_path(work.data, work.panels, name, "input"))


def counts_of(work, name):
    source = visium.read_slice(work.data / name)
    return dict(zip(source.genes, source.counts.toarray().T, strict=True))


def test_a_whole_vocabulary_with_absent_genes_is_the_input(work, tmp_path, capsys):
    own = visium.read_matrix(work.data / "P01_1").genes.tolist()
    old = {own[4]: "C10orf10", own[9]: "FIG-1"}  # what the vocabulary calls two of the genes
    vocabulary = ["ABSENT1", *(old.get(name, name) for name in reversed(own)), "ABSENT2"]
    (tmp_path / "vocabulary.tsv").write_text("gene\n" + "\n".join(vocabulary))
    lines = [f"{name}\t{other}\n" for name, other in old.items()]
    (tmp_path / "hgnc.txt").write_text("symbol\tprev_symbol\n" + "".join(lines))
    rewrite_matrix(work.data / "P03_1", lambda c, b, names: (c, b, [old.get(name, name) for name in names]))
    flags = "--input_genes", tmp_path / "vocabulary.tsv", "--full_vocabulary", "--gene_aliases", tmp_path / "hgnc.txt"
    work.run("make_decoder_data", *flags)
    said = capsys.readouterr().out
    assert "60 of 62 genes are in a train slice, 58 exact, 2 by alias, 0 by id\n" in said
    assert "vocabulary.tsv: 2 genes are in none and read as zero\n" in said
    for name in ("P01_1", "P02_1", "P03_1"):
        panel, counts = input_panel(work, name), counts_of(work, name)
        assert panel.genes == vocabulary
        assert panel.measured.tolist() == [False, *[True] * 60, False]
        for gene, column in zip(vocabulary, panel.read_counts().T, strict=True):
            own_name = {new: name for name, new in old.items()}.get(gene, gene)
            expected = counts.get(gene, counts.get(own_name, np.zeros(70)))
            np.testing.assert_array_equal(column, expected)


def test_a_whole_vocabulary_may_be_an_h5ad_but_must_be_of_this_species(work, tmp_path, capsys):
    own = visium.read_matrix(work.data / "P01_1").genes.tolist()
    for n_others, passes in ((60, True), (61, False)):
        adata = anndata.AnnData(np.zeros((1, 60 + n_others), np.float32))
        adata.var_names = [*own, *(f"other{i}" for i in range(n_others))]
        adata.write_h5ad(tmp_path / "v.h5ad")
        flags = "--input_genes", tmp_path / "v.h5ad", "--full_vocabulary"
        if passes:
            work.run("make_decoder_data", *flags)
            assert "60 of 120 genes are in a train slice" in capsys.readouterr().out
        else:
            words = "--input_genes .*v.h5ad: 60 of 121 genes found, expected half at least .*not found: other0"
            refused(words, work.run, "make_decoder_data", *flags)


def test_without_the_flag_an_absent_gene_is_an_error_as_before(work, tmp_path):
    own = visium.read_matrix(work.data / "P01_1").genes.tolist()
    (tmp_path / "list.txt").write_text("\n".join([*own, "ABSENT"]))
    refused("found 1 of 61 in none", work.run, "make_decoder_data", "--input_genes", tmp_path / "list.txt")
    targets = "--target_genes", tmp_path / "list.txt", "--input_genes", tmp_path / "list.txt", "--full_vocabulary"
    refused("found 1 of 61 in none", work.run, "make_decoder_data", *targets)
    refused("--full_vocabulary: expected --input_genes", work.run, "make_decoder_data", "--full_vocabulary")


@pytest.mark.slow
def test_training_on_16906_genes(prepared, tmp_path, capsys):
    """All that scBERT was trained on, half of it in the slices: panels, then an epoch of the smallest model."""
    data = shutil.copytree(prepared.data, tmp_path / "data")
    work = Work(data, prepared.tiles, tmp_path / "panels", tmp_path)
    own = visium.read_matrix(data / "P01_1" / "filtered_feature_bc_matrix.h5").genes.tolist()
    further = [f"further{i}" for i in range(16906 - len(own))]
    (tmp_path / "vocabulary.txt").write_text("\n".join([*own, *further]))
    half = further[: 8453 - len(own)]

    def more(counts, barcodes, names):
        seldom = np.random.default_rng(0).poisson(0.05, (len(counts), len(half)))
        return np.hstack([counts, seldom]), barcodes, [*names, *half]

    for path in data.glob("*/filtered_feature_bc_matrix.h5"):
        rewrite_matrix(path.parent, more)
    work.run("make_decoder_data", "--input_genes", tmp_path / "vocabulary.txt", "--full_vocabulary")
    assert "8453 of 16906 genes are in a train slice" in capsys.readouterr().out
    work.run("train_mymodel", "--Epoch", 1, "--gene_depth", 1, "--batch_size", 64)
    assert work.encoder.exists()
