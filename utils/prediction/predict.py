"""Prediction of one slide by one model or several: expression, its deviation, intervals, out-of-domain score.

Shapes: S spots, R views of a tile, V vectors and T tokens of a view, D feature width, G genes.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from utils import distributed
from utils.features import domain, neighbourhoods
from utils.files.arrays import ArrayStore
from utils.images.image import TissueImage
from utils.prediction import slide_features
from utils.prediction.layout import SlideSpots
from utils.prediction.members import Member, Run


@dataclass(frozen=True)
class SlidePrediction:
    """What the members predict of a slide."""

    predicted: np.ndarray  # (S, G), mean over members
    prediction_std: np.ndarray | None  # (S, G), deviation over members or over flipped and rotated tiles
    interval: tuple[np.ndarray, np.ndarray]  # (G,) low and high end, relative to the prediction; means over members
    domain_score: np.ndarray  # (S,) above 1 out of domain
    slide_score: float  # above 1 the slide as a whole is


class RunningMoments:
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
        difference = predicted - self.mean
        self.mean += difference / self.number
        self.squares += difference * (predicted - self.mean)

    @property
    def std(self) -> np.ndarray | None:
        """Of the predictions so far, as a population; None for a single one."""
        return np.sqrt(self.squares / self.number) if self.number > 1 else None


def predict_slide(run: Run, image: TissueImage, spots: SlideSpots, folder: Path) -> SlidePrediction:
    """Mean over the members of their predictions of the tiles as they are. The deviation is over the members, or with
    `run.prediction_std` over the eight flipped and rotated tiles."""
    memory = ArrayStore(run.memory, folder)
    over_members, over_symmetries = RunningMoments(memory), RunningMoments(memory)
    score, slide_score, n = np.zeros(len(spots.barcodes)), 0.0, len(run.members)
    for member in run.members:
        features, statistics = slide_features.kept_features(run, member, image, spots, folder)
        for view in range(features.shape[1]):
            predicted = predict_view(run, member, features[:, view], spots, memory)
            (over_symmetries if view else over_members).add(predicted)
        of_spots, of_slide = domain.scores(statistics, member.state["domain"])
        score += of_spots / n
        slide_score += of_slide / n
    std = over_symmetries.std if run.prediction_std else over_members.std
    intervals = [member.state["interval"] for member in run.members]
    low, high = (np.mean([ends[end].numpy() for ends in intervals], axis=0) for end in ("low", "high"))
    return SlidePrediction(over_members.mean, std, (low, high), score, slide_score)


def predict_view(run: Run, member: Member, features: np.ndarray, spots: SlideSpots, memory: ArrayStore) -> np.ndarray:
    """Of features of one view (S, V + T, D): (S, G). What it takes of the memory is free again afterwards."""
    model, budget = member.model, ArrayStore(memory.left / 2**30, memory.folder)
    moments = neighbourhoods.Moments(*(member.state["feature_moments"][key].numpy() for key in ("mean", "sd")))
    around = (model.sizes.context, model.sizes.bandwidths)
    bank = neighbourhoods.FeatureBank([spots], [features], moments, *around, run.accelerator.device, budget)
    autocast = partial(distributed.decoder_autocast, run.accelerator, run.precision)
    return neighbourhoods.predict(model, bank, np.arange(len(spots.barcodes)), autocast, run.batch_size)
