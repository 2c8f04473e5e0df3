"""Files that name genes: lists, vocabularies and gene2vec tables, as editors, R, pandas and spreadsheets write them.

Letters: V genes of a vocabulary, W numbers of a gene2vec row.
"""

from __future__ import annotations

import csv
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from utils.genes.names import SUFFIX, ensembl_id
from utils.words import count_of, cut

HEADINGS = (  # of the column of genes, in order of preference
    *("symbol", "symbols", "gene_symbol", "gene_symbols", "genesymbol", "hgnc_symbol", "mgi_symbol", "official_symbol"),
    *("external_gene_name", "gene_short_name", "gene_name", "gene_names", "genename", "gene", "genes", "target_gene"),
    *("feature_name", "feature", "features", "name", "names", "gene_id", "gene_ids", "geneid", "ensembl_gene_id"),
    *("ensembl_id", "ensembl"),
)
LONE_HEADINGS = ("x", "v1", "0", "gene_list", "genelist")  # of a table's only column, which R and pandas call so
FOREIGN = {b"PK\x03\x04": "a workbook or archive", b"\xd0\xcf\x11\xe0": "a workbook", b"\x1f\x8b": "a packed file"}
TYPOGRAPHY: dict[int, str | None] = dict.fromkeys(map(ord, "\u2010\u2011\u2012\u2013\u2014\u2212"), "-")
TYPOGRAPHY |= dict.fromkeys(map(ord, "\u2018\u2019\u201c\u201d"), '"')
TYPOGRAPHY |= dict.fromkeys(map(ord, "\u00a0\u2007\u2009\u202f"), " ") | dict.fromkeys(map(ord, "\u200b\u2060\ufeff"))
ASSIGNED = re.compile(r"(?:[\w.]+\s*(?:=|<-)\s*)?(?:c\(|\[|\(|\{)(.*)[\])}]\s*;?", re.DOTALL)  # ["A", "B"], x <- c("A")
WORD = re.compile(r'"[^"]*"|\'[^\']*\'|\S+')
NAME = re.compile(r'"[^"]*"|\'[^\']*\'|[^\s,;]+')
NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)(e[-+]?\d+)?|na|nan|inf|-inf", re.IGNORECASE)
LIKE_A_SYMBOL = re.compile(r"(?!chr)[A-Za-z][\w.\-@/():]*")
NAMED = (".txt", ".tsv")  # gene2vec files whose lines begin with the gene


# ---- lists and vocabularies


def read_gene_list(path: Path) -> list[str]:
    """Gene names of a text file, in its order.

    One on a line; all on one line, between commas, semicolons, tabs or spaces; or a column of a table: the one that
    has one of HEADINGS, else the first that does not number the rows. Names may be quoted; a line that begins with #,
    and what follows " #", is a comment. The text is UTF-8, UTF-16 with a byte order mark, or Latin-1 in comments.

    Raises ValueError where the file is not text, has no gene or a gene twice, or has several names on each line without
    a heading.
    """
    if not path.is_file():
        raise ValueError(f"{path}: expected a text file with one gene per line, found no such file; correct the path")
    lines = _lines(_text(path))
    try:
        genes = _names_of_line(lines[0]) if len(lines) == 1 else _names_of_table(lines)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    if not genes:
        raise ValueError(f"{path}: expected one gene per line, found none; fill the list")
    if odd := next((gene for gene in genes if not gene.isascii()), None):
        raise ValueError(f"{path}: expected gene names in ASCII letters, found {odd[:40]}; save the list as UTF-8 text")
    return _each_once(path, genes)


def _text(path: Path) -> str:
    content = path.read_bytes()
    found = next((what for start, what in FOREIGN.items() if content.startswith(start)), "")
    utf_16 = content[:2] in (b"\xff\xfe", b"\xfe\xff")
    try:
        text = content.decode("utf-16" if utf_16 else "utf-8-sig")
    except UnicodeDecodeError:
        text = content.decode("latin-1")
    if found or any(ord(character) < 32 and character not in "\t\n\r\v\f" for character in text):
        raise ValueError(
            f"{path}: expected UTF-8 text with one gene per line, found {found or 'other bytes'}; save it as text"
        )
    return text.translate(TYPOGRAPHY)


def _lines(text: str) -> list[str]:
    """Lines that are not empty, without comments; a list in brackets is one line."""
    lines = [line.strip(" ") for line in text.splitlines()]
    lines = [line if '"' in line else re.split(r"\s#", line)[0] for line in lines if not line.startswith("#")]
    lines = [line for line in lines if line.strip()]
    bracketed = ASSIGNED.fullmatch("\n".join(lines).strip())
    return [bracketed[1].replace("\n", " ")] if bracketed else lines


