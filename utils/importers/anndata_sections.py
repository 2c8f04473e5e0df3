"""The sections of an AnnData: one, or several that were joined and that a column of obs separates.

Shapes: S spots.
"""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pandas as pd

from utils.importers.anndata_counts import columns_named, plain_name
from utils.importers.source import place_spots
from utils.slices import lattice

# Plain names, as plain_name gives them
LIBRARY_COLUMNS = ("libraryid", "library")  # several values are several arrays, wherever they lie
SECTION_COLUMNS = (
    *LIBRARY_COLUMNS,
    *("sampleid", "sample", "slice", "sliceid", "section", "sectionid", "slide", "slideid"),
    *("origident", "batch", "dataset", "capturearea", "puck"),
)
PATIENT_COLUMNS = (
    *("patient", "patientid", "donorid", "donor", "subject", "subjectid", "individual", "individualid"),
    *("participant", "participantid", "caseid"),  # not case, which may mean the opposite of control
)
COORDINATES = ("array_row", "array_col", "pxl_row_in_fullres", "pxl_col_in_fullres", "x", "y")  # never sections
NOBODY = ("", "nan", "none", "unknown", "na", "n/a", "<na>")
FEWEST = 3  # spots of a section
CLOSE = 0.75  # of the distance between neighbours: nearer spots are of several sections


def as_labels(values: pd.Series) -> pd.Series:
    """Values as text; whole numbers in floating point without their fraction."""
    if values.dtype.kind == "f" and (values.dropna() % 1 == 0).all():
        values = values.astype("Int64")
    return values.astype(str)


def libraries(where: str, adata: Any) -> dict[str, dict[str, Any]]:
    """The images and scale factors of uns['spatial'], by library; others, such as the path of an image, are left out.

    Raises ValueError where the CELLxGENE schema says that the file is not of a single section.
    """
    spatial = adata.uns.get("spatial")
    if not isinstance(spatial, dict):
        return {}
    if "is_single" in spatial and not bool(spatial["is_single"]):
        raise ValueError(
            f"{where}: expected one section, found uns['spatial']['is_single'] False: spots of several arrays without "
            "images or places; get the file of each section"
        )
    by_name = {"": spatial} if "images" in spatial else spatial  # without a library's name
    entries = {str(name): _entry(entry) for name, entry in by_name.items()}
    return {name: entry for name, entry in entries.items() if entry["images"] or entry["scalefactors"]}


def _entry(stored: Any) -> dict[str, dict[str, Any]]:
    """Images, which are arrays of two or three axes, and scale factors of a library."""
    parts: dict[str, Any] = {"images": {}, "scalefactors": {}} | (stored if isinstance(stored, dict) else {})
    images, factors = ({**part} if isinstance(part, dict) else {} for part in (parts["images"], parts["scalefactors"]))
    images = {kind: pixels for kind, pixels in images.items() if np.asarray(pixels).ndim in (2, 3)}
    return {"images": images, "scalefactors": factors}


def choose_library(
    where: str,
    by_library: dict[str, dict[str, Any]],
    obs: pd.DataFrame,
    fitting: list[str],
    library_key: str | None = None,
) -> dict[str, Any]:
    """The entry of the section: the only one, the one that a column of obs names, or the only one that fits.

    Parameters
    ----------
    where : what messages name
    by_library : entries of uns['spatial'] by library
    obs : DataFrame (S, ...), the spots of one section
    fitting : libraries whose image all spots lie on
    library_key : the column that the section was split by

    Raises ValueError where several are left.
    """
    if len(by_library) < 2:
        return next(iter(by_library.values()), {})
    columns = _in_order(obs) if library_key is None else [library_key, *_in_order(obs)]
    values = {column: set(as_labels(obs[column])) for column in columns}
    named = {column: min(labels) for column, labels in values.items() if len(labels) == 1 and labels <= set(by_library)}
    by_section = [name for column, name in named.items() if column == library_key or _is_section_column(column)]
    for names in (by_section[:1], set(named.values()), set(fitting)):
        if len(names) == 1:
            return by_library[next(iter(names))]
    raise ValueError(
        f"{where}: expected one library in uns['spatial'], found {', '.join(by_library)} and no column of obs "
        "that names this section's; remove the others, or add obs['library_id']"
    )


def check_one_section(where: str, obs: pd.DataFrame, by_library: dict[str, Any], xy_px: np.ndarray, array: Any) -> None:
    """Raises ValueError where several sections are joined, with the column of obs that separates them if there is one.

    Parameters
    ----------
    where : what messages name
    obs : DataFrame (S, ...)
    by_library : entries of uns['spatial']
    xy_px, array : ndarray (S, 2), pixels and array places; None without places
    """
    column = separating_column(obs, by_library, xy_px, array)
    if column is None:
        again = obs.index[obs.index.duplicated()]
        if len(again) or _repeated(xy_px):
            found = f"the barcode {again[0]} again" if len(again) else "two spots at one pixel"
            raise ValueError(
                f"{where}: expected one section, found {found} and no column of obs that tells sections apart; add one "
                "and split them with --library_key, or remove repeated spots"
            )
        return
    values = list(dict.fromkeys(as_labels(obs[column])))
    shown = ", ".join(values[:4]) + (", ..." if len(values) > 4 else "")
    raise ValueError(
        f"{where}: expected one section, found {len(values)} that obs['{column}'] tells apart ({shown}); split them "
        f"with --library_key {column}"
    )


