"""stage_one.py: which pairs are matched, how that is scored, and what draws the negatives."""

import math

import pytest
import torch
from small_stage_one import BATCH, batch_of, stage_one, step_of


class Recorder(torch.nn.Module):
    """In place of the fusion: keeps what it is given, returns `answer` for each (gene, image) of token values."""

    def __init__(self, answer):
        super().__init__()
        self.answer, self.calls = answer, []

    def precompute_genes(self, tokens):
        return tokens

    def precompute_images(self, tokens):
        return [tokens[None]]

    def score(self, genes, images):
        labels = genes[:, :, 0, 0].long()  # (B, C)
        self.calls.append((labels, images[0][0, :, 0, 0].long()[:, None].expand_as(labels)))
        return self.answer(*self.calls[-1]).float()

    @property
    def given(self):
        """Labels of all pairs, first candidates first: (3 B,) of profiles, (3 B,) of images."""
        return (torch.cat([call[side].T.flatten() for call in self.calls]) for side in (0, 1))


def matched(answer, spots):
    """Loss, AUC and what the fusion saw, for tokens that carry the number of their spot."""
    model = stage_one()
    model.fusion = Recorder(answer)
    tokens = spots.float()[:, None, None].expand(-1, 2, 32)
    return *model.match(tokens, tokens, spots, torch.Generator().manual_seed(0)), *model.fusion.given


def test_matching_sees_each_pair_with_a_wrong_profile_and_a_wrong_image():
    spots = torch.tensor([3, 5, 5, 8])
    _, _, genes, images = matched(lambda g, i: torch.zeros(g.shape), spots)
    n = len(spots)
    assert genes[:n].tolist() == images[:n].tolist() == spots.tolist()
    assert images[n : 2 * n].tolist() == spots.tolist()
    assert genes[2 * n :].tolist() == spots.tolist()
    assert (genes[n:] != images[n:]).all()


def test_a_step_matches_the_tokens_that_the_encoders_give():
    model, batch = stage_one(), batch_of()
    model.fusion = Recorder(lambda g, i: torch.zeros(g.shape))
    seen = {}
    for side in ("precompute_genes", "precompute_images"):
        original = getattr(model.fusion, side)
        setattr(
            model.fusion, side, lambda tokens, side=side, original=original: original(seen.setdefault(side, tokens))
        )
    step_of(model, batch)
    torch.testing.assert_close(seen["precompute_genes"], model.encode_genes(batch["bins"])[1])
    torch.testing.assert_close(seen["precompute_images"], model.encode_images(batch["tiles"])[1])
    assert [labels.shape for labels, _ in model.fusion.calls] == [(BATCH, 2), (BATCH, 1)]


@pytest.mark.parametrize(
    ("answer", "auc", "loss"),
    [
        (lambda g, i: 8.0 * (g == i) - 4.0, 1.0, math.log1p(math.exp(-4))),
        (lambda g, i: 4.0 - 8.0 * (g == i), 0.0, math.log1p(math.exp(4))),
        (lambda g, i: torch.full(g.shape, 4.0), 0.5, (math.log1p(math.exp(-4)) + 2 * math.log1p(math.exp(4))) / 3),
        (lambda g, i: torch.full(g.shape, -4.0), 0.5, (math.log1p(math.exp(4)) + 2 * math.log1p(math.exp(-4))) / 3),
    ],
    ids=["knows", "errs", "always yes", "always no"],
)
def test_matching_auc_does_not_depend_on_a_cut(answer, auc, loss):
    loss_found, found, *_ = matched(answer, torch.tensor([3, 5, 6, 8]))
    assert found.item() == pytest.approx(auc)
    assert loss_found.item() == pytest.approx(loss, rel=1e-4)


def test_without_its_weight_the_fusion_is_not_computed():
    model, batch = stage_one(), batch_of()
    model.fusion = Recorder(lambda g, i: torch.zeros(g.shape))
    found = step_of(model, batch, matching_weight=0.0)
    assert not model.fusion.calls and found.matching.item() == 0
    assert found.loss.item() == found.contrast.item()


def test_negatives_of_a_step_follow_its_generator():
    model, batch = stage_one(), batch_of()
    first, again, other = (step_of(model, batch, seed=s).matching for s in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
