"""Space Ranger folders (versions 1 to 3, Visium and Visium HD), each opened once as a `Slice`, checked where it enters.

    slice_ = open_slice(Path("data/Breast_cancer/1142243F"))
    slice_.spots, slice_.pitch_px, slice_.source_image("auto"), slice_.with_counts().counts

Shapes: S spots, G genes. Coordinates are full-resolution pixels of the H&E, origin top left: x_fullres_px is Space
Ranger's pxl_col_in_fullres, y_fullres_px its pxl_row_in_fullres. Whatever is wrong with a file is a ValueError of one
line: the file, what was expected, what was found, how to fix it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from scipy.sparse import csr_matrix

from utils.images.image import SUFFIXES, image_size, images_in
from utils.slices.content import counts_hash
from utils.slices.folders import HIRES, LOWRES, SPATIAL_FILES, find_root, is_slice, why_no_slice
from utils.slices.lattice import Lattice, fit_lattice
from utils.slices.matrix import (
    CountMatrix,
    StoredCounts,
    read_barcodes,
    read_genes,
    read_matrix,
    slice_matrix,
    spans,
)
from utils.slices.spatial_files import read_position_file, read_positions, read_scalefactors

if TYPE_CHECKING:
    import pandas as pd

__all__ = [  # with what the files beside this one give, so that callers know one reader
    "HIRES",
    "LOWRES",
    "CountMatrix",
    "CountedSlice",
    "Slice",
    "SourceImage",
    "StoredCounts",
    "counts_hash",
    "find_root",
    "fit_positions",
    "format_unmatched",
    "is_slice",
    "open_slice",
    "read_barcodes",
    "read_matrix",
    "read_position_file",
    "read_positions",
    "read_scalefactors",
    "read_slice",
    "read_slice_genes",
    "spans",
    "why_no_slice",
]

BY_PRODUCTS = (  # of Space Ranger: never the full-resolution image
    *(HIRES, LOWRES, "aligned_fiducials.jpg", "aligned_tissue_image.jpg", "detected_tissue_image.jpg"),
    *("cytassist_image.tiff", "registration_cytassist_image.tiff"),
)
POSITIONS_ARRAY, POSITIONS_PX = ("array_row", "array_col"), ("x_fullres_px", "y_fullres_px")
VISIUM_PITCH_UM = 100.0
DISAGREE = 0.05  # two statements of um per px that differ by more are worth a warning
SIZE = 0.003  # by which a side may differ from what a small image makes of it, beside its own rounding
EXPORT = 0.005  # by which the scale of an export may differ from a whole number or its inverse
SPOT_DIAMETER = 0.3, 1.2  # pitches: 0.5 legacy ST, 0.65 Visium, 1 Visium HD
STAGGERED_SPOTS_UM = 55.0, 65.0, 100.0  # diameters: Visium as made and as Space Ranger writes it, legacy ST
FEW, FEW_FRACTION = 3, 0.02  # spots outside the image, or of one file only, that are no reason to doubt it


@dataclass(frozen=True)
class SourceImage:
    """An image of a slice: `kind` "fullres", "hires" or "lowres", and its pixels per full-resolution pixel.

    The full-resolution pixel is that of the positions. A scan that was exported smaller or larger has another scale.
    """

    kind: str
    path: Path
    scale: float

    @cached_property
    def size(self) -> tuple[int, int]:
        """Width and height in its pixels, from the head of the file. Raises ValueError where that is damaged."""
        return image_size(self.path)


@dataclass(frozen=True)
class Slice:
    """A slice folder without its counts.

    Attributes
    ----------
    name : str
    folder, root : Path, as given, and the folder that holds spatial/
    spots : DataFrame (S, 4), index barcode, columns array_row, array_col, x_fullres_px, y_fullres_px: the spots under
        tissue that have counts, in the order of the matrix; without a matrix all under tissue, in that of the positions
    off_tissue_px : ndarray (N, 2), centres of the positions that are not under tissue
    unmatched : dict, how many spots were left aside, by reason
    rows : ndarray (S,), rows of the spots in the matrix
    matrix : Path or None, the count matrix
    lattice : Lattice or None, of all positions; None where there is a single one
    scalefactors : dict of the positive numbers in scalefactors_json.json
    stated_pitch_um : float or None, as slices.csv or a flag states it
    small : dict, the images "hires" and "lowres" of spatial/ that are there
    warnings : tuple of str, what contradicts itself but can be worked with
    """

    name: str
    folder: Path
    root: Path
    spots: pd.DataFrame
    off_tissue_px: np.ndarray
    unmatched: dict[str, int]
    rows: np.ndarray
    matrix: Path | None
    lattice: Lattice | None
    scalefactors: dict[str, float]
    stated_pitch_um: float | None
    small: dict[str, SourceImage]
    warnings: tuple[str, ...]

    @property
    def xy_fullres_px(self) -> np.ndarray:
        """Centres of the spots (S, 2), x and y."""
        return self.spots[["x_fullres_px", "y_fullres_px"]].to_numpy(float)

    @property
    def pitch_px(self) -> float:
        """Between neighbouring spots, in full-resolution pixels. Raises ValueError where there is a single position."""
        if self.lattice is None:
            raise ValueError(
                f"{self.root}: expected two positions or more to measure their pitch, found one; leave the slice out"
            )
        return self.lattice.pitch_px

    @property
    def known_pitch_um(self) -> float | None:
        """Between neighbouring spots: as stated, else 100 on Visium's array, else the bin size; None where unknown."""
        if self.stated_pitch_um is not None:
            return self.stated_pitch_um
        if self.lattice is not None and self.lattice.staggered:
            return VISIUM_PITCH_UM
        return self.scalefactors.get("bin_size_um")

    @property
    def pitch_um(self) -> float:
        """The same; raises ValueError where it is unknown."""
        known = self.known_pitch_um
        if known is None:
            raise ValueError(
                f"{self.root}: expected a Visium array or the bin size of Visium HD, found a square array; add the "
                "column spot_pitch_um to slices.csv or use --spot_pitch_um (200 for legacy ST)"
            )
        return known

    @property
    def um_per_px(self) -> float | None:
        """Of a full-resolution pixel, by the spots; None where the pitch is not known."""
        known = self.known_pitch_um
        return None if known is None or self.lattice is None else known / self.lattice.pitch_px

    def small_image(self, kind: str) -> SourceImage | None:
        """The "hires" or "lowres" image of spatial/."""
        return self.small.get(kind)

    def fullres_image(self, named: str | None = None) -> Path | None:
        """The full-resolution image: the one named, else the only one in the folder or its root, else None."""
        places = list(dict.fromkeys([self.folder, self.root]))
        if named is not None:
            files = [place / named for place in places if (place / named).is_file()]
            if not files:
                raise ValueError(
                    f"{self.folder}: expected the image {named}, found no such file; correct the image column"
                )
            return files[0]
        images = [path for place in places for path in images_in(place) if path.name not in BY_PRODUCTS]
        images = [path for path in images if path.exists()] or images  # a link to nothing is refused when it is opened
        packed = [path.name for place in places for path in place.iterdir() if _is_packed_image(path)]
        if packed and not images:
            raise ValueError(f"{self.folder}: expected an unpacked image, found {min(packed)}; unpack it")
        if len(images) > 1:
            found_names = ", ".join(path.relative_to(self.folder).as_posix() for path in images)
            raise ValueError(
                f"{self.folder}: expected one full-resolution image, found {found_names}; name it in the image column "
                "of slices.csv, or move the others elsewhere"
            )
        return images[0] if images else None

    def source_image(self, source: str = "auto", named: str | None = None) -> SourceImage:
        """The image to cut tiles from. `source`: "fullres", "hires", or "auto" for the best that is there."""
        path = None if source == "hires" else self.fullres_image(named)
        if path is not None:
            return SourceImage("fullres", path, self.export_scale(image_size(path)))
        hires = self.small_image("hires")
        if source == "fullres" or hires is None:
            wanted = "a full-resolution image" + (f" or spatial/{HIRES}" if source == "auto" else "")
            raise ValueError(f"{self.root}: expected {wanted}, found none; put the H&E image into the folder")
        return hires

    def export_scale(self, size: tuple[int, int]) -> float:
        """Pixels of an image of that width and height per full-resolution pixel: 1, or 2, 3, ..., 1/2, 1/3, ... where
        the sizes of the small images show that the scan was exported so. Other ratios may be those of a crop."""
        small = next(iter(self.small.values()), None)
        if small is None:
            return 1.0
        ratios = [side * small.scale / other for side, other in zip(size, small.size, strict=True)]
        whole = round(max(max(ratios), 1 / min(ratios)))
        exact = (float(whole), 1 / whole)
        return next((scale for scale in exact if all(abs(ratio / scale - 1) <= EXPORT for ratio in ratios)), 1.0)

    def read_genes(self) -> tuple[np.ndarray, np.ndarray]:
        """Names and ids (G,) of the genes that the counts are of."""
        return read_genes(self.matrix or self.root)  # without any matrix read_genes states what is missing

    def with_counts(self, memory: float = math.inf) -> CountedSlice:
        """The slice and the counts of its spots; more than `memory` bytes of them stay in their HDF5 file."""
        matrix = read_matrix(self.matrix or self.root, memory)
        if self.rows.max() >= len(matrix.barcodes) or (matrix.barcodes[self.rows] != self.spots.index).any():
            raise ValueError(
                f"{self.matrix or self.root}: expected the barcodes that were there when the slice was opened, found "
                "others; leave the files alone while they are read"
            )
        counts = (
            matrix.counts.select(self.rows) if isinstance(matrix.counts, StoredCounts) else matrix.counts[self.rows]
        )
        return CountedSlice(**vars(self), counts=counts, genes=matrix.genes, gene_ids=matrix.gene_ids)


