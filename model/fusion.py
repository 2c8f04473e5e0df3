"""Image-gene matching: fusion blocks, matching head, negatives.

Li et al. 2021 (ALBEF), arXiv 2107.07651, section 3.2, equation 4. Both sides are sequences: attention over a single
token would be a linear map. Letters: B batch, C candidates per image, K gene tokens, P image tokens, D width.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from model.layers import CrossBlock

N_NEGATIVES = 1  # wrong profiles, and as many wrong images, to each pair
PRIOR_LOGIT = -math.log(2 * N_NEGATIVES)  # log odds of a pair among these


class Fusion(nn.Module):
    """Gene tokens attend to themselves and to image tokens; the mean token gives one logit per pair.

    Shapes: gene_tokens (B, K, D), image_tokens (B, P, D) -> log odds (B,) of a pair against combinations of two spots
    drawn at random. Where pairs share a side, `precompute_genes` and `precompute_images` run once per side, and `score`
    once per pair.
    """

    def __init__(self, width: int, blocks: int, heads: int = 8, hidden: int = 1024):
        super().__init__()
        self.norm_image = nn.LayerNorm(width)
        self.blocks: Any = nn.ModuleList(CrossBlock(width, heads, hidden) for _ in range(blocks))
        self.norm = nn.LayerNorm(width)
        self.to_logit = nn.Linear(width, 1)
        nn.init.constant_(self.to_logit.bias, PRIOR_LOGIT)

    def precompute_genes(self, gene_tokens: Tensor) -> Tensor:
        """The first block's self-attention, which needs no image: (B, K, D) -> (B, K, D)."""
        return self.blocks[0].self_attend(gene_tokens)

    def precompute_images(self, image_tokens: Tensor) -> list[Tensor]:
        """Keys and values of the images for each block: (B, P, D) -> (2, B, heads, P, D / heads) each."""
        memory = self.norm_image(image_tokens)
        return [block.attend_memory.keys_values(memory) for block in self.blocks]

    def score(self, genes: Tensor, images: list[Tensor]) -> Tensor:
        """Logits of each image with each of its candidates, both precomputed: genes (B, C, K, D) -> (B, C)."""
        n_candidates = genes.shape[1]
        for i, (block, keys_values) in enumerate(zip(self.blocks, images, strict=True)):
            if i > 0:
                genes = block.self_attend(genes.flatten(0, 1)).unflatten(0, (-1, n_candidates))
            genes = block.cross_attend(genes.flatten(1, 2), keys_values).unflatten(1, (n_candidates, -1))
        with torch.autocast(genes.device.type, enabled=False):  # rounded to bf16, near-equal logits would tie
            return self.to_logit(self.norm(genes.float()).mean(2)).squeeze(-1)

    def forward(self, gene_tokens: Tensor, image_tokens: Tensor) -> Tensor:
        genes = self.precompute_genes(gene_tokens).unsqueeze(1)
        return self.score(genes, self.precompute_images(image_tokens)).squeeze(1)


@torch.no_grad()
def draw_negatives(spots: Tensor, n: int, generator: torch.Generator) -> Tensor:
    """For each row of a batch n rows of other spots, uniformly, with replacement: ids (B,) -> (B, n).

    `generator` is of the CPU. The batch must hold at least two spots. Drawn by similarity from the first step on, as
    ALBEF draws them, negatives leave a fusion without pretrained weights at chance (docs/parts.md).
    """
    same = spots[:, None] == spots[None, :]
    keys = torch.rand(n, *same.shape, generator=generator).to(spots.device)
    return keys.masked_fill(same, -1).argmax(-1).T
