"""Is all that is needed installed, what can this machine do, and is a folder of slices in order?

    python -m utils.doctor                                     # the machine, and data/Breast_cancer if there
    python -m utils.doctor --data data/mine --tiles data/mine_tiles

Each thing that is wrong is one line of the list at the end, `found ...; mend: ...`; slices behind a damaged one are
looked at, too. Nothing is written and nothing is downloaded. The exit code is 0 where all is in order and 1 where
something is to be mended.
"""

from __future__ import annotations

import argparse
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

from utils import distributed, settings

REQUIREMENTS = Path(__file__).parents[1] / "requirements.txt"
LEAST_PYTHON = (3, 11)
OPTIONAL = {
    "openslide-python": "whole-slide files (svs, ndpi, ...)",
    "openslide-bin": "the library behind it",
    "tensorboard": "curves beside log.jsonl",
    "spatialdata": "import and export of .zarr",
}
DATA = Path("data/Breast_cancer")
GIB = 2**30


@dataclass
class Findings:
    """What is printed on the way, and what is to be mended."""

    problems: list[str] = field(default_factory=list)

    def say(self, text: str) -> None:
        print(f"  {text}", flush=True)

    def note(self, text: str) -> None:
        self.say(f"note: {text}")

    def mend(self, found: str, how: str) -> None:
        """What is said once, in the list at the end, however often it is met."""
        line = f"found {found}; mend: {how}"
        if line not in self.problems:
            self.problems.append(line)
        self.say(f"  to mend: no. {self.problems.index(line) + 1} below")

    def failed(self, where: str, error: Exception) -> None:
        """An error whose one line ends with the way to mend it, behind its last semicolon."""
        found, _, how = " ".join(str(error).split()).rpartition("; ")
        self.mend(f"in {where}: {found or how}", how if found else "see docs/troubleshooting.md")

    @contextmanager
    def caught(self, where: str) -> Iterator[None]:
        """Go on behind what is wrong within."""
        try:
            yield
        except (ValueError, OSError) as error:
            self.failed(where, error)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = settings.Parser(
        prog="doctor",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    group = parser.add_argument_group("data")
    group.add_argument("--data", type=Path, help=f"folder of slices (default: {DATA}, where it is there)")
    group.add_argument(
        "--tiles", type=Path, default=Path("data/Breast_cancer_image_process"), help="tiles, a folder per slice"
    )
    group.add_argument("--panels", type=Path, help="gene files, a folder per slice (default: inside --data)")
    group.add_argument("--slices", type=Path, help="table of slices (default: slices.csv in --data, if there)")
    group.add_argument("--val_strip", action="store_true", help="a quarter of each train slice is the validation")
    group.add_argument("--allow_leak", action="store_true", help="no objection to a patient in test and elsewhere too")
    group = parser.add_argument_group("machine")
    places = [Path(name) for name in ("encoder_model", "decoder_model", "logs", "results")]
    group.add_argument("--out", type=Path, nargs="+", default=places, help="folders to be written: is there room?")
    settings.add_memory(parser)
    return parser.parse_args(argv)


def check_versions(findings: Findings, requirements: Path = REQUIREMENTS) -> bool:
    """Versions of what is imported, against requirements.txt; gives whether all of it is installed."""
    from packaging.requirements import Requirement

    findings.say(f"Python {platform.python_version()} on {platform.platform()}")
    if sys.version_info < LEAST_PYTHON:
        findings.mend(f"Python {platform.python_version()}", "take 3.11 or newer: make PYTHON=python3.12 demo")
    lines = [line.split("#")[0].strip() for line in requirements.read_text().splitlines()]
    wanted, versions, complete = [Requirement(line) for line in lines if line], [], True
    for one in wanted:
        found = _version(one.name)
        versions.append(f"{one.name} {found or '-'}")
        if found is None or not one.specifier.contains(found, prereleases=True):
            complete = complete and found is not None
            findings.mend(
                f"{one.name} {found or 'not installed'}, needed is {one.specifier}",
                "pip install -r requirements.txt, in the environment that runs this",
            )
    for start in range(0, len(versions), 7):
        findings.say(", ".join(versions[start : start + 7]))
    for name, purpose in OPTIONAL.items():
        if _version(name) is None:
            findings.note(f"{name} is not installed, which is optional: {purpose}")
    return complete


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def check_device(findings: Findings) -> None:
    """CUDA device, its driver, memory and bf16; else what the CPU multiplies fast in."""
    import torch

    names, cores = driver(), os.cpu_count() or 1
    if hasattr(os, "sched_getaffinity"):
        cores = len(os.sched_getaffinity(0))
    for number in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(number)
        kinds = "bf16 and fp32" if distributed.bf16_is_fast(torch.device("cuda", number)) else "fp32 (no fast bf16)"
        findings.say(
            f"GPU {number}: {device.name}, {device.total_memory / GIB:.1f} GiB, CUDA {torch.version.cuda}, "
            f"driver {names[number] if number < len(names) else 'unknown'}, {kinds}"
        )
    if not torch.cuda.is_available():
        findings.say(f"no CUDA device: everything runs on the CPU (torch {torch.__version__})")
        if names:
            built = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "built without CUDA"
            findings.mend(
                f"an NVIDIA driver {names[0]}, but torch {built} sees no device",
                "install a torch that fits the driver (pytorch.org, Get started), or free the device",
            )
    amx, bf16 = torch.cpu._is_amx_tile_supported(), torch.cpu._is_avx512_bf16_supported()
    fast = distributed.bf16_is_fast(torch.device("cpu"))
    findings.say(
        f"CPU: {cores} cores, AMX {_yes(amx)}, avx512_bf16 {_yes(bf16)}: --precision auto is "
        f"{'bf16' if fast else 'fp32'} on it"
    )


def driver() -> list[str]:
    """Versions of the NVIDIA driver, one per device; empty without one."""
    if shutil.which("nvidia-smi") is None:
        return []
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return []
    return done.stdout.split()


def _yes(value: bool) -> str:
    return "yes" if value else "no"


def check_disk(places: list[Path], findings: Findings) -> None:
    """Free bytes where each folder lies or would be made; folders of one disk share a line."""
    free: dict[tuple[int, int], list[str]] = {}
    for place in places:
        there = existing(place)
        free.setdefault((there.stat().st_dev, shutil.disk_usage(there).free), []).append(str(place))
        if not os.access(there, os.W_OK):
            findings.note(f"{there} may not be written: give another folder than {place}, see --out, --tiles, --panels")
    for (_, left), names in free.items():
        findings.say(f"disk: {left / GIB:.1f} GiB free for {', '.join(names)}")


def existing(place: Path) -> Path:
    """The folder itself, or the nearest one above it that is there."""
    place = place.absolute()
    return next(folder for folder in (place, *place.parents) if folder.is_dir())


def check_data(args: Any, complete: bool, findings: Findings) -> None:
    data = args.data or DATA
    print(f"Slices in {data}", flush=True)
    if not complete:
        findings.note("not looked at before everything needed is installed")
    elif args.data is None and not DATA.exists():
        findings.note(f"{DATA} is not there yet: docs/tutorial.md says how to put slices there, or give --data")
    else:
        from utils.doctor_data import check_slices

        args.data = data
        check_slices(args, findings)


def main(args: argparse.Namespace) -> int:
    """Returns the exit code."""
    findings = Findings()
    print("Software and machine", flush=True)
    complete = check_versions(findings)
    if _version("torch") is not None:
        check_device(findings)
    check_disk([args.data or DATA, args.tiles, *([args.panels] if args.panels else []), *args.out], findings)
    check_data(args, complete, findings)
    print("To mend" if findings.problems else "All in order", flush=True)
    for number, problem in enumerate(findings.problems, 1):
        findings.say(f"{number}. {problem}")
    return 1 if findings.problems else 0


if __name__ == "__main__":
    sys.exit(main(parse_args()))
