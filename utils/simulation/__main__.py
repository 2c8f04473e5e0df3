"""Write simulated slices, whose truth is known, and their slices.csv.

python -m utils.simulation --out data/simulated --patients 6 --spots 300 --genes 600 --seed 0
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from utils import arguments, settings
from utils.simulation.slices import write_slices
from utils.words import count_of


@dataclass(kw_only=True)
class Settings:
    out: Path
    patients: int
    slices_per_patient: int
    spots: int
    genes: int
    seed: int
    um_per_px: float
    debug: bool


def parse_args(argv: list[str] | None = None) -> Settings:
    parser = arguments.Parser(__doc__, prog="python -m utils.simulation")
    parser.add_argument("--out", type=Path, required=True, help="folder to write, new or empty")
    parser.add_argument(
        "--patients", type=arguments.count, default=6, help="the last one is test, the one before it validation"
    )
    parser.add_argument("--slices_per_patient", type=arguments.count, default=1, help="sections of each patient")
    parser.add_argument("--spots", type=arguments.count, default=300, help="spots under tissue, per slice")
    parser.add_argument("--genes", type=arguments.count, default=600, help="genes that are simulated")
    parser.add_argument("--seed", type=arguments.count_or_zero, default=0, help="fixes every pixel and count")
    parser.add_argument(
        "--um_per_px", type=arguments.positive, default=1.0, help="pixel size of the H&E, um; 0.5 shows nuclei better"
    )
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return Settings(**vars(parser.parse_args(argv)))


def main(args: Settings) -> None:
    sizes = (args.patients, args.slices_per_patient, args.spots, args.genes, args.seed, args.um_per_px)
    folders = write_slices(args.out, *sizes, verbose=True)
    print(f"{count_of(len(folders), 'slice')} and slices.csv in {args.out}")


if __name__ == "__main__":
    settings.run(main, parse_args())
