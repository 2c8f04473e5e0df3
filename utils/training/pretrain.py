"""Pretraining of the gene encoder by masked-bin prediction, on all counts at hand, before stage one begins.

The model is `model.masked_bins.MaskedBins` over the gene encoder; it is judged on validation spots by its cross entropy
beside that of the genes' own distributions in the same slice. Letters: S spots, G input genes, V bins, B batch.
"""

from __future__ import annotations

import time
from argparse import Namespace
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from tqdm import tqdm

from utils.features import dataset
from utils.genes.panels import HIGHEST_BIN
from utils.training import loop
from utils.training.count_tables import CountTable

if TYPE_CHECKING:
    import torch

SHARE = 0.15  # of the measured genes of a spot are predicted in a step (scBERT)
ROUNDS = 7  # about 1 / SHARE: each place of a held-out spot is hidden in one of them
ROUNDS_IN_TRAINING = 2  # of them suffice to choose an epoch
HELD_OUT_SPOTS = 2_000  # of the validation part, drawn by the seed, are scored
SMOOTHING = 0.2  # added to each bin's number of spots; near the best for the marginal that is to be beaten, 1 is worse


@dataclass(frozen=True)
class Spots:
    """Some spots of one slice or table."""

    name: str
    bins: np.ndarray  # (S, G) uint8
    rows: np.ndarray  # of them, those that are meant
    measured: np.ndarray  # (G,) bool


def spots_of(slices: list[dataset.SliceData], bins: Sequence[np.ndarray], part: str) -> list[Spots]:
    """The spots of a part, of each slice that has any; `bins` (S, G) of each slice."""
    pairs = zip(slices, bins, strict=True)
    found = [Spots(one.name, own, one.rows_of(part), one.panels["input"].measured) for one, own in pairs]
    return [one for one in found if len(one.rows)]


def numbers_of_bins(bins: np.ndarray) -> np.ndarray:
    """How many spots have each bin: (S, G) -> (G, V)."""
    return np.stack([(bins == value).sum(0) for value in range(HIGHEST_BIN + 1)], axis=1)


def log_marginal(numbers: np.ndarray) -> np.ndarray:
    """Log of the smoothed share of each bin: (..., V) whole numbers -> (..., V) float32."""
    smoothed = numbers + SMOOTHING
    return np.log(smoothed / smoothed.sum(-1, keepdims=True)).astype(np.float32)


def marginal_without_self(bins: np.ndarray, numbers: np.ndarray) -> np.ndarray:
    """Log marginal that each of some spots meets in its slice, its own count taken out: (B, G), (G, V) -> (B, G, V)."""
    own = bins[..., None] == np.arange(HIGHEST_BIN + 1)
    return log_marginal(numbers - own)


def pretrain(
    masked: Any,
    slices: list[dataset.SliceData],
    bins: Sequence[np.ndarray],
    tables: list[CountTable],
    accelerator: Any,
    args: Any,
) -> list[dict[str, float]]:
    """Teach the trunk of `masked.encoder` on train spots and tables, and leave it as after the best epoch.

    Parameters
    ----------
    masked : MaskedBins over the encoder, on the accelerator's device; its head is of no use afterwards
    slices, bins : of the train and validation part, bins (S, G) of each
    tables : slices without images
    args : pretrain_epochs, pretrain_lr, batch_size, seed, precision, and what the optimiser of stage one takes

    Returns
    -------
    a row of figures per epoch, as `score` gives them, the first (epoch -1) from before
    """
    import torch

    taught = spots_of(slices, bins, "train")
    taught += [Spots(one.name, one.bins, np.arange(len(one.bins)), one.measured) for one in tables]
    held_out = spots_of(slices, bins, "val")
    numbers = sum(numbers_of_bins(one.bins[one.rows]) * one.measured[:, None] for one in taught)
    masked.initialise(torch.from_numpy(log_marginal(numbers)))
    n_spots = sum(len(one.rows) for one in taught)
    settings = Namespace(**vars(args) | {"Init_lr": args.pretrain_lr, "Min_lr": args.pretrain_lr * 0.01})
    optimizer = loop.make_optimizer(masked.trained_parameters(), settings)
    schedule = loop.schedule(optimizer, n_spots // args.batch_size * args.pretrain_epochs, settings)
    log = [{"epoch": -1, **score(masked, held_out, ROUNDS_IN_TRAINING, accelerator, args)}]
    print(report(log[0]), flush=True)
    best, kept = log[0]["model"], copy_of(masked)
    for epoch in range(args.pretrain_epochs):
        began = time.monotonic()
        loss = train_one_epoch(masked, taught, optimizer, schedule, accelerator, epoch, args)
        row = {"epoch": epoch, "loss": loss, **score(masked, held_out, ROUNDS_IN_TRAINING, accelerator, args)}
        log.append(row | {"seconds": time.monotonic() - began})
        print(report(log[-1]), flush=True)
        if row["model"] < best:
            best, kept = row["model"], copy_of(masked)
    masked.load_state_dict(kept)
    chosen = min(log, key=lambda row: row["model"])
    print(f"gene encoder pretrained on {n_spots} spots; of the epochs the best: {report(chosen)}", flush=True)
    return log


def precision_of(accelerator: Any, args: Any) -> AbstractContextManager[None]:
    """That of stage one, but fp32 in place of fp16, whose gradients would have to be scaled."""
    return nullcontext() if args.precision == "fp16" else accelerator.autocast()


def copy_of(module: Any) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in module.state_dict().items()}


