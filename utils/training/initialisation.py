"""Warm start of stage one: both sides of the shared space predict the same components of expression, each by ridge.

A contrast between two untrained projections of a few hundred spots learns little but which slice a spot is of. Started
at regressions on the same components, images and expression profiles are aligned before the first step, and training
continues from there. Letters: n spots, C pooled width, G input genes, R components, D shared width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from utils import distributed
from utils.evaluation.ridge import Ridge, fit_ridge, minus_squared_error
from utils.features import dataset
from utils.features.cache import Inference, to_float
from utils.training import targets
from utils.words import count_of

if TYPE_CHECKING:
    from model.stage_one import StageOne

START_SPOTS = 20_000  # at most so many train spots, drawn by the seed, are used to solve a warm start
REST = 0.02  # scale of the other dimensions: left for the contrast, they must not drown the components
Scale = tuple[np.ndarray, np.ndarray]  # mean and deviation of inputs


@dataclass(frozen=True)
class Sample:
    """Some spots of one slice."""

    features: np.ndarray  # (n, C)
    bins: np.ndarray  # (n, G)
    scores: np.ndarray  # (n, R)


def fraction_of(n_spots: int) -> float:
    """Of so many train spots the fraction that a warm start is solved on."""
    return min(1.0, START_SPOTS / n_spots)


def warm_start_stage_one(
    model: StageOne,
    slices: list[dataset.SliceData],
    bins: Sequence[np.ndarray],
    components: targets.Components,
    inference: Inference,
    seed: int,
) -> str:
    """Set the first R dimensions of both encoders' vectors by ridge.

    Penalties are chosen on the validation spots. Returns what was fitted, in words.

    Parameters
    ----------
    bins : (S, G) of each slice
    """
    n_spots = sum(len(slice_.rows_of(part)) for slice_ in slices for part in ("train", "val"))
    used = round(fraction_of(sum(len(slice_.rows_of("train")) for slice_ in slices)) * n_spots)
    print(f"warm start: features of {count_of(used, 'tile')}, then ridge on them", flush=True)
    train, val = draw_samples(model, slices, bins, components, inference, seed)
    assert model.to_expression is not None, "the model has components"
    features = np.concatenate([sample.features for sample in train])
    scale = features.mean(0), np.maximum(features.std(0), 1e-3)
    image = fit(lambda sample: (sample.features - scale[0]) / scale[1], train, val)
    gene = fit(lambda sample: standardised_bins(model, sample.bins), train, val)
    n, weights = len(components.weights), torch.from_numpy(components.weights)
    with torch.no_grad():
        place(model.image_encoder.to_vector, image, scale)
        weight, bias = map(torch.from_numpy, weight_and_bias(gene))
        model.gene_encoder.warm_start(weight, bias, REST)
        model.to_expression.weight.zero_()
        model.to_expression.weight[:, :n] = torch.diag(weights)
        model.to_expression.bias.zero_()
    return (
        f"warm start at {n} components of expression: validation correlation "
        f"{image.val_pcc:.3f} from images, {gene.val_pcc:.3f} from expression profiles"
    )


def draw_samples(
    model: StageOne,
    slices: list[dataset.SliceData],
    bins: Sequence[np.ndarray],
    components: targets.Components,
    inference: Inference,
    seed: int,
) -> tuple[list[Sample], list[Sample]]:
    """Train and validation spots of each slice, the same fraction of both."""
    rng = np.random.default_rng(seed)
    fraction = fraction_of(sum(len(slice_.rows_of("train")) for slice_ in slices))
    samples: dict[str, list[Sample]] = {"train": [], "val": []}
    for i, (slice_, tokens) in enumerate(zip(slices, bins, strict=True)):
        scores = components.scores(targets.residuals(slice_))
        for part, of_part in samples.items():
            rows = dataset.draw(slice_.rows_of(part), fraction, rng)
            if len(rows):
                spots = np.column_stack([np.full_like(rows, i), rows])
                features = pooled(model, slices, spots, inference)
                of_part.append(Sample(features, tokens[rows].astype(np.float32), scores[rows]))
    return samples["train"], samples["val"]


def pooled(model: StageOne, slices: list[dataset.SliceData], spots: np.ndarray, inference: Inference) -> np.ndarray:
    """The image trunk's features of tiles without augmentation: spots (n, 2) -> (n, C)."""
    encoder = model.image_encoder.eval()
    order, accelerator = dataset.in_turn(len(spots), inference.batch_size), inference.accelerator

    def encoded() -> Iterator[tuple[Tensor, ...]]:
        batches = dataset.TileBatches(slices, spots)
        for batch in dataset.loader(batches, distributed.own_batches(order), inference.workers):
            tiles = to_float(batch["tiles"].to(accelerator.device), model.sizes.image_size)
            with torch.no_grad(), accelerator.autocast():
                yield (encoder.features(tiles)[0].float(),)

    return np.concatenate([features.cpu().numpy() for (features,) in distributed.in_order(encoded(), order)])


def standardised_bins(model: StageOne, bins: np.ndarray) -> np.ndarray:
    """Bins (n, G) as the gene encoder's linear path reads them."""
    device = model.to_expression.weight.device if model.to_expression is not None else "cpu"
    return model.gene_encoder.standardised(torch.from_numpy(bins).to(device)).cpu().numpy()


def fit(inputs: Callable[[Sample], np.ndarray], train: list[Sample], val: list[Sample]) -> Ridge:
    """Ridge from standardised inputs (n, C) of each sample to the components.

    The penalty is that with the least squared error: vectors are compared by their scale, too."""
    x_train, x_val = ([inputs(sample) for sample in samples] for samples in (train, val))
    y_train, y_val = ([sample.scores for sample in samples] for samples in (train, val))
    return fit_ridge(x_train, y_train, x_val, y_val, by=minus_squared_error)


def weight_and_bias(ridge: Ridge) -> tuple[np.ndarray, np.ndarray]:
    """(R, C), (R,) of the linear layer that equals a regression."""
    return np.ascontiguousarray(ridge.weights.T), ridge.y_mean - ridge.x_mean @ ridge.weights


def place(layer: nn.Linear, ridge: Ridge, scale: Scale) -> None:
    """Write a regression into the first rows of a linear layer; the others become small and centred.

    Its inputs were standardised by `scale`, mean and deviation (C,), which the layer does not do by itself."""
    weights, offset = weight_and_bias(ridge)
    mean, sd = scale
    weights = weights / sd
    offset = offset - weights @ mean
    n = len(weights)
    layer.weight[n:] *= REST
    layer.bias[n:] = -layer.weight[n:] @ torch.from_numpy(mean).to(layer.weight)
    layer.weight[:n] = torch.from_numpy(np.ascontiguousarray(weights)).to(layer.weight)
    layer.bias[:n] = torch.from_numpy(offset).to(layer.bias)
