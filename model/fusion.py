"""Does this picture belong to this profile? Fusion blocks, hard negatives, matching head.

Li et al. 2021 (ALBEF), section 3.2. Both sides are sequences: attention over a single token would be a linear map.
Letters: B batch, K gene tokens, P image tokens, D width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from model.layers import CrossBlock


class Fusion(nn.Module):
    """Gene tokens attend to themselves and to image tokens; the mean token gives one logit per pair.

    Shapes: gene_tokens (B, K, D), image_tokens (B, P, D) -> (B,), above 0 where the two seem to belong together.
    """

    def __init__(self, width: int, blocks: int, heads: int = 8, hidden: int = 1024):
        super().__init__()
        self.norm_image = nn.LayerNorm(width)
        self.blocks = nn.ModuleList(CrossBlock(width, heads, hidden) for _ in range(blocks))
        self.norm = nn.LayerNorm(width)
        self.to_logit = nn.Linear(width, 1)

    def forward(self, gene_tokens: Tensor, image_tokens: Tensor) -> Tensor:
        memory = self.norm_image(image_tokens)
        for block in self.blocks:
            gene_tokens = block(gene_tokens, memory)
        return self.to_logit(self.norm(gene_tokens).mean(1)).squeeze(-1)


@torch.no_grad()
def hard_negatives(similarity: Tensor, spots: Tensor, generator: torch.Generator) -> Tensor:
    """For each query one candidate of another spot, drawn with weight softmax(similarity): (B, B), (B,) -> (B,).

    The batch must hold at least two spots.
    """
    same = spots[:, None] == spots[None, :]
    weights = similarity.float().masked_fill(same, -torch.inf).softmax(1)
    return torch.multinomial(weights, 1, generator=generator).squeeze(1)
