"""One gene under several names: matching by symbol, Ensembl id, alias and previous symbol; the files that tell of them.

Letters: V genes of a vocabulary, W numbers of a gene2vec row.
"""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from utils.genes import panels as gene_panels

NAMED = (".txt", ".tsv")  # gene2vec files whose lines begin with the gene
COLUMNS = ("alias_symbol", "prev_symbol", "ensembl_gene_id")  # of HGNC's complete set, beside `symbol`


@dataclass(frozen=True)
class KnownNames:
    """What genes are called elsewhere. A name that two genes share as an alias says nothing of either."""

    approved: dict[str, str]  # approved symbol, alias or previous symbol -> approved symbol
    by_id: dict[str, tuple[str, ...]]  # Ensembl id without version -> symbols
    ambiguous: frozenset[str]  # aliases of two symbols, which are not used

    def of(self, name: str) -> list[str]:
        """The names under which a gene is looked up, the surest first."""
        if not gene_panels.is_ensembl(name):
            return [self.approved.get(name, name)]
        gene_id = name.split(".")[0]
        return [gene_id, *(self.approved.get(symbol, symbol) for symbol in self.by_id.get(gene_id, ()))]


def known_names(path: Path | None, symbols: dict[str, str]) -> KnownNames:
    """From a table laid out as HGNC's complete set, if given, and the slices' own Ensembl id -> symbol.

    Raises ValueError where the table has other columns or no gene.
    """
    rows = [] if path is None else _read_table(path)
    own = {row["symbol"] for row in rows}
    pointing: dict[str, set[str]] = {}
    by_id: dict[str, tuple[str, ...]] = {gene_id: (symbol,) for gene_id, symbol in symbols.items()}
    for row in rows:
        for name in [*(row.get("alias_symbol") or "").split("|"), *(row.get("prev_symbol") or "").split("|")]:
            if name and name not in own:  # what is a gene's own symbol today is no other's
                pointing.setdefault(name, set()).add(row["symbol"])
        if gene_id := row.get("ensembl_gene_id"):
            by_id[gene_id] = tuple(dict.fromkeys([*by_id.get(gene_id, ()), row["symbol"]]))
    approved = {symbol: symbol for symbol in own}
    approved |= {name: next(iter(to)) for name, to in pointing.items() if len(to) == 1}
    return KnownNames(approved, by_id, frozenset(name for name, to in pointing.items() if len(to) > 1))


def _read_table(path: Path) -> list[dict[str, str]]:
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            table = csv.DictReader(file, delimiter="\t")
            columns = table.fieldnames or []
            if "symbol" not in columns or not set(COLUMNS) & set(columns):
                found = ", ".join(columns)[:80] or "nothing"
                raise ValueError(f"the columns symbol, {', '.join(COLUMNS)} (HGNC's complete set), found {found}")
            rows = [row for row in table if row["symbol"]]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"--gene_aliases: {path}: expected a table of text with tabs, found {error}") from error
    except ValueError as error:
        raise ValueError(f"--gene_aliases: {path}: expected {error}; see docs/gene_weights.md") from error
    if not rows:
        raise ValueError(f"--gene_aliases: {path}: expected a gene per line, found none; fetch the file again")
    return rows


def slice_symbols(features: Iterable[tuple[np.ndarray, np.ndarray]]) -> dict[str, str]:
    """Ensembl id -> symbol, as far as the names and ids (G,) of the slices' features say."""
    symbols: dict[str, str] = {}
    for names, ids in features:
        symbols |= gene_panels.symbols_by_id(names, ids)
    return symbols


@dataclass(frozen=True)
class Matches:
    """Which gene of a vocabulary each wanted name means."""

    places: dict[str, int]  # wanted name -> place in the vocabulary; no place twice
    how: dict[str, str]  # wanted name -> "exact", "by alias", "by id"
    unmatched: list[str]
    ambiguous: int  # of the unmatched: may be either of two genes

    def __str__(self) -> str:
        return counted(self.how.values()) + left_out(self.unmatched, self.ambiguous)


def counted(how: Iterable[str]) -> str:
    numbers = Counter(how)
    return ", ".join(f"{numbers[kind]} {kind}" for kind in ("exact", "by alias", "by id"))


