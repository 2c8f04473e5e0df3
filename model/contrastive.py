"""Contrast of images and profiles with momentum distillation.

Li et al. 2021 (ALBEF), arXiv 2107.07651, section 3.2 and equation 6. Letters: B batch, M = B + queue rows, D width.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from model import losses


class Pair(NamedTuple):
    """Unit vectors of images and profiles, (B, D) each, and the spot they belong to, (B,)."""

    image: Tensor
    gene: Tensor
    spot: Tensor

    def detached(self) -> Pair:
        return Pair(self.image.detach(), self.gene.detach(), self.spot)


class ContrastiveHead(nn.Module):
    """Loss of one batch against itself and the queue; its learned temperature is exp(-logit_scale)."""

    MAX_LOGIT_SCALE = math.log(100.0)

    def __init__(self, temperature: float = 0.07):
        super().__init__()
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / temperature)))

    def similarity(self, queries: Tensor, keys: Tensor) -> Tensor:
        """s = f . g / t: (B, D), (M, D) -> (B, M), in fp32 (a bf16 product is off by more than small margins)."""
        with torch.autocast(queries.device.type, enabled=False):
            return queries.float() @ keys.float().T * self.logit_scale.exp()

    def forward(self, student: Pair, twin: Pair, queue: tuple[Tensor, Tensor, Tensor], alpha: float) -> Tensor:
        """Mean of both directions' cross entropies. Keys of the batch are the student's own features, keys of the
        queue and both sides of the target's similarity are the twin's."""
        queue_image, queue_gene, queue_spot = queue
        onehot = losses.same_spot_onehot(student.spot, torch.cat([student.spot, queue_spot]))
        total: Tensor = student.image.new_zeros(())
        for query, key, slow_query, slow_key, old_keys in (
            (student.image, student.gene, twin.image, twin.gene, queue_gene),
            (student.gene, student.image, twin.gene, twin.image, queue_image),
        ):
            with torch.no_grad():
                slow_logits = self.similarity(slow_query, torch.cat([slow_key, old_keys.to(slow_key.dtype)]))
                target = losses.distilled_target(slow_logits, onehot, alpha)
            logits = self.similarity(query, torch.cat([key, old_keys.to(key.dtype)]))
            total = total + losses.soft_cross_entropy(logits, target) / 2
        return total

    @torch.no_grad()
    def clamp(self) -> None:
        """Keep the temperature between 1/100 and 1; called after each step."""
        self.logit_scale.clamp_(0.0, self.MAX_LOGIT_SCALE)
