"""Features of a slide's tiles, streamed: each tile is cut, encoded and dropped; what is kept lies on disk.

Letters: S spots, R views of a tile (what the model itself sees, then, if asked for, its eight turns), V vectors and T
tokens of a view, D feature width, B batch, Z tile side in pixels, G genes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from utils.features.cache import TileEncoder, to_float
from utils.files.arrays import ArrayStore
from utils.files.hashing import content_hash
from utils.memory import WithinMemory
from utils.prediction.layout import SlideSpots

TURNS = 8
SPOTS_AT_ONCE = 2048  # vectors in double precision: 17 MB of the published ones


def fingerprint(paths: Iterable[Path]) -> list[list[str]]:
    """Name and content of files, wherever they lie."""
    return [[path.name, content_hash(path)] for path in paths]


def spots_hash(spots: SlideSpots) -> str:
    """Of where the spots lie and of their names."""
    digest = hashlib.sha256("\n".join(spots.barcodes.tolist()).encode())
    digest.update(np.ascontiguousarray(spots.xy_fullres_px, "<f8").tobytes())
    return digest.hexdigest()


def views_of(encode: Callable[[Tensor], Tensor], encode_turned: Callable[[Tensor, int], Tensor] | None) -> Any:
    """Tiles (B, 3, Z, Z) -> features (B, R, V + T, D): as `encode` gives them, then each of the eight turns."""

    def views(tiles: Tensor) -> Tensor:
        turned = [] if encode_turned is None else [encode_turned(tiles, turn) for turn in range(TURNS)]
        return torch.stack([encode(tiles), *turned], 1)

    return views


@torch.no_grad()
def encode_stream(how: TileEncoder, batches: Iterable[np.ndarray], n_spots: int, name: str) -> Iterator[np.ndarray]:
    """Batches of tiles (B, Z, Z, 3) uint8 -> (B, ...) float32, in their order."""
    encode = WithinMemory(how.encode, name)
    with tqdm(total=n_spots, desc=f"{name}: features", unit="spot", disable=None) as bar:
        for tiles in batches:
            yield encode(to_float(torch.from_numpy(tiles).to(how.device), how.size)).float().cpu().numpy()
            bar.update(len(tiles))


def domain_scores(
    kept: np.ndarray, domain: dict[str, Tensor], n_vectors: int, score: Callable[[Tensor, Tensor, Tensor], Tensor]
) -> np.ndarray:
    """Out-of-domain score of each spot, on features before standardisation: (S, R, V + T, D) -> (S,)."""
    found = []
    for start in range(0, len(kept), SPOTS_AT_ONCE):
        vectors = kept[start : start + SPOTS_AT_ONCE, 0, :n_vectors].astype(np.float32)
        found.append(score(torch.from_numpy(vectors).flatten(1), domain["mean"], domain["covariance"]).numpy())
    return np.concatenate(found)


class Spread:
    """Mean and deviation over predictions (S, G) that come one after the other (Welford 1962)."""

    def __init__(self, store: ArrayStore):
        self.store, self.number = store, 0
        self.mean: np.ndarray = np.empty(0)
        self.squares: np.ndarray = np.empty(0)

    def add(self, predicted: np.ndarray) -> None:
        if self.number == 0:
            self.mean, self.squares = (self.store.empty(predicted.shape, np.float32) for _ in range(2))
            self.mean[:], self.squares[:] = 0, 0
        self.number += 1
        apart = predicted - self.mean
        self.mean += apart / self.number
        self.squares += apart * (predicted - self.mean)

    @property
    def deviation(self) -> np.ndarray | None:
        """Of the predictions seen, as a population; None for a single one."""
        return np.sqrt(self.squares / self.number) if self.number > 1 else None
