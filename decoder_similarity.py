"""Evaluate stage two: how well is the expression of the target genes predicted from the image alone?

    python decoder_similarity.py --decoder decoder_model/best_epoch_weights.pth --part test

Reads the checkpoint, tiles and target genes of the part's slices, and of the train and validation slices for the cheap
rows on the pretrained encoder. Writes results/similarity/: metrics.json, genes.csv, predictions.h5ad, figures, and
report.html, one page to look through them.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np

from utils import distributed, settings
from utils.features import dataset
from utils.files.atomic import write_record
from utils.files.exclusive import exclusive_folder
from utils.prediction.outputs import UNITS
from utils.slices import export
from utils.training import checkpoint, split

SHOWN = (
    "pcc_gene_mean",
    "pcc_gene_top50",
    "pcc_gene_given_depth",
    "pcc_spot_mean",
    "mse",
    "sd_ratio",
    "undefined_genes",
)


def parse_args(argv=None):
    parser = settings.shared(__doc__, part="test")
    group = settings.add_evaluation(parser, out="results/similarity")
    settings.add_memory(parser)
    group.add_argument("--decoder", type=Path, default=Path("decoder_model/best_epoch_weights.pth"), help="stage two")
    return parser.parse_args(argv)


def load_model(args, state: dict, device):
    from model.stage_two import StageTwo, StageTwoSizes

    model = StageTwo(StageTwoSizes(**state["sizes"]))
    checkpoint.fit(model, state["model"], args.decoder, "--decoder")
    return model.to(device).eval()


def predict_model(model, state: dict, slices, accelerator, args) -> list[np.ndarray]:
    """The model's prediction of every spot of the part: (S, G) per slice, in the units of its target.

    Features are computed, used and dropped slice by slice.
    """
    from utils.features import cache, neighbourhoods
    from utils.files import arrays

    def encode(tiles):
        with accelerator.autocast():
            return model.encode(tiles)

    device, around = accelerator.device, (model.sizes.context, model.sizes.bandwidths)
    how = cache.TileEncoder(encode, model.sizes.image_size, device, args.batch_size, args.workers)
    moments = neighbourhoods.Moments(*(state["feature_moments"][key].numpy() for key in ("mean", "sd")))
    autocast, predicted = partial(distributed.decoder_autocast, accelerator, args.precision), []
    for one in slices:
        memory = arrays.ArrayStore(args.memory, args.out)
        kept = cache.in_budget(cache.encode_slice(how, one), len(one.barcodes), memory)
        bank = neighbourhoods.FeatureBank([one], [kept], moments, *around, device, memory)
        spots = one.rows_of(args.part)
        predicted.append(neighbourhoods.predict(model, bank, spots, autocast, args.batch_size))
    return predicted


def predict_cheap(args, state: dict, slices, taught, accelerator) -> dict[str, list[np.ndarray]]:
    """Rows on the pretrained encoder's features, fitted on the same slices and target: (S, G) per slice."""
    from utils.evaluation import baselines, metrics
    from utils.features import cache

    several, inference = [*taught, *slices], cache.Inference(accelerator, args.batch_size, args.workers)
    found = cache.pretrained_features(state, state["encoder_settings"], several, inference, args.image_weights)
    found = [baselines.standardise(f) for f in found]
    seen: dict[str, list] = {"train": [], "val": []}
    for one, own in zip(taught, found, strict=False):
        panel = one.panels["target"]
        scaled = metrics.to_scale(state["target"], panel.read_counts(), one.total_counts)
        target = np.where(panel.measured, scaled, np.nan)
        for part, images in seen.items():
            if len(one.rows_of(part)):
                images.append(cache.as_images(one, own, part) | {"target": target[one.rows_of(part)]})
    cheap = baselines.fit_baselines(seen["train"], seen["val"])
    images = [cache.as_images(one, f, args.part) for one, f in zip(slices, found[len(taught) :], strict=True)]
    return {row: [predict(p) for p in images] for row, predict in cheap.items()}


