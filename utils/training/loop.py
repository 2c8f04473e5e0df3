"""Parts of a training loop: order of the spots, optimiser and learning rate, the stop on a loss that is not finite."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING

import numpy as np

from utils import distributed
from utils.settings import OptimizerSettings

if TYPE_CHECKING:
    import torch


def rate_at(step: int, n_steps: int, kind: str, lowest: float) -> float:
    """Learning rate at a step as a fraction of the highest: 3 % linear warm-up, then a decay to `lowest`.

    Parameters
    ----------
    kind : "cos", cosine, or "step", ten steps
    """
    warm_up = max(round(0.03 * n_steps), 1)
    if step < warm_up:
        return (step + 1) / warm_up
    done = min((step - warm_up) / max(n_steps - warm_up, 1), 1.0)
    if kind == "step":
        return float(max(lowest, 1e-12) ** (min(int(done * 10), 9) / 9))
    return lowest + (1 - lowest) * (1 + math.cos(math.pi * done)) / 2


def schedule(
    optimizer: torch.optim.Optimizer, n_steps: int, rates: OptimizerSettings
) -> torch.optim.lr_scheduler.LambdaLR:
    """Learning rate from Init_lr to Min_lr over so many steps."""
    from torch.optim.lr_scheduler import LambdaLR

    lowest, kind = rates.Min_lr / rates.Init_lr, rates.lr_decay_type
    return LambdaLR(optimizer, lambda step: rate_at(step, n_steps, kind, lowest))


def make_optimizer(
    parameters: Iterable[torch.nn.Parameter],
    rates: OptimizerSettings,
    fractions: Mapping[torch.nn.Parameter, float] | None = None,
) -> torch.optim.AdamW:
    """AdamW; norms, biases, temperatures and other vectors are not decayed.

    Parameters
    ----------
    fractions : of the learning rate, at most 1, for parameters that learn more slowly; the groups at the whole rate
        come first
    """
    import torch

    trained = [p for p in parameters if p.requires_grad]
    of_each = [(fractions or {}).get(p, 1.0) for p in trained]
    groups = []
    for fraction in sorted({1.0, *of_each}, reverse=True):
        same = [p for p, its_fraction in zip(trained, of_each, strict=True) if its_fraction == fraction]
        rate = rates.Init_lr * fraction
        groups += [
            {"params": [p for p in same if p.ndim > 1], "weight_decay": rates.weight_decay, "lr": rate},
            {"params": [p for p in same if p.ndim <= 1], "weight_decay": 0.0, "lr": rate},
        ]
    return torch.optim.AdamW(groups, lr=rates.Init_lr, betas=(rates.momentum, 0.999))


def stop_if_not_finite(loss: float, epoch: int, step: int) -> None:
    if not math.isfinite(loss):
        raise ValueError(
            f"training: expected a finite loss, found {loss} at epoch {epoch}, step {step}; try a lower --Init_lr or "
            "--precision fp32 (the last epoch's weights are kept)"
        )


class EpochOrder:
    """Batches of an epoch in an order drawn from (seed, epoch); of each batch the part of this process.

    An incomplete last batch is dropped. `accumulate` batches make a step, or all where an epoch has fewer; batches that
    make no whole step are dropped. `first` is the batch to begin at.

    Parameters
    ----------
    near : (n_spots, k), the nearest spots of each; half of every batch are then spots in the order of the epoch, each
        followed by one of its nearest, drawn. None: all are in that order
    """

    def __init__(self, n_spots: int, batch_size: int, seed: int, accumulate: int = 1, near: np.ndarray | None = None):
        self.n_spots, self.batch_size, self.seed = n_spots, batch_size, seed
        self.n_batches, self.epoch, self.first = n_spots // batch_size, 0, 0
        self.accumulate = max(min(accumulate, self.n_batches), 1)
        self.near = near

    def __len__(self) -> int:
        return self.n_batches // self.accumulate * self.accumulate

    def __iter__(self) -> Iterator[list[int]]:
        rng = np.random.default_rng((self.seed, self.epoch))
        order = rng.permutation(self.n_spots)
        if self.near is not None:
            neighbour = self.near[order, rng.integers(self.near.shape[1], size=self.n_spots)]
            order = np.column_stack([order, neighbour]).ravel()
        n_own = self.batch_size // distributed.n_processes()
        for i in range(self.first, len(self)):
            start = i * self.batch_size + distributed.rank() * n_own
            yield order[start : start + n_own].tolist()
