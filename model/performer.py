"""FAVOR+ attention and the Performer block of scBERT.

Choromanski et al. 2021, arXiv 2009.14794, lemma 1: exp(q . k) is the mean over random w of exp(w.q - |q|^2/2) times
exp(w.k - |k|^2/2), so attention over N tokens costs N x M instead of N x N. Block layout and constants as in scBERT
(Yang et al. 2022, doi 10.1038/s42256-022-00534-z). Letters: B batch, H heads, N tokens, E width of a head, M random
features, D width; b, h samples and heads of a chunk.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

N_FEATURES = 266  # of scBERT's projections: int(64 ln 64) for heads of 64
HEAD_WIDTH = 64
EPSILON = 1e-4  # keeps a kernel value from being zero; scBERT's constant
HIGHEST_EXPONENT = 60.0  # exp of it, times the tokens and features that are summed, is far below fp32's largest number
BYTES_AT_ONCE = {"cpu": 3 * 2**23, "cuda": 2**29}  # of features: fits a CPU's cache; keeps an old GPU busy


def orthogonal_projection(n_features: int, width: int, generator: torch.Generator | None = None) -> Tensor:
    """Gaussian rows, orthogonal within each group of `width` rows: (n_features, width), each row of chi norm."""
    groups = -(-n_features // width)
    gaussian = torch.randn(groups, width, width, generator=generator)
    directions = torch.linalg.qr(gaussian).Q.transpose(1, 2).reshape(groups * width, width)[:n_features]
    norms = torch.randn(n_features, width, generator=generator).norm(dim=1, keepdim=True)
    return directions * norms


def softmax_features(x: Tensor, projection: Tensor, largest: Tensor | None = None, out: Tensor | None = None) -> Tensor:
    """Positive random features, whose dot products estimate exp(q . k / sqrt(E)) up to a factor.

    Parameters
    ----------
    x : queries or keys (..., N, E)
    projection : rows w (M, E)
    largest : subtracted from the exponent; by default the maximum over each token's features, as is right for queries
    out : buffer (..., N, M) to write into

    Returns
    -------
    features (..., N, M), without EPSILON and without the factor M^-1/2, which cancels in attention
    """
    exponent = torch.matmul(x, _scaled(projection).T, out=out)
    largest = exponent.amax(-1, keepdim=True) if largest is None else largest
    return exponent.sub_(largest + _half_square(x)).exp_()


def _scaled(projection: Tensor) -> Tensor:
    """The projection divided by E^1/4, in place of queries and keys."""
    return projection * projection.shape[1] ** -0.25


def _half_square(x: Tensor) -> Tensor:
    """|x / E^1/4|^2 / 2: (..., N, E) -> (..., N, 1)."""
    return torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_().mul_(x.shape[-1] ** -0.5 / 2)


@torch.library.custom_op(
    "magic::favor",
    mutates_args=(),
    schema="(Tensor q, Tensor k, Tensor v, Tensor projection, bool fast) -> (Tensor, Tensor, Tensor, Tensor)",
)
def favor(q: Tensor, k: Tensor, v: Tensor, projection: Tensor, fast: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Linear attention with softmax kernels, a few heads at a time; backward computes the features again.

    q, k, v (B, H, N, E), projection (M, E) -> attention (B, H, N, E), and what backward reads: largest (B, 1, 1, 1),
    context (B, H, M, E + 1), denominator (B, H, N, 1). The features are M / E = 4 times the size of q and k: kept for
    all heads they would be most of the memory of a step, and writing them most of its time. A column of ones beside v
    gives numerator and denominator of attention in one product. EPSILON is added to the products, not to every feature:
    (phi + EPSILON) C equals phi C plus EPSILON times the sum of C's rows. `fast` is explained at `_products`. One
    operator of torch's, which torch.compile takes as it is.
    """
    if (kernels := _gpu_kernels(q)) is not None:
        return kernels.forward(q, k, v, _scaled(projection), EPSILON, fast)
    with _products(q.device.type, fast):
        largest, context = _key_context(k, v, projection)
        out, denominator = _attend(q, context, projection)
    return out, largest, context, denominator


