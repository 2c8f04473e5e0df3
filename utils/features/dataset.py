"""A slice with its tiles and panels, joined by barcode, and batches of its tiles.

Letters: S spots of a slice, G input genes, T target genes, B batch, Z tile side in pixels.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, Self

import numpy as np

from utils import distributed
from utils.genes import panels as gene_panels
from utils.images.tiles import TilePack
from utils.settings import SharedSettings, warn
from utils.slices import content, splits, visium
from utils.words import count_of

if TYPE_CHECKING:
    from multiprocessing.context import BaseContext

    import torch
    from torch import Tensor


class Order(Protocol):
    """Lists of spot numbers, one a batch."""

    def __len__(self) -> int: ...
    def __iter__(self) -> Iterator[list[int]]: ...


class Spots(Protocol):
    """Spots with their places: of a slice, or of a slide that was never measured."""

    @property
    def name(self) -> str: ...

    @property
    def barcodes(self) -> np.ndarray: ...

    @property
    def xy_fullres_px(self) -> np.ndarray: ...

    @property
    def pitch_fullres_px(self) -> float: ...


@dataclass(frozen=True)
class SliceData:
    """One slice: all spots that have a tile, in the order of the panel files.

    `part` says what each spot is used for: train, val, test, or gap (between a validation strip and its train spots).
    """

    name: str
    patient: str
    barcodes: np.ndarray  # (S,)
    xy_fullres_px: np.ndarray  # (S, 2)
    pitch_fullres_px: float
    part: np.ndarray  # (S,) str
    total_counts: np.ndarray  # (S,)
    pack: TilePack
    tile_rows: np.ndarray  # (S,) rows of `pack`
    panels: dict[str, gene_panels.Panel]  # "input", "target": spots in the order of `barcodes`
    root: Path  # the folder that holds spatial/
    downsample_counts: int | None = None  # counts per spot that bins are made of at most, that of training

    def bins(self, out: np.ndarray | None = None) -> np.ndarray:
        """Input tokens of stage one: (S, G) uint8, in `out` if given."""
        counts, totals = self.panels["input"].read_counts(), self.total_counts
        if self.downsample_counts:
            seeds = gene_panels.spot_seeds(self.name, self.barcodes)
            counts, totals = gene_panels.downsample_counts(counts, totals, self.downsample_counts, seeds)
        return gene_panels.bin_tokens(counts, totals, out)

    def rows_of(self, part: str) -> np.ndarray:
        """Spots of a part, of all parts for "all": (n,) rows."""
        return np.flatnonzero((self.part == part) | (part == "all"))


def load_slice(
    row: splits.SliceRow,
    settings: SharedSettings,
    roles: tuple[str, ...],
    val_strip: bool,
    genes: list[str] | None = None,
    downsample_counts: int | None = None,
) -> SliceData:
    """Read tiles and panels of one slice.

    Parameters
    ----------
    settings : data, tiles, panels
    roles : panels to read, "input" and "target"
    val_strip : a quarter of a train slice is for validation
    genes : bring the panel of the first role onto these
    downsample_counts : counts per spot that bins are made of at most

    Raises ValueError where files are missing, are not of the same spots or counts, or spots have no tile.
    """
    panels = read_panels(row, settings, roles)
    first, root = panels[roles[0]], visium.find_root(splits.slice_folder(settings.data, row))
    check_files_hash(panels, content.files_hash(root), root)
    pack = TilePack(settings.tiles / row.slice)
    tile_rows = rows_of_tiles(pack, first.barcodes)
    kept = np.flatnonzero(tile_rows >= 0)
    if len(kept) < len(tile_rows):
        print(f"{row.slice}: {count_of(len(tile_rows) - len(kept), 'spot')} outside the image left out")
    xy = first.xy_fullres_px[kept]
    strip = val_strip and row.part == "train"
    barcodes = first.barcodes[kept]
    of_spots = {role: replace(panel.select_spots(kept), barcodes=barcodes) for role, panel in panels.items()}
    if genes is not None:
        of_spots[roles[0]] = of_spots[roles[0]].select_genes(genes)
    return SliceData(
        name=row.slice,
        patient=row.patient,
        barcodes=barcodes,
        xy_fullres_px=xy,
        pitch_fullres_px=first.pitch_fullres_px,
        part=splits.strip_parts(xy, first.pitch_fullres_px) if strip else np.full(len(kept), row.part),
        total_counts=first.total_counts[kept],
        pack=pack,
        tile_rows=tile_rows[kept],
        panels=of_spots,
        root=root,
        downsample_counts=downsample_counts,
    )


def read_panels(row: splits.SliceRow, settings: SharedSettings, roles: tuple[str, ...]) -> dict[str, gene_panels.Panel]:
    """The panels of a slice by role. Raises ValueError where they are not of the same spots."""
    panels = {
        role: gene_panels.read_panel(gene_panels.panel_path(settings.data, settings.panels, row.slice, role))
        for role in roles
    }
    first = panels[roles[0]]
    for panel in panels.values():
        if not np.array_equal(panel.barcodes, first.barcodes):
            raise ValueError(
                f"{panel.path}: expected the {len(first.barcodes)} spots of {first.path}, found other spots; run "
                "make_decoder_data.py again"
            )
    return panels


def check_files_hash(panels: dict[str, gene_panels.Panel], files_hash: str | None, root: Path) -> None:
    """Panels must be of the counts and positions that lie there now; without counts there is nothing to compare."""
    for panel in panels.values():
        if files_hash not in (None, panel.files_hash):
            raise ValueError(
                f"{panel.path}: expected genes of the counts and positions in {root}, found those of other files; "
                "fix: run make_decoder_data.py again"
            )


def rows_of_tiles(pack: TilePack, barcodes: np.ndarray) -> np.ndarray:
    """Row in the pack of each spot (S,), -1 for one outside the image. Raises ValueError where a tile is missing."""
    place = {barcode: i for i, barcode in enumerate(pack.barcodes)}
    rows = np.array([place.get(barcode, -1) for barcode in barcodes])
    outside = set(pack.record["outside"]) if pack.record else set()
    missing = [b for b, tile in zip(barcodes, rows, strict=True) if tile < 0 and b not in outside]
    if missing:
        raise ValueError(
            f"{pack.folder}: expected a tile for each of {len(rows)} spots, found none for {len(missing)} "
            f"(first: {missing[0]}); run image_tilling.py again, or give their folder with --tiles"
        )
    return rows


def load_slices(
    rows: list[splits.SliceRow],
    settings: SharedSettings,
    roles: tuple[str, ...],
    val_strip: bool,
    genes: list[str] | None = None,
    downsample_counts: int | None = None,
) -> list[SliceData]:
    """Slices of one panel and one tile size, see `load_slice`. Raises ValueError where they differ."""
    slices: list[SliceData] = []
    for row in rows:
        slice_ = load_slice(row, settings, roles, val_strip, genes, downsample_counts)
        first = slices[0] if slices else slice_
        for role in roles:
            if slice_.panels[role].genes != first.panels[role].genes:
                raise ValueError(
                    f"{slice_.panels[role].path}: expected the {role} genes of {first.name}, found others; "
                    "run make_decoder_data.py again on all slices"
                )
        if not same_scale(tile_scale(slice_), tile_scale(first)):
            raise ValueError(
                f"{slice_.pack.folder}: expected tiles of {describe_scale(tile_scale(first))} like those of "
                f"{first.name}, found {describe_scale(tile_scale(slice_))}; run image_tilling.py again on all slices"
            )
        slices.append(replace(slice_, panels={role: slice_.panels[role].like(first.panels[role]) for role in roles}))
    return slices


def um_per_source_px(slice_: SliceData) -> float | None:
    """Micrometres per pixel of the image that the tiles were cut from; None where the spot pitch is not known."""
    record = slice_.pack.record or {}
    return None if record.get("um_per_px") is None else record["um_per_px"] * record["size"] / record["crop"]


def um_per_fullres_px(slice_: SliceData) -> float | None:
    """Micrometres per full-resolution pixel, by the tiles' record; None where the spot pitch is not known."""
    per_source_px = um_per_source_px(slice_)
    return None if per_source_px is None else per_source_px * slice_.pack.record["scale"]


