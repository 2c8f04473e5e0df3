"""names.py: features that are no genes, and genes whose symbols look like theirs; matrices that hold both."""

import gzip
import shutil

import h5py
import numpy as np
import pytest
from spaceranger_folders import BARCODES, COUNTS, IDS, refused, write_folder, write_h5, write_spatial
from tiny_runs import Work, rewrite_matrix, write_matrix

from utils.genes import names as gene_names
from utils.genes import panels as gene_panels
from utils.slices import matrix, visium

SPACED = ["Negative Control Probe 1", "System Control 3", "Negative Probe", "Custom Negative Set 1"]
CONTROLS = """
NegControlProbe_00042 NegControlCodeword_0500 NegControlProbe-00042 NegPrb1 NegPrb10 NegProbe-WTX NegProbe_CTP01
Negative1 Negative01 Negative Negative.1 negative_control_3 Neg.Ctrl_1 SystemControl1 SystemControl201 FalseCode
FalseCode12 BLANK_0006 BLANK-0006 Blank-1 Blank-10-1 blank1 Blank UnassignedCodeword_0001 UnassignedCodeword-0001
Unassigned Unassigned_NoFeatures unassigned-1 DeprecatedCodeword_0317 DEPRECATED_ENSG00000000001 Deprecated
antisense_BCL2L15 antisense-PROKR2 Intergenic_Region_10014 INTERGENIC1 Intergenic GenomicControl_3 Genomic_Control_12
ControlProbe_7 ERCC-00002 ERCC_00171 ERCC.00130 SIRV101 __no_feature __ambiguous __ambiguous[ENSG1+ENSG2]
SysCtrl1 PosControl_2 Positive_Control_Probe_1 NegativeCodeword_3 NegCodeword4 POS_E(0.5) unmapped
X__alignment_not_unique no_feature ambiguous N_unmapped N_noFeature NEG_A POS_B(32) Custom_Negative1
""".split()
CONTROLS += SPACED
GENES = """
TP53 HOXA10-AS TRAF3IP2-AS1 NEGR1 Negr1 NELFA BLNK Blnk ERCC1 ERCC6L2 Ercc2 CTRL CTRB1 NKX2-1 HLA-A HLA-DRB1 H2-K1
MIR3648-1 SNORD115-1 KRTAP5-1 ERVK3-1 RP11-34P13.7 AC000000.1 AL627309.1 C10orf10 1700001C02Rik Gm1992 mt-Nd1 MT-CO1
ENSG00000141510 ENSG00000141510.16 DEPP1 DEPTOR DEPDC1 INTS1 INTU ANTXR1 AMBP AMBN POSTN SIRT1 SIRPA Y_RNA NA T
GENE0001 SYNPO FAM138A LINC00486 NEGF NEU1 GC IGHV1-69-2 Igkv1-117 TRAV1-2 7SK
""".split()


def test_controls_are_known_by_their_names():
    assert [name for name in CONTROLS if not gene_names.is_control(name)] == []
    assert gene_names.are_controls(np.array([*CONTROLS, *GENES])).tolist() == [True] * len(CONTROLS) + [False] * len(
        GENES
    )
    assert gene_names.are_controls([]).tolist() == []


def test_genes_are_no_controls_also_in_other_case():
    for spelled in (str, str.upper, str.lower, str.title):
        assert [name for name in GENES if gene_names.is_control(spelled(name))] == []


def text_of(path):
    content = path.read_bytes()
    return (gzip.decompress(content) if path.suffix == ".gz" else content).decode()


@pytest.mark.realdata
def test_no_gene_of_real_sections_is_a_control(real_data):
    names = text_of(real_data / "visium_1142243F" / "feature_lists" / "features.tsv.gz").split()
    assert len(names) == 28402
    for path in sorted((real_data / "her2st" / "ST-cnts").glob("*.tsv.gz")):
        names += text_of(path).split("\n", 1)[0].split()
    for path in (real_data / "spaceranger_samples").rglob("*features.tsv*"):
        names += [line.split("\t")[1] for line in text_of(path).splitlines() if "\t" in line]
    assert [name for name in names if gene_names.is_control(name)] == []


# ---- matrices


FOUR = ["BLANK_0006", "TP53", "NegControlProbe_00042", "GAPDH"]


@pytest.fixture
def slice_dir(tmp_path):
    """A slice with two genes and two controls, which a matrix without kinds calls genes."""
    write_spatial(tmp_path / "C2")
    write_matrix(tmp_path / "C2" / "filtered_feature_bc_matrix.h5", COUNTS, BARCODES, FOUR, IDS)
    return tmp_path / "C2"


