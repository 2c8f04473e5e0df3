"""A slice as another format holds it, and what the readers of all formats share.

Shapes: S spots, G genes. Coordinates are full-resolution pixels of the H&E, origin top left.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy.sparse import csr_matrix

from utils.slices import checks, visium
from utils.slices.lattice import Lattice, fit_lattice
from utils.slices.matrix import listing

SPOT_COLUMNS = ["array_row", "array_col", "x_fullres_px", "y_fullres_px"]
OF_GEO = re.compile(r"GSM\d+[_.-]")


@dataclass
class Source:
    """A slice as another format holds it: the spots to keep, and all that their folder needs.

    Attributes
    ----------
    name, patient : str
    origin : Path, what messages name
    counts : csr_matrix (S, G) int32, or StoredCounts where they are left in their file
    genes, gene_ids : ndarray (G,) str
    spots : DataFrame (S, 4), index barcode, columns as in visium.Slice
    lattice : Lattice, the array that the spots lie on
    pitch_um : float, as image_tilling.py is to read it from slices.csv
    spot_diameter_px : float
    image : the full-resolution H&E, a file or pixels (height, width, 3) uint8; None without
    small : "hires", "lowres": small images that the source has, files or pixels; others are made from the image
    scalefactors : dict, what the source states, which is kept
    stated_um_per_px : dict, size of a full-resolution pixel by where it is stated
    left_out : dict, how many spots are not imported, by reason
    notes : list of str, further remarks for the line of the slice
    warnings : list of str, a line each
    without_image : bool, whether the image may be added to the folder afterwards, as of several sections of one file
    """

    name: str
    patient: str
    origin: Path
    counts: csr_matrix | visium.StoredCounts
    genes: np.ndarray
    gene_ids: np.ndarray
    spots: pd.DataFrame
    lattice: Lattice
    pitch_um: float
    spot_diameter_px: float
    image: Path | np.ndarray | None = None
    small: dict[str, Path | np.ndarray] = field(default_factory=dict)
    scalefactors: dict[str, Any] = field(default_factory=dict)
    stated_um_per_px: dict[str, float] = field(default_factory=dict)
    left_out: dict[str, int] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    without_image: bool = False

    @property
    def um_per_px(self) -> float:
        """Size of a full-resolution pixel, measured from the spots."""
        return self.pitch_um / self.lattice.pitch_px


def place_spots(
    where: str, barcodes: pd.Index, xy_px: np.ndarray, array: np.ndarray | None = None
) -> tuple[pd.DataFrame, Lattice, list[str]]:
    """The spots (S, 4) of a slice on the lattice that fits them, and remarks on it.

    Parameters
    ----------
    where : what messages name
    barcodes : Index (S,)
    xy_px : ndarray (S, 2), x and y
    array : ndarray (S, 2), stated row and column; None where none are stated
    """
    lattice = fit_lattice(where, xy_px, array)
    columns = np.column_stack([lattice.array, xy_px])
    spots = pd.DataFrame(columns, columns=SPOT_COLUMNS, index=pd.Index(barcodes.astype(str), name="barcode"))
    spots = spots.astype(dict.fromkeys(SPOT_COLUMNS[:2], int))
    remeasured = array is not None and lattice.measured
    notes = ["the stated array places do not fit the pixels; measured ones are written"] if remeasured else []
    return spots, lattice, notes


def found_in(folder: Path) -> str:
    """What a folder holds that is none of the form asked for, and what to do with it."""
    if not folder.is_dir():
        return "a file" if folder.exists() else "no such file or folder"
    of_geo = sorted(path.name for path in folder.iterdir() if OF_GEO.match(path.name))
    if of_geo:
        names = f"{', '.join(of_geo[:2])}{', ...' if len(of_geo) > 2 else ''}"
        return f"files as GEO keeps them ({names}): gunzip and rename them as docs/own_data.md shows"
    if visium.is_slice(folder):
        return f"a Space Ranger folder, which needs no import: use --data {folder.absolute().parent} in the scripts"
    return listing(folder)


def lie_on(xy_px: np.ndarray, size: tuple[int, int]) -> bool:
    """Whether all but a few spots (S, 2) have their centre on an image of that width and height."""
    try:
        checks.spots_on_image("", xy_px, size)
    except ValueError:
        return False
    return True
