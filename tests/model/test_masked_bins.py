"""masked_bins.py: which places are asked for, what stands there, the loss against a slow loop, what the head leaves."""

import numpy as np
import pytest
import torch
from torch import nn

from model.gene_encoder import GeneEncoder
from model.masked_bins import MASK, MASKED_FRACTION, MaskedBins, hide, masked_loss, masked_places

GENES, WIDTH = 12, 24


def small(depth=2):
    torch.manual_seed(0)
    return MaskedBins(GeneEncoder(GENES, depth, WIDTH, heads=2, n_tokens=4, width=16))


def draws(seed=0):
    return torch.Generator().manual_seed(seed)


def some_bins(n=5):
    return torch.randint(0, 6, (n, GENES), generator=draws(1), dtype=torch.uint8)


def some_marginal():
    return torch.randn(GENES, MASK, generator=draws(2)).log_softmax(-1)


def all_measured(n=5):
    return torch.ones(n, GENES, dtype=torch.bool)


@pytest.mark.parametrize("share", [0.15, 0.5])
def test_a_share_of_the_measured_places_is_drawn_anew_each_time(share):
    measured = torch.ones(200, 300, dtype=torch.bool)
    measured[:, 250:] = False
    one = draws()
    places, again = masked_places(measured, share, one), masked_places(measured, share, one)
    assert not places[:, 250:].any()
    assert places[:, :250].float().mean().item() == pytest.approx(share, abs=0.01)
    assert (places & again).float().sum().item() == pytest.approx(share**2 * 200 * 250, rel=0.1)
    assert torch.equal(places, masked_places(measured, share, draws()))


def test_every_spot_is_asked_for_a_gene_that_was_measured():
    measured = torch.zeros(50, GENES, dtype=torch.bool)
    measured[:, 3] = True
    assert torch.equal(masked_places(measured, 1e-9, draws()), measured)


def test_hidden_places_show_the_mask_and_no_others():
    bins, places = some_bins(), torch.rand(5, GENES, generator=draws()) < 0.5
    tokens = hide(bins, places)
    assert (tokens[places] == MASK).all()
    assert torch.equal(tokens[~places], bins[~places])
    assert (some_bins() == bins).all()  # the bins themselves stay


def test_loss_agrees_with_a_slow_loop():
    logits, bins = torch.randn(5, GENES, MASK, generator=draws()).double(), some_bins()
    places = masked_places(all_measured(), 0.3, draws())
    terms = []
    for b, g in zip(*np.nonzero(places.numpy()), strict=True):
        row = np.exp(logits[b, g].numpy())
        terms.append(-np.log(row[bins[b, g]] / row.sum()))
    assert masked_loss(logits, bins, places).item() == pytest.approx(np.mean(terms), rel=1e-6)


@torch.no_grad()
def test_before_the_first_step_each_gene_has_its_marginal_whatever_else_stands_there():
    model, marginal = small(), some_marginal()
    model.initialise(marginal)
    places = masked_places(all_measured(), 0.3, draws())
    torch.testing.assert_close(model.log_probabilities(some_bins(), places), marginal.expand(5, -1, -1))


@torch.no_grad()
def test_what_is_hidden_is_not_seen():
    model, bins = small(), some_bins()
    nn.init.normal_(model.to_bins.weight)
    places = masked_places(all_measured(), 0.3, draws())
    other = torch.where(places, (bins + 1) % MASK, bins)
    assert torch.equal(model.log_probabilities(bins, places), model.log_probabilities(other, places))
    shown = torch.where(places, bins, (bins + 1) % MASK)
    assert (model.log_probabilities(bins, places) - model.log_probabilities(shown, places)).abs().max() > 1e-3


def test_in_training_a_tenth_of_the_places_asked_for_show_their_bin():
    n, genes = 400, 100
    seen = []

    def recorded(self, tokens):
        seen.append(tokens)
        return torch.zeros(*tokens.shape, MASK)

    bins = torch.full((n, genes), 2, dtype=torch.uint8)
    model = type("Recorded", (MaskedBins,), {"forward": recorded})(GeneEncoder(genes, 1, 8, 1, 2, 16))
    loss = model.loss(bins, torch.ones(n, genes, dtype=torch.bool), 0.5, draws())
    assert loss.item() == pytest.approx(np.log(MASK))
    assert ((seen[0] == MASK) | (seen[0] == 2)).all()
    assert (seen[0] == MASK).float().mean().item() == pytest.approx(0.5 * MASKED_FRACTION, abs=0.01)


def test_pretraining_teaches_trunk_and_head_and_leaves_the_rest():
    model = small()
    nn.init.normal_(model.to_bins.weight, std=0.1)
    trained = {id(p) for p in model.trained_parameters()}
    names = {name for name, p in model.named_parameters() if id(p) in trained}
    rest = {name for name, _ in model.named_parameters()} - names
    assert {name.split(".")[1] for name in rest} == {"gather", "linear_path"}
    model.loss(some_bins(), all_measured(), 0.5, draws()).backward()
    grown = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.abs().max() > 0}
    assert grown == names


def test_what_genes_do_together_is_learnt_that_no_marginal_can_tell():
    """Two kinds of spots: each gene has one bin or another, one half of the genes the other way round."""
    model = small(depth=1)
    optimizer, one = torch.optim.Adam(model.trained_parameters(), lr=1e-2), draws()
    turned = torch.arange(GENES) % 2 == 0
    model.initialise(torch.tensor([0.01, 0.48, 0.01, 0.01, 0.48, 0.01]).log().expand(GENES, -1))
    losses = []
    for _ in range(40):
        kind = torch.rand(32, 1, generator=one) < 0.5
        bins = torch.where(kind == turned, 1, 4).byte()
        loss = model.loss(bins, all_measured(32), 0.15, one)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(-np.log(0.48), abs=1e-5)
    assert np.mean(losses[-5:]) < 0.5 * losses[0]
