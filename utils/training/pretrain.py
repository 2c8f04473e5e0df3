"""Pretraining of the gene encoder by masked-bin prediction, on all counts at hand, before stage one begins.

The model is `model.masked_bins.MaskedBins` over the gene encoder. Its cross entropy on validation spots is reported
beside that of the genes' own distributions in the same slice. Letters: S spots, G input genes, V bins, B batch.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from tqdm import tqdm

from utils import distributed
from utils.features import dataset
from utils.genes.panels import HIGHEST_BIN
from utils.settings import OptimizerSettings, StageOneSettings
from utils.training import loop
from utils.training.count_tables import CountTable

if TYPE_CHECKING:
    from accelerate import Accelerator

    from model.masked_bins import MaskedBins

FRACTION = 0.15  # of the measured genes of a spot are predicted in a step (scBERT)
ROUNDS = 7  # about 1 / FRACTION: each place of a held-out spot is masked in one of them
ROUNDS_IN_TRAINING = 2  # of them suffice to choose an epoch
HELD_OUT_SPOTS = 2_000  # of the validation part, drawn by the seed, are scored
SMOOTHING = 0.2  # added to each bin's number of spots; near the best for the marginal, 1 is worse


@dataclass(frozen=True)
class Spots:
    """Some spots of one slice or table."""

    name: str
    bins: np.ndarray  # (S, G) uint8
    rows: np.ndarray  # (n,) the spots among those of `bins`
    measured: np.ndarray  # (G,) bool


def spots_of(slices: list[dataset.SliceData], bins: Sequence[np.ndarray], part: str) -> list[Spots]:
    """The spots of a part, of each slice that has any; `bins` (S, G) of each slice."""
    pairs = zip(slices, bins, strict=True)
    spots = [Spots(s.name, bins_, s.rows_of(part), s.panels["input"].measured) for s, bins_ in pairs]
    return [those for those in spots if len(those.rows)]


def numbers_of_bins(bins: np.ndarray) -> np.ndarray:
    """How many spots have each bin: (S, G) -> (G, V)."""
    return np.stack([(bins == value).sum(0) for value in range(HIGHEST_BIN + 1)], axis=1)


def log_marginal(numbers: np.ndarray) -> np.ndarray:
    """Log of the smoothed fraction of each bin: (..., V) whole numbers -> (..., V) float32."""
    smoothed = numbers + SMOOTHING
    return np.log(smoothed / smoothed.sum(-1, keepdims=True)).astype(np.float32)


def marginal_without_self(bins: np.ndarray, numbers: np.ndarray) -> np.ndarray:
    """Log marginal of the other spots of the slice, for each of some spots: (B, G), (G, V) -> (B, G, V)."""
    itself = bins[..., None] == np.arange(HIGHEST_BIN + 1)
    return log_marginal(numbers - itself)


def pretrain(
    masked: MaskedBins,
    slices: list[dataset.SliceData],
    bins: Sequence[np.ndarray],
    tables: list[CountTable],
    accelerator: Accelerator,
    settings: StageOneSettings,
) -> list[dict[str, float]]:
    """Pretrain the trunk of `masked.encoder` on train spots and tables; it ends with the weights of the best epoch.

    Parameters
    ----------
    masked : over the encoder, on the accelerator's device; its head is of no use afterwards
    slices, bins : of the train and validation part, bins (S, G) of each
    tables : slices without images

    Returns
    -------
    a row of figures per epoch, as `score` gives them, the first (epoch -1) from before
    """
    train = spots_of(slices, bins, "train")
    train += [Spots(table.name, table.bins, np.arange(len(table.bins)), table.measured) for table in tables]
    held_out = spots_of(slices, bins, "val")
    numbers = sum(numbers_of_bins(spots.bins[spots.rows]) * spots.measured[:, None] for spots in train)
    masked.initialise(torch.from_numpy(log_marginal(numbers)))
    n_spots, rates = sum(len(spots.rows) for spots in train), rates_of(settings)
    optimizer = loop.make_optimizer(masked.trained_parameters(), rates)
    schedule = loop.schedule(optimizer, n_spots // settings.batch_size * settings.pretrain_epochs, rates)
    log = [{"epoch": -1, **score(masked, held_out, ROUNDS_IN_TRAINING, accelerator, settings)}]
    print(report(log[0]), flush=True)
    best, weights = log[0]["model"], copy_of(masked)
    for epoch in range(settings.pretrain_epochs):
        began = time.monotonic()
        loss = train_one_epoch(masked, train, optimizer, schedule, accelerator, epoch, settings)
        row = {"epoch": epoch, "loss": loss, **score(masked, held_out, ROUNDS_IN_TRAINING, accelerator, settings)}
        log.append(row | {"seconds": time.monotonic() - began})
        print(report(log[-1]), flush=True)
        if row["model"] < best:
            best, weights = row["model"], copy_of(masked)
    masked.load_state_dict(weights)
    chosen = min(log, key=lambda row: row["model"])
    print(f"gene encoder pretrained on {n_spots} spots; of the epochs the best: {report(chosen)}", flush=True)
    return log


def rates_of(settings: StageOneSettings) -> OptimizerSettings:
    """Those of stage one, but for the learning rate."""
    return OptimizerSettings(
        Init_lr=settings.pretrain_lr,
        Min_lr=settings.pretrain_lr * 0.01,
        momentum=settings.momentum,
        weight_decay=settings.weight_decay,
        lr_decay_type=settings.lr_decay_type,
    )


def autocast(accelerator: Accelerator, settings: StageOneSettings) -> AbstractContextManager[None]:
    """The precision of stage one, but fp32 in place of fp16, whose gradients would have to be scaled."""
    return nullcontext() if settings.precision == "fp16" else accelerator.autocast()


def copy_of(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in module.state_dict().items()}


def report(row: dict[str, float]) -> str:
    when = "before pretraining" if row["epoch"] < 0 else f"pretraining epoch {row['epoch']:.0f}"
    loss = f"loss {row['loss']:.4f}, " if "loss" in row else ""
    return (
        f"{when}: {loss}held-out cross entropy {row['model']:.4f} (marginal {row['marginal']:.4f}), "
        f"among expressed {row['model_expressed']:.4f} (marginal {row['marginal_expressed']:.4f})"
    )


def batch_of(train: list[Spots], chosen: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Spots by their number over all of `train`: bins (B, G) uint8, measured (B, G) bool."""
    ends = np.cumsum([len(spots.rows) for spots in train])
    source = np.searchsorted(ends, chosen, side="right")
    bins = np.empty((len(chosen), train[0].bins.shape[1]), np.uint8)
    for i in np.unique(source):
        here, first = source == i, ends[i] - len(train[i].rows)
        bins[here] = train[i].bins[train[i].rows[chosen[here] - first]]
    return bins, np.stack([spots.measured for spots in train])[source]


