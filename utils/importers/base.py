"""A slice of another format, written as a Space Ranger folder: checked, read back, compared, then renamed into place.

Each format is read by a module of its own (legacy_st, visium_hd, h5ad, spatialdata) into a `Source`; `import_slice`
writes one. Counts are never changed, and the files that were read are never touched.

Shapes: S spots, G genes. Coordinates are full-resolution pixels of the H&E, origin top left.
"""

from __future__ import annotations

import filecmp
import math
import re
import shutil
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy.sparse import csr_matrix

from utils.genes.names import are_controls
from utils.images import tiles
from utils.images.image import stated_um_per_px
from utils.importers import slice_folder
from utils.importers.images import Thumbnail, image_size, make_thumbnail
from utils.slices import checks, splits, visium
from utils.slices.lattice import Lattice, fit_lattice
from utils.slices.matrix import check_once, listing

SPOT_COLUMNS = ["array_row", "array_col", "x_fullres_px", "y_fullres_px"]
DISAGREE = 0.05  # of the measured size of a pixel
SAME_PX = 1e-6  # decimal text is not always read back to the last bit
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


def whole_counts(where: str, values: np.ndarray) -> np.ndarray:
    """Numbers as int32. Raises ValueError where one is no count (0, 1, 2, ...)."""
    numeric = values.dtype.kind in "iufb"
    bad = ~((values >= 0) & (values <= np.iinfo(np.int32).max) & (values == np.rint(values))) if numeric else None
    if bad is None or bad.any():
        found = f"numbers of the kind {values.dtype}" if bad is None else f"{values[bad][0]}"
        raise ValueError(f"{where}: expected raw counts (0, 1, 2, ...), found {found}; give the raw counts")
    return values.astype(np.int32)


def without_controls(source: Source) -> Source:
    """The source without control probes, codewords and rows of unassigned reads, which no reader takes for genes."""
    genes = ~are_controls(source.genes)
    if genes.all() or isinstance(source.counts, visium.StoredCounts):  # which were read without them
        return source
    left_out = f"{(~genes).sum()} control features left out"
    kept = {"counts": source.counts[:, genes], "genes": source.genes[genes], "gene_ids": source.gene_ids[genes]}
    return replace(source, **kept, notes=[*source.notes, left_out])


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


def check(source: Source) -> None:
    """Raises ValueError for what no script could work with, before anything is written."""
    if len(source.spots) < 2:  # no pitch
        found = f"{len(source.spots)}; {_left_out(source) or 'check the file'}"
        raise ValueError(f"{source.origin}: expected two spots to import or more, found {found}")
    check_once(source.origin, source.spots.index.to_numpy())
    tiles.tile_files(source.origin, source.spots.index)
    if not np.isfinite(source.spots[SPOT_COLUMNS].to_numpy(float)).all():
        raise ValueError(f"{source.origin}: expected finite spot positions, found NaN or infinity; fix the positions")
    if source.image is None and not source.small and not source.without_image:
        raise ValueError(f"{source.origin}: expected an H&E image, found none; name it with --image")


def check_spots(source: Source, shown: Path | np.ndarray, scale: float, thumbnail: Thumbnail) -> tuple[int, list[str]]:
    """How many spots lie outside an image, and warnings about their axes.

    Parameters
    ----------
    source : the slice
    shown, scale : the best image of it, and its pixels per full-resolution pixel
    thumbnail : that image made small

    Raises
    ------
    ValueError where they cannot be the spots of that image.
    """
    where = str(shown if isinstance(shown, Path) else source.origin)
    xy_px, size = source.spots[SPOT_COLUMNS[2:]].to_numpy(float) * scale, image_size(shown)
    inside = checks.spots_on_image(where, xy_px, size)
    radius_px, small = source.spot_diameter_px / 2 * scale, (thumbnail.pixels, thumbnail.scale)
    axes = checks.check_axes(where, xy_px[inside], size, radius_px, small, source.lattice.mirrored)
    return int((~inside).sum()), axes