def _names_of_line(line: str) -> list[str]:
    bare = _bare(line)
    one_cell = not set(bare) & set("\"'")  # "A, B, C", as a spreadsheet saves them
    names = [name for name in map(_bare, NAME.findall(bare if one_cell else line)) if name]
    return names[1:] if names and _heading_name(names[0]) in HEADINGS else names


def _bare(cell: str) -> str:
    """The cell without quotes around it, or the `="..."` that protects text in a spreadsheet."""
    cell = cell.strip()
    cell = cell[1:] if cell.startswith('="') else cell
    return cell[1:-1].strip() if len(cell) > 1 and cell[0] == cell[-1] and cell[0] in "\"'" else cell


def _heading_name(cell: str) -> str:
    return re.sub(r"[\s.-]+", "_", cell.strip().lower().rstrip(":"))


def _names_of_table(lines: list[str]) -> list[str]:
    """Names of the lines' column of genes, or of wrapped lines of names."""
    counts = {mark: sum(mark in line for line in lines) for mark in "\t;,"}
    mark = max(counts, key=lambda mark: counts[mark]) if any(counts.values()) else None
    rows = [row for line in lines if (row := _cells(line, mark))]
    if not rows:
        return []
    while all(not row[0] for row in rows):
        rows = [row[1:] for row in rows]
    if mark is None and len(rows[0]) > 1 and _heading_name(lines[0]) in HEADINGS:
        rows[0] = [lines[0]]
    if all(len(row) == 1 for row in rows):
        names = [row[0] for row in rows]
        return names[1:] if _heading_name(names[0]) in (*HEADINGS, *LONE_HEADINGS) else names
    if len(rows) == 2 and len(rows[0]) == 1 and _heading_name(rows[0][0]) in HEADINGS:
        return _names_of_line(lines[-1])
    heading, body = _split_heading(rows)
    if heading is None and _are_all_symbols(rows):
        if all(line.rstrip().endswith((",", ";")) for line in lines[:-1]):
            return [name for row in rows for name in row if name]
        raise ValueError(
            f"expected one gene per line, found lines of several names ({', '.join(rows[0][:2])}, ...) without a "
            "heading; put one on a line, or head the column of genes with gene"
        )
    column = _gene_column(heading, body)
    lacking = next((row for row in body if len(row) <= column or not row[column]), None)
    if lacking is not None:
        raise ValueError(f"expected a gene in each line, found none in {' '.join(lacking)[:60]}; remove the line")
    return [row[column] for row in body]


def _cells(line: str, mark: str | None) -> list[str]:
    """Cells of a line, without empty ones at its end."""
    try:
        found = next(csv.reader([line], delimiter=mark, skipinitialspace=True)) if mark else WORD.findall(line)
    except csv.Error as error:
        raise ValueError(f"expected one gene per line, found a line that is none ({error}); save it as text") from error
    cells = [_bare(cell) for cell in found]
    while cells and not cells[-1]:
        cells.pop()
    return cells


def _count_up(values: Sequence[str], firsts: tuple[str, ...] = ("0", "1")) -> bool:
    """Whether these are row numbers."""
    return values[0] in firsts and all(value == str(int(values[0]) + i) for i, value in enumerate(values))


def _split_heading(rows: list[list[str]]) -> tuple[list[str] | None, list[list[str]]]:
    """A table's heading, None without one, and its other rows. R leaves out the heading of row names."""
    first, body = rows[0], rows[1:]
    width, names = max(map(len, body)), [row[0] for row in body]
    if _count_up([row[0] for row in rows]):
        return None, rows
    numbered, shifted = _count_up(names), ["", *first]
    named = any(_heading_name(cell) in HEADINGS for cell in first)
    of_row_names = numbered or all(map(ensembl_id, names)) or (not named and _above_numbers(shifted, body))
    if len(first) == width - 1 and of_row_names:
        return shifted, body
    is_heading = named or not first[0] or numbered or _above_numbers(first, body)
    return (first, body) if is_heading else (None, rows)


def _above_numbers(heading: list[str], body: list[list[str]]) -> bool:
    """Whether this row has a word above a column of numbers."""
    columns = ([row[i] for row in body if len(row) > i] for i in range(1, len(heading)))
    return any(
        cells and all(map(NUMBER.fullmatch, cells)) and not NUMBER.fullmatch(word)
        for word, cells in zip(heading[1:], columns, strict=True)
    )


