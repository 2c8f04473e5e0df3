"""Where stage one starts: both sides of the shared space read the same components of expression, each by ridge.

A contrast between two untrained projections of a few hundred spots learns little but which slice a spot is of. Begun
as regressions on the same components, images and profiles are aligned before the first step, and training goes on
from there. Letters: n spots, C pooled width, G input genes, R components, D shared width.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from utils import distributed
from utils.evaluation.ridge import Ridge, fit_ridge, minus_squared_error
from utils.features import dataset
from utils.training import targets

START_SPOTS = 20_000  # of the train spots, drawn by the seed, serve to solve the regressions
Seen = tuple[np.ndarray, np.ndarray, np.ndarray]  # of spots of one slice: features (n, C), bins (n, G), scores (n, R)
REST = 0.02  # the other dimensions' share of their usual size: for the contrast to find, not to drown the components


def start_from_ridge(
    model: Any,
    slices: list[dataset.SliceData],
    bins: Sequence[np.ndarray],
    of: targets.Components,
    accelerator: Any,
    args: Any,
) -> str:
    """Set the first R dimensions of `image_encoder.to_vector` and `gene_encoder.linear_path`; returns what was fitted.

    Penalties are chosen on the validation spots. `bins` (S, G) of each slice.
    """
    import torch

    rng = np.random.default_rng(args.seed)
    share = min(1.0, START_SPOTS / sum(len(one.rows_of("train")) for one in slices))
    seen: dict[str, list[Seen]] = {"train": [], "val": []}
    for i, (one, own) in enumerate(zip(slices, bins, strict=True)):
        scores = of.scores(targets.residuals(one))
        for part, found in seen.items():
            rows = one.rows_of(part)
            rows = np.sort(rng.choice(rows, int(np.ceil(share * len(rows))), replace=False))
            if len(rows):
                spots = np.column_stack([np.full_like(rows, i), rows])
                features = pooled(model.image_encoder, slices, spots, accelerator, args)
                found.append((features, own[rows].astype(np.float32), scores[rows]))
    standardise, to_vector = model.gene_encoder.linear_path
    measured = standardise.mean.cpu().numpy(), standardise.sd.cpu().numpy()
    features = np.concatenate([x for x, _, _ in seen["train"]])
    of_features = features.mean(0), np.maximum(features.std(0), 1e-3)
    image, gene = fit(seen, 0, of_features), fit(seen, 1, measured)
    with torch.no_grad():
        place(model.image_encoder.to_vector, image, of_features)
        place(to_vector, gene, None)
        to_vector.weight[len(of.weights) :] = 0
        to_vector.bias[len(of.weights) :] = 0
        model.gene_encoder.gather.to_vector.weight.mul_(REST)
        model.gene_encoder.gather.to_vector.bias.zero_()
        model.to_expression.weight.zero_()
        model.to_expression.weight[:, : len(of.weights)] = torch.diag(torch.from_numpy(of.weights))
        model.to_expression.bias.zero_()
    return (
        f"shared space begins as {len(of.weights)} components of expression: validation correlation "
        f"{image.val_pcc:.3f} from images, {gene.val_pcc:.3f} from profiles"
    )


def pooled(encoder: Any, slices: list[dataset.SliceData], spots: np.ndarray, accelerator: Any, args: Any) -> np.ndarray:
    """The trunk's features of tiles as they are: spots (n, 2) -> (n, C)."""
    import torch

    from utils.features.cache import to_float

    encoder.eval()
    order = dataset.in_turn(len(spots), args.batch_size)

    def own() -> Iterator[tuple[Any, ...]]:
        batches = dataset.TileBatches(slices, spots)
        for batch in dataset.loader(batches, distributed.own_batches(order), args.workers):
            tiles = to_float(batch["tiles"].to(accelerator.device), args.image_size)
            with torch.no_grad(), accelerator.autocast():
                yield (encoder.features(tiles)[0].float(),)

    return np.concatenate([found.cpu().numpy() for (found,) in distributed.in_order(own(), order)])


def fit(seen: dict[str, list[Seen]], side: int, standard: tuple[np.ndarray, np.ndarray]) -> Ridge:
    """Ridge from images (side 0) or profiles (side 1), standardised by mean and deviation, to the components.

    The penalty is that with the least squared error: vectors are compared by their scale, too."""
    mean, sd = standard
    x_train, x_val = ([(one[side] - mean) / sd for one in seen[part]] for part in ("train", "val"))
    y_train, y_val = ([one[2] for one in seen[part]] for part in ("train", "val"))
    return fit_ridge(x_train, y_train, x_val, y_val, by=minus_squared_error)


def place(layer: Any, ridge: Ridge, by: tuple[np.ndarray, np.ndarray] | None) -> None:
    """Write a regression into the first rows of a linear layer; the others become small and centred. Its inputs were
    standardised by `by`, if given, which the layer does not do by itself."""
    import torch

    weights, offset = ridge.weights.T, ridge.y_mean - ridge.x_mean @ ridge.weights
    n = len(weights)
    if by is not None:
        weights = weights / by[1]
        offset = offset - weights @ by[0]
        layer.weight[n:] *= REST
        layer.bias[n:] = -layer.weight[n:] @ torch.from_numpy(by[0]).to(layer.weight)
    layer.weight[:n] = torch.from_numpy(np.ascontiguousarray(weights)).to(layer.weight)
    layer.bias[:n] = torch.from_numpy(offset).to(layer.bias)
