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

    def forward(self, pair: Pair, pair_m: Pair, queue: tuple[Tensor, Tensor, Tensor], alpha: float) -> Tensor:
        """Mean cross entropy of both directions.

        Parameters
        ----------
        pair : features of the batch; they are queries, and the batch's keys
        pair_m : features of the momentum encoders, both sides of the soft target's similarity
        queue : earlier features of the momentum encoders, images and genes (Q, D), and their spots (Q,)
        alpha : weight of the soft target, 0 for the plain contrastive loss
        """
        queue_image, queue_gene, queue_spot = queue
        onehot = losses.same_spot_onehot(pair.spot, torch.cat([pair.spot, queue_spot]))
        total: Tensor = pair.image.new_zeros(())
        for query, key, query_m, key_m, queue_keys in (
            (pair.image, pair.gene, pair_m.image, pair_m.gene, queue_gene),
            (pair.gene, pair.image, pair_m.gene, pair_m.image, queue_image),
        ):
            with torch.no_grad():
                logits_m = self.similarity(query_m, torch.cat([key_m, queue_keys.to(key_m.dtype)]))
                target = losses.distilled_target(logits_m, onehot, alpha)
            logits = self.similarity(query, torch.cat([key, queue_keys.to(key.dtype)]))
            total = total + losses.soft_cross_entropy(logits, target) / 2
        return total

    @torch.no_grad()
    def clamp(self) -> None:
        """Keep the temperature between 1/100 and 1; called after each step."""
        self.logit_scale.clamp_(0.0, self.MAX_LOGIT_SCALE)
