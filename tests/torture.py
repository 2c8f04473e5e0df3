"""Kills, faults and fuzzing, through real processes: what docs/reliability.md promises.

    python tests/torture.py --kills 20 --seed 0             # `make torture`
    python tests/torture.py --kills 6 --threads 1           # by default all that the machine has, then one

A kill is a SIGKILL at a random one of the moments that count (killed_run.py) of either stage, with and without a second
kill while it goes on; it passes when the run then ends with the weights of one that was never stopped, bit for bit. All
of these runs are processes of their own in the same environment, with the same number of threads. A fault is a test of
the files below, each beside its control. The last line says how many passed; with --keep the table stands in
docs/reliability.md.
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
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from tiny_runs import STAGES, Work, different, progress  # noqa: E402

from benchmarks.record import machine_name, put_into  # noqa: E402

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
    parser.add_argument("--threads", type=int, nargs="+", default=sorted({cores(), 1}, reverse=True))
    parser.add_argument("--keep", action="store_true", help="put the table into docs/reliability.md")
    return parser.parse_args(argv)


def cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def environment(threads: int) -> dict[str, str]:
    """That of every training: all that says how many threads a process has, said."""
    names = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS")
    return os.environ | {"CUDA_VISIBLE_DEVICES": ""} | dict.fromkeys(names, str(threads))


@dataclass(frozen=True)
class Trainings:
    """Both stages on the same slices with the same threads: `whole` is never stopped."""

    whole: Work
    threads: int

    def call(self, *command) -> int:
        """Exit code of a Python program. Raises RuntimeError unless it ends well or is killed."""
        command = [sys.executable, *map(str, command)]
        done = subprocess.run(command, cwd=ROOT, env=environment(self.threads), capture_output=True)
        if done.returncode not in (0, -signal.SIGKILL):
            raise RuntimeError(done.stderr.decode())
        return done.returncode

    def train(self, work: Work, script: str, *flags) -> None:
        self.call(ROOT / f"{script}.py", *work.argv(script, *FLAGS, *flags))

    def kill(self, work: Work, script: str, moment: int, *flags) -> None:
        """Run a script to its end or to the moment."""
        self.call(ROOT / "tests" / "killed_run.py", moment, script, *work.argv(script, *FLAGS, *flags))

    def survives(self, folder: Path, script: str, moments: list[int]) -> bool:
        """Killed at each of the moments in turn, the second counted from where it goes on, it must end as `whole`."""
        work = Work(self.whole.data, self.whole.tiles, self.whole.panels, folder)
        encoder = () if script == "train_mymodel" else ("--encoder", self.whole.encoder)
        for i, moment in enumerate(moments):
            self.kill(work, script, moment, *encoder, *(["--resume"] if i else []))
        self.train(work, script, *encoder, "--resume")
        return not different(progress(work, script), progress(self.whole, script))


def prepared(folder: Path) -> Work:
    """Three simulated patients with tiles and panels."""
    from utils.simulation.slices import write_slices

    write_slices(folder / "data", n_patients=3, n_spots=70, n_genes=60, seed=1)
    work = Work(folder / "data", folder / "tiles", folder / "panels", folder)
    for script in ("image_tilling", "make_decoder_data"):
        work.run(script)
    return work


def kill_all(work: Work, folder: Path, threads: int, args) -> int:
    """How many of --kills trainings with so many threads end as one that was never stopped."""
    draw, same = random.Random(args.seed), 0
    trainings = Trainings(replace(work, out=folder / "whole"), threads)
    for script in STAGES:
        trainings.train(trainings.whole, script)
    for i in range(args.kills):
        script = list(STAGES)[i % 2]
        moments = [draw.randint(1, MOMENTS) for _ in range(1 + i % 3 // 2)]
        survived = trainings.survives(folder / f"kill{i}", script, moments)
        same += survived
        said = "the same end" if survived else "ANOTHER END"
        print(f"kill {i + 1}, {threads} threads: {script} at {moments}: {said}", flush=True)
    return same


class Count:
    """A pytest plugin: how many tests passed, of how many."""

    def __init__(self):
        self.passed = self.number = 0

    def pytest_runtest_logreport(self, report):
        if report.when == "call" or report.failed:
            self.number += 1
            self.passed += report.passed


def count(names: tuple[str, ...], *more: str) -> Count:
    """Of the test files of these names, wherever they lie."""
    found, files = Count(), []
    for name in names:
        files += (here := sorted((ROOT / "tests").rglob(f"test_{name}.py")))
        if not here:
            raise ValueError(f"tests: expected a file test_{name}.py, found none; fix: name another in {__file__}")
    pytest.main(["-q", "--no-header", "-p", "no:cacheprovider", *more, *map(str, files)], plugins=[found])
    return found


def main(args) -> int:
    start, same = time.monotonic(), {}
    with tempfile.TemporaryDirectory() as temporary:
        work = prepared(Path(temporary))
        for threads in args.threads:
            same[threads] = kill_all(work, Path(temporary) / f"threads{threads}", threads, args)
    faults = count(FAULTS)
    fuzz = count(FUZZ, "--hypothesis-profile", "torture", "--hypothesis-seed", str(args.seed))
    minutes = (time.monotonic() - start) / 60
    kills = [f"| trainings killed, {n} threads, with the same end | {same[n]} of {args.kills} |" for n in same]
    table = "\n".join(
        [
            f"`python tests/torture.py --kills {args.kills} --seed {args.seed}`, {date.today().isoformat()}, "
            f"{machine_name('cpu')}, {minutes:.0f} minutes.",
            "",
            "| tried | as promised |",
            "| --- | --- |",
            *kills,
            f"| faults reported in one line, no file changed | {faults.passed} of {faults.number} |",
            f"| property and fuzz tests | {fuzz.passed} of {fuzz.number} |",
        ]
    )
    if args.keep:
        put_into(ROOT / "docs" / "reliability.md", "torture", table)
    n_kills = args.kills * len(same)
    summary = f"kills {sum(same.values())} of {n_kills}, faults {faults.passed} of {faults.number}"
    print(table, summary, sep="\n\n")
    passed = (sum(same.values()), faults.passed, fuzz.passed)
    return 0 if passed == (n_kills, faults.number, fuzz.number) else 1


if __name__ == "__main__":
    sys.exit(main(parse_args()))
