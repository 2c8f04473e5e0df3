"""Count matrices as Space Ranger writes them: HDF5, or a folder of matrix.mtx, features.tsv and barcodes.tsv.

Shapes: S spots, G genes. A matrix in HDF5 that would take more than the memory it is given stays in its file and is
read by spans of spots: genes x barcodes by column are spots x genes by row, so a span is one stretch of the file.
A damaged file is a ValueError of one line: the file, what was expected, what was found, how to fix it.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from scipy.sparse import csr_matrix, vstack

from utils.genes.names import are_controls, named, stripped
from utils.words import cut

MATRICES = (
    *("filtered_feature_bc_matrix.h5", "filtered_feature_bc_matrix"),
    *("raw_feature_bc_matrix.h5", "raw_feature_bc_matrix"),
)
BYTES_PER_COUNT = 64  # of memory, at the most, that a number of the matrix takes while it is read, summed and hashed
LARGEST = np.iinfo(np.int32).max
LONGEST_SPAN = 2**22  # numbers; longer ones gain nothing
CHUNK = 2**16  # numbers of a compressed piece of a matrix that is written
GENES = "Gene Expression"  # the kind of feature that is read
FEATURES = "features.tsv", "genes.tsv"  # the latter is Cell Ranger 2's name


def runs(starts: np.ndarray, stops: np.ndarray, most: float) -> Iterator[slice]:
    """Neighbouring stretches, (S,) both and ascending, in runs no longer than `most` from end to end, or of one."""
    first = 0
    while first < len(starts):
        last = max(int(np.searchsorted(stops, int(starts[first]) + most, side="right")), first + 1)
        yield slice(first, last)
        first = last


def _gathered(values: np.ndarray, starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """The stretches of `values` one after the other; nothing is moved where they are all of it."""
    if lengths.sum() == len(values):
        return values
    shift = starts - (np.cumsum(lengths) - lengths)
    return values[np.repeat(shift, lengths) + np.arange(lengths.sum())]


@dataclass(frozen=True)
class StoredCounts:
    """Counts (S, G) left in their HDF5 file; `counts[spots]` reads some, as of a csr_matrix.

    Attributes
    ----------
    path : Path
    starts, lengths : ndarray (S,) int64, the stretch of each spot in the file's data
    of_genes : ndarray of bool, the features of the file that are genes, G of them
    most : numbers of the file to read at a time
    """

    path: Path
    starts: np.ndarray
    lengths: np.ndarray
    of_genes: np.ndarray
    most: int

    @property
    def shape(self) -> tuple[int, int]:
        return len(self.starts), int(self.of_genes.sum())

    @property
    def indptr(self) -> np.ndarray:
        return np.concatenate([[0], np.cumsum(self.lengths)])

    def select(self, spots: np.ndarray) -> "StoredCounts":
        """The counts of these spots, still in the file."""
        return replace(self, starts=self.starts[spots], lengths=self.lengths[spots])

    def __getitem__(self, spots: slice | np.ndarray) -> csr_matrix:
        """Read spots in any order; those far apart cost the reading of what lies between them."""
        starts, lengths = self.starts[spots], self.lengths[spots]
        order = np.lexsort((lengths, starts))  # an empty one before the spot that begins at the same place
        starts, lengths = starts[order], lengths[order]
        with _h5_group(self.path) as group:
            parts = [self._read(group, starts[run], lengths[run]) for run in runs(starts, starts + lengths, self.most)]
        counts = _cleaned(self.path, vstack(parts, format="csr") if len(parts) > 1 else parts[0], self.of_genes)
        return counts if (np.diff(order) == 1).all() else counts[np.argsort(order)]

    def _read(self, group: h5py.Group, starts: np.ndarray, lengths: np.ndarray) -> csr_matrix:
        """One stretch of the file, and of it the spots asked for: their counts (spots, features)."""
        stretch = slice(starts[0], starts[-1] + lengths[-1])
        data, indices = (_gathered(group[key][stretch], starts - starts[0], lengths) for key in ("data", "indices"))
        places = np.concatenate([[0], np.cumsum(lengths)])
        counts = csr_matrix((data, indices, places), shape=(len(starts), len(self.of_genes)))
        counts.check_format(full_check=True)
        return counts


def spans(counts: csr_matrix | StoredCounts, memory: float) -> list[slice]:
    """Spans of neighbouring spots whose counts fit into `memory` bytes, all spots in order."""
    return list(runs(counts.indptr[:-1], counts.indptr[1:], longest(memory)))


def longest(memory: float) -> float:
    """Numbers of a span that fits into `memory` bytes."""
    return min(memory // BYTES_PER_COUNT, LONGEST_SPAN)


@dataclass(frozen=True)
class CountMatrix:
    """Raw counts as the file has them: counts (S, G) int32, the rest str; gene names may repeat, barcodes do not."""

    counts: csr_matrix | StoredCounts
    barcodes: np.ndarray
    genes: np.ndarray
    gene_ids: np.ndarray


class FileError(ValueError):
    """A file that cannot be read: one line with its path, what was expected, what was found, and how to fix it."""


@contextmanager
def reading(path: Path, expected: str) -> Iterator[None]:
    """Turn whatever a library raises on a damaged file into one line that names the file."""
    try:
        yield
    except (FileError, MemoryError):
        raise
    except Exception as error:  # h5py, pandas, SciPy and what they unpack with raise what they like
        found = cut(error) or type(error).__name__
        raise FileError(f"{path}: expected {expected}, found: {found}; copy or export the file again") from error


def first_of(folder: Path, names: Iterable[str]) -> Path | None:
    return next((folder / name for name in names if (folder / name).exists()), None)


def listing(folder: Path) -> str:
    return ", ".join(sorted(p.name for p in folder.iterdir())[:12]) or "an empty folder"


def check_once(path: Path, barcodes: np.ndarray) -> None:
    unique, number = np.unique(barcodes, return_counts=True)
    if len(unique) < len(barcodes):
        raise ValueError(f"{path}: expected each barcode once, found {unique[number > 1][0]} again; remove one of them")


def _text(dataset: h5py.Dataset) -> np.ndarray:
    return np.asarray(dataset.asstr("utf-8")[:], dtype=str)


@contextmanager
def _h5_group(path: Path) -> Iterator[h5py.Group]:
    """The group `matrix` of an open file, or its only group: Cell Ranger 2 named it after the genome."""
    with reading(path, "a 10x matrix in HDF5"), h5py.File(path, "r") as file:
        yield file["matrix"] if "matrix" in file or len(file) != 1 else file[next(iter(file))]


def _h5_features(group: h5py.Group) -> list[np.ndarray]:
    """Names, ids and kinds (features,)."""
    if "features" in group:
        return [stripped(_text(group["features"][key])) for key in ("name", "id", "feature_type")]
    names, ids = (stripped(_text(group[key])) for key in ("gene_names", "genes"))
    return [names, ids, np.full(len(names), GENES)]


def _h5_counts(path: Path, group: h5py.Group, memory: float) -> csr_matrix | StoredCounts:
    """Counts (S, features) of any number type, in memory where they fit into that many bytes."""
    shape, places = (int(group["shape"][1]), int(group["shape"][0])), group["indptr"][:].astype(np.int64)
    if group["data"].size * BYTES_PER_COUNT <= memory:
        # genes x barcodes in columns is barcodes x genes in rows: nothing is moved
        counts = csr_matrix((group["data"][:], group["indices"][:], places), shape=shape)
        counts.check_format(full_check=True)
        return counts
    ends = (group["data"].size, group["indices"].size)
    if len(places) != shape[0] + 1 or places[0] != 0 or (np.diff(places) < 0).any() or (places[-1] != ends).any():
        raise ValueError(f"indptr does not divide {ends[0]} data and {ends[1]} indices among {shape[0]} barcodes")
    return StoredCounts(path, places[:-1], np.diff(places), np.ones(shape[1], bool), int(longest(memory)))


def _read_tsv(path: Path) -> list[np.ndarray]:
    """The columns of a table without a header."""
    import pandas as pd

    with reading(path, "a table of text separated by tabs"):
        table = pd.read_csv(path, sep="\t", header=None, dtype=str, keep_default_na=False, quoting=csv.QUOTE_NONE)
        return [stripped(table[column].to_numpy(dtype=str)) for column in table]


def _part(folder: Path, name: str, old_name: str = "") -> Path:
    """A file of a folder, plain or packed, or under the name that Cell Ranger 2 gave it."""
    path = first_of(folder, (name, name + ".gz", *((old_name, old_name + ".gz") if old_name else ())))
    if path is None:
        raise ValueError(f"{folder}: expected {name} or {name}.gz, found {listing(folder)}; add the file")
    return path


def _folder_features(folder: Path) -> list[np.ndarray]:
    """The same as _h5_features, from features.tsv (symbol; id, symbol; or id, symbol, kind)."""
    path = _part(folder, *FEATURES)
    ids, *others = _read_tsv(path)
    joined = [] if others else [line for line in ids if any(mark in line for mark in ",; ")]
    if 2 * len(joined) > len(ids):  # a few genes have names with commas
        raise ValueError(f"{path}: expected columns separated by tabs, found {joined[0]}; write it with tabs")
    return [others[0] if others else ids, ids, others[1] if len(others) > 1 else np.full(len(ids), GENES)]


def _folder_counts(folder: Path) -> csr_matrix:
    from scipy.io import mmread

    path = _part(folder, "matrix.mtx")
    with reading(path, "a Matrix Market file"):
        return csr_matrix(mmread(path).T)


def first_bad_count(values: np.ndarray) -> tuple[str, Any] | None:
    """Of values that are not all counts (0, 1, 2, ... within int32): what is wrong, and the first such number."""
    if values.dtype.kind not in "iuf":
        return f"values of the kind {values.dtype}", None
    floats = values.dtype.kind == "f"
    checks = (
        ("NaN", lambda: floats and np.isnan(values)),
        ("negative numbers", lambda: values < 0),
        ("fractions", lambda: floats and values != np.rint(values)),
        ("numbers too large for counts", lambda: values > LARGEST),
    )
    for wrong, check in checks:
        bad = np.asarray(check())
        if bad.any():
            return wrong, values[bad][0]
    return None


def whole_counts(where: str | Path, values: np.ndarray) -> np.ndarray:
    """Counts as int32; files made outside Space Ranger may hold whole numbers as floats. Raises ValueError."""
    bad = first_bad_count(values)
    if bad is not None:
        found = bad[0] if bad[1] is None else bad[1]
        raise ValueError(f"{where}: expected raw counts (0, 1, 2, ...), found {found}; give the raw counts")
    return values.astype(np.int32, copy=False)


def _cleaned(path: Path, counts: csr_matrix, of_genes: np.ndarray) -> csr_matrix:
    """Counts (S, G) int32 of the features that are genes, each number once and above zero."""
    counts.data = whole_counts(path, counts.data)
    counts = counts if of_genes.all() else counts[:, of_genes]
    counts.sum_duplicates()
    counts.eliminate_zeros()
    return counts


def _barcodes(path: Path) -> np.ndarray:
    """The barcodes (S,) of a folder."""
    path = _part(path, "barcodes.tsv")
    barcodes = _read_tsv(path)[0]
    check_once(path, barcodes)
    return barcodes


def slice_matrix(root: Path) -> Path | None:
    """The matrix that a slice is read from, filtered before raw, HDF5 before folder; None without any.

    It is `root` where matrix.mtx and its tables lie in it, as in a GEO download.
    """
    return first_of(root, MATRICES) or (root if first_of(root, ("matrix.mtx", "matrix.mtx.gz")) else None)


def matrix_files(path: Path) -> list[Path]:
    """The files that a matrix is read from; others beside them are none of its."""
    if path.is_file():
        return [path]
    return [_part(path, "barcodes.tsv"), _part(path, *FEATURES), _part(path, "matrix.mtx")]


def read_barcodes(path: Path) -> np.ndarray:
    """Read the barcodes (S,) of a slice's matrix alone."""
    if path.is_dir():
        return _barcodes(path)
    with _h5_group(path) as group:
        barcodes, of_probes = _text(group["barcodes"]), "features/probe_region" in group
    _check_genes(path, of_probes)
    check_once(path, barcodes)
    return barcodes