@dataclass(frozen=True)
class CountedSlice(Slice):
    """A slice with what was counted.

    Attributes
    ----------
    counts : csr_matrix (S, G) int32, or StoredCounts where they are left in their file
    genes, gene_ids : ndarray (G,) str
    """

    counts: csr_matrix | StoredCounts
    genes: np.ndarray
    gene_ids: np.ndarray


def open_slice(folder: str | Path, name: str | None = None, spot_pitch_um: float | None = None) -> Slice:
    """Read positions, scale factors and barcodes of a slice folder, and check them against each other.

    Parameters
    ----------
    folder : the slice folder, as find_root takes it
    name : what to call the slice; default the name of the folder
    spot_pitch_um : distance between neighbouring spots where the folder does not state it

    Raises
    ------
    ValueError in one line: a file is missing or damaged, spots share a pixel, places and pixels are on no lattice.
    """
    folder = Path(folder)
    root, name = find_root(folder), name or folder.absolute().name
    _check_unpacked(root / "spatial")
    positions, scalefactors = read_positions(root), read_scalefactors(root)
    matrix = slice_matrix(root)
    barcodes = positions.index.to_numpy() if matrix is None else read_barcodes(matrix)
    _check_one_run(root, positions.index.to_numpy(), barcodes)
    lattice = fit_positions(root, positions)
    spots, rows, unmatched = _match(root, positions, barcodes)
    pitch_um, small = _positive(root, spot_pitch_um), _small_images(root, scalefactors)
    off = positions.loc[~positions["in_tissue"], list(POSITIONS_PX)].to_numpy(float)
    slice_ = Slice(name, folder, root, spots, off, unmatched, rows, matrix, lattice, scalefactors, pitch_um, small, ())
    return replace(slice_, warnings=tuple(_contradictions(slice_)))