@torch.library.custom_op(
    "magic::favor_backward",
    mutates_args=(),
    schema="(Tensor gradient, Tensor q, Tensor k, Tensor v, Tensor projection, Tensor largest, Tensor context, "
    "Tensor out, Tensor denominator, bool fast) -> (Tensor, Tensor, Tensor)",
)
def favor_backward(
    gradient: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    projection: Tensor,
    largest: Tensor,
    context: Tensor,
    out: Tensor,
    denominator: Tensor,
    fast: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v (B, H, N, E) from that of the attention, and from all that `favor` took and gave."""
    if (kernels := _gpu_kernels(q)) is not None:
        of_attention = largest, context, out, denominator
        return kernels.backward(gradient, q, k, v, _scaled(projection), *of_attention, EPSILON, fast)
    with _products(q.device.type, fast):
        dq, d_context = _backward_queries(gradient, q, context, out, denominator, projection)
        dk, dv = _backward_keys(d_context, k, v, largest, projection)
    return dq, dk, dv


@favor.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, projection: Tensor, fast: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    batch, heads, n_tokens, width = q.shape
    largest = q.new_empty((batch, 1, 1, 1), dtype=torch.float32)
    context = q.new_empty((batch, heads, len(projection), width + 1), dtype=torch.float32)
    denominator = q.new_empty((batch, heads, n_tokens, 1), dtype=torch.float32)
    return torch.empty_like(q), largest, context, denominator


@favor_backward.register_fake
def _(gradient: Tensor, q: Tensor, k: Tensor, v: Tensor, *others: Any) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.fast = inputs
    out, largest, context, denominator = output
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, largest, context, out, denominator)


def _gradients(ctx: Any, gradient: Tensor, *of_the_others: None) -> tuple[Tensor | None, ...]:
    return *favor_backward(gradient, *ctx.saved_tensors, ctx.fast), None, None


favor.register_autograd(_gradients, setup_context=_keep)


@cache
def _triton_kernels() -> ModuleType | None:
    """`favor_triton.py`; None where Triton is missing or does not load. It comes with torch for CUDA."""
    try:
        from model import favor_triton
    except ImportError:
        return None
    return favor_triton


def _gpu_kernels(x: Tensor) -> ModuleType | None:
    """The kernels for heads (B, H, N, E) on a GPU, where they serve it."""
    kernels = _triton_kernels() if x.device.type == "cuda" else None
    return kernels if kernels is not None and kernels.serves(x) else None


@contextmanager
def _products(device_type: str, fast: bool) -> Iterator[None]:
    """Compute in fp32: an exponent stored in bf16 would be off by percents. Under autocast (`fast`) the products may
    round their factors, to bf16 on a CPU and to TF32 on a GPU, as the other layers do; their sums stay fp32."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium" if fast else before)
    try:
        with torch.autocast(device_type, enabled=False):
            yield
    finally:
        torch.set_float32_matmul_precision(before)


def _exp(exponent: Tensor, top: Tensor) -> tuple[Tensor, Tensor]:
    """exp of (..., N, M) in place, after subtracting a shift where `top` (broadcast) is too high for fp32. On a CPU a
    shift of 0, the usual case, saves a pass over the features; on a GPU asking for it would wait for the device."""
    shift = (top - HIGHEST_EXPONENT).clamp_(min=0)
    if exponent.device.type != "cpu" or bool(shift.any()):
        exponent.sub_(shift)
    return exponent.exp_(), shift


