"""The files of spatial/ with the places of the spots: positions and scale factors, checked where they enter.

Coordinates are full-resolution pixels of the H&E, origin top left: x_fullres_px is Space Ranger's pxl_col_in_fullres,
y_fullres_px its pxl_row_in_fullres.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from utils.slices.folders import HIRES, LOWRES, POSITION_FILES, SCALEFACTORS
from utils.slices.matrix import check_once, first_of, listing, reading

if TYPE_CHECKING:
    import pandas as pd

POSITION_COLUMNS = ("barcode", "in_tissue", "array_row", "array_col", "pxl_row_in_fullres", "pxl_col_in_fullres")
SCALED = {"tissue_hires_scalef": HIRES, "tissue_lowres_scalef": LOWRES}  # needed where the image is there


def _position_table(path: Path) -> pd.DataFrame:
    """The six columns of a positions file, by name, unchecked."""
    import pandas as pd

    with reading(path, "a table of spot positions"):
        if path.suffix.lower() == ".parquet":
            table = pd.read_parquet(path, columns=list(POSITION_COLUMNS))
            return table if "barcode" in table else table.reset_index()  # pandas may have kept it as the index
        # As text without a header: pandas would take a seventh column for an index, silently.
        table = pd.read_csv(path, header=None, dtype=str, keep_default_na=False, encoding="utf-8-sig")
    first = [cell.strip().lower() for cell in table.iloc[0]]
    if sorted(first) == sorted(POSITION_COLUMNS):
        return table.iloc[1:].set_axis(first, axis=1)
    is_header = not pd.to_numeric(pd.Series(first), errors="coerce").notna().any()  # of other names
    if len(first) != len(POSITION_COLUMNS) or is_header:
        wanted, found = ", ".join(POSITION_COLUMNS), f"{len(first)} columns, first line {','.join(table.iloc[0])}"
        raise ValueError(f"{path}: expected the comma-separated columns {wanted}, found {found}; correct the file")
    return table.set_axis(list(POSITION_COLUMNS), axis=1)


def read_positions(root: str | Path) -> pd.DataFrame:
    """Read all positions of a slice, under tissue or not, from any of Space Ranger's three files.

    Returns
    -------
    DataFrame, index barcode; columns in_tissue (bool), array_row, array_col (int), x_fullres_px, y_fullres_px (float64)
    """
    spatial = Path(root) / "spatial"
    path = first_of(spatial, POSITION_FILES)
    if path is None:
        raise ValueError(f"{spatial}: expected one of {', '.join(POSITION_FILES)}, found {listing(spatial)}; add it")
    return read_position_file(path)


def read_position_file(path: Path) -> pd.DataFrame:
    """The same from a file of any name: parquet by its ending, else comma-separated text."""
    import pandas as pd

    table = _position_table(path)
    table["in_tissue"] = table["in_tissue"].astype(str).str.lower().replace({"true": "1", "false": "0"})
    numbers = np.column_stack([pd.to_numeric(table[c], errors="coerce").to_numpy(float) for c in POSITION_COLUMNS[1:]])
    bad = ~np.isfinite(numbers).all(axis=1) | (numbers[:, :3] != np.rint(numbers[:, :3])).any(axis=1)
    bad |= ~np.isin(numbers[:, 0], (0, 1))
    if bad.any():
        found = ",".join(str(value) for value in table[list(POSITION_COLUMNS)].to_numpy()[bad][0])
        wanted = "in_tissue 0 or 1, whole array places and finite pixels"
        raise ValueError(f"{path}: expected {wanted}, found {found}; correct or remove the line")
    barcodes = table["barcode"].to_numpy(dtype=object)
    check_once(path, barcodes)
    in_tissue, array_row, array_col, y_px, x_px = numbers.T
    columns = {"in_tissue": in_tissue == 1, "array_row": array_row.astype(int), "array_col": array_col.astype(int)}
    columns |= {"x_fullres_px": x_px, "y_fullres_px": y_px}
    return pd.DataFrame(columns, index=pd.Index(barcodes, name="barcode"))


def positive(value: Any) -> float | None:
    """A positive finite number, also as text or as the only one of an array (R writes both), else None."""
    try:
        number = 0.0 if isinstance(value, bool) else float(np.asarray(value, dtype=float).item())
    except (TypeError, ValueError):
        return None
    return number if 0 < number < math.inf else None


def read_scalefactors(root: str | Path) -> dict[str, float]:
    """Read the numbers of scalefactors_json.json; those that are divided by are positive and finite.

    The scale of a small image may be missing where the image is.
    """
    path = Path(root) / "spatial" / SCALEFACTORS
    if not path.is_file():
        raise ValueError(f"{path}: expected the scale factors of Space Ranger, found no such file; add it")
    with reading(path, "scale factors in JSON"):
        content = dict(json.loads(path.read_text(encoding="utf-8-sig")))
    numbers = {key: number for key, value in content.items() if (number := positive(value)) is not None}
    needed = {"spot_diameter_fullres", *(key for key, image in SCALED.items() if (path.parent / image).exists())}
    for key in (*SCALED, "spot_diameter_fullres", "bin_size_um", "microns_per_pixel"):
        if key not in numbers and key in needed | content.keys():
            found = content.get(key, "no such key")
            raise ValueError(f"{path}: expected a positive number as {key}, found {found}; correct it")
    return numbers
