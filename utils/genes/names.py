"""Names of genes: symbols and ids, missing symbols, aliases, names of control features, suffixes that make them unique.

Letters: G genes of a slice, V genes of a vocabulary.
"""

from __future__ import annotations

import csv
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

COLUMNS = ("alias_symbol", "prev_symbol", "ensembl_gene_id")  # of HGNC's complete set, beside `symbol`

# ---- names as files hold them

NO_SYMBOL = ("", "nan", "NaN", "NA", "<NA>", "N/A", "n/a", "None", "null", "-")  # texts made of missing symbols


def stripped(texts: Iterable[str]) -> np.ndarray:
    """Texts without the blanks and quotes around them, as R's write.table leaves these: (G,) str."""
    return np.char.strip(np.asarray(texts, str), ' \t\r"')


def named(where: str | Path, names: np.ndarray, ids: np.ndarray) -> np.ndarray:
    """The names (G,) with the ids (G,) in place of missing symbols, which would become one gene.

    Raises ValueError where several genes have neither; a single NA or nan may be a symbol.
    """
    names = np.where(np.isin(names, NO_SYMBOL), ids, names)
    nameless = np.isin(names, NO_SYMBOL)
    if "" in names or nameless.sum() > 1:
        found = f"{nameless.sum()} of {len(names)} genes without"
        raise ValueError(f"{where}: expected a name or an id of each gene, found {found}; name them or leave them out")
    return names


# ---- control features

CONTROL = re.compile(
    r"""neg(ative)?[-_. ]?(prb|probe|codeword)       # CosMx NegPrb1, GeoMx NegProbe-WTX
    |(neg(ative)?|pos(itive)?|sys(tem)?)[-_. ]?(control|ctrl)  # Xenium NegControlProbe_00042, CosMx SystemControl1
    |(custom[-_. ])?negative[-_. ]?(set[-_. ]?)?\d*$ # CosMx Negative1
    |false[-_. ]?code                                # CosMx
    |blank([-_. ]|\d|codeword|$)                     # Xenium BLANK_0006, MERSCOPE Blank-1
    |(unassigned|deprecated)([-_. ]|\d|codeword|$)   # Xenium UnassignedCodeword_0001
    |antisense[-_. ]                                 # Xenium antisense_BCL2L15
    |intergenic([-_. ]|\d|region|$)|genomic[-_. ]?control  # Xenium Prime Intergenic_Region_10014
    |control[-_. ]?(probe|codeword|\d+$)|(pos|neg)_[a-h](\([\d.]+\))?$  # the latter of nCounter
    |ercc[-_.]\d{5}$|sirv\d                          # spike-ins
    |x?__                                            # HTSeq __no_feature, in R X__no_feature
    |(no_feature|ambiguous|too_low_aqual|not_aligned|alignment_not_unique)$
    |(n_)?(unmapped|multimapping|nofeature|ambiguous)$  # STAR""",
    re.IGNORECASE | re.VERBOSE,
)


def is_control(name: str) -> bool:
    """Whether the name is that of a control probe, codeword, blank, spike-in or row of unassigned reads."""
    return CONTROL.match(name) is not None


def are_controls(names: Iterable[str]) -> np.ndarray:
    """`is_control` of each name: (G,) bool."""
    return np.array([is_control(str(name)) for name in names], bool)


# ---- Ensembl ids

ENSEMBL = re.compile(r"(ENS[A-Z]*G\d+)(\.\d+)?(_PAR_Y)?")


def ensembl_id(name: str) -> str | None:
    """The Ensembl gene id that a name is, without its version; None where it is a symbol."""
    match = ENSEMBL.fullmatch(name)
    return match[1] if match else None


def is_ensembl(name: str) -> bool:
    return ensembl_id(name) is not None


def symbols_by_id(names: np.ndarray, ids: np.ndarray) -> dict[str, str]:
    """Ensembl id without version -> symbol, from the names and ids (G,) of one slice's features table."""
    pairs = ((ensembl_id(str(gene_id)), str(name)) for gene_id, name in zip(ids, names, strict=True))
    return {gene_id: name for gene_id, name in pairs if gene_id and not is_ensembl(name)}


def mapped_names(names: np.ndarray, symbols: Mapping[str, str]) -> np.ndarray:
    """Ensembl names (G,) turned into symbols where `symbols` has them, else without their version: (G,) str."""
    pairs = ((name, ensembl_id(name)) for name in names.astype(str))
    return np.array([name if gene_id is None else symbols.get(gene_id, gene_id) for name, gene_id in pairs], str)


# ---- suffixes that make symbols unique

