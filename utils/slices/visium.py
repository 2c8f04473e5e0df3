"""Space Ranger folders (versions 1 to 3, Visium and Visium HD) into arrays, checked where they enter.

Shapes: S spots, G genes. Coordinates are full-resolution pixels of the H&E, origin top left: x_fullres_px is Space
Ranger's pxl_col_in_fullres, y_fullres_px its pxl_row_in_fullres. Whatever is wrong with a file is a ValueError of one
line: the file, what was expected, what was found, how to mend it.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from scipy.sparse import csr_matrix

from utils.slices.content import counts_hash
from utils.slices.matrix import (
    CountMatrix,
    StoredCounts,
    check_once,
    first_of,
    listing,
    read_barcodes,
    read_genes,
    read_matrix,
    reading,
    slice_matrix,
    spans,
)

if TYPE_CHECKING:
    import pandas as pd

__all__ = [  # with what utils.slices.matrix and content give, so that callers know one reader
    "CountMatrix",
    "Slice",
    "StoredCounts",
    "counts_hash",
    "find_root",
    "format_unmatched",
    "is_slice",
    "is_staggered",
    "pitch_fullres_px",
    "read_barcodes",
    "read_matrix",
    "read_positions",
    "read_scalefactors",
    "read_slice",
    "read_slice_genes",
    "spans",
    "spot_pitch_um",
    "tissue_spots",
]

POSITION_FILES = ("tissue_positions.csv", "tissue_positions.parquet", "tissue_positions_list.csv")
POSITION_COLUMNS = ("barcode", "in_tissue", "array_row", "array_col", "pxl_row_in_fullres", "pxl_col_in_fullres")
NEEDED_SCALES = ("tissue_hires_scalef", "tissue_lowres_scalef", "spot_diameter_fullres")
VISIUM_PITCH_UM = 100.0


@dataclass(frozen=True)
class Slice:
    """The spots under tissue that have counts, in the order of the matrix.

    Attributes
    ----------
    name : str
    root : Path, the folder that holds spatial/
    counts : csr_matrix (S, G) int32, or StoredCounts where they are left in their file
    genes, gene_ids : ndarray (G,) str
    spots : DataFrame (S, 4), index barcode, columns array_row, array_col, x_fullres_px, y_fullres_px
    unmatched : dict, how many spots were left aside, by reason
    """

    name: str
    root: Path
    counts: csr_matrix | StoredCounts
    genes: np.ndarray
    gene_ids: np.ndarray
    spots: pd.DataFrame
    unmatched: dict[str, int]


def _roots(folder: Path) -> list[Path]:
    """Folders that may be meant; more than one where Visium HD was binned at several sizes."""
    for base in (folder, folder / "outs"):
        bins = sorted(p.parent for p in base.glob("binned_outputs/square_*um/spatial") if p.is_dir())
        # Visium HD writes a spatial/ without positions above its bins: that one is not meant.
        if (base / "spatial").is_dir() and (not bins or first_of(base / "spatial", POSITION_FILES)):
            return [base]
        if bins:
            return bins
    return []


def find_root(folder: str | Path) -> Path:
    """Find the folder that holds spatial/: the folder itself, its outs/ or its only binned_outputs/square_*um."""
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"{folder}: expected a slice folder, found {'a file' if folder.exists() else 'nothing'}")
    roots = _roots(folder)
    if len(roots) > 1:
        bins = ", ".join(f"{folder.name}/{root.relative_to(folder).as_posix()}" for root in roots)
        raise ValueError(f"{folder}: expected one bin size, found {bins}; put one into the slice column of slices.csv")
    if not roots:
        wanted = "spatial/ (here, in outs/ or in binned_outputs/square_*um): a matrix without positions is no slice"
        raise ValueError(f"{folder}: expected {wanted}; found {listing(folder)}; add the spatial folder")
    return roots[0]


def is_slice(folder: str | Path) -> bool:
    """Whether a folder looks like a slice; one with several bin sizes does, and find_root then says what to do."""
    return bool(_roots(Path(folder)))


def _position_table(path: Path) -> pd.DataFrame:
    """The six columns of a positions file, by name, unchecked."""
    import pandas as pd

    with reading(path, "a table of spot positions"):
        if path.suffix == ".parquet":
            table = pd.read_parquet(path, columns=list(POSITION_COLUMNS))
            return table if "barcode" in table else table.reset_index()  # pandas may have kept it as the index
        # As text without a header: pandas would take a seventh column for an index, silently.
        table = pd.read_csv(path, header=None, dtype=str, keep_default_na=False, encoding="utf-8-sig")
    first, names = ",".join(map(str, table.iloc[0])), list(POSITION_COLUMNS)
    if table.shape[1] == len(names) and first.startswith("barcode,"):
        names, table = table.iloc[0].str.strip().tolist(), table.iloc[1:]
    if table.shape[1] != len(names) or set(names) != set(POSITION_COLUMNS):
        wanted, found = ", ".join(POSITION_COLUMNS), f"{table.shape[1]} columns, first line {first}"
        raise ValueError(f"{path}: expected the comma-separated columns {wanted}, found {found}; mend the file")
    return table.set_axis(names, axis=1)


def read_positions(root: str | Path) -> pd.DataFrame:
    """Read all positions of a slice, under tissue or not, from any of Space Ranger's three files.

    Returns
    -------
    DataFrame, index barcode; columns in_tissue (bool), array_row, array_col (int), x_fullres_px, y_fullres_px (float64)
    """
    import pandas as pd

    path = first_of(Path(root) / "spatial", POSITION_FILES)
    if path is None:
        raise ValueError(f"{Path(root) / 'spatial'}: expected one of {', '.join(POSITION_FILES)}, found none; add it")
    table = _position_table(path)
    numbers = np.column_stack([pd.to_numeric(table[c], errors="coerce").to_numpy(float) for c in POSITION_COLUMNS[1:]])
    bad = ~np.isfinite(numbers).all(axis=1) | (numbers[:, :3] != np.rint(numbers[:, :3])).any(axis=1)
    bad |= ~np.isin(numbers[:, 0], (0, 1))
    if bad.any():
        found = ",".join(str(value) for value in table[list(POSITION_COLUMNS)].to_numpy()[bad][0])
        wanted = "in_tissue 0 or 1, whole array places and finite pixels"
        raise ValueError(f"{path}: expected {wanted}, found {found}; mend or remove the line")
    barcodes = table["barcode"].to_numpy(dtype=object)
    check_once(path, barcodes)
    in_tissue, array_row, array_col, y_px, x_px = numbers.T
    columns = {"in_tissue": in_tissue == 1, "array_row": array_row.astype(int), "array_col": array_col.astype(int)}
    columns |= {"x_fullres_px": x_px, "y_fullres_px": y_px}
    return pd.DataFrame(columns, index=pd.Index(barcodes, name="barcode"))


def read_scalefactors(root: str | Path) -> dict[str, float]:
    """Read the numbers of scalefactors_json.json; those that are divided by are positive and finite."""
    path = Path(root) / "spatial" / "scalefactors_json.json"
    if not path.is_file():
        raise ValueError(f"{path}: expected the scale factors of Space Ranger, found no such file; add it")
    with reading(path, "scale factors in JSON"):
        content = dict(json.loads(path.read_text(encoding="utf-8-sig")))
    for key in (*NEEDED_SCALES, "bin_size_um", "microns_per_pixel"):
        value = content.get(key, "no such key" if key in NEEDED_SCALES else 1)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
            raise ValueError(f"{path}: expected a positive number as {key}, found {value}; mend it")
    return {key: float(value) for key, value in content.items() if isinstance(value, int | float)}


def _match(
    root: Path, positions: pd.DataFrame, barcodes: np.ndarray
) -> tuple[pd.DataFrame, np.ndarray, dict[str, int]]:
    """Spots under tissue that have both sides, their rows (S,) in the matrix, and how many have not."""
    import pandas as pd

    place = positions.index.get_indexer(pd.Index(barcodes))  # -1 without a position
    known = place >= 0
    if not known.any():
        sides = [names[0] if len(names) else "no barcode" for names in (barcodes, positions.index)]
        found = f"{sides[0]} in the counts and {sides[1]} in the positions"
        raise ValueError(f"{root}: expected barcodes in common, found {found}; take both files from one run")
    in_tissue = positions["in_tissue"].to_numpy()
    rows = np.flatnonzero(known)[in_tissue[place[known]]]
    if not len(rows):
        found = f"{in_tissue.sum()} of {len(positions)} positions in tissue, none of them with counts"
        raise ValueError(f"{root}: expected spots in tissue, found {found}; mend in_tissue in the positions file")
    unmatched = {
        "counts without position": int((~known).sum()),
        "tissue positions without counts": int(in_tissue.sum()) - len(rows),
        "not in tissue": int(known.sum()) - len(rows),
    }
    return positions.iloc[place[rows]].drop(columns="in_tissue"), rows, unmatched


def read_slice(folder: str | Path, name: str | None = None, memory: float = math.inf) -> Slice:
    """Read the spots of a slice that are in tissue and have counts, in the order of the matrix.

    Parameters
    ----------
    folder : the slice folder, as find_root takes it
    name : what to call the slice; default the name of the folder
    memory : bytes that the counts may take; more of them stay in their HDF5 file
    """
    root = find_root(folder)
    matrix = read_matrix(slice_matrix(root) or root, memory)  # without any matrix read_matrix says what is missing
    spots, rows, unmatched = _match(root, read_positions(root), matrix.barcodes)
    name = name or Path(folder).absolute().name
    counts = matrix.counts.of(rows) if isinstance(matrix.counts, StoredCounts) else matrix.counts[rows]
    return Slice(name, root, counts, matrix.genes, matrix.gene_ids, spots, unmatched)


def read_slice_genes(folder: str | Path) -> tuple[np.ndarray, np.ndarray]:
    """Names and ids (G,) of the genes that read_slice would give, without reading counts."""
    root = find_root(folder)
    return read_genes(slice_matrix(root) or root)


def tissue_spots(root: str | Path) -> tuple[pd.DataFrame, dict[str, int]]:
    """Find the spots that read_slice would give, in its order, without reading counts; for tiling.

    Where there are no counts at all, every position in tissue is a spot, in the order of the positions file.
    """
    positions, barcodes = read_positions(root), read_barcodes(root)
    spots, _, unmatched = _match(Path(root), positions, positions.index.to_numpy() if barcodes is None else barcodes)
    return spots, unmatched


def format_unmatched(unmatched: dict[str, int]) -> str:
    """The reasons that occurred, on one line; empty where every spot was matched."""
    return ", ".join(f"{number:,} {reason}" for reason, number in unmatched.items() if number)


def is_staggered(positions: pd.DataFrame) -> bool:
    """Whether the array is Visium's: every other row is shifted by half a pitch and columns step by two."""
    row, col = positions["array_row"].to_numpy(), positions["array_col"].to_numpy()
    return bool(np.all((row + col) % 2 == 0)) and len(np.unique(row % 2)) == 2


