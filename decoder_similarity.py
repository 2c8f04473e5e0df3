"""Evaluate stage two: how well is the expression of the target genes predicted from the image alone?

    python decoder_similarity.py --decoder decoder_model/best_epoch_weights.pth --part test

Reads the checkpoint, tiles and target genes of the part's slices, and of the train and validation slices for the
baselines on the pretrained encoder. Writes results/similarity/: metrics.json, genes.csv, predictions.h5ad, figures, and
report.html.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from utils import distributed, settings
from utils.files.atomic import write_figure, write_record, write_whole
from utils.files.exclusive import exclusive_folder
from utils.report.tables import expression_lines, leak_note
from utils.training import checkpoint, split
from utils.words import count_of

if TYPE_CHECKING:
    import pandas as pd
    import torch
    from accelerate import Accelerator
    from torch import Tensor

    from model.stage_two import StageTwo
    from utils.evaluation.expression import MeasuredSlice
    from utils.features.dataset import SliceData
    from utils.report.spots import SpotsOnImage

Predictions = dict[str, list[np.ndarray]]  # by method, (S, G) per slice; "model" is the trained one


@dataclass(kw_only=True)
class Settings(settings.EvaluationSettings):
    decoder: Path


@dataclass(frozen=True)
class Measured:
    """What was measured of one slice. A spots of the slice, S of the part, G target genes."""

    spots: SpotsOnImage
    slice: MeasuredSlice
    expression: np.ndarray  # (S, G) in the units of the model's target, NaN for a gene that the slice lacks


def parse_args(argv: list[str] | None = None) -> Settings:
    parser = settings.shared(__doc__, part="test", unused=("seed",))
    group = settings.add_evaluation(parser, out="results/similarity")
    settings.add_memory(parser)
    group.add_argument(
        "--decoder", type=Path, default=Path("decoder_model/best_epoch_weights.pth"), help="checkpoint of stage two"
    )
    return Settings(**vars(parser.parse_args(argv)))


def load_model(path: Path, state: dict[str, Any], device: torch.device) -> StageTwo:
    from model.stage_two import StageTwo, StageTwoSizes

    model = StageTwo(StageTwoSizes(**state["sizes"]))
    checkpoint.fit(model, state["model"], path, "--decoder")
    return model.to(device).eval()


def predict_model(
    model: StageTwo, state: dict[str, Any], slices: list[SliceData], accelerator: Accelerator, args: Settings
) -> list[np.ndarray]:
    """The model's prediction of every spot of the part: (S, G) per slice, in the units of its target.

    Features are computed, used and dropped slice by slice.
    """
    from utils.features import cache, neighbourhoods
    from utils.files import arrays

    def encode(tiles: Tensor) -> Tensor:
        with accelerator.autocast():
            return model.encode(tiles)

    device, around = accelerator.device, (model.sizes.context, model.sizes.bandwidths)
    how = cache.TileEncoder(encode, model.sizes.image_size, device, args.batch_size, args.workers)
    moments = neighbourhoods.Moments(*(state["feature_moments"][key].numpy() for key in ("mean", "sd")))
    autocast, predicted = partial(distributed.decoder_autocast, accelerator, args.precision), []
    for slice_ in slices:
        memory = arrays.ArrayStore(args.memory, args.out)
        features = cache.in_budget(cache.encode_slice(how, slice_), len(slice_.barcodes), memory)
        bank = neighbourhoods.FeatureBank([slice_], [features], moments, *around, device, memory)
        spots = slice_.rows_of(args.part)
        predicted.append(neighbourhoods.predict(model, bank, spots, autocast, args.batch_size))
    return predicted


def predict_baselines(
    state: dict[str, Any],
    slices: list[SliceData],
    trained_on: list[SliceData],
    accelerator: Accelerator,
    args: Settings,
) -> Predictions:
    """Baselines on the pretrained encoder's features, fitted on the slices and the target of the model."""
    from utils.evaluation import baselines, metrics
    from utils.features import cache, neighbourhoods

    several, inference = [*trained_on, *slices], cache.Inference(accelerator, args.batch_size, args.workers)
    features = cache.pretrained_features(state, state["encoder_settings"], several, inference, args.image_weights)
    features = baselines.standardise(features, len(trained_on), neighbourhoods.MIN_SPOTS)
    parts: dict[str, list] = {"train": [], "val": []}
    for slice_, of_slice in zip(trained_on, features, strict=False):
        panel = slice_.panels["target"]
        expression = metrics.to_scale(state["target"], panel.read_counts(), slice_.total_counts)
        target = np.where(panel.measured, expression, np.nan)
        for part, images in parts.items():
            rows = slice_.rows_of(part)
            if len(rows):
                log_depth = np.log(slice_.total_counts[rows])
                of_part = baselines.images_of(of_slice, slice_.xy_fullres_px, slice_.pitch_fullres_px, rows)
                images.append(of_part | {"target": target[rows], "log_depth": log_depth})
    n_spots = sum(len(image["target"]) for image in parts["train"])
    print(f"baselines: fitted on {count_of(n_spots, 'train spot')}", flush=True)
    fitted = baselines.fit_baselines(parts["train"], parts["val"])
    evaluated = zip(slices, features[len(trained_on) :], strict=True)
    images = [
        baselines.images_of(of_slice, slice_.xy_fullres_px, slice_.pitch_fullres_px, slice_.rows_of(args.part))
        for slice_, of_slice in evaluated
    ]
    return {method: [predict(of_slice) for of_slice in images] for method, predict in fitted.items()}