def _small_images(root: Path, scalefactors: dict[str, float]) -> dict[str, SourceImage]:
    """The small images of spatial/ by their kind, the larger one first."""
    paths = {kind: root / "spatial" / name for kind, name in (("hires", HIRES), ("lowres", LOWRES))}
    return {
        kind: SourceImage(kind, path, scalefactors[f"tissue_{kind}_scalef"])
        for kind, path in paths.items()
        if path.exists()
    }


def _check_unpacked(spatial: Path) -> None:
    """Raises ValueError where a file that would be read is there packed only: without it checks would be skipped."""
    packed = [f"{name}.gz" for name in SPATIAL_FILES if (spatial / f"{name}.gz").exists()]
    packed = [name for name in packed if not (spatial / name.removesuffix(".gz")).exists()]
    if packed:
        raise ValueError(f"{spatial}: expected unpacked files, found {', '.join(packed)}; gunzip them")


def fit_positions(where: Path, positions: pd.DataFrame) -> Lattice | None:
    """The lattice of all positions; of those under tissue where the others have no sensible pixels.

    Measured places replace those of `positions`. None for a single position.
    """
    for used in (np.ones(len(positions), bool), positions["in_tissue"].to_numpy()):
        chosen = positions[used]
        if len(chosen) < 2:
            continue
        xy, array = (chosen[list(columns)].to_numpy() for columns in (POSITIONS_PX, POSITIONS_ARRAY))
        try:
            lattice = fit_lattice(str(where), xy, array)
        except ValueError:
            if used.all() and not positions["in_tissue"].all():
                continue
            raise
        if not lattice.measured or not used.all() or positions["in_tissue"].all():
            positions.loc[used, list(POSITIONS_ARRAY)] = lattice.array
            return lattice
    return None


