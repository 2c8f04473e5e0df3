"""Features of a frozen image encoder: computed once per tile and view of it, a batch at a time, and kept on disk.

Letters: S spots, T tokens of a tile, D feature width, B batch, Z tile side in pixels.
"""

from __future__ import annotations

import json
import math
import zlib
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from utils import distributed
from utils.features import dataset
from utils.files import tensors
from utils.files.arrays import ArrayStore
from utils.files.atomic import write_record
from utils.memory import WithinMemory
from utils.training import augment
from utils.training.augment import to_float
from utils.training.loop import seed_everything

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


@dataclass
class EncodedPairs:
    """Unit vectors (S, D) float32 of images and profiles, and their tokens (S, P, D), (S, K, D) where these are kept.

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
    model: Any,
    one: dataset.SliceData,
    bins: np.ndarray,
    rows: np.ndarray,
    accelerator: Any,
    args: Any,
    store: ArrayStore | None = None,
) -> EncodedPairs:
    """Every image and profile of the rows once: bins (S, G) of the whole slice, rows (n,) of it.

    Their tokens are kept only where there is a `store` to take them.
    """
    spots = np.column_stack([np.zeros_like(rows), rows])
    batches = dataset.TileBatches([one], spots, {"bins": bins[rows]})
    order = dataset.in_turn(len(rows), args.batch_size)

    def own() -> Iterator[tuple[Tensor, ...]]:
        for batch in dataset.loader(batches, distributed.own_batches(order), args.workers):
            with accelerator.autocast():
                tiles = to_float(batch["tiles"].to(accelerator.device), model.sizes.image_size)
                image, image_tokens = model.encode_images(tiles)
                gene, gene_tokens = model.encode_genes(batch["bins"].to(accelerator.device))
            yield (image, gene) if store is None else (image, gene, image_tokens, gene_tokens)

    kept: list[Tensor] = []
    for found, numbers in zip(distributed.in_order(own(), order), order, strict=True):
        kept = kept or [room_for(len(rows), each, store) for each in found]
        for room, new in zip(kept, found, strict=True):
            room[numbers] = new.to("cpu")
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
    seed: int = 0  # of the augmented views

    def look(self, tiles: Tensor, name: str, rows: np.ndarray, view: int) -> Tensor:
        """Tiles (B, Z, Z, 3) uint8 of rows (B,) of a slice -> (B, 3, size, size): as they are (view 0), or augmented.

        The draws are those of the slice and its row, so that they do not depend on the other slices of a run.
        """
        if view == 0:
            return to_float(tiles, self.size)
        return augment.augment(tiles, (zlib.crc32(name.encode()) << 30) + rows, self.seed, view, self.size)


@torch.no_grad()
def encode_slice(how: TileEncoder, one: dataset.SliceData, view: int = 0) -> Iterator[np.ndarray]:
    """Features of all tiles of a slice, in its order: (B, ...) float32, batch by batch."""
    batches, encode = dataset.TileBatches([one], dataset.all_spots(one)), WithinMemory(how.encode, one.name)
    order = dataset.in_turn(len(batches), how.batch_size)

    def own() -> Iterator[tuple[Tensor, ...]]:
        for batch in dataset.loader(batches, distributed.own_batches(order), how.workers):
            tiles = how.look(batch["tiles"].to(how.device), one.name, batch["spot"].numpy(), view)
            yield (encode(tiles).float(),)

    what = f"{one.name}: features" + (f" of view {view}" if view else "")
    with tqdm(total=len(batches), desc=what, unit="spot", disable=None) as bar:
        for (found,) in distributed.in_order(own(), order):
            yield found.cpu().numpy()
            bar.update(len(found))


def in_budget(found: Iterator[np.ndarray], n_spots: int, store: ArrayStore) -> np.ndarray:
    """Batches of features put together: (S, V + T, D) float16, on disk beyond the budget."""
    first = next(found)
    whole, done = store.empty((n_spots, *first.shape[1:]), np.float16), 0
    for batch in chain([first], found):
        whole[done : done + len(batch)] = batch
        done += len(batch)
    return whole


def write_features(path: Path, found: Iterator[np.ndarray], n_spots: int) -> None:
    """The same as a .npy file, a batch after the other. Written, not mapped: a full disk is then an OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    with part.open("wb") as file:
        for batch in found:
            if file.tell() == 0:
                header = {"descr": "<f2", "fortran_order": False, "shape": (n_spots, *batch.shape[1:])}
                np.lib.format.write_array_header_1_0(file, header)
            file.write(batch.astype("<f2").tobytes())
    part.replace(path)


