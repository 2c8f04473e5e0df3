"""Prediction of one slide by one model or several: kept features, neighbours, mean and spread, out-of-domain score.

Letters: S spots, R views of a tile, V vectors and T tokens of a view, D feature width, G genes.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from utils import distributed
from utils.features import cache, neighbourhoods
from utils.files.arrays import ArrayStore
from utils.images import tiles
from utils.images.image import TissueImage
from utils.prediction import slide_features
from utils.prediction.layout import SlideSpots

ALIKE = 1.02  # a image that is coarser than the model's tiles by more is enlarged with a warning


@dataclass(frozen=True)
class Member:
    """A model of stage two on its device, and what its checkpoint says of it."""

    model: Any
    state: dict[str, Any]
    file_hash: str

    @property
    def tile_px(self) -> int:
        return self.state["tile_scale"][0]

    @property
    def um_per_px(self) -> float:
        return self.state["tile_scale"][1]

    @property
    def encoder(self) -> str:
        """Models of which this is the same share features."""
        return f"{self.state['encoder_hash']} {self.tile_px} px of {self.um_per_px} um, {self.model.sizes.tta} turns"


@dataclass(frozen=True)
class Run:
    """What a slide is predicted with; `score` is model.stage_two.domain_score, `spread` asks for the turned views."""

    members: list[Member]
    score: Any
    accelerator: Any
    precision: str
    batch_size: int
    workers: int | None
    memory: float
    spread: bool


@dataclass(frozen=True)
class Found:
    """What models say of a slide."""

    predicted: np.ndarray  # (S, G), mean over members
    spread: np.ndarray | None  # (S, G), deviation over members or turned views
    domain_score: np.ndarray  # (S,)
    domain_limit: float  # 99 % of the validation spots lie below


def tile_side(member: Member, spots: SlideSpots) -> float:
    """Side of a tile in pixels of the image."""
    return member.tile_px * member.um_per_px * spots.image_scale / spots.um_per_fullres_px


def warn_if_coarse(member: Member, spots: SlideSpots) -> None:
    enlarged = member.tile_px / tile_side(member, spots)
    if enlarged > ALIKE:
        print(
            f"warning: {spots.name}: {enlarged * member.um_per_px:.3g} um per px, the model's tiles have "
            f"{member.um_per_px:.3g}: they are enlarged {enlarged:.1f} times, which shows no finer detail"
        )


def kept_features(run: Run, member: Member, image: TissueImage, spots: SlideSpots, out: Path) -> np.ndarray:
    """Features (S, R, V + T, D) mapped from `out`, where an interrupted run has left them, or computed."""
    model, autocast = member.model, run.accelerator.autocast

    def in_precision(encode: Any, *inputs: Any) -> Any:
        with autocast():
            return encode(*inputs)

    turned = partial(in_precision, model.encode_turned) if run.spread else None
    views = slide_features.views_of(partial(in_precision, model.encode), turned)
    how = cache.TileEncoder(views, model.sizes.image_size, run.accelerator.device, run.batch_size, run.workers)
    side_px = tile_side(member, spots)

    def compute() -> Any:
        warn_if_coarse(member, spots)
        cut = tiles.Cut("fullres", image.path.name, member.um_per_px, side_px, member.tile_px, resampled=True)
        batches = tiles.cut_tiles(image, spots.xy_image_px, cut, run.batch_size, run.workers)
        return slide_features.encode_stream(how, batches, len(spots.barcodes), spots.name)

    source = f"{side_px:.9g} px of {slide_features.fingerprint([image.path])} at {slide_features.spots_hash(spots)}"
    key = f"{member.encoder} {run.accelerator.mixed_precision} spread {run.spread}, {source}"
    folder = out / f"{member.state['encoder_hash'][:16]}_{member.tile_px}_{model.sizes.tta}"
    one: Any = spots  # has what is looked at of a slice
    return cache.kept_features(folder, key, one, compute)


def predict_view(run: Run, member: Member, kept: np.ndarray, spots: SlideSpots, memory: ArrayStore) -> np.ndarray:
    """Of features of one view (S, V + T, D): (S, G). What it takes of the memory is free again afterwards."""
    model, budget = member.model, ArrayStore(memory.left / 2**30, memory.folder)
    moments = neighbourhoods.Moments(*(member.state["feature_moments"][key].numpy() for key in ("mean", "sd")))
    one: Any = spots  # has what is looked at of a slice
    around = (model.sizes.context, model.sizes.bandwidths)
    bank = neighbourhoods.FeatureBank([one], [kept], moments, *around, run.accelerator.device, budget)
    autocast = partial(distributed.decoder_autocast, run.accelerator, run.precision)
    return neighbourhoods.predict(model, bank, np.arange(len(spots.barcodes)), autocast, run.batch_size)


def predict_slide(run: Run, image: TissueImage, spots: SlideSpots, out: Path) -> Found:
    """Each member's own prediction enters the mean; with `run.spread` the eight turned views give the spread instead of
    the members."""
    memory = ArrayStore(run.memory, out)
    own, turned = slide_features.Spread(memory), slide_features.Spread(memory)
    score, limit, n = np.zeros(len(spots.barcodes)), 0.0, len(run.members)
    for member in run.members:
        kept = kept_features(run, member, image, spots, out)
        for view in range(kept.shape[1]):
            (turned if view else own).add(predict_view(run, member, kept[:, view], spots, memory))
        domain = member.state["domain"]
        score += slide_features.domain_scores(kept, domain, member.model.n_vectors, run.score) / n
        limit += float(domain["quantiles"][-1]) / n
    return Found(own.mean, turned.deviation if run.spread else own.deviation, score, limit)
