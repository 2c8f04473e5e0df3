"""benchmarks/device_fusion.py: what is fused by hand-made steps, and the bytes that are left."""

import pytest
import torch

from benchmarks.device_count import Cost


def counted(step, *tensors):
    with Cost() as cost, torch.no_grad():
        kept = step(*tensors)
    del kept
    return cost


def bytes_of(cost):
    return sorted(cost.graph.kernel_bytes())


@pytest.fixture
def x():
    return torch.randn(6, 4)


def test_what_follows_a_product_is_one_kernel_that_reads_and_writes_once(x):
    w = torch.randn(4, 4)
    cost = counted(lambda: (((x @ w).relu() + 1) * 2) @ w)
    assert bytes_of(cost) == [4 * (24 + 24)], "reads the product, writes what the next one reads"
    assert cost.nbytes == 4 * (2 * (24 + 16 + 24) + 3 * (24 + 24))
    expected = cost.matrix_s + cost.card.seconds(0, 4 * 48, 1.0)
    assert cost.fused_s == pytest.approx(expected) and cost.matrix_s < cost.fused_s < cost.seconds


def test_a_kernel_does_not_wait_for_itself(x):
    def step(w):
        y = x.relu()  # read by the product and, after it, by the sum
        return ((y @ w) + y) @ w

    cost = counted(step, torch.randn(4, 4))
    assert bytes_of(cost) == [4 * (24 + 24), 4 * (2 * 24 + 24)]


def test_what_two_operators_read_is_read_once_and_what_is_read_later_is_written(x):
    def step(w):
        y = x + 1
        z = y * y
        return (y @ w) + (z @ w)

    cost = counted(step, torch.randn(4, 4))
    [first] = (kernel for kernel in cost.graph.kernels() if len(kernel) == 2)
    assert [operator.depth for operator in first] == [0, 0]
    assert bytes_of(cost) == [4 * (2 * 24), 4 * (24 + 2 * 24)], "the sum is read by nobody"


def test_weights_that_are_changed_in_place_are_written(x):
    def step(w):
        w.mul_(0.5).add_(1.0)
        return x @ w

    assert bytes_of(counted(step, torch.randn(4, 4))) == [4 * (16 + 16)]
    weight = torch.randn(4, 4)
    assert bytes_of(counted(lambda: weight.mul_(0.5).add_(x[:4]))) == [4 * (16 + 16 + 16)]


def test_an_update_that_its_own_kernel_reads_again_is_written(x):
    moment, weight = torch.randn(6, 4), torch.randn(6, 4)

    def step():  # as AdamW: the moment is updated, then read
        moment.lerp_(x, 0.1)
        weight.addcmul_(moment, moment)

    assert bytes_of(counted(step)) == [4 * (3 * 24 + 2 * 24)]


def test_an_update_waits_for_what_reads_the_weight_before(x):
    weight = torch.randn(4, 4)

    def step():
        y = x @ weight
        weight.mul_(0.5)
        return y.relu() @ weight

    cost = counted(step)
    assert [operator.depth for operator in cost.graph.operators if not operator.product] == [1, 1]


def test_parts_of_a_tensor_are_read_each(x):
    def step(w):
        q, k, v = (x @ w).chunk(3, dim=1)
        return (q + k + v) @ torch.eye(4)

    cost = counted(step, torch.randn(4, 12))
    assert bytes_of(cost)[-1] == 4 * (3 * 24 + 24)
