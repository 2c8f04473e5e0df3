"""scbert.py: the released file read strictly, and scBERT's forward pass written out plainly.

The encoder with such a file gives what plain scBERT gives, of a panel and of the whole vocabulary.
"""

import os

import pytest
import torch
from plain_scbert import (
    CHOSEN,
    GENES,
    NAMES,
    PANEL,
    VOCABULARY,
    WIDTH,
    flags,
    gene_encoder,
    plain_scbert,
    write_released,
)
from spaceranger_folders import refused

from model import performer, scbert
from model.scbert import load_scbert, loading_table
from utils.files.tensors import read_weights
from utils.training import gene_weights


def some_bins(n_genes=GENES, n_spots=3):
    bins = torch.randint(0, 7, (n_spots, n_genes), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    bins[0] = 0
    return bins


@torch.no_grad()
def trunk_output(encoder, bins):
    """What the encoder's head is given: (B, G, W)."""
    seen = []
    handle = encoder.gather.register_forward_pre_hook(lambda module, given: seen.append(given[0]))
    encoder(bins)
    handle.remove()
    return seen[0]


def assert_close(found, expected):
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)


# ---- parity with scBERT


def test_the_made_up_file_has_the_released_layout(scbert_tensors):
    assert len(scbert_tensors) == 91
    assert (
        scbert_tensors["pos_emb.emb.weight"].dtype == torch.float64
        and not scbert_tensors["pos_emb.emb.weight"][-1].any()
    )


@pytest.fixture
def loaded(scbert_files):
    encoder = gene_encoder()
    gene_weights.load(encoder, flags(scbert_files), PANEL, [])
    return encoder


def test_a_released_file_gives_scberts_output(scbert_tensors, loaded):
    expected = plain_scbert(scbert_tensors, some_bins(), scbert_tensors["pos_emb.emb.weight"][CHOSEN])
    assert_close(trunk_output(loaded, some_bins()), expected)


def test_with_the_keys_maximum_of_the_batch_it_is_scbert_as_trained(scbert_tensors, loaded, monkeypatch):
    own = performer._key_context

    def of_the_batch(k, v, projection):
        """Spots taken for heads of one spot: the stabiliser is then the maximum over all of them."""
        largest, context = own(k.flatten(0, 1)[None], v.flatten(0, 1)[None], projection)
        return largest.expand(len(k), -1, -1, -1), context[0].unflatten(0, k.shape[:2])

    monkeypatch.setattr(performer, "_key_context", of_the_batch)
    found, positions = trunk_output(loaded, some_bins()), scbert_tensors["pos_emb.emb.weight"][CHOSEN]
    assert_close(found, plain_scbert(scbert_tensors, some_bins(), positions, batch_wide=True))
    assert (found - plain_scbert(scbert_tensors, some_bins(), positions)).abs().max() > 1e-3, "the two are not the same"