def test_controls_are_in_no_counts_names_ids_or_hash(slice_dir):
    whole = visium.read_slice(slice_dir)
    np.testing.assert_array_equal(whole.counts.toarray(), COUNTS[:, [1, 3]])
    assert (whole.genes.tolist(), whole.gene_ids.tolist()) == (["TP53", "GAPDH"], [IDS[1], IDS[3]])
    assert [part.tolist() for part in visium.read_slice_genes(slice_dir)] == [["TP53", "GAPDH"], [IDS[1], IDS[3]]]
    left = visium.read_slice(slice_dir, memory=64)
    assert isinstance(left.counts, visium.StoredCounts)
    np.testing.assert_array_equal(left.counts[np.arange(4)].toarray(), COUNTS[:, [1, 3]])
    assert matrix.count_controls(slice_dir) == 2
    barcodes = whole.spots.index.to_numpy(str)
    expected = visium.counts_hash(whole.counts, barcodes, whole.genes)
    path = slice_dir / "filtered_feature_bc_matrix.h5"
    path.unlink()
    write_matrix(path, COUNTS[:, [1, 3]], BARCODES, ["TP53", "GAPDH"], [IDS[1], IDS[3]])
    plain = visium.read_slice(slice_dir)
    assert visium.counts_hash(plain.counts, barcodes, plain.genes) == expected
    assert matrix.count_controls(slice_dir) == 0


def test_controls_of_a_folder_are_left_out(tmp_path):
    folder = write_folder(tmp_path / "m", zipped=False)
    (folder / "features.tsv").write_text("".join(f"{i}\t{name}\n" for i, name in zip(IDS, FOUR, strict=True)))
    found = visium.read_matrix(folder)
    np.testing.assert_array_equal(found.counts.toarray(), COUNTS[:, [1, 3]])
    assert matrix.count_controls(folder) == 2


def test_features_of_another_kind_are_not_counted_as_controls(tmp_path):
    kinds = ["Negative Control Probe", "Gene Expression", "Gene Expression", "Gene Expression"]
    path = write_h5(tmp_path / "m.h5", kinds=kinds)
    assert matrix.count_controls(path) == 0 and visium.read_matrix(path).counts.shape == (4, 3)


def test_controls_alone_are_no_matrix(tmp_path):
    path = tmp_path / "m.h5"
    write_matrix(path, COUNTS, BARCODES, [f"BLANK_{i}" for i in range(4)])
    refused(r"m.h5: expected genes, found control features alone \(BLANK_0, ...\)", visium.read_matrix, path)


def test_features_of_unequal_length_are_refused(tmp_path):
    with h5py.File(write_h5(tmp_path / "m.h5"), "a") as file:
        del file["matrix/features/id"]
        file["matrix/features/id"] = np.array(IDS[:3], "S")
    for function in (visium.read_matrix, matrix.read_genes, matrix.count_controls):
        refused("m.h5: expected", function, tmp_path / "m.h5")


# ---- panels


@pytest.fixture
def work(simulated, tmp_path):
    """Three simulated slices whose last three features, the most expressed ones, are controls."""
    data = shutil.copytree(simulated, tmp_path / "data", ignore=shutil.ignore_patterns("*.jpg", "*.png", "truth.h5ad"))

    def loud(counts, barcodes, names):
        counts[:, -3:] = 50 + np.arange(len(counts))[:, None] % 7
        return counts, barcodes, [*names[:-3], "BLANK_0006", "antisense_BCL2L15", "Negative1"]

    for folder in data.glob("P*"):
        rewrite_matrix(folder, loud)
    return Work(data, tmp_path / "tiles", tmp_path / "panels", tmp_path)


def test_controls_are_in_no_panel_and_no_total(work, capsys):
    work.run("make_decoder_data", "--n_top_genes", 100, "--n_input_genes", 100)
    said = capsys.readouterr().out
    assert "P01_1: 70 spots, 57 genes" in said and said.count("3 control features left out") == 3
    for role in gene_panels.FILES:
        panel = gene_panels.read_panel(gene_panels.panel_path(work.data, work.panels, "P01_1", role))
        assert len(panel.genes) == 57 and not gene_names.are_controls(panel.genes).any()
        np.testing.assert_array_equal(panel.total_counts, panel.read_counts().sum(1), "over all genes")


@pytest.mark.parametrize("flag", ["--target_genes", "--input_genes"])
def test_a_list_with_a_control_is_refused(work, tmp_path, flag):
    gene = visium.read_matrix(work.data / "P01_1").genes[0]
    (tmp_path / "list.txt").write_text(f"{gene}\nNegPrb3\nBLANK_0006\n")
    words = r"list.txt: expected genes, found 2 control features in 3 names \(NegPrb3, ...\); remove them"
    refused(words, work.run, "make_decoder_data", flag, tmp_path / "list.txt")
