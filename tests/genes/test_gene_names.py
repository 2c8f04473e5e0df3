"""names.py: Ensembl ids with and without versions; one gene under several names; the tables that hold them."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from spaceranger_folders import IDS, refused, write_h5, write_spatial
from tiny_runs import write_matrix

from utils.genes import names as gene_names
from utils.slices import visium

HEADER = "hgnc_id\tsymbol\talias_symbol\tprev_symbol\tensembl_gene_id\n"
TABLE = [
    ("DEPP1", "DEPP|FIG-1", "C10orf10", "ENSG00000165507"),
    ("MS4A1", "B1|CD20|Bp35", "MS4A2|CD20X", "ENSG00000156738"),
    ("MS4A2", "FCER1B", "APY", "ENSG00000149534"),
    ("SEPTIN1", "SHARED", "SEPT1", "ENSG00000180096"),
    ("OTHER", "SHARED", "", "ENSG00000000001"),
    ("NOID", "", "", ""),
]


def hgnc(path, rows=TABLE):
    """As the complete set is written: several values of a cell in quotes."""
    lines = [(f"HGNC:{i}", *row) for i, row in enumerate(rows)]
    cells = ["\t".join(f'"{cell}"' if "|" in cell else cell for cell in line) for line in lines]
    path.write_text(HEADER + "\n".join(cells) + "\n", encoding="utf-8")
    return path


@pytest.fixture
def known(tmp_path):
    return gene_names.known_names(hgnc(tmp_path / "hgnc.txt"), {})


def found(wanted, vocabulary, known):
    """Wanted name -> the vocabulary's name for it."""
    return {name: vocabulary[row] for name, row in gene_names.match_genes(wanted, vocabulary, known).places.items()}


# ---- Ensembl ids


def test_ensembl_ids_become_the_symbols_that_another_slice_knows():
    symbols = gene_names.symbols_by_id(
        np.array(["TP53", "GAPDH", "ENSG3", "X"]), np.array(["ENSG1.4", "ENSMUSG2", "ENSG3", "not_an_id"])
    )
    assert symbols == {"ENSG1": "TP53", "ENSMUSG2": "GAPDH"}
    names = np.array(["ENSG1", "ENSG1.7", "TP53", "ENSMUSG2.1", "ENSG9", "ENSG9.16", "ENSG8.2_PAR_Y"])
    mapped = ["TP53", "TP53", "TP53", "GAPDH", "ENSG9", "ENSG9", "ENSG8"]
    assert gene_names.mapped_names(names, symbols).tolist() == mapped


@pytest.mark.parametrize(
    ("name", "gene_id"),
    [
        ("ENSG00000141510", "ENSG00000141510"),
        ("ENSG00000141510.16", "ENSG00000141510"),
        ("ENSMUSG00000059552.14", "ENSMUSG00000059552"),
        ("ENSG00000002586.20_PAR_Y", "ENSG00000002586"),
        ("ENSA", None),
        ("ENSAP1", None),
        ("TP53", None),
        ("AL627309.1", None),
    ],
)
def test_a_symbol_may_begin_like_an_id(name, gene_id):
    assert gene_names.ensembl_id(name) == gene_id
    assert gene_names.is_ensembl(name) == (gene_id is not None)


# ---- matching


@pytest.mark.parametrize(
    ("wanted", "there"),
    [
        ("DEPP1", "DEPP1"),
        ("DEPP1", "C10orf10"),
        ("C10orf10", "DEPP1"),
        ("DEPP1", "FIG-1"),
        ("FIG-1", "C10orf10"),
        ("SEPT1", "SEPTIN1"),
        ("ENSG00000165507", "DEPP1"),
        ("ENSG00000165507.12", "C10orf10"),
        ("FIG-1", "ENSG00000165507.3"),
        ("ENSG00000165507.12", "ENSG00000165507.3"),
        ("UNKNOWN", "UNKNOWN"),
    ],
)
def test_a_gene_is_found_under_any_of_its_names_either_way_round(known, wanted, there):
    assert found([wanted], ["X", there, "Y"], known) == {wanted: there}
    assert found([there], ["X", wanted, "Y"], known) == {there: wanted}


@pytest.mark.parametrize(
    ("wanted", "vocabulary", "ambiguous"),
    [
        (["SHARED"], ["SEPTIN1", "OTHER"], 1),
        (["SEPTIN1"], ["SHARED", "X"], 0),
        (["MS4A2"], ["MS4A1", "X"], 0),
        (["DEPP1"], ["DEPP", "FIG-1"], 1),
        (["DEPP", "FIG-1"], ["DEPP1", "X"], 2),
        (["depp1"], ["DEPP1", "X"], 0),
        (["NOID"], ["X", ""], 0),
    ],
    ids=[
        "alias of two genes",
        "the same in the vocabulary",
        "previous symbol, today another gene's own",
        "two aliases of it in the vocabulary",
        "two of one gene",
        "case (of mouse)",
        "no other name",
    ],
)
def test_what_is_not_clear_is_not_used_but_counted(known, wanted, vocabulary, ambiguous):
    matches = gene_names.match_genes(wanted, vocabulary, known)
    assert (matches.places, matches.unmatched, matches.ambiguous) == ({}, wanted, ambiguous)


def test_a_genes_own_name_goes_before_its_aliases(known):
    assert found(["DEPP", "DEPP1"], ["DEPP1", "X"], known) == {"DEPP1": "DEPP1"}
    assert found(["FIG-1"], ["C10orf10", "DEPP1"], known) == {"FIG-1": "DEPP1"}
    assert found(["FIG-1", "DEPP1"], ["C10orf10", "DEPP1"], known) == {"DEPP1": "DEPP1"}


