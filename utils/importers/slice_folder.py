"""The files of an imported slice, as Space Ranger names them, and its line of slices.csv.

Shapes: S spots, G genes.
"""

from __future__ import annotations

import csv
import io
import shutil
from pathlib import Path, PurePath
from typing import Any

import numpy as np
import pandas as pd
from PIL import Image

from utils.files.atomic import write_record, write_whole
from utils.files.hashing import companions
from utils.importers.images import image_size, reduced_image
from utils.importers.source import Source
from utils.slices import splits, visium
from utils.slices.matrix import CountMatrix, write_matrix

LONGEST_PX = {"hires": 2000, "lowres": 600}  # sides of Space Ranger's small images


def write_folder(folder: Path, source: Source, memory: float) -> str | None:
    """Write all files of a slice into a new folder; gives the name of the full-resolution image, if there is one."""
    (folder / "spatial").mkdir(parents=True)
    image = _write_image(folder, source)
    matrix = CountMatrix(source.counts, source.spots.index.to_numpy(), source.genes, source.gene_ids)
    about = {"library_ids": np.array([source.name.encode()]), "software_version": "magic import_slices"}
    about["chemistry_description"] = "unknown"
    write_matrix(folder / "filtered_feature_bc_matrix.h5", matrix, about, memory=memory)
    write_positions(folder / "spatial" / "tissue_positions.csv", source)
    scales = _write_small(folder / "spatial", source)
    factors = source.scalefactors | scales
    for key in ("fiducial_diameter_fullres", "spot_diameter_fullres"):  # the first is there because readers expect it
        factors.setdefault(key, source.spot_diameter_px)
    write_record(folder / "spatial" / "scalefactors_json.json", factors)
    return image


def _write_image(folder: Path, source: Source) -> str | None:
    """The full-resolution image: a file, with those that belong to it, byte for byte; pixels as TIFF without loss."""
    if source.image is None:
        return None
    if isinstance(source.image, Path):
        name = source.image.name
        if name in visium.BY_PRODUCTS or name.startswith("."):  # which no reader of the folder takes for this image
            name = f"{source.name}_{name.lstrip('.')}"
        shutil.copyfile(source.image, folder / name)
        for other in companions(source.image):
            place = folder / other.relative_to(source.image.parent)
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(other, place)
        return name
    import tifffile

    name = f"{source.name}.tif"
    tiled: Any = {"photometric": "rgb", "tile": (256, 256), "compression": "zlib", "metadata": None}
    tifffile.imwrite(folder / name, source.image, **tiled)
    return name


def _write_small(folder: Path, source: Source) -> dict[str, float]:
    """The hires and lowres image: those of the source, else the largest one there is, made smaller by Lanczos.

    Gives their scale factors. Where there is but a lowres image, hires is left out.
    """
    largest, scale = source.image, 1.0
    if largest is None and "hires" in source.small:
        largest, scale = source.small["hires"], source.scalefactors["tissue_hires_scalef"]
    full = None if largest is None else [side / scale for side in image_size(largest)]
    scales, files = {}, {kind: folder / f"tissue_{kind}_image.png" for kind in LONGEST_PX}
    for kind, longest in LONGEST_PX.items():
        usual = 1.0 if full is None else min(1.0, longest / max(full))
        scales[kind] = float(source.scalefactors.get(f"tissue_{kind}_scalef", usual))
        given = source.small.get(kind)
        if isinstance(given, Path):
            shutil.copyfile(given, files[kind])
        elif given is not None:
            Image.fromarray(given).save(files[kind])
    missing = [kind for kind in LONGEST_PX if kind not in source.small]
    if largest is not None and full is not None and missing:
        opened = reduced_image(largest, round(max(full) * max(scales[kind] for kind in missing)))
        for kind in missing:
            size = [round(side * scales[kind]) for side in full]
            opened.resize(size, Image.Resampling.LANCZOS).save(files[kind])
    return {f"tissue_{kind}_scalef": scale for kind, scale in scales.items()}


def write_positions(path: Path, source: Source) -> None:
    """The positions with a header, as Space Ranger 2 writes them; only spots that are kept, all under tissue."""
    spots = source.spots
    columns: dict[str, Any] = {
        "in_tissue": 1,
        "array_row": spots["array_row"].astype(int),
        "array_col": spots["array_col"].astype(int),
    }
    for name, axis in (("pxl_row_in_fullres", "y_fullres_px"), ("pxl_col_in_fullres", "x_fullres_px")):
        whole = (spots[axis] == spots[axis].round()).all()
        columns[name] = spots[axis].astype(np.int64) if whole else spots[axis]
    pd.DataFrame(columns, index=spots.index).to_csv(path, index_label="barcode")


def add_row(out: Path, row: splits.SliceRow) -> None:
    """Add a line to slices.csv; the lines that are there stay as they are, and one of this slice is kept.

    Where there is no table yet, slices that lie there already are listed too: a table leaves out what it does not list.
    """
    path = out / "slices.csv"
    if not path.exists():
        others = [other for other in splits.read_table(out, split=False)[0] if other.slice != row.slice]
        splits.write_table([*others, row], path)
        return
    number, header, rows = _read_table(path)
    at = header.index("slice")
    if any(PurePath(cells[at]).as_posix() == row.slice for cells in rows if cells[at:]):
        return
    lines = io.StringIO(path.read_bytes().decode(), newline="").readlines()
    missing = [name for name in splits.COLUMNS if name not in header]
    end = "\r\n" if lines[number - 1].endswith("\r\n") else "\n"
    lines[number - 1] = ",".join([lines[number - 1].rstrip("\r\n"), *missing]) + end
    lines[-1] = lines[-1].rstrip("\r\n") + end
    values: dict[str, Any] = {"slice": row.slice, "patient": row.patient, "part": row.part, "image": row.image or ""}
    values["spot_pitch_um"] = "" if row.spot_pitch_um is None else f"{row.spot_pitch_um:.12g}"
    added = io.StringIO()
    csv.writer(added, lineterminator=end).writerow([values.get(name, "") for name in [*header, *missing]])
    write_whole(path, "".join([*lines, added.getvalue()]).encode())


def check_table(out: Path) -> None:
    """Raises ValueError where there is a slices.csv that a line cannot be added to."""
    if (out / "slices.csv").exists():
        _read_table(out / "slices.csv")


def _read_table(path: Path) -> tuple[int, list[str], list[list[str]]]:
    """The line that the header of slices.csv is on, its cells, and the cells of the other lines that are not blank."""
    lines = splits.table_lines(path)
    number, header = lines[0] if lines else (0, [])
    if "slice" not in header:
        found = ",".join(header) or "an empty file"
        raise ValueError(f"{path}: expected the header {','.join(splits.COLUMNS)}, found {found}; fix the header")
    return number, header, [cells for _, cells in lines[1:]]