def grid_kind(slice_: Spots) -> str:
    """Either hexagonal or square: on a square grid no spot has more than four others within 1.2 pitches."""
    from scipy.spatial import KDTree

    tree = KDTree(slice_.xy_fullres_px)
    within = tree.query_ball_point(slice_.xy_fullres_px, 1.2 * slice_.pitch_fullres_px, return_length=True)
    return "hexagonal" if np.quantile(within - 1, 0.9) > 4 else "square"


def tile_scale(slice_: SliceData) -> tuple[int, float | None]:
    """Tile side in pixels, and micrometres per pixel where the tiles are of a stated size."""
    record = slice_.pack.record or {}
    return slice_.pack.size, record.get("um_per_px") if record.get("resampled") else None


def same_scale(one: Sequence[Any], other: Sequence[Any]) -> bool:
    """Whether two `tile_scale` agree, to a thousandth, or where one was rounded to three decimals."""
    (side, um_per_px), (other_side, other_um_per_px) = one, other
    if side != other_side or um_per_px is None or other_um_per_px is None:
        return (side, um_per_px) == (other_side, other_um_per_px)
    return math.isclose(um_per_px, other_um_per_px, rel_tol=1e-3, abs_tol=5.1e-4)


def describe_scale(scale: tuple) -> str:
    """A `tile_scale` in words."""
    size, um_per_px = scale
    return f"{size} px" + (" without a stated scale" if um_per_px is None else f" at {um_per_px:g} um per px")


