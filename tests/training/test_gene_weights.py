"""gene_weights.py: positions by name from the files that flags name, what is said of them, and what is refused."""

from pathlib import Path

import numpy as np
import pytest
import torch
from plain_scbert import (
    CHOSEN,
    NAMES,
    PANEL,
    VOCABULARY,
    WIDTH,
    flags,
    gene_encoder,
)
from spaceranger_folders import refused

from utils.training import gene_weights

# ---- vocabulary and positions


def test_genes_are_frozen_into_their_positions_and_overlap_is_said(scbert_files, scbert_tensors, capsys):
    encoder, panel = gene_encoder(), [*PANEL[:9], "X", "Y", "Z"]
    gene_weights.load(encoder, flags(scbert_files), panel, [])
    said = capsys.readouterr().out
    assert said.startswith("panglao_pretrain.pth: 91 tensors\n  loaded      87  token_emb.weight,")
    expected = "9 of 12 panel genes found in genes.tsv: 9 exact, 0 by alias, 0 by id, 3 unmatched (X, Y, Z)"
    assert f"gene positions: {expected}\n" in said
    assert torch.equal(encoder.gene_embedding.weight[:9], scbert_tensors["pos_emb.emb.weight"][CHOSEN[:9]].float())
    assert not encoder.gene_embedding.weight[9:].any()
    assert encoder.n_frozen == 4 and not encoder.gene_embedding.weight.requires_grad


def test_under_half_of_the_panel_is_refused(scbert_files):
    args = flags(scbert_files)
    found = ["A", "B", *PANEL[:1]]
    words = r"--gene_vocab .*genes.tsv: 1 of 3 genes found, expected half .*\(not found: A, B; it has g0, g1, g2\)"
    refused(words, gene_weights.load, gene_encoder(n_genes=3), args, found, [])


@pytest.mark.parametrize("n_names", [VOCABULARY - 1, VOCABULARY + 1], ids=["one too few", "one too many"])
def test_a_vocabulary_of_another_length_would_shift_genes(scbert_files, tmp_path, n_names):
    (tmp_path / "genes.txt").write_text("\n".join(["first", *NAMES][:n_names]))
    args = flags(scbert_files, gene_vocab=tmp_path / "genes.txt")
    refused(
        f"expected 16906 genes, as .* has positions, found {n_names}",
        gene_weights.load,
        gene_encoder(),
        args,
        PANEL,
        [],
    )
    (tmp_path / "genes.txt").write_text("gene\n")
    refused("genes.txt: expected one gene per line", gene_weights.load, gene_encoder(), args, PANEL, [])


def test_gene2vec_alone_gives_positions_and_all_of_it_trains(tmp_path, capsys):
    rows = np.random.default_rng(0).standard_normal((4, 8))
    np.save(tmp_path / "gene2vec.npy", rows)
    (tmp_path / "genes.txt").write_text("A\nB\nC\nD")
    (tmp_path / "named.txt").write_text(
        "4 8\n" + "\n".join(f"{n} {' '.join(map(str, r))}" for n, r in zip("ABCD", rows, strict=True))
    )
    given = {"gene2vec": tmp_path / "gene2vec.npy", "gene_vocab": tmp_path / "genes.txt"}
    for changed in (given, {"gene2vec": tmp_path / "named.txt"}):
        encoder, args = gene_encoder(2, 2, 8, 1), flags(**changed)
        gene_weights.check(args)
        before = {name: p.clone() for name, p in encoder.named_parameters() if name != "gene_embedding.weight"}
        gene_weights.load(encoder, args, ["C", "A"], [])
        np.testing.assert_array_equal(encoder.gene_embedding.weight.detach(), rows[[2, 0]].astype(np.float32))
        assert "2 of 2 panel genes found" in (said := capsys.readouterr().out) and "loaded" not in said
        assert all(p.requires_grad for p in encoder.parameters()) and encoder.n_frozen == 0
        assert all(torch.equal(dict(encoder.named_parameters())[name], p) for name, p in before.items())


def test_gene2vec_goes_before_the_files_own_positions(scbert_files, tmp_path):
    rows = np.ones((VOCABULARY, WIDTH))
    np.save(tmp_path / "gene2vec.npy", rows)
    encoder = gene_encoder()
    gene_weights.load(encoder, flags(scbert_files, gene2vec=tmp_path / "gene2vec.npy"), PANEL, [])
    assert (encoder.gene_embedding.weight == 1).all()
    rows[5, 5] = np.nan
    np.save(tmp_path / "gene2vec.npy", rows)
    args = flags(scbert_files, gene2vec=tmp_path / "gene2vec.npy")
    refused("--gene2vec .*expected a row of finite numbers", gene_weights.load, encoder, args, PANEL, [])


def test_without_flags_nothing_is_touched(capsys):
    gene_weights.load(None, flags(), PANEL, [])
    assert capsys.readouterr().out == ""


# ---- flags


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"gene_weights": __file__}, "--gene_weights and --gene2vec: expected --gene_vocab"),
        ({"gene2vec": __file__}, "--gene_weights and --gene2vec: expected --gene_vocab"),
        ({"gene_vocab": __file__}, "--gene_vocab and --gene_aliases: expected --gene_weights or --gene2vec"),
        ({"gene_aliases": __file__}, "--gene_vocab and --gene_aliases: expected"),
        ({"gene_aliases": "none.txt"}, "--gene_aliases: expected the file none.txt"),
        (
            {"gene_weights": __file__, "gene_vocab": __file__, "gene_depth": 4},
            "--tune_block: expected less than --gene_depth 4, found 4",
        ),
    ],
)
def test_flags_that_do_not_go_together(changed, words):
    paths = {flag: Path(value) if isinstance(value, str) else value for flag, value in changed.items()}
    refused(words, gene_weights.check, flags(**paths))


def test_a_gene2vec_that_names_its_genes_needs_no_vocabulary(tmp_path):
    (tmp_path / "gene2vec.txt").write_text("A 1 2\n")
    gene_weights.check(flags(gene2vec=tmp_path / "gene2vec.txt"))
    both = flags(gene2vec=tmp_path / "gene2vec.txt", gene_vocab=Path(__file__))
    refused(
        "--gene_vocab: expected none, since the lines of --gene2vec .* name their genes.*; leave it out",
        gene_weights.check,
        both,
    )
