"""Attention, MLP, and the block that the fusion module and the decoder share.

Vaswani et al. 2017, arXiv 1706.03762; pre-norm residual blocks as in timm's ViT. Letters: B batch, N query tokens,
M memory tokens, D width, H heads.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Standardise(nn.Module):
    """(x - mean) / sd with the mean and deviation that `measure` fixes before training: (..., D) -> (..., D)."""

    def __init__(self, width: int, min_sd: float):
        super().__init__()
        self.mean: Tensor
        self.sd: Tensor
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("sd", torch.ones(width))
        self.min_sd = min_sd

    def measure(self, mean: Tensor, sd: Tensor) -> None:
        """Set mean and deviation (D,); a deviation below `min_sd` is raised to it."""
        self.mean.copy_(mean)
        self.sd.copy_(sd.clamp(min=self.min_sd))

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.mean) / self.sd


class Attention(nn.Module):
    """Multi-head attention of x over a memory (self-attention when the memory is x).

    Shapes: x (B, N, D), memory (B, M, D) -> (B, N, D). For a memory that several x attend to, compute `keys_values`
    once and call `attend`.
    """

    def __init__(self, width: int, heads: int):
        super().__init__()
        if width % heads:
            raise ValueError(
                f"attention: expected a width that is a multiple of its {heads} heads, found {width}; change it"
            )
        self.heads = heads
        self.to_q = nn.Linear(width, width)
        self.to_kv = nn.Linear(width, 2 * width)
        self.to_out = nn.Linear(width, width)

    def keys_values(self, memory: Tensor) -> Tensor:
        """(B, M, D) -> (2, B, H, M, D / H)."""
        return self.to_kv(memory).unflatten(-1, (2, self.heads, -1)).permute(2, 0, 3, 1, 4)

    def attend(self, x: Tensor, keys_values: Tensor, present: Tensor | None = None) -> Tensor:
        q = self.to_q(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)  # (B, H, N, D/H)
        mask = None if present is None else present[:, None, None, :]
        out = F.scaled_dot_product_attention(q, keys_values[0], keys_values[1], attn_mask=mask)
        return self.to_out(out.transpose(1, 2).flatten(2))

    def forward(self, x: Tensor, memory: Tensor, present: Tensor | None = None) -> Tensor:
        """`present` (B, M) is False for memory tokens to ignore; at least one per row must be True."""
        return self.attend(x, self.keys_values(memory), present)


class MLP(nn.Sequential):
    """Two linear layers with GELU between: (..., D) -> (..., D)."""

    def __init__(self, width: int, hidden: int):
        super().__init__(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))


class CrossBlock(nn.Module):
    """Self-attention, cross-attention to a memory, feed-forward; each after a norm, with dropout and a residual.

    Shapes: x (B, N, D), memory (B, M, D), present (B, M) bool or None -> (B, N, D). Attention weights have no dropout:
    it would cost more than the attention, and rule out the fused kernel.
    """

    def __init__(self, width: int, heads: int, hidden: int, dropout: float = 0.0):
        super().__init__()
        self.norm_self, self.norm_cross, self.norm_mlp = (nn.LayerNorm(width) for _ in range(3))
        self.attend_self = Attention(width, heads)
        self.attend_memory = Attention(width, heads)
        self.mlp = MLP(width, hidden)
        self.drop = nn.Dropout(dropout)

    def self_attend(self, x: Tensor) -> Tensor:
        normed = self.norm_self(x)
        return x + self.drop(self.attend_self(normed, normed))

    def cross_attend(self, x: Tensor, keys_values: Tensor, present: Tensor | None = None) -> Tensor:
        """Attention to the memory's `keys_values`, then feed-forward."""
        x = x + self.drop(self.attend_memory.attend(self.norm_cross(x), keys_values, present))
        return x + self.drop(self.mlp(self.norm_mlp(x)))

    def forward(self, x: Tensor, memory: Tensor, present: Tensor | None = None) -> Tensor:
        return self.cross_attend(self.self_attend(x), self.attend_memory.keys_values(memory), present)
