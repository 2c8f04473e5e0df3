"""Features as the decoder takes them: standardised per slice, with those of the spots around, a batch at a time.

The features lie on the device while they fit the budget, else they stay in the files that they are mapped from.
Letters: S spots, T tokens of a tile, D feature width, N context spots, R bandwidths, V vectors of a tile, B batch.
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from utils import distributed
from utils.features import dataset
from utils.files.arrays import ArrayStore
from utils.memory import WithinMemory

if TYPE_CHECKING:
    from model.stage_two import StageTwo

Autocast = Callable[[], AbstractContextManager[None]]  # of the decoder's precision

MIN_SPOTS = 64  # under so many tiles a slice's own statistics are too rough
MIN_SD = 1e-3
CONTEXT_PITCHES = 2.6
FARTHEST = 2.5  # in bandwidths: a weight of 0.04
ROWS_AT_ONCE = 256  # 18 MB of the published features in float64


@dataclass(frozen=True)
class Moments:
    """Mean and deviation of the vectors (one row each) and of the tokens (the last row): (V + 1, D) each."""

    mean: np.ndarray
    sd: np.ndarray

    @property
    def n_vectors(self) -> int:
        return len(self.mean) - 1


def blocks(n: int) -> Iterator[slice]:
    """0..n in pieces of ROWS_AT_ONCE."""
    return (slice(start, min(start + ROWS_AT_ONCE, n)) for start in range(0, n, ROWS_AT_ONCE))


def moments(features: list[np.ndarray], n_vectors: int, rows: list[np.ndarray] | None = None) -> Moments:
    """Over the given rows (all of them) of each slice (S, V + T, D), which is read block by block.

    Tokens share one mean and deviation over their places. Squares of float16 in sums of float64 leave digits enough
    for the difference of squares.
    """
    number, total, squares = np.zeros((n_vectors + 1, 1)), *np.zeros((2, n_vectors + 1, features[0].shape[-1]))
    for i, of_slice in enumerate(features):
        chosen = np.arange(len(of_slice)) if rows is None else rows[i]
        for block in blocks(len(chosen)):
            both = of_slice[chosen[block]].astype(np.float64)
            kinds = [both[:, v : v + 1] for v in range(n_vectors)] + [both[:, n_vectors:]]
            for kind, values in enumerate(kinds):
                number[kind] += values.shape[0] * values.shape[1]
                total[kind] += values.sum((0, 1))
                squares[kind] += np.einsum("btd,btd->d", values, values)
            release(of_slice)
    mean = total / number
    sd = np.sqrt(np.maximum(squares / number - mean**2, 0))
    return Moments(mean.astype(np.float32), np.maximum(sd, MIN_SD).astype(np.float32))


def slice_moments(features: np.ndarray, name: str, train: Moments) -> Moments:
    """Those of the slice itself, or of the train slices, with a warning, where it has too few tiles."""
    if len(features) >= MIN_SPOTS:
        return moments([features], train.n_vectors)
    print(f"warning: {name} has {len(features)} tiles, under {MIN_SPOTS}: standardised by the train slices' statistics")
    return train


def neighbours(xy_px: np.ndarray, pitch_px: float, n: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The n nearest other spots within 2.6 pitches: index (S, n), offset (S, n, 2) in pitches, present (S, n)."""
    from scipy.spatial import cKDTree

    reach = CONTEXT_PITCHES * pitch_px
    if n == 0:
        return np.zeros((len(xy_px), 0), int), np.zeros((len(xy_px), 0, 2), np.float32), np.zeros((len(xy_px), 0), bool)
    index = np.asarray(cKDTree(xy_px).query(xy_px, k=np.arange(1, n + 2), distance_upper_bound=reach)[1])
    itself = index == np.arange(len(xy_px))[:, None]
    itself[~itself.any(1), 0] = True  # a spot on top of many others may not find itself
    index = index[~itself].reshape(len(xy_px), n)
    present = index < len(xy_px)
    index = np.where(present, index, 0)
    offset = (xy_px[index] - xy_px[:, None]) / pitch_px
    return index, np.where(present[..., None], offset, 0).astype(np.float32), present


