"""Features of a frozen image encoder: computed once per tile, kept on disk, standardised per slice, with neighbours.

Letters: S spots, T tokens of a tile, D feature width, N context spots.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from utils.slices.tiles import write_record
from utils.training import checkpoint, datasets
from utils.training.augment import to_float
from utils.training.loop import seed_everything

MIN_SPOTS = 64  # under so many tiles a slice's own statistics are too rough
MIN_SD = 1e-3
CONTEXT_PITCHES = 2.6

Encode = Callable[[Tensor], Tensor]  # tiles (B, 3, Z, Z) in 0..1 -> features (B, ...)


def read_image_weights(text: str, flag: str) -> Any:
    """--image_weights: "timm" for the hub's, None for none, else the tensors of a file."""
    if text == "timm":
        return "timm"
    return None if text == "none" else checkpoint.read_weights(Path(text), flag)


@dataclass
class EncodedPairs:
    """Unit vectors (S, D) and tokens (S, P, D), (S, K, D) of pictures and profiles of one slice, by batch of spots."""

    image: list[Tensor]
    gene: list[Tensor]
    image_tokens: list[Tensor]
    gene_tokens: list[Tensor]

    def vectors(self) -> tuple[np.ndarray, np.ndarray]:
        return torch.cat(self.image).cpu().numpy(), torch.cat(self.gene).cpu().numpy()


@torch.no_grad()
def encode_pairs(
    model: Any, one: datasets.SliceData, bins: np.ndarray, rows: np.ndarray, accelerator: Any, args: Any
) -> EncodedPairs:
    """Every picture and profile of the rows once: bins (S, G) of the whole slice, rows (n,) of it."""
    spots = np.column_stack([np.zeros_like(rows), rows])
    batches = datasets.TileBatches([one], spots, {"bins": bins[rows]})
    found = EncodedPairs([], [], [], [])
    for batch in datasets.loader(batches, datasets.in_turn(len(rows), args.batch_size), args.workers):
        with accelerator.autocast():
            tiles = to_float(batch["tiles"].to(accelerator.device), model.sizes.image_size)
            image, image_tokens = model.encode_images(tiles)
            gene, gene_tokens = model.encode_genes(batch["bins"].to(accelerator.device))
        for kept, new in zip(
            (found.image, found.gene, found.image_tokens, found.gene_tokens),
            (image, gene, image_tokens, gene_tokens),
            strict=True,
        ):
            kept.append(new)
    return found


@torch.no_grad()
def encode_slice(
    encode: Encode, one: datasets.SliceData, size: int, device: torch.device, batch_size: int, workers: int
) -> np.ndarray:
    """Features of all tiles of a slice, in its order: (S, ...) float32."""
    batches = datasets.TileBatches([one], datasets.all_spots(one))
    order = datasets.in_turn(len(batches), batch_size)
    done = []
    with tqdm(total=len(batches), desc=f"{one.name}: features", unit="spot", disable=None) as bar:
        for batch in datasets.loader(batches, order, workers):
            done.append(encode(to_float(batch["tiles"].to(device), size)).float().cpu().numpy())
            bar.update(len(done[-1]))
    return np.concatenate(done)


def kept_features(folder: Path, key: str, one: datasets.SliceData, compute: Callable[[], np.ndarray]) -> np.ndarray:
    """Features (S, 1 + T, D) float16 from `folder`, computed and written where they are missing or of another key."""
    path, note = folder / f"{one.name}.npy", folder / f"{one.name}.json"
    record = {"key": key, "barcodes": one.barcodes.tolist()}
    if path.exists() and note.exists() and json.loads(note.read_text()) == record:
        return np.load(path, mmap_mode="r")
    features = compute().astype(np.float16)
    path.parent.mkdir(parents=True, exist_ok=True)
    note.unlink(missing_ok=True)
    part = path.with_name(path.name + ".part")
    with part.open("wb") as file:
        np.save(file, features)
    part.replace(path)
    write_record(note, record)
    return features


@dataclass(frozen=True)
class Moments:
    """Mean and deviation of the vector (row 0) and of the tokens (row 1): (2, D) each."""

    mean: np.ndarray
    sd: np.ndarray


def moments(features: list[np.ndarray]) -> Moments:
    """Over all spots of the given slices (S, 1 + T, D); tokens share one mean and deviation over their places."""
    vectors = np.concatenate([f[:, 0] for f in features]).astype(np.float64)
    tokens = np.concatenate([f[:, 1:].reshape(-1, f.shape[-1]) for f in features]).astype(np.float64)
    mean = np.stack([vectors.mean(0), tokens.mean(0)])
    sd = np.stack([vectors.std(0), tokens.std(0)])
    return Moments(mean.astype(np.float32), np.maximum(sd, MIN_SD).astype(np.float32))


def slice_moments(features: np.ndarray, name: str, train: Moments) -> Moments:
    """The slice's own; those of the train slices where it has too few tiles, with a warning."""
    if len(features) >= MIN_SPOTS:
        return moments([features])
    print(f"warning: {name} has {len(features)} tiles, under {MIN_SPOTS}: standardised by the train slices' statistics")
    return train


