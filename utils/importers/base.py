"""A slice of another format, written as a Space Ranger folder: checked, read back, compared, then renamed into place.

The formats are read by importers_legacy_st, importers_hd, importers_h5ad and importers_spatialdata, each into a
`Source`; `import_slice` writes one. Counts are never changed, and the files that were read are never touched.

Shapes: S spots, G genes. Coordinates are full-resolution pixels of the H&E, origin top left.
"""

from __future__ import annotations

import filecmp
import math
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy.sparse import csr_matrix

from utils.images import tiles
from utils.images.image import stated_um_per_px
from utils.importers import files as importers_files
from utils.slices import splits, visium
from utils.slices.lattice import pitch_px
from utils.slices.matrix import check_once

SPOT_COLUMNS = ["array_row", "array_col", "x_fullres_px", "y_fullres_px"]
DISAGREE = 0.05  # of the measured size of a pixel
SAME_PX = 1e-6  # decimal text is not always read back to the last bit


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
    pitch_um : float, as image_tilling.py is to read it from slices.csv
    spot_diameter_px : float
    picture : the full-resolution H&E, a file or pixels (height, width, 3) uint8; None without
    small : "hires", "lowres": small pictures that the source has, files or pixels; others are made from the picture
    scalefactors : dict, what the source says, which is kept
    stated_um_per_px : dict, size of a full-resolution pixel by where it is stated
    left_out : dict, how many spots are not imported, by reason
    notes : list of str, further remarks to print
    """

    name: str
    patient: str
    origin: Path
    counts: csr_matrix | visium.StoredCounts
    genes: np.ndarray
    gene_ids: np.ndarray
    spots: pd.DataFrame
    pitch_um: float
    spot_diameter_px: float
    picture: Path | np.ndarray | None = None
    small: dict[str, Path | np.ndarray] = field(default_factory=dict)
    scalefactors: dict[str, Any] = field(default_factory=dict)
    stated_um_per_px: dict[str, float] = field(default_factory=dict)
    left_out: dict[str, int] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def um_per_px(self) -> float:
        """Size of a full-resolution pixel, measured from the spots."""
        return self.pitch_um / pitch_px(
            self.spots[SPOT_COLUMNS[2:]].to_numpy(float), self.spots[SPOT_COLUMNS[:2]].to_numpy()
        )


def whole_counts(where: str, values: np.ndarray) -> np.ndarray:
    """Numbers as int32. Raises ValueError where one is no count (0, 1, 2, ...)."""
    numeric = values.dtype.kind in "iufb"
    bad = ~((values >= 0) & (values <= np.iinfo(np.int32).max) & (values == np.rint(values))) if numeric else None
    if bad is None or bad.any():
        found = f"numbers of the kind {values.dtype}" if bad is None else f"{values[bad][0]}"
        raise ValueError(f"{where}: expected raw counts (0, 1, 2, ...), found {found}; give the raw counts")
    return values.astype(np.int32)


def check_picture(image: Path | None) -> Path | None:
    """A file for --image. Raises ValueError where there is none, or one of a kind that no script reads."""
    if image is not None and (not image.is_file() or image.suffix.lower() not in splits.IMAGE_SUFFIXES):
        found = f"a file {image.suffix or 'without suffix'}" if image.is_file() else "no such file"
        raise ValueError(f"--image {image}: expected a picture ({', '.join(splits.IMAGE_SUFFIXES)}), found {found}")
    return image


def only_picture(where: Path, pictures: list[Path], image: Path | None, what: str) -> Path:
    """--image where it is given, else the one picture that was found."""
    if image is not None:
        return image
    if len(pictures) != 1:
        found = ", ".join(path.name for path in sorted(pictures)) or "none"
        raise ValueError(f"{where}: expected one H&E picture of {what}, found {found}; name it with --image")
    return pictures[0]


def pictures_in(folder: Path) -> list[Path]:
    """The pictures that lie directly in a folder, hidden files aside."""
    files = folder.iterdir() if folder.is_dir() else []
    wanted = (path for path in files if path.suffix.lower() in splits.IMAGE_SUFFIXES and path.name[0] != ".")
    return sorted(path for path in wanted if path.is_file())


def _check(source: Source) -> None:
    """Raises ValueError for what no script could work with, before anything is written."""
    if len(source.spots) < 2:  # no pitch
        found = f"{len(source.spots)}; {_left_out(source) or 'mend the file'}"
        raise ValueError(f"{source.origin}: expected two spots to import or more, found {found}")
    check_once(source.origin, source.spots.index.to_numpy())
    tiles.tile_files(source.origin, source.spots.index)
    if not np.isfinite(source.spots[SPOT_COLUMNS].to_numpy(float)).all():
        raise ValueError(f"{source.origin}: expected finite spot positions, found NaN or infinity; mend the positions")
    if source.picture is None and not source.small:
        raise ValueError(f"{source.origin}: expected an H&E picture, found none; name it with --image")
    if source.picture is None:
        return
    size = importers_files.size_of(source.picture)
    on_it = _on_picture(source.spots, size).sum()
    if 2 * on_it < len(source.spots):
        found = f"{on_it} of {len(source.spots)} on its {size[0]} x {size[1]} px"
        name = source.picture if isinstance(source.picture, Path) else source.origin
        raise ValueError(f"{name}: expected the picture that the spots refer to, found {found}; see --image")


def _on_picture(spots: pd.DataFrame, size: tuple[int, int]) -> np.ndarray:
    """Which spots (S,) have their centre on a picture of that width and height."""
    xy_px = spots[["x_fullres_px", "y_fullres_px"]].to_numpy()
    return np.asarray(((xy_px >= 0) & (xy_px < size)).all(axis=1))


def check_written(folder: Path, source: Source, memory: float = math.inf) -> None:
    """Read a written slice as every script will. Raises ValueError unless it is what was read from the source."""
    found = visium.read_slice(folder, source.name, memory)
    same = [
        ("barcodes", np.array_equal(found.spots.index, source.spots.index)),
        ("genes", np.array_equal(found.genes, source.genes) and np.array_equal(found.gene_ids, source.gene_ids)),
        ("array places", found.spots[SPOT_COLUMNS[:2]].equals(source.spots[SPOT_COLUMNS[:2]].astype(int))),
    ]
    px = [spots[SPOT_COLUMNS[2:]].to_numpy(float) for spots in (found.spots, source.spots)]
    same.append(("pixel positions", px[0].shape == px[1].shape and bool(np.abs(px[0] - px[1]).max() < SAME_PX)))
    same.append(("counts", found.counts.shape == source.counts.shape and _same_counts(found, source, memory)))
    different = [what for what, is_same in same if not is_same]
    if different:
        what = ", ".join(different)
        raise ValueError(f"{folder}: expected the {what} of {source.origin}, found others; is the disk full or broken?")


def _same_counts(found: visium.CountedSlice, source: Source, memory: float) -> bool:
    spans = visium.spans(source.counts, memory)
    return all((found.counts[span] != source.counts[span]).nnz == 0 for span in spans)


def _first_difference(written: Path, there: Path) -> str | None:
    """The first file of `written` that `there` has not, or has otherwise; what else lies `there` is irrelevant."""
    for path in sorted(path for path in written.rglob("*") if path.is_file()):
        name = path.relative_to(written)
        if not (there / name).is_file() or not filecmp.cmp(path, there / name, shallow=False):
            return name.as_posix()
    return None


def import_slice(source: Source, out: Path, memory: float = math.inf) -> list[str]:
    """Write one slice folder below `out` and its line of slices.csv; gives lines to print.

    Raises ValueError where the source cannot be a slice, or where another slice of that name is there already.
    """
    _check(source)
    lines = [summary(source, memory), *_warnings(source)]
    part, folder = out / f".{source.name}.part", out / source.name  # hidden: never taken for a slice
    shutil.rmtree(part, ignore_errors=True)  # of a run that was killed
    try:
        image = importers_files.write_folder(part, source, memory)
        check_written(part, source, memory)
        if folder.exists():
            other = _first_difference(part, folder)
            if other is not None:
                found = f"{folder} with another {other}"
                raise ValueError(
                    f"{source.origin}: expected no slice {source.name} yet, found {found}; choose another --out"
                )
        else:
            part.rename(folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    importers_files.add_row(out, splits.SliceRow(source.name, source.patient, "", source.pitch_um, image))
    return lines


def _left_out(source: Source) -> str:
    notes = visium.format_unmatched(source.left_out)
    return f"left out: {notes}" if notes else ""


def summary(source: Source, memory: float = math.inf) -> str:
    """What was imported and what was left out, on one line."""
    total = sum(int(source.counts[span].sum()) for span in visium.spans(source.counts, memory))
    n_spots, n_genes = source.counts.shape
    parts = [f"{n_spots:,} spots", f"{n_genes:,} genes", f"{total:,} counts", f"{source.um_per_px:.4g} um per px"]
    if source.picture is not None:
        outside = int((~_on_picture(source.spots, importers_files.size_of(source.picture))).sum())
        parts += [f"{outside} outside the picture"] if outside else []
    elif "hires" not in source.small:
        parts.append("no picture to cut tiles from (see --image)")
    parts += [_left_out(source)] if _left_out(source) else []
    return f"{source.name}: {'; '.join([', '.join(parts), *source.notes])}"


def _warnings(source: Source) -> list[str]:
    """A line per statement about the size of a pixel that the spots contradict."""
    stated = dict(source.stated_um_per_px)
    if isinstance(source.picture, Path):
        own = stated_um_per_px(source.picture)
        stated |= {source.picture.name: own} if own is not None else {}
    measured, pitch = source.um_per_px, f"{source.pitch_um:.4g} um from spot to spot"
    return [
        f"warning: {source.name}: a pixel has {measured:.4g} um by the spots ({pitch}) but {um:.4g} um by {where}; "
        "check --image and --spot_pitch_um"
        for where, um in stated.items()
        if abs(um - measured) > DISAGREE * measured
    ]
