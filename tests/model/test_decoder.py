"""decoder.py: what the prediction starts from, what it attends to, and what a missing neighbour must not do."""

import pytest
import torch
from torch import nn

from model.decoder import VECTOR_WEIGHT, GeneDecoder, KernelRidge, LinearExpansion
from model.layers import Attention

WIDTH, GENES, TOKENS, CONTEXT, BANDWIDTHS, LANDMARKS = 12, 9, 4, 5, 3, 7


def decoder(trained=True):
    """In evaluation mode; `trained`: the read-out has left its zero start."""
    torch.manual_seed(0)
    model = GeneDecoder(WIDTH, GENES, layers=2, decoder_width=16, n_landmarks=LANDMARKS, n_bandwidths=BANDWIDTHS).eval()
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
        "smoothed": torch.randn(n, BANDWIDTHS, WIDTH),
    }


def begun(model, gamma=0.7, places=None, n_parts=1 + BANDWIDTHS):
    """Its ridge has landmarks, at random `places` if not given, and random weights."""
    model.ridge.set_landmarks(torch.randn(LANDMARKS, 1 + BANDWIDTHS, WIDTH) if places is None else places, n_parts)
    model.initialise(gamma, torch.randn(GENES, LANDMARKS), torch.randn(GENES))
    return model


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
def test_prediction_starts_as_the_kernel_ridge_on_the_spot_and_the_smoothed_features():
    model, given = begun(decoder(trained=False)), batch()
    spots = torch.cat([given["vector"][:, None], given["smoothed"]], 1)
    torch.testing.assert_close(model(**given), model.ridge(spots))
    for name in ("vector", "smoothed"):
        assert smallest_change(model, given, **{name: torch.randn_like(given[name])}) > 1e-4


def test_what_is_learnt_leaves_the_start_and_the_ridge_stays():
    model, given = begun(decoder(trained=False)), batch()
    start, ridge = model(**given).detach(), model.ridge.linear.weight.clone()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.1)
    model(**given).square().mean().backward()
    optimizer.step()
    assert not torch.allclose(model(**given), start, atol=1e-3)
    assert torch.equal(model.ridge.linear.weight, ridge) and model.ridge.linear.weight.grad is None
    for last in (model.expand[-1], model.read_out):
        assert last.weight.abs().max() > 0


# ---- the kernel


def slow_kernel_ridge(model, places, spots, n_parts):
    """Spot by spot, landmark by landmark and part by part, in double precision."""
    places = places[:, :n_parts].double()
    weights = [VECTOR_WEIGHT] + [1.0] * (n_parts - 1)
    found = []
    for spot in spots[:, :n_parts].double():
        total = model.linear.bias.double().clone()
        for weight, landmark in zip(model.linear.weight.double().T, places, strict=True):
            parts = [
                part_weight * (a - b).square().sum() / (2 * places[:, i].var(0, correction=0).sum())
                for i, (part_weight, a, b) in enumerate(zip(weights, spot, landmark, strict=True))
            ]
            total += weight * torch.exp(-model.gamma.double() * sum(parts) / sum(weights))
        found.append(total)
    return torch.stack(found)


@torch.no_grad()
@pytest.mark.parametrize("n_parts", [1, 3, 1 + BANDWIDTHS])
@pytest.mark.parametrize("gamma", [0.03, 1.0])
def test_kernel_is_that_of_a_slow_loop(gamma, n_parts):
    places = torch.randn(LANDMARKS, 1 + BANDWIDTHS, WIDTH)
    places[:, 1] *= 10  # a part of another size weighs no more
    model = begun(decoder(), gamma, places, n_parts).ridge
    spots = torch.randn(5, 1 + BANDWIDTHS, WIDTH)
    torch.testing.assert_close(
        model(spots).double(), slow_kernel_ridge(model, places, spots, n_parts), atol=1e-5, rtol=1e-5
    )


@torch.no_grad()
def test_kernel_keeps_single_precision_under_autocast():
    model, spots = begun(decoder()).ridge, torch.randn(5, 1 + BANDWIDTHS, WIDTH)
    expected = model(spots)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(model(spots), expected)
        assert model.linear(torch.ones(1, LANDMARKS)).dtype == torch.bfloat16, "the context is in force"


@torch.no_grad()
def test_distances_of_landmarks_are_0_to_themselves_and_1_on_average():
    model = KernelRidge(200, 1 + BANDWIDTHS, WIDTH, GENES)
    places = torch.randn(200, 1 + BANDWIDTHS, WIDTH)
    model.set_landmarks(places, 1 + BANDWIDTHS)
    found = model.distances(places)
    torch.testing.assert_close(found.diagonal(), torch.zeros(200), atol=1e-5, rtol=0)
    assert found.mean().item() == pytest.approx(1, abs=1e-4)


@torch.no_grad()
def test_a_constant_part_is_left_out():
    """As the smoothed features are where every spot is alone, or there is one landmark."""
    model, landmarks = KernelRidge(6, 2, WIDTH, GENES), torch.randn(6, 2, WIDTH)
    landmarks[:, 1] = 0
    model.set_landmarks(landmarks, 2)
    spots = torch.randn(3, 2, WIDTH)
    other = torch.stack([spots[:, 0], torch.randn(3, WIDTH)], 1)
    assert torch.equal(model.distances(spots), model.distances(other)) and model.distances(spots).min() > 0


def test_every_gene_changes_with_each_part_of_the_image():
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
    model.type_embedding[kind] += torch.randn(16)
    assert ((model.memory(*parts) - before).abs().amax((0, 2)) > 1e-3).nonzero().flatten().tolist() == rows


def test_every_parameter_learns_and_no_attention_is_dead():
    model, given = decoder().train(), batch(n=8)
    model(**given).square().sum().backward()
    for name, p in model.named_parameters():
        if not name.startswith("ridge.linear."):
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
    model = GeneDecoder(WIDTH, GENES, layers=layers, decoder_width=16, n_bandwidths=BANDWIDTHS)
    assert model(**batch()).shape == (3, GENES)
