"""Legacy Spatial Transcriptomics: a table of counts (spots x genes), a spot file and an image for each section.

Two forms of folder: that of her2st (Andersson et al. 2021: ST-cnts/, ST-spotfiles/, ST-imgs/, any number of sections)
and a plain one with one table of counts, one spot file and one image.

Shapes: S spots, G genes.
"""

from __future__ import annotations

import gzip
import math
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from scipy.sparse import csr_matrix

from utils.images.image import images_in
from utils.importers.images import only_image
from utils.importers.source import Source, found_in, place_spots
from utils.slices.lattice import Lattice
from utils.slices.matrix import check_once, reading, whole_counts

PITCH_UM, SPOT_UM = 200.0, 100.0
# The denser array lays a second lattice of 200 um between the spots of the first: a place measures 100 um. A pitch is
# measured on a staggered array as if it were hexagonal; this is that of a hexagonal array with as many spots per area.
STAGGERED_PLACE_UM = PITCH_UM / 2
STAGGERED_PITCH_UM = STAGGERED_PLACE_UM * math.sqrt(4 / math.sqrt(3))
NEEDED = ["x", "y", "pixel_x", "pixel_y"]
TABLES = (".tsv", ".tsv.gz")
SPOT_NAME = re.compile(r"\d+x\d+")


@dataclass(frozen=True)
class Section:
    """The three files of one section."""

    name: str
    counts: Path
    spots: Path
    image: Path


def _stem(path: Path) -> str:
    return path.name.removesuffix(".gz").removesuffix(".tsv")


def _tables(folder: Path) -> list[Path]:
    files = sorted(folder.iterdir()) if folder.is_dir() else []
    return [path for path in files if path.is_file() and path.name.endswith(TABLES) and path.name[0] != "."]


