"""slices.csv: which slice is whose, its part, its spot pitch and its image; the split and the leak guard.

The table has a header `slice,patient,part,spot_pitch_um,image`, of which only `slice` is needed. All slices of a
patient are in one part. Whatever is wrong is a ValueError of one line; what is only odd is a warning, returned.
"""

import csv
import io
import math
import re
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import astuple, dataclass, fields, replace
from pathlib import Path, PurePath

import numpy as np

from utils.files.atomic import write_whole
from utils.settings import PARTS
from utils.slices import content
from utils.slices.lattice import neighbour_tree
from utils.slices.visium import is_slice, why_no_slice
from utils.words import count_of


@dataclass(frozen=True)
class SliceRow:
    """A line of slices.csv.

    Attributes
    ----------
    slice : str, the slice's folder below the data folder; also the name of the slice
    patient : str
    part : str, train, val, test or "" (left out)
    spot_pitch_um : float or None, centre-to-centre distance between neighbouring spots
    image : str or None, the full-resolution image within the slice folder
    """

    slice: str
    patient: str
    part: str
    spot_pitch_um: float | None
    image: str | None


COLUMNS = tuple(field.name for field in fields(SliceRow))


def _inside(name: str, where: str) -> str:
    """A relative path that stays inside its folder, written one way; refused otherwise."""
    path = PurePath(name)
    if path.is_absolute() or ".." in path.parts or not path.parts:
        raise ValueError(f"{where}: expected a path inside the folder, found {name}; write it without '..' or a root")
    return path.as_posix()


def _own_patient(slice_name: str) -> str:
    """A slice is its own patient; the bin sizes of one Visium HD run are one tissue, hence one patient."""
    parts = list(PurePath(slice_name).parts)
    for folder in ("binned_outputs", "outs"):
        parts = parts[: parts.index(folder)] if folder in parts[1:] else parts
    return "/".join(parts)


def patient_key(patient: str) -> str:
    """What the spellings of a patient share: P01, p01; Patient 1, Patient_1; 1, 01, 1.0; é as one or two characters."""
    text = re.sub(r"(?<=\w)[\s_-]+(?=\w)", " ", unicodedata.normalize("NFKC", patient).casefold())
    number = re.fullmatch(r"0*(\d+)(\.0*)?", text)
    return number[1] if number else text


def _spelt_once(rows: list[SliceRow], table: Path) -> tuple[list[SliceRow], list[str]]:
    """The rows with each patient as it is spelt first, and a warning for those with several spellings."""
    spellings: dict[str, list[str]] = {}
    for row in rows:
        spellings.setdefault(patient_key(row.patient), []).append(row.patient)
    several = [" = ".join(dict.fromkeys(names)) for names in spellings.values() if len(set(names)) > 1]
    rows = [replace(row, patient=spellings[patient_key(row.patient)][0]) for row in rows]
    fix = "spell a patient in one way, or name different ones otherwise"
    return rows, [f"{table}: taken for one patient: {', '.join(several)}; {fix}"] if several else []


def _pitch_um(text: str, where: str) -> float | None:
    if not text:
        return None
    try:
        pitch_um = float(text)
    except ValueError:
        pitch_um = math.nan
    if not 0 < pitch_um < math.inf:
        raise ValueError(f"{where}: expected a positive number of um as spot_pitch_um, found {text}; correct it")
    return pitch_um


def _row(data: Path, cells: dict[str, str], where: str) -> SliceRow:
    if not cells.get("slice"):
        raise ValueError(f"{where}: expected the name of a slice folder, found none; fill in or remove the line")
    name, part = _inside(cells["slice"], where), cells.get("part", "")
    if not is_slice(data / name):
        raise ValueError(f"{where}: {data / name}: {_no_slice(data / name)}; correct the slice column")
    if part not in ("", *PARTS):
        raise ValueError(f"{where}: expected train, val, test or nothing as part, found {part}; correct it")
    image = _inside(cells["image"], where) if cells.get("image") else None
    patient = cells.get("patient") or _own_patient(name)
    return SliceRow(name, patient, part, _pitch_um(cells.get("spot_pitch_um", ""), where), image)


