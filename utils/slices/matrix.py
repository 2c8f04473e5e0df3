"""Count matrices as Space Ranger writes them: HDF5, or a folder of matrix.mtx, features.tsv and barcodes.tsv.

Shapes: S spots, G genes. Whatever is wrong with a file is a ValueError of one line: the file, what was expected, what
was found, how to mend it.
"""

import csv
import hashlib
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import h5py
import numpy as np
import pandas as pd
from scipy.sparse import coo_matrix, csr_matrix

MATRICES = (
    *("filtered_feature_bc_matrix.h5", "filtered_feature_bc_matrix"),
    *("raw_feature_bc_matrix.h5", "raw_feature_bc_matrix"),
)


@dataclass(frozen=True)
class CountMatrix:
    """Raw counts as the file has them: counts (S, G) int32, the rest str; gene names may repeat, barcodes do not."""

    counts: csr_matrix
    barcodes: np.ndarray
    genes: np.ndarray
    gene_ids: np.ndarray


@contextmanager
def reading(path: Path, expected: str) -> Iterator[None]:
    """Turn whatever a library says about a damaged file into one line that names the file."""
    try:
        yield
    except (OSError, EOFError, KeyError, ValueError, TypeError, OverflowError, RuntimeError, zlib.error) as error:
        found = " ".join(str(error).split())[:200] or type(error).__name__
        raise ValueError(f"{path}: expected {expected}, found: {found}; copy or export the file again") from error


def first_of(folder: Path, names: Iterable[str]) -> Path | None:
    return next((folder / name for name in names if (folder / name).exists()), None)


def listing(folder: Path) -> str:
    return ", ".join(sorted(p.name for p in folder.iterdir())[:12]) or "an empty folder"


def check_once(path: Path, barcodes: np.ndarray) -> None:
    repeated = pd.Index(barcodes).duplicated()
    if repeated.any():
        raise ValueError(f"{path}: expected each barcode once, found {barcodes[repeated][0]} again; remove one of them")


def _text(dataset: h5py.Dataset) -> np.ndarray:
    return np.asarray(dataset.asstr()[:], dtype=str)


def _h5_group(file: h5py.File) -> h5py.Group:
    """`matrix`, or the only group: Cell Ranger 2 named it after the genome."""
    return file["matrix"] if "matrix" in file or len(file) != 1 else file[next(iter(file))]


def _read_h5(path: Path) -> tuple[csr_matrix, list[np.ndarray]]:
    """Counts (S, G) of any number type, and names, ids and kinds (G,) of the features."""
    with reading(path, "a 10x matrix in HDF5"), h5py.File(path, "r") as file:
        group = _h5_group(file)
        shape = (int(group["shape"][1]), int(group["shape"][0]))
        # genes x barcodes in columns is barcodes x genes in rows: nothing is moved
        counts = csr_matrix((group["data"][:], group["indices"][:], group["indptr"][:]), shape=shape)
        counts.check_format(full_check=True)
        if "features" not in group:
            names, ids = _text(group["gene_names"]), _text(group["genes"])
            return counts, [names, ids, np.full(len(names), "Gene Expression")]
        return counts, [_text(group["features"][key]) for key in ("name", "id", "feature_type")]


def _read_tsv(path: Path) -> pd.DataFrame:
    with reading(path, "a table of text separated by tabs"):
        return pd.read_csv(path, sep="\t", header=None, dtype=str, keep_default_na=False, quoting=csv.QUOTE_NONE)


def _part(folder: Path, name: str) -> Path:
    path = first_of(folder, (name, name + ".gz"))
    if path is None:
        raise ValueError(f"{folder}: expected {name} or {name}.gz, found {listing(folder)}; add the file")
    return path


def _read_folder(folder: Path) -> tuple[csr_matrix, list[np.ndarray]]:
    """The same as _read_h5, from matrix.mtx and features.tsv (symbol; id, symbol; or id, symbol, kind)."""
    from scipy.io import mmread

    path = _part(folder, "matrix.mtx")
    with reading(path, "a Matrix Market file"):
        counts = csr_matrix(mmread(path).T)
    table = _read_tsv(_part(folder, "features.tsv"))
    ids, names = (table[column].to_numpy(dtype=str) for column in (0, min(1, table.shape[1] - 1)))
    kinds = table[2].to_numpy(dtype=str) if table.shape[1] > 2 else np.full(len(table), "Gene Expression")
    return counts, [names, ids, kinds]


