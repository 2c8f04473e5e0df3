"""losses.py by hand, and against torch's own losses."""

import math

import pytest
import torch
import torch.nn.functional as F
from sklearn.metrics import roc_auc_score

from model import losses


def test_onehot_shares_one_among_the_entries_of_the_same_spot():
    found = losses.same_spot_onehot(torch.tensor([4, 7, 9]), torch.tensor([4, 7, 9, 7, 4, 7]))
    third = 1 / 3
    expected = [[0.5, 0, 0, 0, 0.5, 0], [0, third, 0, third, 0, third], [0, 0, 1, 0, 0, 0]]
    torch.testing.assert_close(found, torch.tensor(expected))


def test_target_mixes_softmax_and_onehot_by_alpha():
    logits, onehot = torch.tensor([[0.0, math.log(3.0)]]), torch.tensor([[1.0, 0.0]])
    torch.testing.assert_close(losses.distilled_target(logits, onehot, 0.0), onehot)
    torch.testing.assert_close(losses.distilled_target(logits, onehot, 1.0), torch.tensor([[0.25, 0.75]]))
    torch.testing.assert_close(losses.distilled_target(logits, onehot, 0.4), torch.tensor([[0.7, 0.3]]))


@pytest.mark.parametrize("alpha", [0.0, 0.4, 1.0])
def test_targets_sum_to_one(alpha):
    torch.manual_seed(0)
    spots = torch.tensor([0, 1, 2, 1])
    onehot = losses.same_spot_onehot(spots, torch.cat([spots, torch.tensor([2, 5, 5, 0])]))
    target = losses.distilled_target(30 * torch.randn(4, 8), onehot, alpha)
    torch.testing.assert_close(target.sum(1), torch.ones(4))


def test_soft_cross_entropy_equals_torch():
    torch.manual_seed(0)
    logits, target = 20 * torch.randn(5, 9), torch.rand(5, 9).softmax(1)
    torch.testing.assert_close(losses.soft_cross_entropy(logits, target), F.cross_entropy(logits, target))
    chance = losses.soft_cross_entropy(torch.zeros(5, 9), target)
    assert float(chance) == pytest.approx(math.log(9))


def test_losses_of_half_precision_logits_are_computed_in_full():
    torch.manual_seed(0)
    logits, target = torch.randn(4, 50, dtype=torch.bfloat16), torch.full((4, 50), 0.02)
    for loss in (losses.soft_cross_entropy, losses.matching_loss, losses.expression_loss):
        found = loss(logits, target)
        assert found.dtype == torch.float32
        assert torch.equal(found, loss(logits.float(), target))
    found = losses.distilled_target(logits, target, 0.5)
    assert torch.equal(found, losses.distilled_target(logits.float(), target, 0.5))


def test_matching_loss_by_hand():
    logits = torch.tensor([math.log(3.0), 0.0])  # probabilities 3/4 and 1/2
    expected = -(math.log(3 / 4) + math.log(1 / 2)) / 2
    assert float(losses.matching_loss(logits, torch.tensor([True, False]))) == pytest.approx(expected)


def test_pair_auc_is_that_of_scikit_learn_ties_too():
    pairs, others = torch.tensor([0.5, 2.0, -1.0]), torch.tensor([0.5, 0.5, -3.0, 2.5])
    expected = roc_auc_score([1] * 3 + [0] * 4, torch.cat([pairs, others]))
    assert losses.pair_auc(pairs, others).item() == pytest.approx(expected) == 0.5


def test_expression_loss_is_the_mean_over_measured_entries():
    predicted = torch.tensor([[1.0, 2.0], [3.0, 4.0]], requires_grad=True)
    measured = torch.tensor([[0.0, torch.nan], [1.0, torch.nan]])
    loss = losses.expression_loss(predicted, measured)
    assert loss.item() == pytest.approx((1 + 4) / 2)
    loss.backward()
    torch.testing.assert_close(predicted.grad, torch.tensor([[1.0, 0.0], [2.0, 0.0]]))


def test_expression_loss_of_a_single_measurement_is_its_square():
    measured = torch.tensor([[torch.nan, 3.0], [torch.nan, torch.nan]])
    assert losses.expression_loss(torch.ones(2, 2), measured).item() == 4


def test_expression_loss_without_any_measurement_is_zero():
    predicted = torch.ones(2, 3, requires_grad=True)
    loss = losses.expression_loss(predicted, torch.full((2, 3), torch.nan))
    loss.backward()
    assert loss.item() == 0
    assert torch.equal(predicted.grad, torch.zeros(2, 3))
