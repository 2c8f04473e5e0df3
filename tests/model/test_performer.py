"""performer.py: the random kernel against exp, the chunked attention against one plain matrix of kernel values."""

import pytest
import torch
import torch.nn.functional as F

from model import performer
from model.performer import EPSILON, PerformerBlock, favor_attention, orthogonal_projection, softmax_features

B, H, N, E, M = 3, 2, 7, 16, 20


def random_qkv(requires_grad=False, n_tokens=N):
    """Heads and samples whose keys differ in size, so that it matters over what the stabiliser is taken."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(B, H, n_tokens, E, generator=generator) for _ in range(3))
    k = k * torch.tensor([0.6, 1.6]).view(1, H, 1, 1) * torch.tensor([1.0, 0.5, 1.4]).view(B, 1, 1, 1)
    return [x.requires_grad_(requires_grad) for x in (q, k, v)]


def plain_attention(q, k, v, projection):
    """FAVOR+ as its equations read: every kernel value of every pair of tokens, then their weighted mean."""
    q, k = (x * x.shape[-1] ** -0.25 for x in (q, k))
    to_query, to_key = q @ projection.T, k @ projection.T  # (B, H, N, M)
    to_query = to_query - to_query.detach().amax(3, keepdim=True)  # each query's own maximum
    to_key = to_key - to_key.detach().amax((1, 2, 3), keepdim=True)  # one maximum per sample
    phi_q = (to_query - q.square().sum(-1, keepdim=True) / 2).exp() + EPSILON
    phi_k = (to_key - k.square().sum(-1, keepdim=True) / 2).exp() + EPSILON
    kernel = torch.einsum("bhim,bhjm->bhij", phi_q, phi_k)
    return kernel / kernel.sum(-1, keepdim=True) @ v


def set_heads_at_once(monkeypatch, heads, n_tokens=N):
    monkeypatch.setitem(performer.BYTES_AT_ONCE, "cpu", 4 * n_tokens * M * heads)


def test_mean_of_the_kernel_over_projections_is_exp():
    generator = torch.Generator().manual_seed(0)
    q, k = (F.normalize(torch.randn(1, 3, 64, generator=generator), dim=-1) * 0.6 for _ in range(2))
    k[0, 0] = q[0, 0]
    scale = 64**0.25  # the features estimate exp(q . k / sqrt(64))
    total = torch.zeros(3, 3)
    for _ in range(400):
        projection = orthogonal_projection(performer.N_FEATURES, 64, generator)
        taken_out = (q @ projection.T).amax(-1, keepdim=True).exp()
        phi_q = softmax_features(q * scale, projection) * taken_out * len(projection) ** -0.5
        largest = torch.full((1, 1, 1), 0.5)
        phi_k = softmax_features(k * scale, projection, largest) * largest.exp() * len(projection) ** -0.5
        total += (phi_q @ phi_k.transpose(1, 2))[0] / 400
    torch.testing.assert_close(total, (q @ k.transpose(1, 2))[0].exp(), rtol=0.02, atol=0)


def test_features_are_positive_and_stabilised():
    x, projection = torch.randn(2, 5, E), orthogonal_projection(M, E)
    features = softmax_features(x, projection)
    assert features.min() > 0
    peak = (-x.square().sum(-1) / (2 * E**0.5)).exp()  # the largest exponent itself is taken out
    torch.testing.assert_close(features.amax(-1), peak)


def test_features_are_written_into_the_buffer():
    x, projection, buffer = torch.randn(2, 5, E), orthogonal_projection(M, E), torch.empty(2, 5, M)
    found = softmax_features(x, projection, out=buffer)
    assert found.data_ptr() == buffer.data_ptr()
    assert torch.equal(found, softmax_features(x, projection))


@pytest.mark.parametrize(("heads", "chunks"), [(1, 6), (2, 3), (3, 3), (4, 2), (100, 1)])
def test_attention_and_its_gradients_equal_the_plain_form_by_any_chunks(monkeypatch, heads, chunks):
    set_heads_at_once(monkeypatch, heads)
    projection = orthogonal_projection(M, E, torch.Generator().manual_seed(1))
    weight = torch.randn(B, H, N, E, generator=torch.Generator().manual_seed(2))
    ours, plain = random_qkv(requires_grad=True), random_qkv(requires_grad=True)
    assert len(list(performer._chunks(ours[0], M))) == chunks
    out, expected = favor_attention(*ours, projection), plain_attention(*plain, projection)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
    (out * weight).sum().backward()
    (expected * weight).sum().backward()
    for found, wanted in zip(ours, plain, strict=True):
        assert wanted.grad.abs().max() > 1e-3
        torch.testing.assert_close(found.grad, wanted.grad, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("size", [2.0, 4.0, 12.0])
def test_exponents_that_would_overflow_are_lowered(size):
    projection = orthogonal_projection(M, E, torch.Generator().manual_seed(1))
    ours, plain = random_qkv(), [x.double() for x in random_qkv()]
    for x in (*ours[:2], *plain[:2]):
        x.mul_(size).requires_grad_()
    exponents = (ours[1] @ projection.T * E**-0.25).amax(), (ours[0] @ projection.T * E**-0.25).amax()
    assert (max(exponents) > performer.HIGHEST_EXPONENT) == (size > 3)
    out, expected = favor_attention(*ours, projection), plain_attention(*plain, projection.double())
    torch.testing.assert_close(out.double(), expected, rtol=1e-3, atol=1e-4)
    out.square().sum().backward()
    expected.square().sum().backward()
    for x, y in zip(ours[:2], plain[:2], strict=True):
        assert (x.grad - y.grad).norm() < 0.01 * y.grad.norm() + 1e-6


def test_kernels_that_serve_the_heads_compute_attention_and_gradients(monkeypatch):
    (q, k, v), projection, called = random_qkv(requires_grad=True), orthogonal_projection(M, E), []

    class Kernels:
        @staticmethod
        def forward(q, k, v, scaled, epsilon, fast):
            called.append(("forward", scaled, epsilon, fast))
            largest, context = performer._key_context(k, v, projection)
            out, denominator = performer._attend(q, context, projection)
            return out, largest, context, denominator

        @staticmethod
        def backward(gradient, q, k, v, scaled, largest, context, out, denominator, epsilon, fast):
            called.append(("backward", scaled, epsilon, fast))
            return q + 1, k + 2, v + 3

    monkeypatch.setattr(performer, "_gpu_kernels", lambda x: Kernels)
    out = performer.favor_attention(q, k, v, projection)
    torch.testing.assert_close(out, plain_attention(q, k, v, projection))
    out.sum().backward()
    for found, x, added in ((q.grad, q, 1), (k.grad, k, 2), (v.grad, v, 3)):
        torch.testing.assert_close(found, x + added)
    assert [name for name, *_ in called] == ["forward", "backward"]
    for _, scaled, epsilon, fast in called:
        torch.testing.assert_close(scaled, projection / projection.shape[1] ** 0.25)
        assert (epsilon, fast) == (performer.EPSILON, False)


def test_any_layout_of_the_heads_gives_the_same():
    projection = orthogonal_projection(M, E, torch.Generator().manual_seed(1))
    straight, turned = random_qkv(requires_grad=True), random_qkv(requires_grad=True)
    as_layers_give_them = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in turned]
    out, expected = favor_attention(*as_layers_give_them, projection), favor_attention(*straight, projection)
    assert out.transpose(1, 2).is_contiguous()  # heads can be joined without a copy
    assert torch.equal(out, expected)
    out.square().sum().backward()
    expected.square().sum().backward()
    for x, y in zip(turned, straight, strict=True):
        torch.testing.assert_close(x.grad, y.grad)


def test_many_features_without_epsilon_come_near_softmax_attention(monkeypatch):
    monkeypatch.setattr(performer, "EPSILON", 0.0)
    q, k, v = random_qkv()
    q, k = 0.3 * q, 0.3 * k
    projection = orthogonal_projection(20000, E, torch.Generator().manual_seed(1))
    exact = F.scaled_dot_product_attention(q, k, v)
    assert (favor_attention(q, k, v, projection) - exact).norm() < 0.03 * exact.norm()
    assert (v.mean(2, keepdim=True) - exact).norm() > 0.1 * exact.norm()  # softmax is no plain mean here


def close_on_the_whole(found, expected, share):
    return (found.float() - expected).norm() < share * expected.norm()


def test_under_bf16_autocast_factors_are_rounded_but_no_exponent():
    """What rounds is two percent of the whole; an exponent kept in bf16 would cost several times that."""
    projection = orthogonal_projection(M, E, torch.Generator().manual_seed(1))
    plain, auto = random_qkv(requires_grad=True), random_qkv(requires_grad=True)
    expected = favor_attention(*plain, projection)
    expected.square().sum().backward()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert (auto[0] @ auto[1].transpose(2, 3)).dtype == torch.bfloat16  # autocast is on
        found = favor_attention(*auto, projection)
    found.square().sum().backward()
    assert found.dtype == torch.float32
    assert close_on_the_whole(found, expected, 0.02)
    for a, p in zip(auto, plain, strict=True):
        assert close_on_the_whole(a.grad, p.grad, 0.02)


def test_attention_leaves_the_precision_of_products_as_it_was():
    before = torch.get_float32_matmul_precision()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = favor_attention(*random_qkv(requires_grad=True), orthogonal_projection(M, E))
    out.sum().backward()
    assert torch.get_float32_matmul_precision() == before


def test_bf16_inputs_are_raised_to_fp32_and_give_bf16():
    projection = orthogonal_projection(M, E, torch.Generator().manual_seed(1))
    low = [x.detach().bfloat16().requires_grad_() for x in random_qkv()]
    high = [x.detach().float().requires_grad_() for x in low]
    found, expected = favor_attention(*low, projection), favor_attention(*high, projection)
    assert torch.equal(found, expected.bfloat16())
    found.sum().backward()
    expected.sum().backward()
    for x, y in zip(low, high, strict=True):
        assert x.grad.dtype == torch.bfloat16
        assert close_on_the_whole(x.grad, y.grad, 0.02)  # the denominator's part comes from the rounded output


@torch.no_grad()
def test_a_spot_does_not_depend_on_its_batch_mates():
    torch.manual_seed(0)
    block = PerformerBlock(24, heads=2)
    block.to_k.weight.mul_(3)
    x = torch.randn(4, 9, 24)
    alone = block(x[:1])
    loud = torch.cat([x[:1], x[1:] + 5 * torch.randn(3, 9, 24)])
    torch.testing.assert_close(block(loud)[:1], alone, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(block(loud)[1:], block(x)[1:], atol=0.1)


@torch.no_grad()
def test_every_token_of_a_block_sees_every_other():
    torch.manual_seed(0)
    block, x = PerformerBlock(24, heads=2), torch.randn(1, 6, 24)
    for i in range(6):
        changed = x.clone()
        changed[0, i] = torch.randn(24)
        assert ((block(changed) - block(x)).abs().amax(-1) > 1e-5).all()


def test_rows_of_a_projection_are_orthogonal_within_groups():
    projection = orthogonal_projection(performer.N_FEATURES, 64)
    assert projection.shape == (266, 64)
    for group in F.normalize(projection, dim=1).split(64):
        torch.testing.assert_close(group @ group.T, torch.eye(len(group)), rtol=0, atol=1e-5)
    first, second = F.normalize(projection, dim=1).split(64)[:2]
    assert (first @ second.T).abs().max() > 0.2  # groups are drawn apart


def test_rows_of_a_projection_are_as_long_as_gaussian_ones():
    squared = orthogonal_projection(6400, 64, torch.Generator().manual_seed(0)).square().sum(1)  # chi-square of 64
    assert float(squared.mean()) == pytest.approx(64, rel=0.01)
    assert float(squared.std()) == pytest.approx((2 * 64) ** 0.5, rel=0.05)


def test_a_projection_is_a_buffer_drawn_from_the_seed():
    one, same, other = (orthogonal_projection(M, E, torch.Generator().manual_seed(s)) for s in (0, 0, 1))
    assert torch.equal(one, same)
    assert not torch.allclose(one, other)
    block = PerformerBlock(24, heads=2)
    assert "projection" in dict(block.named_buffers())
    assert "projection" in block.state_dict()
