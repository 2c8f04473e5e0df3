"""FAVOR+ attention and the Performer block of scBERT.

Choromanski et al. 2021, arXiv 2009.14794: exp(q . k) is the mean over random w of exp(w.q - |q|^2/2) times
exp(w.k - |k|^2/2), so attention over N tokens costs N x M instead of N x N. Block layout and constants as in scBERT
(Yang et al. 2022). Letters: B batch, H heads, R = B x H rows, N tokens, E width of a head, M random features, D width.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

N_FEATURES = 266  # of scBERT's projections: int(64 ln 64) for heads of 64
HEAD_WIDTH = 64
EPSILON = 1e-4  # keeps a kernel value from being zero; scBERT's constant
BYTES_AT_ONCE = {"cpu": 2**22, "cuda": 2**29}  # of features: what a core's cache holds; what keeps a GPU busy


def orthogonal_projection(n_features: int, width: int, generator: torch.Generator | None = None) -> Tensor:
    """Gaussian rows, orthogonal within each group of `width` rows: (n_features, width), each row of chi norm."""
    groups = -(-n_features // width)
    gaussian = torch.randn(groups, width, width, generator=generator)
    directions = torch.linalg.qr(gaussian).Q.transpose(1, 2).reshape(groups * width, width)[:n_features]
    norms = torch.randn(n_features, width, generator=generator).norm(dim=1, keepdim=True)
    return directions * norms


def softmax_features(x: Tensor, projection: Tensor, largest: Tensor | None = None, out: Tensor | None = None) -> Tensor:
    """Positive features, dot products of which estimate exp(q . k) up to a factor: x (R, N, E) scaled by E^-1/4,
    projection (M, E) -> (R, N, M), without the factor M^-1/2, which cancels in attention.

    `largest` (R, 1, 1) is taken out of the exponent; without it, the maximum of each token's own features is, as is
    right for queries. Either would cancel too, but for EPSILON. `out` is a buffer to write into.
    """
    exponent = torch.matmul(x, projection.T, out=out)
    largest = exponent.amax(-1, keepdim=True) if largest is None else largest
    return exponent.sub_(largest + x.square().sum(-1, keepdim=True) / 2).exp_().add_(EPSILON)


def _largest_key_exponent(k: Tensor, projection: Tensor, heads: int) -> Tensor:
    """Maximum of w . k over heads, tokens and features of each sample: (R, N, E) -> (R, 1, 1).

    Beside EPSILON it decides how far a head's attention is flattened, so it is not taken per head. scBERT takes it over
    the whole batch; per sample, a spot's result does not depend on its batch mates.
    """
    largest = torch.empty(len(k), 1, 1, device=k.device)
    for rows, buffer in _row_chunks(k, projection):
        scaled = k[rows].float() * k.shape[-1] ** -0.25
        largest[rows] = torch.matmul(scaled, projection.T, out=buffer).amax((1, 2), keepdim=True)
    by_sample = largest.unflatten(0, (-1, heads))
    return by_sample.amax(1, keepdim=True).expand_as(by_sample).flatten(0, 1)


class FavorAttention(torch.autograd.Function):
    """Linear attention with softmax kernels, in fp32, a few rows at a time; backward computes the features anew.

    The features are M / E = 4 times the size of q and k: kept for all rows they would be most of the memory of a step,
    and writing them most of its time. q, k, v (R, N, E), projection (M, E) -> (R, N, E). A column of ones beside v
    gives numerator and denominator of attention in one product.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, projection: Tensor, heads: int) -> Tensor:
        out = torch.empty(v.shape, dtype=torch.float32, device=v.device)
        denominator = out.new_empty(*v.shape[:2], 1)
        with torch.autocast(q.device.type, enabled=False):  # the exponent of a bf16 product would be off by percents
            largest = _largest_key_exponent(k, projection, heads)
            for rows, buffer in _row_chunks(q, projection):
                queries, keys, values = _prepared(q[rows], k[rows], v[rows])
                context = softmax_features(keys, projection, largest[rows], buffer).transpose(1, 2) @ values
                product = softmax_features(queries, projection, out=buffer) @ context  # (r, N, E + 1)
                denominator[rows] = product[..., -1:]
                torch.div(product[..., :-1], product[..., -1:], out=out[rows])
        ctx.save_for_backward(q, k, v, projection, largest, out, denominator)
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, projection, largest, out, denominator = ctx.saved_tensors
        dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        with torch.autocast(q.device.type, enabled=False):
            for rows, buffer in _row_chunks(q, projection):
                queries, keys, values = _prepared(q[rows], k[rows], v[rows])
                d_numerator = gradients[0][rows].float() / denominator[rows]
                d_denominator = -(d_numerator * out[rows]).sum(-1, keepdim=True)
                d_product = torch.cat([d_numerator, d_denominator], dim=-1)
                features = softmax_features(keys, projection, largest[rows], buffer)
                context = features.transpose(1, 2) @ values
                features = softmax_features(queries, projection, out=buffer)
                d_context = features.transpose(1, 2) @ d_product
                dq[rows] = _through_features(d_product @ context.transpose(1, 2), features, queries, projection)
                features = softmax_features(keys, projection, largest[rows], buffer)
                dv[rows] = (features @ d_context)[..., :-1].to(dv.dtype)
                dk[rows] = _through_features(values @ d_context.transpose(1, 2), features, keys, projection)
        return dq, dk, dv, None, None


def _row_chunks(q: Tensor, projection: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Slices of rows whose features fit BYTES_AT_ONCE, each with a buffer (r, N, M) that all of them share."""
    n_rows, n_tokens, n_features = len(q), q.shape[1], len(projection)
    budget = BYTES_AT_ONCE.get(q.device.type, 2**26)
    step = max(1, min(n_rows, budget // (4 * n_tokens * n_features)))
    buffer = torch.empty(step, n_tokens, n_features, device=q.device)
    for start in range(0, n_rows, step):
        rows = slice(start, min(start + step, n_rows))
        yield rows, buffer[: rows.stop - rows.start]


def _prepared(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Scaled queries and keys, values with a column of ones, in fp32."""
    scale = q.shape[-1] ** -0.25
    ones = torch.ones(*v.shape[:2], 1, device=v.device)
    return q.float() * scale, k.float() * scale, torch.cat([v.float(), ones], dim=-1)


def _through_features(d_features: Tensor, features: Tensor, x: Tensor, projection: Tensor) -> Tensor:
    """Gradient of softmax_features with respect to the unscaled x; the features' buffer is used up."""
    d_exponent = d_features.mul_(features.sub_(EPSILON))
    return (d_exponent @ projection - d_exponent.sum(-1, keepdim=True) * x) * x.shape[-1] ** -0.25


def favor_attention(q: Tensor, k: Tensor, v: Tensor, projection: Tensor) -> Tensor:
    """q, k, v (B, H, N, E), projection (M, E) -> (B, H, N, E), fp32."""
    rows = (x.flatten(0, 1) for x in (q, k, v))
    return FavorAttention.apply(*rows, projection, q.shape[1]).unflatten(0, q.shape[:2])


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
        return self.to_out(out.transpose(1, 2).flatten(2).to(x.dtype))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop(self.attend(self.norm_attention(x)))
        return x + self.drop(self.w2(nn.functional.gelu(self.w1(self.norm_mlp(x)))))
