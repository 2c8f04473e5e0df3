"""What predict_slide.py writes for a slide: AnnData, CSV, GeoJSON, SpatialData, maps, report.

Shapes: S spots, G genes. Every file is written under another name and renamed.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pandas as pd

from utils.evaluation.metrics import PREDICTABLE_PCC, UNITS
from utils.files.atomic import whole_file, write_figure
from utils.prediction import geojson, trust
from utils.prediction.layout import SlideSpots
from utils.prediction.slides import file_name
from utils.report import anndata_files, page, page_parts
from utils.report.spot_maps import spot_maps
from utils.report.spots import DISC, SpotsOnImage

PREDICTABLE = f"val_pcc_above_{PREDICTABLE_PCC}"
LEFT_OUT = "PCC on left-out patients"
REPORT_VALUES = 5_000_000  # spots times genes on one page: 13 MB


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """All that is known of one slide after prediction."""

    spots: SlideSpots
    genes: list[str]
    target: str
    predicted: np.ndarray  # (S, G)
    prediction_std: np.ndarray | None  # (S, G)
    interval: tuple[np.ndarray, np.ndarray]  # (G,) low and high end relative to the prediction
    domain_score: np.ndarray  # (S,) above 1 out of domain
    val_pcc: np.ndarray  # (G,)
    image: np.ndarray  # (height, width, 3), small
    image_scale: float  # its pixels per full-resolution pixel
    measured: np.ndarray | None = None  # (S, G) in the scale of the target, NaN for a gene that the slice lacks
    counts: np.ndarray | None = None  # (S, G)
    total_counts: np.ndarray | None = None  # (S,)
    left_out_pcc: np.ndarray | None = None  # (G,)
    gene_table: pd.DataFrame | None = None  # genes.csv, of a slice with counts
    lognorm: np.ndarray | None = None  # (S, G) predicted, as log1p counts per 10,000
    model_hash: str = ""  # of the decoders' files, separated by spaces
    about: dict[str, Any] = field(default_factory=dict)  # plain values, kept in uns["magic"]

    @property
    def out_of_domain(self) -> np.ndarray:
        """(S,) bool"""
        return trust.out_of_domain(self.domain_score, self.spots.tissue_fraction)

    @property
    def predictable(self) -> pd.arrays.BooleanArray:
        """Genes (G,) with a validation PCC of PREDICTABLE_PCC; missing where validation shares a patient."""
        reason = self.about.get("genes", {}).get(PREDICTABLE, "")
        return trust.predictable(self.val_pcc, known=not reason.startswith("not known"))

    @property
    def interval_ends(self) -> dict[str, np.ndarray]:
        """Ends of the interval of the measured value, (S, G) each; counts are not below 0."""
        least = -np.inf if self.target == "residuals" else 0.0
        ends = zip(("interval_low", "interval_high"), self.interval, strict=True)
        return {name: np.maximum(self.predicted + offset, least) for name, offset in ends}

    @property
    def unit(self) -> str:
        return UNITS[self.target]

    @property
    def spots_on_image(self) -> SpotsOnImage:
        spots, scale = self.spots, self.image_scale
        return SpotsOnImage(
            name=spots.name,
            image=self.image,
            image_scale=scale,
            xy_fullres_px=spots.xy_fullres_px,
            spot_diameter_px=2 * DISC * spots.pitch_fullres_px,
            barcodes=spots.barcodes.tolist(),
            um_per_fullres_px=spots.um_per_fullres_px,
            scalefactors={"tissue_hires_scalef": scale, "spot_diameter_fullres": spots.diameter_fullres_px},
        )

    def best_genes(self, n: int) -> np.ndarray:
        """Places of the n genes with the highest validation PCC."""
        return np.argsort(-np.nan_to_num(self.val_pcc, nan=-2.0), kind="stable")[:n]


def as_anndata(prediction: Prediction) -> anndata.AnnData:
    """What scanpy and squidpy plot as it is; `obsm["spatial"]` in full-resolution pixels."""
    obs = {
        "array_row": prediction.spots.array[:, 0],
        "array_col": prediction.spots.array[:, 1],
        "domain_score": prediction.domain_score,
        "out_of_domain": prediction.out_of_domain,
        "tissue_fraction": prediction.spots.tissue_fraction,
    }
    if prediction.total_counts is not None:
        obs["total_counts"] = prediction.total_counts
    var = pd.DataFrame({"val_pcc": prediction.val_pcc, PREDICTABLE: prediction.predictable}, index=prediction.genes)
    if prediction.left_out_pcc is not None:
        var["left_out_pcc"] = prediction.left_out_pcc
    if prediction.gene_table is not None:
        var["test_pcc"] = prediction.gene_table["pcc_residuals_model"].to_numpy()
    adata = anndata_files.spots_anndata([prediction.spots_on_image], prediction.predicted, var, obs)
    for name in ("lognorm", "prediction_std", "measured", "counts"):
        values = getattr(prediction, name)
        if values is not None:
            adata.layers[name] = np.asarray(values, np.float32)
    for name, values in prediction.interval_ends.items():
        adata.layers[name] = values.astype(np.float32)
    described = anndata_files.describe_values(adata, prediction.target, prediction.model_hash)
    adata.uns["magic"] = described | prediction.about
    return adata


def write_all(
    out: Path, prediction: Prediction, metrics: dict[str, Any] | None, settings: dict[str, Any], n_maps: int
) -> None:
    """All files but predictions.zarr. `metrics` are those of a slice with counts, `settings` what the report lists."""
    anndata_files.write_anndata(out / "predictions.h5ad", as_anndata(prediction))
    write_csv(out / "predictions.csv", prediction)
    write_geojson(out / "predictions.geojson", prediction)
    write_maps(out / "maps", prediction, n_maps)
    write_report(out / "report.html", prediction, metrics, settings)


def write_csv(path: Path, prediction: Prediction) -> None:
    """barcode, x, y (full-resolution pixels), domain_score, then a column per gene."""
    spots = prediction.spots
    table = pd.DataFrame(prediction.predicted, index=pd.Index(spots.barcodes, name="barcode"), columns=prediction.genes)
    x, y = spots.xy_fullres_px.T
    first = pd.DataFrame({"x": x, "y": y, "domain_score": prediction.domain_score}, index=table.index)
    with whole_file(path) as part:
        pd.concat([first, table], axis=1).to_csv(part, float_format="%.6g")


def write_geojson(path: Path, prediction: Prediction) -> None:
    """A detection per spot, in pixels of the image that the tiles were cut from."""
    spots, score = prediction.spots, prediction.domain_score
    columns, values = ["domain_score", *prediction.genes], np.column_stack([score, prediction.predicted])
    diameter = spots.diameter_fullres_px * spots.image_scale
    geojson.write_geojson(path, spots.barcodes.tolist(), spots.xy_image_px, diameter, columns, values)


def write_maps(folder: Path, prediction: Prediction, n_maps: int) -> None:
    """Maps of the best genes by validation PCC, and of the out-of-domain score; those of an earlier run are removed."""
    for old in folder.glob("*.png"):
        old.unlink()
    spots, std = prediction.spots_on_image, prediction.prediction_std
    for gene in prediction.best_genes(n_maps):
        panels = {} if prediction.measured is None else {"measured": prediction.measured[:, gene]}
        panels["predicted"] = prediction.predicted[:, gene]
        name = prediction.genes[gene]
        title = f"{spots.name}: {name}, validation PCC {prediction.val_pcc[gene]:.2f}"
        figure = spot_maps(spots, panels, title, prediction.unit, None if std is None else std[:, gene])
        write_figure(folder / f"{file_name(name)}.png", figure)
    title = f"{spots.name}: out-of-domain score, above 1 a spot is unlike those of training"
    figure = spot_maps(spots, {"out of domain": prediction.domain_score}, title, "distance to train spots / limit")
    write_figure(folder / "domain_score.png", figure)


def gene_columns(prediction: Prediction) -> dict[str, np.ndarray]:
    """Columns (G,) of the report's table of genes; of a slice with counts those of genes.csv."""
    left_out = {} if prediction.left_out_pcc is None else {LEFT_OUT: prediction.left_out_pcc}
    if prediction.gene_table is None:
        return {"validation PCC": prediction.val_pcc, **left_out, "mean predicted": prediction.predicted.mean(0)}
    of_table = {
        "PCC, residuals": "pcc_residuals_model",
        "PCC, lognorm": "pcc_lognorm_model",
        "validation PCC": "val_pcc",
        "mean counts per 10,000": "counts_per_10k",
    }
    return {name: prediction.gene_table[column].to_numpy() for name, column in of_table.items()} | left_out


