"""The rows of accuracy.py: every predictor of the same test spots and genes, in the scale of Pearson residuals.

Shapes: S spots of a slice, G genes, C width of the encoder's pooled feature.
"""

from __future__ import annotations

import json
from argparse import Namespace
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from benchmarks import accuracy_diagnostics, st_net
from benchmarks.accuracy_run import PRETRAINED, Run, digest, weights_key
from benchmarks.accuracy_table import CHEAP
from model.image_encoder import ImageEncoder
from model.stage_one import StageOne, StageOneSizes
from utils.evaluation import baselines, bootstrap, expression, metrics
from utils.evaluation.gallery import top_k
from utils.evaluation.ridge import RANKS, fit_ridge, validation_pcc
from utils.features import cache, dataset
from utils.files.arrays import ArrayStore
from utils.training import checkpoint, loop, split

SCALE = "residuals"
NORMALISATIONS = {"half": (0.5,) * 6, "imagenet": (0.485, 0.456, 0.406, 0.229, 0.224, 0.225)}  # mean, std
KEPT = (*CHEAP, "ridge_scales")  # rows that do not depend on the seed
N_PROFILES = 50  # that a image's profile is averaged from, as in BLEEP (Xie et al. 2023)


class Row(NamedTuple):
    """Predictions (S, G) per slice, and of what."""

    spots: list[str]
    genes: list[str]
    values: list[np.ndarray]


def check_rows(rows: Mapping[str, Row]) -> None:
    """Raises ValueError where a row is not of the spots and genes of the first."""
    (first, reference), *others = rows.items()
    for name, row in others:
        for what, own, expected in (("spots", row.spots, reference.spots), ("genes", row.genes, reference.genes)):
            if own != expected:
                raise ValueError(
                    f"row {name}: expected the {len(expected)} {what} of row {first} in their order, found {len(own)} "
                    f"({len(set(own) & set(expected))} shared); run with another --out"
                )


class Tissue:
    """Slices of a fold: what all rows see and are judged by."""

    def __init__(self, args: Any):
        rows, _ = split.read_split(args)  # whose warnings every script has in its log
        self.slices = dataset.load_slices(rows, args, ("target", "input"), args.val_strip)
        self.genes = self.slices[0].panels["target"].genes
        self.targets = {one.name: self.residuals(one) for one in self.slices}
        self.test = [one for one in self.slices if len(one.rows_of("test"))]
        self.taught = [one for one in self.slices if not len(one.rows_of("test"))]
        several = len(self.test) > 1
        self.spots = [f"{one.name}:{b}" if several else str(b) for one in self.test for b in one.barcodes]
        self.measured = [
            expression.MeasuredSlice(
                name=one.name,
                counts=one.panels["target"].read_counts(),
                total_counts=one.total_counts,
                measured=one.panels["target"].measured,
            )
            for one in self.test
        ]
        self.blocks = [bootstrap.blocks(one.xy_fullres_px, one.pitch_fullres_px) for one in self.test]

    @staticmethod
    def residuals(one: dataset.SliceData) -> np.ndarray:
        """(S, G), NaN where the slice lacks a gene."""
        panel = one.panels["target"]
        return np.where(panel.measured, metrics.to_scale(SCALE, panel.read_counts(), one.total_counts), np.nan)

    def images(self, found: Sequence[np.ndarray], part: str) -> list[dict[str, Any]]:
        """Standardised features (S, C) of all slices as the cheap rows read the spots of a part, with targets."""
        seen = [
            cache.as_images(one, own, part) | {"target": self.targets[one.name][one.rows_of(part)]}
            for one, own in zip(self.slices, found, strict=True)
        ]
        return [one for one in seen if len(one["target"])]

    def row(self, values: Sequence[np.ndarray]) -> Row:
        return Row(self.spots, self.genes, list(values))


def pretrained(args: Any, crop_scales: Sequence[float]) -> ImageEncoder:
    """The image encoder as stage one finds it; `args` are the flags of train_mymodel.py."""
    loop.seed_everything(args.seed)
    weights = cache.read_image_weights(args.image_weights, "--image_weights")
    return ImageEncoder(args.image_encoder, args.image_size, args.width, weights, crop_scales=crop_scales)


def write_pretrained(source: Path, target: Path, args: Any) -> None:
    """Copy of a stage-one checkpoint with the image encoder as it was before: the trunk, and fresh projections."""
    state, encoder = checkpoint.load(source, "stage_one", "--encoder"), pretrained(args, args.crop_scales)
    state["model"] |= {f"image_encoder.{name}": tensor for name, tensor in encoder.state_dict().items()}
    checkpoint.save(target, **{name: value for name, value in state.items() if name != "format"})


