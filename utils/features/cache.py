"""Features of a frozen image encoder: computed once per tile, a batch at a time, and kept on disk.

Letters: S spots, T tokens of a tile, D feature width, B batch, Z tile side in pixels.
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from model.image_encoder import ImageEncoder, to_float
from utils import distributed
from utils.features import dataset
from utils.files import tensors
from utils.files.arrays import ArrayStore
from utils.files.atomic import whole_file, write_record
from utils.memory import WithinMemory
from utils.words import count_of

if TYPE_CHECKING:
    from accelerate import Accelerator

    from model.stage_one import StageOne

Encode = Callable[[Tensor], Tensor]  # tiles (B, 3, Z, Z) in 0..1 -> features (B, ...)


def read_image_weights(text: str, flag: str) -> Any:
    """--image_weights: "timm" for the hub's, None for none, else what a file holds, tensors at any depth."""
    if text in ("timm", "none"):
        return "timm" if text == "timm" else None
    content = tensors.read_tensors(Path(text), flag)
    if not isinstance(content, dict):
        raise ValueError(f"{flag}: expected named tensors in {text}, found {type(content).__name__}; save a state dict")
    found = tensors.Tensors(content)
    found.source = text
    return found


@dataclass(frozen=True)
class Inference:
    """Where a model runs without gradients, and how many tiles it takes at a time."""

    accelerator: Accelerator
    batch_size: int
    workers: int | None


@dataclass
class EncodedPairs:
    """Unit vectors (S, D) float32 of images and expression profiles, and their tokens (S, P, D), (S, K, D) where these
    are kept.

    Tokens lie outside the accelerator, perhaps on disk, in the precision they were computed in.
    """

    image: np.ndarray
    gene: np.ndarray
    image_tokens: Tensor | None = None
    gene_tokens: Tensor | None = None

    def vectors(self) -> tuple[np.ndarray, np.ndarray]:
        return self.image, self.gene


@torch.no_grad()
def encode_pairs(
    model: StageOne,
    slice_: dataset.SliceData,
    bins: np.ndarray,
    rows: np.ndarray,
    inference: Inference,
    store: ArrayStore | None = None,
) -> EncodedPairs:
    """Encode the image and the expression profile of some spots of a slice.

    Parameters
    ----------
    bins : (S, G) of the whole slice
    rows : (n,) the spots to encode
    store : takes the tokens; without one they are not kept
    """
    spots = np.column_stack([np.zeros_like(rows), rows])
    batches = dataset.TileBatches([slice_], spots, {"bins": bins[rows]})
    order = dataset.in_turn(len(rows), inference.batch_size)
    device, autocast = inference.accelerator.device, inference.accelerator.autocast

    def encoded() -> Iterator[tuple[Tensor, ...]]:
        for batch in dataset.loader(batches, distributed.own_batches(order), inference.workers):
            tiles, bins_ = (distributed.to_device(batch[name], device) for name in ("tiles", "bins"))
            with autocast():
                image, image_tokens = model.encode_images(to_float(tiles, model.sizes.image_size))
                gene, gene_tokens = model.encode_genes(bins_)
            yield (image, gene) if store is None else (image, gene, image_tokens, gene_tokens)

    kept: list[Tensor] = []
    for tensors_, numbers in zip(distributed.in_order(encoded(), order), order, strict=True):
        kept = kept or [room_for(len(rows), tensor, store) for tensor in tensors_]
        for room, tensor in zip(kept, tensors_, strict=True):
            room[numbers] = tensor.to("cpu")
    image, gene, *tokens = kept
    return EncodedPairs(image.numpy(), gene.numpy(), *tokens)


def room_for(n: int, like: Tensor, store: ArrayStore | None) -> Tensor:
    """An empty tensor off the accelerator for n rows such as those of `like`; NumPy, which has no bf16, sees bits."""
    empty = np.empty if store is None else store.empty
    return torch.from_numpy(empty((n, *like.shape[1:]), f"i{like.itemsize}")).view(like.dtype)


@dataclass(frozen=True)
class TileEncoder:
    """How the tiles of a slice become features; `size` is the side of the tiles (pixels) that `encode` takes."""

    encode: Encode
    size: int
    device: torch.device
    batch_size: int
    workers: int | None
    what: str = "features"  # of the line that says what is computed