def write_report(path: Path, prediction: Prediction, metrics: dict[str, Any] | None, settings: dict[str, Any]) -> None:
    """report.html: all genes, the best by validation PCC where spots are so many that the page would not open."""
    n_genes = max(1, REPORT_VALUES // len(prediction.spots.barcodes))
    chosen = np.sort(prediction.best_genes(n_genes))
    maps = {name: getattr(prediction, name) for name in ("predicted", "measured", "prediction_std")}
    maps = {name: None if values is None else values[:, chosen] for name, values in maps.items()}
    domain = prediction.about["domain"]
    rows: list[list[str | float | int | None]] = [
        ["fraction of the spots that are out of domain", domain["flagged"]],
        ["spots on bare glass", domain["bare_glass"]],
        ["median score of the spots (limit 1)", domain["median_score"]],
        ["score of the slide (limit 1)", domain["slide_score"]],
        ["limits calibrated on", domain["calibrated_on"]],
    ]
    all_genes = len(prediction.genes)
    note = f"{len(chosen)} of {all_genes} genes are on this page" if len(chosen) < all_genes else ""
    tables = [page.Table("Out of domain", ["", "value"], rows, note)]
    report = page.Report(
        title=f"Predicted expression: {prediction.spots.name}",
        unit=prediction.unit,
        genes=[prediction.genes[i] for i in chosen],
        slices=[page.SliceMaps(**vars(prediction.spots_on_image), **maps, domain_score=prediction.domain_score)],
        gene_columns={name: values[chosen] for name, values in gene_columns(prediction).items()},
        val_pcc=prediction.val_pcc[chosen],
        greys=not prediction.predictable.isna().all(),
        banner=domain["verdict"] if domain["warned"] else "",
        tables=[*tables, *(page_parts.similarity_tables(metrics) if metrics else [])],
        settings=settings,
    )
    page.write_report(path, report)


def write_spatialdata(path: Path, prediction: Prediction) -> None:
    """The same as a SpatialData zarr: small image, spots as circles, table; coordinates in full-resolution pixels."""
    import geopandas
    from shapely.geometry import Point
    from spatialdata import SpatialData
    from spatialdata.models import Image2DModel, ShapesModel, TableModel
    from spatialdata.transformations import Scale

    spots, table = prediction.spots, as_anndata(prediction)
    transformations = {"global": Scale([1 / prediction.image_scale] * 2, axes=("x", "y"))}
    image = Image2DModel.parse(
        prediction.image.transpose(2, 0, 1), dims=("c", "y", "x"), transformations=transformations
    )
    circles = geopandas.GeoDataFrame(
        {"radius": np.full(table.n_obs, spots.diameter_fullres_px / 2)},
        geometry=[Point(x, y) for x, y in spots.xy_fullres_px],
        index=table.obs_names,
    )
    del table.uns["spatial"]
    table.obs["region"] = pd.Categorical(["spots"] * table.n_obs)
    table.obs["spot"] = table.obs_names
    table = TableModel.parse(table, region="spots", region_key="region", instance_key="spot")
    part = path.with_name(path.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    SpatialData({"image": image}, shapes={"spots": ShapesModel.parse(circles)}, tables={"predicted": table}).write(part)
    shutil.rmtree(path, ignore_errors=True)
    part.rename(path)
