"""FAVOR+ attention and the Performer block of scBERT.

Choromanski et al. 2021, arXiv 2009.14794: exp(q . k) is the mean over random w of exp(w.q - |q|^2/2) times
exp(w.k - |k|^2/2), so attention over N tokens costs N x M instead of N x N. Block layout and constants as in scBERT
(Yang et al. 2022).
Letters: B batch, H heads, N tokens, E width of a head, M random features, D width of the block.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

N_FEATURES = 266  # of scBERT's projections: int(64 ln 64) for heads of 64
HEAD_WIDTH = 64
EPSILON = 1e-4  # keeps a kernel value from being zero; scBERT's constant


def orthogonal_projection(n_features: int, width: int, generator: torch.Generator | None = None) -> Tensor:
    """Gaussian rows, orthogonal within each group of `width` rows: (n_features, width), each row of chi norm."""
    groups = -(-n_features // width)
    gaussian = torch.randn(groups, width, width, generator=generator)
    directions = torch.linalg.qr(gaussian).Q.transpose(1, 2).reshape(groups * width, width)[:n_features]
    norms = torch.randn(n_features, width, generator=generator).norm(dim=1, keepdim=True)
    return directions * norms


def softmax_kernel(x: Tensor, projection: Tensor, over: tuple[int, ...]) -> Tensor:
    """Positive features whose dot products estimate exp(q . k / sqrt(E)): (B, H, N, E), (M, E) -> (B, H, N, M).

    `over` names the dimensions whose maximum is taken out of the exponent: the features of each query, and the
    tokens and features of each head's keys. Either cancels in the quotient of attention. It is taken per sample
    (scBERT: over the whole batch), so that a spot's result does not depend on its batch mates.
    """
    x = x * x.shape[-1] ** -0.25
    exponent = x @ projection.T
    half_norm = x.square().sum(-1, keepdim=True) / 2
    stabiliser = exponent.amax(over, keepdim=True).detach()
    return ((exponent - half_norm - stabiliser).exp() + EPSILON) * projection.shape[0] ** -0.5


def favor_attention(q: Tensor, k: Tensor, v: Tensor, projection: Tensor) -> Tensor:
    """Linear attention with softmax kernels: q, k, v (B, H, N, E), projection (M, E) -> (B, H, N, E), in fp32."""
    with torch.autocast(q.device.type, enabled=False):  # exp of a bf16 exponent would be off by percents
        q, k, v = q.float(), k.float(), v.float()
        q = softmax_kernel(q, projection, over=(-1,))
        k = softmax_kernel(k, projection, over=(-1, -2))
        weighted_values = k.transpose(-1, -2) @ v  # (B, H, M, E)
        normaliser = q @ k.sum(-2).unsqueeze(-1)  # (B, H, N, 1)
        return (q @ weighted_values) / normaliser


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
        if torch.is_grad_enabled():  # the kernels are 266 / 64 the size of q and k: recomputing beats keeping them
            out = checkpoint(favor_attention, q, k, v, self.projection, use_reentrant=False, preserve_rng_state=False)
        else:
            out = favor_attention(q, k, v, self.projection)
        return self.to_out(out.transpose(1, 2).flatten(2).to(x.dtype))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop(self.attend(self.norm_attention(x)))
        return x + self.drop(self.w2(nn.functional.gelu(self.w1(self.norm_mlp(x)))))
