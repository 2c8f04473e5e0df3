"""Which matrix of an AnnData holds the raw counts, and what its genes are called.

Files keep counts in X, raw.X or a layer, beside normalised, scaled or binary copies, and gene symbols in the index or
in a column of any of a dozen names.

Shapes: S spots, F features of a matrix, G genes.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy.sparse import csr_matrix, issparse

from utils.genes.names import NO_SYMBOL, without_unique_suffixes
from utils.slices.matrix import first_bad_count, reading

COUNT_WORDS = {"counts", "count", "raw", "rawcounts", "umi", "umis"}
NEUTRAL_WORDS = {"x", "data", "matrix", "integer", "original"}  # a layer is taken as counts for words of these two only
TOTALS = ("total_counts", "n_counts", "nUMI", "n_umi", "total_umis")  # and nCount_* of Seurat
TOTALS_DISAGREE = 0.01  # of the stated sum of all spots
ID_COLUMNS = ("geneids", "geneid", "ensemblid", "ensemblids", "ensembl", "ensemblgeneid", "featureid", "ids", "id")
SYMBOL_COLUMNS = (
    *("featurename", "genename", "genenames", "genesymbol", "genesymbols", "symbol", "symbols", "hgncsymbol"),
    *("mgisymbol", "externalgenename", "geneshortname", "gene", "genes", "name", "names", "feature", "features"),
)
OTHER_SYMBOLS = re.compile(r"(?!.*(alias|prev|syn|old|orth|homolog)).*symbols?(_orig(inal)?)?", re.IGNORECASE)
# Ensembl, FlyBase, WormBase, RefSeq, HGNC, MGI, and the numbers of NCBI or of a running index
ID = re.compile(r"(ENS[A-Z]*[GT]\d+|FBgn\d+|WBGene\d+|[NX][MR]_\d+|HGNC:\d+|MGI:\d+|\d+)(\.\d+)?(_PAR_Y)?")
GENE_KINDS = {"feature_types": "Gene Expression", "feature_biotype": "gene"}  # Space Ranger's, CELLxGENE's


@dataclass(frozen=True)
class Counts:
    """Raw counts of an AnnData.

    Attributes
    ----------
    counts : csr_matrix (S, G) int32
    genes, gene_ids : ndarray (G,) str; names may repeat
    notes, warnings : list of str
    """

    counts: csr_matrix
    genes: np.ndarray
    gene_ids: np.ndarray
    notes: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Matrix:
    """One matrix (S, F) of an AnnData that may hold counts."""

    where: str
    values: Any
    var: pd.DataFrame


def read_counts(where: str, adata: Any) -> Counts:
    """The raw counts of an AnnData: of the matrices that hold them the one with most genes.

    Among matrices of one size layers['counts'] goes before other layers of such names, these before raw.X and X. Raises
    ValueError where none holds counts, with what each holds.
    """
    chosen, counts = choose_matrix(where, adata)
    var = _with_columns_of(chosen.var, adata.var)
    names, ids = gene_names(where, var)
    are_genes, note = genes_among(var)
    notes = [] if chosen.where == "X" else [f"counts of {chosen.where}"]
    warnings = [*_of_a_subset(adata, chosen), *_totals(adata.obs, counts, chosen.where)]
    return Counts(counts[:, are_genes], names[are_genes], ids[are_genes], notes + note, warnings)


def matrices(adata: Any) -> list[Matrix]:
    """X, raw.X and the layers that are named as counts, the surest first."""
    layers = [name for name in adata.layers if is_named_counts(name)]
    layers.sort(key=lambda name: name != "counts")
    found = [Matrix(f"layers['{name}']", adata.layers[name], adata.var) for name in layers]
    if adata.raw is not None:
        found.append(Matrix("raw.X", adata.raw.X, adata.raw.var))
    if adata.X is not None:
        found.append(Matrix("X", adata.X, adata.var))
    return found


def is_named_counts(name: str) -> bool:
    """Whether a layer's name means counts and nothing else: not spliced, normalised or corrected ones."""
    words = {word for word in re.split(r"[\W_]+", name.lower()) if word}
    return bool(words & COUNT_WORDS) and words <= COUNT_WORDS | NEUTRAL_WORDS


def choose_matrix(where: str, adata: Any) -> tuple[Matrix, csr_matrix]:
    """The matrix with most genes of those that hold counts, and its counts (S, F) int32."""
    found = []
    for matrix in sorted(matrices(adata), key=lambda matrix: -len(matrix.var)):
        with reading(Path(where), f"a matrix in {matrix.where}"):
            if issparse(matrix.values):
                matrix.values.check_format(full_check=True)  # SciPy writes past its arrays where an index is too large
            counts = csr_matrix(matrix.values)
        reason = why_no_counts(counts.data)
        if reason is None:
            counts = counts.astype(np.int32)
            counts.sum_duplicates()
            counts.eliminate_zeros()
            return matrix, counts
        found.append(f"{matrix.where} with {reason}")
    others = ", ".join(f"layers['{name}']" for name in adata.layers if not is_named_counts(name))
    hint = f"; if {others} holds them, name it layers['counts']" if others else "; save them as layers['counts']"
    wanted = "raw counts (0, 1, 2, ...) in X, raw.X or layers['counts']"
    raise ValueError(f"{where}: expected {wanted}, found {', '.join(found) or 'no matrix'}{hint}")


def why_no_counts(values: np.ndarray) -> str | None:
    """What the numbers of a sparse matrix are, where they are not counts."""
    bad = first_bad_count(values)
    if bad is not None:
        return bad[0] if bad[1] is None else f"{bad[0]} ({bad[1]:.6g})"
    largest = values.max(initial=0)
    return None if largest > 1 else "zeros only" if largest == 0 else "0 and 1 only"


