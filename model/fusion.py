"""Does this image belong to this profile? Fusion blocks, hard negatives, matching head.

Li et al. 2021 (ALBEF), section 3.2. Both sides are sequences: attention over a single token would be a linear map.
Letters: B batch, C candidates per image, K gene tokens, P image tokens, D width.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from model.layers import CrossBlock

LOG_ODDS = math.log(1 / 2)  # of a pair before anything is seen: two non-pairs are judged beside each


class Fusion(nn.Module):
    """Gene tokens attend to themselves and to image tokens; the mean token gives one logit per pair.

    Shapes: gene_tokens (B, K, D), image_tokens (B, P, D) -> (B,), log odds that the two belong together, **among pairs
    that the contrast finds alike**: where non-pairs are drawn with weight softmax(s), a well-taught s tells nothing
    more. It begins at the base rate of pairs. Where pairs share a side, what concerns that side alone is done once by
    `read_genes` and `read_images`, for `judge`.
    """

    def __init__(self, width: int, blocks: int, heads: int = 8, hidden: int = 1024):
        super().__init__()
        self.norm_image = nn.LayerNorm(width)
        self.blocks: Any = nn.ModuleList(CrossBlock(width, heads, hidden) for _ in range(blocks))
        self.norm = nn.LayerNorm(width)
        self.to_logit = nn.Linear(width, 1)
        nn.init.zeros_(self.to_logit.weight)
        nn.init.constant_(self.to_logit.bias, LOG_ODDS)

    def read_genes(self, gene_tokens: Tensor) -> Tensor:
        """What a profile's tokens do before they see a image: (B, K, D) -> (B, K, D)."""
        return self.blocks[0].within(gene_tokens)

    def read_images(self, image_tokens: Tensor) -> list[Tensor]:
        """Keys and values of the images for each block: (B, P, D) -> (2, B, heads, P, D / heads) each."""
        memory = self.norm_image(image_tokens)
        return [block.attend_memory.keys_values(memory) for block in self.blocks]

    def judge(self, genes: Tensor, images: list[Tensor]) -> Tensor:
        """Logits of each image with each of its candidates, both as read before: genes (B, C, K, D) -> (B, C)."""
        n_candidates = genes.shape[1]
        for i, (block, keys_values) in enumerate(zip(self.blocks, images, strict=True)):
            if i > 0:
                genes = block.within(genes.flatten(0, 1)).unflatten(0, (-1, n_candidates))
            genes = block.across(genes.flatten(1, 2), keys_values).unflatten(1, (n_candidates, -1))
        with torch.autocast(genes.device.type, enabled=False):  # rounded to bf16, near-equal logits would tie
            return self.to_logit(self.norm(genes.float()).mean(2)).squeeze(-1)

    def forward(self, gene_tokens: Tensor, image_tokens: Tensor) -> Tensor:
        genes = self.read_genes(gene_tokens).unsqueeze(1)
        return self.judge(genes, self.read_images(image_tokens)).squeeze(1)


@torch.no_grad()
def hard_negatives(similarity: Tensor, spots: Tensor, generator: torch.Generator) -> Tensor:
    """For each query one candidate of another spot, drawn with weight softmax(similarity): (B, B), (B,) -> (B,).

    The batch must hold at least two spots.
    """
    same = spots[:, None] == spots[None, :]
    weights = similarity.float().masked_fill(same, -torch.inf).softmax(1)
    return torch.multinomial(weights, 1, generator=generator).squeeze(1)
