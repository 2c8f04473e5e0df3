"""Results as AnnData that scanpy and squidpy plot as they are: coordinates, the small image, its scale factors.

Shapes: S spots, G genes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pandas as pd
from PIL import Image

from utils.evaluation.metrics import UNITS, to_lognorm
from utils.files.atomic import whole_file
from utils.report.spots import SpotsOnImage

SPOTS_AT_ONCE = 2048  # in double precision
LOWRES_PX = 600  # longest side, as Space Ranger writes it
LAYER_UNITS = {"lognorm": UNITS["lognorm"], "counts": "raw counts"}  # the other layers have the unit of X


def spots_anndata(
    slices: Sequence[SpotsOnImage], x: np.ndarray, var: pd.DataFrame, obs: Mapping[str, np.ndarray]
) -> anndata.AnnData:
    """AnnData of the spots of one or several slices.

    Parameters
    ----------
    slices : in the order of the rows of `x`
    x : (all S, G)
    var : DataFrame with the genes as index
    obs : further columns, (all S,) each
    """
    library = {slice_.name: slice_.name.replace("/", "_") for slice_ in slices}
    names = [f"{s.name}:{barcode}" if len(slices) > 1 else str(barcode) for s in slices for barcode in s.barcodes]
    libraries = pd.Categorical([library[slice_.name] for slice_ in slices for _ in slice_.barcodes])
    table = pd.DataFrame({"slice": libraries, "in_tissue": 1, **obs}, index=names)
    adata = anndata.AnnData(x.astype(np.float32), obs=table, var=var)
    adata.obsm["spatial"] = np.concatenate([slice_.xy_fullres_px for slice_ in slices])
    adata.uns["spatial"] = {library[slice_.name]: _images_and_scales(slice_) for slice_ in slices}
    return adata


def _images_and_scales(slice_: SpotsOnImage) -> dict[str, dict[str, Any]]:
    """The entry of a slice in uns["spatial"]: its image, the same at most LOWRES_PX long, and the scales of both."""
    if slice_.image is None:
        return {"images": {}, "scalefactors": dict(slice_.scalefactors)}
    small = Image.fromarray(slice_.image)
    small.thumbnail((LOWRES_PX, LOWRES_PX), Image.Resampling.LANCZOS)
    scales = {
        "tissue_hires_scalef": slice_.image_scale,
        "tissue_lowres_scalef": slice_.image_scale * max(small.size) / max(slice_.image.shape[:2]),
    }
    images = {"hires": slice_.image, "lowres": np.asarray(small)}
    return {"images": images, "scalefactors": dict(slice_.scalefactors) | scales}


def predicted_lognorm(states: Sequence[Mapping[str, Any]], predicted: np.ndarray) -> np.ndarray:
    """Predictions (S, G) as log1p counts per 10,000, residuals at the train depth and gene fractions that the model's
    `states` hold; of several models their means."""
    depth = float(np.mean([state["train_depth"] for state in states]))
    fraction = np.mean([state["gene_fraction"].numpy() for state in states], axis=0)
    lognorm = np.empty(predicted.shape, np.float32)
    for start in range(0, len(predicted), SPOTS_AT_ONCE):
        spots = slice(start, start + SPOTS_AT_ONCE)
        lognorm[spots] = to_lognorm(states[0]["target"], predicted[spots], depth, fraction)
    return lognorm


def describe_values(adata: anndata.AnnData, target: str, model_hash: str) -> dict[str, Any]:
    """Of uns["magic"]: which model predicted X, in which scale, and the units of X and of each layer."""
    units = {name: LAYER_UNITS.get(name, UNITS[target]) for name in adata.layers}
    return {
        "X": f"predicted, {UNITS[target]}",
        "target": target,
        "scale": target,
        "units": {"X": UNITS[target], **units},
        "model_hash": model_hash,
    }


def write_anndata(path: Path, adata: anndata.AnnData) -> None:
    """Write the file whole: an interrupted write leaves the old one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path, ending=".h5ad") as part:
        adata.write_h5ad(part)