@pytest.mark.slow
@pytest.mark.parametrize("appended", [0, 1])
def test_the_whole_vocabulary_gives_scberts_output(scbert_tensors, appended):
    """With scBERT's appended token, too: it is one more gene of bin 0 whose position is zero."""
    encoder, bins = gene_encoder(2, VOCABULARY + appended), some_bins(VOCABULARY + appended, 1)
    if appended:
        bins[:, -1] = 0
    bins[0, : VOCABULARY // 2] = torch.arange(VOCABULARY // 2) % 6
    load_scbert(encoder, scbert_tensors)
    positions = scbert_tensors["pos_emb.emb.weight"][: VOCABULARY + appended]
    names = [*NAMES, "appended"][: VOCABULARY + appended]
    scbert.set_gene_positions(encoder, positions, {name: i for i, name in enumerate(names)}, names)
    assert_close(trunk_output(encoder, bins), plain_scbert(scbert_tensors, bins, positions, depth=2))


# ---- reading the file


@pytest.mark.parametrize("prefix", ["", "module."])
def test_every_trunk_tensor_is_overwritten(scbert_tensors, tmp_path, prefix):
    encoder = gene_encoder()
    for tensor in encoder.state_dict().values():
        tensor.fill_(torch.nan)
    read = read_weights(write_released(tmp_path / "p.pth", scbert_tensors, prefix), "--gene_weights")
    assert {name: len(names) for name, names in load_scbert(encoder, read).items()} == {
        **{"loaded": 87, "missing": 0, "unexpected": 0, "skipped": 4}
    }
    left = {name for name, tensor in encoder.state_dict().items() if tensor.isnan().any()}
    assert left == {
        name for name in encoder.state_dict() if name.startswith(("gather.", "linear_path.", "gene_embedding."))
    }
    assert torch.equal(encoder.token_embedding.weight, scbert_tensors["token_emb.weight"])


def test_prefixed_names_are_taken_as_they_stand_too(scbert_tensors):
    encoder = gene_encoder()
    load_scbert(encoder, {f"module.{name}": tensor for name, tensor in scbert_tensors.items()})
    assert torch.equal(encoder.token_embedding.weight, scbert_tensors["token_emb.weight"])


def test_the_outcome_of_every_tensor_is_reported(scbert_tensors):
    others = {name: tensor for name, tensor in scbert_tensors.items() if name != "to_out.bias"}
    others |= {f"to_out.fc{i}.weight": torch.zeros(3) for i in range(5)}
    found = load_scbert(gene_encoder(depth=5), others)
    assert set(others) == set(found["loaded"]) | set(found["unexpected"]) | set(found["skipped"])
    assert sum(map(len, found.values())) == len(others) + 1
    lines = loading_table(found).splitlines()
    assert [line.split()[:2] for line in lines] == [
        *(["loaded", "73"], ["missing", "1"], ["unexpected", "5"], ["skipped", "17"])
    ]
    assert lines[1].endswith("to_out.bias (not needed: scBERT's head for masked tokens)")
    assert "to_out.fc2.weight and 2 more (no part of scBERT)" in lines[2]
    assert "pos_emb.emb.weight (positions of genes, taken by name); to_out.weight (scBERT's head" in lines[3]
    assert lines[3].endswith("and 11 more (beyond --gene_depth 5)")


@pytest.mark.parametrize("depth", [6, 2])
def test_a_missing_tensor_is_named(scbert_tensors, depth):
    others = {
        name: tensor for name, tensor in scbert_tensors.items() if name != "performer.net.layers.1.0.fn.to_k.weight"
    }
    n = depth * 14 + 3
    words = rf"expected scBERT's {n} tensors, found {n - 1}, without .*1\.0\.fn\.to_k\.weight; give panglao_pretrain"
    refused(words, load_scbert, gene_encoder(depth=depth), others)


def test_a_deeper_encoder_than_the_file_is_refused(scbert_tensors):
    words = r"expected scBERT's 101 tensors, found 87, without .*layers\.6.* and 13 more.*--gene_depth \(7\)"
    refused(words, load_scbert, gene_encoder(depth=7), scbert_tensors)


@pytest.mark.parametrize(
    ("name", "tensor", "words"),
    [
        (
            "performer.net.layers.3.1.fn.fn.w1.weight",
            torch.zeros(400, WIDTH),
            r"layers\.3\.1\.fn\.fn\.w1\.weight of shape \(800, 200\) by --gene_width 200 .*, found \(400, 200\)",
        ),
        ("norm.weight", torch.full((WIDTH,), torch.nan), "norm.weight: expected numbers, found NaN or infinity"),
    ],
    ids=["shape", "NaN"],
)
def test_a_tensor_that_does_not_fit_is_named_and_nothing_is_copied(scbert_tensors, name, tensor, words):
    encoder = gene_encoder()
    before = {name: tensor.clone() for name, tensor in encoder.state_dict().items()}
    refused(words, load_scbert, encoder, scbert_tensors | {name: tensor})
    assert all(torch.equal(tensor, before[name]) for name, tensor in encoder.state_dict().items())


def test_other_heads_or_width_than_the_files_are_named(scbert_tensors):
    for changed, words in (
        ({"heads": 8}, r"to_q.weight of shape .*--gene_heads 8, found \(640, 200\)"),
        ({"width": 64}, r"token_emb.* of shape .*--gene_width 64 .*found \(7, 200\)"),
    ):
        refused(words, load_scbert, gene_encoder(1, **changed), scbert_tensors)


class Code:
    """Unpickled, it would run a command."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def wrong_files(folder, scbert_tensors):
    """What may be given in place of the released file, and what is said of it."""
    torch.save({"layer.weight": torch.zeros(3)}, folder / "another.pth")
    yield "another.pth", r"expected scBERT's 87 tensors, found 0, without .* and 86 more"
    write_released(folder / "corrupt.pth", scbert_tensors)
    (folder / "corrupt.pth").write_bytes((folder / "corrupt.pth").read_bytes()[:100_000])
    yield "corrupt.pth", "corrupt.pth: expected weights, found a corrupt"
    torch.save({"model_state_dict": scbert_tensors, "losses": Code(folder / "ran")}, folder / "code.pth")
    yield "code.pth", "expected tensors and plain values, found code"
    torch.save({"epoch": 3, "model_state_dict": {}}, folder / "empty.pth")
    yield "empty.pth", "expected named tensors in .*, found none"
    write_released(folder / "no_positions.pth", {n: t for n, t in scbert_tensors.items() if n != scbert.POSITIONS})
    yield "no_positions.pth", "expected pos_emb.emb.weight, found none; give --gene2vec"
    (folder / "text.pth").write_text("not a checkpoint")
    yield "text.pth", "text.pth: expected weights, found a corrupt"


def test_wrong_files_are_refused_in_one_line(scbert_files, scbert_tensors, tmp_path):
    for name, words in wrong_files(tmp_path, scbert_tensors):
        args = flags(scbert_files, gene_weights=tmp_path / name)
        refused(f"--gene_weights: .*{words}", gene_weights.load, gene_encoder(), args, PANEL, [])
    assert not (tmp_path / "ran").exists(), "code in a file is not run"