def neighbours(xy_px: np.ndarray, pitch_px: float, n: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The n nearest other spots within 2.6 pitches: index (S, n), offset (S, n, 2) in pitches, present (S, n)."""
    from scipy.spatial import cKDTree

    reach = CONTEXT_PITCHES * pitch_px
    if n == 0:
        return np.zeros((len(xy_px), 0), int), np.zeros((len(xy_px), 0, 2), np.float32), np.zeros((len(xy_px), 0), bool)
    index = np.asarray(cKDTree(xy_px).query(xy_px, k=np.arange(1, n + 2), distance_upper_bound=reach)[1])
    own = index == np.arange(len(xy_px))[:, None]
    own[~own.any(1), 0] = True  # a spot on top of many others may not find itself
    index = index[~own].reshape(len(xy_px), n)
    present = index < len(xy_px)
    index = np.where(present, index, 0)
    offset = (xy_px[index] - xy_px[:, None]) / pitch_px
    return index, np.where(present[..., None], offset, 0).astype(np.float32), present


class FeatureBank:
    """Features of several slices on one device, given out by batches, standardised, with the context of each spot.

    Spots are numbered through all slices in order; `first[i]` is the number of slice i's first spot.
    """

    def __init__(
        self,
        slices: list[datasets.SliceData],
        features: list[np.ndarray],
        train: Moments,
        context: int,
        device: torch.device,
    ):
        own = [slice_moments(f, one.name, train) for one, f in zip(slices, features, strict=True)]
        self.first = np.cumsum([0, *(len(f) for f in features)])
        around = [neighbours(one.xy_fullres_px, one.pitch_fullres_px, context) for one in slices]
        numbered = [index + start for (index, _, _), start in zip(around, self.first, strict=False)]

        def put(array: np.ndarray) -> Tensor:
            return torch.from_numpy(np.ascontiguousarray(array)).to(device)

        self.features = put(np.concatenate(features).astype(np.float16))
        self.slice_of = put(np.repeat(np.arange(len(slices)), np.diff(self.first)))
        self.mean, self.sd = put(np.stack([m.mean for m in own])), put(np.stack([m.sd for m in own]))
        self.index = put(np.concatenate(numbered))
        self.offset = put(np.concatenate([offset for _, offset, _ in around]))
        self.present = put(np.concatenate([present for _, _, present in around]))

    def vectors(self, spots: Tensor) -> Tensor:
        """Standardised vectors of spots of any shape (...,) -> (..., D) float32."""
        of = self.slice_of[spots]
        return (self.features[spots, 0].float() - self.mean[of, 0]) / self.sd[of, 0]

    def batch(self, spots: Tensor) -> dict[str, Tensor]:
        """Spot numbers (B,) -> what GeneDecoder takes: vector, tokens, context, offsets, present."""
        of = self.slice_of[spots]
        tokens = (self.features[spots, 1:].float() - self.mean[of, 1][:, None]) / self.sd[of, 1][:, None]
        present = self.present[spots]
        context = self.vectors(self.index[spots]) * present[..., None]
        return {
            "vector": self.vectors(spots),
            "tokens": tokens,
            "context": context,
            "offsets": self.offset[spots],
            "present": present,
        }


def domain_vectors(slices: list[datasets.SliceData], features: list[np.ndarray], part: str) -> Any:
    """Vectors before standardisation of all spots of a part: (n, D) float32 tensor."""
    rows = [f[one.rows_of(part), 0].astype(np.float32) for one, f in zip(slices, features, strict=True)]
    return torch.from_numpy(np.concatenate(rows))


@torch.no_grad()
def predict(model: Any, bank: FeatureBank, spots: np.ndarray, accelerator: Any, batch_size: int) -> np.ndarray:
    """Expression (n, G) in the target's units of spot numbers (n,) of the bank."""
    done = []
    for start in range(0, len(spots), batch_size):
        chosen = torch.from_numpy(spots[start : start + batch_size]).to(accelerator.device)
        with accelerator.autocast():
            done.append(model.predict(bank.batch(chosen)).cpu().numpy())
    return np.concatenate(done)


def untouched_features(
    encoder_class: Any,
    state: dict[str, Any],
    settings: dict[str, Any],
    slices: list[datasets.SliceData],
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
    encoder = encoder_class(sizes["image_encoder"], sizes["image_size"], sizes["width"], weights)
    encoder = encoder.to(accelerator.device).eval()

    def encode(tiles: Tensor) -> Tensor:
        with accelerator.autocast():
            return encoder.features(tiles)[0]

    size = sizes["image_size"]
    return [encode_slice(encode, one, size, accelerator.device, args.batch_size, args.workers) for one in slices]


def as_pictures(one: datasets.SliceData, features: np.ndarray, part: str) -> dict[str, Any]:
    """What the cheap rows read of the spots of a part: features, places, pitch, log depth."""
    rows = one.rows_of(part)
    return {
        "features": features[rows],
        "xy": one.xy_fullres_px[rows],
        "pitch": one.pitch_fullres_px,
        "log_depth": np.log(one.total_counts[rows]),
    }