SUFFIX = re.compile(r"(.+)([-._])([1-9]\d*)")  # anndata: TBCE-1; R's make.unique, pandas: TBCE.1; by hand: TBCE_1
WITH_ID = re.compile(r"(.+)[-_.]ENS[A-Z]*G\d+(\.\d+)?")  # CELLxGENE, scuttle: TBCE_ENSG00000284770
NUMBERED = {  # beginnings of symbols X whose X-1 (or X.1) is a gene of its own beside X
    "-": re.compile(
        r"(IG[HKL]|TR[ABDG])[VDJ]|(\w+-)?(MIR-?\d|LET-?7)|SNOR[AD]\d|RNV?U\d|TR[A-Z]{1,2}-[A-Z]{3}|KRTAP|NKX\d?$"
        r"|ERV|H[1-4]$",
        re.IGNORECASE,
    ),
    ".": re.compile(r"([A-Z]{1,2}\d{5,8}|.+-[A-Z]*\d+[A-Z]+\d+|ENS[A-Z]*\d+|[NX][MR]_\d+)$"),  # clones, ids
    "_": re.compile(r"$"),  # none
}


def _suffixed(names: Iterable[str]) -> Iterator[tuple[int, str, str, int]]:
    """Place, name without suffix, its mark, and number of each name that has such a suffix; no Ensembl ids."""
    for i, name in enumerate(names):
        if (parts := SUFFIX.fullmatch(name)) and not is_ensembl(name):
            yield i, parts[1], parts[2], int(parts[3])


def without_unique_suffixes(
    names: np.ndarray, ids: np.ndarray | None = None, symbols: Mapping[str, str] | None = None
) -> np.ndarray:
    """Undo the suffixes that made repeated symbols unique (TBCE, TBCE-1 -> TBCE, TBCE): (G,) -> (G,) str.

    A suffix is removed where the name without it is present and its numbers are 1, 2, ... without a gap, unless it
    belongs to the symbol: in a family with such numbers (KRTAP13-1, IGHV1-69-2, MIR3648-1), in a clone (AL627309.1), or
    where another table has the id under the whole name. If any name repeats, names were not made unique and all stay.
    A symbol followed by its Ensembl id (TBCE_ENSG00000284770) loses the id.

    Parameters
    ----------
    names : (G,) str, of the features of one file
    ids : (G,) str in their order; names may stand for them. An Ensembl id that the name without suffix has, too, or an
        id that equals that name, proves that the suffix was added
    symbols : Ensembl id -> symbol of other tables (`slice_names`), which decides where it has the id
    """
    names = np.asarray(names).astype(str)
    place = {name: i for i, name in enumerate(names)}
    if len(place) < len(names):
        return names
    ids, symbols = names if ids is None else np.asarray(ids).astype(str), symbols or {}
    gene_ids = [ensembl_id(gene_id) for gene_id in ids]
    known = [symbols.get(gene_id or "") for gene_id in gene_ids]
    merged = [parts[1] if (parts := WITH_ID.fullmatch(name)) else name for name in names]
    numbers: dict[tuple[str, str], dict[int, int]] = {}  # name without suffix, mark -> place by number
    for i, base, mark, number in _suffixed(names):
        if base in (ids[i], known[i]) or (gene_ids[i] and base in place and gene_ids[i] == gene_ids[place[base]]):
            merged[i] = base
        numbers.setdefault((base, mark), {})[number] = i
    for (base, mark), places in numbers.items():
        whole = base in place and sorted(places) == list(range(1, len(places) + 1))
        its_own = NUMBERED[mark].match(base) or any(known[i] == names[i] for i in places.values())
        if whole and not its_own:
            for i in places.values():
                merged[i] = base
    return np.array(merged, str)


@dataclass(frozen=True)
class SliceNames:
    """Gene names by the features tables of all slices."""

    symbols: dict[str, str]  # Ensembl id -> symbol; TBCE goes before TBCE-1
    repeats: dict[str, int]  # symbol -> its highest number of occurrences in a slice, if above 1

    def agreed(self, names: np.ndarray, ids: np.ndarray) -> np.ndarray:
        """Names and ids (G,) of a slice -> names common to all slices: (G,) str.

        Ensembl names become symbols. TBCE-1 becomes TBCE where another slice has its id as TBCE, or has TBCE twice.
        """
        agreed = mapped_names(names, self.symbols).astype(object)
        there = set(agreed)
        for i, base, _, number in _suffixed(agreed):
            known = self.symbols.get(ensembl_id(str(ids[i])) or "")
            if known == base or (base in there and number < self.repeats.get(base, 0)):
                agreed[i] = base
        return agreed.astype(str)


def slice_names(features: Iterable[tuple[np.ndarray, np.ndarray]]) -> SliceNames:
    """From the names and ids (G,) of each slice, read one slice at a time.

    A repeated symbol that also occurs with a suffix (X, X, X-1) does not explain X-1 of another slice; it is left out.
    """
    symbols: dict[str, str] = {}
    repeats: dict[str, int] = {}
    for names, ids in features:
        for gene_id, name in symbols_by_id(names, ids).items():
            suffixed = SUFFIX.fullmatch(name)
            if not suffixed or symbols.get(gene_id) != suffixed[1]:
                symbols[gene_id] = name
        numbers = Counter(np.asarray(names).astype(str).tolist())
        beside = {base for _, base, _, _ in _suffixed(numbers)}
        for name, number in numbers.items():
            if number > 1 and name not in beside:
                repeats[name] = max(number, repeats.get(name, 0))
    return SliceNames(symbols, repeats)


