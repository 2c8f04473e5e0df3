"""Visium HD: one bin size of `binned_outputs/`, as a slice folder without parquet.

The reader takes such a folder as it is; imported, it stands beside other slices, under its own name, with its image.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from utils.importers.source import SPOT_COLUMNS, Source, found_in, place_spots
from utils.slices import visium
from utils.slices.folders import SCALEFACTORS

DEFAULT_BIN_UM = 16
SQUARE = re.compile(r"square_(\d+)um")


def find_bin(source: Path, bin_um: int | None) -> tuple[str, int, Path]:
    """Name of the run, bin size in um and folder of the bin that is meant.

    Parameters
    ----------
    source : the run, its outs/, its binned_outputs/, or one square_*um
    bin_um : size of the bins; default that of the folder given, else 16
    """
    source = source.absolute()
    square = SQUARE.fullmatch(source.name)
    if square:
        folders = {int(square[1]): source}
    else:
        places = [source, source / "binned_outputs", source / "outs" / "binned_outputs"]
        squares = [path for place in places for path in sorted(place.glob("square_*um")) if (path / "spatial").is_dir()]
        folders = {int(match[1]): path for path in squares if (match := SQUARE.fullmatch(path.name))}
    if not folders:
        raise ValueError(
            f"{source}: expected binned_outputs/square_*um of a Visium HD run, found {found_in(source)}; correct SOURCE"
        )
    wanted = bin_um or (min(folders) if square else DEFAULT_BIN_UM)
    if wanted not in folders:
        sizes = ", ".join(map(str, sorted(folders)))
        raise ValueError(f"{source}: expected a bin size that is there, found --bin {wanted}; use --bin with: {sizes}")
    run = folders[wanted].parent
    while run.name in ("binned_outputs", "outs"):
        run = run.parent
    return run.name, wanted, folders[wanted]


def read_visium_hd(
    source: Path,
    image: Path | None = None,
    pitch_um: float | None = None,
    bin_um: int | None = None,
    memory: float = math.inf,
) -> Iterator[Source]:
    """The bins under tissue that have counts, of one size; `pitch_um` where it is not the bin size.

    Small images and scale factors are those of the run; counts that take more than `memory` bytes stay in their file.
    """
    run, size_um, root = find_bin(source, bin_um)
    bins = visium.read_slice(root, run, memory)
    um_per_px = bins.scalefactors.get("microns_per_pixel")
    xy_px, array = (bins.spots[columns].to_numpy() for columns in (SPOT_COLUMNS[2:], SPOT_COLUMNS[:2]))
    spots, lattice, notes = place_spots(str(root), bins.spots.index, xy_px, array)
    lattice = replace(lattice, mirrored=False)  # the array of Visium HD is a mirror image of the pixels by itself
    yield Source(
        name=f"{run}_{size_um:03d}um",
        patient=run,
        origin=root,
        counts=bins.counts,
        genes=bins.genes,
        gene_ids=bins.gene_ids,
        spots=spots,
        lattice=lattice,
        pitch_um=pitch_um or bins.scalefactors.get("bin_size_um", float(size_um)),
        spot_diameter_px=bins.scalefactors["spot_diameter_fullres"],
        image=image,
        small={kind: image.path for kind, image in bins.small.items()},
        scalefactors=json.loads((root / "spatial" / SCALEFACTORS).read_text(encoding="utf-8-sig")),  # with every key
        stated_um_per_px={} if um_per_px is None else {"microns_per_pixel of its scale factors": um_per_px},
        left_out=bins.unmatched,
        notes=notes,
    )