def _key_context(k: Tensor, v: Tensor, projection: Tensor) -> tuple[Tensor, Tensor]:
    """Sum over tokens of features of k times [v, 1] -> stabiliser (B, 1, 1, 1), context (B, H, M, E + 1).

    The stabiliser is the maximum of w . k over heads, tokens and features of each sample. With EPSILON it sets how far
    attention is flattened, so that it must not differ between heads. scBERT takes it over the batch; per sample, a
    spot's result does not depend on the rest of its batch. As it is known only after all heads, each head is stabilised
    by its own maximum and rescaled at the end.
    """
    n_features, width = projection.shape
    context = torch.empty(*k.shape[:2], n_features, width + 1, device=k.device)
    total = torch.empty(*k.shape[:2], 1, width + 1, device=k.device)
    maximum = torch.empty(*k.shape[:2], 1, 1, device=k.device)
    scaled = _scaled(projection).T
    for chunk, exponent, keys, values in _chunks(k, n_features, width, width + 1):
        torch.matmul(keys.copy_(k[chunk]), scaled, out=exponent)
        maximum[chunk] = exponent.amax((-2, -1), keepdim=True)
        features, shift = _exp(exponent, maximum[chunk])
        total[chunk] = _with_ones(v[chunk], values).sum(-2, keepdim=True)
        weighted = values.mul_((shift - maximum[chunk] - _half_square(keys)).exp_())  # E + 1 columns in place of M
        torch.matmul(features.transpose(-2, -1), weighted, out=context[chunk])
    largest = maximum.amax(1, keepdim=True)
    return largest, context.mul_((maximum - largest).exp()).add_(total, alpha=EPSILON)


def _attend(q: Tensor, context: Tensor, projection: Tensor) -> tuple[Tensor, Tensor]:
    """Queries (B, H, N, E), context (B, H, M, E + 1) -> attention (B, H, N, E), and its denominator (B, H, N, 1) for
    the features of `softmax_features`."""
    n_features, width = projection.shape
    out = torch.empty_like(q)  # in q's layout, which is that of a linear layer's output
    denominator = torch.empty(*q.shape[:3], 1, device=q.device)
    floor = EPSILON * context.sum(-2, keepdim=True)
    scaled = _scaled(projection).T
    for chunk, exponent, queries, product in _chunks(q, n_features, width, width + 1):
        torch.matmul(queries.copy_(q[chunk]), scaled, out=exponent)
        top = exponent.amax(-1, keepdim=True) + _half_square(queries)
        features, shift = _exp(exponent, top)
        factor = (top - shift).exp_()  # of these features over the stabilised ones, which EPSILON is added to
        torch.matmul(features, context[chunk], out=product).addcmul_(factor, floor[chunk])
        torch.div(product[..., -1:], factor, out=denominator[chunk])
        torch.div(product[..., :-1], product[..., -1:], out=out[chunk])
    return out, denominator


