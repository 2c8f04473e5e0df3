"""FAVOR+ on a GPU in five Triton kernels: the features stay on the chip, only q, k, v and the result are in memory.

`performer.py` has the equations and the operators; its loop over chunks computes the same on a CPU, and on a GPU that
these kernels do not serve. As in flash attention (Dao et al. 2022, arXiv 2205.14135), a program holds one block of
tokens or of random features and loops over the other kind; a sum is rescaled when a larger exponent comes. Letters as
there: B batch, H heads, N tokens, E width of a head, M random features. In the kernels e is the exponent w . x / E^1/4
and half is |x|^2 / (2 sqrt(E)), which its feature exp(e - half - stabiliser) needs. Heads (B, H, N, E) lie in memory as
linear layers give them, (B, N, H, E). Sums are in fp32; products round their factors to TF32 where PRECISION says so.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

N_BLOCK, M_BLOCK = 64, 32  # tokens and random features of a program
WIDTHS = (16, 32, 64)  # of a head; a product takes powers of two from 16 on
LEAST_CAPABILITY = (8, 0)  # of the GPU: TF32 and bf16


def serves(x: Tensor) -> bool:
    """Whether the kernels take heads (B, H, N, E) of this device and width: wider ones need more memory on the chip."""
    return x.shape[-1] in WIDTHS and torch.cuda.get_device_capability(x.device) >= LEAST_CAPABILITY


# ---- what the kernels share


@triton.jit
def _program(n_blocks, SIZE: tl.constexpr):
    """The head of a program, counted over the batch, and its indices: blocks of a head run side by side."""
    block = tl.program_id(0) % n_blocks
    return (tl.program_id(0) // n_blocks).to(tl.int64), block * SIZE + tl.arange(0, SIZE)


@triton.jit
def _at(head, tokens, H, N, E: tl.constexpr):
    """Where the tokens of a head lie: (n, E)."""
    first = (head // H * N * H + head % H) * E
    return first + tokens[:, None].to(tl.int64) * H * E + tl.arange(0, E)[None, :]


@triton.jit
def _tokens(x, head, tokens, H, N, E: tl.constexpr):
    """(n, E) in fp32, zero beyond the last token."""
    return tl.load(x + _at(head, tokens, H, N, E), mask=(tokens < N)[:, None], other=0.0).to(tl.float32)


@triton.jit
def _projection(w, features, M, E: tl.constexpr):
    """(m, E), zero beyond the last feature."""
    at = features[:, None] * E + tl.arange(0, E)[None, :]
    return tl.load(w + at, mask=(features < M)[:, None], other=0.0)


@triton.jit
def _context(context, head, features, M, E: tl.constexpr):
    """The columns of the values (m, E) and the one of the denominator (m) of a context (B, H, M, E + 1)."""
    row = context + (head * M + features) * (E + 1)
    known = features < M
    values = tl.load(row[:, None] + tl.arange(0, E)[None, :], mask=known[:, None], other=0.0)
    return values, tl.load(row + E, mask=known, other=0.0)


@triton.jit
def _store_context(context, head, features, M, values, denominator, E: tl.constexpr):
    row = context + (head * M + features) * (E + 1)
    known = features < M
    tl.store(row[:, None] + tl.arange(0, E)[None, :], values, mask=known[:, None])
    tl.store(row + E, denominator, mask=known)


@triton.jit
def _half_square(x, E: tl.constexpr):
    return tl.sum(x * x, 1) * (0.5 / E**0.5)


@triton.jit
def _exponents(x, w, features, M, PRECISION: tl.constexpr):
    """(n, m); minus infinity beyond the last feature."""
    e = tl.dot(x, tl.trans(w), input_precision=PRECISION)
    return tl.where((features < M)[None, :], e, float("-inf"))


# ---- forward


@triton.jit
def key_context(
    k, v, w, context, tops, highest, H, N, M, n_blocks,
    E: tl.constexpr, N_BLOCK: tl.constexpr, M_BLOCK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Of a block of features: the sum over tokens of exp(e - half - top) [v, 1], its top, and the largest e."""
    head, features = _program(n_blocks, M_BLOCK)
    projection = _projection(w, features, M, E)
    values = tl.zeros((M_BLOCK, E), tl.float32)
    denominator = tl.zeros((M_BLOCK,), tl.float32)
    top = tl.full((M_BLOCK,), float("-inf"), tl.float32)
    largest = top
    for start in range(0, N, N_BLOCK):
        tokens = start + tl.arange(0, N_BLOCK)
        key = _tokens(k, head, tokens, H, N, E)
        e = tl.dot(projection, tl.trans(key), input_precision=PRECISION)
        e = tl.where((tokens < N)[None, :], e, float("-inf"))
        largest = tl.maximum(largest, tl.max(e, 1))
        e -= _half_square(key, E)[None, :]
        higher = tl.maximum(top, tl.max(e, 1))
        feature = tl.exp(e - higher[:, None])
        lowered = tl.exp(top - higher)
        value = _tokens(v, head, tokens, H, N, E)
        values = tl.dot(feature, value, values * lowered[:, None], input_precision=PRECISION)
        denominator = denominator * lowered + tl.sum(feature, 1)
        top = higher
    _store_context(context, head, features, M, values, denominator, E)
    tl.store(tops + head * M + features, top, mask=features < M)
    tl.store(highest + head * M + features, largest, mask=features < M)


