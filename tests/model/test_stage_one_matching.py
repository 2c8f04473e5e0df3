"""stage_one.py: which pairs are matched, how that is scored, and what draws the negatives."""

import math

import pytest
import torch
import torch.nn.functional as F
from small_stage_one import BATCH, batch_of, stage_one, step_of

from model.contrastive import Pair


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
    """Loss, accuracy and what the fusion saw, for tokens that carry the number of their spot."""
    model = stage_one()
    model.fusion = Recorder(answer)
    tokens = spots.float()[:, None, None].expand(-1, 2, 32)
    pair = Pair(F.normalize(torch.randn(len(spots), 32), dim=1), F.normalize(torch.randn(len(spots), 32), dim=1), spots)
    return *model.match(tokens, tokens, pair, torch.Generator().manual_seed(0)), *model.fusion.given


def test_matching_sees_each_pair_with_a_wrong_profile_and_a_wrong_image():
    spots = torch.tensor([3, 5, 5, 8])
    _, _, genes, images = matched(lambda g, i: torch.zeros(g.shape), spots)
    n = len(spots)
    assert genes[:n].tolist() == images[:n].tolist() == spots.tolist()
    assert images[n : 2 * n].tolist() == spots.tolist()
    assert genes[2 * n :].tolist() == spots.tolist()
    assert (genes[n:] != images[n:]).all()


def test_wrong_profiles_follow_the_images_row_and_wrong_images_the_profiles():
    model, n = stage_one(), 5
    model.fusion = Recorder(lambda g, i: torch.zeros(g.shape))
    spots = torch.arange(n)
    image = torch.eye(n, 32)
    gene = image.roll(1, dims=0)  # image i is most like profile i + 1, so profile i most like image i - 1
    tokens = spots.float()[:, None, None].expand(-1, 2, 32)
    model.match(tokens, tokens, Pair(image, gene, spots), torch.Generator().manual_seed(0))
    genes, images = model.fusion.given
    assert genes[n : 2 * n].tolist() == [1, 2, 3, 4, 0]
    assert images[2 * n :].tolist() == [4, 0, 1, 2, 3]


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
    ("answer", "accuracy", "loss"),
    [
        (lambda g, i: 8.0 * (g == i) - 4.0, 1.0, math.log1p(math.exp(-4))),
        (lambda g, i: 4.0 - 8.0 * (g == i), 0.0, math.log1p(math.exp(4))),
        (lambda g, i: torch.full(g.shape, 4.0), 0.5, (math.log1p(math.exp(-4)) + 2 * math.log1p(math.exp(4))) / 3),
        (lambda g, i: torch.full(g.shape, -4.0), 0.5, (math.log1p(math.exp(4)) + 2 * math.log1p(math.exp(-4))) / 3),
    ],
    ids=["knows", "errs", "always yes", "always no"],
)
def test_matching_accuracy_weighs_pairs_and_non_pairs_alike(answer, accuracy, loss):
    loss_found, fraction, *_ = matched(answer, torch.tensor([3, 5, 6, 8]))
    assert fraction.item() == pytest.approx(accuracy)
    assert loss_found.item() == pytest.approx(loss, rel=1e-4)


def test_hard_negatives_of_a_step_follow_its_generator():
    model, batch = stage_one(), batch_of()
    first, again, other = (step_of(model, batch, seed=s).matching for s in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