def _first_line(path: Path) -> list[str]:
    """The cells of a table's header, without quotes."""
    with (
        reading(path, "a table of text separated by tabs"),
        (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8-sig") as file,
    ):
        return [cell.strip().strip('"') for cell in file.readline().rstrip("\r\n").split("\t")]


def _is_spot_file(path: Path) -> bool:
    return {"x", "y", "pixel_x", "pixel_y"} <= set(_first_line(path))


def find_sections(source: Path, image: Path | None) -> list[Section]:
    """All sections of a source, each with its three files; nothing but headers is read."""
    if not source.exists():
        raise ValueError(
            f"{source}: expected a folder or a table of counts of legacy ST, found nothing; correct SOURCE"
        )
    counts = [source] if source.is_file() else _tables(source / "ST-cnts")
    folder = source.absolute().parent if source.is_file() else source.absolute()
    if folder.name == "ST-cnts":
        folder = folder.parent
    if not (folder / "ST-cnts").is_dir():
        return [_plain_section(folder, source if source.is_file() else None, image)]
    if not counts:
        raise ValueError(
            f"{folder / 'ST-cnts'}: expected tables of counts (*.tsv, *.tsv.gz), found none; put them there"
        )
    if image is not None and len(counts) > 1:
        names = ", ".join(map(_stem, counts))
        raise ValueError(f"--image: expected one section, found {names}; give one table of counts as SOURCE")
    return [_her2st_section(folder, path, image) for path in counts]


def _her2st_section(folder: Path, counts: Path, image: Path | None) -> Section:
    name = _stem(counts)
    wanted = [folder / "ST-spotfiles" / f"{name}{end}" for end in ("_selection.tsv", "_selection.tsv.gz", *TABLES)]
    spots = next((path for path in wanted if path.is_file()), None)
    if spots is None:
        raise ValueError(f"{counts}: expected the spot file {wanted[0]}, found no such file; add it")
    folders = [path for path in (folder / "ST-imgs").rglob("*") if path.is_dir()]
    images = [path for place in (folder / "ST-imgs", *folders) for path in images_in(place)]
    named = [path for path in images if name in (path.parent.name, path.stem)]
    return Section(name, counts, spots, only_image(folder / "ST-imgs", named, image, name))


def _plain_section(folder: Path, counts: Path | None, image: Path | None) -> Section:
    """One table of counts, one spot file and one image in a folder; the section has the name of the folder."""
    tables = _tables(folder)
    spots = [path for path in tables if _is_spot_file(path)]
    others = [path for path in tables if path not in spots]
    chosen = [path for path in others if counts is None or path.name == counts.name]
    if len(spots) != 1 or len(chosen) != 1:
        wanted = "one table of counts and one spot file (columns x, y, pixel_x, pixel_y), or ST-cnts/ and ST-spotfiles/"
        raise ValueError(f"{folder}: expected {wanted}, found {found_in(folder)}; give the counts of one section")
    name = folder.name if len(others) == 1 else _stem(chosen[0])
    return Section(name, chosen[0], spots[0], only_image(folder, images_in(folder), image, name))


def read_counts(path: Path) -> tuple[np.ndarray, np.ndarray, csr_matrix]:
    """Names of the spots (S,), `<x>x<y>`, genes (G,) and counts (S, G) of a table with the spots in rows or columns."""
    header = _first_line(path)  # read by itself: pandas would rename a gene that stands there twice
    with reading(path, "a table of counts separated by tabs"):
        table = pd.read_csv(path, sep="\t", header=None, skiprows=1, dtype={0: str}, keep_default_na=False)
    n_columns = table.shape[1] - 1
    across = header[-n_columns:]
    # R leaves out the name of the first column
    if len(header) not in (n_columns, n_columns + 1) or n_columns < 1 or "" in across:
        found = f"{len(header)} cells above {table.shape[1]}"
        raise ValueError(f"{path}: expected a header of genes above spots with their counts, found {found}; fix it")
    names, genes = table[0].to_numpy(dtype=object), np.array(across, dtype=str)
    values = table.iloc[:, 1:].to_numpy()
    _check_numbers(path, names, across, values)
    counts = csr_matrix(whole_counts(path, values))
    if _are_spots(across) and not _are_spots(names):
        names, genes, counts = np.array(across, dtype=object), names.astype(str), csr_matrix(counts.T)
    check_once(path, names)
    return names, genes, counts


def _check_numbers(path: Path, names: np.ndarray, across: list[str], values: np.ndarray) -> None:
    """Raises ValueError for the first of the cells (rows `names`, columns `across`) that is empty or another text."""
    if values.dtype.kind == "O":
        bad = np.argwhere(pd.DataFrame(values).apply(pd.to_numeric, errors="coerce").isna().to_numpy())
        for row, column in bad[:1]:
            found = f"{values[row, column] or 'an empty cell'} in the row {names[row]}, column {across[column]}"
            raise ValueError(f"{path}: expected raw counts (0, 1, 2, ...), found {found}; correct the cell")


def _are_spots(names: Iterable[str]) -> bool:
    return all(SPOT_NAME.fullmatch(str(name)) for name in names)


def read_spots(path: Path) -> pd.DataFrame:
    """All places of a spot file, index `<x>x<y>`: x, y, pixel_x, pixel_y, selected (bool), new_x and new_y if there."""
    with reading(path, "a spot file separated by tabs"):
        spots = pd.read_csv(path, sep="\t")
    missing = [name for name in NEEDED if name not in spots]
    if missing:
        raise ValueError(
            f"{path}: expected the columns {', '.join(NEEDED)}, found {', '.join(map(str, spots.columns))}; "
            "name them so"
        )
    used = [*NEEDED, *(name for name in ("new_x", "new_y", "selected") if name in spots)]
    numbers = spots[used].apply(pd.to_numeric, errors="coerce")
    bad = ~np.isfinite(numbers).all(axis=1) | (numbers[["x", "y"]] != numbers[["x", "y"]].round()).any(axis=1)
    bad |= ~numbers["selected"].isin((0, 1)) if "selected" in numbers else False
    if bad.any():
        found = ", ".join(str(value) for value in spots.loc[bad, used].iloc[0])
        raise ValueError(f"{path}: expected whole x, y, finite pixels and selected 0 or 1, found {found}; fix the line")
    spots = numbers.astype({"x": int, "y": int})
    spots["selected"] = spots["selected"] == 1 if "selected" in spots else True
    names = (spots["x"].astype(str) + "x" + spots["y"].astype(str)).to_numpy(dtype=object)
    check_once(path, names)
    return spots.set_index(names)


def place_px(spots: pd.DataFrame) -> float:
    """Pixels per array place: mean of the least-squares slopes of the pixels over the measured places of both axes."""
    slopes = []
    for axis in "xy":
        places = spots[f"new_{axis}" if f"new_{axis}" in spots else axis]
        slopes.append(max(abs(np.polyfit(places, spots[px], 1)[0]) for px in ("pixel_x", "pixel_y")))
    return float(np.mean(slopes))


def _match(section: Section, names: np.ndarray, all_spots: pd.DataFrame) -> tuple[np.ndarray, dict[str, int]]:
    """Rows of the counts (S,) that are of selected spots, and how many rows and spots are left out."""
    selected = all_spots.index[all_spots["selected"]]
    known = np.isin(names, all_spots.index)
    kept = np.isin(names, selected)
    turned = ["x".join(str(name).split("x")[::-1]) for name in names]
    if np.isin(turned, selected).sum() > kept.sum():
        found = f"{kept.sum()} of {len(names)}, and {np.isin(turned, selected).sum()} as `<y>x<x>`"
        raise ValueError(
            f"{section.counts}: expected rows `<x>x<y>` of the spots in {section.spots.name}, found {found}; "
            "rename the rows"
        )
    if not kept.any():
        found = f"{known.sum()} of {len(names)} rows of counts in {section.spots.name}, {len(selected)} spots selected"
        raise ValueError(f"{section.counts}: expected rows `<x>x<y>` of selected spots, found {found}; do they belong?")
    left_out = {
        "not selected": int(known.sum() - kept.sum()),
        "without a row in the spot file": int((~known).sum()),
        "selected without counts": int(len(selected) - kept.sum()),
    }
    return np.flatnonzero(kept), left_out


def _check_places(section: Section, lattice: Lattice, array: np.ndarray) -> None:
    """Raises ValueError where x and y do not fit the pixels: without places the pitch of a legacy array is unknown."""
    steps = np.gcd.reduce(array - array[0])
    if lattice.measured and steps.min() <= 1:  # else every second place is used, which is as good
        found = "places that the pixels do not follow"
        raise ValueError(
            f"{section.spots}: expected pixel_x and pixel_y of the places x and y, found {found}; is it another's file?"
        )


def read_section(section: Section, pitch_um: float | None = None) -> Source:
    """Spots that are selected and counted, in the order of the table of counts, as `<x>x<y>-1`."""
    names, genes, counts = read_counts(section.counts)
    all_spots = read_spots(section.spots)
    kept, left_out = _match(section, names, all_spots)
    of_section = all_spots.loc[names[kept]]
    array = of_section[["y", "x"]].to_numpy()
    xy_px = of_section[["pixel_x", "pixel_y"]].round().to_numpy()
    spots, lattice, notes = place_spots(str(section.spots), of_section.index + "-1", xy_px, array)
    _check_places(section, lattice, array)
    usual_um, place_um = (STAGGERED_PITCH_UM, STAGGERED_PLACE_UM) if lattice.staggered else (PITCH_UM, PITCH_UM)
    if lattice.staggered and pitch_um is None:
        pitch = f"spot_pitch_um {STAGGERED_PITCH_UM:.2f}"
        notes.append(f"staggered array, {pitch}: that of a hexagonal one with as many spots per area")
    of_place_px = lattice.pitch_px * place_um / usual_um if lattice.measured else place_px(all_spots)
    pitch_um = usual_um if pitch_um is None else pitch_um
    return Source(
        name=section.name,
        patient=section.name[0] if re.fullmatch(r"[A-Za-z]\d+", section.name) else section.name,
        origin=section.counts,
        counts=counts[kept],
        genes=genes,
        gene_ids=genes,
        spots=spots,
        lattice=lattice,
        pitch_um=pitch_um,
        spot_diameter_px=of_place_px * SPOT_UM / (place_um * pitch_um / usual_um),
        image=section.image,
        left_out=left_out,
        notes=notes,
    )


def read_legacy_st(source: Path, image: Path | None = None, pitch_um: float | None = None) -> Iterator[Source]:
    """The sections of a folder, or the one of a table of counts, one after the other; all their files are found first.

    Parameters
    ----------
    source : folder of the her2st form, folder with one section, or the table of counts of one section
    image : the H&E of the only section, where it does not lie with the tables
    pitch_um : distance between neighbouring spots; default 200, on the denser staggered array what its area tells
    """
    for section in find_sections(source, image):
        yield read_section(section, pitch_um)