def separating_column(obs: pd.DataFrame, by_library: dict[str, Any], xy_px: np.ndarray, array: Any) -> str | None:
    """The column of obs whose values are sections, None where the spots are of one section.

    That is a column of library ids with several values; one that alone keeps spots apart which share a place or lie on
    each other; or, where the spots as a whole lie on no lattice, one whose values each lie on one.
    """
    columns = [column for column in _in_order(obs) if _is_section_column(column) or not _is_measured(obs[column])]
    by_column = {column: labels for column in columns if (labels := _labels(obs[column])) is not None}
    for column, labels in by_column.items():
        of_libraries = len(by_library) > 1 and set(labels.astype(str)) <= set(by_library)
        if plain_name(column) in LIBRARY_COLUMNS or of_libraries:
            return column
    nearest_px = lattice.nearest_px(xy_px) if len(xy_px) > 1 else np.ones(1)
    close = nearest_px.min() < CLOSE * np.median(nearest_px) and not _on_lattice(xy_px, None)  # no chosen neighbours
    crowded = close or _repeated(array)
    for column, labels in by_column.items():
        if (crowded or _is_section_column(column)) and _keeps_apart(labels, xy_px, array, nearest_px):
            return column
    if _on_lattice(xy_px, array):
        return None
    for column, labels in by_column.items():
        if _is_section_column(column) and all(
            _on_lattice(xy_px[labels == label], None if array is None else array[labels == label])
            for label in np.unique(labels)
        ):
            return column
    return None


def _in_order(obs: pd.DataFrame) -> list[Any]:
    """Columns by how surely they name sections, then by how few values they have."""

    def order(column: Any) -> tuple[int, int]:
        known = SECTION_COLUMNS.index(plain_name(column)) if _is_section_column(column) else len(SECTION_COLUMNS)
        return known, obs[column].astype(str).nunique()

    return sorted(obs.columns, key=order)


def _is_section_column(column: Any) -> bool:
    return plain_name(column) in SECTION_COLUMNS


def _is_measured(values: pd.Series) -> bool:
    """Whether a column holds coordinates or other numbers, which tell no sections apart."""
    return values.dtype.kind == "f" or str(values.name).lower() in COORDINATES


def _labels(values: pd.Series) -> np.ndarray | None:
    """The values (S,) as text where they may name sections: several, none missing, each of a few spots or more."""
    if values.isna().any():
        return None
    labels = as_labels(values).to_numpy(dtype=str)
    _, counts = np.unique(labels, return_counts=True)
    return labels if len(counts) > 1 and counts.min() >= FEWEST else None


def _keeps_apart(labels: np.ndarray, xy_px: np.ndarray, array: Any, nearest_px: np.ndarray) -> bool:
    """Whether spots of one label (S,) are apart while those of several labels share places or lie on each other."""
    numbers = np.unique(labels, return_inverse=True)[1]
    within_px = min(lattice.nearest_px(xy_px[numbers == number]).min() for number in range(numbers.max() + 1))
    if within_px == 0:
        return False
    labelled = None if array is None else np.column_stack([numbers, array])
    return bool(nearest_px.min() < CLOSE * within_px or (_repeated(array) and not _repeated(labelled)))


def _repeated(rows: np.ndarray | None) -> bool:
    return rows is not None and len(np.unique(rows, axis=0)) < len(rows)


def _on_lattice(xy_px: np.ndarray, array: Any) -> bool:
    try:
        place_spots("", pd.RangeIndex(len(xy_px)), xy_px, array)
    except ValueError:
        return False
    return True


def split(where: str, adata: Any, column: str, stem: str) -> list[tuple[str, np.ndarray]]:
    """Name and spots (S,) bool of each section that a column tells apart, in the order of the file.

    A section is named by its value, behind `stem` where the value is but a number. Raises ValueError where there is no
    such column, or spots without a value.
    """
    if column not in adata.obs:
        columns = ", ".join(map(str, adata.obs.columns)) or "none"
        raise ValueError(
            f"{where}: expected the column {column} of --library_key in obs, found {columns}; name one of them"
        )
    if adata.obs[column].isna().any():
        number = adata.obs[column].isna().sum()
        raise ValueError(
            f"{where}: expected a section for each spot in obs['{column}'], found {number} without; fix it"
        )
    labels = as_labels(adata.obs[column]).to_numpy()
    by_name: dict[str, list[str]] = {}
    for label in dict.fromkeys(labels):
        by_name.setdefault(_folder_name(stem, label), []).append(label)
    for name, alike in by_name.items():
        if len(alike) > 1:
            raise ValueError(
                f"{where}: expected sections with names of their own, found {alike} for {name}; rename one"
            )
    return [(name, labels == alike[0]) for name, alike in by_name.items()]


def _folder_name(stem: str, value: str) -> str:
    name = re.sub(r"[^\w.+-]+", "_", value).strip("_.")
    return name if re.search(r"[^\W\d_]", name) else f"{stem}_{name}"


def patient_of(obs: pd.DataFrame, stated: Any, name: str) -> str:
    """The patient: as stated, else the only value of a column of patients, else the slice's own name."""
    columns = columns_named(obs, PATIENT_COLUMNS)
    values = [stated, *(values.iloc[0] for values in columns if values.astype(str).nunique() == 1)]
    texts = (str(int(v)) if isinstance(v, float) and v.is_integer() else str(v).strip() for v in values)
    return next((text for text in texts if text.lower() not in NOBODY), name)