def _backward_queries(
    gradient: Tensor, q: Tensor, context: Tensor, out: Tensor, denominator: Tensor, projection: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of the queries (B, H, N, E) and of the context (B, H, M, E + 1)."""
    n_features, width = projection.shape
    dq, d_context = torch.empty_like(q), torch.empty_like(context)
    for chunk, buffer, other, queries, d_product in _chunks(q, n_features, n_features, width, width + 1):
        torch.div(gradient[chunk], denominator[chunk], out=d_product[..., :-1])
        torch.sum(d_product[..., :-1] * out[chunk], -1, keepdim=True, out=d_product[..., -1:]).neg_()
        features = softmax_features(queries.copy_(q[chunk]), projection, out=buffer)
        torch.matmul(features.transpose(-2, -1), d_product, out=d_context[chunk])
        d_context[chunk].add_(d_product.sum(-2, keepdim=True), alpha=EPSILON)
        d_features = torch.matmul(d_product, context[chunk].transpose(-2, -1), out=other)
        dq[chunk] = _through_exponent(d_features.mul_(features), queries, projection)
    return dq, d_context


def _backward_keys(
    d_context: Tensor, k: Tensor, v: Tensor, largest: Tensor, projection: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of keys and values (B, H, N, E)."""
    n_features, width = projection.shape
    dk, dv = torch.empty_like(k), torch.empty_like(v)
    floor = EPSILON * d_context.sum(-2, keepdim=True)
    for chunk, buffer, other, keys, values in _chunks(k, n_features, n_features, width, width + 1):
        features = softmax_features(keys.copy_(k[chunk]), projection, largest[chunk[0]], buffer)
        d_features = torch.matmul(_with_ones(v[chunk], values), d_context[chunk].transpose(-2, -1), out=other)
        dv[chunk] = torch.matmul(features, d_context[chunk], out=values).add_(floor[chunk])[..., :-1]
        dk[chunk] = _through_exponent(d_features.mul_(features), keys, projection)
    return dk, dv


def _through_exponent(d_exponent: Tensor, x: Tensor, projection: Tensor) -> Tensor:
    """Gradient (..., N, M) of the exponents w . x / E^1/4 - |x|^2 / (2 sqrt(E)) -> gradient of x (..., N, E)."""
    ones = torch.ones(len(projection), 1, device=x.device)
    gathered = d_exponent @ torch.cat([_scaled(projection), ones], dim=1)  # the last column is their sum
    return torch.addcmul(gathered[..., :-1], gathered[..., -1:], x, value=-(x.shape[-1] ** -0.5))


def _chunks(x: Tensor, n_features: int, *widths: int) -> Iterator[Any]:
    """Samples, or heads of one sample, whose features fit BYTES_AT_ONCE: their index in (B, H, ...), and buffers
    (b, h, N, M) and (b, h, N, width). All chunks use the same buffers: page faults would cost more than the work."""
    batch, heads, n_tokens, _ = x.shape
    fitting = max(1, BYTES_AT_ONCE.get(x.device.type, 2**26) // (4 * n_tokens * n_features))
    chunk_samples, chunk_heads = max(1, min(batch, fitting // heads)), min(heads, fitting)
    shape = chunk_samples, chunk_heads, n_tokens
    buffers = [torch.empty(*shape, width, device=x.device) for width in (n_features, *widths)]
    for b, h in itertools.product(range(0, batch, chunk_samples), range(0, heads, chunk_heads)):
        chunk = slice(b, min(b + chunk_samples, batch)), slice(h, min(h + chunk_heads, heads))
        yield chunk, *(buffer[: chunk[0].stop - b, : chunk[1].stop - h] for buffer in buffers)


def _with_ones(v: Tensor, out: Tensor) -> Tensor:
    """A column of ones beside the values, in fp32: (..., N, E), buffer (..., N, E + 1) -> the buffer."""
    out[..., :-1] = v
    out[..., -1] = 1
    return out


def favor_attention(q: Tensor, k: Tensor, v: Tensor, projection: Tensor) -> Tensor:
    """q, k, v (B, H, N, E), projection (M, E) -> (B, H, N, E), of q's type and layout."""
    return favor(q, k, v, projection, torch.is_autocast_enabled(q.device.type))[0]


class PerformerBlock(nn.Module):
    """Pre-norm FAVOR+ self-attention and feed-forward: (B, N, D) -> (B, N, D)."""

    def __init__(self, width: int, heads: int, dropout: float = 0.0):
        super().__init__()
        inner = heads * HEAD_WIDTH
        self.heads = heads
        self.norm_attention, self.norm_mlp = nn.LayerNorm(width), nn.LayerNorm(width)
        self.to_q, self.to_k, self.to_v = (nn.Linear(width, inner, bias=False) for _ in range(3))
        self.to_out = nn.Linear(inner, width)
        self.w1, self.w2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.drop = nn.Dropout(dropout)
        self.projection: Tensor
        self.register_buffer("projection", orthogonal_projection(N_FEATURES, HEAD_WIDTH))

    def attend(self, x: Tensor) -> Tensor:
        q, k, v = (to(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for to in (self.to_q, self.to_k, self.to_v))
        out = favor_attention(q, k, v, self.projection)
        return self.to_out(out.transpose(1, 2).flatten(2))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop(self.attend(self.norm_attention(x)))
        return x + self.drop(self.w2(F.gelu(self.w1(self.norm_mlp(x)))))
