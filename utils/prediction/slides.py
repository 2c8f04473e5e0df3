"""Which slides a prediction is asked for: one by one or in tables, a folder of results each; shards of them."""

from __future__ import annotations

import csv
import re
from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

COLUMNS = ("slide", "um_per_px", "positions", "mask", "spot_pitch_um")


@dataclass(frozen=True)
class Request:
    """One slide: a image or a slice folder, what is known of it, and the folder that its results go to."""

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
        raise ValueError(f"{where}: expected a positive number or nothing, found {text!r}; mend the table")
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
        raise ValueError(f"{path}: expected the column slide, and of {', '.join(COLUMNS[1:])} any, found {found}")
    requests = []
    for number, line in enumerate(lines, start=2):
        where = f"{path}, line {number}"
        if not any(line):
            continue
        if len(line) != len(header) or not line[header.index("slide")]:
            raise ValueError(f"{where}: expected {len(header)} cells and a slide, found {','.join(line)!r}")
        cells = dict.fromkeys(COLUMNS, "") | dict(zip(header, line, strict=True))
        files = {key: path.parent / cells[key] if cells[key] else None for key in ("positions", "mask")}
        numbers = {key: _number(cells[key], f"{where}, {key}") for key in ("um_per_px", "spot_pitch_um")}
        requests.append(Request(path.parent / cells["slide"], **files, **numbers))  # type: ignore[arg-type]
    if not requests:
        raise ValueError(f"{path}: expected a line per slide, found the header alone")
    return requests


def file_name(words: str) -> str:
    """The words with letters, digits, `_`, `-` and `.` only, so that they can name a file or a folder anywhere."""
    return re.sub(r"[^\w.-]+", "_", words, flags=re.ASCII).strip("._") or "unnamed"


def slide_name(slide: Path) -> str:
    """What a slide is called: its file without ending, or the slice folder (the one above outs/)."""
    path = slide.absolute()
    if not path.is_dir():
        return file_name(path.stem)
    return file_name(path.parent.name if path.name == "outs" else path.name)


def list_slides(slides: Sequence[Path], out: Path, given: Request) -> list[Request]:
    """Every slide of a call, those of tables (.csv) among them; a single one has `out` itself, several a folder each.

    Parameters
    ----------
    given : what the flags say; of a table the cells that are empty are filled with it
    """
    listed = [one for s in slides for one in (read_slide_table(s) if s.suffix.lower() == ".csv" else [Request(s)])]
    for flag in ("positions", "mask"):
        if getattr(given, flag) is not None and len(listed) > 1:
            raise ValueError(f"--{flag}: expected one slide, found {len(listed)}; name each slide's file in a table")
    known = [
        replace(
            one,
            um_per_px=one.um_per_px or given.um_per_px,
            positions=one.positions or given.positions,
            mask=one.mask or given.mask,
            spot_pitch_um=one.spot_pitch_um or given.spot_pitch_um,
            name=slide_name(one.slide),
        )
        for one in listed
    ]
    seen: dict[str, Path] = {}
    for one in known:
        _check_files(one)
        other = seen.get(one.name.lower())  # some file systems do not tell a from A
        if other is not None:
            raise ValueError(f"{other} and {one.slide} would both go to {out / one.name}; give them to two calls")
        seen[one.name.lower()] = one.slide
    return [replace(one, out=out if len(known) == 1 else out / one.name) for one in known]


def _check_files(one: Request) -> None:
    if not one.slide.exists():
        raise ValueError(f"{one.slide}: expected a image or a slice folder, found nothing; mend the path")
    for what in ("positions", "mask"):
        path = getattr(one, what)
        if path is not None and not path.is_file():
            raise ValueError(f"--{what}: expected the file {path}, found none; mend the path")


def shard_of(text: str | None, environment: Mapping[str, str]) -> tuple[int, int]:
    """(index from 0, number of shards): of --shard "I/N" (I from 1), else of Slurm's array times the processes."""
    if text is not None:
        found = re.fullmatch(r"(\d+)/(\d+)", text)
        index, number = (int(found[1]) - 1, int(found[2])) if found else (-1, 0)
        if not 0 <= index < number:
            raise ValueError(f"--shard: expected I/N with I from 1 to N, such as 1/4, found {text!r}")
        return index, number
    index, number = 0, 1
    if "SLURM_ARRAY_TASK_ID" in environment:
        first, step = (int(environment.get(f"SLURM_ARRAY_TASK_{k}", d)) for k, d in (("MIN", "0"), ("STEP", "1")))
        index = (int(environment["SLURM_ARRAY_TASK_ID"]) - first) // max(step, 1)
        number = int(environment.get("SLURM_ARRAY_TASK_COUNT", index + 1))
    rank, world = int(environment.get("RANK", "0")), int(environment.get("WORLD_SIZE", "1"))
    if not (0 <= index < number and 0 <= rank < world):
        found_here = f"task {index} of {number}, process {rank} of {world}"
        raise ValueError(
            f"Slurm's array or the launcher: expected a task and a process, found {found_here}; use --shard"
        )
    return index * world + rank, number * world


def work_alone(environment: MutableMapping[str, str]) -> None:
    """Take a launcher's variables away: processes that share slides out do not wait for each other, each on a GPU."""
    local = environment.pop("LOCAL_RANK", None)
    for name in ("RANK", "WORLD_SIZE"):
        environment.pop(name, None)
    if local is not None:
        given = [one for one in environment.get("CUDA_VISIBLE_DEVICES", "").split(",") if one]
        environment["CUDA_VISIBLE_DEVICES"] = given[int(local) % len(given)] if given else local