def _no_slice(folder: Path) -> str:
    if not folder.is_dir():
        return "expected a slice folder, found no such folder"
    return why_no_slice(folder) or "expected a slice folder, found one without spatial/"


def table_lines(table: Path) -> list[tuple[int, list[str]]]:
    """The lines of a csv file that are not blank, with their numbers, cells stripped."""
    if not table.is_file():
        raise ValueError(f"{table}: expected a table of slices, found no such file; give it with --slices")
    try:
        reader = csv.reader(io.StringIO(table.read_bytes().decode("utf-8-sig"), newline=""))
        lines = [(reader.line_num, [cell.strip() for cell in line]) for line in reader]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{table}: expected comma-separated text in UTF-8, found: {error}; save it as such") from error
    return [(number, cells) for number, cells in lines if any(cells)]


def _read_cells(table: Path) -> tuple[list[str], list[tuple[str, dict[str, str]]]]:
    """The header of a table of slices, and where each line stands with its cells."""
    lines = table_lines(table)
    header = lines[0][1] if lines else []
    if "slice" not in header or any(header.count(name) > 1 for name in COLUMNS):
        found = ",".join(header) or "an empty file"
        raise ValueError(f"{table}: expected the header {','.join(COLUMNS)}, at least slice, found {found}; correct it")
    rows = []
    for number, cells in lines[1:]:
        where = f"{table}, line {number}"
        if len(cells) > len(header):
            raise ValueError(f"{where}: expected {len(header)} cells, found {len(cells)}; quote cells that hold commas")
        rows.append((where, dict(zip(header, cells, strict=False))))
    return header, rows


def _listed(data: Path, table: Path) -> tuple[list[SliceRow], list[str]]:
    """The rows of a table of slices, and warnings for columns that nothing reads and patients of several spellings."""
    header, lines = _read_cells(table)
    rows: dict[str, SliceRow] = {}
    for where, cells in lines:
        row = _row(data, cells, where)
        if row.slice in rows:
            raise ValueError(f"{where}: expected each slice once, found {row.slice} again; remove one of the lines")
        rows[row.slice] = row
    if not rows:
        raise ValueError(f"{table}: expected a line per slice, found only the header; add the slices")
    unread = [name for name in header if name and name not in COLUMNS]
    warnings = [f"{table}: columns not used: {', '.join(unread)}"] if unread else []
    spelt, several = _spelt_once(list(rows.values()), table)
    return spelt, warnings + several


def row_of(folder: Path) -> SliceRow | None:
    """Image and pitch of a slice folder, or of the one that an outs/ is in, by its line of the slices.csv beside it;
    None without one, or where that is no table of slices."""
    folder = folder.absolute()
    folder = folder.parent if folder.name == "outs" else folder
    table, names = folder.parent / "slices.csv", (folder.name, f"{folder.name}/outs")
    try:
        lines = _read_cells(table)[1] if table.exists() else []
    except ValueError:
        return None
    found = [(where, cells) for where, cells in lines if PurePath(cells["slice"]).as_posix() in names]
    if len(found) != 1:
        return None
    (where, cells) = found[0]
    image = _inside(cells["image"], where) if cells.get("image") else None
    return SliceRow(folder.name, "", "", _pitch_um(cells.get("spot_pitch_um", ""), where), image)


def _found(data: Path) -> tuple[list[SliceRow], list[str]]:
    """Every slice folder below data, by name, each its own patient, and a warning for the other folders."""
    names = sorted(path.name for path in data.iterdir() if path.is_dir() and not path.name.startswith("."))
    rows = [SliceRow(name, name, "", None, None) for name in names if is_slice(data / name)]
    others = [name for name in names if not is_slice(data / name)]
    reasons = [f"{data / name}: {reason}" for name in others if (reason := why_no_slice(data / name))]
    if not rows:
        itself = is_slice(data)
        if not itself and (whole := why_no_slice(data)):
            reasons.append(f"{data}: {whole}")
        if not itself and reasons:
            raise ValueError(reasons[0])
        found = (
            "a slice folder itself" if itself else f"{count_of(len(names), 'folder')} without" if names else "no folder"
        )
        hint = "give the folder above it" if itself else "give the folder that holds them with --data"
        raise ValueError(f"{data}: expected slice folders (each with spatial/), found {found}; {hint}")
    unread = [f"{data}: folders without spatial/, not used: {', '.join(others)}"] if others else []
    return rows, unread + reasons