def pitch_fullres_px(positions: pd.DataFrame) -> float:
    """Measure the centre-to-centre distance between neighbouring spots, in full-resolution pixels.

    An affine map from array places to pixels is fitted, which holes, turns and rounding hardly touch. Its determinant
    is the area per place: pitch squared on a square array; on a staggered one, where a column is half a pitch and a row
    sqrt(3)/2 of it, sqrt(3)/4 of that. Spots on one line have no area: their closest pair is taken.
    """
    array = positions[["array_col", "array_row"]].to_numpy(float)
    pixels = positions[["x_fullres_px", "y_fullres_px"]].to_numpy(float)
    if len(pixels) < 2:
        raise ValueError(f"expected two spots or more to measure their pitch, found {len(pixels)}; check the positions")
    slopes, _, rank, _ = np.linalg.lstsq(array - array.mean(0), pixels - pixels.mean(0), rcond=None)
    area_px2 = abs(np.linalg.det(slopes))
    if rank == 2 and area_px2 > 1e-9 * np.square(slopes).sum():
        return math.sqrt(area_px2 * (4 / math.sqrt(3) if is_staggered(positions) else 1))
    from scipy.spatial import KDTree

    closest_px = float(KDTree(pixels).query(pixels, k=2)[0][:, 1].min())
    if closest_px == 0:
        raise ValueError(
            "expected spots at different pixels to measure their pitch, found two at one; check the positions"
        )
    return closest_px


def spot_pitch_um(root: str | Path, positions: pd.DataFrame, given: float | None = None) -> float:
    """The distance between neighbouring spots in um: as given, else Visium's 100, else the bin size of Visium HD."""
    if given is not None:
        if not 0 < given < math.inf:
            raise ValueError(f"{root}: expected a positive spot pitch in um, found {given}; mend spot_pitch_um")
        return float(given)
    if is_staggered(positions):
        return VISIUM_PITCH_UM
    bin_size_um = read_scalefactors(root).get("bin_size_um")
    if bin_size_um is None:
        mend = "add the column spot_pitch_um to slices.csv or use --spot_pitch_um (200 for legacy ST)"
        raise ValueError(f"{root}: expected a Visium array or the bin size of Visium HD, found a square array; {mend}")
    return bin_size_um