def report(row: dict[str, float]) -> str:
    when = "before pretraining" if row["epoch"] < 0 else f"pretraining epoch {row['epoch']:.0f}"
    taught = f"loss {row['loss']:.4f}, " if "loss" in row else ""
    return (
        f"{when}: {taught}held-out cross entropy {row['model']:.4f} (marginal {row['marginal']:.4f}), "
        f"among expressed {row['model_expressed']:.4f} (marginal {row['marginal_expressed']:.4f})"
    )


def batch_of(taught: list[Spots], chosen: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Spots by their number over all of `taught`: bins (B, G) uint8, measured (B, G) bool."""
    ends = np.cumsum([len(one.rows) for one in taught])
    source = np.searchsorted(ends, chosen, side="right")
    bins = np.empty((len(chosen), taught[0].bins.shape[1]), np.uint8)
    for i in np.unique(source):
        here, first = source == i, ends[i] - len(taught[i].rows)
        bins[here] = taught[i].bins[taught[i].rows[chosen[here] - first]]
    return bins, np.stack([one.measured for one in taught])[source]


def train_one_epoch(
    masked: Any, taught: list[Spots], optimizer: Any, schedule: Any, accelerator: Any, epoch: int, args: Any
) -> float:
    """Mean loss of the epoch's steps; order and masks are drawn by (seed, epoch), an incomplete last batch is dropped.
    Of several processes each does the same work, so that all begin stage one with the same weights."""
    import torch

    masked.train()
    rng = np.random.default_rng((args.seed, epoch))
    order = rng.permutation(sum(len(one.rows) for one in taught))
    batches = order[: len(order) // args.batch_size * args.batch_size].reshape(-1, args.batch_size)
    draws = torch.Generator(accelerator.device).manual_seed(int(rng.integers(2**62)))
    total = 0.0
    with tqdm(batches, desc=f"pretraining {epoch}", unit="step", disable=None) as bar:
        for step, chosen in enumerate(bar):
            bins, measured = (torch.from_numpy(x).to(accelerator.device) for x in batch_of(taught, chosen))
            with precision_of(accelerator, args):
                loss = masked.loss(bins, measured, SHARE, draws)
            loop.stop_if_not_finite(loss.item(), epoch, step)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            schedule.step()
            total += loss.item()
    return total / len(batches)


def score(masked: Any, held_out: list[Spots], rounds: int, accelerator: Any, args: Any) -> dict[str, float]:
    """Mean cross entropy in nats at hidden places of held-out spots, a mean over slices: of the model and, of the same
    places, of each gene's marginal over the other held-out spots of the slice; `_expressed` of places above bin 0, both
    given that they are above 0."""
    masked.eval()
    share = min(1.0, HELD_OUT_SPOTS / sum(len(one.rows) for one in held_out))
    found = []
    for i, one in enumerate(held_out):
        rng = np.random.default_rng((args.seed, i))
        rows = np.sort(rng.choice(one.rows, int(np.ceil(share * len(one.rows))), replace=False))
        found.append(score_slice(masked, one, rows, rounds, rng, accelerator, args))
    return {name: float(np.mean([row[name] for row in found])) for name in found[0]}


def score_slice(
    masked: Any, one: Spots, rows: np.ndarray, rounds: int, rng: np.random.Generator, accelerator: Any, args: Any
) -> dict[str, float]:
    """The figures of `score` for some spots of a slice: in each round about a seventh of their places is hidden."""
    bins, numbers = one.bins[rows], numbers_of_bins(one.bins[one.rows])
    turn = rng.permuted(np.tile(np.arange(bins.shape[1]) % ROUNDS, (len(rows), 1)), axis=1)
    sums, n_all, n_expressed = np.zeros((2, 2)), 0, 0
    for first in range(0, len(rows), args.batch_size):
        some = slice(first, first + args.batch_size)
        own = bins[some]
        marginal = marginal_without_self(own, numbers)
        for number in range(rounds):
            places = (turn[some] == number) & one.measured
            found = own[places].astype(np.int64)
            for which, log_p in enumerate((predict(masked, own, places, accelerator, args), marginal)):
                sums[which] += cross_entropies(log_p[places].astype(np.float64), found)
            n_all, n_expressed = n_all + len(found), n_expressed + int((found > 0).sum())
    means = sums / np.maximum([n_all, n_expressed], 1)
    return {
        "model": means[0, 0],
        "marginal": means[1, 0],
        "model_expressed": means[0, 1],
        "marginal_expressed": means[1, 1],
    }


def predict(masked: Any, bins: np.ndarray, places: np.ndarray, accelerator: Any, args: Any) -> np.ndarray:
    """Log probabilities (B, G, V) of bins (B, G), those of `places` hidden."""
    import torch

    with torch.no_grad(), precision_of(accelerator, args):
        inputs = (torch.from_numpy(x).to(accelerator.device) for x in (bins, places))
        return masked.log_probabilities(*inputs).float().cpu().numpy()


def cross_entropies(log_p: np.ndarray, found: np.ndarray) -> tuple[float, float]:
    """Sums over n places: of -log p(bin), and over those above bin 0 of -log p(bin | above 0); (n, V), (n,)."""
    own = np.take_along_axis(log_p, found[:, None], axis=1)[:, 0]
    expressed = found > 0
    above_zero = np.log(-np.expm1(log_p[expressed, 0]))
    return -own.sum(), -(own[expressed] - above_zero).sum()