def smoothed(
    features: np.ndarray, xy_px: np.ndarray, pitch_px: float, bandwidths: Sequence[float]
) -> Iterator[tuple[slice, np.ndarray]]:
    """Means of the other spots' features with Gaussian weights, for a block of spots at a time.

    Parameters
    ----------
    features : (S, V, D)
    bandwidths : deviations of the weights, in pitches

    Yields
    ------
    a block of the spots, and their means (n, R, V, D) float32, NaN where no other spot lies within 2.5 bandwidths
    """
    from scipy.sparse import csr_array
    from scipy.spatial import KDTree

    everywhere, farthest = KDTree(xy_px), FARTHEST * max(bandwidths) * pitch_px
    for block in blocks(len(features)):
        pairs = KDTree(xy_px[block]).sparse_distance_matrix(everywhere, farthest, output_type="ndarray")
        pairs = pairs[pairs["i"] + block.start != pairs["j"]]
        seen, column = np.unique(pairs["j"], return_inverse=True)
        width, shape = math.prod(features.shape[1:]), (block.stop - block.start, len(seen))
        near = features[seen].reshape(len(seen), width).astype(np.float32)
        means = []
        for bandwidth in bandwidths:
            distance = pairs["v"] / (bandwidth * pitch_px)
            weight = np.where(distance <= FARTHEST, np.exp(-(distance**2) / 2), 0).astype(np.float32)
            total = np.bincount(pairs["i"], weight, shape[0]).astype(np.float32)
            with np.errstate(invalid="ignore"):
                means.append((csr_array((weight, (pairs["i"], column)), shape) @ near) / total[:, None])
        yield block, np.stack(means, 1).reshape(shape[0], len(bandwidths), *features.shape[1:])
        release(features)


def release(array: np.ndarray) -> None:
    """Drop the pages read so far from this process's memory; those of a mapped file stay in the system's cache."""
    mapped = getattr(array, "_mmap", None)
    if mapped is not None:
        mapped.madvise(mmap.MADV_DONTNEED)


class Rows:
    """Rows of several float16 arrays, numbered through all of them: on the device where the budget holds them, else
    read from where they lie, in their order there."""

    def __init__(self, arrays: list[np.ndarray], store: ArrayStore, device: torch.device):
        self.arrays, self.device = arrays, device
        self.first = np.cumsum([0, *map(len, arrays)])
        size = sum(array.nbytes for array in arrays)
        self.whole = None
        if size <= store.left:
            store.left -= size
            self.whole = torch.empty((int(self.first[-1]), *arrays[0].shape[1:]), dtype=torch.float16, device=device)
            for array, start in zip(arrays, self.first, strict=False):
                for block in blocks(len(array)):
                    self.whole[start + block.start : start + block.stop] = torch.from_numpy(np.array(array[block]))
                    release(array)

    def take(self, numbers: np.ndarray) -> Tensor:
        """Numbers of any shape (...,) -> float16 (..., *row) on the device."""
        if self.whole is not None:
            return self.whole[distributed.to_device(torch.from_numpy(numbers), self.device)]
        unique, place = np.unique(numbers, return_inverse=True)
        ends = np.searchsorted(unique, self.first)
        rows = np.empty((len(unique), *self.arrays[0].shape[1:]), np.float16)
        for array, start, low, high in zip(self.arrays, self.first, ends, ends[1:], strict=False):
            if high > low:
                rows[low:high] = array[unique[low:high] - start]
                release(array)
        return distributed.to_device(torch.from_numpy(rows[place.reshape(numbers.shape)]), self.device)


