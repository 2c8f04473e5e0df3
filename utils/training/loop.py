"""Parts of a training loop: seeds, learning rate, the log of a run, the stop on a loss that is not finite."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from utils import distributed
from utils.files.atomic import plain

if TYPE_CHECKING:
    import torch


def rate_at(step: int, n_steps: int, kind: str, lowest: float) -> float:
    """Learning rate at a step as a share of the highest: 3 % linear warm-up, then cosine or ten stairs to `lowest`."""
    warm_up = max(round(0.03 * n_steps), 1)
    if step < warm_up:
        return (step + 1) / warm_up
    done = min((step - warm_up) / max(n_steps - warm_up, 1), 1.0)
    if kind == "step":
        return float(max(lowest, 1e-12) ** (min(int(done * 10), 9) / 9))
    return lowest + (1 - lowest) * (1 + math.cos(math.pi * done)) / 2


def schedule(optimizer: torch.optim.Optimizer, n_steps: int, args: Any) -> torch.optim.lr_scheduler.LambdaLR:
    from torch.optim.lr_scheduler import LambdaLR

    lowest = args.Min_lr / args.Init_lr
    return LambdaLR(optimizer, lambda step: rate_at(step, n_steps, args.lr_decay_type, lowest))


def make_optimizer(
    parameters: Any, args: Any, shares: Mapping[torch.nn.Parameter, float] | None = None
) -> torch.optim.AdamW:
    """AdamW; norms, biases, temperatures and other vectors are not decayed.

    `shares` of the rate, at most 1, for parameters that learn more slowly; the groups at the whole rate come first.
    """
    import torch

    trained = [p for p in parameters if p.requires_grad]
    share_of = [(shares or {}).get(p, 1.0) for p in trained]
    groups = []
    for share in sorted({1.0, *share_of}, reverse=True):
        same = [p for p, own in zip(trained, share_of, strict=True) if own == share]
        rate = args.Init_lr * share
        groups += [
            {"params": [p for p in same if p.ndim > 1], "weight_decay": args.weight_decay, "lr": rate},
            {"params": [p for p in same if p.ndim <= 1], "weight_decay": 0.0, "lr": rate},
        ]
    return torch.optim.AdamW(groups, lr=args.Init_lr, betas=(args.momentum, 0.999))


def stop_if_not_finite(loss: float, epoch: int, step: int) -> None:
    if not math.isfinite(loss):
        raise ValueError(
            f"the loss is {loss} at epoch {epoch}, step {step}: stopped, the last epoch's weights are kept; "
            "try a lower --Init_lr or --precision fp32"
        )


class RunLog:
    """logs/<stage>/<time>/: settings.json, log.jsonl, and TensorBoard events where tensorboard is installed; of several
    processes the first one writes."""

    def __init__(self, folder: Path, stage: str, settings: dict[str, Any]):
        self.rows: list[dict[str, Any]] = []
        self.events: Any = None
        self.folder = folder / stage / time.strftime("%Y-%m-%d_%H-%M-%S")
        if not distributed.is_main():
            return
        n = 1
        while self.folder.exists():
            n += 1
            self.folder = self.folder.with_name(f"{self.folder.name.split('.')[0]}.{n}")
        self.folder.mkdir(parents=True)
        (self.folder / "settings.json").write_text(json.dumps(plain(settings), indent=1) + "\n")
        self.events = self._tensorboard()

    def _tensorboard(self) -> Any:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            return None
        return SummaryWriter(str(self.folder))

    def add(self, row: dict[str, Any]) -> None:
        """One epoch: a line of JSON, and scalars by name."""
        self.rows.append(row)
        if not distributed.is_main():
            return
        with (self.folder / "log.jsonl").open("a") as file:
            file.write(json.dumps(row) + "\n")
        if self.events is not None:
            for name, value in row.items():
                if isinstance(value, (int, float)) and name != "epoch":
                    self.events.add_scalar(name, value, row["epoch"])
            self.events.flush()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        if self.events is not None:
            self.events.close()


class EpochOrder:
    """Whole batches in an order drawn from (seed, epoch), an incomplete last one is dropped; of each the part of this
    process. `accumulate` batches make a step, or all where an epoch has fewer; batches that make no whole step are
    dropped. `first` is the batch to begin at."""

    def __init__(self, n_spots: int, batch_size: int, seed: int, accumulate: int = 1):
        self.n_spots, self.batch_size, self.seed = n_spots, batch_size, seed
        self.n_batches, self.epoch, self.first = n_spots // batch_size, 0, 0
        self.accumulate = max(min(accumulate, self.n_batches), 1)

    def __len__(self) -> int:
        return self.n_batches // self.accumulate * self.accumulate

    def __iter__(self) -> Iterator[list[int]]:
        order = np.random.default_rng((self.seed, self.epoch)).permutation(self.n_spots)
        own = self.batch_size // distributed.n_processes()
        for i in range(self.first, len(self)):
            start = i * self.batch_size + distributed.rank() * own
            yield order[start : start + own].tolist()