def left_out(unmatched: Sequence[str], ambiguous: int) -> str:
    """The end of the line: how many names are left, some of them, and how many of them are ambiguous."""
    if not unmatched:
        return ", 0 unmatched"
    shown = ", ".join(unmatched[:3]) + (", ..." if len(unmatched) > 3 else "")
    return f", {len(unmatched)} unmatched ({shown})" + (f", {ambiguous} of them ambiguous" if ambiguous else "")


def match_genes(wanted: Sequence[str], vocabulary: Sequence[str], known: KnownNames) -> Matches:
    """Look each wanted name up in the vocabulary: as it stands, else under any name it is known by, either way round.

    A gene of the vocabulary that is already found by its own name, or that two names would claim, is not given away.
    Names are unique on both sides.
    """
    row_of = {name: row for row, name in enumerate(vocabulary)}
    places = {name: row_of[name] for name in wanted if name in row_of}
    taken, how = set(places.values()), dict.fromkeys(places, "exact")
    rows_of: dict[str, list[int]] = {}
    for row, name in enumerate(vocabulary):
        for other in known.of(name):
            rows_of.setdefault(other, []).append(row)
    claims: dict[int, list[str]] = {}
    unclear = set()
    for name in wanted:
        if name not in places:
            rows = [row for row in _meant(name, rows_of, row_of, known) if row not in taken]
            if len(rows) == 1:
                claims.setdefault(rows[0], []).append(name)
            elif rows or name in known.ambiguous:
                unclear.add(name)
    for row, names in claims.items():
        if len(names) > 1:
            unclear.update(names)
            continue
        places[names[0]] = row
        how[names[0]] = (
            "by id" if gene_panels.is_ensembl(names[0]) or gene_panels.is_ensembl(vocabulary[row]) else "by alias"
        )
    return Matches(places, how, [name for name in wanted if name not in places], len(unclear))


def _meant(name: str, rows_of: dict[str, list[int]], row_of: dict[str, int], known: KnownNames) -> list[int]:
    """Rows of the first name known for this gene that the vocabulary has; its approved symbol goes before aliases."""
    for other in known.of(name):
        if other in rows_of:
            return [row_of[other]] if other in row_of else rows_of[other]
    return []


def renamed(names: np.ndarray, panel: Sequence[str], known: KnownNames) -> np.ndarray:
    """A slice's gene names (G,) as the panel calls them; those that mean none of its genes stay."""
    own = list(dict.fromkeys(names.tolist()))
    called = {name: panel[place] for name, place in match_genes(own, panel, known).places.items()}
    return np.array([called.get(name, name) for name in names.tolist()])


def require_half(found: int, wanted: int, what: str, unmatched: Sequence[str], vocabulary: Sequence[str]) -> None:
    """Raises ValueError where fewer than half of the genes were found: another species, other ids, another file."""
    if 2 * found < wanted:
        raise ValueError(
            f"{what}: {found} of {wanted} genes found, expected half at least (not found: {', '.join(unmatched[:3])}; "
            f"it has {', '.join(vocabulary[:3])}); give --gene_aliases, or a vocabulary of the same species and naming"
        )


def read_gene2vec(path: Path) -> tuple[list[str] | None, np.ndarray]:
    """A row per gene (V, W): of an .npy file, which does not name them, or of .txt lines `gene v1 v2 ...`, which do.

    The text is that of the release by Du et al. 2019 (doi 10.1186/s12864-018-5370-x), with or without word2vec's first
    line of two sizes. Raises ValueError where the file is torn or holds anything but finite numbers.
    """
    try:
        names, table = _read_text(path) if path.suffix in NAMED else (None, np.load(path))
    except (OSError, EOFError, ValueError) as error:
        reason = " ".join(str(error).split())[:160]
        raise ValueError(
            f"--gene2vec: {path}: expected an .npy table, or .txt lines `gene v1 v2 ...`; {reason}"
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
        raise ValueError(f"found {'no gene' if not lines else ' '.join(lines[0])[:40]}")
    names, table = [fields[0] for fields in lines], np.empty((len(lines), len(lines[0]) - 1), np.float32)
    for row, (name, *values) in enumerate(lines):
        if len(values) != table.shape[1]:
            raise ValueError(f"{name} has {len(values)} numbers, {names[0]} has {table.shape[1]}")
        table[row] = [float(value) for value in values]
    if len(set(names)) < len(names):
        raise ValueError(f"{Counter(names).most_common(1)[0][0]} stands there twice")
    return names, table
