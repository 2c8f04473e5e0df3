"""Kills, faults and fuzzing, through real processes: what docs/reliability.md promises.

    python tests/torture.py --kills 20 --seed 0             # `make torture`

A kill is a SIGKILL at a random one of the moments that count (killed_run.py) of either stage, with and without a second
kill while it goes on; it passes when the run then ends with the weights of one that was never stopped, bit for bit. A
fault is a test of the files below, each beside its control. The last line says how many passed; with --keep the table
stands in docs/reliability.md.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from datetime import date
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from tiny_runs import STAGES, Work, different, progress  # noqa: E402

from benchmarks.speed import machine_name, put_into  # noqa: E402

FAULTS = ("bad_input", "bad_files", "odd_input", "sharing_refused", "import_slices")
FUZZ = (
    "fuzz_files",
    "gene_names",
    "array_places",
)  # property tests of hypothesis, with many more examples than by default
FLAGS = ("--Epoch", 3, "--Init_lr", 1e-3, "--save_every", 1)
MOMENTS = 40  # of a run that count, a little more than there are


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", action="store_true", help="put the table into docs/reliability.md")
    return parser.parse_args(argv)


def prepared(folder: Path) -> Work:
    """Three simulated patients with tiles, panels and a stage one that stage two learns from."""
    from utils.slices.simulate import write_slices

    write_slices(folder / "data", n_patients=3, n_spots=70, n_genes=60, seed=1)
    work = Work(folder / "data", folder / "tiles", folder / "panels", folder / "whole")
    for script in ("image_tilling", "make_decoder_data", *STAGES):
        work.run(script, *(FLAGS if script in STAGES else ()))
    return work


def killed(work: Work, script: str, moment: int, *flags) -> bool:
    """Run a script to its end or to the moment; did the kill come?"""
    command = [sys.executable, ROOT / "tests" / "killed_run.py", moment, script, *work.argv(script, *FLAGS, *flags)]
    done = subprocess.run(
        [*map(str, command)], cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True
    )
    if done.returncode not in (0, -signal.SIGKILL):
        raise RuntimeError(done.stderr.decode())
    return done.returncode != 0


def survives(whole: Work, folder: Path, script: str, moments: list[int]) -> bool:
    """Killed at each of the moments in turn, the second counted from where it goes on, it must end as `whole` did."""
    work = Work(whole.data, whole.tiles, whole.panels, folder)
    encoder = () if script == "train_mymodel" else ("--encoder", whole.encoder)
    for i, moment in enumerate(moments):
        killed(work, script, moment, *encoder, *(["--resume"] if i else []))
    work.run(script, *FLAGS, *encoder, "--resume")
    return not different(progress(work, script), progress(whole, script))


class Count:
    """A pytest plugin: how many tests passed, of how many."""

    def __init__(self):
        self.passed = self.number = 0

    def pytest_runtest_logreport(self, report):
        if report.when == "call" or report.failed:
            self.number += 1
            self.passed += report.passed


def count(names: tuple[str, ...], *more: str) -> Count:
    found = Count()
    files = [str(path) for name in names for path in (ROOT / "tests").rglob(f"test_{name}.py")]
    pytest.main(["-q", "--no-header", "-p", "no:cacheprovider", *more, *files], plugins=[found])
    return found


def main(args) -> int:
    draw, start, rows = random.Random(args.seed), time.monotonic(), []
    with tempfile.TemporaryDirectory() as temporary:
        whole = prepared(Path(temporary))
        for i in range(args.kills):
            script = list(STAGES)[i % 2]
            moments = [draw.randint(1, MOMENTS) for _ in range(1 + i % 3 // 2)]
            same = survives(whole, Path(temporary) / f"kill{i}", script, moments)
            rows.append(same)
            print(f"kill {i + 1}: {script} at {moments}: {'the same end' if same else 'ANOTHER END'}", flush=True)
    faults = count(FAULTS)
    fuzz = count(FUZZ, "--hypothesis-profile", "torture", "--hypothesis-seed", str(args.seed))
    minutes = (time.monotonic() - start) / 60
    summary = f"kills {sum(rows)} of {args.kills}, faults {faults.passed} of {faults.number}"
    table = "\n".join(
        [
            f"`python tests/torture.py --kills {args.kills} --seed {args.seed}`, {date.today().isoformat()}, "
            f"{machine_name('cpu')}, {minutes:.0f} minutes.",
            "",
            "| tried | as promised |",
            "| --- | --- |",
            f"| trainings killed, with the same end | {sum(rows)} of {args.kills} |",
            f"| faults reported in one line, no file changed | {faults.passed} of {faults.number} |",
            f"| property and fuzz tests | {fuzz.passed} of {fuzz.number} |",
        ]
    )
    if args.keep:
        put_into(ROOT / "docs" / "reliability.md", "torture", table)
    print(table, summary, sep="\n\n")
    return 0 if (sum(rows), faults.passed, fuzz.passed) == (args.kills, faults.number, fuzz.number) else 1


if __name__ == "__main__":
    sys.exit(main(parse_args()))
