"""Results as AnnData that scanpy and squidpy plot as they are: coordinates, the small image, its scale factors.

Shapes: S spots, G genes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import anndata
import numpy as np
import pandas as pd

from utils.files.atomic import whole_file
from utils.report.spots import SpotsOnImage


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
    table = pd.DataFrame({"slice": libraries, **obs}, index=names)
    adata = anndata.AnnData(x.astype(np.float32), obs=table, var=var)
    adata.obsm["spatial"] = np.concatenate([slice_.xy_fullres_px for slice_ in slices])
    adata.uns["spatial"] = {
        library[slice_.name]: {
            "images": {} if slice_.image is None else {"hires": slice_.image},
            "scalefactors": dict(slice_.scalefactors),
        }
        for slice_ in slices
    }
    return adata


def write_anndata(path: Path, adata: anndata.AnnData) -> None:
    """Write the file whole: an interrupted write leaves the old one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path, ending=".h5ad") as part:
        adata.write_h5ad(part)