def train_one_epoch(
    masked: MaskedBins,
    train: list[Spots],
    optimizer: torch.optim.Optimizer,
    schedule: torch.optim.lr_scheduler.LRScheduler,
    accelerator: Accelerator,
    epoch: int,
    settings: StageOneSettings,
) -> float:
    """Mean loss of the epoch's steps; order and masks are drawn by (seed, epoch), an incomplete last batch is dropped.
    Of several processes each does the same work, so that all begin stage one with the same weights."""
    masked.train()
    rng, size = np.random.default_rng((settings.seed, epoch)), settings.batch_size
    order = rng.permutation(sum(len(spots.rows) for spots in train))
    batches = order[: len(order) // size * size].reshape(-1, size)
    draws = torch.Generator(accelerator.device).manual_seed(int(rng.integers(2**62)))
    figures = loop.StepFigures(epoch, {}, accelerator.device)
    with tqdm(batches, desc=f"pretraining {epoch}", unit="step", disable=None) as bar:
        for step, chosen in enumerate(bar):
            rows = map(torch.from_numpy, batch_of(train, chosen))
            bins, measured = (distributed.to_device(x, accelerator.device) for x in rows)
            with autocast(accelerator, settings):
                loss = masked.loss(bins, measured, FRACTION, draws)
            figures.add(step, {"loss": loss})
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            schedule.step()
    return figures.read().get("loss", 0.0) / len(batches)


def score(
    masked: MaskedBins, held_out: list[Spots], rounds: int, accelerator: Accelerator, settings: StageOneSettings
) -> dict[str, float]:
    """Mean cross entropy in nats at masked places of held-out spots, a mean over slices.

    Returns that of the model and, at the same places, of each gene's marginal over the other held-out spots of the
    slice; `_expressed` at places above bin 0, both given that they are above 0.
    """
    masked.eval()
    fraction = min(1.0, HELD_OUT_SPOTS / sum(len(spots.rows) for spots in held_out))
    figures = []
    for i, spots in enumerate(held_out):
        rng = np.random.default_rng((settings.seed, i))
        rows = dataset.draw(spots.rows, fraction, rng)
        figures.append(score_slice(masked, spots, rows, rounds, rng, accelerator, settings))
    return {name: float(np.mean([row[name] for row in figures])) for name in figures[0]}


def score_slice(
    masked: MaskedBins,
    spots: Spots,
    rows: np.ndarray,
    rounds: int,
    rng: np.random.Generator,
    accelerator: Accelerator,
    settings: StageOneSettings,
) -> dict[str, float]:
    """The figures of `score` for some rows of a slice: in each round about a seventh of their places is masked."""
    bins, numbers = spots.bins[rows], numbers_of_bins(spots.bins[spots.rows])
    round_of = rng.permuted(np.tile(np.arange(bins.shape[1]) % ROUNDS, (len(rows), 1)), axis=1)
    sums, n_all, n_expressed = np.zeros((2, 2)), 0, 0
    for first in range(0, len(rows), settings.batch_size):
        batch = slice(first, first + settings.batch_size)
        marginal = marginal_without_self(bins[batch], numbers)
        for number in range(rounds):
            places = (round_of[batch] == number) & spots.measured
            true = bins[batch][places].astype(np.int64)
            predicted = predict(masked, bins[batch], places, accelerator, settings)
            for which, log_p in enumerate((predicted, marginal)):
                sums[which] += cross_entropies(log_p[places].astype(np.float64), true)
            n_all, n_expressed = n_all + len(true), n_expressed + int((true > 0).sum())
    means = sums / np.maximum([n_all, n_expressed], 1)
    return {
        "model": means[0, 0],
        "marginal": means[1, 0],
        "model_expressed": means[0, 1],
        "marginal_expressed": means[1, 1],
    }


def predict(
    masked: MaskedBins, bins: np.ndarray, places: np.ndarray, accelerator: Accelerator, settings: StageOneSettings
) -> np.ndarray:
    """Log probabilities (B, G, V) of bins (B, G), those of `places` masked."""
    with torch.no_grad(), autocast(accelerator, settings):
        inputs = (torch.from_numpy(x).to(accelerator.device) for x in (bins, places))
        return masked.log_probabilities(*inputs).float().cpu().numpy()


def cross_entropies(log_p: np.ndarray, true: np.ndarray) -> tuple[float, float]:
    """Sums over n places: of -log p(bin), and over those above bin 0 of -log p(bin | above 0); (n, V), (n,)."""
    of_true = np.take_along_axis(log_p, true[:, None], axis=1)[:, 0]
    expressed = true > 0
    above_zero = np.log(-np.expm1(log_p[expressed, 0]))
    return -of_true.sum(), -(of_true[expressed] - above_zero).sum()
