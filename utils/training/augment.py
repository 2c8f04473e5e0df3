"""Histology-safe augmentation of tiles, on the device, a batch at a time, seeded by (seed, epoch, spot).

Flips, quarter turns, small shifts, and jitter of the stains in haematoxylin-eosin-DAB space (Ruifrok and Johnston
2001); no posterising or solarising, which tissue never shows. Letters: B batch, Z tile side in pixels.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from model.image_encoder import resized
from utils import distributed

# optical density of haematoxylin, eosin and DAB in red, green, blue (Ruifrok and Johnston 2001)
STAINS = torch.tensor([[0.65, 0.70, 0.29], [0.07, 0.99, 0.11], [0.27, 0.57, 0.78]], dtype=torch.float64)
SHIFT = 0.05  # of the tile's side, at most
JITTER = 0.15  # of a stain's strength (factor 1 +- JITTER) and, a third of it, of its offset
CACHED_PX = 2 * 224 * 224  # pixels at once on a CPU: what is computed in between stays in a core's cache


def uniforms(seed: int, epoch: int, spots: np.ndarray, n: int) -> np.ndarray:
    """(B, n) numbers in [0, 1), alike for a (seed, epoch, spot) in whatever batch: splitmix64 of a counter."""
    golden, first, second = (np.uint64(x) for x in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))
    key = np.random.SeedSequence((seed, epoch)).generate_state(1, np.uint64)
    counter = spots.astype(np.uint64)[:, None] * np.uint64(n) + np.arange(1, n + 1, dtype=np.uint64)
    z: np.ndarray = key + counter * golden  # wraps around, as it should
    z = (z ^ (z >> np.uint64(30))) * first
    z = (z ^ (z >> np.uint64(27))) * second
    return ((z ^ (z >> np.uint64(31))) >> np.uint64(11)) * 2.0**-53


def turns_and_shifts(draws: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """One of the eight flips and quarter turns per tile, and a shift by whole pixels (the edge is mirrored).

    Draws (B, 4) in [0, 1) -> two (B, Z): the pixel of row i and column j comes from pixel first[i] + second[j], where
    the pixels of a tile are counted along its rows.
    """
    reach = int(SHIFT * size)
    quarter = (draws[:, :1] * 4).long()
    cos, sin = torch.tensor([1, 0, -1, 0])[quarter], torch.tensor([0, 1, 0, -1])[quarter]
    mirror = 1 - 2 * (draws[:, 1:2] < 0.5).long()
    shift = (draws[:, 2:] * (2 * reach + 1)).long() - reach
    swapped = sin != 0  # by an odd quarter the source's columns run along the rows
    column = _places(torch.where(swapped, -sin, cos * mirror), shift[:, :1], size)
    row = _places(torch.where(swapped, sin * mirror, cos), shift[:, 1:], size) * size
    return torch.where(swapped, column, row), torch.where(swapped, row, column)


def _places(direction: Tensor, shift: Tensor, size: int) -> Tensor:
    """0 to Z - 1, backwards where `direction` is -1, shifted and mirrored at both ends: (B, 1), (B, 1) -> (B, Z)."""
    centred = direction * (2 * torch.arange(size) - (size - 1)) + 2 * shift  # in half pixels from the centre
    place = (centred + size - 1) // 2
    place = torch.where(place < 0, -1 - place, place)
    return torch.where(place >= size, 2 * size - 1 - place, place)


def stain_change(draws: Tensor) -> tuple[Tensor, Tensor]:
    """Each stain stronger or weaker, and a little of it added or taken: draws (B, 6) -> (B, 3, 3), (B, 3, 1).

    To take the stains apart, scale them, add an offset and mix them is one affine map of the optical density.
    """
    stains = F.normalize(STAINS, dim=1)
    factor = 1 + JITTER * (2 * draws[:, :3] - 1)
    offset = JITTER / 3 * (2 * draws[:, 3:] - 1)
    matrix = torch.linalg.inv(stains) @ (factor[:, :, None] * stains)  # acts on rows: density (red, green, blue)
    return matrix.transpose(1, 2).float(), (offset @ stains)[:, :, None].float()


def move(tiles: Tensor, first: Tensor, second: Tensor) -> Tensor:
    """Pixels in their new places, by channel: uint8 (B, Z, Z, 3), two (B, Z) -> uint8 (B, 3, Z * Z)."""
    source = (first[:, :, None] + second[:, None, :]).flatten(1)
    pixels = tiles.flatten(1, 2).transpose(1, 2)
    return pixels.gather(2, source[:, None].expand(-1, 3, -1))


def log_light(device: torch.device) -> Tensor:
    """Minus the optical density of each 8-bit value: (256,)."""
    return (torch.arange(256, device=device).clamp(min=1) / 255).log()


def restain(tiles: Tensor, matrix: Tensor, offset: Tensor, table: Tensor, out: Tensor) -> None:
    """uint8 (B, 3, Z * Z) -> `out`, float32 of the same shape in 0..1; `table` is that of `log_light`."""
    density = table.index_select(0, tiles.flatten().int()).view(tiles.shape)
    torch.bmm(matrix, density, out=out).sub_(offset).exp_().clamp_(max=1)


def augment(tiles: Tensor, spots: np.ndarray, seed: int, epoch: int, size: int) -> Tensor:
    """uint8 tiles (B, Z, Z, 3) of the spots (B,) -> float32 (B, 3, size, size) in 0..1.

    Resized last: stains vary in the tissue, before any resampling, and only 8-bit values have a table of densities.
    """
    n, side = tiles.shape[:2]
    draws = torch.from_numpy(uniforms(seed, epoch, spots, 10))
    changes = (*turns_and_shifts(draws[:, :4], side), *stain_change(draws[:, 4:]))
    plan, table = [distributed.to_device(x, tiles.device) for x in changes], log_light(tiles.device)
    done = torch.empty((n, 3, side * side), device=tiles.device)
    at_once = max(CACHED_PX // side**2, 1) if tiles.device.type == "cpu" else n
    for start in range(0, n, at_once):
        first, second, matrix, offset = (x[start : start + at_once] for x in plan)
        moved = move(tiles[start : start + at_once], first, second)
        restain(moved, matrix, offset, table, out=done[start : start + at_once])
    return resized(done.view(n, 3, side, side), size)
