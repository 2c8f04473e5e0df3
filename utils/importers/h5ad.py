"""AnnData with raw counts and pixel coordinates: one .h5ad, or a folder of the HEST-1k layout.

HEST-1k (Jaume et al. 2024) keeps st/ID.h5ad, wsis/ID.tif, metadata/ID.json and patches/ID.h5; all but the first two
may be missing.

Shapes: S spots.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from utils.images.image import images_in
from utils.importers import anndata_sections as sections
from utils.importers.anndata_slice import from_anndata
from utils.importers.images import only_image
from utils.importers.source import Source, found_in
from utils.slices.matrix import reading
from utils.slices.visium import is_slice

OTHER_FORMS = {  # what people give in place of an .h5ad, and what to do with it
    ".gz": "a packed file: gunzip it first",
    ".zip": "an archive: unpack it first",
    ".tar": "an archive: unpack it first",
    ".loom": "a loom file: anndata.io.read_loom(...).write_h5ad(...)",
    ".rds": "a file of R: write an .h5ad there (zellkonverter, sceasy)",
    ".rdata": "a file of R: write an .h5ad there (zellkonverter, sceasy)",
    ".qs": "a file of R: write an .h5ad there (zellkonverter, sceasy)",
    ".h5seurat": "a Seurat file: SeuratDisk::Convert(..., dest = 'h5ad')",
    ".h5mu": "a MuData file: mudata.read(...).mod['rna'].write_h5ad(...)",
    ".zarr": "a zarr store: --format spatialdata, or anndata.read_zarr(...).write_h5ad(...)",
}
XY_COLUMNS = ("x", "y"), ("pxl_col_in_fullres", "pxl_row_in_fullres")  # of obsm['spatial'] as a table
ZARR = (".zgroup", ".zattrs", "zarr.json")
GZIP = b"\x1f\x8b"


@dataclass(frozen=True)
class Sample:
    """One .h5ad, and what a HEST folder holds beside it."""

    name: str
    path: Path
    image: Path | None
    metadata: dict[str, Any] = field(default_factory=dict)
    patches: Path | None = None


def find_samples(source: Path, image: Path | None) -> list[Sample]:
    """The samples of a source; their images are found before any is read."""
    _check_form(source)
    if source.is_file():
        return [Sample(source.stem, source, image)]
    files = sorted((source / "st").glob("*.h5ad"))
    if not files:
        loose = [] if is_slice(source) else sorted(path.name for path in source.glob("*.h5ad"))
        found = ", ".join(loose[:4]) if loose else found_in(source)
        fix = "; give one of them" if loose else "; correct SOURCE"
        raise ValueError(
            f"{source}: expected an .h5ad file or a folder with st/ID.h5ad and wsis/ID.tif, found {found}{fix}"
        )
    if image is not None and len(files) > 1:
        raise ValueError(
            f"--image: expected one sample, found {', '.join(path.stem for path in files)}; give one .h5ad"
        )
    return [_hest_sample(source, path, image) for path in files]


def _check_form(source: Path) -> None:
    """Raises ValueError for a file or folder of another form, saying which it is and what to do."""
    form = OTHER_FORMS.get(source.suffix.lower())
    if source.is_dir():
        form = OTHER_FORMS[".zarr"] if any((source / name).exists() for name in ZARR) else form
    elif source.is_file() and form is None:
        with source.open("rb") as file:
            form = OTHER_FORMS[".gz"] if file.read(2) == GZIP else _form_of_hdf5(source)
    if form is not None and source.exists():
        raise ValueError(f"{source}: expected an .h5ad file, found {form}")


def _form_of_hdf5(source: Path) -> str | None:
    """What else than an AnnData an HDF5 file holds; None for one, or for no HDF5, which reading it refuses."""
    if not h5py.is_hdf5(source):
        return None
    with reading(source, "an .h5ad file"), h5py.File(source) as file:
        keys = set(file)
    if "obs" in keys and "var" in keys:
        return OTHER_FORMS[".h5mu"] if "mod" in keys else None
    if "row_attrs" in keys:
        return OTHER_FORMS[".loom"]
    if "matrix" in keys:
        return "a 10x matrix, which has no positions: put it beside the spatial folder, that is a slice as it is"
    return f"HDF5 with {', '.join(sorted(keys)[:5]) or 'nothing'} in place of X, obs and var"


def _hest_sample(source: Path, path: Path, image: Path | None) -> Sample:
    images = [image for image in images_in(source / "wsis") if image.stem == path.stem]
    metadata, content = source / "metadata" / f"{path.stem}.json", {}
    if metadata.is_file():
        with reading(metadata, "metadata in JSON"):
            content = dict(json.loads(metadata.read_text(encoding="utf-8-sig")))
    patches = source / "patches" / f"{path.stem}.h5"
    chosen = only_image(source / "wsis", images, image, path.stem)
    return Sample(path.stem, path, chosen, content, patches if patches.is_file() else None)


def read_sample(sample: Sample, pitch_um: float | None = None, library_key: str | None = None) -> Iterator[Source]:
    """The slice of one .h5ad, or one for each value of a column of obs; obsm['spatial'] is x, y in pixels."""
    import anndata

    with reading(sample.path, "an .h5ad file"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of repeated names, which are looked at below
        adata = anndata.read_h5ad(sample.path)
    xy_px = _coordinates(sample.path, adata)
    if library_key is None:
        source = from_anndata(adata, sample.name, sample.path, xy_px, sample.image, pitch_um, sample.metadata)
        source.notes += _patches(sample.patches)
        yield source
        return
    parts = sections.split(str(sample.path), adata, library_key, sample.name)
    if sample.image is not None and len(parts) > 1:
        found = f"{len(parts)} in obs['{library_key}']"
        raise ValueError(f"{sample.image}: expected the image of one section, found {found}; import without --image")
    sources = [  # all of them are read before the first is written
        from_anndata(
            *(adata[spots], name, sample.path, xy_px[spots], sample.image, pitch_um, sample.metadata),
            library_key=library_key,
        )
        for name, spots in parts
    ]
    for source in sources:
        source.without_image = True
    yield from sources


def _coordinates(path: Path, adata: Any) -> np.ndarray:
    """x and y (S, 2) of the spots in full-resolution pixels."""
    stored: Any = adata.obsm["spatial"] if "spatial" in adata.obsm else np.zeros((0, 0))
    named = next((list(names) for names in XY_COLUMNS if set(names) <= set(getattr(stored, "columns", ()))), None)
    try:
        xy_px = np.asarray(stored if named is None else stored[named], dtype=float)
    except (TypeError, ValueError):  # text
        xy_px = np.full(np.shape(stored), np.nan)
    if xy_px.ndim != 2 or xy_px.shape[1] < 2 or not np.isfinite(xy_px).all():
        found = f"keys {', '.join(adata.obsm) or 'none'}" if not xy_px.size else f"shape {xy_px.shape} or no numbers"
        raise ValueError(
            f"{path}: expected obsm['spatial'], x and y in full-resolution pixels, found {found}; write them there"
        )
    return xy_px[:, :2]


def _patches(path: Path | None) -> list[str]:
    """A note on patches that lie beside a sample."""
    if path is None:
        return []
    with reading(path, "patches in HDF5"), h5py.File(path) as file:
        names = [name for name in ("barcode", "barcodes") if name in file]
        return [f"{file[names[0]].shape[0]:,} patches, not imported"] if names else []


def read_h5ad(
    source: Path, image: Path | None = None, pitch_um: float | None = None, library_key: str | None = None
) -> Iterator[Source]:
    """The slices of an .h5ad file or of a HEST-1k folder, one after the other.

    Parameters
    ----------
    source : .h5ad, or folder with st/ and wsis/
    image : the full-resolution H&E of an .h5ad; without it the images of uns['spatial'] serve
    pitch_um : distance between neighbouring spots; default 100 on a staggered array, else as stated
    library_key : column of obs with the section of each spot, where several are joined
    """
    for sample in find_samples(source, image):
        yield from read_sample(sample, pitch_um, library_key)
