"""What predict_slide.py writes for a slide: AnnData, CSV, GeoJSON, SpatialData, maps, report.

Letters: S spots, G genes. Every file is written under another name and renamed.
"""

from __future__ import annotations

import gzip
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from utils.prediction import geojson
from utils.prediction.layout import SlideSpots
from utils.slices import export

UNITS = {"lognorm": "log1p counts per 10,000", "residuals": "Pearson residual", "counts": "counts per 10,000"}
RELIABLE_PCC = 0.1  # validation PCC below which a gene's prediction says little
CSV_BYTES = 50 * 2**20  # above, the table is compressed
CSV_NAMES = ("predictions.csv", "predictions.csv.gz")
DISC = 0.4  # radius of a drawn spot in pitches
REPORT_VALUES = 5_000_000  # spots times genes on one page: 13 MB


@dataclass(frozen=True)
class Prediction:
    """All that is known of one slide after prediction."""

    spots: SlideSpots
    genes: list[str]
    target: str
    predicted: np.ndarray  # (S, G)
    spread: np.ndarray | None  # (S, G)
    domain_score: np.ndarray  # (S,)
    domain_limit: float  # validation 0.99 quantile of the score
    val_pcc: np.ndarray  # (G,)
    image: np.ndarray  # (height, width, 3), small
    image_scale: float  # its pixels per full-resolution pixel
    measured: np.ndarray | None = None  # (S, G) in the scale of the target, NaN for a gene that the slice lacks
    counts: np.ndarray | None = None  # (S, G)
    total_counts: np.ndarray | None = None  # (S,)
    about: dict[str, Any] = field(default_factory=dict)  # plain values, kept in uns["magic"]

    @property
    def unit(self) -> str:
        return UNITS[self.target]

    def best_genes(self, n: int) -> np.ndarray:
        """Places of the n genes with the highest validation PCC."""
        return np.argsort(-np.nan_to_num(self.val_pcc, nan=-2.0), kind="stable")[:n]


def as_anndata(one: Prediction) -> Any:
    """What scanpy and squidpy plot as it is; `obsm["spatial"]` in full-resolution pixels."""
    import anndata
    import pandas as pd

    spots = one.spots
    obs = {
        "slice": pd.Categorical([spots.name] * len(spots.barcodes)),
        "array_row": spots.array[:, 0],
        "array_col": spots.array[:, 1],
        "domain_score": one.domain_score,
        "out_of_domain": one.domain_score > one.domain_limit,
    }
    if one.total_counts is not None:
        obs["total_counts"] = one.total_counts
    var = pd.DataFrame({"val_pcc": one.val_pcc, "reliable": one.val_pcc >= RELIABLE_PCC}, index=one.genes)
    adata = anndata.AnnData(one.predicted.astype(np.float32), obs=pd.DataFrame(obs, index=spots.barcodes), var=var)
    layers = {"spread": one.spread, "measured": one.measured, "counts": one.counts}
    for name, values in layers.items():
        if values is not None:
            adata.layers[name] = np.asarray(values, np.float32)
    adata.obsm["spatial"] = spots.xy_fullres_px
    factors = {"tissue_hires_scalef": one.image_scale, "spot_diameter_fullres": spots.diameter_fullres_px}
    adata.uns["spatial"] = {spots.name: {"images": {"hires": one.image}, "scalefactors": factors, "metadata": {}}}
    adata.uns["magic"] = {"X": f"predicted, {one.unit}", "target": one.target, **one.about}
    return adata


def write_csv(out: Path, one: Prediction) -> Path:
    """barcode, x, y (full-resolution pixels), domain_score, then a column per gene; compressed where it is large."""
    import pandas as pd

    table = pd.DataFrame(one.predicted, index=pd.Index(one.spots.barcodes, name="barcode"), columns=one.genes)
    x, y = one.spots.xy_fullres_px.T
    first = pd.DataFrame({"x": x, "y": y, "domain_score": one.domain_score}, index=table.index)
    part = out / (CSV_NAMES[0] + ".part")
    pd.concat([first, table], axis=1).to_csv(part, float_format="%.6g")
    small = part.stat().st_size <= CSV_BYTES
    path, other = (out / name for name in (CSV_NAMES if small else CSV_NAMES[::-1]))
    if not small:
        packed = out / (CSV_NAMES[1] + ".part")
        with part.open("rb") as plain, gzip.open(packed, "wb", compresslevel=5) as file:
            shutil.copyfileobj(plain, file)
        part.unlink()
        part = packed
    part.replace(path)
    other.unlink(missing_ok=True)  # of an earlier run of another size
    return path


def write_geojson(path: Path, one: Prediction) -> None:
    """A detection per spot, in pixels of the image that the tiles were cut from."""
    spots = one.spots
    columns, values = ["domain_score", *one.genes], np.column_stack([one.domain_score, one.predicted])
    diameter = spots.diameter_fullres_px * spots.image_scale
    geojson.write_geojson(path, spots.barcodes.tolist(), spots.xy_image_px, diameter, columns, values)


