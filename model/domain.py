"""Is a tile like the tiles that a model was trained on? Statistics of stain and texture, and distances between them.

The statistics are taken of the tile's pixels as they are. The features that the decoder reads are standardised per
slice, which removes what a wrong stain, a blur or a wrong scale does to all tiles of a slide alike.
The score of a spot is the distance to its k-th nearest train spot (Sun et al. 2022, arXiv 2204.06507).

Letters: B batch, Z tile side in pixels, K statistics, S spots, P axes, N spots of the bank.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

LEVELS = 5  # of texture: detail of 1, 2, 4, 8 and 16 pixels
NEIGHBOUR = 5  # k
PATCH = 8  # pixels
DARKEST = 1 / 255
COLOURS, PAIRS = ("red", "green", "blue"), ("red-green", "red-blue", "green-blue")
NAMES = (
    *(f"optical density, {colour}" for colour in COLOURS),
    *(f"log deviation, {colour}" for colour in COLOURS),
    *(f"correlation, {pair}" for pair in PAIRS),
    *(f"log ratio of {colour} to green" for colour in ("red", "blue")),
    *(
        f"{layer}, {what} of {2**level} px"
        for layer in ("grey", "colour")
        for what in ("log detail", "diagonal fraction", "sparseness")
        for level in range(LEVELS)
    ),
    "lightest patch",
    "darkest patch",
)
N_STATISTICS = len(NAMES)
SHRINKAGE = 1e-3  # of the correlation matrix, and 0.4 / S where that is more: fewer spots know its small axes less well
BANK = 2000  # train spots that are kept
POINTS_AT_ONCE = 512


@torch.no_grad()
def tile_statistics(tiles: Tensor) -> Tensor:
    """Stain and texture of tiles (B, 3, Z, Z) in 0..1: (B, K), named by NAMES.

    Stain: mean, deviation and correlation of the optical densities (Beer and Lambert) of red, green and blue. Texture:
    what each level of a Haar pyramid loses of grey and of colour, that is detail of 1, 2, 4, ... pixels (`texture`).
    """
    side = max(min(tiles.shape[2:]) // 2**LEVELS, 1) * 2**LEVELS
    if min(tiles.shape[2:]) < side:
        tiles = F.interpolate(tiles, (side, side), mode="nearest")
    density = -torch.log10(tiles[..., :side, :side].float().clamp(min=DARKEST))
    mean = density.mean((2, 3))
    centred = density - mean[:, :, None, None]
    flat = centred.flatten(2)
    covariance = flat @ flat.transpose(1, 2) / flat.shape[2]
    sd = covariance.diagonal(dim1=1, dim2=2).clamp(min=0).sqrt()
    correlation = covariance / (sd[:, :, None] * sd[:, None] + 1e-4)
    pairs = torch.stack([correlation[:, i, j] for i, j in ((0, 1), (0, 2), (1, 2))], 1)
    ratio = torch.log((mean[:, [0, 2]] + 0.02) / (mean[:, [1]] + 0.02))
    grey = centred.mean(1, keepdim=True)
    patches = F.avg_pool2d(grey, PATCH).flatten(1) + mean.mean(1, keepdim=True)
    patches = torch.stack([patches.min(1).values, patches.max(1).values], 1)
    return torch.cat([mean, torch.log(sd + 0.01), pairs, ratio, texture(grey), texture(centred - grey), patches], 1)


def texture(images: Tensor) -> Tensor:
    """Texture of images (B, C, Z, Z) at each level of a Haar pyramid: (B, 3 LEVELS).

    Of the differences within squares of 2 x 2 pixels: the logarithm of their root mean square, the fraction of it that
    is diagonal, and how sparse they are, the logarithm of mean over root mean square.
    """
    energy, diagonal, sparse = [], [], []
    for _ in range(LEVELS):
        a, b, c, d = (images[..., i::2, j::2] for i in (0, 1) for j in (0, 1))
        across, down, oblique = (a - b + c - d) / 4, (a + b - c - d) / 4, (a - b - c + d) / 4
        images = (a + b + c + d) / 4
        straight = across.square() + down.square()
        straight, oblique = straight.mean((1, 2, 3)), oblique.square().mean((1, 2, 3))
        size = (across.abs() + down.abs()).mean((1, 2, 3)) / 2
        energy.append(torch.log10((straight + oblique).sqrt() + 1e-3))
        diagonal.append(torch.log10((oblique + 1e-7) / (straight + 1e-7)))
        sparse.append(torch.log10((size + 1e-4) / ((straight / 2).sqrt() + 1e-4)))
    return torch.stack([*energy, *diagonal, *sparse], 1)


@torch.no_grad()
def fit_axes(train: Tensor) -> dict[str, Tensor]:
    """Mean (K,) and axes (K, P) that turn statistics (S, K) of train spots into uncorrelated ones of deviation 1."""
    values = train.double()
    mean, sd = values.mean(0), values.std(0, correction=0) + 1e-3
    scaled = (values - mean) / sd
    variance, vectors = torch.linalg.eigh(scaled.T @ scaled / len(values))
    shrinkage = max(SHRINKAGE, 0.4 / len(values))
    axes = vectors / (variance.clamp(min=0) + shrinkage).sqrt() / sd[:, None]
    return {"mean": mean.float(), "axes": axes.float()}


def on_axes(statistics: Tensor, domain: dict[str, Tensor]) -> Tensor:
    """(S, K) -> (S, P)"""
    return (statistics.float() - domain["mean"]) @ domain["axes"]


@torch.no_grad()
def fit_bank(train: list[Tensor], seed: int) -> dict[str, Tensor]:
    """Axes and bank of the train spots' statistics, per slice (S, K); of more than BANK spots so many are kept, the
    same fraction of each slice."""
    generator, n = torch.Generator().manual_seed(seed), sum(map(len, train))
    kept = [
        spots[torch.randperm(len(spots), generator=generator)[: max(1, len(spots) * min(BANK, n) // n)]]
        for spots in train
    ]
    domain = fit_axes(torch.cat(train))
    return domain | {"bank": on_axes(torch.cat(kept), domain)}


@torch.no_grad()
def distances(statistics: Tensor, domain: dict[str, Tensor]) -> Tensor:
    """Distance of spots (S, K) to their k-th nearest spot of the bank: (S,)."""
    k = min(NEIGHBOUR, len(domain["bank"]))
    blocks = on_axes(statistics, domain).split(POINTS_AT_ONCE)
    return torch.cat([torch.cdist(block, domain["bank"]).kthvalue(k, dim=1).values for block in blocks])


def slide_distance(distance: Tensor) -> Tensor:
    """Of the spots of a slide (S,) their geometric mean."""
    return distance.clamp(min=1e-6).log().mean().exp()
