"""contrastive.py against the paper's pseudo-code, written as double loops in NumPy."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from model.contrastive import ContrastiveHead, Pair

WIDTH = 6


def unit(n, seed):
    return F.normalize(torch.randn(n, WIDTH, generator=torch.Generator().manual_seed(seed)), dim=1)


def pairs_and_queue(spots, queue_spots):
    spots, queue_spots = torch.tensor(spots), torch.tensor(queue_spots, dtype=torch.long)
    pair, pair_m = (Pair(unit(len(spots), s), unit(len(spots), s + 1), spots) for s in (0, 2))
    return pair, pair_m, (unit(len(queue_spots), 4), unit(len(queue_spots), 5), queue_spots)


def slow_targets(query, keys, spots, candidates, t, alpha):
    """alpha softmax(s_m) + (1 - alpha) onehot, one entry at a time: (B, M)."""
    target = np.zeros((len(query), len(keys)))
    for i in range(len(query)):
        scores = [math.exp(float(query[i] @ keys[j]) / t) for j in range(len(keys))]
        positives = sum(int(candidates[j]) == int(spots[i]) for j in range(len(keys)))
        for j in range(len(keys)):
            own = (int(candidates[j]) == int(spots[i])) / positives
            target[i, j] = alpha * scores[j] / sum(scores) + (1 - alpha) * own
    return target


def slow_cross_entropy(query, keys, target, t):
    loss = 0.0
    for i in range(len(query)):
        scores = [math.exp(float(query[i] @ keys[j]) / t) for j in range(len(keys))]
        loss -= sum(target[i, j] * math.log(scores[j] / sum(scores)) for j in range(len(keys)))
    return loss / len(query)


def slow_loss(pair, pair_m, queue, t, alpha):
    """Both directions of the loss within the batch, and of the one against the keys of the momentum encoders."""
    s, w, old = ([x.double().numpy() for x in group] for group in (pair, pair_m, queue))
    candidates, total = np.concatenate([s[2], old[2]]), 0.0
    for query, key, slow_query, slow_key, past in (
        (s[0], s[1], w[0], w[1], old[1]),
        (s[1], s[0], w[1], w[0], old[0]),
    ):
        keys_m = np.concatenate([slow_key, past])
        target = slow_targets(slow_query, keys_m, s[2], candidates, t, alpha)
        np.testing.assert_allclose(target.sum(1), 1)
        total += slow_cross_entropy(query, key, slow_targets(query, key, s[2], s[2], t, 0.0), t) / 4
        total += slow_cross_entropy(query, keys_m, target, t) / 4
    return total


QUEUES = {
    "empty": [],
    "strangers": [10, 11, 12],
    "duplicates": [3, 10, 1, 3, 11],
    "half filled": [2, 2],
}


@pytest.mark.parametrize("alpha", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("queue_spots", QUEUES.values(), ids=QUEUES.keys())
@pytest.mark.parametrize("spots", [[0, 1, 2, 3], [0, 1, 0, 3]], ids=["all differ", "a spot twice"])
def test_loss_equals_double_loops(spots, queue_spots, alpha):
    pair, pair_m, queue = pairs_and_queue(spots, queue_spots)
    found = ContrastiveHead(0.2)(pair, pair_m, queue, alpha)
    assert found.item() == pytest.approx(slow_loss(pair, pair_m, queue, 0.2, alpha), rel=1e-5)


def test_without_momentum_encoders_it_is_the_plain_contrastive_loss():
    pair, _, queue = pairs_and_queue([0, 1, 2, 3], [])
    own = torch.arange(4)
    to_gene = F.cross_entropy(pair.image @ pair.gene.T / 0.07, own)
    to_image = F.cross_entropy(pair.gene @ pair.image.T / 0.07, own)
    torch.testing.assert_close(ContrastiveHead()(pair, None, queue, 0.0), (to_gene + to_image) / 2)


def test_equal_features_give_the_loss_of_chance():
    same, spots = torch.ones(4, WIDTH) / WIDTH**0.5, torch.arange(4)
    pair, queue = Pair(same, same, spots), (same, same, spots + 4)
    assert ContrastiveHead()(pair, pair, queue, 0.4).item() == pytest.approx((math.log(4) + math.log(8)) / 2)


def test_gradient_reaches_the_encoders_features_and_the_temperature_only():
    pair, pair_m, queue = pairs_and_queue([0, 1, 2, 3], [10, 11])
    for x in (*pair[:2], *pair_m[:2]):
        x.requires_grad_(True)
    head = ContrastiveHead()
    head(pair, pair_m, queue, 0.4).backward()
    for x in (*pair[:2], head.logit_scale):
        assert x.grad.abs().sum() > 0
    assert all(x.grad is None for x in pair_m[:2])


def test_gradient_of_the_temperature_leaves_the_target_out():
    pair, pair_m, queue = pairs_and_queue([0, 1, 2, 3], [10, 11])
    head, step = ContrastiveHead(0.2), 1e-3
    head(pair, pair_m, queue, 1.0).backward()
    with torch.no_grad():
        targets = [
            head.similarity(a, torch.cat([b, old])).softmax(1)
            for a, b, old in ((pair_m.image, pair_m.gene, queue[1]), (pair_m.gene, pair_m.image, queue[0]))
        ]
        keys = torch.cat([pair_m.gene, queue[1]]), torch.cat([pair_m.image, queue[0]])
        sides = list(zip((pair.image, pair.gene), keys, targets, strict=True))
        sides += [(pair.image, pair.gene, torch.eye(4)), (pair.gene, pair.image, torch.eye(4))]
        losses = []
        for sign in (1, -1):
            head.logit_scale.add_(sign * step)
            losses.append(sum(F.cross_entropy(head.similarity(a, b), target) for a, b, target in sides) / 4)
            head.logit_scale.sub_(sign * step)
    assert head.logit_scale.grad.item() == pytest.approx((losses[0] - losses[1]).item() / (2 * step), rel=1e-2)


def test_similarity_is_fp32_under_autocast():
    head, x = ContrastiveHead(), unit(4, 0)
    expected = x @ x.T / 0.07
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert (x @ x.T).dtype == torch.bfloat16
        torch.testing.assert_close(head.similarity(x, x), expected)


@pytest.mark.parametrize(("start", "kept"), [(-1.0, 0.0), (2.0, 2.0), (9.0, math.log(100))])
def test_temperature_is_kept_between_a_hundredth_and_one(start, kept):
    head = ContrastiveHead()
    assert head.logit_scale.item() == pytest.approx(math.log(1 / 0.07))
    with torch.no_grad():
        head.logit_scale.fill_(start)
    head.clamp()
    assert head.logit_scale.item() == pytest.approx(kept)
    assert head.logit_scale.requires_grad