def turned(tiles: Tensor) -> list[Tensor]:
    """The eight turns and flips of tiles (B, 3, Z, Z), first as they are."""
    quarters = [torch.rot90(tiles, k, (2, 3)) for k in range(4)]
    return quarters + [quarter.flip(3) for quarter in quarters]


def pooled(
    encoder: ImageEncoder, tissue: Tissue, accelerator: Any, args: Any, folder: Path | None = None, key: str = ""
) -> tuple[list, list]:
    """Features (S, C) of every slice, standardised in it: of the tiles, and averaged over their turns and flips.

    They are kept in a `folder`, if given, for a `key` that says how they come about.
    """

    def encode(tiles: Tensor) -> Tensor:
        with accelerator.autocast():
            views = torch.stack([encoder.features(view)[0].float() for view in turned(tiles)])
        return torch.stack([views[0], views.mean(0)], dim=1)

    encoder = encoder.to(accelerator.device).eval()
    how = cache.TileEncoder(encode, args.image_size, accelerator.device, args.batch_size, args.workers)
    found = []
    for one in tissue.slices:
        if folder is None:
            found.append(np.concatenate(list(cache.encode_slice(how, one))))
        else:
            key_of_slice = f"{key} {one.pack.content}"
            found.append(cache.kept_features(folder, key_of_slice, one, partial(cache.encode_slice, how, one)))
    one_way, averaged = ([baselines.standardise(f[:, i].astype(np.float32)) for f in found] for i in (0, 1))
    return one_way, averaged


def fit_turns_lowrank(tissue: Tissue, averaged: list[np.ndarray]) -> tuple[float, list[np.ndarray]]:
    """Ridge on the averaged features and their rings, along few components of the target where that is better:
    validation PCC, predictions of the test slices."""
    train, val, test = (tissue.images(averaged, part) for part in ("train", "val", "test"))
    x_train, x_val = ([baselines.rings(p) for p in part] for part in (train, val))
    y_train = [np.nan_to_num(p["target"]) for p in train]  # a gene not measured is at its expectation, 0
    fitted = fit_ridge(x_train, y_train, x_val, [p["target"] for p in val], ranks=RANKS)
    return fitted.val_pcc, [fitted.predict(baselines.rings(image)) for image in test]


def fit_on(tissue: Tissue, one_way: list, averaged: list) -> dict[str, tuple[float, list[np.ndarray]]]:
    """Cheap rows on one set of features: row -> validation PCC, predictions of the test slices."""
    train, val, test = (tissue.images(one_way, part) for part in ("train", "val", "test"))
    found = {
        name: (
            validation_pcc([predict(p) for p in val], [p["target"] for p in val]),
            [predict(p) for p in test],
        )
        for name, predict in baselines.fit_baselines(train, val).items()
    }
    return found | {"ridge_turns_lowrank": fit_turns_lowrank(tissue, averaged)}


def cheap_rows(run: Run, tissue: Tissue, accelerator: Any, args: Any) -> tuple[dict[str, list[np.ndarray]], dict]:
    """Predictions of each cheap row, and of `ridge_scales`, ridge_turns_lowrank on what stage one sees of a tile
    (`--crop_scales`); and the input normalisation with which each did best on validation."""
    best: dict[str, tuple[float, list[np.ndarray]]] = {}
    choice: dict[str, str] = {}
    for scales in ([1.0], args.crop_scales):
        encoder = pretrained(args, scales)
        own = torch.cat([encoder.mean, encoder.std]).flatten().tolist()
        tried = {"own": own} | {name: list(v) for name, v in NORMALISATIONS.items() if not np.allclose(v, own)}
        for name, values in tried.items():
            encoder.mean.copy_(torch.tensor(values[:3]).view(3, 1, 1))
            encoder.std.copy_(torch.tensor(values[3:]).view(3, 1, 1))
            what = f"{scales} {name}"
            key = digest(what, args.image_encoder, args.image_size, weights_key(str(args.image_weights)))
            found = pooled(encoder, tissue, accelerator, args, run.args.out / "pretrained" / what.replace(" ", ""), key)
            fitted = (
                fit_on(tissue, *found) if scales == [1.0] else {"ridge_scales": fit_turns_lowrank(tissue, found[1])}
            )
            for row, result in fitted.items():
                if row not in best or result[0] > best[row][0]:
                    best[row], choice[row] = result, name
    return {row: best[row][1] for row in KEPT}, choice


