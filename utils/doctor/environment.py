"""Packages against requirements.txt, the device and what it computes fast in, room on the disks."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path

from utils import distributed
from utils.doctor.findings import GIB, Findings, existing
from utils.words import count_of

REQUIREMENTS = Path(__file__).parents[2] / "requirements.txt"
LEAST_PYTHON = (3, 11)
OPTIONAL = {
    "openslide-python": "whole-slide files (svs, ndpi, ...)",
    "openslide-bin": "the library behind it",
    "tensorboard": "curves beside log.jsonl",
    "spatialdata": "import and export of .zarr",
}


def check_versions(findings: Findings, requirements: Path = REQUIREMENTS) -> bool:
    """Versions of what is imported, against requirements.txt; returns whether all of it is installed."""
    from packaging.requirements import Requirement

    findings.log(f"Python {platform.python_version()} on {platform.platform()}")
    if sys.version_info < LEAST_PYTHON:
        findings.problem(f"Python {platform.python_version()}", "take 3.11 or newer: make PYTHON=python3.12 demo")
    lines = [line.split("#")[0].strip() for line in requirements.read_text().splitlines()]
    versions, complete = [], True
    for package in [Requirement(line) for line in lines if line]:
        installed = version(package.name)
        versions.append(f"{package.name} {installed or '-'}")
        if installed is None or not package.specifier.contains(installed, prereleases=True):
            complete = complete and installed is not None
            findings.problem(
                f"{package.name} {installed or 'not installed'}, needed is {package.specifier}",
                "pip install -r requirements.txt, in the environment that runs this",
            )
    for start in range(0, len(versions), 7):
        findings.log(", ".join(versions[start : start + 7]))
    for name, purpose in OPTIONAL.items():
        if version(name) is None:
            findings.note(f"{name} is not installed, which is optional: {purpose}")
    return complete


def version(name: str) -> str | None:
    """Of an installed package; None where it is not installed."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def check_device(findings: Findings) -> None:
    """CUDA devices, their driver, memory and bf16; and what the CPU computes fast in."""
    import torch

    drivers = driver_versions()
    for number in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(number)
        kinds = "bf16 and fp32" if distributed.bf16_is_fast(torch.device("cuda", number)) else "fp32 (no fast bf16)"
        findings.log(
            f"GPU {number}: {device.name}, {device.total_memory / GIB:.1f} GiB, CUDA {torch.version.cuda}, "
            f"driver {drivers[number] if number < len(drivers) else 'unknown'}, {kinds}"
        )
    if not torch.cuda.is_available():
        findings.log(f"no CUDA device: everything runs on the CPU (torch {torch.__version__})")
        if drivers:
            built = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "built without CUDA"
            findings.problem(
                f"an NVIDIA driver {drivers[0]}, but torch {built} sees no device",
                "install a torch that fits the driver (pytorch.org, Get started), or free the device",
            )
    kinds = ", ".join(f"{kind} {'yes' if is_there else 'no'}" for kind, is_there in distributed.cpu_bf16().items())
    precision = "bf16" if distributed.bf16_is_fast(torch.device("cpu")) else "fp32"
    cores = count_of(distributed.n_cores(), "core")
    findings.log(f"CPU: {cores}, {kinds}: --precision auto is {precision} on it")


def driver_versions() -> list[str]:
    """Of the NVIDIA driver, one per device; empty without one."""
    if shutil.which("nvidia-smi") is None:
        return []
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return []
    return done.stdout.split()


def check_disk(places: list[Path], findings: Findings) -> None:
    """Free space where each folder is or would be made; folders of one disk share a line."""
    free: dict[tuple[int, int], list[str]] = {}
    for place in places:
        there = existing(place)
        free.setdefault((there.stat().st_dev, shutil.disk_usage(there).free), []).append(str(place))
        if not os.access(there, os.W_OK):
            findings.note(f"{there} may not be written: give another folder than {place}, see --out, --tiles, --panels")
    for (_, left), names in free.items():
        findings.log(f"disk: {left / GIB:.1f} GiB free for {', '.join(names)}")