class FeatureBank:
    """Features of several slices in batches, standardised, with the context of each spot.

    Spots are numbered through all slices in order; `first[i]` is the number of slice i's first spot.

    Parameters
    ----------
    features : per slice (S, V + T, D) float16
    train : statistics for a slice that is too small for its own
    context : number of nearest spots in a batch
    bandwidths : over which the other spots are averaged, in pitches
    store : memory budget; the vectors, which every batch reads N + 1 times, take of it first
    """

    def __init__(
        self,
        slices: Sequence[dataset.Spots],
        features: list[np.ndarray],
        train: Moments,
        context: int,
        bandwidths: Sequence[float],
        device: torch.device,
        store: ArrayStore,
    ):
        own = [slice_moments(f, slice_.name, train) for slice_, f in zip(slices, features, strict=True)]
        self.device, self.n_vectors = device, train.n_vectors
        self.mean, self.sd = self._put(np.stack([m.mean for m in own])), self._put(np.stack([m.sd for m in own]))
        self.first = np.cumsum([0, *map(len, features)])
        self._find_neighbours(slices, context, store)
        self.vectors = Rows([f[:, : self.n_vectors] for f in features], store, device)
        self._smooth(slices, features, own, bandwidths, store)
        self.tokens = Rows([f[:, self.n_vectors :] for f in features], store, device)

    def _find_neighbours(self, slices: Sequence[dataset.Spots], n: int, store: ArrayStore) -> None:
        size = int(self.first[-1])
        self.index = store.empty((size, n), np.int32)  # within the slice
        self.offset, self.present = store.empty((size, n, 2), np.float32), store.empty((size, n), bool)
        for slice_, start, stop in zip(slices, self.first, self.first[1:], strict=False):
            nearest = neighbours(slice_.xy_fullres_px, slice_.pitch_fullres_px, n)
            for all_spots, values in zip((self.index, self.offset, self.present), nearest, strict=True):
                all_spots[start:stop] = values

    def _smooth(
        self,
        slices: Sequence[dataset.Spots],
        features: list[np.ndarray],
        own: list[Moments],
        bandwidths: Sequence[float],
        store: ArrayStore,
    ) -> None:
        """The smoothed features of every spot; where a spot is alone 0, the slice's mean."""
        self.around = store.empty((int(self.first[-1]), len(bandwidths), *own[0].mean[:-1].shape), np.float16)
        for i, slice_ in enumerate(slices if bandwidths else []):
            vectors, start, mean, sd = features[i][:, : self.n_vectors], self.first[i], own[i].mean, own[i].sd
            for block, means in smoothed(vectors, slice_.xy_fullres_px, slice_.pitch_fullres_px, bandwidths):
                standardised = (means - mean[:-1]) / sd[:-1]
                self.around[start + block.start : start + block.stop] = np.nan_to_num(standardised)

    def spots_of(self, slices: Sequence[dataset.SliceData], part: str) -> list[np.ndarray]:
        """Numbers of the spots of a part, per slice (n,)."""
        return [start + slice_.rows_of(part) for slice_, start in zip(slices, self.first, strict=False)]

    def _put(self, array: np.ndarray) -> Tensor:
        return distributed.to_device(torch.from_numpy(np.ascontiguousarray(array)), self.device)

    def batch(self, spots: np.ndarray) -> dict[str, Tensor]:
        """Spot numbers (B,) -> what GeneDecoder takes: vector, tokens, context, offsets, present, smoothed."""
        slices = np.searchsorted(self.first, spots, side="right") - 1
        rows = np.column_stack([spots, self.index[spots] + self.first[slices][:, None]])
        of_slice = self._put(slices)
        mean, sd, n = self.mean[of_slice], self.sd[of_slice], self.n_vectors
        vectors = ((self.vectors.take(rows).float() - mean[:, None, :n]) / sd[:, None, :n]).flatten(2)
        present = self._put(self.present[spots])
        return {
            "vector": vectors[:, 0],
            "tokens": (self.tokens.take(rows[:, 0]).float() - mean[:, n:]) / sd[:, n:],
            "context": vectors[:, 1:] * present[..., None],
            "offsets": self._put(self.offset[spots]),
            "present": present,
            "smoothed": self._put(self.around[spots]).float().flatten(2),
        }


@torch.no_grad()
def predict(model: StageTwo, bank: FeatureBank, spots: np.ndarray, autocast: Autocast, batch_size: int) -> np.ndarray:
    """Expression (n, G) in the target's units of spot numbers (n,) of the bank."""

    def decode(chosen: np.ndarray) -> Tensor:
        with autocast():
            return model.predict(bank.batch(chosen))

    within, starts = WithinMemory(decode, "decoder"), range(0, len(spots), batch_size)
    return np.concatenate([within(spots[start : start + batch_size]).cpu().numpy() for start in starts])