def _whole_numbers(path: Path, values: np.ndarray) -> np.ndarray:
    """Counts as int32; files made outside Space Ranger may hold whole numbers as floats."""
    whole = values == np.rint(values) if values.dtype.kind == "f" else values.dtype.kind in "iu"
    bad = ~((values >= 0) & (values <= np.iinfo(np.int32).max) & whole)  # NaN fails every comparison
    if bad.any():
        raise ValueError(f"{path}: expected raw counts (0, 1, 2, ...), found {values[bad][0]}; give the raw matrix")
    return values.astype(np.int32)


def _barcodes(path: Path) -> np.ndarray:
    """The barcodes (S,) of either form of matrix."""
    if path.is_dir():
        path = _part(path, "barcodes.tsv")
        barcodes = _read_tsv(path)[0].to_numpy(dtype=str)
    else:
        with reading(path, "a 10x matrix in HDF5"), h5py.File(path, "r") as file:
            barcodes = _text(_h5_group(file)["barcodes"])
    check_once(path, barcodes)
    return barcodes


def slice_matrix(root: Path) -> Path | None:
    """The matrix that a slice is read from, None without any; one of probes in place of genes is refused."""
    path = first_of(root, MATRICES)
    if path is not None and path.is_file():
        with reading(path, "a 10x matrix in HDF5"), h5py.File(path, "r") as file:
            of_probes = "matrix/features/probe_region" in file
        if of_probes:
            raise ValueError(f"{path}: expected counts per gene, found a probe-level matrix; give the one per gene")
    return path


def read_barcodes(root: str | Path) -> np.ndarray | None:
    """Read the barcodes (S,) alone; None where the slice has no counts."""
    path = slice_matrix(Path(root))
    return None if path is None else _barcodes(path)


def read_matrix(root: str | Path) -> CountMatrix:
    """Read a count matrix: the one of a slice's root (filtered before raw, HDF5 before folder), or the path itself.

    Only features of the kind "Gene Expression" are kept.
    """
    root = Path(root)
    itself = root.is_file() or first_of(root, ("matrix.mtx", "matrix.mtx.gz")) is not None
    path = root if itself else first_of(root, MATRICES)
    if path is None:
        found = listing(root) if root.is_dir() else "nothing"
        raise ValueError(f"{root}: expected counts ({', '.join(MATRICES)}), found {found}; add or rename the matrix")
    (counts, features), barcodes = (_read_folder if path.is_dir() else _read_h5)(path), _barcodes(path)
    lengths = {counts.shape[1], *map(len, features)}
    if counts.shape[0] != len(barcodes) or len(lengths) != 1:
        found = f"{counts.shape[0]} x {counts.shape[1]} counts, {len(barcodes)} barcodes, {len(features[0])} features"
        raise ValueError(f"{path}: expected spots x genes of one size, found {found}; export the matrix again")
    of_genes = features[2] == "Gene Expression"
    if not of_genes.any():
        raise ValueError(f"{path}: expected features of the kind Gene Expression, found {sorted(set(features[2]))}")
    counts.data = _whole_numbers(path, counts.data)
    counts = counts if of_genes.all() else counts[:, of_genes]
    counts.sum_duplicates()
    counts.eliminate_zeros()
    return CountMatrix(counts, barcodes, features[0][of_genes], features[1][of_genes])


def _ranks(names: np.ndarray, used: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Sorted names of the used places, and the rank of every used place among them (S,) or (G,)."""
    kept, inverse = np.unique(np.asarray(names, dtype=str)[used], return_inverse=True)
    ranks = np.zeros(len(used), dtype=np.int64)
    ranks[used] = inverse
    return kept, ranks


def counts_hash(counts: csr_matrix, barcodes: np.ndarray, genes: np.ndarray) -> str:
    """SHA-256 of what was counted: the same for any order of spots and genes, with or without genes never seen.

    Parameters
    ----------
    counts : csr_matrix (S, G) of whole numbers
    barcodes : ndarray (S,) of str
    genes : ndarray (G,) of str; counts of a repeated name are added, so that their order is irrelevant too
    """
    triples = coo_matrix(counts)
    seen = triples.data != 0
    spot, gene, value = triples.row[seen], triples.col[seen], triples.data[seen].astype(np.int64)
    spots, spot_rank = _ranks(barcodes, np.bincount(spot, minlength=counts.shape[0]) > 0)
    names, gene_rank = _ranks(genes, np.bincount(gene, minlength=counts.shape[1]) > 0)
    ordered = coo_matrix((value, (spot_rank[spot], gene_rank[gene])), shape=(len(spots), len(names))).tocsr()
    ordered.sort_indices()  # already sorted by the sums that SciPy takes, which it does not promise
    digest = hashlib.sha256("\n".join([*spots, "", *names, ""]).encode())
    for part in (ordered.indptr, ordered.indices, ordered.data):
        digest.update(part.astype("<i8").tobytes())  # one width on every machine
    return digest.hexdigest()
