"""The slow twin of a module, and the queue of its features.

He et al. 2020 (MoCo), arXiv 1911.05722; Li et al. 2021 (ALBEF), arXiv 2107.07651. Letters: Q capacity, D width.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn


def make_twin(module: nn.Module) -> nn.Module:
    """A copy that never gets a gradient. What is frozen in the module is not copied but shared."""
    shared = {id(p): p for p in module.parameters() if not p.requires_grad}
    twin = copy.deepcopy(module, memo=shared)
    return twin.requires_grad_(False).eval()


@torch.no_grad()
def update_twin(twin: nn.Module, module: nn.Module, momentum: float) -> None:
    """twin <- momentum twin + (1 - momentum) module, for every trained parameter; buffers are copied."""
    trained = [(t, p) for t, p in zip(twin.parameters(), module.parameters(), strict=True) if t is not p]
    if trained:
        slow, fast = zip(*trained, strict=True)
        torch._foreach_lerp_(slow, [p.detach() for p in fast], 1 - momentum)
    for slow_buffer, buffer in zip(twin.buffers(), module.buffers(), strict=True):
        slow_buffer.copy_(buffer)


class FeatureQueue(nn.Module):
    """The twin's latest features of images and profiles, with the spot each came from; a ring of `capacity` rows."""

    def __init__(self, capacity: int, width: int):
        super().__init__()
        self.capacity = capacity
        self.image: Tensor
        self.gene: Tensor
        self.spot: Tensor
        self.state: Tensor  # rows filled, next row to write
        self.register_buffer("image", torch.zeros(capacity, width))
        self.register_buffer("gene", torch.zeros(capacity, width))
        self.register_buffer("spot", torch.full((capacity,), -1))
        self.register_buffer("state", torch.zeros(2, dtype=torch.long))

    def filled(self) -> tuple[Tensor, Tensor, Tensor]:
        """Features of images and of profiles (n, D) and spot ids (n,) of the n rows filled so far, copied:
        the ring may be written before the backward pass reads them."""
        n = int(self.state[0])
        return self.image[:n].clone(), self.gene[:n].clone(), self.spot[:n].clone()

    @torch.no_grad()
    def push(self, image: Tensor, gene: Tensor, spot: Tensor) -> None:
        """Write a batch (B, D), (B, D), (B,) over the oldest rows; of a batch above the capacity the last rows stay."""
        if self.capacity == 0:
            return
        image, gene, spot = (x[-self.capacity :].to(self.image.device) for x in (image, gene, spot))
        n, filled, start = len(spot), int(self.state[0]), int(self.state[1])
        rows = (start + torch.arange(n, device=spot.device)) % self.capacity
        self.image[rows], self.gene[rows], self.spot[rows] = image.float(), gene.float(), spot
        self.state[0] = min(filled + n, self.capacity)
        self.state[1] = (start + n) % self.capacity
