"""Image-gene contrastive loss with momentum distillation.

Li et al. 2021 (ALBEF), arXiv 2107.07651, equations 1, 2 and 6. Letters: B batch, M = B + queue rows, D width; the
suffix _m marks features of the momentum encoders.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from model import losses


class Pair(NamedTuple):
    """Unit vectors of images and genes, (B, D) each, and the spot they belong to, (B,)."""

    image: Tensor
    gene: Tensor
    spot: Tensor

    def detached(self) -> Pair:
        return Pair(self.image.detach(), self.gene.detach(), self.spot)


class ContrastiveHead(nn.Module):
    """Loss of a batch against itself and the queue; the learned temperature is exp(-logit_scale)."""

    MAX_LOGIT_SCALE = math.log(100.0)

    def __init__(self, temperature: float = 0.07):
        super().__init__()
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / temperature)))

    def similarity(self, queries: Tensor, keys: Tensor) -> Tensor:
        """s = f . g / t: (B, D), (M, D) -> (B, M), in fp32 (a bf16 product is off by more than small margins)."""
        with torch.autocast(queries.device.type, enabled=False):
            return queries.float() @ keys.float().T * self.logit_scale.exp()

    def forward(self, pair: Pair, pair_m: Pair | None, queue: tuple[Tensor, Tensor, Tensor], alpha: float) -> Tensor:
        """Mean cross entropy of both directions: within the batch, and, where there are momentum encoders, the mean of
        that and of the loss against their keys.

        Parameters
        ----------
        pair : features of the batch; they are queries, and keys with a gradient
        pair_m : features of the momentum encoders, keys beside those in the queue, and both sides of the soft target's
            similarity; None without such encoders
        queue : earlier features of the momentum encoders, images and genes (Q, D), and their spots (Q,)
        alpha : weight of the soft target, 0 for onehot targets
        """
        onehot = losses.same_spot_onehot(pair.spot, pair.spot)
        to_gene, to_image = self.similarity(pair.image, pair.gene), self.similarity(pair.gene, pair.image)
        within = (losses.soft_cross_entropy(to_gene, onehot) + losses.soft_cross_entropy(to_image, onehot)) / 2
        return within if pair_m is None else (within + self.against_momentum(pair, pair_m, queue, alpha)) / 2

    def against_momentum(self, pair: Pair, pair_m: Pair, queue: tuple[Tensor, Tensor, Tensor], alpha: float) -> Tensor:
        """ALBEF's loss: all keys, of the batch and of the queue, are of momentum encoders. Keys of both kinds in one
        softmax would be told apart by their age instead of their content (docs/parts.md). Parameters: see `forward`."""
        pair_m, (queue_image, queue_gene, queue_spot) = pair_m.detached(), queue
        onehot = losses.same_spot_onehot(pair.spot, torch.cat([pair.spot, queue_spot]))
        total: Tensor = pair.image.new_zeros(())
        for query, query_m, keys_m in (
            (pair.image, pair_m.image, torch.cat([pair_m.gene, queue_gene.to(pair_m.gene.dtype)])),
            (pair.gene, pair_m.gene, torch.cat([pair_m.image, queue_image.to(pair_m.image.dtype)])),
        ):
            with torch.no_grad():
                target = losses.distilled_target(self.similarity(query_m, keys_m), onehot, alpha)
            total = total + losses.soft_cross_entropy(self.similarity(query, keys_m), target) / 2
        return total

    @torch.no_grad()
    def clamp(self) -> None:
        """Keep the temperature between 1/100 and 1; called after each step."""
        self.logit_scale.clamp_(0.0, self.MAX_LOGIT_SCALE)