def lie_on(xy_px: np.ndarray, size: tuple[int, int]) -> bool:
    """Whether all but a few spots (S, 2) have their centre on an image of that width and height."""
    try:
        checks.spots_on_image("", xy_px, size)
    except ValueError:
        return False
    return True


def shown_image(source: Source) -> tuple[Path | np.ndarray, float] | None:
    """The image in full resolution, else hires, else lowres, and its pixels per full-resolution pixel; None without."""
    if source.image is not None:
        return source.image, 1.0
    kind = next((kind for kind in ("hires", "lowres") if kind in source.small), None)
    if kind is None:
        return None
    return source.small[kind], float(source.scalefactors[f"tissue_{kind}_scalef"])


def check_small(folder: Path, source: Source, thumbnail: Thumbnail) -> list[str]:
    """Warnings about the small images that came with an image. Raises ValueError where they were made of another."""
    if source.image is None:
        return []
    name = source.image if isinstance(source.image, Path) else source.origin
    warnings = []
    for kind in source.small:
        path, scale = folder / "spatial" / f"tissue_{kind}_image.png", source.scalefactors[f"tissue_{kind}_scalef"]
        checks.check_size(name, [float(side) for side in image_size(source.image)], path, scale)
        warnings += checks.check_content(name, thumbnail.pixels, path)
    return warnings


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
    source = without_controls(source)
    check(source)
    shown, n_outside, warnings = shown_image(source), 0, ["no image yet: put the H&E of this section into its folder"]
    thumbnail = None if shown is None else make_thumbnail(shown[0], checks.THUMBNAIL_PX)
    if shown is not None and thumbnail is not None:
        n_outside, warnings = check_spots(source, *shown, thumbnail)
    part, folder = out / f".{source.name}.part", out / source.name  # hidden: never taken for a slice
    shutil.rmtree(part, ignore_errors=True)  # of a run that was killed
    try:
        image = slice_folder.write_folder(part, source, memory)
        warnings += [] if thumbnail is None else check_small(part, source, thumbnail)
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
    slice_folder.add_row(out, splits.SliceRow(source.name, source.patient, "", source.pitch_um, image))
    lines = [*source.warnings, *_pixel_sizes(source), *warnings]
    return [
        summary(source, n_outside, () if thumbnail is None else thumbnail.notes, memory),
        *(f"warning: {source.name}: {line}" for line in lines),
    ]


def _left_out(source: Source) -> str:
    notes = visium.format_unmatched(source.left_out)
    return f"left out: {notes}" if notes else ""


def summary(source: Source, n_outside: int, notes: Iterable[str], memory: float) -> str:
    """What was imported and what was left out, on one line, with notes on the image."""
    total = sum(int(source.counts[span].sum()) for span in visium.spans(source.counts, memory))
    n_spots, n_genes = source.counts.shape
    parts = [f"{n_spots:,} spots", f"{n_genes:,} genes", f"{total:,} counts", f"{source.um_per_px:.4g} um per px"]
    parts += [f"{n_outside} outside the image"] if n_outside else []
    if source.image is None and "hires" not in source.small:
        parts.append("no image to cut tiles from (see --image)")
    parts += [_left_out(source)] if _left_out(source) else []
    return f"{source.name}: {'; '.join([', '.join(parts), *source.notes, *notes])}"


def _pixel_sizes(source: Source) -> list[str]:
    """A line on the sizes of a pixel that are stated and that the spots contradict."""
    stated = dict(source.stated_um_per_px)
    if isinstance(source.image, Path):
        own = stated_um_per_px(source.image)
        stated |= {source.image.name: own} if own is not None else {}
    if not stated and not source.small and isinstance(source.image, Path):
        return [f"{source.image.name}: no small image and no pixel size to check it by; look at the spots on it"]
    measured = source.um_per_px
    others = [f"{um:.4g} um by {where}" for where, um in stated.items() if abs(um - measured) > DISAGREE * measured]
    spots = f"the spots ({source.pitch_um:.4g} um from spot to spot)"
    check = "check --image and --spot_pitch_um"
    return [f"a pixel has {measured:.4g} um by {spots} but {', '.join(others)}; {check}"] if others else []
