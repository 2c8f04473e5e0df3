"""Results as AnnData that scanpy and squidpy plot as they are: coordinates, the small image, its scale factors.

Letters: S spots, G genes.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from utils.images.image import open_image
from utils.slices import visium


def small_image(root: Path) -> tuple[np.ndarray, float] | None:
    """The hires image (height, width, 3) uint8, else the lowres one, and its pixels per full-resolution pixel."""
    factors = visium.read_scalefactors(root)
    for name in ("hires", "lowres"):
        path = root / "spatial" / f"tissue_{name}_image.png"
        if path.exists():
            with open_image(path) as image:
                return image.crop(0, 0, image.width, image.height), factors[f"tissue_{name}_scalef"]
    return None


def spatial_entry(root: Path) -> dict[str, Any]:
    """What belongs under uns["spatial"][slice]: images and scalefactors, with the names that Space Ranger uses."""
    factors = visium.read_scalefactors(root)
    image = small_image(root)
    if image is None:
        return {"images": {}, "scalefactors": factors}
    pixels, scale = image
    return {"images": {"hires": pixels}, "scalefactors": factors | {"tissue_hires_scalef": scale}}


def spots_anndata(
    parts: list[tuple[str, Path, np.ndarray, np.ndarray]], x: np.ndarray, var: Any, obs: dict[str, np.ndarray]
) -> Any:
    """AnnData of the spots of one or several slices.

    Parameters
    ----------
    parts : (name, root folder, barcodes (S,), xy_fullres_px (S, 2)) of each slice, in the order of the rows of `x`
    x : (all S, G) float32
    var : DataFrame with the genes as index
    obs : further columns, (all S,) each
    """
    import anndata
    import pandas as pd

    several = len(parts) > 1
    names = [f"{name}:{b}" if several else str(b) for name, _, barcodes, _ in parts for b in barcodes]
    libraries = [name.replace("/", "_") for name, _, barcodes, _ in parts for _ in barcodes]
    table = pd.DataFrame({"slice": pd.Categorical(libraries), **obs}, index=names)
    adata = anndata.AnnData(x.astype(np.float32), obs=table, var=var)
    adata.obsm["spatial"] = np.concatenate([xy for *_, xy in parts])
    adata.uns["spatial"] = {name.replace("/", "_"): spatial_entry(root) for name, root, *_ in parts}
    return adata


def write_anndata(path: Path, adata: Any) -> None:
    """Write to `<name>.part.h5ad` and rename: an interrupted write leaves the old file whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.stem + ".part.h5ad")
    adata.write_h5ad(part)
    part.replace(path)
