"""Plain twins of what is done to tiles: cut, opened and augmented one at a time, by Pillow and NumPy."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

if TYPE_CHECKING:
    from torch import Tensor


def cut_tiles(image_file: Path, centres: np.ndarray, out: Path) -> None:
    """The published tiles: 40 x 40 px around each centre (S, 2) of the hires image, one JPEG each."""
    out.mkdir(parents=True)
    with Image.open(image_file) as opened:
        image = opened.convert("RGB")
    for spot, (x, y) in enumerate(centres):
        image.crop((x - 20, y - 20, x + 20, y + 20)).save(out / f"{spot}.jpeg")


class TileFiles:
    """Tiles by file, each opened and augmented alone by NumPy, with the draws of utils/training/augment.py."""

    def __init__(self, paths: list[Path], seed: int):
        self.paths, self.seed = paths, seed

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, spot: int) -> Tensor:
        """(3, Z, Z) float32 in 0..1"""
        import torch

        from utils.training import augment

        with Image.open(self.paths[spot]) as image:
            tile = np.asarray(image.convert("RGB"))
        draws = augment.uniforms(self.seed, 0, np.array([spot]), 10)[0]
        restained = restain(turn_and_shift(tile, draws[:4]), draws[4:])
        return torch.from_numpy(restained.astype(np.float32).transpose(2, 0, 1))


def turn_and_shift(tile: np.ndarray, draws: np.ndarray) -> np.ndarray:
    """(Z, Z, 3), draws (4,) in [0, 1) -> (Z, Z, 3)."""
    from utils.training import augment

    size = len(tile)
    reach = int(augment.SHIFT * size)
    dx, dy = (int(draw * (2 * reach + 1)) for draw in draws[2:])
    padded = np.pad(tile, ((reach, reach), (reach, reach), (0, 0)), mode="symmetric")
    turned = np.rot90(padded[dy : dy + size, dx : dx + size], int(draws[0] * 4))
    return turned[:, ::-1] if draws[1] < 0.5 else turned


def restain(tile: np.ndarray, draws: np.ndarray) -> np.ndarray:
    """Stains taken apart, changed and mixed again: (Z, Z, 3) uint8, draws (6,) in [0, 1) -> (Z, Z, 3) in 0..1."""
    from utils.training import augment

    stains = augment.STAINS.numpy() / np.linalg.norm(augment.STAINS.numpy(), axis=1, keepdims=True)
    density = -np.log(np.maximum(tile, 1) / 255)
    strength = density @ np.linalg.inv(stains)
    changed = strength * (1 + augment.JITTER * (2 * draws[:3] - 1)) + augment.JITTER / 3 * (2 * draws[3:] - 1)
    return np.exp(-changed @ stains).clip(0, 1)
