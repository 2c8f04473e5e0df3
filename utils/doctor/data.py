"""Checks of a folder of slices: table and split, counts, positions, images, tiles, gene files.

Each check calls the functions that the scripts read with, so a slice that passes is one that they read.
Shapes: S spots.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field

import numpy as np

from utils.doctor.findings import GIB, Findings, existing
from utils.doctor.settings import Settings
from utils.features import dataset
from utils.genes import panels as gene_panels
from utils.images import tiles
from utils.images.image import open_image
from utils.slices import checks, splits, visium
from utils.words import count_of

TILE_BYTES = 151_000  # on the disk, of a tile of 224 px


@dataclass
class Checked:
    """What was read of one slice, for the checks between slices; None where it could not be read."""

    row: splits.SliceRow
    slice_: visium.Slice | None = None
    content: str | None = None  # hash of its counts
    totals: tuple[np.ndarray, np.ndarray] | None = None  # barcodes (S,) of spots with counts, and how many (S,)
    barcodes: np.ndarray | None = None  # (S,) that need a tile
    tile_scale: tuple[int, float | None] | None = None
    panels: dict[str, gene_panels.Panel] = field(default_factory=dict)  # by role

    @property
    def name(self) -> str:
        return self.row.slice


def check_slices(settings: Settings, findings: Findings) -> None:
    """Print a few lines per slice, and report what is wrong with it or between slices."""
    rows, has_parts = read_rows(settings, findings)
    checked = [check_slice(row, settings, findings) for row in rows]
    if has_parts:
        check_parts(rows, settings, findings)
        check_panel_origin(checked, findings)
    hashes = {slice_.name: slice_.content for slice_ in checked if slice_.content is not None}
    with findings.caught("the split"):
        totals = {slice_.name: slice_.totals for slice_ in checked if slice_.totals is not None}
        for warning in splits.check_identical(rows, hashes, settings.allow_leak, totals):
            findings.note(warning)
    check_tile_scales(checked, findings)
    for role in gene_panels.FILES:
        check_same_panel(checked, role, findings)
    check_room(checked, settings, findings)


def read_rows(settings: Settings, findings: Findings) -> tuple[list[splits.SliceRow], bool]:
    """Rows to check, and whether they have parts. Where the table or the split is wrong: all slices that are found."""
    data, table = settings.data, settings.slices
    try:
        rows, warnings = splits.read_table(data, table, val_strip=settings.val_strip, allow_leak=settings.allow_leak)
        for warning in warnings:
            findings.note(warning)
        for line in splits.format_table(rows).splitlines():
            findings.log(line)
        return rows, True
    except (ValueError, OSError) as error:
        findings.error("table and split", error)
    with suppress(ValueError, OSError):
        return splits.read_table(data, table, split=False)[0], False
    folders = sorted(path for path in data.iterdir() if path.is_dir()) if data.is_dir() else []
    names = [folder.name for folder in folders if visium.is_slice(folder)]
    return [splits.SliceRow(name, name, "", None, None) for name in names], False


def check_slice(row: splits.SliceRow, settings: Settings, findings: Findings) -> Checked:
    """One slice; a check that fails does not stop those after it."""
    checked = Checked(row)
    findings.log(f"{row.slice} (patient {row.patient}{', ' + row.part if row.part else ''})")
    with findings.caught(row.slice):
        folder = splits.slice_folder(settings.data, row)
        checked.slice_ = visium.open_slice(folder, row.slice, row.spot_pitch_um)
    checks_of_slice: list[Callable[[], None]] = []
    if checked.slice_ is not None:
        slice_ = checked.slice_
        checks_of_slice += [
            lambda: check_counts(checked, slice_, settings.memory * GIB, findings),
            lambda: check_array(slice_, findings),
            lambda: check_image(checked, slice_, findings),
        ]
    checks_of_slice += [
        lambda: check_tiles(checked, settings, findings),
        lambda: check_panels(checked, settings, findings),
    ]
    for check in checks_of_slice:
        with findings.caught(row.slice):
            check()
    return checked


def check_counts(checked: Checked, slice_: visium.Slice, memory: float, findings: Findings) -> None:
    """Counts, their totals, and the spots that are left out."""
    counted = slice_.with_counts(memory)
    spans = visium.spans(counted.counts, memory)
    totals = np.concatenate([np.asarray(counted.counts[span].sum(1)).ravel() for span in spans])
    findings.log(
        f"  {len(totals):,} spots, {len(counted.genes):,} genes, {totals.sum():,} counts, median "
        f"{np.median(totals):,.0f} a spot; positions matched"
    )
    if visium.format_unmatched(counted.unmatched):
        findings.log(f"  left out: {visium.format_unmatched(counted.unmatched)}")
    if (totals == 0).any():
        findings.note(f"{slice_.name}: {count_of((totals == 0).sum(), 'spot')} without any count will be dropped")
    if not totals.any():
        raise ValueError(f"{counted.root}: expected counts, found none above zero; export the matrix again")
    barcodes = counted.spots.index.to_numpy(str)
    checked.totals = barcodes, totals
    checked.content = visium.counts_hash(counted.counts, barcodes, counted.genes, memory)


def check_array(slice_: visium.Slice, findings: Findings) -> None:
    """Array, pitch and size of a pixel."""
    for warning in slice_.warnings:
        findings.note(warning)
    kind = "staggered" if slice_.lattice and slice_.lattice.staggered else "square"
    pitch_um, pitch_px = slice_.pitch_um, slice_.pitch_px
    findings.log(f"  {kind} array, pitch {pitch_um:g} um = {pitch_px:.1f} px: {pitch_um / pitch_px:.3f} um per px")


def check_image(checked: Checked, slice_: visium.Slice, findings: Findings) -> None:
    """The image that tiles are cut from, against the positions and the small images of the slice."""
    source = slice_.source_image("auto", checked.row.image)
    if source.kind == "hires":
        um_per_px = slice_.um_per_px
        coarse = "" if um_per_px is None else f" ({um_per_px / source.scale:.2f} um per px)"
        findings.note(f"{slice_.name}: only the hires image{coarse}: add the full-resolution one, which shows cells")
    elif slice_.small_image("hires") is None:
        findings.note(f"{slice_.name}: no {visium.HIRES}: the report will show spots without tissue behind them")
    with open_image(source.path, huge=True) as image:
        inside, warnings = checks.check_image(slice_, source, image, image.thumbnail(checks.THUMBNAIL_PX))
        for note in (*image.notes, *warnings):
            findings.note(f"{slice_.name}: {note}")
        findings.log(
            f"  image {source.path.name}, {image.width} x {image.height} px, {inside.sum():,} of {len(inside):,} spots "
            "on it"
        )
    checked.barcodes = slice_.spots.index.to_numpy(str)[inside]


def check_tiles(checked: Checked, settings: Settings, findings: Findings) -> None:
    """Tiles as image_tilling.py wrote them."""
    folder = settings.tiles / checked.name
    record = tiles.read_record(folder)
    if record is None and (folder / f"{tiles.PACK}.part").exists():
        raise ValueError(f"{folder}: expected {tiles.PACK}, found one that was interrupted; run image_tilling.py again")
    if record is None:
        findings.log(f"  no tiles in {folder}: image_tilling.py cuts them")
        return
    pack = tiles.TilePack(folder)
    needed = [] if checked.barcodes is None else checked.barcodes.tolist()
    lacking = set(needed) - set(pack.barcodes.tolist())
    if lacking:
        raise ValueError(
            f"{folder}: expected a tile for each of {len(needed)} spots, found none for {len(lacking)} (first: "
            f"{min(lacking)}); run image_tilling.py again"
        )
    um_per_px = record.get("um_per_px")
    checked.tile_scale = (pack.size, um_per_px if record.get("resampled") else None)
    side = "" if um_per_px is None else f" at {um_per_px:.3f} um per px, {pack.size * um_per_px:.0f} um wide"
    findings.log(f"  {len(pack.barcodes):,} tiles of {pack.size} px{side}, from {record.get('image')}")


def check_panels(checked: Checked, settings: Settings, findings: Findings) -> None:
    """Gene files as make_decoder_data.py wrote them."""
    data, panels = settings.data, settings.panels
    paths = {role: gene_panels.panel_path(data, panels, checked.name, role) for role in gene_panels.FILES}
    if not any(path.exists() for path in paths.values()):
        findings.log("  no gene files: make_decoder_data.py writes them")
        return
    for role, path in paths.items():
        checked.panels[role] = panel = gene_panels.read_panel(path)
        if checked.content is not None and panel.counts_hash != checked.content:
            raise ValueError(
                f"{panel.path}: expected genes of the counts in {checked.name}, found those of other counts; run "
                "make_decoder_data.py again"
            )
        lacks = f" ({(~panel.measured).sum()} not in this slice)" if not panel.measured.all() else ""
        findings.log(f"  {len(panel.genes)} {role} genes{lacks}, chosen on {', '.join(panel.train_slices)}")


def check_parts(rows: list[splits.SliceRow], settings: Settings, findings: Findings) -> None:
    """There are slices to train on, to validate and to test on."""
    for part in splits.PARTS:
        if splits.of_part(rows, part) or (part == "val" and settings.val_strip):
            continue
        if part == "test":
            findings.note("no slice has part test: training works, the evaluations need --part val or a test slice")
        else:
            strip = ", or use --val_strip" if part == "val" else ""
            findings.problem(f"in table and split: no slice of part {part}", f"give one in slices.csv{strip}")


def check_panel_origin(checked: list[Checked], findings: Findings) -> None:
    """Genes were chosen on train slices only: otherwise the panel depends on what it is tested on."""
    train = {slice_.name for slice_ in checked if slice_.row.part == "train"}
    for slice_ in checked:
        foreign = sorted({name for panel in slice_.panels.values() for name in panel.train_slices} - train)
        if foreign:
            findings.problem(
                f"in {slice_.name}: genes chosen on {', '.join(foreign)}, outside the train part",
                "run make_decoder_data.py with this split",
            )


def check_tile_scales(checked: list[Checked], findings: Findings) -> None:
    """All slices have tiles of one scale, or none has tiles."""
    scales = [slice_.tile_scale for slice_ in checked if slice_.tile_scale is not None]
    if not all(dataset.same_scale(scale, scales[0]) for scale in scales):
        found = " and ".join(sorted({dataset.describe_scale(scale) for scale in scales}))
        fix = "run image_tilling.py on all slices with the same --tile_um and --tile_px"
        findings.problem(f"in the tiles: {found}", fix)
    without = [slice_.name for slice_ in checked if scales and slice_.tile_scale is None]
    if without:
        found = f"in the tiles: none of {', '.join(without)}, but of other slices"
        findings.problem(found, "run image_tilling.py again")


def check_same_panel(checked: list[Checked], role: str, findings: Findings) -> None:
    """All slices have the same genes of this role, or none has a file."""
    hashes = {gene_panels.panel_hash(slice_.panels[role].genes) for slice_ in checked if role in slice_.panels}
    without = [slice_.name for slice_ in checked if hashes and role not in slice_.panels]
    if len(hashes) > 1:
        findings.problem(f"in the {role} genes: {len(hashes)} different panels", "run make_decoder_data.py again")
    if without:
        findings.problem(f"in the {role} genes: no file of {', '.join(without)}", "run make_decoder_data.py again")


def check_room(checked: list[Checked], settings: Settings, findings: Findings) -> None:
    """The disk has room for the tiles that are still to be cut."""
    untiled = [slice_.barcodes for slice_ in checked if slice_.tile_scale is None and slice_.barcodes is not None]
    needed = sum(map(len, untiled)) * TILE_BYTES
    free = shutil.disk_usage(existing(settings.tiles)).free
    if needed > free:
        findings.problem(
            f"{free / GIB:.1f} GiB free for {settings.tiles}, about {needed / GIB:.1f} GiB of tiles to come",
            "make room, or give another disk with --tiles",
        )
