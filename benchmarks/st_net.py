"""ST-Net (He et al. 2020, Nat. Biomed. Eng. 4:827): a pretrained trunk and a linear head, fine-tuned on expression.

Trunk, tiles, augmentation, optimiser, epochs and targets are those of the other methods of accuracy.py.
Letters: B batch, S spots, G genes, Z tile side in pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from model import losses
from model.image_encoder import ImageEncoder
from utils import distributed
from utils.evaluation.ridge import validation_pcc
from utils.features import cache, dataset
from utils.training import loop
from utils.training.augment import augment

if TYPE_CHECKING:
    from accelerate import Accelerator

    from utils.settings import StageOneSettings as Settings


class StNet(nn.Module):
    """Tiles (B, 3, Z, Z) in 0..1 -> standardised genes (B, G)."""

    def __init__(self, encoder: ImageEncoder, n_genes: int):
        super().__init__()
        self.encoder = encoder
        self.head = nn.Linear(encoder.to_vector.in_features, n_genes)
        nn.init.zeros_(self.head.weight)  # a random head disturbs a pretrained trunk in the first steps
        nn.init.zeros_(self.head.bias)

    def forward(self, tiles: Tensor) -> Tensor:
        return self.head(self.encoder.features(tiles)[0])


def train_one_epoch(
    model: StNet,
    loader: dataset.Loader,
    optimizer: Optimizer,
    schedule: LRScheduler,
    accelerator: Accelerator,
    epoch: int,
    settings: Settings,
) -> None:
    model.train()
    distributed.seed_everything(settings.seed, epoch)
    figures = loop.StepFigures(epoch, {}, accelerator.device)
    for step, (batch, spots) in enumerate(dataset.ahead(loader, accelerator.device)):
        with accelerator.autocast():
            predicted = model(augment(batch["tiles"], spots, settings.seed, epoch, settings.image_size))
        loss = losses.expression_loss(predicted, batch["target"])
        figures.add(step, {"loss": loss})
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        schedule.step()
    figures.read()


def predict(
    model: StNet, slices: Sequence[dataset.SliceData], accelerator: Accelerator, settings: Settings
) -> list[np.ndarray]:
    """Standardised genes (S, G) of all spots of each slice."""

    def encode(tiles: Tensor) -> Tensor:
        with accelerator.autocast():
            return model(tiles)

    model.eval()
    how = cache.TileEncoder(encode, settings.image_size, accelerator.device, settings.batch_size, settings.workers)
    return [np.concatenate(list(cache.encode_slice(how, slice_))) for slice_ in slices]


def fit_predict(
    encoder: ImageEncoder,
    learning: Sequence[tuple[dataset.SliceData, np.ndarray]],
    wanted: Sequence[dataset.SliceData],
    accelerator: Accelerator,
    settings: Settings,
) -> list[np.ndarray]:
    """Fine-tune the encoder and a head on the train spots; the epoch with the best validation PCC predicts.

    Parameters
    ----------
    encoder : pretrained; it is changed
    learning : slices with train and validation spots, with targets (S, G), NaN where a gene was not measured
    wanted : slices to predict
    settings : of stage one: epochs, rates, batch, seed, image size

    Returns
    -------
    (S, G) of all spots of each slice of `wanted`, in the units of the targets.
    """
    distributed.seed_everything(settings.seed)
    slices = [slice_ for slice_, _ in learning]
    train = np.concatenate([target[slice_.rows_of("train")] for slice_, target in learning])
    mean, sd = np.nanmean(train, axis=0), np.maximum(np.nanstd(train, axis=0), 1e-6)
    spots = dataset.spots_of(slices, "train")
    order = loop.EpochOrder(len(spots), settings.batch_size, settings.seed)
    batches = dataset.TileBatches(slices, spots, {"target": ((train - mean) / sd).astype(np.float32)})
    loader = dataset.loader(batches, order, settings.workers)
    model = StNet(encoder, len(mean)).to(accelerator.device)
    optimizer = loop.make_optimizer(model.parameters(), settings)
    schedule = loop.schedule(optimizer, len(order) * settings.Epoch, settings)
    held_out = [(slice_, rows, target[rows]) for slice_, target in learning if len(rows := slice_.rows_of("val"))]
    best, kept = -np.inf, model.state_dict()
    for epoch in range(settings.Epoch):
        order.epoch = epoch
        train_one_epoch(model, loader, optimizer, schedule, accelerator, epoch, settings)
        predicted = predict(model, [slice_ for slice_, _, _ in held_out], accelerator, settings)
        values = [values[rows] for values, (_, rows, _) in zip(predicted, held_out, strict=True)]
        pcc = validation_pcc(values, [target for _, _, target in held_out])
        if pcc > best:
            best, kept = pcc, {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.load_state_dict(kept)
    return [values * sd + mean for values in predict(model, wanted, accelerator, settings)]
