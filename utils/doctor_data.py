"""A folder of slices, looked through: table and split, counts, positions, images, tiles, gene files.

Every look is by the functions that the scripts read with, so what passes here is what they take. Shapes: S spots.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from utils.genes import panels as gene_panels
from utils.images import tiles
from utils.images.image import open_image
from utils.slices import checks, splits, visium

if TYPE_CHECKING:
    from utils.doctor import Findings

TILE_BYTES = 151_000  # of the disk that a tile of 224 px takes
GIB = 2**30


@dataclass
class Looked:
    """What one slice is compared with the others by; None where it could not be found out."""

    row: splits.SliceRow
    slice_: visium.Slice | None = None
    content: str | None = None  # hash of its counts
    barcodes: np.ndarray | None = None  # (S,) that tiles are to be there for
    tile_scale: tuple[int, float | None] | None = None
    panels: dict[str, gene_panels.Panel] = field(default_factory=dict)  # by role


def check_slices(args: Any, findings: Findings) -> None:
    """Print a few lines per slice, and what is to be mended."""
    rows, is_split = read_rows(args, findings)
    looked = [look_at(row, args, findings) for row in rows]
    if is_split:
        check_parts(rows, args, findings)
        check_origin(looked, findings)
    hashes = {one.row.slice: one.content for one in looked if one.content is not None}
    with findings.caught("the split"):
        for warning in splits.check_identical(rows, hashes, args.allow_leak):
            findings.note(warning)
    check_alike(looked, findings)
    check_room(looked, args, findings)


def read_rows(args: Any, findings: Findings) -> tuple[list[splits.SliceRow], bool]:
    """Rows to look at, and whether they have parts. Where table or split are wrong, whatever can still be found."""
    try:
        flags = {"val_strip": args.val_strip, "allow_leak": args.allow_leak}
        rows, warnings = splits.read_table(args.data, args.slices, **flags)
        for warning in warnings:
            findings.note(warning)
        for line in splits.format_table(rows).splitlines():
            findings.say(line)
        return rows, True
    except (ValueError, OSError) as error:
        findings.failed("table and split", error)
    with suppress(ValueError, OSError):
        return splits.read_table(args.data, args.slices, split=False)[0], False
    folders = sorted(path for path in args.data.iterdir() if path.is_dir()) if args.data.is_dir() else []
    names = [folder.name for folder in folders if visium.is_slice(folder)]
    return [splits.SliceRow(name, name, "", None, None) for name in names], False


def look_at(row: splits.SliceRow, args: Any, findings: Findings) -> Looked:
    """One slice; each look goes on where the one before it failed."""
    found = Looked(row)
    findings.say(f"{row.slice} (patient {row.patient}{', ' + row.part if row.part else ''})")
    with findings.caught(row.slice):
        folder = splits.slice_folder(args.data, row)
        found.slice_ = visium.open_slice(folder, row.slice, row.spot_pitch_um)
    looks: tuple[Callable[[Looked, Any, Findings], None], ...] = (look_at_tiles, look_at_panels)
    if found.slice_ is not None:
        looks = (look_at_counts, look_at_array, look_at_image, *looks)
    for look in looks:
        with findings.caught(row.slice):
            look(found, args, findings)
    return found


def look_at_counts(found: Looked, args: Any, findings: Findings) -> None:
    """Counts, their totals, and what has no partner."""
    assert found.slice_ is not None
    memory = args.memory * GIB
    counted = found.slice_.with_counts(memory)
    spans = visium.spans(counted.counts, memory)
    totals = np.concatenate([np.asarray(counted.counts[span].sum(1)).ravel() for span in spans])
    findings.say(
        f"  {len(totals):,} spots, {len(counted.genes):,} genes, {totals.sum():,} counts, median "
        f"{np.median(totals):,.0f} a spot; positions matched"
    )
    if visium.format_unmatched(counted.unmatched):
        findings.say(f"  left aside: {visium.format_unmatched(counted.unmatched)}")
    if (totals == 0).any():
        findings.note(f"{found.row.slice}: {(totals == 0).sum()} spots have no count and will be dropped")
    if not totals.any():
        raise ValueError(f"{counted.root}: expected counts, found none above zero; export the matrix again")
    found.content = visium.counts_hash(counted.counts, counted.spots.index.to_numpy(str), counted.genes, memory)


def look_at_array(found: Looked, args: Any, findings: Findings) -> None:
    """Array, pitch and size of a pixel."""
    assert found.slice_ is not None
    for warning in found.slice_.warnings:
        findings.note(warning)
    kind = "staggered" if found.slice_.lattice and found.slice_.lattice.staggered else "square"
    pitch_um, pitch_px = found.slice_.pitch_um, found.slice_.pitch_px
    findings.say(f"  {kind} array, pitch {pitch_um:g} um = {pitch_px:.1f} px: {pitch_um / pitch_px:.3f} um per px")


def look_at_image(found: Looked, args: Any, findings: Findings) -> None:
    """The image that tiles would be cut from, against what the slice says of it."""
    slice_ = found.slice_
    assert slice_ is not None
    source = slice_.source_image("auto", found.row.image)
    if source.kind == "hires":
        um_per_px = slice_.um_per_px
        coarse = "" if um_per_px is None else f" ({um_per_px / source.scale:.2f} um per px)"
        findings.note(
            f"{slice_.name}: only the hires image{coarse}: add the full-resolution one, cells can be seen in it"
        )
    elif slice_.small_image("hires") is None:
        findings.note(f"{slice_.name}: no {visium.HIRES}: the report will show spots without tissue behind them")
    with open_image(source.path, huge=True) as image:
        inside, warnings = checks.check_image(slice_, source, image, image.thumbnail(checks.THUMBNAIL_PX))
        for note in (*image.notes, *warnings):
            findings.note(f"{slice_.name}: {note}")
        findings.say(
            f"  image {source.path.name}, {image.width} x {image.height} px, {inside.sum():,} of {len(inside):,} spots "
            "on it"
        )
    found.barcodes = slice_.spots.index.to_numpy(str)[inside]


def look_at_tiles(found: Looked, args: Any, findings: Findings) -> None:
    """Tiles as image_tilling.py left them."""
    folder = args.tiles / found.row.slice
    record = tiles.read_record(folder)
    if record is None and (folder / f"{tiles.PACK}.part").exists():
        raise ValueError(f"{folder}: tiling was interrupted; run image_tilling.py again")
    if record is None:
        findings.say(f"  no tiles in {folder}: image_tilling.py cuts them")
        return
    pack = tiles.TilePack(folder)
    wanted = [] if found.barcodes is None else found.barcodes.tolist()
    lacking = set(wanted) - set(pack.barcodes.tolist())
    if lacking:
        raise ValueError(
            f"{folder}: {len(lacking)} of {len(wanted)} spots have no tile ({min(lacking)}); run image_tilling.py again"
        )
    um_per_px = record.get("um_per_px")
    found.tile_scale = (pack.size, round(um_per_px, 3) if um_per_px is not None and record.get("resampled") else None)
    side = "" if um_per_px is None else f" at {um_per_px:.3f} um per px, {pack.size * um_per_px:.0f} um wide"
    findings.say(f"  {len(pack.barcodes):,} tiles of {pack.size} px{side}, from {record.get('image')}")


def look_at_panels(found: Looked, args: Any, findings: Findings) -> None:
    """Gene files as make_decoder_data.py left them."""
    name = found.row.slice
    paths = {role: gene_panels.panel_path(args.data, args.panels, name, role) for role in gene_panels.FILES}
    there = {role: path for role, path in paths.items() if path.exists()}
    if not there:
        findings.say("  no gene files: make_decoder_data.py writes them")
        return
    for role in paths:
        found.panels[role] = panel = gene_panels.read_panel(paths[role])
        if found.content is not None and panel.counts_hash != found.content:
            raise ValueError(f"{panel.path}: made of other counts than those there now; run make_decoder_data.py again")
        lacks = f" ({(~panel.measured).sum()} not in this slice)" if not panel.measured.all() else ""
        findings.say(f"  {len(panel.genes)} {role} genes{lacks}, chosen on {', '.join(panel.train_slices)}")


def check_parts(rows: list[splits.SliceRow], args: Any, findings: Findings) -> None:
    """Is there something to train, to validate and to test on?"""
    for part in splits.PARTS:
        if splits.of_part(rows, part) or (part == "val" and args.val_strip):
            continue
        if part == "test":
            findings.note("no slice has part test: training works, the evaluations need --part val or a test slice")
        else:
            strip = ", or use --val_strip" if part == "val" else ""
            findings.mend(f"in table and split: no slice of part {part}", f"give one in slices.csv{strip}")


def check_origin(looked: list[Looked], findings: Findings) -> None:
    """Genes that were chosen on a slice outside the train part have seen what they are tested on."""
    train = {one.row.slice for one in looked if one.row.part == "train"}
    for one in looked:
        foreign = sorted({name for panel in one.panels.values() for name in panel.train_slices} - train)
        if foreign:
            findings.mend(
                f"in {one.row.slice}: genes chosen on {', '.join(foreign)}, outside the train part",
                "run make_decoder_data.py with this split",
            )


def check_alike(looked: list[Looked], findings: Findings) -> None:
    """Training takes slices of one tile scale and one panel only."""
    scales = {one.tile_scale for one in looked if one.tile_scale is not None}
    if len(scales) > 1:
        found = " and ".join(sorted(f"{px} px at {um or 'no stated'} um per px" for px, um in scales))
        findings.mend(
            f"in the tiles: {found}", "run image_tilling.py on all slices with the same --tile_um and --tile_px"
        )
    missing = [one.row.slice for one in looked if scales and one.tile_scale is None]
    if missing:
        findings.mend(f"in the tiles: {', '.join(missing)} have none, other slices have", "run image_tilling.py again")
    for role in gene_panels.FILES:
        with_panel = {gene_panels.panel_hash(one.panels[role].genes) for one in looked if role in one.panels}
        without = [one.row.slice for one in looked if with_panel and role not in one.panels]
        if len(with_panel) > 1:
            findings.mend(f"in the {role} genes: {len(with_panel)} different panels", "run make_decoder_data.py again")
        if without:
            findings.mend(f"in the {role} genes: {', '.join(without)} have no file", "run make_decoder_data.py again")


def check_room(looked: list[Looked], args: Any, findings: Findings) -> None:
    """Is there room for the tiles that are still to be cut?"""
    from utils.doctor import existing

    n_spots = sum(len(one.barcodes) for one in looked if one.tile_scale is None and one.barcodes is not None)
    free = shutil.disk_usage(existing(args.tiles)).free
    if n_spots * TILE_BYTES > free:
        findings.mend(
            f"{free / GIB:.1f} GiB free for {args.tiles}, about {n_spots * TILE_BYTES / GIB:.1f} GiB of tiles to come",
            "make room, or give another disk with --tiles",
        )
