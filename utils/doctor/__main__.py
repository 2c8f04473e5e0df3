"""python -m utils.doctor: see utils/doctor/settings.py for its flags."""

from __future__ import annotations

import sys

from utils.doctor import environment
from utils.doctor.findings import Findings
from utils.doctor.settings import Settings, parse_args


def check_data(settings: Settings, complete: bool, findings: Findings) -> None:
    """Slices, tiles and gene files, where `complete` says that everything needed to read them is installed."""
    print(f"Slices in {settings.data}", flush=True)
    if not complete:
        findings.note("not checked before everything needed is installed")
    elif not settings.data_given and not settings.data.exists():
        findings.note(f"{settings.data} is not there yet: see docs/tutorial.md, or give --data")
    else:
        from utils.doctor.data import check_slices

        check_slices(settings, findings)


def main(settings: Settings) -> int:
    """Returns the exit code."""
    findings = Findings()
    print("Software and machine", flush=True)
    complete = environment.check_versions(findings)
    if environment.version("torch") is not None:
        environment.check_device(findings)
    places = [settings.data, settings.tiles, settings.panels, *settings.out]
    environment.check_disk([place for place in places if place is not None], findings)
    check_data(settings, complete, findings)
    print("To fix" if findings.problems else "All in order", flush=True)
    for number, problem in enumerate(findings.problems, 1):
        findings.log(f"{number}. {problem}")
    return 1 if findings.problems else 0


if __name__ == "__main__":
    sys.exit(main(parse_args()))
