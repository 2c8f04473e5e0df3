"""The methods that accuracy.py compares: predictions of the same test spots and genes, as Pearson residuals.

Letters: S spots of a slice, G genes, C width of the encoder's pooled feature, B batch, Z tile side in pixels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

import get_accuracy_image
from benchmarks import st_net
from benchmarks.accuracy_run import PRETRAINED, Run
from benchmarks.accuracy_table import BASELINES
from model.image_encoder import ImageEncoder
from model.stage_one import StageOne
from utils import distributed
from utils.evaluation import baselines, metrics
from utils.evaluation.gallery import top_k
from utils.evaluation.ridge import RANKS, fit_ridge, validation_pcc
from utils.features import cache, dataset
from utils.training import checkpoint, split

if TYPE_CHECKING:
    from accelerate import Accelerator

    from utils.settings import StageOneSettings as Settings

SCALE = "residuals"
NORMALISATIONS = {"half": (0.5,) * 6, "imagenet": (0.485, 0.456, 0.406, 0.229, 0.224, 0.225)}  # mean, std
N_PROFILES = 50  # that a tile's prediction by retrieval is averaged from, as in BLEEP (Xie et al. 2023)

Predictions = list[np.ndarray]  # (S, G) of each test slice


class Table(NamedTuple):
    """Predictions of a method, and the spots and genes that they are of."""

    spots: list[str]
    genes: list[str]
    values: Predictions


class Tissue:
    """Slices of a fold: what all methods see and are scored on."""

    def __init__(self, settings: Settings):
        rows, _ = split.read_split(settings)  # its warnings are in the log of every script
        self.slices = dataset.load_slices(rows, settings, ("target", "input"), settings.val_strip)
        self.genes = self.slices[0].panels["target"].genes
        self.targets = [self.residuals(slice_) for slice_ in self.slices]
        self.test = [slice_ for slice_ in self.slices if len(slice_.rows_of("test"))]
        pairs = zip(self.slices, self.targets, strict=True)
        self.learning = [(slice_, target) for slice_, target in pairs if not len(slice_.rows_of("test"))]
        several = len(self.test) > 1
        self.spots = [f"{s.name}:{b}" if several else str(b) for s in self.test for b in s.barcodes]

    @staticmethod
    def residuals(slice_: dataset.SliceData) -> np.ndarray:
        """(S, G), NaN where the slice lacks a gene."""
        panel = slice_.panels["target"]
        return np.where(panel.measured, metrics.to_scale(SCALE, panel.read_counts(), slice_.total_counts), np.nan)

    def of_part(self, part: str, per_slice: Sequence[np.ndarray]) -> list[np.ndarray]:
        """The spots of a part of every slice that has any: (S, ...) of all slices -> (n, ...) of each."""
        rows = [slice_.rows_of(part) for slice_ in self.slices]
        return [values[chosen] for values, chosen in zip(per_slice, rows, strict=True) if len(chosen)]

    def images(self, features: Sequence[np.ndarray], part: str) -> list[baselines.Slice]:
        """Spots of a part as the baselines read them, with features (S, C) standardised in each slice."""
        images = []
        standardised = baselines.standardise(features, len(features))
        for slice_, values, target in zip(self.slices, standardised, self.targets, strict=True):
            if len(rows := slice_.rows_of(part)):
                of_part = baselines.images_of(values, slice_.xy_fullres_px, slice_.pitch_fullres_px, rows)
                log_depth = np.log(slice_.total_counts[rows])
                images.append(baselines.Slice(**of_part, log_depth=log_depth, target=target[rows]))
        return images

    def table(self, values: Predictions) -> Table:
        return Table(self.spots, self.genes, values)


def check_tables(tables: Mapping[str, Table]) -> None:
    """Raises ValueError where a method did not predict the spots and genes of the first."""
    (first, reference), *others = tables.items()
    for name, table in others:
        for what, labels, expected in (
            ("spots", table.spots, reference.spots),
            ("genes", table.genes, reference.genes),
        ):
            if labels != expected:
                raise ValueError(
                    f"method {name}: expected the {len(expected)} {what} of {first} in their order, found "
                    f"{len(labels)} ({len(set(labels) & set(expected))} shared); run with another --out"
                )


# ---- the image encoder before stage one


def pretrained(settings: Settings, crop_scales: Sequence[float], seed: int) -> ImageEncoder:
    """The image encoder as stage one finds it; the seed draws its weights where it has none."""
    distributed.seed_everything(seed)
    weights = cache.read_image_weights(settings.image_weights, "--image_weights")
    return ImageEncoder(
        settings.image_encoder, settings.image_size, settings.width, weights, crop_scales=list(crop_scales)
    )


def write_pretrained(source: Path, target: Path, settings: Settings) -> None:
    """Copy of a stage-one checkpoint with the image encoder as it was before: the trunk, and fresh projections."""
    state = checkpoint.load(source, "stage_one", "--encoder")
    encoder = pretrained(settings, settings.crop_scales, settings.seed)
    state["model"] |= {f"image_encoder.{name}": tensor for name, tensor in encoder.state_dict().items()}
    checkpoint.save(target, **{name: value for name, value in state.items() if name != "format"})


def dihedral(tiles: Tensor) -> list[Tensor]:
    """The eight rotations and reflections of tiles (B, 3, Z, Z), first as they are."""
    quarters = [torch.rot90(tiles, k, (2, 3)) for k in range(4)]
    return quarters + [quarter.flip(3) for quarter in quarters]


def pooled(
    encoder: ImageEncoder, tissue: Tissue, accelerator: Accelerator, settings: Settings
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Features (S, C) float32 of every slice: of the tiles, and averaged over their rotations and reflections."""

    def encode(tiles: Tensor) -> Tensor:
        with accelerator.autocast():
            views = torch.stack([encoder.features(view)[0].float() for view in dihedral(tiles)])
        return torch.stack([views[0], views.mean(0)], dim=1)

    encoder = encoder.to(accelerator.device).eval()
    how = cache.TileEncoder(encode, settings.image_size, accelerator.device, settings.batch_size, settings.workers)
    features = [np.concatenate(list(cache.encode_slice(how, slice_))) for slice_ in tissue.slices]
    return [values[:, 0] for values in features], [values[:, 1] for values in features]