# ---- aliases


@dataclass(frozen=True)
class KnownNames:
    """Other names of genes. An alias of two genes is not used."""

    approved: dict[str, str]  # approved symbol, alias or previous symbol -> approved symbol
    by_id: dict[str, tuple[str, ...]]  # Ensembl id without version -> symbols
    ambiguous: frozenset[str]  # aliases of two symbols, which are not used

    def lookup_names(self, name: str) -> list[str]:
        """The names under which a gene is looked up, in order of preference."""
        gene_id = ensembl_id(name)
        if gene_id is None:
            return [self.approved.get(name, name)]
        return [gene_id, *(self.approved.get(symbol, symbol) for symbol in self.by_id.get(gene_id, ()))]


def known_names(path: Path | None, symbols: dict[str, str]) -> KnownNames:
    """From a table laid out as HGNC's complete set, if given, and the slices' own Ensembl id -> symbol.

    Raises ValueError where the table has other columns or no gene.
    """
    rows = [] if path is None else _read_table(path)
    symbols_of_table = {row["symbol"] for row in rows}
    pointing: dict[str, set[str]] = {}
    by_id: dict[str, tuple[str, ...]] = {gene_id: (symbol,) for gene_id, symbol in symbols.items()}
    for row in rows:
        for name in [*(row.get("alias_symbol") or "").split("|"), *(row.get("prev_symbol") or "").split("|")]:
            if name and name not in symbols_of_table:  # an approved symbol is no alias of another gene
                pointing.setdefault(name, set()).add(row["symbol"])
        if gene_id := ensembl_id(row.get("ensembl_gene_id") or ""):
            by_id[gene_id] = tuple(dict.fromkeys([*by_id.get(gene_id, ()), row["symbol"]]))
    approved = {symbol: symbol for symbol in symbols_of_table}
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
        raise ValueError(
            f"--gene_aliases: {path}: expected a table of text with tabs, found {error}; see docs/gene_weights.md"
        ) from error
    except ValueError as error:
        raise ValueError(f"--gene_aliases: {path}: expected {error}; see docs/gene_weights.md") from error
    if not rows:
        raise ValueError(f"--gene_aliases: {path}: expected a gene per line, found none; fetch the file again")
    return rows


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
    """The end of a log line: the number of unmatched names, the first of them, and how many are ambiguous."""
    if not unmatched:
        return ", 0 unmatched"
    shown = ", ".join(unmatched[:3]) + (", ..." if len(unmatched) > 3 else "")
    return f", {len(unmatched)} unmatched ({shown})" + (f", {ambiguous} of them ambiguous" if ambiguous else "")


def match_genes(wanted: Sequence[str], vocabulary: Sequence[str], known: KnownNames) -> Matches:
    """Look each wanted name up in the vocabulary: first exactly, then by the other names of either gene.

    A gene of the vocabulary is matched once: an exact match takes precedence, and where two names would match the same
    gene, neither does. Names are unique on both sides.
    """
    row_of = {name: row for row, name in enumerate(vocabulary)}
    places = {name: row_of[name] for name in wanted if name in row_of}
    taken, how = set(places.values()), dict.fromkeys(places, "exact")
    rows_of: dict[str, list[int]] = {}
    for row, name in enumerate(vocabulary):
        for other in known.lookup_names(name):
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
        how[names[0]] = "by id" if is_ensembl(names[0]) or is_ensembl(vocabulary[row]) else "by alias"
    return Matches(places, how, [name for name in wanted if name not in places], len(unclear))


def _meant(name: str, rows_of: dict[str, list[int]], row_of: dict[str, int], known: KnownNames) -> list[int]:
    """Rows of the first of the gene's names that the vocabulary has; an approved symbol goes before aliases."""
    for other in known.lookup_names(name):
        if other in rows_of:
            return [row_of[other]] if other in row_of else rows_of[other]
    return []


def renamed(names: np.ndarray, panel: Sequence[str], known: KnownNames) -> np.ndarray:
    """A slice's gene names (G,) with those that match a panel gene replaced by the panel's name for it."""
    places = match_genes(list(dict.fromkeys(names.tolist())), panel, known).places
    return np.array([panel[places[name]] if name in places else name for name in names.tolist()])


def require_half(found: int, wanted: int, what: str, unmatched: Sequence[str], vocabulary: Sequence[str]) -> None:
    """Raises ValueError where fewer than half of the genes were found: another species, other ids, another file."""
    if 2 * found < wanted:
        raise ValueError(
            f"{what}: {found} of {wanted} genes found, expected half at least (not found: {', '.join(unmatched[:3])}; "
            f"it has {', '.join(vocabulary[:3])}); give --gene_aliases, or a vocabulary of the same species and naming"
        )
