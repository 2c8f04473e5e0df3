"""What is each part of stage one worth: matching, queue, distillation, on simulated patients whose truth is known?

    python -m benchmarks.parts --out results/parts.json                          # one seed, all methods, 90 minutes
    python -m benchmarks.parts --out results/parts.json --seeds 0 1 2            # goes on with what is missing
    python -m benchmarks.parts --out results/quick.json --quick                  # five minutes: does it run?
    python -m benchmarks.parts --out results/one.json --train 1 --methods none full     # a point of a learning curve
    python -m benchmarks.parts --table benchmarks/runs/parts*.json --keep         # docs/parts.md and parts.png, no run

All methods have the same patients, steps and seeds, and are evaluated on patients in no other part. Each has a variant
NAME_mismatched, in which the expression profiles of 30 % of the train spots of each slice are exchanged: pairs that
distillation should see through. A finished run is kept in the folder of --out and is not repeated.

The JSON: {"settings", "methods": {NAME: {FIGURE: value, "per_seed": [...], "per_patient": [...]}}, "differences":
{"A - B": {FIGURE: {"mean", "interval"}}}}. Figures are in 0..1 and are means over patients, null where a method has
none; the seeds of a patient are averaged first, and intervals (95 %) are those of a bootstrap over patients. These do
not contain the variation between trainings: look at the seeds as well.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from datetime import date
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import parts_table
from benchmarks.parts_run import MISMATCHED, PARTS, Cohort, Run, patients_told_apart
from benchmarks.record import machine_name, put_into
from utils import arguments
from utils import settings as shared_settings
from utils.files.atomic import write_whole

DOCS = Path(__file__).resolve().parents[1] / "docs"
METHODS = (*PARTS, *(name + MISMATCHED for name in PARTS))
QUICK: dict[str, Any] = {
    "patients": 6,
    "train": 3,
    "val": 1,
    "spots": 60,
    "steps": 24,
    "methods": ("none", "full", "full_mismatched"),
}


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The flags of parts.py."""

    out: Path | None
    patients: int
    train: int
    val: int
    spots: int
    steps: int
    batch_effects: float
    one_slice: bool
    seeds: Sequence[int]
    methods: Sequence[str]
    flags: str
    quick: bool
    table: Sequence[Path] | None
    keep: bool
    debug: bool

    def cohort(self) -> Cohort:
        assert self.out is not None
        train, strip = (1, True) if self.one_slice else (self.train, False)
        parts = ["train"] * train + ["val"] * (0 if strip else self.val)
        unseen = self.patients - self.train - self.val
        return Cohort(
            self.out.with_suffix(""), self.patients, parts, unseen, self.spots, self.batch_effects, val_strip=strip
        )


def parse_args(argv: list[str] | None = None) -> Settings:
    parser = arguments.Parser(__doc__)
    count, count_or_zero = arguments.count, arguments.count_or_zero
    parser.add_argument("--out", type=Path, help="the JSON; slices and runs go into a folder of its name, 1 GB")
    parser.add_argument("--patients", type=count, default=26, help="simulated, a slice each")
    parser.add_argument("--train", type=count, default=12, help="of them for training, the first ones")
    parser.add_argument("--val", type=count, default=4, help="for validation, the next ones; the last are unseen")
    parser.add_argument("--spots", type=count, default=400, help="of a slice")
    parser.add_argument("--steps", type=count, default=1200, help="of stage one, in whole epochs")
    parser.add_argument(
        "--batch_effects", type=arguments.positive, default=1.0, help="of stain and genes between patients"
    )
    parser.add_argument("--one_slice", action="store_true", help="train on one slice, validate on a strip of it")
    parser.add_argument("--seeds", type=count_or_zero, nargs="+", default=(0,))
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS, metavar="NAME", help="default: all")
    parser.add_argument("--flags", default="", help="further flags of train_mymodel.py, in one quoted word")
    parser.add_argument("--quick", action="store_true", help="few, small and short: five minutes, no result")
    parser.add_argument("--table", type=Path, nargs="+", metavar="JSON", help="run nothing: the table of these files")
    parser.add_argument("--keep", action="store_true", help="with --table: put it into docs/parts.md, and the curve")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    settings = Settings(**vars(parser.parse_args(argv)))
    return replace(settings, **QUICK) if settings.quick else settings


def check(settings: Settings) -> None:
    if settings.table is None and settings.out is None:
        raise ValueError("--out: expected the file to write, found none; name it, or use --table")
    if settings.keep and settings.table is None:
        raise ValueError("--keep: expected --table with the files to keep, found none; name them")
    if settings.train + settings.val >= settings.patients:
        raise ValueError(
            f"--patients {settings.patients}: expected more than --train {settings.train} and --val {settings.val} "
            "together, the rest are unseen; raise it"
        )


def run_all(settings: Settings) -> dict[str, Any]:
    """Do what is missing; the content of --out. Written after every run."""
    cohort = settings.cohort()
    cohort.prepare(any(name.endswith(MISMATCHED) for name in settings.methods))
    assert settings.out is not None
    records: dict[str, list[dict[str, Any]]] = {}
    about: dict[str, Any] = {}
    result: dict[str, Any] = {}
    for seed in settings.seeds:
        for name in settings.methods:
            run = Run(cohort, name, seed, settings.steps, settings.flags)
            records.setdefault(name, []).append(run.finish())
            about = about or describe(settings, run)
            result = {"settings": about} | parts_table.summarise(records)
            write_whole(settings.out, (json.dumps(result, indent=1, allow_nan=False) + "\n").encode())
    return result


def describe(settings: Settings, run: Run) -> dict[str, Any]:
    """What the figures depend on, and chance."""
    about = {key: value for key, value in asdict(settings).items() if key not in ("out", "table", "keep", "debug")}
    chance = {"neighbours": 1 / 9, "recall_at_10": min(10 / settings.spots, 1.0)}
    told_apart = patients_told_apart(run.encoder, run.cohort.flags())
    made = {"date": date.today().isoformat(), "machine": machine_name("cpu")}
    return about | {"chance": chance, "patients_told_apart": told_apart} | made


def main(settings: Settings) -> None:
    check(settings)
    results = [json.loads(path.read_text()) for path in settings.table] if settings.table else [run_all(settings)]
    text = "\n\n".join(parts_table.markdown(result) for result in results)
    print(text)
    if settings.keep:
        put_into(DOCS / "parts.md", "parts", text)
        curve = parts_table.curve_of(results)
        if len(curve) > 1:
            parts_table.draw_curve(curve, DOCS / "parts.png")


if __name__ == "__main__":
    shared_settings.run(main, parse_args())