def spots_of(slices: list[SliceData], part: str) -> np.ndarray:
    """(n, 2) whole numbers: place of the slice in the list, row in the slice, of all spots of a part."""
    rows = [slice_.rows_of(part) for slice_ in slices]
    return np.concatenate([np.column_stack([np.full(len(r), i), r]) for i, r in enumerate(rows)]).astype(np.int64)


def nearest_spots(slices: list[SliceData], spots: np.ndarray, k: int) -> np.ndarray:
    """The k nearest spots of each, of the same slice and among those given: (n, 2), see `spots_of` -> (n, k) rows of
    them. Where a slice has fewer, the spot itself stands for the missing ones."""
    from scipy.spatial import KDTree

    near = np.repeat(np.arange(len(spots))[:, None], k, axis=1)
    for i, slice_ in enumerate(slices):
        here = np.flatnonzero(spots[:, 0] == i)
        n_near = min(k, len(here) - 1)
        if n_near > 0:
            xy = slice_.xy_fullres_px[spots[here, 1]]
            near[here, :n_near] = here[KDTree(xy).query(xy, k=n_near + 1)[1][:, 1:]]
    return near


def draw(rows: np.ndarray, fraction: float, rng: np.random.Generator) -> np.ndarray:
    """A fraction of some rows (n,), in their order, at least one of them where there are any."""
    return np.sort(rng.choice(rows, int(np.ceil(fraction * len(rows))), replace=False))


class TileBatches:
    """Batches of tiles, read as uint8 by whole batch, and whatever else is kept per spot.

    A map-style data set for torch's DataLoader, whose `__getitems__` gives one dict per batch: tiles (B, Z, Z, 3) uint8
    and spot (B,), the number in this set. `extra` has a row per spot in each of its arrays; those of a batch are added
    by the process that asks for it (`Loader`). One that reads tiles for it is not handed them, only where tiles lie.
    """

    def __init__(self, slices: list[SliceData], spots: np.ndarray, extra: dict[str, np.ndarray] | None = None):
        self.packs = [(slice_.pack, slice_.tile_rows) for slice_ in slices]
        self.spots, self.extra = spots, extra or {}

    def __len__(self) -> int:
        return len(self.spots)

    def __getitems__(self, numbers: list[int]) -> dict[str, np.ndarray]:
        chosen = np.asarray(numbers)
        places = self.spots[chosen]
        size = self.packs[0][0].size
        tiles = np.empty((len(chosen), size, size, 3), np.uint8)
        for i in np.unique(places[:, 0]):
            here = places[:, 0] == i
            pack, rows = self.packs[i]
            tiles[here] = pack.read(rows[places[here, 1]])
        return {"tiles": tiles, "spot": chosen}

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"extra": {}}


