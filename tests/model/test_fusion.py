"""fusion.py: it begins near the base rate; no token and no attention is dead; negatives are of other spots, drawn
uniformly."""

import pytest
import torch

from model.fusion import PRIOR_LOGIT, Fusion, draw_negatives
from model.layers import Attention

WIDTH = 16


def fusion_and_tokens(blocks=2):
    """Tokens, and a fusion whose logits differ much from pair to pair."""
    torch.manual_seed(0)
    fusion = Fusion(WIDTH, blocks, heads=4, hidden=32)
    torch.nn.init.normal_(fusion.to_logit.weight)
    return fusion, torch.randn(3, 5, WIDTH), torch.randn(3, 7, WIDTH)


def test_before_the_first_step_the_fusion_predicts_about_the_base_rate_and_its_last_layer_is_live():
    torch.manual_seed(0)
    fusion = Fusion(64, blocks=1, heads=4, hidden=32)
    genes = torch.randn(50, 5, 64, requires_grad=True)
    logits = fusion(genes, torch.randn(50, 7, 64))
    assert torch.sigmoid(torch.tensor(PRIOR_LOGIT)).item() == pytest.approx(1 / 3)
    assert logits.mean().item() == pytest.approx(PRIOR_LOGIT, abs=0.3)
    logits.sum().backward()
    assert genes.grad.abs().max() > 0  # a last layer of zeros would keep the encoders from the first gradients


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


# ---- negatives


def draws(spots, n, seed=0):
    return draw_negatives(spots, n, torch.Generator().manual_seed(seed))  # (B, n)


def test_a_negative_is_never_of_the_same_spot_and_all_others_are_equally_likely():
    spots = torch.tensor([0, 1, 0, 2, 1, 3])
    found = draws(spots, 6000)
    assert found.shape == (6, 6000) and (spots[found] != spots[:, None]).all()
    for row in range(6):
        others = [i for i in range(6) if spots[i] != spots[row]]
        fraction = torch.bincount(found[row], minlength=6)[others] / 6000
        torch.testing.assert_close(fraction, torch.full_like(fraction, 1 / len(others)), rtol=0, atol=0.03)


def test_negatives_follow_the_generator():
    spots = torch.arange(8)
    assert torch.equal(draws(spots, 5, seed=1), draws(spots, 5, seed=1))
    assert not torch.equal(draws(spots, 5, seed=1), draws(spots, 5, seed=2))
