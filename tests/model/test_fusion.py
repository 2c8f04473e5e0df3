"""fusion.py: it begins at the base rate; no token and no attention is dead; hard negatives are of other spots,
drawn by their weight."""

import pytest
import torch

from model.fusion import Fusion, hard_negatives
from model.layers import Attention

WIDTH = 16


def fusion_and_tokens(blocks=2):
    """Tokens, and a fusion whose last layer is no longer zero, as it is before the first step."""
    torch.manual_seed(0)
    fusion = Fusion(WIDTH, blocks, heads=4, hidden=32)
    torch.nn.init.normal_(fusion.to_logit.weight)
    return fusion, torch.randn(3, 5, WIDTH), torch.randn(3, 7, WIDTH)


def test_before_the_first_step_the_fusion_predicts_the_base_rate_of_pairs():
    logits = Fusion(WIDTH, blocks=1, heads=4, hidden=32)(torch.randn(3, 5, WIDTH), torch.randn(3, 7, WIDTH))
    torch.testing.assert_close(logits.sigmoid(), torch.full((3,), 1 / 3))


def test_close_logits_do_not_tie_in_half_precision():
    fusion, genes, image = fusion_and_tokens()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        fusion.to_logit.weight.mul_(1e-3)
        logits = fusion(genes[:1] + 0.1 * torch.randn(200, 5, WIDTH), image[:1].expand(200, -1, -1))
    assert logits.dtype == torch.float32 and len(logits.unique()) > 190


# ---- tokens


@torch.no_grad()
def test_every_token_of_both_sides_counts():
    fusion, genes, image = fusion_and_tokens()
    logits = fusion(genes, image)
    assert logits.shape == (3,)
    for side, tokens in enumerate((genes, image)):
        for i in range(tokens.shape[1]):
            changed = tokens.clone()
            changed[:, i] = torch.randn(3, WIDTH)
            other = fusion(changed, image) if side == 0 else fusion(genes, changed)
            assert ((other - logits).abs() > 1e-4).all(), (side, i)


def test_queries_and_keys_of_every_attention_learn():
    fusion, genes, image = fusion_and_tokens()
    fusion(genes, image).sum().backward()
    attentions = [m for m in fusion.modules() if isinstance(m, Attention)]
    assert len(attentions) == 4
    for attention in attentions:
        to_keys = attention.to_kv.weight.grad[:WIDTH]
        to_values = attention.to_kv.weight.grad[WIDTH:]
        for gradient in (attention.to_q.weight.grad, to_keys, to_values):
            assert gradient.abs().max() > 1e-5


@torch.no_grad()
def test_the_order_of_tokens_is_irrelevant():
    fusion, genes, image = fusion_and_tokens()
    expected = fusion(genes, image)
    torch.testing.assert_close(fusion(genes, image[:, torch.randperm(7)]), expected)
    torch.testing.assert_close(fusion(genes[:, torch.randperm(5)], image), expected)


@torch.no_grad()
def test_pairs_of_a_batch_do_not_touch_each_other():
    fusion, genes, image = fusion_and_tokens()
    torch.testing.assert_close(fusion(genes[1:2], image[1:2]), fusion(genes, image)[1:2])


def test_precomputed_sides_give_the_logits_and_gradients_of_single_pairs():
    fusion, genes, image = fusion_and_tokens(blocks=3)
    genes.requires_grad_(), image.requires_grad_()
    candidates = torch.tensor([[0, 2, 1, 1], [1, 0, 0, 2], [2, 2, 1, 0]])
    scores = fusion.score(fusion.precompute_genes(genes)[candidates], fusion.precompute_images(image))
    pairs = [[fusion(genes[g : g + 1], image[i : i + 1]) for g in row] for i, row in enumerate(candidates.tolist())]
    one_by_one = torch.stack([torch.cat(row) for row in pairs])
    assert scores.shape == (3, 4) and scores.std() > 1e-3
    torch.testing.assert_close(scores, one_by_one)
    weight = torch.randn(3, 4)
    parameters = [genes, image, *fusion.parameters()]
    found = torch.autograd.grad((scores * weight).sum(), parameters)
    expected = torch.autograd.grad((one_by_one * weight).sum(), parameters)
    for ours, plain in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-5)


# ---- hard negatives


def draws(similarity, spots, n, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.stack([hard_negatives(similarity, spots, generator) for _ in range(n)])  # (n, B)


def test_a_hard_negative_is_never_of_the_same_spot():
    spots = torch.tensor([0, 1, 0, 2, 1, 3])
    similarity = torch.where(spots[:, None] == spots[None, :], 50.0, 0.0)  # its own rows would be the likeliest
    found = draws(similarity, spots, 300)
    assert (spots[found] != spots).all()
    for row in range(6):
        assert set(found[:, row].tolist()) == {i for i in range(6) if spots[i] != spots[row]}


def test_hard_negatives_are_drawn_by_their_weight():
    wanted = torch.tensor([0.0, 1.0, 2.0, -1.0])
    similarity = torch.full((1000, 1000), -torch.inf)
    similarity[:, :4] = wanted  # rows 4 and on may choose among all four
    found = draws(similarity, torch.arange(1000), 10)
    fraction = torch.stack([(found[:, 4:] == i).float().mean() for i in range(4)])
    torch.testing.assert_close(fraction, wanted.softmax(0), rtol=0, atol=0.02)
    first = (found[:, 1] == 2).float().mean()  # row 1 may not choose itself
    assert first > 0.4 and not (found[:, 1] == 1).any()


def test_hard_negatives_follow_the_generator():
    similarity, spots = torch.randn(8, 8), torch.arange(8)
    assert torch.equal(draws(similarity, spots, 5, seed=1), draws(similarity, spots, 5, seed=1))
    assert not torch.equal(draws(similarity, spots, 5, seed=1), draws(similarity, spots, 5, seed=2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_far_apart_similarities_still_give_a_draw(dtype):
    similarity = torch.tensor([[0.0, -300.0, -300.0], [100.0, 0.0, -100.0], [-100.0, 100.0, 0.0]], dtype=dtype)
    found = draws(similarity, torch.arange(3), 200)
    assert set(found[:, 0].tolist()) == {1, 2}
    assert set(found[:, 1].tolist()) == {0}
    assert set(found[:, 2].tolist()) == {1}


def test_draws_are_those_of_multinomial_and_do_not_end_a_run_whose_weights_are_not_finite():
    similarity, spots = 3 * torch.randn(9, 9), torch.arange(9)
    weights = similarity.masked_fill(spots[:, None] == spots, -torch.inf).softmax(1)
    for seed in range(5):
        expected = torch.multinomial(weights, 1, generator=torch.Generator().manual_seed(seed)).squeeze(1)
        assert torch.equal(hard_negatives(similarity, spots, torch.Generator().manual_seed(seed)), expected)
    similarity[2] = torch.nan
    drawn = hard_negatives(similarity, spots, torch.Generator().manual_seed(0))
    assert drawn.shape == (9,) and 0 <= int(drawn.min()) and int(drawn.max()) < 9