def _check_one_run(root: Path, positions: np.ndarray, barcodes: np.ndarray) -> None:
    """Raises ValueError where the counts are of several runs (barcodes -1, -2, ...) and the positions of one."""
    runs = [{name.rpartition("-")[2] for name in names if "-" in name} for names in (positions, barcodes)]
    numbered = all(name.isdigit() for names in runs for name in names)
    if numbered and len(runs[1]) > 1 and len(runs[0]) == 1:
        found = ", ".join(f"-{number}" for number in sorted(runs[1], key=int)[:4])
        raise ValueError(
            f"{root}: expected counts of one section, found barcodes that end with {found}, as spaceranger aggr joins "
            "them, and positions of one; give the counts of the section's own spaceranger count run"
        )


def _is_packed_image(path: Path) -> bool:
    return (
        path.suffix in (".gz", ".zip") and path.stem not in BY_PRODUCTS and Path(path.stem).suffix.lower() in SUFFIXES
    )


def _positive(root: Path, pitch_um: float | None) -> float | None:
    if pitch_um is not None and not 0 < pitch_um < math.inf:
        raise ValueError(f"{root}: expected a positive spot pitch in um, found {pitch_um}; correct spot_pitch_um")
    return None if pitch_um is None else float(pitch_um)


def _contradictions(slice_: Slice) -> list[str]:
    """Contradictions between the files of a slice that it can still be used with."""
    lattice, factors = slice_.lattice, slice_.scalefactors
    warnings = _of_two_sections(slice_)
    if lattice is None:
        return warnings
    if lattice.measured:
        warnings.append(
            f"{slice_.root}: array places of the positions file do not fit its pixels; places measured from the pixels "
            "are used"
        )
    spots_px = factors["spot_diameter_fullres"] / lattice.pitch_px
    if not SPOT_DIAMETER[0] <= spots_px <= SPOT_DIAMETER[1]:
        _refuse_small_pixels(slice_, spots_px)
        warnings.append(
            f"{slice_.root}: spot_diameter_fullres is {spots_px:.2g} times the distance between spots; are positions "
            "and scale factors those of one image?"
        )
    spot_um = spots_px * (slice_.known_pitch_um or 0)
    given = slice_.stated_pitch_um is not None and abs(slice_.stated_pitch_um / VISIUM_PITCH_UM - 1) > DISAGREE
    if given and lattice.staggered and all(abs(spot_um / um - 1) > DISAGREE for um in STAGGERED_SPOTS_UM):
        warnings.append(
            f"{slice_.root}: spots would measure {spot_um:.3g} um at the stated pitch of {slice_.pitch_um:g} um; those "
            "of Visium (pitch 100 um) measure 55 or 65 um: check spot_pitch_um"
        )
    stated, measured = factors.get("microns_per_pixel"), slice_.um_per_px
    if stated is not None and measured is not None and abs(stated / measured - 1) > DISAGREE:
        warnings.append(
            f"{slice_.root}: a pixel has {measured:.4g} um by the spots ({slice_.pitch_um:g} um apart) but "
            f"{stated:.4g} um by microns_per_pixel of its scale factors; the former is used"
        )
    return warnings


