"""momentum.py: the momentum encoder against its closed form, the queue against a list that forgets."""

import itertools

import pytest
import torch
from torch import nn

from model.momentum import MAX_MOMENTUM, FeatureQueue, momentum_at, momentum_encoder, update_momentum


def network():
    """A frozen layer, a norm with buffers, a layer that trains."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    net[0].requires_grad_(False)
    return net


@torch.no_grad()
def jump(net):
    """An optimiser's step, and what a batch leaves in the buffers."""
    for p in net.parameters():
        if p.requires_grad:
            p.add_(torch.randn_like(p))
    net(torch.randn(8, 3) + 2)


def test_momentum_encoder_after_k_steps_is_the_exponential_mean():
    net, m, k = network(), 0.9, 7
    net_m = momentum_encoder(net)
    history = [[p.detach().clone() for p in net[2].parameters()]]
    for _ in range(k):
        jump(net)
        update_momentum(net_m, net, m)
        history.append([p.detach().clone() for p in net[2].parameters()])
    for i, slow in enumerate(net_m[2].parameters()):
        expected = m**k * history[0][i] + (1 - m) * sum(m ** (k - j) * history[j][i] for j in range(1, k + 1))
        torch.testing.assert_close(slow, expected)


def test_buffers_are_copied_not_shared():
    net = network()
    net_m = momentum_encoder(net)
    jump(net)
    assert not torch.equal(net_m[1].running_mean, net[1].running_mean)
    update_momentum(net_m, net, 0.99)
    for name, buffer in net.named_buffers():
        slow = dict(net_m.named_buffers())[name]
        assert torch.equal(slow, buffer)
        assert slow is not buffer


def test_frozen_parameters_are_the_same_objects_and_do_not_move():
    net = network()
    net_m = momentum_encoder(net)
    before = net[0].weight.clone()
    for _ in range(3):
        jump(net)
        update_momentum(net_m, net, 0.5)
    assert net_m[0].weight is net[0].weight
    assert net_m[0].bias is net[0].bias
    assert torch.equal(net[0].weight, before)
    for slow, fast in zip(net_m[2].parameters(), net[2].parameters(), strict=True):
        assert slow is not fast


def test_a_wholly_frozen_module_is_shared_and_its_buffers_still_follow():
    net = network().requires_grad_(False)
    net_m = momentum_encoder(net)
    net[1].running_mean.fill_(5.0)
    update_momentum(net_m, net, 0.9)
    assert all(t is p for t, p in zip(net_m.parameters(), net.parameters(), strict=True))
    assert torch.equal(net_m[1].running_mean, net[1].running_mean)


def test_momentum_encoder_has_no_gradient_and_leaves_the_module_its_own():
    net = network()
    net_m = momentum_encoder(net)
    assert not any(p.requires_grad for p in net_m.parameters())
    assert not net_m.training
    assert net.training
    assert [p.requires_grad for p in net.parameters()] == [False, False, True, True, True, True]
    assert not net_m(torch.randn(2, 3)).requires_grad


def test_the_momentum_rises_to_its_maximum():
    found = [momentum_at(step) for step in (0, 1, 10, 100, 1000, 10_000, 10**6)]
    assert all(0 <= one < 1 for one in found) and found[0] < 0.9
    assert all(one <= other for one, other in itertools.pairwise(found))
    assert found[-1] == MAX_MOMENTUM == 0.995


def rows_of(spots, width=2):
    """Features one can tell a spot by: images hold its id, profiles minus its id."""
    spots = torch.as_tensor(spots)
    image = spots.float()[:, None].expand(-1, width)
    return image, -image, spots


def exclusive(queue):
    """The spots in the queue, each with its own features."""
    image, gene, spot = queue.filled()
    assert torch.equal(image, spot.float()[:, None].expand(-1, 2))
    assert torch.equal(gene, -image)
    return sorted(spot.tolist())


@pytest.mark.parametrize("batches", [[3, 3, 3, 3, 3], [2, 5, 1, 4], [7], [3, 9, 2], [1] * 12, [5, 5]])
def test_queue_holds_the_latest_rows(batches):
    queue, seen = FeatureQueue(5, 2), []
    assert exclusive(queue) == []
    for n in batches:
        new = list(range(len(seen), len(seen) + n))
        queue.push(*rows_of(new))
        seen += new
        assert exclusive(queue) == seen[-5:]


def test_queue_without_capacity_stays_empty():
    queue = FeatureQueue(0, 2)
    queue.push(*rows_of([1, 2, 3]))
    image, gene, spot = queue.filled()
    assert image.shape == gene.shape == (0, 2)
    assert spot.shape == (0,)


def test_what_the_queue_gave_out_outlives_the_next_push():
    queue = FeatureQueue(3, 2)
    queue.push(*rows_of([1, 2, 3]))
    given = queue.filled()
    kept = [x.clone() for x in given]
    queue.push(*rows_of([4, 5]))
    assert all(torch.equal(a, b) for a, b in zip(given, kept, strict=True))


def test_a_queue_goes_on_from_its_saved_state():
    queue, other = FeatureQueue(5, 2), FeatureQueue(5, 2)
    queue.push(*rows_of([1, 2, 3]))
    other.load_state_dict(queue.state_dict())
    for one in (queue, other):
        one.push(*rows_of([4, 5, 6]))
        assert exclusive(one) == [2, 3, 4, 5, 6]


def test_queue_takes_half_precision_and_no_gradient():
    queue = FeatureQueue(4, 2)
    image = torch.ones(2, 2, dtype=torch.bfloat16, requires_grad=True)
    queue.push(image, image * 2, torch.tensor([0, 1]))
    kept, gene, _ = queue.filled()
    assert kept.dtype == gene.dtype == torch.float32
    assert not kept.requires_grad
    assert not gene.requires_grad