@triton.jit
def attend(
    q, w, context, floor, out, denominators, H, N, M, n_blocks,
    E: tl.constexpr, N_BLOCK: tl.constexpr, M_BLOCK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Of a block of queries: their attention, and its denominator."""
    head, tokens = _program(n_blocks, N_BLOCK)
    query = _tokens(q, head, tokens, H, N, E)
    numerator = tl.zeros((N_BLOCK, E), tl.float32)
    denominator = tl.zeros((N_BLOCK,), tl.float32)
    top = tl.full((N_BLOCK,), float("-inf"), tl.float32)
    for start in range(0, M, M_BLOCK):
        features = start + tl.arange(0, M_BLOCK)
        e = _exponents(query, _projection(w, features, M, E), features, M, PRECISION)
        higher = tl.maximum(top, tl.max(e, 1))
        feature = tl.exp(e - higher[:, None])
        lowered = tl.exp(top - higher)
        values, ones = _context(context, head, features, M, E)
        numerator = tl.dot(feature, values, numerator * lowered[:, None], input_precision=PRECISION)
        denominator = denominator * lowered + tl.sum(feature * ones[None, :], 1)
        top = higher
    weight = tl.exp(-_half_square(query, E))
    numerator = numerator * weight[:, None] + tl.load(floor + head * (E + 1) + tl.arange(0, E))[None, :]
    denominator = denominator * weight + tl.load(floor + head * (E + 1) + E)
    attention = numerator / denominator[:, None]
    known = tokens < N
    tl.store(out + _at(head, tokens, H, N, E), attention.to(out.dtype.element_ty), mask=known[:, None])
    tl.store(denominators + head * N + tokens, denominator, mask=known)


# ---- backward


@triton.jit
def query_gradients(
    gradient, q, out, denominators, w, context, dq, shifts, deltas, H, N, M, n_blocks,
    E: tl.constexpr, N_BLOCK: tl.constexpr, M_BLOCK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Of a block of queries: their gradient; for `context_gradients` what is taken off e, and the gradient of the
    product's last column."""
    head, tokens = _program(n_blocks, N_BLOCK)
    known = tokens < N
    query = _tokens(q, head, tokens, H, N, E)
    denominator = tl.load(denominators + head * N + tokens, mask=known, other=1.0)
    d_values = _tokens(gradient, head, tokens, H, N, E) / denominator[:, None]
    d_ones = -tl.sum(d_values * _tokens(out, head, tokens, H, N, E), 1)
    top = tl.full((N_BLOCK,), float("-inf"), tl.float32)
    for start in range(0, M, M_BLOCK):
        features = start + tl.arange(0, M_BLOCK)
        e = _exponents(query, _projection(w, features, M, E), features, M, PRECISION)
        top = tl.maximum(top, tl.max(e, 1))
    shift = top + _half_square(query, E)
    d_query = tl.zeros((N_BLOCK, E), tl.float32)
    d_half = tl.zeros((N_BLOCK,), tl.float32)
    for start in range(0, M, M_BLOCK):
        features = start + tl.arange(0, M_BLOCK)
        projection = _projection(w, features, M, E)
        e = _exponents(query, projection, features, M, PRECISION)
        values, ones = _context(context, head, features, M, E)
        d_feature = tl.dot(d_values, tl.trans(values), input_precision=PRECISION) + d_ones[:, None] * ones[None, :]
        d_e = d_feature * tl.exp(e - shift[:, None])
        d_query = tl.dot(d_e, projection, d_query, input_precision=PRECISION)
        d_half += tl.sum(d_e, 1)
    d_query -= d_half[:, None] * query * (1 / E**0.5)
    tl.store(dq + _at(head, tokens, H, N, E), d_query.to(dq.dtype.element_ty), mask=known[:, None])
    tl.store(shifts + head * N + tokens, shift, mask=known)
    tl.store(deltas + head * N + tokens, d_ones, mask=known)


@triton.jit
def context_gradients(
    gradient, q, denominators, w, shifts, deltas, d_context, epsilon, H, N, M, n_blocks,
    E: tl.constexpr, N_BLOCK: tl.constexpr, M_BLOCK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Of a block of features: the gradient of their rows of the context."""
    head, features = _program(n_blocks, M_BLOCK)
    projection = _projection(w, features, M, E)
    values = tl.zeros((M_BLOCK, E), tl.float32)
    denominator = tl.zeros((M_BLOCK,), tl.float32)
    total = tl.zeros((E,), tl.float32)
    total_ones = 0.0
    for start in range(0, N, N_BLOCK):
        tokens = start + tl.arange(0, N_BLOCK)
        e = tl.dot(projection, tl.trans(_tokens(q, head, tokens, H, N, E)), input_precision=PRECISION)
        e = tl.where((tokens < N)[None, :], e, float("-inf"))
        last = head * N + tl.minimum(tokens, N - 1)  # Triton 3.2 does not compile these loads with a mask
        feature = tl.exp(e - tl.load(shifts + last)[None, :])
        d_values = _tokens(gradient, head, tokens, H, N, E) / tl.load(denominators + last)[:, None]
        d_ones = tl.where(tokens < N, tl.load(deltas + last), 0.0)
        values = tl.dot(feature, d_values, values, input_precision=PRECISION)
        denominator += tl.sum(feature * d_ones[None, :], 1)
        total += tl.sum(d_values, 0)
        total_ones += tl.sum(d_ones, 0)
    values += epsilon * total[None, :]
    denominator += epsilon * total_ones
    _store_context(d_context, head, features, M, values, denominator, E)


@triton.jit
def key_gradients(
    k, v, w, largest, d_context, d_floor, dk, dv, H, N, M, n_blocks,
    E: tl.constexpr, N_BLOCK: tl.constexpr, M_BLOCK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Of a block of keys and values: their gradients."""
    head, tokens = _program(n_blocks, N_BLOCK)
    key = _tokens(k, head, tokens, H, N, E)
    value = _tokens(v, head, tokens, H, N, E)
    shift = _half_square(key, E) + tl.load(largest + head // H)
    d_key = tl.zeros((N_BLOCK, E), tl.float32)
    d_value = tl.zeros((N_BLOCK, E), tl.float32)
    d_half = tl.zeros((N_BLOCK,), tl.float32)
    for start in range(0, M, M_BLOCK):
        features = start + tl.arange(0, M_BLOCK)
        projection = _projection(w, features, M, E)
        feature = tl.exp(_exponents(key, projection, features, M, PRECISION) - shift[:, None])
        d_values, d_ones = _context(d_context, head, features, M, E)
        d_value = tl.dot(feature, d_values, d_value, input_precision=PRECISION)
        d_feature = tl.dot(value, tl.trans(d_values), input_precision=PRECISION) + d_ones[None, :]
        d_e = d_feature * feature
        d_key = tl.dot(d_e, projection, d_key, input_precision=PRECISION)
        d_half += tl.sum(d_e, 1)
    d_key -= d_half[:, None] * key * (1 / E**0.5)
    d_value += tl.load(d_floor + head * (E + 1) + tl.arange(0, E))[None, :]
    at, known = _at(head, tokens, H, N, E), (tokens < N)[:, None]
    tl.store(dk + at, d_key.to(dk.dtype.element_ty), mask=known)
    tl.store(dv + at, d_value.to(dv.dtype.element_ty), mask=known)


# ---- what performer.py calls


def _run(kernel: Any, shape: torch.Size, n_features: int, by_tokens: bool, fast: bool, *arguments: Any) -> None:
    """A program for each head and each block of tokens, or of features."""
    batch, heads, n_tokens, width = shape
    n_blocks = triton.cdiv(n_tokens, N_BLOCK) if by_tokens else triton.cdiv(n_features, M_BLOCK)
    sizes = heads, n_tokens, n_features, n_blocks
    precision = "tf32" if fast else "ieee"
    kernel[(batch * heads * n_blocks,)](
        *arguments, *sizes, E=width, N_BLOCK=N_BLOCK, M_BLOCK=M_BLOCK, PRECISION=precision
    )


def _as_layers_give_it(x: Tensor) -> Tensor:
    """Heads (B, H, N, E) that lie in memory as (B, N, H, E), with or without a copy."""
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def _empty_like(x: Tensor) -> Tensor:
    batch, heads, n_tokens, width = x.shape
    return x.new_empty((batch, n_tokens, heads, width)).transpose(1, 2)


def forward(
    q: Tensor, k: Tensor, v: Tensor, scaled: Tensor, epsilon: float, fast: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What `performer.favor` gives, of the projection divided by E^1/4 (M, E)."""
    q, k, v, scaled = *(_as_layers_give_it(x) for x in (q, k, v)), scaled.contiguous()
    (batch, heads, n_tokens, width), n_features = q.shape, len(scaled)
    context = torch.empty(batch, heads, n_features, width + 1, device=q.device)
    tops, highest = torch.empty(2, batch, heads, n_features, device=q.device)
    _run(key_context, k.shape, n_features, False, fast, k, v, scaled, context, tops, highest)
    largest = highest.amax((1, 2)).view(-1, 1, 1, 1)
    context.mul_((tops.unsqueeze(-1) - largest).exp_())
    context[..., :-1] += epsilon * v.sum(-2, keepdim=True, dtype=torch.float32)
    context[..., -1] += epsilon * n_tokens
    out, denominator = _empty_like(q), torch.empty(batch, heads, n_tokens, 1, device=q.device)
    floor = epsilon * context.sum(-2)
    _run(attend, q.shape, n_features, True, fast, q, scaled, context, floor, out, denominator)
    return out, largest, context, denominator


def backward(
    gradient: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scaled: Tensor,
    largest: Tensor,
    context: Tensor,
    out: Tensor,
    denominator: Tensor,
    epsilon: float,
    fast: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """What `performer.favor_backward` gives."""
    gradient, q, k, v, out = (_as_layers_give_it(x) for x in (gradient, q, k, v, out))
    scaled, n_features = scaled.contiguous(), len(scaled)
    dq, dk, dv, d_context = _empty_like(q), _empty_like(k), _empty_like(v), torch.empty_like(context)
    shifts, deltas = torch.empty(2, *q.shape[:3], device=q.device)
    of_queries = gradient, q, out, denominator, scaled, context, dq, shifts, deltas
    _run(query_gradients, q.shape, n_features, True, fast, *of_queries)
    of_context = gradient, q, denominator, scaled, shifts, deltas, d_context, epsilon
    _run(context_gradients, q.shape, n_features, False, fast, *of_context)
    of_keys = k, v, scaled, largest, d_context, epsilon * d_context.sum(-2), dk, dv
    _run(key_gradients, k.shape, n_features, True, fast, *of_keys)
    return dq, dk, dv
