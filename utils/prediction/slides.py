"""Which slides a prediction is asked for: one by one or in tables, a folder of results each."""

from __future__ import annotations

import csv
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

COLUMNS = ("slide", "um_per_px", "positions", "mask", "spot_pitch_um")


@dataclass(frozen=True)
class Request:
    """One slide: an image or a slice folder, what is known of it, and the folder that its results go to."""

    slide: Path
    um_per_px: float | None = None
    positions: Path | None = None
    mask: Path | None = None
    spot_pitch_um: float | None = None
    name: str = ""
    out: Path = Path()


def _number(text: str, where: str) -> float | None:
    if not text:
        return None
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise ValueError(f"{where}: expected a positive number or nothing, found {text!r}; fix: correct the table")
    return value


def read_slide_table(path: Path) -> list[Request]:
    """Lines of a table with the columns of COLUMNS, of which only `slide` must be there; paths are relative to it."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            lines = [[cell.strip() for cell in line] for line in csv.reader(file)]
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{path}: expected a comma-separated table in UTF-8, found {error}; save it anew") from error
    header, *lines = lines or [[]]
    if "slide" not in header or set(header) - set(COLUMNS) or len(set(header)) < len(header):
        found = ", ".join(header) or "nothing"
        raise ValueError(
            f"{path}: expected the column slide, and of {', '.join(COLUMNS[1:])} any, found {found}; correct the header"
        )
    requests = []
    for number, line in enumerate(lines, start=2):
        where = f"{path}, line {number}"
        if not any(line):
            continue
        if len(line) != len(header) or not line[header.index("slide")]:
            raise ValueError(f"{where}: expected {len(header)} cells and a slide, found {','.join(line)!r}; correct it")
        cells = dict.fromkeys(COLUMNS, "") | dict(zip(header, line, strict=True))
        requests.append(
            Request(
                path.parent / cells["slide"],
                um_per_px=_number(cells["um_per_px"], f"{where}, um_per_px"),
                positions=path.parent / cells["positions"] if cells["positions"] else None,
                mask=path.parent / cells["mask"] if cells["mask"] else None,
                spot_pitch_um=_number(cells["spot_pitch_um"], f"{where}, spot_pitch_um"),
            )
        )
    if not requests:
        raise ValueError(f"{path}: expected a line per slide, found the header alone; add the slides")
    return requests


def file_name(text: str) -> str:
    """The text with letters, digits, `_`, `-` and `.` only, so that it can name a file or a folder anywhere."""
    return re.sub(r"[^\w.-]+", "_", text, flags=re.ASCII).strip("._") or "unnamed"


def slide_name(slide: Path) -> str:
    """The name of a slide: its file without ending, or the slice folder (the one above outs/)."""
    path = slide.absolute()
    if not path.is_dir():
        return file_name(path.stem)
    return file_name(path.parent.name if path.name == "outs" else path.name)


def list_slides(slides: Sequence[Path], out: Path, given: Request) -> list[Request]:
    """Every slide of a call, those of tables (.csv) among them; a single one has `out` itself, several a folder each.

    Parameters
    ----------
    given : values of the flags, which fill the empty cells of tables
    """
    listed: list[Request] = []
    for slide in slides:
        listed += read_slide_table(slide) if slide.suffix.lower() == ".csv" else [Request(slide)]
    for flag in ("positions", "mask"):
        if getattr(given, flag) is not None and len(listed) > 1:
            raise ValueError(f"--{flag}: expected one slide, found {len(listed)}; name each slide's file in a table")
    by_name: dict[str, Request] = {}
    for request in listed:
        missing = {key: getattr(given, key) for key in COLUMNS[1:] if getattr(request, key) is None}
        request = replace(request, name=slide_name(request.slide), **missing)
        request = replace(request, out=out if len(listed) == 1 else out / request.name)
        _check_files(request)
        other = by_name.setdefault(request.name.lower(), request)  # some file systems do not tell a from A
        if other is not request:
            raise ValueError(
                f"{request.slide}: expected slides with names of their own, found {other.slide}, which would go to "
                f"{request.out} too; give them to two calls"
            )
    return list(by_name.values())


def _check_files(request: Request) -> None:
    if not request.slide.exists():
        raise ValueError(f"{request.slide}: expected an image or a slice folder, found nothing; fix: correct the path")
    for flag in ("positions", "mask"):
        path = getattr(request, flag)
        if path is not None and not path.is_file():
            raise ValueError(f"--{flag}: expected the file {path}, found none; fix: correct the path")
