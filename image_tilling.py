"""Cut one tile per spot from the H&E image of each slice.

    python image_tilling.py --data data/Breast_cancer --tiles data/Breast_cancer_image_process
    python image_tilling.py --source hires --crop_size 40        # the published tiles

Reads slice folders (`spatial/`, the image, barcodes of the counts where there are any); writes per slice `tiles.h5` and
`tiles.json`, with --jpeg or --crop_size `<barcode>.jpeg` too. A slice whose image, spots and settings are those of its
record is skipped.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from utils.files.hashing import content_hash
from utils.images import tiles
from utils.images.image import TissueImage, image_size, open_image
from utils.slices import splits, visium
from utils.training import arguments
from utils.training.folder import alone_in

BATCH = 64  # tiles handed over at a time


def parse_args(argv=None):
    parser = arguments.shared(__doc__, part="all")
    group = parser.add_argument_group("tiles")
    group.add_argument(
        "--source", choices=["auto", "fullres", "hires"], default="auto", help="picture: fullres if there, else hires"
    )
    group.add_argument(
        "--tile_um",
        type=arguments.positive,
        default=112.0,
        help="side of the tissue square, um (112); more shows the surroundings: 310 in the benchmark of few spots",
    )
    group.add_argument("--tile_px", type=arguments.count, default=224, help="side of the tile, pixels (224)")
    group.add_argument("--crop_size", type=arguments.count, help="instead: a square of so many source pixels, unscaled")
    group.add_argument(
        "--spot_pitch_um",
        type=arguments.positive,
        help="centre to centre, um, on square arrays (200 on legacy ST); slices.csv may say it slice by slice",
    )
    group.add_argument("--huge", action="store_true", help="allow large images, which are decoded as a whole")
    group.add_argument("--jpeg", action="store_true", help="write <barcode>.jpeg too, as --crop_size always does")
    return parser.parse_args(argv)


def find_picture(row, args, root: Path) -> tuple[str, Path]:
    """Which picture to cut from: ("fullres" | "hires", file)."""
    fullres = None if args.source == "hires" else splits.image_file(args.data, row)
    if fullres is not None:
        return "fullres", fullres
    hires = root / "spatial" / "tissue_hires_image.png"
    if args.source == "fullres" or not hires.exists():
        wanted = "a full-resolution picture" + (" or spatial/tissue_hires_image.png" if args.source == "auto" else "")
        raise ValueError(f"{root}: expected {wanted}, found none; put the picture into the folder")
    return "hires", hires


def plan_cut(row, args, root: Path, source: str, picture_file: Path, scale: float) -> tiles.Cut:
    """`scale`: pixels of the source picture per full-resolution pixel."""
    positions = visium.read_positions(root)
    try:
        pitch_um = visium.spot_pitch_um(root, positions, args.spot_pitch_um or row.spot_pitch_um)
        um_per_source_px = pitch_um / (visium.pitch_fullres_px(positions) * scale)
    except ValueError:
        if args.crop_size is None:
            raise
        um_per_source_px = None
    if args.crop_size is not None:
        return tiles.Cut(source, picture_file.name, um_per_source_px, float(args.crop_size), args.crop_size, False)
    if source == "hires":
        print(
            f"{row.slice}: warning: tiles of {args.tile_um:g} um come from the hires image at "
            f"{um_per_source_px:.2f} um per px, where single cells can hardly be seen; add the full-resolution picture"
        )
    return tiles.Cut(
        source, picture_file.name, args.tile_um / args.tile_px, args.tile_um / um_per_source_px, args.tile_px, True
    )


def spots_on_image(spots, size: tuple[int, int], scale: float) -> tuple[np.ndarray, np.ndarray]:
    """Spot centres (S, 2) in source pixels, and which of them lie on the image."""
    centres = spots[["x_fullres_px", "y_fullres_px"]].to_numpy() * scale
    return centres, ((centres >= 0) & (centres < size)).all(1)


def tile_slice(row, args) -> int:
    """The tiles of one slice, unless they are there; returns how many spots have one."""
    root = visium.find_root(splits.slice_folder(args.data, row))
    spots, unmatched = visium.tissue_spots(root)
    source, picture_file = find_picture(row, args, root)
    hires_scale = visium.read_scalefactors(root)["tissue_hires_scalef"]
    scale = hires_scale if source == "hires" else 1.0
    cut = plan_cut(row, args, root, source, picture_file, scale)
    size = image_size(picture_file)
    if source == "fullres":
        tiles.check_scale(size, picture_file, root, hires_scale)
    centres, inside = spots_on_image(spots, size, scale)
    if not inside.any():
        raise ValueError(
            f"{picture_file}: expected {len(spots)} spots on it, found none on its {size[0]} x {size[1]} px; take the "
            "image that the positions refer to, or swap their axes"
        )
    spots, outside = spots[inside], spots.index[~inside].tolist()
    done = not cut_slice(row.slice, picture_file, cut, centres[inside], spots, outside, args)
    notes = [f"{n} {what}" for what, n in unmatched.items() if n]
    notes += [f"{len(outside)} outside the image"] if outside else []
    what = "are there" if done else f"of {cut.size} px from {picture_file.name}"
    print(f"{row.slice}: {len(spots)} tiles {what}" + "".join(f", {note}" for note in notes))
    return len(spots)


def cut_slice(name: str, image_file: Path, cut: tiles.Cut, centres, spots, outside: list[str], args) -> bool:
    """Cut a slice as a whole, unless its folder holds just these tiles; whether anything was cut."""
    folder, jpeg = args.tiles / name, args.jpeg or not cut.resampled
    barcodes, xy_px = spots.index.to_numpy(str), spots[["x_fullres_px", "y_fullres_px"]].to_numpy()
    tiles.tile_files(folder, barcodes)  # refuses barcodes that cannot be file names
    image_hash = content_hash(image_file)
    if tiles.is_whole(folder, cut, image_hash, barcodes, xy_px, jpeg):
        return False
    about = {"number": len(barcodes), "outside": outside, "image_hash": image_hash}
    about["software"] = f"magic image_tilling, Pillow {Image.__version__}"
    with open_image(image_file, huge=args.huge) as image:  # all that can be refused is, before anything is written
        for note in image.notes:
            print(f"{name}: {image_file.name}: {note}")
        report_changes(folder, cut, image_hash)
        order = tiles.reading_order(centres, cut)
        blocks = with_bar(image, centres[order], cut, args.workers, name)
        tiles.write_tiles(folder, blocks, cut, barcodes, xy_px, about, order, jpeg)
    return True


def report_changes(folder: Path, cut: tiles.Cut, image_hash: str) -> None:
    """Print what differs from the tiles that are there."""
    with suppress(ValueError):  # a damaged record goes with its tiles
        record = tiles.read_record(folder)
        changed = [] if record is None else tiles.changes(record, cut, image_hash)
        if changed:
            print(f"{folder.name}: settings changed ({', '.join(changed)}): its tiles are cut anew")


def with_bar(image: TissueImage, centres, cut: tiles.Cut, workers: int | None, name: str) -> Iterator[np.ndarray]:
    """Tiles (n, Z, Z, 3) in the order of the centres, counted by a progress bar."""
    with tqdm(total=len(centres), desc=f"{name}: tiles", unit="spot", disable=None) as bar:
        for block in tiles.cut_tiles(image, centres, cut, BATCH, workers):
            bar.update(len(block))
            yield block


@alone_in("tiles")
def main(args):
    rows, warnings = splits.read_table(args.data, args.slices, split=args.part != "all")
    arguments.say(warnings)
    rows = arguments.chosen(rows, args.part)
    number = sum(tile_slice(row, args) for row in rows)
    print(f"{number} tiles of {len(rows)} slices in {args.tiles}")


if __name__ == "__main__":
    arguments.run(main, parse_args())
