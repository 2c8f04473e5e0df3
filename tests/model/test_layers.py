"""layers.py against attention written as loops, and what a mask and a residual branch must do."""

import math

import pytest
import torch
from torch import nn

from model.layers import MLP, Attention, CrossBlock, Standardise


def attention_by_loops(attention: Attention, x, memory, present=None):
    """One query, one head at a time: x (N, D), memory (M, D), present (M,) -> (N, D)."""
    heads, width = attention.heads, x.shape[1] // attention.heads
    q, (k, v) = attention.to_q(x), attention.to_kv(memory).chunk(2, dim=1)
    rows = []
    for i in range(len(x)):
        parts = []
        for h in range(heads):
            one = slice(h * width, (h + 1) * width)
            weights = [math.exp(q[i, one] @ k[j, one] / math.sqrt(width)) for j in range(len(memory))]
            if present is not None:
                weights = [w * bool(p) for w, p in zip(weights, present, strict=True)]
            parts.append(sum(w * v[j, one] for j, w in enumerate(weights)) / sum(weights))
        rows.append(torch.cat(parts))
    return attention.to_out(torch.stack(rows))


@torch.no_grad()
def test_attention_equals_its_loops():
    torch.manual_seed(0)
    attention, x, memory = Attention(12, 3), torch.randn(2, 4, 12), torch.randn(2, 5, 12)
    present = torch.tensor([[True, False, True, True, False], [True] * 5])
    found = attention(x, memory, present)
    for b in range(2):
        torch.testing.assert_close(found[b], attention_by_loops(attention, x[b], memory[b], present[b]))
    torch.testing.assert_close(attention(x, memory)[0], attention_by_loops(attention, x[0], memory[0]))


def test_a_width_that_heads_do_not_divide_is_refused():
    with pytest.raises(ValueError, match="a multiple of its 4 heads, found 10"):
        Attention(10, 4)


def test_standardising_is_nothing_until_measured_and_does_not_blow_up_noise():
    layer, x = Standardise(3, min_sd=0.1), torch.randn(50, 3) * torch.tensor([2.0, 1.0, 1e-3]) + 5
    assert torch.equal(layer(x), x)
    layer.measure(x.mean(0), x.std(0, correction=0))
    done = layer(x)
    torch.testing.assert_close(done.mean(0), torch.zeros(3), atol=1e-4, rtol=0)
    torch.testing.assert_close(done[:, :2].std(0, correction=0), torch.ones(2))
    torch.testing.assert_close(done[:, 2], (x[:, 2] - x[:, 2].mean()) / 0.1)
    assert not list(layer.parameters()) and set(layer.state_dict()) == {"mean", "sd"}, "kept, not trained"


@torch.no_grad()
def test_mlp_by_hand():
    mlp = MLP(1, 2)
    mlp[0].weight.copy_(torch.tensor([[1.0], [-1.0]]))
    mlp[0].bias.zero_()
    mlp[2].weight.copy_(torch.tensor([[1.0, -1.0]]))
    mlp[2].bias.fill_(0.5)
    x = torch.tensor([[0.7], [-3.0]])  # gelu(x) - gelu(-x) = x
    torch.testing.assert_close(mlp(x), x + 0.5)


@torch.no_grad()
def test_cross_block_adds_three_normed_branches():
    torch.manual_seed(0)
    block, x, memory = CrossBlock(8, 2, 16).eval(), torch.randn(2, 3, 8), torch.randn(2, 5, 8)
    for norm in (block.norm_self, block.norm_cross, block.norm_mlp):
        nn.init.normal_(norm.weight)  # norms that differ, so that a wrong one shows
    step = x + block.attend_self(block.norm_self(x), block.norm_self(x))
    step = step + block.attend_memory(block.norm_cross(step), memory)
    step = step + block.mlp(block.norm_mlp(step))
    torch.testing.assert_close(block(x, memory), step)


@torch.no_grad()
def test_cross_block_ignores_absent_memory_and_its_order():
    torch.manual_seed(0)
    block, x, memory = CrossBlock(8, 2, 16), torch.randn(2, 3, 8), torch.randn(2, 5, 8)
    present = torch.tensor([True, True, False, True, False]).expand(2, -1)
    expected = block(x, memory[:, [0, 1, 3]])
    torch.testing.assert_close(block(x, memory, present), expected)
    torch.testing.assert_close(block(x, memory[:, [3, 0, 1]]), expected)
    assert not torch.allclose(block(x, memory), expected, atol=1e-3)


def test_cross_block_drops_each_branch_in_training_only():
    torch.manual_seed(0)
    block, x, memory = CrossBlock(8, 2, 16, dropout=1.0), torch.randn(2, 3, 8), torch.randn(2, 5, 8)
    assert torch.equal(block(x, memory), x)
    assert not torch.allclose(block.eval()(x, memory), x)