# ---- baselines


def fit_ridge_tta(tissue: Tissue, averaged: Sequence[np.ndarray]) -> tuple[float, Predictions]:
    """Ridge on averaged features and their rings, along few components of the target where validation prefers it:
    validation PCC, predictions of the test slices."""
    train, val, test = (tissue.images(averaged, part) for part in ("train", "val", "test"))
    x_train, x_val = ([image["rings"] for image in part] for part in (train, val))
    y_train = [np.nan_to_num(image["target"]) for image in train]  # a gene not measured is at its expectation, 0
    fitted = fit_ridge(x_train, y_train, x_val, [image["target"] for image in val], ranks=RANKS)
    return fitted.val_pcc, [fitted.predict(image["rings"]) for image in test]


def fit_baselines(
    tissue: Tissue, features: Sequence[np.ndarray], averaged: Sequence[np.ndarray]
) -> dict[str, tuple[float, Predictions]]:
    """Baselines on one set of features: name -> validation PCC, predictions of the test slices."""
    train, val, test = (tissue.images(features, part) for part in ("train", "val", "test"))
    fitted = {}
    for name, predict in baselines.fit_baselines(train, val).items():
        score = validation_pcc([predict(image) for image in val], [image["target"] for image in val])
        fitted[name] = score, [predict(image) for image in test]
    return fitted | {"ridge_tta_lowrank": fit_ridge_tta(tissue, averaged)}


