"""Attention, MLP and the block that the fusion module and the decoder share.

Letters: B batch, N query tokens, M memory tokens, D width, H heads. Pre-norm residual blocks as in timm's ViT;
Vaswani et al. 2017, arXiv 1706.03762.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


class Attention(nn.Module):
    """Multi-head attention of x over a memory (self-attention when the memory is x).

    Shapes: x (B, N, width), memory (B, M, width) -> (B, N, width).
    """

    def __init__(self, width: int, heads: int):
        super().__init__()
        if width % heads:
            raise ValueError(f"attention: width {width} is not a multiple of its {heads} heads")
        self.heads = heads
        self.to_q = nn.Linear(width, width)
        self.to_kv = nn.Linear(width, 2 * width)
        self.to_out = nn.Linear(width, width)

    def forward(self, x: Tensor, memory: Tensor, present: Tensor | None = None) -> Tensor:
        """present (B, M) is False where a memory token is to be ignored; at least one per row must be True."""
        q = self.to_q(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)  # (B, H, N, D/H)
        k, v = self.to_kv(memory).unflatten(-1, (2, self.heads, -1)).permute(2, 0, 3, 1, 4)  # (B, H, M, D/H) each
        mask = None if present is None else present[:, None, None, :]
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.to_out(out.transpose(1, 2).flatten(2))


class MLP(nn.Sequential):
    """Two linear layers with GELU between: (..., width) -> (..., width)."""

    def __init__(self, width: int, hidden: int):
        super().__init__(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))


class CrossBlock(nn.Module):
    """Self-attention over x, attention of x to a memory, feed-forward; each behind a norm, each added to x behind a
    dropout (none on attention weights: it would cost more than the attention, and rule out its fused form).

    Shapes: x (B, N, width), memory (B, M, width), present (B, M) bool or None -> (B, N, width).
    """

    def __init__(self, width: int, heads: int, hidden: int, dropout: float = 0.0):
        super().__init__()
        self.norm_self, self.norm_cross, self.norm_mlp = (nn.LayerNorm(width) for _ in range(3))
        self.attend_self = Attention(width, heads)
        self.attend_memory = Attention(width, heads)
        self.mlp = MLP(width, hidden)
        self.drop = nn.Dropout(dropout)

    def forward(self, x: Tensor, memory: Tensor, present: Tensor | None = None) -> Tensor:
        normed = self.norm_self(x)
        x = x + self.drop(self.attend_self(normed, normed))
        x = x + self.drop(self.attend_memory(self.norm_cross(x), memory, present))
        return x + self.drop(self.mlp(self.norm_mlp(x)))
