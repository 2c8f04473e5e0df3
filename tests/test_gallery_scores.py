"""Scores of a gallery in get_accuracy_image.py: each row against a loop over spots and candidates."""

import contextlib
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import get_accuracy_image
from utils.training.features import EncodedPairs

SCALE = 7.0
ACCELERATOR = SimpleNamespace(autocast=contextlib.nullcontext)


def fusion(gene_tokens, image_tokens):
    """Asymmetric: which side is which, and every token, matters."""
    weights = torch.arange(1.0, 1 + gene_tokens.shape[1])
    return (gene_tokens.sum(2) * weights).sum(1) - 2 * image_tokens.prod(1).sum(1)


@pytest.fixture
def made(rng):
    """Eleven spots in batches of four, galleries of four candidates, some of them padding."""

    def batches(*shape):
        return list(torch.from_numpy(rng.normal(size=(11, *shape)).astype(np.float32)).split(4))

    candidates = np.stack([rng.permutation(11)[:4] for _ in range(11)])
    candidates[[2, 5, 5], [3, 1, 2]] = -1
    model = SimpleNamespace(fusion=fusion, contrast=SimpleNamespace(logit_scale=torch.tensor(SCALE).log()))
    encoded = EncodedPairs(batches(5), batches(5), batches(3, 5), batches(2, 5))
    depths = rng.normal(size=(2, 11))
    found = get_accuracy_image.gallery_scores(model, encoded, depths[0], depths[1], candidates, ACCELERATOR)
    return SimpleNamespace(encoded=encoded, candidates=candidates, depths=depths, found=found)


def valid(made):
    return [(s, k, c) for s, line in enumerate(made.candidates) for k, c in enumerate(line) if c >= 0]


def similarity(made, spot, candidate):
    image, gene = (torch.cat(side).numpy() for side in (made.encoded.image, made.encoded.gene))
    return SCALE * float(image[spot] @ gene[candidate])


def logit(made, spot, candidate):
    image, gene = torch.cat(made.encoded.image_tokens), torch.cat(made.encoded.gene_tokens)
    return float(fusion(gene[[candidate]], image[[spot]]))


def test_contrast_is_the_scaled_product_of_the_two_vectors(made):
    for s, k, c in valid(made):
        assert made.found["contrastive"][s, k] == pytest.approx(similarity(made, s, c), rel=1e-4, abs=1e-4)


@pytest.mark.parametrize("at_once", [256, 5])
def test_matching_is_the_logit_of_the_pair(made, monkeypatch, at_once):
    monkeypatch.setattr(get_accuracy_image, "PAIRS_AT_ONCE", at_once)
    model = SimpleNamespace(fusion=fusion)
    found = get_accuracy_image.match_scores(model, made.encoded, made.candidates, ACCELERATOR)
    for s, k, c in valid(made):
        assert found[s, k] == pytest.approx(logit(made, s, c), rel=1e-4, abs=1e-4)
        assert made.found["matching"][s, k] == pytest.approx(found[s, k], rel=1e-4, abs=1e-4)


def test_the_re_ranker_adds_the_log_share_among_the_candidates(made):
    """Padding takes no share."""
    for s, k, c in valid(made):
        shown = [similarity(made, s, other) for other in made.candidates[s] if other >= 0]
        share = np.exp(similarity(made, s, c)) / np.exp(shown).sum()
        assert made.found["reranked"][s, k] == pytest.approx(logit(made, s, c) + np.log(share), rel=1e-3, abs=1e-3)


def test_depth_is_nearness_to_the_predicted_depth(made):
    predicted, measured = made.depths
    for s, k, c in valid(made):
        assert made.found["depth"][s, k] == pytest.approx(-abs(predicted[s] - measured[c]))