def read_measured(slice_: SliceData, part: str, target: str) -> Measured:
    from utils.evaluation import expression
    from utils.report.spots import spots_on_image

    rows, panel = slice_.rows_of(part), slice_.panels["target"]
    measured = expression.MeasuredSlice(
        name=slice_.name,
        counts=panel.read_counts(),
        total_counts=slice_.total_counts,
        rows=rows,
        measured=panel.measured,
    )
    truth = np.where(panel.measured, expression.truth_of(measured, target), np.nan)
    return Measured(spots_on_image(slice_, rows), measured, truth)


def evaluate(predictions: Predictions, measured: list[Measured], state: dict) -> tuple[dict[str, Any], pd.DataFrame]:
    """The body of metrics.json, and the table of genes."""
    from utils.evaluation import expression

    truth = [of_slice.slice for of_slice in measured]
    metrics = expression.evaluate(predictions, truth, state["target"])
    table = expression.per_gene_table(predictions, truth, state["genes"])
    table.insert(1, "val_pcc", state["val_pcc"].numpy())
    return metrics, table


def draw_figures(out: Path, predictions: Predictions, measured: list[Measured], table: pd.DataFrame, unit: str) -> None:
    """Histogram of the correlations per gene, and maps of each slice's best, median and worst gene."""
    from utils.evaluation import metrics, plotting
    from utils.report.spot_maps import spot_maps

    columns = {method: f"pcc_residuals_{method}" for method in predictions}
    pcc_by_method = {method: table[column].to_numpy() for method, column in columns.items() if column in table}
    histogram = plotting.pcc_histogram(pcc_by_method, "Correlation per gene, Pearson residuals")
    write_figure(out / "pcc_histogram.png", histogram)
    for slice_, predicted in zip(measured, predictions["model"], strict=True):
        scored = metrics.scored_pearson_per_gene(predicted, slice_.expression)
        pcc = np.where(slice_.slice["measured"], scored, np.nan)
        known = np.flatnonzero(np.isfinite(pcc))
        if not len(known):
            continue
        order, name = known[np.argsort(pcc[known])], slice_.spots.name
        for kind, gene in (("best", order[-1]), ("median", order[len(order) // 2]), ("worst", order[0])):
            panels = {"measured": slice_.expression[:, gene], "predicted": predicted[:, gene]}
            title = f"{name}: {table['gene'][gene]}, {kind} gene, PCC {pcc[gene]:.2f}"
            figure = spot_maps(slice_.spots, panels, title, unit)
            write_figure(out / f"map_{name.replace('/', '_')}_{kind}.png", figure)


def write_page(
    path: Path,
    predictions: Predictions,
    measured: list[Measured],
    metrics: dict,
    table: pd.DataFrame,
    state: dict,
    args: Settings,
) -> None:
    """report.html: maps of every gene in the unit of the target, correlations beside mean expression, all methods."""
    from utils.evaluation.metrics import UNITS
    from utils.prediction import trust
    from utils.report import page, page_parts

    maps = [
        page.SliceMaps(
            **vars(slice_.spots),
            predicted=predicted,
            measured=slice_.expression,
        )
        for slice_, predicted in zip(measured, predictions["model"], strict=True)
    ]
    columns = {
        "PCC, residuals": "pcc_residuals_model",
        "validation PCC": "val_pcc",
        "ridge PCC": "pcc_residuals_ridge",
        "mean counts per 10,000": "counts_per_10k",
    }
    report = page.Report(
        title=f"Expression from the image: {args.part} slices{leak_note(metrics)}",
        unit=UNITS[state["target"]],
        genes=state["genes"],
        slices=maps,
        gene_columns={title: table[column].to_numpy() for title, column in columns.items()},
        val_pcc=table["val_pcc"].to_numpy(),
        greys=not trust.shared_patients(state),
        tables=page_parts.similarity_tables(metrics),
        settings=vars(args) | {f"training: {key}": value for key, value in state["settings"].items()},
    )
    page.write_report(path, report)


def write_predictions(
    path: Path, predictions: Predictions, measured: list[Measured], table: pd.DataFrame, state: dict, model_hash: str
) -> None:
    import pandas as pd

    from utils.report import anndata_files

    columns = {"val_pcc": "val_pcc", "test_pcc": "pcc_residuals_model"}
    var = pd.DataFrame({name: table[column].to_numpy() for name, column in columns.items()}, index=state["genes"])
    counts, total_counts = (
        np.concatenate([of.slice[key][of.slice["rows"]] for of in measured]) for key in ("counts", "total_counts")
    )
    predicted = np.concatenate(predictions["model"])
    adata = anndata_files.spots_anndata(
        [slice_.spots for slice_ in measured], predicted, var, {"total_counts": total_counts}
    )
    layers = {
        "lognorm": anndata_files.predicted_lognorm([state], predicted),
        "measured": np.concatenate([slice_.expression for slice_ in measured]),
        "counts": counts,
    }
    for name, values in layers.items():
        adata.layers[name] = values.astype(np.float32)
    adata.uns["magic"] = anndata_files.describe_values(adata, state["target"], model_hash)
    anndata_files.write_anndata(path, adata)


@exclusive_folder("out")
def main(args: Settings) -> None:
    checkpoint.require_checkpoint(args.decoder, "--decoder", "run train_decoder.py first")
    state = checkpoint.load(args.decoder, "stage_two", "--decoder")
    slices, trained_on = split.load_evaluation(args, state, "--decoder", ("target",))
    from utils.evaluation.metrics import UNITS

    with distributed.running(args.device, args.precision) as accelerator:
        model = load_model(args.decoder, state, accelerator.device)
        predictions = {"model": predict_model(model, state, slices, accelerator, args)}
        predictions |= predict_baselines(state, slices, trained_on, accelerator, args)
        if not distributed.go_on_alone():
            return
    measured = [read_measured(slice_, args.part, state["target"]) for slice_ in slices]
    metrics, table = evaluate(predictions, measured, state)
    metrics["leak"] = split.leaked_slices(slices, state)
    out, unit = args.out, UNITS[state["target"]]
    out.mkdir(parents=True, exist_ok=True)
    write_whole(out / "genes.csv", table.to_csv(index=False).encode())
    model_hash = checkpoint.model_hash(args.decoder)
    write_predictions(out / "predictions.h5ad", predictions, measured, table, state, model_hash)
    draw_figures(out, predictions, measured, table, unit)
    write_page(out / "report.html", predictions, measured, metrics, table, state, args)
    write_record(out / "metrics.json", metrics)
    print(f"{count_of(metrics['n_spots'], 'spot')}, {count_of(metrics['n_genes'], 'gene')}")
    print("\n".join(expression_lines([metrics])))
    print(f"results in {out}")


if __name__ == "__main__":
    settings.run(main, parse_args())
