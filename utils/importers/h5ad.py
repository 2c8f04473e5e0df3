"""AnnData with integer counts and pixel coordinates: one .h5ad, or a folder of the HEST-1k layout.

HEST-1k (Jaume et al. 2024) keeps st/ID.h5ad, wsis/ID.tif, metadata/ID.json and patches/ID.h5; all but the first two
may be missing.

Shapes: S spots, G genes.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy.sparse import csr_matrix

from utils.importers.base import Source, only_picture, pictures_in, whole_counts
from utils.slices import visium
from utils.slices.lattice import array_places, is_staggered
from utils.slices.lattice import pitch_px as measured_pitch_px
from utils.slices.matrix import check_once, reading

ID_COLUMNS = ("gene_ids", "gene_id", "ensembl_id")
PIXEL_SIZES = ("pixel_size_um_estimated", "pixel_size_um_embedded", "pixel_size_um", "pixel_size")
SPOT_SHARE = {True: 0.55, False: 0.5}  # of the pitch that a spot measures: Visium (staggered), legacy ST (square)


@dataclass(frozen=True)
class Sample:
    """One .h5ad, and what a HEST folder holds beside it."""

    name: str
    path: Path
    picture: Path | None
    metadata: dict[str, Any] = field(default_factory=dict)
    patches: Path | None = None


def find_samples(source: Path, image: Path | None) -> list[Sample]:
    """The samples of a source; their pictures are found before any is read."""
    if source.is_file():
        return [Sample(source.stem, source, image)]
    files = sorted((source / "st").glob("*.h5ad"))
    if not files:
        found = "no such file or folder" if not source.exists() else "neither"
        raise ValueError(f"{source}: expected an .h5ad file or a folder with st/ID.h5ad and wsis/ID.tif, found {found}")
    if image is not None and len(files) > 1:
        raise ValueError(
            f"--image: expected one sample, found {', '.join(path.stem for path in files)}; give one .h5ad"
        )
    return [_hest_sample(source, path, image) for path in files]


def _hest_sample(source: Path, path: Path, image: Path | None) -> Sample:
    pictures = [picture for picture in pictures_in(source / "wsis") if picture.stem == path.stem]
    metadata, content = source / "metadata" / f"{path.stem}.json", {}
    if metadata.is_file():
        with reading(metadata, "metadata in JSON"):
            content = dict(json.loads(metadata.read_text()))
    patches = source / "patches" / f"{path.stem}.h5"
    picture = only_picture(source / "wsis", pictures, image, path.stem)
    return Sample(path.stem, path, picture, content, patches if patches.is_file() else None)


def integer_counts(where: str, adata: Any) -> tuple[csr_matrix, pd.DataFrame]:
    """Counts (S, G) int32 and their genes: the first of X, layers['counts'] and raw.X that holds whole numbers."""
    places = [("X", adata.X, adata.var), ("layers['counts']", adata.layers.get("counts"), adata.var)]
    if adata.raw is not None:
        places.append(("raw.X", adata.raw.X, adata.raw.var))
    refused = []
    for name, values, var in places:
        if values is None:
            continue
        counts = csr_matrix(values)
        try:
            counts.data = whole_counts(where, counts.data)
        except ValueError:
            refused.append(name)
            continue
        counts.sum_duplicates()
        counts.eliminate_zeros()
        return counts, var
    wanted = "raw counts (0, 1, 2, ...) in X, layers['counts'] or raw.X"
    found = f"fractions or negative numbers in {', '.join(refused)}" if refused else "none of them"
    raise ValueError(f"{where}: expected {wanted}, found {found}; save the raw counts")


def _number(value: Any) -> float | None:
    """A positive number, None where something else or nothing is stated."""
    try:
        number = float(value)
    except (TypeError, ValueError):
        return None
    return number if 0 < number < math.inf else None


def stated_sizes(adata: Any, metadata: dict[str, Any]) -> dict[str, float]:
    """Sizes of a full-resolution pixel in um, by where they stand."""
    stated = {}
    for key in PIXEL_SIZES:
        column = adata.obs[key].iloc[0] if key in adata.obs and len(adata.obs) else None
        for where, value in (("metadata", metadata.get(key)), ("uns", adata.uns.get(key)), ("obs", column)):
            um = _number(value)
            if um is not None:
                stated[f"{key} ({where})"] = um
    return stated


def library(where: str, adata: Any) -> tuple[dict[str, Path | np.ndarray], dict[str, float]]:
    """Small pictures (height, width, 3) uint8 and scale factors of uns['spatial'], as scanpy keeps them; both may be
    empty."""
    libraries = adata.uns.get("spatial") or {}
    if not isinstance(libraries, dict) or len(libraries) > 1:
        found = ", ".join(map(str, libraries))
        raise ValueError(f"{where}: expected one slice in uns['spatial'], found {found}; save each slice by itself")
    entry: dict[str, Any] = next(iter(libraries.values()), {})
    factors = {key: number for key, value in entry.get("scalefactors", {}).items() if (number := _number(value))}
    pictures: dict[str, Path | np.ndarray] = {}
    for kind in ("hires", "lowres"):
        pixels = entry.get("images", {}).get(kind)
        if pixels is not None and f"tissue_{kind}_scalef" in factors:
            pixels = np.asarray(pixels)
            pixels = np.rint(pixels * 255) if pixels.dtype.kind == "f" else pixels  # scanpy reads PNG as 0..1
            pictures[kind] = np.ascontiguousarray(pixels[..., :3].astype(np.uint8))
    return pictures, factors


def places(where: str, adata: Any, xy_px: np.ndarray) -> np.ndarray:
    """Array row and column (S, 2): those of obs, else measured on the grid that the spots lie on."""
    if {"array_row", "array_col"} <= set(adata.obs):
        stated = adata.obs[["array_row", "array_col"]].apply(pd.to_numeric, errors="coerce").to_numpy(float)
        if np.isfinite(stated).all() and (stated == np.rint(stated)).all():
            return stated.astype(int)
    return array_places(where, xy_px)


def from_anndata(
    adata: Any,
    name: str,
    origin: Path,
    xy_px: np.ndarray,
    picture: Path | np.ndarray | None,
    pitch_um: float | None = None,
    metadata: dict[str, Any] | None = None,
    diameter_px: float | None = None,
) -> Source:
    """A slice of an AnnData whose spots have their centres at `xy_px` (S, 2) of the full-resolution picture."""
    where, metadata = str(origin), metadata or {}
    check_once(origin, adata.obs_names.to_numpy(dtype=object))
    counts, var = integer_counts(where, adata)
    kept = _in_tissue(where, adata)
    array = places(where, adata, xy_px)[kept]
    columns = {"array_row": array[:, 0], "array_col": array[:, 1]}
    columns |= {"x_fullres_px": xy_px[kept, 0], "y_fullres_px": xy_px[kept, 1]}
    spots = pd.DataFrame(columns, index=pd.Index(adata.obs_names[kept].astype(str), name="barcode"))
    of_genes, genes, ids = _genes(var)
    small, factors = library(where, adata)
    stated = stated_sizes(adata, metadata)
    if "microns_per_pixel" in factors:
        stated["microns_per_pixel of its scale factors"] = factors["microns_per_pixel"]
    staggered, pitch_px = is_staggered(array), measured_pitch_px(xy_px[kept], array)
    pitch_um = _pitch_um(where, spots, pitch_um or _number(metadata.get("inter_spot_dist")), factors, stated)
    spot_um, patient = _number(metadata.get("spot_diameter")), metadata.get("patient")
    own_px = factors.get("spot_diameter_fullres") or (spot_um * pitch_px / pitch_um if spot_um else None)
    keep = {"spot_diameter_fullres", "fiducial_diameter_fullres", "bin_size_um", "microns_per_pixel"}
    return Source(
        name=name,
        patient=str(patient) if isinstance(patient, str | int) and patient else name,  # HEST writes NaN for nobody
        origin=origin,
        counts=counts[kept][:, of_genes],
        genes=genes,
        gene_ids=ids,
        spots=spots,
        pitch_um=pitch_um,
        spot_diameter_px=diameter_px or own_px or SPOT_SHARE[staggered] * pitch_px,
        picture=picture,
        small=small if picture is None else {},
        scalefactors={key: value for key, value in factors.items() if picture is None or key in keep},
        stated_um_per_px=stated,
        left_out={"not in tissue": int((~kept).sum())},
        notes=[] if of_genes.all() else [f"{(~of_genes).sum()} features that are no genes left out"],
    )


def _genes(var: pd.DataFrame) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Which features are genes, and the names and ids (G,) of those; without ids the names serve."""
    of_genes = np.ones(len(var), bool)
    if "feature_types" in var and (var["feature_types"] == "Gene Expression").any():
        of_genes = (var["feature_types"] == "Gene Expression").to_numpy()
    column = next((column for column in ID_COLUMNS if column in var), None)
    names = var.index.to_numpy(dtype=str)
    ids = names if column is None else var[column].astype(str).to_numpy(dtype=str)
    return of_genes, names[of_genes], ids[of_genes]


