"""ST-Net (He et al. 2020, Nat. Biomed. Eng. 4:827): a pretrained trunk and a linear head, tuned on expression.

Here with what the other rows have: the same trunk, tiles, augmentation, optimiser, epochs and targets.
Letters: B batch, S spots, G genes, Z tile side in pixels.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import Tensor, nn

from model import losses
from model.image_encoder import ImageEncoder
from utils import distributed
from utils.evaluation.ridge import validation_pcc
from utils.features import cache, dataset
from utils.training import loop
from utils.training.augment import augment


class StNet(nn.Module):
    """Tiles (B, 3, Z, Z) in 0..1 -> standardised genes (B, G)."""

    def __init__(self, encoder: ImageEncoder, n_genes: int):
        super().__init__()
        self.encoder = encoder
        self.head = nn.Linear(encoder.to_vector.in_features, n_genes)
        nn.init.zeros_(self.head.weight)  # a random one drives a pretrained trunk apart in the first steps
        nn.init.zeros_(self.head.bias)

    def forward(self, tiles: Tensor) -> Tensor:
        return self.head(self.encoder.features(tiles)[0])


def train_one_epoch(
    model: StNet, loader: Any, optimizer: Any, schedule: Any, accelerator: Any, epoch: int, args: Any
) -> None:
    model.train()
    distributed.seed_everything(args.seed, epoch)
    loader.order.epoch = epoch
    for step, batch in enumerate(loader):
        tiles = augment(batch["tiles"].to(accelerator.device), batch["spot"].numpy(), args.seed, epoch, args.image_size)
        with accelerator.autocast():
            predicted = model(tiles)
        loss = losses.expression_loss(predicted, batch["target"].to(accelerator.device))
        loop.stop_if_not_finite(loss.item(), epoch, step)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        schedule.step()


def predict(model: StNet, slices: list[dataset.SliceData], accelerator: Any, args: Any) -> list[np.ndarray]:
    """Standardised genes (S, G) of all spots of each slice."""

    def encode(tiles: Tensor) -> Tensor:
        with accelerator.autocast():
            return model(tiles)

    model.eval()
    how = cache.TileEncoder(encode, args.image_size, accelerator.device, args.batch_size, args.workers)
    return [np.concatenate(list(cache.encode_slice(how, one))) for one in slices]


def fit_predict(
    encoder: ImageEncoder,
    slices: list[dataset.SliceData],
    targets: list[np.ndarray],
    wanted: list[dataset.SliceData],
    accelerator: Any,
    args: Any,
) -> list[np.ndarray]:
    """Tune the encoder and a head on the train spots; the epoch with the best validation PCC predicts.

    Parameters
    ----------
    encoder : pretrained; it is changed
    slices : that hold the train and validation spots
    targets : per slice (S, G), NaN where a gene was not measured
    wanted : slices to predict
    args : flags of stage one: epochs, rates, batch, seed, image size

    Returns
    -------
    (S, G) of all spots of each slice of `wanted`, in the units of the targets.
    """
    distributed.seed_everything(args.seed)
    taught = np.concatenate([target[one.rows_of("train")] for one, target in zip(slices, targets, strict=True)])
    mean, sd = np.nanmean(taught, axis=0), np.maximum(np.nanstd(taught, axis=0), 1e-6)
    model = StNet(encoder, len(mean)).to(accelerator.device)
    spots = dataset.spots_of(slices, "train")
    order = loop.EpochOrder(len(spots), args.batch_size, args.seed)
    standardised = ((taught - mean) / sd).astype(np.float32)
    loader = dataset.loader(dataset.TileBatches(slices, spots, {"target": standardised}), order, args.workers)
    optimizer = loop.make_optimizer(model.parameters(), args)
    schedule = loop.schedule(optimizer, len(order) * args.Epoch, args)
    held_out = [i for i, one in enumerate(slices) if len(one.rows_of("val"))]
    truth = [targets[i][slices[i].rows_of("val")] for i in held_out]
    best, kept = -np.inf, model.state_dict()
    for epoch in range(args.Epoch):
        train_one_epoch(model, loader, optimizer, schedule, accelerator, epoch, args)
        found = predict(model, [slices[i] for i in held_out], accelerator, args)
        pcc = validation_pcc([p[slices[i].rows_of("val")] for i, p in zip(held_out, found, strict=True)], truth)
        if pcc > best:
            best, kept = pcc, {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.load_state_dict(kept)
    return [found * sd + mean for found in predict(model, wanted, accelerator, args)]
