"""Histology-safe augmentation of tiles, on the device, a batch at a time, seeded by (seed, epoch, spot).

Flips, quarter turns, small shifts, and jitter of the stains in haematoxylin-eosin-DAB space (Ruifrok and Johnston
2001); no posterising or solarising, which tissue never shows. Letters: B batch, Z tile side in pixels.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

# optical density of haematoxylin, eosin and DAB in red, green, blue (Ruifrok and Johnston 2001)
STAINS = torch.tensor([[0.65, 0.70, 0.29], [0.07, 0.99, 0.11], [0.27, 0.57, 0.78]])
SHIFT = 0.05  # of the tile's side, at most
JITTER = 0.15  # of a stain's strength (factor 1 +- JITTER) and, a third of it, of its offset


def uniforms(seed: int, epoch: int, spots: np.ndarray, n: int) -> np.ndarray:
    """(B, n) numbers in [0, 1), alike for a (seed, epoch, spot) in whatever batch: splitmix64 of a counter."""
    golden, first, second = (np.uint64(x) for x in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))
    key = np.random.SeedSequence((seed, epoch)).generate_state(1, np.uint64)
    counter = spots.astype(np.uint64)[:, None] * np.uint64(n) + np.arange(1, n + 1, dtype=np.uint64)
    z: np.ndarray = key + counter * golden  # wraps around, as it should
    z = (z ^ (z >> np.uint64(30))) * first
    z = (z ^ (z >> np.uint64(27))) * second
    return ((z ^ (z >> np.uint64(31))) >> np.uint64(11)) * 2.0**-53


def to_float(tiles: Tensor, size: int) -> Tensor:
    """uint8 (B, Z, Z, 3) -> float32 (B, 3, size, size) in 0..1, resized with antialiasing where Z differs."""
    tiles = tiles.permute(0, 3, 1, 2).float() / 255
    if tiles.shape[-1] == size:
        return tiles
    resized = F.interpolate(tiles, (size, size), mode="bicubic", antialias=True, align_corners=False)
    return resized.clamp(0, 1)


def turn_and_shift(tiles: Tensor, draws: Tensor) -> Tensor:
    """One of the eight flips and quarter turns per tile, and a shift by whole pixels (the edge is mirrored).

    Shapes: tiles (B, 3, Z, Z), draws (B, 4) in [0, 1) -> (B, 3, Z, Z).
    """
    size = tiles.shape[-1]
    reach = int(SHIFT * size)
    quarter = (draws[:, 0] * 4).floor() * (torch.pi / 2)
    cos, sin = quarter.cos().round(), quarter.sin().round()
    mirror = 1 - 2 * (draws[:, 1] < 0.5).float()
    shift = ((draws[:, 2:4] * (2 * reach + 1)).floor() - reach) * 2 / size
    theta = torch.stack(
        [torch.stack([cos * mirror, -sin, shift[:, 0]], 1), torch.stack([sin * mirror, cos, shift[:, 1]], 1)], 1
    )
    grid = F.affine_grid(theta, list(tiles.shape), align_corners=False)
    return F.grid_sample(tiles, grid, mode="nearest", padding_mode="reflection", align_corners=False)


def jitter_stains(tiles: Tensor, draws: Tensor) -> Tensor:
    """Each stain stronger or weaker, and a little of it added or taken: (B, 3, Z, Z), (B, 6) -> (B, 3, Z, Z)."""
    stains = F.normalize(STAINS, dim=1).to(tiles.device)
    factor = 1 + JITTER * (2 * draws[:, :3] - 1)
    offset = JITTER / 3 * (2 * draws[:, 3:] - 1)
    density = -torch.log(tiles.clamp(min=1 / 255))
    strength = torch.einsum("bczy,cs->bszy", density, torch.linalg.inv(stains))
    strength = strength * factor[:, :, None, None] + offset[:, :, None, None]
    return torch.exp(-torch.einsum("bszy,sc->bczy", strength, stains)).clamp(0, 1)


def augment(tiles: Tensor, spots: np.ndarray, seed: int, epoch: int) -> Tensor:
    """Tiles (B, 3, Z, Z) in 0..1 of the spots (B,) -> the same shape and range."""
    draws = torch.from_numpy(uniforms(seed, epoch, spots, 10)).float().to(tiles.device)
    return jitter_stains(turn_and_shift(tiles, draws[:, :4]), draws[:, 4:])
