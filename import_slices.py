"""Bring slices of other formats into the form that every script reads: Space Ranger folders and slices.csv.

    python import_slices.py --format legacy_st her2st --out data/her2st
    python import_slices.py --format visium_hd my_run --bin 16 --image my_run.tif --out data/hd
    python import_slices.py --format h5ad sample.h5ad --image sample.tif --out data/samples      # or a HEST-1k folder
    python import_slices.py --format h5ad joined.h5ad --library_key library_id --out data/samples
    python import_slices.py --format spatialdata sample.zarr --out data/samples

Reads SOURCE, which is never changed; writes a folder per slice, counts unchanged, and a line per slice into slices.csv.
Each slice is read back and compared before its folder gets its name. `part` of slices.csv is left for you to fill in.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from utils import arguments, settings
from utils.files.exclusive import exclusive_folder
from utils.words import count_of

if TYPE_CHECKING:
    from utils.importers.source import Source

FORMATS = ("legacy_st", "visium_hd", "h5ad", "spatialdata")
BINNED, JOINED = ("visium_hd", "spatialdata"), ("h5ad", "spatialdata")


@dataclass(kw_only=True)
class Settings:
    source: Path
    format: str
    out: Path
    image: Path | None
    bin: int | None
    library_key: str | None
    spot_pitch_um: float | None
    debug: bool
    memory: float


def parse_args(argv: list[str] | None = None) -> Settings:
    parser = arguments.Parser(__doc__)
    parser.add_argument(
        "source", type=Path, metavar="SOURCE", help="what to import; docs/own_data.md says what it holds"
    )
    group = parser.add_argument_group("import")
    group.add_argument("--format", choices=FORMATS, required=True, help="what SOURCE is")
    group.add_argument("--out", type=Path, required=True, help="folder of slices, new or not; later given as --data")
    group.add_argument("--image", type=Path, help="full-resolution H&E of the only slice, if SOURCE does not hold it")
    group.add_argument("--bin", type=arguments.count, help="Visium HD: bin size in um (default: 16)")
    group.add_argument(
        "--library_key", metavar="COLUMN", help="column of obs that tells joined sections apart: a slice for each value"
    )
    group.add_argument(
        "--spot_pitch_um", type=arguments.positive, help="um between neighbouring spots, in place of what SOURCE states"
    )
    group.add_argument("--debug", action="store_true", help="show the traceback of an error")
    settings.add_memory(parser)
    return Settings(**vars(parser.parse_args(argv)))


def read_sources(args: Settings) -> Iterator[Source]:
    """The slices of SOURCE one after the other; only the reader of its format is imported."""
    flags = (args.source, args.image, args.spot_pitch_um)
    if args.format == "legacy_st":
        from utils.importers.legacy_st import read_legacy_st

        return read_legacy_st(*flags)
    if args.format == "visium_hd":
        from utils.importers.visium_hd import read_visium_hd

        return read_visium_hd(*flags, args.bin, args.memory * 2**30)
    if args.format == "h5ad":
        from utils.importers.h5ad import read_h5ad

        return read_h5ad(*flags, args.library_key)
    from utils.importers.spatialdata import read_spatialdata

    return read_spatialdata(*flags, args.bin, args.library_key)


@exclusive_folder("out")
def main(args: Settings) -> None:
    from utils.importers import base, images, slice_folder

    for flag, value, formats in (("--bin", args.bin, BINNED), ("--library_key", args.library_key, JOINED)):
        if value is not None and args.format not in formats:
            raise ValueError(
                f"{flag} {value}: expected --format {' or '.join(formats)}, found {args.format}; leave it out"
            )
    images.check_image(args.image)
    slice_folder.check_table(args.out)
    number = 0
    for source in read_sources(args):
        print("\n".join(base.import_slice(source, args.out, args.memory * 2**30)), flush=True)
        number += 1
    parts = f"fill in the column part of {args.out / 'slices.csv'} (train, val, test)"
    print(f"{count_of(number, 'slice')} imported into {args.out}; {parts}")


if __name__ == "__main__":
    settings.run(main, parse_args())