def _are_all_symbols(rows: list[list[str]]) -> bool:
    """Whether every cell may be a gene: such a table cannot be told from lines of several genes."""
    cells = [cell for row in rows for cell in row if cell]
    return len(set(cells)) == len(cells) and all(LIKE_A_SYMBOL.fullmatch(c) and not ensembl_id(c) for c in cells)


def _gene_column(heading: list[str] | None, body: list[list[str]]) -> int:
    names = [_heading_name(cell) for cell in heading or []]
    heading_name = next((wanted for wanted in HEADINGS if wanted in names), None)
    if heading_name is not None:
        return names.index(heading_name)
    if not _count_up([row[0] for row in body]):
        return 0
    if all(len(row) > 1 and NUMBER.fullmatch(row[1]) for row in body):
        raise ValueError("expected a column of genes, found numbers; head the column with gene")
    return 1


def _each_once(path: Path, genes: list[str]) -> list[str]:
    twice = [gene for gene, n in Counter(ensembl_id(gene) or gene for gene in genes).items() if n > 1]
    if twice:
        raise ValueError(
            f"{path}: expected each gene once, found {count_of(len(twice), 'gene')} twice (first: {min(twice)}); keep "
            "one of each"
        )
    return genes


def read_vocabulary(path: Path) -> list[str]:
    """Genes in the order of gene2vec's rows: the var_names of an h5ad, or the names of a text file."""
    if path.suffix.lower() != ".h5ad":
        return read_gene_list(path)
    import anndata

    try:
        names = [str(gene) for gene in anndata.read_h5ad(path, backed="r").var_names]
    except (OSError, KeyError) as error:
        raise ValueError(
            f"{path}: expected an h5ad file with genes in var, found {error}; give another file"
        ) from error
    if not names:
        raise ValueError(f"{path}: expected an h5ad file with genes in var, found none; give another file")
    return _each_once(path, names)


# ---- names that no slice has


def hint(unknown: Sequence[str], names: Iterable[str]) -> str:
    """Which of the slices' gene `names` an `unknown` one may mean, "" where none is alike."""
    there = {name.upper(): name for name in names}
    for name in unknown:
        suffixed = SUFFIX.fullmatch(name)
        for candidate in (name, suffixed[1] if suffixed else name):
            if meant := there.get(candidate.upper()):
                return f"{name}: did you mean {meant}?"
    return ""


# ---- gene2vec


def read_gene2vec(path: Path) -> tuple[list[str] | None, np.ndarray]:
    """A row per gene (V, W): of an .npy file, which does not name them, or of .txt lines `gene v1 v2 ...`, which do.

    The text is that of the release by Du et al. 2019 (doi 10.1186/s12864-018-5370-x), with or without word2vec's first
    line of two sizes. Raises ValueError where the file is corrupt or holds anything but finite numbers.
    """
    try:
        names, table = _read_text(path) if path.suffix in NAMED else (None, np.load(path))
    except (OSError, EOFError, ValueError) as error:
        raise ValueError(
            f"--gene2vec: {path}: expected an .npy table, or .txt lines `gene v1 v2 ...`, found {cut(error)}; fetch "
            "the file again"
        ) from error
    if not isinstance(table, np.ndarray) or table.ndim != 2 or table.dtype.kind != "f":
        found = f"{table.dtype} of shape {table.shape}" if isinstance(table, np.ndarray) else "an archive"
        raise ValueError(f"--gene2vec: {path}: expected a row of numbers per gene, found {found}; fetch the file again")
    return names, table


def _read_text(path: Path) -> tuple[list[str], np.ndarray]:
    lines = [line.split() for line in path.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    if lines and len(lines[0]) == 2 and all(field.isdigit() for field in lines[0]):
        lines = lines[1:]
    if not lines or len(lines[0]) < 2:
        raise ValueError("no gene" if not lines else " ".join(lines[0])[:40])
    names, table = [fields[0] for fields in lines], np.empty((len(lines), len(lines[0]) - 1), np.float32)
    for row, (name, *values) in enumerate(lines):
        if len(values) != table.shape[1]:
            raise ValueError(f"{name} with {len(values)} numbers, {names[0]} with {table.shape[1]}")
        table[row] = [float(value) for value in values]
    if len(set(names)) < len(names):
        raise ValueError(f"{Counter(names).most_common(1)[0][0]} twice")
    return names, table