def write_maps(folder: Path, one: Prediction, genes: np.ndarray) -> None:
    """A map per gene, and one of the out-of-domain score; those of an earlier run are removed."""
    from utils.evaluation import plotting
    from utils.prediction.slides import file_name
    from utils.report import slide_maps

    for old in folder.glob("*.png"):
        old.unlink()
    spots, scale = one.spots, one.image_scale
    xy, radius = spots.xy_fullres_px * scale, spots.pitch_fullres_px * scale * DISC
    um_per_px = spots.um_per_fullres_px / scale
    for gene in genes:
        panels = {} if one.measured is None else {"measured": one.measured[:, gene]}
        panels["predicted"] = one.predicted[:, gene]
        title = f"{spots.name}: {one.genes[gene]}, validation PCC {one.val_pcc[gene]:.2f}"
        spread = None if one.spread is None else one.spread[:, gene]
        figure = slide_maps.spot_maps(one.image, xy, radius, panels, title, one.unit, um_per_px, spread)
        plotting.save(figure, folder / f"{file_name(one.genes[gene])}.png")
    title = f"{spots.name}: out-of-domain score, 99 % of validation spots lie below {one.domain_limit:.2f}"
    panels = {"out of domain": one.domain_score}
    figure = slide_maps.spot_maps(one.image, xy, radius, panels, title, "distance to train tissue", um_per_px)
    plotting.save(figure, folder / "domain_score.png")


def write_spatialdata(path: Path, one: Prediction, adata: Any) -> None:
    """The same as a SpatialData zarr: small image, spots as circles, table; coordinates in full-resolution pixels."""
    import geopandas
    from shapely.geometry import Point
    from spatialdata import SpatialData
    from spatialdata.models import Image2DModel, ShapesModel, TableModel
    from spatialdata.transformations import Scale

    scale = Scale([1 / one.image_scale] * 2, axes=("x", "y"))
    image = Image2DModel.parse(one.image.transpose(2, 0, 1), dims=("c", "y", "x"), transformations={"global": scale})
    radius = one.spots.diameter_fullres_px / 2
    circles = geopandas.GeoDataFrame(
        {"radius": np.full(adata.n_obs, radius)},
        geometry=[Point(x, y) for x, y in one.spots.xy_fullres_px],
        index=adata.obs_names,
    )
    table = adata.copy()
    del table.uns["spatial"]
    table.obs["region"], table.obs["spot"] = "spots", table.obs_names
    table.obs["region"] = table.obs["region"].astype("category")
    table = TableModel.parse(table, region="spots", region_key="region", instance_key="spot")
    part = path.with_name(path.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    made = SpatialData({"image": image}, shapes={"spots": ShapesModel.parse(circles)}, tables={"predicted": table})
    made.write(part)
    shutil.rmtree(path, ignore_errors=True)
    part.rename(path)


def write_anndata(path: Path, one: Prediction) -> Any:
    adata = as_anndata(one)
    export.write_anndata(path, adata)
    return adata


def write_report(path: Path, one: Prediction, metrics: dict[str, Any] | None, settings: dict[str, Any]) -> None:
    """report.html: all genes, the best by validation PCC where spots are so many that the page would not open."""
    from utils.report import html, parts

    spots = one.spots
    chosen = np.sort(one.best_genes(max(1, REPORT_VALUES // len(spots.barcodes))))

    def shown(values: np.ndarray | None) -> np.ndarray | None:
        return None if values is None else values[:, chosen]

    slide = html.SliceMaps(
        name=spots.name,
        image=one.image,
        image_scale=one.image_scale,
        xy_fullres_px=spots.xy_fullres_px,
        spot_diameter_px=2 * DISC * spots.pitch_fullres_px,
        barcodes=spots.barcodes.tolist(),
        predicted=one.predicted[:, chosen],
        measured=shown(one.measured),
        spread=shown(one.spread),
        domain_score=one.domain_score,
        um_per_fullres_px=spots.um_per_fullres_px,
    )
    note = f"{len(chosen)} of {len(one.genes)} genes are on this page" if len(chosen) < len(one.genes) else ""
    over = float((one.domain_score > one.domain_limit).mean())
    domain: list[list[str | float | int | None]] = [
        ["median score of the spots", float(np.median(one.domain_score))],
        ["score that 99 % of the validation spots lie below", one.domain_limit],
        ["share of the spots above it", over],
    ]
    tables = [html.Table("Out of domain", ["", "value"], domain, note)]
    tables += parts.similarity_tables(metrics) if metrics else []
    columns = {"mean predicted": one.predicted[:, chosen].mean(0)}
    page = html.Report(
        title=f"Predicted expression: {spots.name}",
        unit=one.unit,
        genes=[one.genes[i] for i in chosen],
        slices=[slide],
        gene_columns=columns,
        val_pcc=one.val_pcc[chosen],
        tables=tables,
        settings=settings,
    )
    html.write_report(path, page)
