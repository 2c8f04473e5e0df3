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

READ_EVERY = {"cpu": 1, "cuda": 20}  # steps; a loss that is not finite is found so many later, at most


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
    fused = True if all(p.device.type == "cuda" for p in trained) else None  # one kernel for all parameters
    return torch.optim.AdamW(groups, lr=rates.Init_lr, betas=(rates.momentum, 0.999), fused=fused)


class StepFigures:
    """Figures of an epoch's steps, added up on the host in double precision.

    They stay on the device until READ_EVERY steps are done, or `read` is called; all are then copied at once, and
    checked. On a CPU that is after every step, on a GPU less often: each time the host waits for the device.

    Parameters
    ----------
    epoch : for the error of a loss that is not finite
    sums : of the steps that were done before
    device : that the figures lie on
    """

    def __init__(self, epoch: int, sums: Mapping[str, float], device: torch.device):
        self.epoch, self.sums = epoch, dict(sums)
        self.every = READ_EVERY.get(device.type, 1)
        self.last: dict[str, float] = {}  # figures of the last step that was read
        self.waiting: list[tuple[int, dict[str, torch.Tensor], dict[str, float]]] = []

    def add(self, step: int, on_device: dict[str, torch.Tensor], known: dict[str, float] | None = None) -> None:
        """Figures of a step, `loss` first, scalars on the device, and others that the host knows. Raises ValueError
        where they are read, and the loss of a step was not finite."""
        self.waiting.append((step, {name: value.detach() for name, value in on_device.items()}, known or {}))
        if (step + 1) % self.every == 0:
            self.read()

    def read(self) -> dict[str, float]:
        """The sums of all steps so far."""
        import torch

        waiting, self.waiting = self.waiting, []
        if waiting:
            values = (
                torch.stack([value.float() for _, figures, _ in waiting for value in figures.values()]).cpu().tolist()
            )
        for step, figures, known in waiting:
            found, values = dict(zip(figures, values, strict=False)), values[len(figures) :]
            stop_if_not_finite(found["loss"], self.epoch, step)
            self.last = found | known
            self.sums = {name: self.sums.get(name, 0.0) + value for name, value in self.last.items()}
        return self.sums


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