def test_the_report_counts_by_how_they_were_found(known):
    wanted = ["MS4A2", "C10orf10", "CD20", "ENSG00000180096", "SHARED", "P", "Q", "R"]
    matches = gene_names.match_genes(wanted, ["SEPTIN1", "OTHER", "MS4A1", "MS4A2", "DEPP1"], known)
    assert str(matches) == "1 exact, 2 by alias, 1 by id, 4 unmatched (SHARED, P, Q, ...), 1 of them ambiguous"
    assert str(gene_names.match_genes(["A"], ["A"], known)) == "1 exact, 0 by alias, 0 by id, 0 unmatched"


@pytest.mark.parametrize("missing", ["", "NA", "nan", "-"])
def test_genes_without_a_symbol_have_their_id_or_are_refused(missing):
    names, ids = np.array([missing, "TP53", missing]), np.array(IDS[:3])
    assert gene_names.named("x", names, ids).tolist() == [IDS[0], "TP53", IDS[2]]
    refused("x: expected a name or an id of each gene, found 2 of 3", gene_names.named, "x", names, names)


def test_a_single_missing_symbol_may_be_a_symbol():
    names = np.array(["nan", "na", "w"])  # of the fly
    assert gene_names.named("x", names, names).tolist() == names.tolist()


def test_ids_are_known_from_the_slices_own_tables(tmp_path):
    for name, symbols in (("A", ["EPCAM", "TP53", "GAPDH", IDS[3]]), ("B", [IDS[0], "TP53", IDS[2], "FOURTH"])):
        write_spatial(tmp_path / name)
        path = tmp_path / name / "filtered_feature_bc_matrix.h5"
        write_h5(path)
        counts = visium.read_matrix(path)
        path.unlink()
        write_matrix(path, counts.counts.toarray(), counts.barcodes, symbols, IDS)
    symbols = gene_names.slice_names(map(visium.read_slice_genes, [tmp_path / "A", tmp_path / "B"])).symbols
    assert symbols == dict(zip(IDS, ["EPCAM", "TP53", "GAPDH", "FOURTH"], strict=True))
    own = gene_names.known_names(None, symbols)
    assert found(["GAPDH", "FOURTH", "ENSG1"], IDS, own) == {"GAPDH": IDS[2], "FOURTH": IDS[3], "ENSG1": IDS[1]}
    assert found(["ENSG2"], ["X", "GAPDH"], own) == {"ENSG2": "GAPDH"}
    assert gene_names.slice_names([]).symbols == {}


def test_a_slices_old_symbol_meets_the_tables_new_one_by_id(tmp_path):
    both = gene_names.known_names(hgnc(tmp_path / "hgnc.txt"), {"ENSG00000180096": "OLD"})
    assert found(["OLD"], ["ENSG00000180096"], both) == {"OLD": "ENSG00000180096"}
    assert found(["ENSG00000180096"], ["SEPT1"], both) == {"ENSG00000180096": "SEPT1"}


NAMES = st.lists(st.sampled_from([*"ABCDEFGH", *"abcdefgh", "x", "y"]), unique=True, max_size=10)


@given(wanted=NAMES, vocabulary=NAMES)
def test_matching_is_one_to_one_and_the_same_both_ways(wanted, vocabulary):
    """Lower case is the alias of upper case, x and y say nothing; against a slow reference over all pairs."""
    approved = {name: name.upper() for name in "abcdefghABCDEFGH"}
    known = gene_names.KnownNames(approved, {}, frozenset())
    matches = gene_names.match_genes(wanted, vocabulary, known)
    pairs = {(name, vocabulary[row]) for name, row in matches.places.items()}
    expected = {(name, name) for name in {*wanted} & {*vocabulary}}
    expected |= {
        (one, other)
        for one in wanted
        for other in vocabulary
        if one.upper() == other.upper() and one != other and one not in vocabulary and other not in wanted
    }
    assert pairs == expected
    back = gene_names.match_genes(vocabulary, wanted, known)
    assert {(wanted[row], name) for name, row in back.places.items()} == pairs


def test_under_half_is_refused_and_half_is_not():
    gene_names.require_half(1, 2, "--gene_vocab f.txt", ["A"], ["B"])
    words = r"--gene_vocab f.txt: 1 of 3 genes found, expected half at least \(not found: A, B; it has X, Y, Z\); give"
    refused(words, gene_names.require_half, 1, 3, "--gene_vocab f.txt", ["A", "B"], list("XYZ"))


# ---- files


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "HGNC's complete set.*, found nothing"),
        (b"Approved symbol\tAliases\nA\tB\n", "expected the columns symbol, .*, found Approved symbol, Aliases"),
        (b"symbol\nA\n", "expected the columns symbol, alias_symbol"),
        (HEADER.encode(), "expected a gene per line, found none"),
        (b"symbol\talias_symbol\n\xff\xfe\n", "expected a table of text with tabs"),
    ],
    ids=["empty", "other columns", "no other names", "no gene", "not text"],
)
def test_a_wrong_table_of_names_is_refused(tmp_path, content, words):
    (tmp_path / "hgnc.txt").write_bytes(content)
    refused(f"--gene_aliases: .*hgnc.txt: .*{words}", gene_names.known_names, tmp_path / "hgnc.txt", {})


def test_a_table_with_fewer_columns_serves(tmp_path):
    (tmp_path / "own.tsv").write_text("\ufeffsymbol\tprev_symbol\nNEW\tOLD|OLDER\nSHORT\n", encoding="utf-8")
    assert found(["OLDER"], ["NEW"], gene_names.known_names(tmp_path / "own.tsv", {})) == {"OLDER": "NEW"}