def _in_tissue(where: str, adata: Any) -> np.ndarray:
    """Spots (S,) under tissue: those of obs['in_tissue'], all without it."""
    if "in_tissue" not in adata.obs:
        return np.ones(adata.n_obs, bool)
    stated = pd.to_numeric(adata.obs["in_tissue"], errors="coerce").to_numpy(float)
    if not np.isin(stated, (0, 1)).all():
        found = adata.obs["in_tissue"].iloc[int(np.argmin(np.isin(stated, (0, 1))))]
        raise ValueError(f"{where}: expected 0 or 1 in obs['in_tissue'], found {found}; mend or remove the column")
    if not stated.any():
        raise ValueError(f"{where}: expected spots in tissue, found none of {len(stated)}; mend obs['in_tissue']")
    return stated == 1


def _pitch_um(
    where: str, spots: pd.DataFrame, given: float | None, factors: dict[str, float], stated: dict[str, float]
) -> float:
    """As given, else Visium's on a staggered array, the bin size, or what the stated size of a pixel makes of it."""
    if given is not None:
        return given
    if is_staggered(spots[["array_row", "array_col"]].to_numpy()):
        return visium.VISIUM_PITCH_UM
    if "bin_size_um" in factors:
        return factors["bin_size_um"]
    if not stated:
        raise ValueError(
            f"{where}: expected a staggered array or a stated pixel size, found neither; use --spot_pitch_um"
        )
    return next(iter(stated.values())) * measured_pitch_px(
        spots[["x_fullres_px", "y_fullres_px"]].to_numpy(float), spots[["array_row", "array_col"]].to_numpy()
    )


