"""Attention, MLP and the block that the fusion module and the decoder share.

Letters: B batch, N query tokens, M memory tokens, D width, H heads. Pre-norm residual blocks as in timm's ViT;
Vaswani et al. 2017, arXiv 1706.03762.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Standardise(nn.Module):
    """Take away a mean and divide by a deviation, both fixed before training by `measure`: (..., width) -> the same."""

    def __init__(self, width: int, min_sd: float):
        super().__init__()
        self.mean: Tensor
        self.sd: Tensor
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("sd", torch.ones(width))
        self.min_sd = min_sd

    def measure(self, mean: Tensor, sd: Tensor) -> None:
        """Mean and deviation (width,) of the data, a small deviation raised to `min_sd`."""
        self.mean.copy_(mean)
        self.sd.copy_(sd.clamp(min=self.min_sd))

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.mean) / self.sd


class Attention(nn.Module):
    """Multi-head attention of x over a memory (self-attention when the memory is x).

    Shapes: x (B, N, width), memory (B, M, width) -> (B, N, width). A memory that several x look at is turned into
    `keys_values` once, which `read` then takes in its place.
    """

    def __init__(self, width: int, heads: int):
        super().__init__()
        if width % heads:
            raise ValueError(f"attention: width {width} is not a multiple of its {heads} heads")
        self.heads = heads
        self.to_q = nn.Linear(width, width)
        self.to_kv = nn.Linear(width, 2 * width)
        self.to_out = nn.Linear(width, width)

    def keys_values(self, memory: Tensor) -> Tensor:
        """(B, M, width) -> (2, B, H, M, width / H)."""
        return self.to_kv(memory).unflatten(-1, (2, self.heads, -1)).permute(2, 0, 3, 1, 4)

    def read(self, x: Tensor, keys_values: Tensor, present: Tensor | None = None) -> Tensor:
        q = self.to_q(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)  # (B, H, N, D/H)
        mask = None if present is None else present[:, None, None, :]
        out = F.scaled_dot_product_attention(q, keys_values[0], keys_values[1], attn_mask=mask)
        return self.to_out(out.transpose(1, 2).flatten(2))

    def forward(self, x: Tensor, memory: Tensor, present: Tensor | None = None) -> Tensor:
        """present (B, M) is False where a memory token is to be ignored; at least one per row must be True."""
        return self.read(x, self.keys_values(memory), present)


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

    def within(self, x: Tensor) -> Tensor:
        """Self-attention alone, for which no memory is needed."""
        normed = self.norm_self(x)
        return x + self.drop(self.attend_self(normed, normed))

    def across(self, x: Tensor, keys_values: Tensor, present: Tensor | None = None) -> Tensor:
        """What comes after: attention to the memory's `keys_values`, feed-forward."""
        x = x + self.drop(self.attend_memory.read(self.norm_cross(x), keys_values, present))
        return x + self.drop(self.mlp(self.norm_mlp(x)))

    def forward(self, x: Tensor, memory: Tensor, present: Tensor | None = None) -> Tensor:
        return self.across(self.within(x), self.attend_memory.keys_values(memory), present)
