"""Cut one tile per spot from the H&E picture of each slice.

    python image_tilling.py --data data/Breast_cancer --tiles data/Breast_cancer_image_process
    python image_tilling.py --source hires --crop_size 40        # the published tiles

Reads slice folders (`spatial/`, the picture, barcodes of the counts where there are any); writes per slice
`<barcode>.jpeg`, `tiles.json` and the packed copy `tiles.h5`. A second run does only what is missing.
"""

from __future__ import annotations

import json
import math
import mmap
import multiprocessing
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from utils.files.atomic import write_record
from utils.images import tiles
from utils.slices import splits, visium
from utils.training import arguments
from utils.training.folder import alone_in

CHUNK = 64  # spots handed to a process at a time


@dataclass(frozen=True)
class Job:
    """The tiles of one slice: `centres_px` (S, 2) of the source picture, `files` that may be `there` (S,) already."""

    picture: Image.Image
    cut: tiles.Cut
    centres_px: np.ndarray
    files: list[str]
    there: np.ndarray


# set before the processes fork, which then share both: what there is to do, and where each chunk's tiles go
_job: Job
_blocks: np.ndarray  # (chunks under way, CHUNK, Z, Z, 3)


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
    group.add_argument("--huge", action="store_true", help="allow large pictures, which are decoded as a whole")
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


def cut_chunk(number: int) -> int:
    """Cut a chunk of spots into its block, which the next chunks use again; gives its number back."""
    rows = slice(number * CHUNK, (number + 1) * CHUNK)
    files = _job.files[rows]
    block = _blocks[number % len(_blocks)][: len(files)]
    tiles.ensure_tiles(_job.picture, _job.centres_px[rows], _job.cut, files, _job.there[rows], out=block)
    return number


def shared_blocks(n: int, size: int) -> np.ndarray:
    """Room for n chunks of tiles that forked processes write and this one reads: (n, CHUNK, Z, Z, 3) uint8."""
    shape = (n, CHUNK, size, size, 3)
    return np.frombuffer(mmap.mmap(-1, math.prod(shape)), np.uint8).reshape(shape)


def in_order(pool: Executor, work: Callable, tasks: Iterable, ahead: int) -> Iterator:
    """Results in the order of the tasks. At most `ahead` are under way or waiting, so that memory stays bounded."""
    waiting: deque = deque()
    for task in tasks:
        if len(waiting) == ahead:
            yield waiting.popleft().result()
        waiting.append(pool.submit(work, task))
    while waiting:
        yield waiting.popleft().result()


def cut_all(job: Job, workers: int, name: str) -> Iterator[np.ndarray]:
    """All tiles of a job in order, in blocks (n, Z, Z, 3), from `workers` processes; each is used before the next."""
    global _job, _blocks
    workers = max(workers, 1)
    _job, _blocks = job, shared_blocks(2 * workers, job.cut.size)
    n_chunks = -(-len(job.files) // CHUNK)
    with (
        ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("fork")) as pool,
        tqdm(total=len(job.files), desc=f"{name}: tiles", unit="spot", disable=None) as bar,
    ):
        for number in in_order(pool, cut_chunk, range(n_chunks), ahead=len(_blocks)):
            block = _blocks[number % len(_blocks)][: len(job.files) - number * CHUNK]
            bar.update(len(block))
            yield block


def spots_on_picture(spots, size: tuple[int, int], scale: float) -> tuple[np.ndarray, np.ndarray]:
    """Spot centres (S, 2) in source pixels, and which of them lie on the picture."""
    centres = spots[["x_fullres_px", "y_fullres_px"]].to_numpy() * scale
    return centres, ((centres >= 0) & (centres < size)).all(1)


def is_done(folder: Path, cut: tiles.Cut, barcodes: np.ndarray, files: list[str], record: dict | None) -> bool:
    if record is None or not tiles.same_cut(record, cut) or not (folder / tiles.PACK).exists():
        return False
    return np.array_equal(tiles.TilePack(folder).barcodes, barcodes) and are_there(folder, files).all()