def draw(out: Path, slices, rows: dict, measured: list[dict], genes: list[str], target: str, table) -> None:
    """Histogram of the correlations per gene, and maps of each slice's best, median and worst gene."""
    from utils.evaluation import metrics, plotting

    scale = "residuals"
    by_row = {row: table[f"pcc_{scale}_{row}"].to_numpy() for row in rows if f"pcc_{scale}_{row}" in table}
    plotting.save(plotting.pcc_histogram(by_row, "Correlation per gene, Pearson residuals"), out / "pcc_histogram.png")
    for i, (one, what) in enumerate(zip(slices, measured, strict=True)):
        truth = metrics.to_scale(target, what["counts"], what["total_counts"])
        pcc = np.where(what["measured"], metrics.scored_pearson_per_gene(rows["model"][i], truth), np.nan)
        known = np.flatnonzero(np.isfinite(pcc))
        if not len(known):
            continue
        order = known[np.argsort(pcc[known])]
        image = export.small_image(one.root)
        image, scale_px = image if image else (None, 1.0)
        um = dataset.um_per_fullres_px(one)
        for kind, gene in (("best", order[-1]), ("median", order[len(order) // 2]), ("worst", order[0])):
            figure = plotting.gene_maps(
                image,
                what["xy"] * scale_px,
                one.pitch_fullres_px * scale_px * 0.4,
                truth[:, gene],
                rows["model"][i][:, gene],
                title=f"{one.name}: {genes[gene]}, {kind} gene, PCC {pcc[gene]:.2f}",
                unit=UNITS[target],
                um_per_px=None if um is None else um / scale_px,
            )
            plotting.save(figure, out / f"map_{one.name.replace('/', '_')}_{kind}.png")


def write_page(path: Path, state: dict, slices, rows: dict, measured: list[dict], metrics: dict, table, args) -> None:
    """report.html: maps of every gene in the unit of the target, correlations beside mean expression, all rows."""
    from utils.evaluation.metrics import to_scale
    from utils.report import html, parts

    maps = []
    for one, what, predicted in zip(slices, measured, rows["model"], strict=True):
        image, scale_px = export.small_image(one.root) or (None, 1.0)
        truth = to_scale(state["target"], what["counts"], what["total_counts"])
        maps.append(
            html.SliceMaps(
                name=one.name,
                image=image,
                image_scale=scale_px,
                xy_fullres_px=what["xy"],
                spot_diameter_px=0.8 * one.pitch_fullres_px,
                barcodes=one.barcodes[one.rows_of(args.part)],
                predicted=predicted,
                measured=np.where(what["measured"], truth, np.nan),
                um_per_fullres_px=dataset.um_per_fullres_px(one),
            )
        )
    report = html.Report(
        title=f"Expression from the image: {args.part} slices",
        unit=UNITS[state["target"]],
        genes=state["genes"],
        slices=maps,
        gene_columns={
            "PCC, residuals": table["pcc_residuals_model"].to_numpy(),
            "validation PCC": table["val_pcc"].to_numpy(),
            "ridge PCC": table["pcc_residuals_ridge"].to_numpy(),
            "mean counts per 10,000": table["counts_per_10k"].to_numpy(),
        },
        val_pcc=table["val_pcc"].to_numpy(),
        tables=parts.similarity_tables(metrics),
        settings=vars(args) | {f"training: {key}": value for key, value in state["settings"].items()},
    )
    html.write_report(path, report)


def write_results(out: Path, state: dict, slices, rows: dict, measured: list[dict], metrics: dict, args) -> None:
    import pandas as pd

    from utils.evaluation import expression

    out.mkdir(parents=True, exist_ok=True)
    genes = state["genes"]
    table = expression.per_gene_table(rows, measured, genes)
    table.insert(1, "val_pcc", state["val_pcc"].numpy())
    table.to_csv(out / "genes.csv.part", index=False)
    (out / "genes.csv.part").replace(out / "genes.csv")
    parts = [
        (one.name, one.root, one.barcodes[one.rows_of(args.part)], what["xy"])
        for one, what in zip(slices, measured, strict=True)
    ]
    var = pd.DataFrame({"val_pcc": state["val_pcc"].numpy()}, index=genes)
    obs = {"total_counts": np.concatenate([what["total_counts"] for what in measured])}
    adata = export.spots_anndata(parts, np.concatenate(rows["model"]), var, obs)
    adata.layers["counts"] = np.concatenate([what["counts"] for what in measured]).astype(np.float32)
    adata.uns["magic"] = {
        "X": f"predicted, {UNITS[state['target']]}",
        "counts": "measured, raw",
        "target": state["target"],
    }
    export.write_anndata(out / "predictions.h5ad", adata)
    draw(out, slices, rows, measured, genes, state["target"], table)
    write_page(out / "report.html", state, slices, rows, measured, metrics, table, args)
    write_record(out / "metrics.json", metrics)


def summary(metrics: dict) -> str:
    lines = [f"{metrics['n_spots']} spots, {metrics['n_genes']} genes; means over slices"]
    for scale in UNITS:
        lines.append(f"{scale:<18}" + "".join(f"{figure.removeprefix('pcc_'):>17}" for figure in SHOWN))
        for row, found in metrics[scale].items():
            cells = ["-" if found[f] is None else f"{found[f]:.3f}" if f != SHOWN[-1] else f"{found[f]}" for f in SHOWN]
            lines.append(f"  {row:<16}" + "".join(f"{cell:>17}" for cell in cells))
    return "\n".join(lines)


@exclusive_folder("out")
def main(args):
    checkpoint.require_checkpoint(args.decoder, "--decoder", "run train_decoder.py first")
    state = checkpoint.load(args.decoder, "stage_two", "--decoder")
    slices, taught = split.load_evaluation(args, state, "--decoder", ("target",))
    from utils.evaluation import expression

    with distributed.running(args.device, args.precision) as accelerator:
        model = load_model(args, state, accelerator.device)
        rows = {"model": predict_model(model, state, slices, accelerator, args)}
        rows |= predict_cheap(args, state, slices, taught, accelerator)
        if not distributed.go_on_alone():
            return
    measured = [
        {
            "name": one.name,
            "counts": one.panels["target"].read_counts()[chosen],
            "total_counts": one.total_counts[chosen],
            "measured": one.panels["target"].measured,
            "xy": one.xy_fullres_px[chosen],
        }
        for one in slices
        for chosen in [one.rows_of(args.part)]
    ]
    metrics = expression.evaluate(rows, measured, state["target"])
    write_results(args.out, state, slices, rows, measured, metrics, args)
    print(summary(metrics))
    print(f"results in {args.out}")


if __name__ == "__main__":
    settings.run(main, parse_args())