def read_sample(sample: Sample, pitch_um: float | None = None) -> Source:
    """One .h5ad; obsm['spatial'] is x, y in full-resolution pixels."""
    import anndata

    with reading(sample.path, "an .h5ad file"):
        adata = anndata.read_h5ad(sample.path)
    xy_px = np.asarray(adata.obsm["spatial"], dtype=float) if "spatial" in adata.obsm else np.zeros((0, 0))
    if xy_px.ndim != 2 or xy_px.shape[1] < 2 or not np.isfinite(xy_px).all():
        found = f"keys {', '.join(adata.obsm) or 'none'}" if not xy_px.size else f"shape {xy_px.shape} or no numbers"
        raise ValueError(f"{sample.path}: expected obsm['spatial'], x and y in full-resolution pixels, found {found}")
    source = from_anndata(adata, sample.name, sample.path, xy_px[:, :2], sample.picture, pitch_um, sample.metadata)
    if sample.patches is not None:
        import h5py

        with reading(sample.patches, "patches in HDF5"), h5py.File(sample.patches) as file:
            names = [name for name in ("barcode", "barcodes") if name in file]
            source.notes += [f"{file[names[0]].shape[0]:,} patches, not imported"] if names else []
    return source


def read_h5ad(source: Path, image: Path | None = None, pitch_um: float | None = None) -> Iterator[Source]:
    """The slices of an .h5ad file or of a HEST-1k folder, one after the other.

    Parameters
    ----------
    source : .h5ad, or folder with st/ and wsis/
    image : the full-resolution picture of an .h5ad; without it the small pictures of uns['spatial'] serve
    pitch_um : distance between neighbouring spots; default as stated, else 100 on a staggered array
    """
    for sample in find_samples(source, image):
        yield read_sample(sample, pitch_um)
