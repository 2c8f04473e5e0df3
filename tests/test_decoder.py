"""decoder.py: what the prediction starts from, what it looks at, and what a missing neighbour must not do."""

import numpy as np
import pytest
import torch
from torch import nn

from model import decoder as decoders
from model.decoder import GeneDecoder, LinearExpansion, with_rings
from model.layers import Attention
from utils.evaluation import baselines
from utils.training import feature_bank

WIDTH, GENES, TOKENS, CONTEXT = 12, 9, 4, 5


def decoder(trained=True):
    """In evaluation mode; `trained`: the read-out has left its zero start."""
    torch.manual_seed(0)
    model = GeneDecoder(WIDTH, GENES, layers=2, decoder_width=16).eval()
    if trained:
        nn.init.normal_(model.read_out.weight)
    return model


def batch(n=3, context=CONTEXT):
    torch.manual_seed(1)
    return {
        "vector": torch.randn(n, WIDTH),
        "tokens": torch.randn(n, TOKENS, WIDTH),
        "context": torch.randn(n, context, WIDTH),
        "offsets": torch.randn(n, context, 2),
        "present": torch.ones(n, context, dtype=torch.bool),
    }


def smallest_change(model, before, **changed):
    """Least absolute change of any gene of any spot."""
    with torch.no_grad():
        return (model(**before | changed) - model(**before)).abs().min()


@torch.no_grad()
def test_prediction_starts_as_the_expansion():
    model, given = decoder(trained=False), batch()
    torch.testing.assert_close(model(**given), model.expand(given["vector"]))
    assert not torch.allclose(decoder()(**given), model.expand(given["vector"]), atol=0.1)


@torch.no_grad()
def test_prediction_starts_as_the_ridge_on_the_spot_and_its_rings():
    model, given = decoder(trained=False), batch(context=30)
    weight, bias = torch.randn(GENES, 3 * WIDTH), torch.randn(GENES)
    model.start_from(weight, bias)
    seen = with_rings(**{name: rows for name, rows in given.items() if name != "tokens"})
    torch.testing.assert_close(model(**given), seen @ weight.T + bias)
    assert seen.abs().min() > 0, "both rings are filled"


def test_what_is_learnt_leaves_the_start_and_the_ridge_stays():
    model, given = decoder(trained=False), batch()
    model.start_from(torch.randn(GENES, 3 * WIDTH), torch.randn(GENES))
    start, ridge = model(**given).detach(), model.ridge.weight.clone()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.1)
    model(**given).square().mean().backward()
    optimizer.step()
    assert not torch.allclose(model(**given), start, atol=1e-3)
    assert torch.equal(model.ridge.weight, ridge) and model.ridge.weight.grad is None
    for last in (model.expand[-1], model.read_out):
        assert last.weight.abs().max() > 0


def hexagonal():
    column, row = np.meshgrid(np.arange(9), np.arange(8))
    return np.column_stack([(column + 0.5 * (row % 2)).ravel(), (row * np.sqrt(0.75)).ravel()])


def square():
    return np.column_stack([axis.ravel() for axis in np.meshgrid(np.arange(9), np.arange(8))]).astype(float)


@pytest.mark.parametrize(("grid", "context"), [(hexagonal, 18), (square, 20)])
def test_rings_of_the_context_are_the_rings_of_the_baselines(grid, context):
    """Where the context holds both: 6 and 12 spots on a hexagonal grid, 4 and 16 on a square one."""
    rng, pitch = np.random.default_rng(0), 137.0
    xy = grid()
    xy = np.concatenate([xy[rng.random(len(xy)) < 0.9], [[99, 99]]]) * pitch  # gaps, an edge, a spot alone
    vectors = rng.normal(size=(len(xy), WIDTH)).astype(np.float32)
    index, offsets, present = feature_bank.neighbours(xy, pitch, context)
    whole = (torch.from_numpy(each) for each in (vectors, vectors[index], offsets, present))
    expected = baselines.ring_features(vectors, xy, pitch)
    np.testing.assert_allclose(with_rings(*whole), expected, rtol=1e-4, atol=1e-5)
    assert np.abs(expected[:-1, WIDTH:]).min() > 0 and not expected[-1, WIDTH:].any()


def test_rings_are_written_alike_in_both_places():
    assert decoders.RINGS == baselines.RINGS


def test_every_gene_changes_with_each_part_of_the_picture():
    model, given = decoder(), batch()
    assert smallest_change(model, given, vector=torch.randn(3, WIDTH)) > 1e-4
    for name in ("tokens", "context"):
        for i in range(given[name].shape[1]):
            other = given[name].clone()
            other[:, i] = 3 * torch.randn(3, WIDTH)
            assert smallest_change(model, given, **{name: other}) > 1e-6, (name, i)