def views_in_budget(slices: list[dataset.SliceData], how: TileEncoder, folder: Path, args: Any) -> int:
    """How many of --views fit --feature_budget; slices with train spots have all of them, the others one.

    How much a tile takes is told by an empty one: 18 x 512 numbers as published, fewer where the grid is small.
    """
    spots = sum(len(one.barcodes) for one in slices)
    taught = sum(len(one.barcodes) for one in slices if len(one.rows_of("train")))
    tile = how.encode(torch.zeros(1, 3, how.size, how.size, device=how.device)).half().nbytes

    def gib(n_views: int) -> str:
        return f"{math.ceil((spots + (n_views - 1) * taught) * tile / 2**30 * 1000) / 1000:g} GiB"

    spare = int(args.feature_budget * 2**30) - spots * tile
    if spare < 0:
        raise ValueError(
            f"--feature_budget {args.feature_budget:g}: expected {gib(1)} or more for the features of {spots} tiles in "
            f"{folder}, found less; raise it, or train on fewer slices"
        )
    views = min(args.views, 1 + spare // (taught * tile))
    if views < args.views:
        print(f"{views} of {args.views} views are kept: all of them need a --feature_budget of {gib(args.views)}")
    print(f"features of {spots} tiles in {folder}, {views} views of those to train on: {gib(views)}")
    return views


def read_kept(path: Path, note: Path, record: dict[str, Any]) -> np.ndarray | None:
    """Kept features (S, V + T, D) float16, mapped; None where they are missing, corrupt, or of another record."""
    try:
        return np.load(path, mmap_mode="r") if json.loads(note.read_text()) == record else None
    except (FileNotFoundError, EOFError, ValueError):
        return None


def kept_features(
    folder: Path, key: str, one: dataset.SliceData, compute: Callable[[], Iterator[np.ndarray]], view: int = 0
) -> np.ndarray:
    """Features (S, V + T, D) float16 mapped from `folder`; where they are not there, or of another key, they are
    computed and written batch by batch."""
    name = one.name + (f".view{view}" if view else "")
    path, note = folder / f"{name}.npy", folder / f"{name}.json"
    record = {"key": key, "barcodes": one.barcodes.tolist()}
    kept = read_kept(path, note, record)
    if not distributed.any_true(kept is None) and kept is not None:
        return kept
    if distributed.is_main():
        note.unlink(missing_ok=True)  # old features never stand under a new key
        write_features(path, compute(), len(one.barcodes))
        write_record(note, record)
    else:
        deque(compute(), maxlen=0)  # this process' part of them
    distributed.wait()
    return np.load(path, mmap_mode="r")


def pretrained_features(
    encoder_class: Any,
    state: dict[str, Any],
    settings: dict[str, Any],
    slices: list[dataset.SliceData],
    accelerator: Any,
    args: Any,
) -> list[np.ndarray]:
    """Pooled features (S, C) float32 per slice of the encoder as stage one found it.

    Parameters
    ----------
    encoder_class : model.image_encoder.ImageEncoder (this package does not import the models)
    state : checkpoint of either stage
    settings : flags that stage one was run with
    """
    sizes = state["sizes"]
    seed_everything(settings["seed"])  # without pretrained weights: the random ones that stage one began with
    weights = read_image_weights(args.image_weights or settings["image_weights"], "--image_weights")
    encoder = encoder_class(
        sizes["image_encoder"], sizes["image_size"], sizes["width"], weights, crop_scales=sizes["crop_scales"]
    )
    encoder = encoder.to(accelerator.device).eval()

    def encode(tiles: Tensor) -> Tensor:
        with accelerator.autocast():
            return encoder.features(tiles)[0]

    how = TileEncoder(encode, sizes["image_size"], accelerator.device, args.batch_size, args.workers)
    return [np.concatenate(list(encode_slice(how, one))) for one in slices]


def as_images(one: dataset.SliceData, features: np.ndarray, part: str) -> dict[str, Any]:
    """What the cheap rows read of the spots of a part: features, places, pitch, log depth."""
    rows = one.rows_of(part)
    return {
        "features": features[rows],
        "xy": one.xy_fullres_px[rows],
        "pitch": one.pitch_fullres_px,
        "log_depth": np.log(one.total_counts[rows]),
    }
