"""Momentum encoders, and the queue of their features.

He et al. 2020 (MoCo), arXiv 1911.05722, equation 2; Li et al. 2021 (ALBEF), arXiv 2107.07651, section 3.3. Letters:
B batch, Q capacity, D width.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Self

import torch
from torch import Tensor, nn

MAX_MOMENTUM = 0.995


def momentum_at(step: int) -> float:
    """Momentum of the update after a step (0 is the first): rises from 0.1 to MAX_MOMENTUM, reached at step 1,790.

    With a constant momentum the momentum encoders of a short training would keep a part of the random start.
    """
    return min((1 + step) / (10 + step), MAX_MOMENTUM)


def momentum_encoder(module: nn.Module) -> nn.Module:
    """A copy that never gets a gradient. Frozen parameters are not copied but shared."""
    shared = {id(p): p for p in module.parameters() if not p.requires_grad}
    return copy.deepcopy(module, memo=shared).requires_grad_(False).eval()


@torch.no_grad()
def update_momentum(module_m: nn.Module, module: nn.Module, momentum: float) -> None:
    """module_m <- momentum module_m + (1 - momentum) module, for every trained parameter; buffers are copied."""
    parameters = zip(module_m.parameters(), module.parameters(), strict=True)
    trained = [(slow, fast.detach()) for slow, fast in parameters if slow is not fast]
    if trained:
        slow, fast = map(list, zip(*trained, strict=True))
        torch._foreach_lerp_(slow, fast, 1 - momentum)
    for buffer_m, buffer in zip(module_m.buffers(), module.buffers(), strict=True):
        buffer_m.copy_(buffer)


class HostNumbers(nn.Module):
    """A module whose buffers named in `ON_HOST` stay on the CPU wherever it is moved: whole numbers that the host
    computes with, whose reading must not wait for a GPU."""

    ON_HOST: tuple[str, ...] = ()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        numbers = {name: self._buffers[name] for name in self.ON_HOST}
        super()._apply(fn, recurse)
        self._buffers.update(numbers)
        return self


class FeatureQueue(HostNumbers):
    """The latest features of the momentum encoders and the spots they came from: a ring of `capacity` rows."""

    ON_HOST = ("state",)

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

    @property
    def n_filled(self) -> int:
        """Rows filled so far."""
        return int(self.state[0])

    def filled(self) -> tuple[Tensor, Tensor, Tensor]:
        """Features of images and genes (n, D) and spot ids (n,) of the n rows filled so far, copied: the ring may be
        written before the backward pass reads them."""
        n = self.n_filled
        return self.image[:n].clone(), self.gene[:n].clone(), self.spot[:n].clone()

    @torch.no_grad()
    def push(self, image: Tensor, gene: Tensor, spot: Tensor) -> None:
        """Write a batch (B, D), (B, D), (B,) over the oldest rows; a batch above the capacity keeps its last rows."""
        if self.capacity == 0:
            return
        image, gene, spot = (x[-self.capacity :].to(self.image.device) for x in (image, gene, spot))
        n, filled, first = len(spot), int(self.state[0]), int(self.state[1])
        rows = (first + torch.arange(n, device=spot.device)) % self.capacity
        self.image[rows], self.gene[rows], self.spot[rows] = image.float(), gene.float(), spot
        self.state[0] = min(filled + n, self.capacity)
        self.state[1] = (first + n) % self.capacity