def read_table(
    data: str | Path,
    table: str | Path | None = None,
    *,
    split: bool = True,
    val_strip: bool = False,
    allow_leak: bool = False,
) -> tuple[list[SliceRow], list[str]]:
    """Find the slices to use, in the order of the table, or by name where there is none.

    Parameters
    ----------
    data : folder of slice folders
    table : csv file; default data/slices.csv where it exists, else every slice folder is used
    split : give every slice a part (default_split where the table has none), leave out slices without, and check that
        no patient is in test and elsewhere; without it the parts stay as they are, for preprocessing
    val_strip : validation is a strip of each train slice, so that no slice is held out for it
    allow_leak : warn where a patient is in test and elsewhere, instead of stopping

    Returns
    -------
    rows, and warnings to print
    """
    data = Path(data)
    if not data.is_dir():
        found = "a file" if data.exists() else "nothing"
        raise ValueError(f"{data}: expected a folder of slices, found {found}; give it with --data")
    if table is None and (data / "slices.csv").exists():
        table = data / "slices.csv"
    rows, warnings = _found(data) if table is None else _listed(data, Path(table))
    if not split:
        return rows, warnings
    rows = default_split(rows, val_strip)
    left_out = [row.slice for row in rows if not row.part]
    if left_out:
        warnings.append(f"left out, without a part: {', '.join(left_out)}")
    rows = of_part(rows, *PARTS)
    return rows, warnings + check_patients(rows, allow_leak)


