"""Cut one tile per spot from the H&E image of each slice.

    python image_tilling.py --data data/Breast_cancer --tiles data/Breast_cancer_image_process
    python image_tilling.py --source hires --crop_size 40        # the published tiles
    python image_tilling.py --shard 2/8                          # the second of eight jobs that share the slices

Reads slice folders (`spatial/`, the image, barcodes of the counts where there are any); writes per slice `tiles.h5`,
the record `tiles.json` and, with --jpeg or --crop_size, a `<barcode>.jpeg` per spot. A slice whose tiles are there
already, cut in the same way from the same image, is left as it is.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from utils import arguments, settings
from utils.files.exclusive import exclusive
from utils.files.hashing import content_hash
from utils.images import tiles
from utils.images.image import TissueImage, open_image
from utils.slices import checks, splits, visium
from utils.words import count_of

BATCH = 64  # tiles cut at a time


@dataclass(kw_only=True)
class Settings(settings.SharedSettings):
    part: str
    source: str
    tile_um: float
    tile_px: int
    crop_size: int | None
    spot_pitch_um: float | None
    jpeg: bool
    huge: bool
    shard: tuple[int, int]


def parse_args(argv: list[str] | None = None) -> Settings:
    parser = settings.shared(__doc__, part="all", unused=("panels", "device", "seed"))
    group = parser.add_argument_group("tiles")
    group.add_argument(
        "--source",
        choices=["auto", "fullres", "hires"],
        default="auto",
        help="image that tiles are cut from; auto: the full-resolution one if there, else hires",
    )
    group.add_argument(
        "--tile_um",
        type=arguments.positive,
        default=112.0,
        help="side of the tissue square, um; more includes the surroundings: 310 in the benchmark of few spots",
    )
    group.add_argument("--tile_px", type=arguments.count, default=224, help="side of the tile, pixels")
    group.add_argument(
        "--crop_size",
        type=arguments.count,
        help="side in pixels of the source, cut unscaled; replaces --tile_um and --tile_px",
    )
    group.add_argument(
        "--spot_pitch_um",
        type=arguments.positive,
        help="centre to centre, um, of square arrays for which slices.csv states none (200 on legacy ST)",
    )
    group.add_argument("--jpeg", action="store_true", help="also a JPEG per tile, for inspection; no script reads them")
    group.add_argument(
        "--huge", action="store_true", help="accept large images that have to be decoded as a whole, in memory"
    )
    group.add_argument(
        "--shard", type=arguments.shard, default=(0, 1), help="I/N: every N-th slice from the I-th on (default: all)"
    )
    return Settings(**vars(parser.parse_args(argv)))


def plan_cut(slice_: visium.Slice, source: visium.SourceImage, args: Settings) -> tiles.Cut:
    """How the tiles of a slice are cut. Raises ValueError where their size is given in um and the pitch is unknown."""
    named = (source.kind, source.path.name)
    if args.crop_size is not None:
        um_per_px = None if slice_.um_per_px is None else slice_.um_per_px / source.scale
        return tiles.Cut(*named, um_per_px, float(args.crop_size), args.crop_size, False, source.scale)
    um_per_source_px = slice_.pitch_um / (slice_.pitch_px * source.scale)
    if source.kind == "hires":
        print(
            f"warning: {slice_.name}: tiles of {args.tile_um:g} um come from the hires image at "
            f"{um_per_source_px:.2f} um per px, where single cells can hardly be seen; add the full-resolution image"
        )
    um_per_px, crop = args.tile_um / args.tile_px, args.tile_um / um_per_source_px
    return tiles.Cut(*named, um_per_px, crop, args.tile_px, True, source.scale)


def open_slice(row: splits.SliceRow, args: Settings) -> visium.Slice:
    """The slice with the pitch of its row, else of its array or bins, else of --spot_pitch_um."""
    folder, flag_um = splits.slice_folder(args.data, row), args.spot_pitch_um
    slice_ = visium.open_slice(folder, row.slice, row.spot_pitch_um)
    known_um = slice_.known_pitch_um
    if flag_um is None or known_um is None:
        return slice_ if flag_um is None else visium.open_slice(folder, row.slice, flag_um)
    if flag_um != known_um:
        by = "its array" if row.spot_pitch_um is None else "slices.csv"
        print(f"warning: {row.slice}: spots are {known_um:g} um apart by {by}; --spot_pitch_um is not used")
    return slice_


def tile_slice(row: splits.SliceRow, args: Settings) -> int:
    """The tiles of one slice, unless they are there; returns how many spots have one."""
    slice_ = open_slice(row, args)
    source = slice_.source_image(args.source, row.image)
    cut, image_hash = plan_cut(slice_, source, args), content_hash(source.path)
    outside, action = outside_of_kept(slice_, args.tiles / row.slice, cut, image_hash, args.jpeg), "are there"
    if outside is None:
        outside, action = cut_slice(slice_, source, cut, image_hash, args), f"of {cut.size} px from {source.path.name}"
    number = len(slice_.spots) - len(outside)
    notes = [f"{n} {reason}" for reason, n in slice_.unmatched.items() if n]
    notes += [f"{len(outside)} outside the image"] if outside else []
    print(f"{row.slice}: {count_of(number, 'tile')} {action}" + "".join(f", {note}" for note in notes))
    return number


def outside_of_kept(
    slice_: visium.Slice, folder: Path, cut: tiles.Cut, image_hash: str, jpeg: bool
) -> list[str] | None:
    """Spots outside the image, of a folder that holds exactly these tiles; None where it does not."""
    try:
        pack = tiles.TilePack(folder)
    except ValueError:  # no tiles, or damaged ones
        return None
    changes = tiles.changes(pack.record, cut, image_hash)
    if changes:
        print(f"{slice_.name}: settings changed ({', '.join(changes)}): its tiles are cut anew")
        return None
    outside = pack.record.get("outside", [])
    inside = ~slice_.spots.index.isin(outside)
    barcodes, xy_px = slice_.spots.index.to_numpy(str)[inside], slice_.xy_fullres_px[inside]
    return outside if tiles.is_whole(pack, barcodes, xy_px, jpeg or not cut.resampled) else None


def cut_slice(
    slice_: visium.Slice, source: visium.SourceImage, cut: tiles.Cut, image_hash: str, args: Settings
) -> list[str]:
    """Check the image against the spots, then cut the slice as a whole; returns the spots outside the image."""
    with open_image(source.path, huge=args.huge) as image:
        inside, warnings = checks.check_image(slice_, source, image, image.thumbnail(checks.THUMBNAIL_PX))
        for note in image.notes:
            print(f"{slice_.name}: {source.path.name}: {note}")
        settings.warn([f"{slice_.name}: {warning}" for warning in (*slice_.warnings, *warnings)])
        outside = slice_.spots.index[~inside].tolist()
        barcodes, xy_px = slice_.spots.index.to_numpy(str)[inside], slice_.xy_fullres_px[inside]
        about = {"number": len(barcodes), "outside": outside, "image_hash": image_hash}
        about["software"] = f"magic image_tilling, Pillow {Image.__version__}"
        centres = xy_px * source.scale
        order = tiles.reading_order(centres, cut)
        blocks = with_bar(image, centres[order], cut, args.workers, slice_.name)
        jpeg = args.jpeg or not cut.resampled
        tiles.write_tiles(args.tiles / slice_.name, blocks, cut, barcodes, xy_px, about, order, jpeg)
    return outside


def with_bar(
    image: TissueImage, centres: np.ndarray, cut: tiles.Cut, workers: int | None, name: str
) -> Iterator[np.ndarray]:
    """Tiles (n, Z, Z, 3) in the order of the centres, counted by a progress bar."""
    with tqdm(total=len(centres), desc=f"{name}: tiles", unit="spot", disable=None) as bar:
        for block in tiles.cut_tiles(image, centres, cut, BATCH, workers):
            bar.update(len(block))
            yield block


def main(args: Settings) -> None:
    split = {"split": args.part != "all", "val_strip": args.val_strip, "allow_leak": args.allow_leak}
    rows, warnings = splits.read_table(args.data, args.slices, **split)
    settings.warn(warnings)
    rows = arguments.of_shard(splits.chosen(rows, args.part), args.shard, "slices")
    if not rows:
        return
    number = 0
    for row in rows:
        with exclusive(args.tiles / row.slice, "--tiles"):  # not all of --tiles: shards write there side by side
            number += tile_slice(row, args)
    print(f"{count_of(number, 'tile')} of {count_of(len(rows), 'slice')} in {args.tiles}")


if __name__ == "__main__":
    settings.run(main, parse_args())