def are_there(folder: Path, files: list[str]) -> np.ndarray:
    """Which of the files the folder holds: (S,) bool, by one listing of it."""
    there = {str(path) for path in folder.iterdir()}
    return np.array([file in there for file in files])


def begin(folder: Path, cut: tiles.Cut, record: dict | None) -> None:
    """Make the folder ready: tiles of another cut are removed, those of this one kept."""
    folder.mkdir(parents=True, exist_ok=True)
    started = folder / tiles.STARTED  # left by a run that was stopped half way
    if record is None and started.exists():
        record = json.loads(started.read_text())
    if record is not None and not tiles.same_cut(record, cut):
        changed = [f"{k} {record.get(k)} -> {v}" for k, v in asdict(cut).items() if record.get(k) != v]
        print(f"{folder.name}: settings changed ({', '.join(changed)}): its tiles are cut anew")
        for old in [folder / tiles.RECORD, folder / tiles.PACK, *folder.glob("*.jpeg")]:
            old.unlink(missing_ok=True)
    write_record(started, asdict(cut))


def tile_slice(row, args) -> int:
    """All that is missing of one slice's tiles; returns how many spots have one."""
    root = visium.find_root(splits.slice_folder(args.data, row))
    spots, unmatched = visium.tissue_spots(root)
    source, picture_file = find_picture(row, args, root)
    hires_scale = visium.read_scalefactors(root)["tissue_hires_scalef"]
    scale = hires_scale if source == "hires" else 1.0
    cut = plan_cut(row, args, root, source, picture_file, scale)
    size = tiles.picture_size(picture_file)
    if source == "fullres":
        tiles.check_scale(size, picture_file, root, hires_scale)
    centres, inside = spots_on_picture(spots, size, scale)
    if not inside.any():
        raise ValueError(
            f"{picture_file}: expected {len(spots)} spots on it, found none on its {size[0]} x {size[1]} px; take the "
            "picture that the positions refer to, or swap their axes"
        )
    spots, outside = spots[inside], spots.index[~inside].tolist()
    folder, record = args.tiles / row.slice, tiles.read_record(args.tiles / row.slice)
    files = tiles.tile_files(folder, spots.index)
    done = is_done(folder, cut, spots.index.to_numpy(str), files, record)
    if not done:
        tiles.check_size(picture_file, *size, args.huge)
        picture = tiles.open_picture(picture_file)  # all that can be refused is, before a tile is removed or written
        begin(folder, cut, record)
        job = Job(picture, cut, centres[inside], files, are_there(folder, files))
        workers = min(4, os.cpu_count() or 1) if args.workers is None else args.workers
        cut_slice(folder, job, spots, outside, workers)
    notes = [f"{n} {what}" for what, n in unmatched.items() if n]
    notes += [f"{len(outside)} outside the picture"] if outside else []
    what = "are there" if done else f"of {cut.size} px from {picture_file.name}"
    print(f"{row.slice}: {len(spots)} tiles {what}" + "".join(f", {note}" for note in notes))
    return len(spots)


def cut_slice(folder: Path, job: Job, spots, outside: list[str], workers: int) -> None:
    """Cut what is missing, pack all, and write the record last: a folder with a record is whole."""
    barcodes, xy_px = spots.index.to_numpy(str), spots[["x_fullres_px", "y_fullres_px"]].to_numpy()
    tiles.write_pack(folder, barcodes, xy_px, cut_all(job, workers, folder.name), job.cut.size)
    made = {"number": len(barcodes), "outside": outside, "software": f"magic image_tilling, Pillow {Image.__version__}"}
    write_record(folder / tiles.RECORD, asdict(job.cut) | made)
    (folder / tiles.STARTED).unlink()


@alone_in("tiles")
def main(args):
    rows, warnings = splits.read_table(args.data, args.slices, split=args.part != "all")
    arguments.say(warnings)
    rows = arguments.chosen(rows, args.part)
    number = sum(tile_slice(row, args) for row in rows)
    print(f"{number} tiles of {len(rows)} slices in {args.tiles}")


if __name__ == "__main__":
    arguments.run(main, parse_args())