def _of_a_subset(adata: Any, chosen: Matrix) -> list[str]:
    """A line where the counts are of some genes only: another matrix has more, or all are highly variable."""
    most = max(matrices(adata), key=lambda matrix: len(matrix.var))
    n_genes, n_all = len(chosen.var), len(most.var)
    if n_genes < n_all:
        return [
            f"{n_genes} of {n_all} genes: {chosen.where} holds counts of these only and {most.where}, which has all, "
            "holds none; every total and per-10,000 value is of these genes alone"
        ]
    chosen_genes = chosen.var.get("highly_variable")
    if chosen_genes is not None and n_genes and chosen_genes.astype(bool).all():
        return [
            f"all {n_genes} genes are marked highly variable: the others are missing from the file, and every total "
            "and per-10,000 value is of these genes alone"
        ]
    return []


def _totals(obs: pd.DataFrame, counts: csr_matrix, where: str) -> list[str]:
    """A line where a column of totals per spot contradicts the counts (S, F)."""
    total = int(counts.sum())
    for column in obs.columns:
        if column in TOTALS or str(column).startswith("nCount_"):
            stated = pd.to_numeric(obs[column].astype(object), errors="coerce").sum()
            if abs(stated - total) > TOTALS_DISAGREE * stated > 0:
                return [
                    f"obs['{column}'] sums to {stated:,.0f} counts and {where} to {total:,}; "
                    f"{'a subset of the genes was kept' if stated > total else 'the column is of another matrix'}"
                ]
    return []


def _with_columns_of(var: pd.DataFrame, other: pd.DataFrame) -> pd.DataFrame:
    """The features of raw with the columns that only those of X have; genes that X lacks have NaN there."""
    missing = [column for column in other if column not in var]
    if var is other or not missing or not other.index.is_unique:
        return var
    return var.join(other[missing])


def plain_name(column: Any) -> str:
    """The name of a column in lower case without punctuation, and without a number that joining added."""
    return re.sub(r"-\d+$|[\W_]", "", str(column).lower())


def columns_named(table: pd.DataFrame, wanted: tuple[str, ...]) -> list[pd.Series]:
    """Columns of these plain names, in this order."""
    by_name: dict[str, list[Any]] = {}
    for column in table.columns:
        by_name.setdefault(plain_name(column), []).append(column)
    return [table[column] for name in wanted for column in by_name.get(name, [])]


def _texts(values: pd.Series | pd.Index) -> np.ndarray:
    """Texts without blanks around them, "" where there is none: (F,) object."""
    texts = pd.Series(values).astype(object)
    return texts.where(texts.notna(), "").astype(str).str.strip().to_numpy(dtype=object)


def _most(matches: list[bool]) -> bool:
    return bool(matches) and 2 * sum(matches) > len(matches)


def are_ids(texts: np.ndarray) -> bool:
    """Whether most of the texts are ids or plain numbers."""
    return _most([ID.fullmatch(text) is not None for text in texts if text])


def _are_symbols(texts: np.ndarray) -> bool:
    """Whether some are filled, and most of these are distinct, and neither ids nor descriptions of several words."""
    filled = [text for text in texts if text]
    distinct = 2 * len(set(filled)) > len(filled)
    return distinct and not are_ids(texts) and not _most([" " in text for text in filled])


def gene_names(where: str, var: pd.DataFrame) -> tuple[np.ndarray, np.ndarray]:
    """Names and ids (F,) of features; a gene without a symbol has its id as its name.

    Names are the index, or a column of symbols where the index holds ids or numbers. Suffixes that made repeated names
    unique are taken away again.
    """
    index = _texts(var.index)
    others = [var[column] for column in var.columns if OTHER_SYMBOLS.fullmatch(str(column))]
    columns = [texts for texts in map(_texts, columns_named(var, SYMBOL_COLUMNS)) if _are_symbols(texts)]
    columns = columns or [texts for texts in map(_texts, others) if _are_symbols(texts)]
    symbols = max(columns, key=np.count_nonzero, default=None)  # the fullest, the first of equals
    ids = next(
        (texts for texts in map(_texts, columns_named(var, ID_COLUMNS)) if _most([bool(t) for t in texts])), None
    )
    names = index
    if are_ids(index):
        running = any((index == np.arange(first, first + len(index)).astype(str)).all() for first in (0, 1))
        if running and symbols is None and ids is None:
            found = ", ".join(index[:3])
            raise ValueError(f"{where}: expected gene names in var, found the numbers {found}, ...; name the genes")
        if ids is None or not all(text.isdigit() for text in index):  # else the column has better ids than the index
            ids = symbols if running else index
        names = symbols if symbols is not None else index if ids is None else ids
    ids = index if ids is None else ids
    ids = np.where(ids == "", index, ids).astype(str)
    names = without_unique_suffixes(np.where(names == "", ids, names).astype(str), ids)
    if nameless := int((names == "").sum()):
        raise ValueError(f"{where}: expected a name or an id for each gene, found {nameless} without; name them in var")
    return np.where(np.isin(names, NO_SYMBOL), ids, names), ids


def genes_among(var: pd.DataFrame) -> tuple[np.ndarray, list[str]]:
    """Which features (F,) are genes, and a note that counts the others."""
    genes = np.ones(len(var), bool)
    for column, kind in GENE_KINDS.items():
        if column in var and (var[column] == kind).any():
            genes &= ((var[column] == kind) | var[column].isna()).to_numpy()
    notes = [f"{(~genes).sum()} features that are no genes left out"] if not genes.all() else []
    return genes, notes