def kept_cheap_rows(run: Run, tissue: Tissue, accelerator: Any, args: Any) -> tuple[dict[str, list[np.ndarray]], dict]:
    """The same from FOLD/baselines.npz, where it was made of the same data: they do not depend on the seed."""
    path = run.fold_folder / "baselines.npz"
    args = Namespace(**vars(args) | {"seed": 0})  # of an encoder without weights
    key = digest(
        run.data_key, [step.settings for step in run.prepare], args.image_encoder, args.image_size, args.crop_scales
    )
    ends = np.cumsum([len(one.barcodes) for one in tissue.test])[:-1]
    if path.exists():
        with np.load(path) as file:
            if str(file["key"]) == key:
                return {row: np.split(file[row], ends) for row in KEPT}, json.loads(str(file["choice"]))
    rows, choice = cheap_rows(run, tissue, accelerator, args)
    part = path.with_name(path.name + ".part")
    with part.open("wb") as out:
        values = {row: np.concatenate(found) for row, found in rows.items()}
        np.savez(out, key=key, choice=json.dumps(choice), **values)
    part.replace(path)
    return rows, choice


def weighted_profiles(image: np.ndarray, gene: np.ndarray, values: np.ndarray, scale: float) -> np.ndarray:
    """Mean of the train values (N, G) over each image's most similar train profiles, weights softmax(scale * cosine).

    Shapes: unit vectors (S, D) of images, (N, D) of profiles -> (S, G).
    """
    cosine, near = top_k(torch.from_numpy(image), torch.from_numpy(gene), min(N_PROFILES, len(gene)))
    weights = (cosine.double() * scale).softmax(1).numpy()
    return np.stack([w @ values[rows] for w, rows in zip(weights, near.numpy(), strict=True)])


def read_row(folder: Path) -> Row:
    """The model's predictions as decoder_similarity.py wrote them, split by slice."""
    import anndata

    adata = anndata.read_h5ad(folder / "predictions.h5ad")
    slices = adata.obs["slice"].to_numpy(str)
    _, first = np.unique(slices, return_index=True)
    return Row(list(adata.obs_names), list(adata.var_names), np.split(np.asarray(adata.X), np.sort(first)[1:]))


def stronger_rows(run: Run, tissue: Tissue, model: Any, encoded: dict, accelerator: Any, args: Any) -> dict[str, Row]:
    _, averaged = pooled(model.image_encoder, tissue, accelerator, args)
    tuned = fit_turns_lowrank(tissue, averaged)[1]
    targets = [tissue.targets[one.name] for one in tissue.taught]
    values = [target[one.rows_of("train")] for one, target in zip(tissue.taught, targets, strict=True)]
    profiles = np.nan_to_num(np.concatenate(values))
    gene = np.concatenate([pairs.gene for pairs in encoded["train"]])
    scale = model.contrast.logit_scale.exp().item()
    return {
        "ridge_tuned": tissue.row(tuned),
        "st_net": tissue.row(
            st_net.fit_predict(
                pretrained(args, args.crop_scales), tissue.taught, targets, tissue.test, accelerator, args
            )
        ),
        "retrieval": tissue.row([weighted_profiles(p.image, gene, profiles, scale) for p in encoded["test"]]),
        "stage_two_pretrained": read_row(run.similarity(PRETRAINED)),
    }


def encode_all(model: Any, tissue: Tissue, accelerator: Any, args: Any) -> dict[str, list[cache.EncodedPairs]]:
    """Images and profiles of the train and test spots in the shared space; tokens of the test spots, too."""
    store = ArrayStore(args.memory, args.out)
    return {
        part: [
            cache.encode_pairs(model, one, one.bins(), one.rows_of(part), accelerator, args, tokens)
            for one in tissue.slices
            if len(one.rows_of(part))
        ]
        for part, tokens in (("train", None), ("test", store))
    }


def all_rows(run: Run, tissue: Tissue, accelerator: Any, args: Any) -> tuple[dict[str, Row], dict[str, Any]]:
    """Cheap and stronger rows, and what the run tells of itself."""
    cheap, choice = kept_cheap_rows(run, tissue, accelerator, args)
    state = checkpoint.load(run.encoder, "stage_one", "--encoder")
    model = StageOne(StageOneSizes(**state["sizes"]))
    checkpoint.fit(model, state["model"], run.encoder, "--encoder")
    model = model.to(accelerator.device).eval()
    encoded = encode_all(model, tissue, accelerator, args)
    before = cache.pretrained_features(ImageEncoder, state, state["settings"], tissue.taught, accelerator, args)
    before = [f[rows] for one, f in zip(tissue.taught, before, strict=True) if len(rows := one.rows_of("train"))]
    told = accuracy_diagnostics.of_stage_one(encoded, before, model, accelerator, args.seed)
    rows = {name: tissue.row(values) for name, values in cheap.items()}
    rows |= stronger_rows(run, tissue, model, encoded, accelerator, args)
    return rows, told | {"input_normalisation": choice}