def predict_baselines(tissue: Tissue, accelerator: Accelerator, settings: Settings) -> dict[str, Predictions]:
    """Predictions of each baseline and of `ridge_scales` (ridge_tta_lowrank on both --crop_scales), each with the input
    normalisation that is best on validation."""
    best: dict[str, tuple[float, Predictions]] = {}
    for scales in ([1.0], settings.crop_scales):
        encoder = pretrained(settings, scales, seed=0)
        own = torch.cat([encoder.mean, encoder.std]).flatten().tolist()
        tried = [own, *(list(values) for values in NORMALISATIONS.values() if not np.allclose(values, own))]
        for values in tried:
            encoder.mean.copy_(torch.tensor(values[:3]).view(3, 1, 1))
            encoder.std.copy_(torch.tensor(values[3:]).view(3, 1, 1))
            features, averaged = pooled(encoder, tissue, accelerator, settings)
            fitted = (
                fit_baselines(tissue, features, averaged)
                if scales == [1.0]
                else {"ridge_scales": fit_ridge_tta(tissue, averaged)}
            )
            for method, (score, predictions) in fitted.items():
                if method not in best or score > best[method][0]:
                    best[method] = score, predictions
    return {name: best[name][1] for name in (*BASELINES, "ridge_scales")}


# ---- methods on the encoder of stage one


def weighted_profiles(image: np.ndarray, gene: np.ndarray, values: np.ndarray, scale: float) -> np.ndarray:
    """Mean of the train values (N, G) over each image's most similar train profiles, weights softmax(scale * cosine).

    Shapes: unit vectors (S, D) of images, (N, D) of profiles -> (S, G).
    """
    cosine, near = top_k(torch.from_numpy(image), torch.from_numpy(gene), min(N_PROFILES, len(gene)))
    weights = (cosine.double() * scale).softmax(1).numpy()
    return np.stack([w @ values[rows] for w, rows in zip(weights, near.numpy(), strict=True)])


def read_table(folder: Path) -> Table:
    """Predictions as decoder_similarity.py wrote them, split by slice."""
    import anndata

    adata = anndata.read_h5ad(folder / "predictions.h5ad")
    _, first = np.unique(adata.obs["slice"].to_numpy(str), return_index=True)
    return Table(list(adata.obs_names), list(adata.var_names), np.split(np.asarray(adata.X), np.sort(first)[1:]))


def load_stage_one(path: Path, accelerator: Accelerator) -> StageOne:
    state = checkpoint.load(path, "stage_one", "--encoder")
    return get_accuracy_image.load_model(path, state, accelerator.device)


def encode_part(
    model: StageOne, tissue: Tissue, part: str, accelerator: Accelerator, settings: Settings
) -> list[cache.EncodedPairs]:
    """Images and profiles of the spots of a part in the shared space, of every slice that has any."""
    inference = cache.Inference(accelerator, settings.batch_size, settings.workers)
    return [
        cache.encode_pairs(model, slice_, slice_.bins(), slice_.rows_of(part), inference)
        for slice_ in tissue.slices
        if len(slice_.rows_of(part))
    ]


def predict_all(run: Run, tissue: Tissue, accelerator: Accelerator, settings: Settings) -> dict[str, Table]:
    """Tables of all methods but magic; `settings` are those of stage one."""
    predictions = predict_baselines(tissue, accelerator, settings)
    model = load_stage_one(run.encoder(), accelerator)
    train, test = (encode_part(model, tissue, part, accelerator, settings) for part in ("train", "test"))
    _, averaged = pooled(model.image_encoder, tissue, accelerator, settings)
    predictions["ridge_finetuned"] = fit_ridge_tta(tissue, averaged)[1]
    encoder = pretrained(settings, settings.crop_scales, settings.seed)
    predictions["st_net"] = st_net.fit_predict(encoder, tissue.learning, tissue.test, accelerator, settings)
    profiles = np.nan_to_num(np.concatenate(tissue.of_part("train", tissue.targets)))
    gene = np.concatenate([pairs.gene for pairs in train])
    scale = model.contrast.logit_scale.exp().item()
    predictions["retrieval"] = [weighted_profiles(pairs.image, gene, profiles, scale) for pairs in test]
    tables = {name: tissue.table(values) for name, values in predictions.items()}
    return tables | {"stage_two_pretrained": read_table(run.similarity(PRETRAINED))}