def _of_two_sections(slice_: Slice) -> list[str]:
    """A line where counts and positions disagree on which barcodes are in tissue.

    All Visium slides share their barcodes, but Space Ranger's filtered matrix holds those in tissue. A part of them, or
    a part of the positions, is missing on one side only.
    """
    if slice_.matrix is None or not slice_.matrix.name.startswith("filtered_"):
        return []
    off_tissue = slice_.unmatched["counts without position"] + slice_.unmatched["not in tissue"]
    without_counts = slice_.unmatched["tissue positions without counts"]
    if min(off_tissue, without_counts) <= max(FEW, FEW_FRACTION * len(slice_.spots)):
        return []
    return [
        f"{slice_.matrix}: {off_tissue} barcodes that are not in tissue by the positions, and {without_counts} "
        f"positions in tissue without counts, beside {len(slice_.spots)} that agree: are counts and spatial/ of one "
        "section?"
    ]


def _refuse_small_pixels(slice_: Slice, spots_px: float) -> None:
    """Raises ValueError where spots are so large against their distance because positions are in a small image's px."""
    for kind in ("hires", "lowres"):
        if SPOT_DIAMETER[0] <= spots_px * slice_.scalefactors.get(f"tissue_{kind}_scalef", 1) <= SPOT_DIAMETER[1]:
            raise ValueError(
                f"{slice_.root}: expected positions in full-resolution pixels, found spots {1 / spots_px:.2g} diameters"
                f" apart, as in pixels of the {kind} image; divide the positions by tissue_{kind}_scalef"
            )


def read_slice(folder: str | Path, name: str | None = None, memory: float = math.inf) -> CountedSlice:
    """Open a slice and read its counts."""
    return open_slice(folder, name).with_counts(memory)


def read_slice_genes(folder: str | Path) -> tuple[np.ndarray, np.ndarray]:
    """Names and ids (G,) of the genes that read_slice would give, without reading positions or counts."""
    root = find_root(folder)
    return read_genes(slice_matrix(root) or root)


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
        raise ValueError(f"{root}: expected spots in tissue, found {found}; correct in_tissue in the positions file")
    unmatched = {
        "counts without position": int((~known).sum()),
        "tissue positions without counts": int(in_tissue.sum()) - len(rows),
        "not in tissue": int(known.sum()) - len(rows),
    }
    return positions.iloc[place[rows]].drop(columns="in_tissue"), rows, unmatched


def format_unmatched(unmatched: dict[str, int]) -> str:
    """The reasons that occurred, on one line; empty where every spot was matched."""
    return ", ".join(f"{number:,} {reason}" for reason, number in unmatched.items() if number)
