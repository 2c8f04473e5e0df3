"""gene_encoder.py: gene positions by name, the frozen trunk, the linear path, what gathered tokens depend on."""

import pytest
import torch

from model.gene_encoder import GatherTokens, GeneEncoder
from model.momentum import momentum_encoder
from model.scbert import set_gene_positions

GENES, WIDTH = 12, 24


def small_encoder(n_genes=GENES, depth=3):
    torch.manual_seed(0)
    return GeneEncoder(n_genes, depth, WIDTH, heads=2, n_tokens=4, width=16)


def some_bins():
    return torch.randint(0, 7, (3, GENES), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)


def positions_for(genes, vocabulary, table):
    encoder = small_encoder(len(genes), depth=1)
    set_gene_positions(encoder, table, vocabulary, genes)
    return encoder.gene_embedding.weight.detach()


def test_positions_are_looked_up_by_name_whatever_the_order():
    genes, table = ["B", "D", "A"], torch.randn(5, WIDTH, dtype=torch.float64)
    vocabulary = {name: i for i, name in enumerate("ABCD")}
    found = positions_for(genes, vocabulary, table)
    torch.testing.assert_close(found, table[[1, 3, 0]].float())
    order = [2, 0, 3, 1]  # the same vocabulary and table, written in another order
    permuted = {"ABCD"[old]: new for new, old in enumerate(order)}
    assert torch.equal(positions_for(genes, permuted, table[order]), found)


def test_a_gene_outside_the_vocabulary_has_no_position():
    encoder = small_encoder(3, depth=1)
    assert set_gene_positions(encoder, torch.ones(2, WIDTH), {"A": 0, "B": 1}, ["X", "B", "Y"]) == 1
    assert not encoder.gene_embedding.weight[[0, 2]].any()
    assert torch.equal(encoder.gene_embedding.weight[1], torch.ones(WIDTH))


@pytest.mark.parametrize(
    ("table", "vocabulary", "message"),
    [
        (torch.zeros(3, WIDTH), {}, "expected some of the 2 panel genes"),
        (torch.zeros(3, WIDTH), {"X": 0}, r"some of the 2 panel genes \(A, \.\.\.\), found none of them \(X, "),
        (torch.zeros(3, 200), {"A": 0}, r"rows of 24 numbers .* found shape \(3, 200\)"),
        (torch.zeros(WIDTH), {"A": 0}, r"found shape \(24,\)"),
        (torch.zeros(1, WIDTH), {"A": 0, "B": 1}, "expected at most 1 genes, the rows of gene2vec, found 2"),
    ],
    ids=["empty vocabulary", "other genes", "other width", "no table", "longer vocabulary"],
)
def test_positions_that_do_not_fit_are_refused(table, vocabulary, message):
    with pytest.raises(ValueError, match=message):
        set_gene_positions(small_encoder(2, depth=1), table, vocabulary, ["A", "B"])


def test_frozen_trunk_leaves_one_block_norm_and_head_to_train():
    encoder = small_encoder()
    encoder.freeze_trunk(1)
    trained = {name.split(".")[0] + name.split(".")[1] * name.startswith("blocks") for name in trained_names(encoder)}
    assert trained == {"blocks1", "norm", "gather", "linear_path"}
    one = {name for name in trained_names(encoder) if name.startswith("blocks.")}
    assert one == {f"blocks.1.{name}" for name, _ in encoder.blocks[1].named_parameters()}