def to_tensors(batch: dict[str, np.ndarray]) -> dict[str, Tensor]:
    import torch

    return {name: torch.from_numpy(rows) for name, rows in batch.items()}


class Loader:
    """Batches of a set as tensors, in an order; a `with` block ends the processes that read for it."""

    def __init__(self, batches: TileBatches, order: Order, workers: int):
        from torch.utils.data import DataLoader

        self.order, self.extra = order, batches.extra
        sampler: Any = order
        data: Any = batches  # torch types neither a set of whole batches
        collate: Any = to_tensors  # nor this: `__getitems__` gives a whole batch, so there is nothing to put together
        self.reader: DataLoader | None = DataLoader(
            data,
            batch_sampler=sampler,
            num_workers=workers,
            collate_fn=collate,
            persistent_workers=workers > 0,
            multiprocessing_context=reading_context() if workers else None,
        )

    def __len__(self) -> int:
        return len(self.order)

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        if self.reader is None:
            raise ValueError("expected a loader that is open, found one whose block has ended")
        for batch in self.reader:
            chosen = batch["spot"].numpy()
            yield batch | to_tensors({name: rows[chosen] for name, rows in self.extra.items()})

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.reader = None  # nothing else refers to it: it joins its processes


def ahead(batches: Iterable[dict[str, Tensor]], device: torch.device) -> Iterator[tuple[dict[str, Tensor], np.ndarray]]:
    """Batches on the device, each with its spots on the host (B,). A batch is copied while the one before is used."""
    before = None
    for batch in batches:
        copied = {name: distributed.to_device(rows, device) for name, rows in batch.items()}, batch["spot"].numpy()
        if before is not None:
            yield before
        before = copied
    if before is not None:
        yield before


def reading_context() -> BaseContext:
    """Start reading processes from a server without threads. One forked from a process that has threads, those of a
    process group or of a BLAS, may wait for ever for a lock that a thread held."""
    import multiprocessing

    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch"])
    return context


def loader(batches: TileBatches, order: Order, workers: int | None) -> Loader:
    """A loader with `workers` reading processes.

    None: as many as --workers says, which on a CPU is none. A tile is read in 50 us, less than handing it over costs.
    """
    return Loader(batches, order, n_workers(workers))


def n_workers(asked: int | None) -> int:
    """Reading processes: no more than the cores that this process may use, which torch would warn of."""
    import torch

    cores = distributed.n_cores()
    if asked is None:
        return min(4, cores) if torch.cuda.is_available() else 0
    if asked > cores:
        warn_of_cores(asked, cores)
    return min(asked, cores)


@cache
def warn_of_cores(asked: int, cores: int) -> None:
    """Once in a run."""
    warn([f"--workers {asked}: {count_of(cores, 'core')} may be used, so that {cores} read tiles"])


def in_turn(n_spots: int, batch_size: int) -> list[list[int]]:
    """All spots in order, the last batch as it comes."""
    return [list(range(i, min(i + batch_size, n_spots))) for i in range(0, n_spots, batch_size)]


def all_spots(slice_: SliceData) -> np.ndarray:
    """(S, 2), see `spots_of`, of a slice on its own."""
    n = len(slice_.barcodes)
    return np.column_stack([np.zeros(n, np.int64), np.arange(n)])


def counts_hashes(slices: list[SliceData]) -> dict[str, str]:
    return {slice_.name: next(iter(slice_.panels.values())).counts_hash for slice_ in slices}


def spot_totals(slices: list[SliceData]) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Barcodes (S,) and total counts (S,) by slice."""
    return {slice_.name: (slice_.barcodes, slice_.total_counts) for slice_ in slices}