def default_split(rows: Sequence[SliceRow], val_strip: bool = False) -> list[SliceRow]:
    """Hold out the last patients by name where no row has a part; other tables stay as they are.

    A fifth of the patients, at least one, is test, and before them a tenth, at least one, validation. With val_strip no
    patient is held out for validation, and a single patient is train alone.
    """
    patients = sorted({row.patient for row in rows})
    if any(row.part for row in rows):
        return list(rows)
    if len(patients) < 3 and not val_strip:
        found = f"{len(patients)} ({', '.join(patients)})"
        raise ValueError(
            f"expected three patients or more to split, found {found}; give parts in slices.csv or --val_strip"
        )
    n_test = max(1, len(patients) // 5) if len(patients) > 1 else 0
    n_val = 0 if val_strip else max(1, len(patients) // 10)
    n_train = len(patients) - n_test - n_val
    part = dict(zip(patients, ["train"] * n_train + ["val"] * n_val + ["test"] * n_test, strict=True))
    return [replace(row, part=part[row.patient]) for row in rows]


def _leak(message: str, allow_leak: bool) -> str:
    if not allow_leak:
        raise ValueError(
            f"expected test slices that share nothing with the others, found {message}; correct the parts in "
            "slices.csv, or use --allow_leak and report the leak"
        )
    return message


def parts_of_patients(rows: Iterable[SliceRow]) -> dict[str, set[str]]:
    """The parts that each patient has slices in."""
    parts: dict[str, set[str]] = {}
    for row in of_part(rows, *PARTS):
        parts.setdefault(row.patient, set()).add(row.part)
    return parts


def tested_elsewhere(rows: Iterable[SliceRow]) -> list[str]:
    """Patients in test and in another part, with their parts."""
    parts = parts_of_patients(rows).items()
    return [f"{patient} ({', '.join(sorted(of))})" for patient, of in parts if "test" in of and len(of) > 1]


def check_patients(rows: Iterable[SliceRow], allow_leak: bool = False) -> list[str]:
    """Stop, or warn, where a patient is in test and in another part; warn where one is in train and val."""
    parts = parts_of_patients(rows)
    tested = tested_elsewhere(rows)
    shared = [patient for patient, of in parts.items() if {"train", "val"} <= of]
    warnings = [_leak(f"patients in test and in another part: {', '.join(tested)}", allow_leak)] if tested else []
    return warnings + ([f"patients in train and in val: {', '.join(shared)}"] if shared else [])


def check_identical(
    rows: Iterable[SliceRow],
    hashes: dict[str, str],
    allow_leak: bool = False,
    totals: dict[str, tuple[np.ndarray, np.ndarray]] | None = None,
) -> list[str]:
    """Stop, or warn, where slices of two parts have the same counts, or are copies that lack some spots or genes.

    Parameters
    ----------
    rows : slices; those without a part or a hash are not compared
    hashes : `content.counts_hash` by slice
    allow_leak : warn instead of stopping
    totals : barcodes (S,) and total counts (S,) of spots by slice, for `content.copies`; without them it is left out
    """
    rows = [row for row in of_part(rows, *PARTS) if row.slice in hashes]
    groups: dict[str, list[SliceRow]] = {}
    for row in rows:
        groups.setdefault(hashes[row.slice], []).append(row)
    same = [group for group in groups.values() if len({row.part for row in group}) > 1]
    pairs = content.copies([totals[row.slice] for row in rows], [row.part for row in rows]) if totals and rows else []
    copies = [[rows[i], rows[j]] for i, j in pairs if hashes[rows[i].slice] != hashes[rows[j].slice]]
    found = {"slices with identical counts in two parts": same, "slices with the same spots in two parts": copies}
    return [_leak(f"{what}: {_names_of(leaks)}", allow_leak) for what, leaks in found.items() if leaks]


def _names_of(groups: list[list[SliceRow]]) -> str:
    return "; ".join(", ".join(f"{row.slice} ({row.part})" for row in group) for group in groups)


def of_part(rows: Iterable[SliceRow], *parts: str) -> list[SliceRow]:
    """The rows of the given parts, in order."""
    return [row for row in rows if row.part in parts]


def chosen(rows: Sequence[SliceRow], part: str) -> list[SliceRow]:
    """The rows that belong to --part. Raises ValueError where there are none."""
    matching = [row for row in rows if part == "all" or row.part == part]
    if not matching:
        there = ", ".join(dict.fromkeys(row.part for row in rows if row.part)) or "none"
        raise ValueError(
            f"expected a slice of part {part}, found slices of part {there}; correct slices.csv, or give another --part"
        )
    return matching


def slice_folder(data: str | Path, row: SliceRow) -> Path:
    """The folder of a slice."""
    return Path(data) / row.slice


def _cells(row: SliceRow) -> list[str]:
    return ["" if cell is None else f"{cell:.12g}" if isinstance(cell, float) else str(cell) for cell in astuple(row)]


def format_table(rows: Iterable[SliceRow]) -> str:
    """The table as text, columns aligned, `-` where there is nothing."""
    lines = [list(COLUMNS), *([cell or "-" for cell in _cells(row)] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in lines)


def table_bytes(rows: Iterable[SliceRow]) -> bytes:
    """slices.csv as `write_table` writes it."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([COLUMNS, *map(_cells, rows)])
    return text.getvalue().encode()


def write_table(rows: Iterable[SliceRow], path: str | Path) -> None:
    """Write slices.csv; an interrupted write leaves the old file whole."""
    write_whole(Path(path), table_bytes(rows))


def strip_parts(xy_px: np.ndarray, pitch_px: float) -> np.ndarray:
    """Cut a slice into train, a contiguous quarter of its spots as validation, and a gap between the two.

    Parameters
    ----------
    xy_px : ndarray (S, 2), centres of the spots, in any scale
    pitch_px : distance between neighbouring spots, in the same scale

    Returns
    -------
    ndarray (S,) of "train", "val" (the far end of the longer axis), "gap" (nearer than two pitches to a val spot)
    """
    xy_px = np.asarray(xy_px, dtype=float)
    axis = int(np.ptp(xy_px[:, 1]) > np.ptp(xy_px[:, 0]))
    order = np.lexsort((xy_px[:, 1 - axis], xy_px[:, axis]))  # a column that the cut divides is divided in order
    n_val = max(1, len(xy_px) // 4)
    parts = np.full(len(xy_px), "train", dtype="<U5")
    parts[order[-n_val:]] = "val"
    rest = order[:-n_val]
    distance_px, _ = neighbour_tree(xy_px[order[-n_val:]]).query(xy_px[rest]) if len(rest) else (np.zeros(0), None)
    parts[rest[distance_px < 2 * pitch_px]] = "gap"
    return parts