def trained_names(encoder):
    return {name for name, p in encoder.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("tuned", [0, 1, 2])
@torch.no_grad()
def test_freezing_does_not_change_the_output_of_encoder_or_momentum_encoder(tuned):
    encoder = small_encoder()
    expected = encoder(some_bins())
    assert encoder.frozen_part(some_bins()) is None
    encoder.freeze_trunk(tuned)
    frozen = encoder.frozen_part(some_bins())
    assert (frozen is None) == (tuned == 0) and (frozen is None or frozen.shape == (3, GENES, WIDTH))
    for same in (encoder, momentum_encoder(encoder)):
        torch.testing.assert_close(same(some_bins(), frozen), expected)
        torch.testing.assert_close(same(some_bins()), expected)
        if frozen is not None:
            assert (same(some_bins(), frozen + torch.randn_like(frozen))[0] - expected[0]).abs().max() > 1e-3, "used"


@pytest.mark.parametrize("tuned", [-1, 3])
def test_a_block_that_is_not_there_cannot_be_tuned(tuned):
    with pytest.raises(ValueError, match=rf"--tune_block: expected 0 to 2, .*found {tuned}"):
        small_encoder().freeze_trunk(tuned)


@torch.no_grad()
def test_the_linear_path_adds_standardised_bins_to_the_vector_and_nothing_to_the_tokens():
    encoder, bins = small_encoder(), some_bins()
    mean, sd = torch.rand(GENES), torch.rand(GENES) + 0.5
    with_path, tokens = encoder(bins)
    encoder.linear_path[0].measure(mean, sd)
    moved, same_tokens = encoder(bins)
    last = encoder.linear_path[1]
    change = ((bins - mean) / sd - bins) @ last.weight.T
    torch.testing.assert_close(moved - with_path, change, rtol=1e-4, atol=1e-5)
    last.weight.zero_()
    last.bias.zero_()
    alone, _ = encoder(bins)
    torch.testing.assert_close(alone, encoder.gather(encoder.norm(hidden_of(encoder, bins)))[1])
    assert torch.equal(same_tokens, tokens)


def hidden_of(encoder, bins):
    """What the Performer makes of the bins."""
    hidden = encoder.embed(bins)
    for block in encoder.blocks:
        hidden = block(hidden)
    return hidden


@torch.no_grad()
def test_output_knows_which_gene_has_which_bin():
    encoder = small_encoder()
    bins = torch.full((1, GENES), 2)
    bins[0, 0], swapped = 5, bins.clone()
    swapped[0, 0], swapped[0, 1] = 2, 5
    for found, other in zip(encoder(bins), encoder(swapped), strict=True):
        assert (found - other).abs().max() > 1e-3


@torch.no_grad()
def test_every_bin_and_every_gene_counts():
    encoder, bins = small_encoder(), torch.zeros(1, GENES, dtype=torch.uint8)
    base = encoder(bins)[0]
    seen = [base]
    for value in range(1, 7):
        seen.append(encoder(bins + value)[0])
    for gene in range(GENES):
        changed = bins.clone()
        changed[0, gene] = 3
        seen.append(encoder(changed)[0])
    between = torch.cdist(torch.cat(seen), torch.cat(seen)) + torch.eye(len(seen))
    assert between.min() > 1e-3


@torch.no_grad()
def test_gathered_tokens_see_all_genes_in_any_order():
    torch.manual_seed(0)
    gather, genes = GatherTokens(6, 16, n_tokens=3, heads=4), torch.randn(2, 5, 6)
    tokens, vector = gather(genes)
    assert tokens.shape == (2, 3, 16)
    assert vector.shape == (2, 16)
    again, again_vector = gather(genes[:, torch.randperm(5)])
    torch.testing.assert_close(again, tokens)
    torch.testing.assert_close(again_vector, vector)
    assert (tokens[:, :, None] - tokens[:, None]).abs().amax(-1)[:, ~torch.eye(3, dtype=torch.bool)].min() > 1e-2
    for i in range(5):
        changed = genes.clone()
        changed[:, i] += 1 + torch.randn(6)
        other, other_vector = gather(changed)
        assert ((other - tokens).abs().amax(-1) > 1e-4).all()
        assert ((other_vector - vector).abs().amax(-1) > 1e-4).all()


@torch.no_grad()
def test_the_vector_and_each_token_have_a_query_of_their_own():
    torch.manual_seed(0)
    gather, genes = GatherTokens(6, 16, n_tokens=3, heads=4), torch.randn(2, 5, 6)
    tokens, vector = gather(genes)
    for i in range(4):
        before = gather.queries.clone()
        gather.queries[i] += 1 + torch.randn(16)
        other, other_vector = gather(genes)
        moved = [(other_vector - vector).abs().max() > 1e-3, *((other - tokens).abs().amax((0, 2)) > 1e-3)]
        assert moved == [j == i for j in range(4)]
        gather.queries.copy_(before)


def test_gathering_queries_and_keys_learn():
    gather = GatherTokens(6, 16, n_tokens=3, heads=4)
    tokens, vector = gather(torch.randn(2, 5, 6))
    (tokens * torch.randn_like(tokens)).sum().backward(retain_graph=True)
    vector.square().sum().backward()
    for gradient in (gather.attend.to_q.weight.grad, gather.attend.to_kv.weight.grad[:16], gather.queries.grad):
        assert gradient.abs().max() > 1e-4
