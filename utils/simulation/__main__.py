"""Write simulated slices, whose truth is known, and their slices.csv.

python -m utils.simulation --out data/simulated --patients 6 --spots 300 --genes 600 --seed 0
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path

from utils.simulation.slices import write_slices


@dataclass(kw_only=True)
class Settings:
    out: Path
    patients: int
    slices_per_patient: int
    spots: int
    genes: int
    seed: int
    um_per_px: float


def parse_args(argv: list[str] | None = None) -> Settings:
    # usage is suppressed so that a wrong flag gives one line
    parser = argparse.ArgumentParser(prog="simulate", usage=argparse.SUPPRESS, description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder to write, new or empty")
    parser.add_argument(
        "--patients", type=int, default=6, help="the last one is test, the one before it validation (6)"
    )
    parser.add_argument("--slices_per_patient", type=int, default=1, help="sections of each patient (1)")
    parser.add_argument("--spots", type=int, default=300, help="spots under tissue, per slice (300)")
    parser.add_argument("--genes", type=int, default=600, help="genes that are simulated (600)")
    parser.add_argument("--seed", type=int, default=0, help="fixes every pixel and count (0)")
    parser.add_argument(
        "--um_per_px", type=float, default=1.0, help="pixel size of the H&E in um: 0.5 shows nuclei better (1)"
    )
    return Settings(**vars(parser.parse_args(argv)))


def main(args: Settings) -> None:
    try:
        sizes = (args.patients, args.slices_per_patient, args.spots, args.genes, args.seed, args.um_per_px)
        folders = write_slices(args.out, *sizes, verbose=True)
    except ValueError as error:
        sys.exit(f"simulate: {error}")
    print(f"{len(folders)} slices and slices.csv in {args.out}")


if __name__ == "__main__":
    main(parse_args())