@torch.no_grad()
def encode_slice(encoder: TileEncoder, slice_: dataset.SliceData) -> Iterator[np.ndarray]:
    """Features of all tiles of a slice, in its order: (B, ...) float32, batch by batch."""
    batches = dataset.TileBatches([slice_], dataset.all_spots(slice_))
    encode, order = WithinMemory(encoder.encode, slice_.name), dataset.in_turn(len(batches), encoder.batch_size)
    print(f"{slice_.name}: {encoder.what} of {count_of(len(batches), 'tile')}", flush=True)

    def encoded() -> Iterator[tuple[Tensor, ...]]:
        for batch in dataset.loader(batches, distributed.own_batches(order), encoder.workers):
            tiles = distributed.to_device(batch["tiles"], encoder.device)
            yield (encode(to_float(tiles, encoder.size)).float(),)

    with tqdm(total=len(batches), desc=f"{slice_.name}: features", unit="spot", disable=None) as bar:
        for (features,) in distributed.in_order(encoded(), order):
            yield features.cpu().numpy()
            bar.update(len(features))


def _half(features: np.ndarray) -> np.ndarray:
    """In half precision, as features are kept. Raises ValueError where that cannot hold them."""
    half = features.astype("<f2")
    if not np.isfinite(half).all():
        raise ValueError(
            f"features of the image encoder: expected numbers within ±{np.finfo(np.float16).max:,.0f}, found "
            f"{features[~np.isfinite(half)][0]:g}; use --precision fp32, or another image encoder"
        )
    return half


def in_budget(batches: Iterator[np.ndarray], n_spots: int, store: ArrayStore) -> np.ndarray:
    """Batches of features put together: (S, V + T, D) float16, memory-mapped beyond the budget."""
    first = next(batches)
    features, done = store.empty((n_spots, *first.shape[1:]), np.float16), 0
    for batch in chain([first], batches):
        features[done : done + len(batch)] = _half(batch)
        done += len(batch)
    return features


def write_features(path: Path, batches: Iterator[np.ndarray], n_spots: int) -> None:
    """The same as a .npy file, a batch after the other. Written, not mapped: a full disk is then an OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as part, part.open("wb") as file:
        for batch in batches:
            if file.tell() == 0:
                header = {"descr": "<f2", "fortran_order": False, "shape": (n_spots, *batch.shape[1:])}
                np.lib.format.write_array_header_1_0(file, header)
            file.write(_half(batch).tobytes())


def read_features(path: Path, note: Path, record: dict[str, object]) -> np.ndarray | None:
    """Kept features (S, V + T, D) float16, mapped; None where they are missing, corrupt, or of another record."""
    try:
        return np.load(path, mmap_mode="r") if json.loads(note.read_text()) == record else None
    except (FileNotFoundError, EOFError, ValueError):
        return None


def kept_features(
    folder: Path, key: str, slice_: dataset.Spots, compute: Callable[[], Iterator[np.ndarray]]
) -> np.ndarray:
    """Features (S, V + T, D) float16 of a slice, mapped from `folder`.

    Parameters
    ----------
    key : what they were computed from: content of tiles and weights, and settings
    compute : gives them in batches; called where the folder has none of this key and these spots
    """
    path, note = folder / f"{slice_.name}.npy", folder / f"{slice_.name}.json"
    record: dict[str, object] = {"key": key, "barcodes": slice_.barcodes.tolist()}
    features = read_features(path, note, record)
    if not distributed.any_true(features is None) and features is not None:
        return features
    if distributed.is_main():
        note.unlink(missing_ok=True)  # old features never stand under a new key
        write_features(path, compute(), len(slice_.barcodes))
        write_record(note, record)
    else:
        deque(compute(), maxlen=0)  # this process' part of them
    distributed.wait()
    return np.load(path, mmap_mode="r")


def pretrained_features(
    state: dict[str, Any],
    settings: dict[str, Any],
    slices: list[dataset.SliceData],
    inference: Inference,
    image_weights: str | None,
) -> list[np.ndarray]:
    """Pooled features (S, C) float32 per slice of the pretrained encoder that stage one began with.

    Parameters
    ----------
    state : checkpoint of either stage
    settings : flags that stage one was run with
    image_weights : --image_weights of an evaluation, None for those of stage one
    """
    sizes, accelerator = state["sizes"], inference.accelerator
    distributed.seed_everything(settings["seed"])  # without pretrained weights: the random ones stage one began with
    weights = read_image_weights(image_weights or settings["image_weights"], "--image_weights")
    encoder = ImageEncoder(
        sizes["image_encoder"], sizes["image_size"], sizes["width"], weights, crop_scales=sizes["crop_scales"]
    )
    encoder = encoder.to(accelerator.device).eval()

    def encode(tiles: Tensor) -> Tensor:
        with accelerator.autocast():
            return encoder.features(tiles)[0]

    size, what = sizes["image_size"], "features by the pretrained encoder"
    how = TileEncoder(encode, size, accelerator.device, inference.batch_size, inference.workers, what)
    return [np.concatenate(list(encode_slice(how, slice_))) for slice_ in slices]