def test_offsets_matter():
    model, given = decoder(), batch()
    assert smallest_change(model, given, offsets=given["offsets"].flip(1)) > 1e-6


@torch.no_grad()
def test_order_of_the_context_is_irrelevant_with_its_offsets():
    model, given = decoder(), batch()
    given["present"][:, 1] = False
    order = torch.randperm(CONTEXT)
    turned = {name: given[name][:, order] for name in ("context", "offsets", "present")}
    torch.testing.assert_close(model(**given | turned), model(**given))


@torch.no_grad()
def test_missing_neighbours_do_not_matter():
    model, given = decoder(), batch()
    given["present"][:, 2:] = False
    context, offsets = given["context"].clone(), given["offsets"].clone()
    context[:, 2:], offsets[:, 2:] = 1e4, -1e4
    expected = model(**given)
    torch.testing.assert_close(model(**given | {"context": context, "offsets": offsets}), expected)
    short = {name: given[name][:, :2] for name in ("context", "offsets", "present")}
    torch.testing.assert_close(model(**given | short), expected)
    assert smallest_change(model, given, present=torch.ones(3, CONTEXT, dtype=torch.bool)) > 1e-6


@torch.no_grad()
def test_a_spot_alone_is_predicted_from_its_own_tile():
    model, given = decoder(), batch()
    found = model(**given | {"present": torch.zeros(3, CONTEXT, dtype=torch.bool)})
    assert torch.isfinite(found).all()
    without = {name: given[name][:, :0] for name in ("context", "offsets", "present")}
    torch.testing.assert_close(model(**given | without), found)


@torch.no_grad()
def test_spots_of_a_batch_do_not_touch_each_other_in_evaluation():
    model, given = decoder(), batch()
    torch.testing.assert_close(model(**{k: v[1:2] for k, v in given.items()}), model(**given)[1:2])


def rows_that_move(model, before, **changed):
    """Which rows of the memory change: the vector's, the tokens', the context's."""
    parts = [{name: given[name] for name in ("vector", "tokens", "context", "offsets")} for given in (before, changed)]
    return (
        ((model.memory(**parts[0]) - model.memory(**parts[1])).abs().amax((0, 2)) > 1e-3).nonzero().flatten().tolist()
    )


@torch.no_grad()
def test_memory_holds_the_vector_then_each_token_then_each_neighbour():
    model, given = decoder(), batch()
    assert rows_that_move(model, given, **given | {"vector": torch.randn(3, WIDTH)}) == [0]
    for name, first in (("tokens", 1), ("context", 1 + TOKENS), ("offsets", 1 + TOKENS)):
        for i in range(given[name].shape[1]):
            other = given[name].clone()
            other[:, i] += 1
            assert rows_that_move(model, given, **given | {name: other}) == [first + i]


@torch.no_grad()
@pytest.mark.parametrize(
    ("kind", "rows"), [(0, [0]), (1, [*range(1, 1 + TOKENS)]), (2, [*range(1 + TOKENS, 1 + TOKENS + CONTEXT)])]
)
def test_each_kind_of_memory_carries_its_mark(kind, rows):
    model, given = decoder(), batch()
    parts = [given[name] for name in ("vector", "tokens", "context", "offsets")]
    before = model.memory(*parts)
    model.kind[kind] += torch.randn(16)
    assert ((model.memory(*parts) - before).abs().amax((0, 2)) > 1e-3).nonzero().flatten().tolist() == rows


def test_every_parameter_learns_and_no_attention_is_dead():
    model, given = decoder().train(), batch(n=8)
    model(**given).square().sum().backward()
    for name, p in model.named_parameters():
        if not name.startswith("ridge."):
            assert p.grad is not None and p.grad.abs().max() > 0, name
    attentions = [m for m in model.modules() if isinstance(m, Attention)]
    assert len(attentions) == 4
    for attention in attentions:
        assert attention.to_q.weight.grad.abs().max() > 1e-6
        assert attention.to_kv.weight.grad[:16].abs().max() > 1e-6


def test_genes_have_queries_of_their_own():
    model, given = decoder(), batch()
    with torch.no_grad():
        for p in model.expand[-1].parameters():
            p.zero_()  # every gene starts from 0
    found = model(**given)
    assert (found[:, :, None] - found[:, None, :]).abs()[:, ~torch.eye(GENES, dtype=torch.bool)].min() > 1e-6


def test_expansion_has_the_published_widths():
    linear = [m for m in LinearExpansion(512, 300) if isinstance(m, nn.Linear)]
    assert [(m.in_features, m.out_features) for m in linear] == [(512, 1024), (1024, 1500), (1500, 300)]


@pytest.mark.parametrize("layers", [0, 1])
def test_depth_is_free(layers):
    model = GeneDecoder(WIDTH, GENES, layers=layers, decoder_width=16)
    assert model(**batch()).shape == (3, GENES)
