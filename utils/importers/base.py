"""A slice of another format, written as a Space Ranger folder: checked, read back, compared, then renamed into place.

Each format is read by a module of its own (legacy_st, visium_hd, h5ad, spatialdata) into a `source.Source`;
`import_slice` writes one. Counts are never changed, and the files that were read are never changed either.

Shapes: S spots, G genes. Coordinates are full-resolution pixels of the H&E, origin top left.
"""

from __future__ import annotations

import filecmp
import math
import shutil
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import numpy as np

from utils.genes.names import are_controls, named, stripped
from utils.images import tiles
from utils.images.image import stated_um_per_px
from utils.importers import pitch, slice_folder
from utils.importers.images import Thumbnail, image_size, make_thumbnail
from utils.importers.source import SPOT_COLUMNS, Source
from utils.slices import checks, splits, visium
from utils.slices.matrix import check_once
from utils.words import count_of

SAME_PX = 1e-6  # decimal text is not always read back to the last bit


def without_controls(source: Source) -> Source:
    """The source without control probes, codewords and rows of unassigned reads, which no reader takes for genes."""
    genes = ~are_controls(source.genes)
    if genes.all() or isinstance(source.counts, visium.StoredCounts):  # which were read without them
        return source
    left_out = f"{count_of((~genes).sum(), 'control feature')} left out"
    kept = {"counts": source.counts[:, genes], "genes": source.genes[genes], "gene_ids": source.gene_ids[genes]}
    return replace(source, **kept, notes=[*source.notes, left_out])


def check(source: Source) -> None:
    """Raises ValueError for what no script could work with, before anything is written."""
    if len(source.spots) < 2:  # no pitch
        left_out = _left_out(source)
        found = f"{len(source.spots)}" + (f" ({left_out})" if left_out else "")
        raise ValueError(f"{source.origin}: expected two spots to import or more, found {found}; check the file")
    check_once(source.origin, source.spots.index.to_numpy())
    tiles.tile_files(source.origin, source.spots.index)
    if not np.isfinite(source.spots[SPOT_COLUMNS].to_numpy(float)).all():
        raise ValueError(f"{source.origin}: expected finite spot positions, found NaN or infinity; fix the positions")
    if source.image is None and not source.small and not source.without_image:
        raise ValueError(f"{source.origin}: expected an H&E image, found none; name it with --image")


def check_spots(source: Source, shown: Path | np.ndarray, scale: float, thumbnail: Thumbnail) -> tuple[int, list[str]]:
    """How many spots lie outside an image, and warnings about its content and their axes.

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
    if source.image is not None:
        checks.check_not_blank(where, small)
    warnings = checks.check_not_black(where, xy_px[inside], radius_px, small)
    warnings += checks.check_axes(where, xy_px[inside], size, radius_px, small, source.lattice.mirrored)
    return int((~inside).sum()), warnings


def shown_image(source: Source) -> tuple[Path | np.ndarray, float] | None:
    """The image in full resolution, else hires, else lowres, and its pixels per full-resolution pixel; None without."""
    if source.image is not None:
        return source.image, 1.0
    kind = next((kind for kind in ("hires", "lowres") if kind in source.small), None)
    if kind is None:
        return None
    return source.small[kind], float(source.scalefactors[f"tissue_{kind}_scalef"])


def check_small(slice_: visium.Slice, source: Source, thumbnail: Thumbnail) -> list[str]:
    """Warnings about the small images that came with an image. Raises ValueError where they were made of another."""
    if source.image is None:
        return []
    name, size = source.image if isinstance(source.image, Path) else source.origin, image_size(source.image)
    small = (slice_.small[kind] for kind in source.small)
    return [line for image in small for line in checks.check_small(name, size, thumbnail.pixels, image)]


def check_written(folder: Path, source: Source, memory: float = math.inf) -> visium.CountedSlice:
    """Read a written slice as every script does. Raises ValueError unless it is what was read from the source."""
    written = visium.read_slice(folder, source.name, memory)
    px = [spots[SPOT_COLUMNS[2:]].to_numpy(float) for spots in (written.spots, source.spots)]
    same = {
        "barcodes": np.array_equal(written.spots.index, source.spots.index),
        "genes": np.array_equal(written.genes, source.genes) and np.array_equal(written.gene_ids, source.gene_ids),
        "array places": written.spots[SPOT_COLUMNS[:2]].equals(source.spots[SPOT_COLUMNS[:2]].astype(int)),
        "pixel positions": px[0].shape == px[1].shape and bool(np.abs(px[0] - px[1]).max() < SAME_PX),
        "counts": written.counts.shape == source.counts.shape and _same_counts(written, source, memory),
    }
    different = ", ".join(what for what, is_same in same.items() if not is_same)
    if different:
        raise ValueError(
            f"{folder}: expected the {different} of {source.origin}, found others; is the disk full or broken?"
        )
    return written


def _same_counts(written: visium.CountedSlice, source: Source, memory: float) -> bool:
    spans = visium.spans(source.counts, memory)
    return all((written.counts[span] != source.counts[span]).nnz == 0 for span in spans)


def _first_difference(written: Path, there: Path) -> str | None:
    """The first file of `written` that `there` has not, or has otherwise; what else lies `there` is irrelevant."""
    for path in sorted(path for path in written.rglob("*") if path.is_file()):
        name = path.relative_to(written)
        if not (there / name).is_file() or not filecmp.cmp(path, there / name, shallow=False):
            return name.as_posix()
    return None


def import_slice(source: Source, out: Path, memory: float = math.inf) -> list[str]:
    """Write one slice folder and its line of slices.csv.

    Parameters
    ----------
    source : the slice
    out : folder of slices
    memory : bytes for the counts that are read together

    Returns
    -------
    lines to print: a summary, then warnings

    Raises
    ------
    ValueError where the source cannot be a slice, or where another slice of that name is there already.
    """
    ids = stripped(source.gene_ids)  # names as those who read the folder will find them
    source = replace(source, genes=named(source.origin, stripped(source.genes), ids), gene_ids=ids)
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
        written = check_written(part, source, memory)
        warnings += [] if thumbnail is None else check_small(written, source, thumbnail)
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
        of_file = stated_um_per_px(source.image)
        stated |= {source.image.name: of_file} if of_file is not None else {}
    if not stated and not source.small and isinstance(source.image, Path):
        unchecked = "no small image and no pixel size to check it by: it may be of another section"
        return [f"{source.image.name}: {unchecked}; look at its tiles (image_tilling.py --jpeg)"]
    measured = source.um_per_px
    others = [f"{um:.4g} um by {where}" for where, um in stated.items() if not pitch.agree(um, measured)]
    spots = f"the spots ({source.pitch_um:.4g} um from spot to spot)"
    check = "check --image and --spot_pitch_um"
    return [f"a pixel has {measured:.4g} um by {spots} but {', '.join(others)}; {check}"] if others else []