def _check_genes(path: Path, of_probes: bool) -> None:
    if of_probes:
        raise ValueError(f"{path}: expected counts per gene, found a probe-level matrix; give the one per gene")


def _matrix_path(root: Path) -> Path:
    """The matrix of a slice's root (filtered before raw, HDF5 before folder), or the path itself."""
    path = root if root.is_file() else slice_matrix(root)
    if path is None:
        found = listing(root) if root.is_dir() else "nothing"
        prefixed = "feature_bc_matrix" in found or "matrix.mtx" in found
        fix = "gunzip the matrix, or cut the prefix off its name" if prefixed else "add the matrix"
        raise ValueError(f"{root}: expected counts ({', '.join(MATRICES)}), found {found}; {fix}")
    return path


def _are_genes(path: Path, names: np.ndarray, kinds: np.ndarray) -> np.ndarray:
    """Which features are genes: of the kind "Gene Expression", and no control by their name."""
    of_genes = kinds == GENES
    if not of_genes.any():
        raise ValueError(
            f"{path}: expected features of the kind {GENES}, found {', '.join(sorted(set(kinds)))}; "
            "give the matrix of gene expression"
        )
    controls = are_controls(names) & of_genes
    if (controls == of_genes).all():
        raise ValueError(
            f"{path}: expected genes, found control features alone ({names[controls][0]}, ...); "
            "give the matrix of gene expression"
        )
    return of_genes & ~controls


def _features(path: Path, of_slice: bool) -> list[np.ndarray]:
    """Names, ids and kinds (features,) of either form of matrix; `of_slice` refuses one of probes."""
    if path.is_dir():
        return _folder_features(path)
    with _h5_group(path) as group:
        features, of_probes = _h5_features(group), "features/probe_region" in group
    _check_genes(path, of_probes and of_slice)
    if len(set(map(len, features))) > 1:
        lengths = ", ".join(str(len(part)) for part in features)
        raise ValueError(f"{path}: expected as many names as ids and kinds, found {lengths}; export it again")
    return features


def read_genes(root: str | Path) -> tuple[np.ndarray, np.ndarray]:
    """Names and ids (G,) of a slice's matrix as read_matrix gives them, without reading counts."""
    path = _matrix_path(Path(root))
    names, ids, kinds = _features(path, of_slice=True)
    of_genes = _are_genes(path, names, kinds)
    return named(path, names[of_genes], ids[of_genes]), ids[of_genes]


def count_controls(root: str | Path) -> int:
    """How many features of the kind "Gene Expression" read_matrix leaves out as controls."""
    names, _, kinds = _features(_matrix_path(Path(root)), of_slice=False)
    return int((are_controls(names) & (kinds == GENES)).sum())


def read_matrix(root: str | Path, memory: float = math.inf) -> CountMatrix:
    """Read a count matrix: the one of a slice's root (filtered before raw, HDF5 before folder), or the path itself.

    Only features of the kind "Gene Expression" are kept, and no controls. Counts in HDF5 that would take more than
    `memory` bytes are StoredCounts, and checked when they are read.
    """
    path = _matrix_path(Path(root))
    counts: csr_matrix | StoredCounts
    if path.is_dir():
        counts, features, barcodes = _folder_counts(path), _folder_features(path), _barcodes(path)
    else:
        with _h5_group(path) as group:
            counts, features, barcodes = _h5_counts(path, group, memory), _h5_features(group), _text(group["barcodes"])
        check_once(path, barcodes)
    lengths = {counts.shape[1], *map(len, features)}
    if counts.shape[0] != len(barcodes) or len(lengths) != 1:
        sizes = f"{counts.shape[0]} x {counts.shape[1]} counts, {len(barcodes)} barcodes, {len(features[0])} features"
        raise ValueError(f"{path}: expected spots x genes of one size, found {sizes}; export the matrix again")
    of_genes = _are_genes(path, features[0], features[2])
    stored = isinstance(counts, StoredCounts)
    counts = replace(counts, of_genes=of_genes) if stored else _cleaned(path, counts, of_genes)
    names, ids = (part[of_genes] for part in features[:2])
    return CountMatrix(counts, barcodes, named(path, names, ids), ids)


def write_matrix(
    path: Path, matrix: CountMatrix, about: dict[str, Any], genome: str = "unknown", memory: float = math.inf
) -> None:
    """Write counts in the 10x schema of version 3: genes x barcodes by column, compressed.

    Parameters
    ----------
    matrix : counts and names
    about : attributes of the file, beside those that are the same in every file
    genome : of all genes
    memory : bytes for the counts that are read together, where they are left in their file
    """
    n_spots, n_genes = matrix.counts.shape
    texts: dict[str, Iterable[str]] = {
        "barcodes": matrix.barcodes,
        "features/name": matrix.genes,
        "features/id": matrix.gene_ids,
        "features/feature_type": [GENES] * n_genes,
        "features/genome": [genome] * n_genes,
        "features/_all_tag_keys": ["genome"],
    }
    with h5py.File(path, "w") as file:
        file.attrs.update({"filetype": "matrix", "original_gem_groups": np.array([1]), "version": 2} | about)
        group = file.create_group("matrix")
        for name, values in texts.items():
            encoded = np.array([str(value).encode() for value in values], dtype="S")
            group.create_dataset(name, data=encoded, compression="gzip")
        group["shape"] = np.array([n_genes, n_spots], np.int32)
        _write_counts(group, matrix.counts, memory)


def _write_counts(group: h5py.Group, counts: csr_matrix | StoredCounts, memory: float) -> None:
    """Counts (S, G) as data, indices and indptr, span by span."""
    numbers = {
        name: group.create_dataset(name, (0,), kind, maxshape=(None,), chunks=(CHUNK,), compression="gzip")
        for name, kind in (("data", "int32"), ("indices", "int64"))
    }
    lengths = [np.zeros(1, np.int64)]
    for span in spans(counts, memory):
        part = counts[span]
        part.sort_indices()
        for name, values in (("data", part.data), ("indices", part.indices)):
            numbers[name].resize(numbers[name].size + len(values), axis=0)
            numbers[name][numbers[name].size - len(values) :] = values
        lengths.append(np.diff(part.indptr).astype(np.int64))
    group.create_dataset("indptr", data=np.cumsum(np.concatenate(lengths)), compression="gzip")
