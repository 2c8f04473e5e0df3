"""Gene panels: chosen on train slices, binned and downsampled; the two panel files of a slice written and read.

These files define the order of the genes. Letters: S spots, G genes of a slice, P genes of a panel.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import scipy.sparse as sp

from utils.files.atomic import whole_file

FILES = {
    "input": "filtered_feature_bc_matrix_one.h5ad",  # what stage one reads
    "target": "filtered_feature_bc_matrix_decoder.h5ad",  # what stage two predicts
}
HIGHEST_BIN = 5  # scBERT's cut


def gather(names: np.ndarray, wanted: list[str]) -> sp.csr_matrix:
    """(G, P) int32 that turns counts (S, G) into (S, P): columns of one name summed, zeros for one not in `names`."""
    columns = columns_of(wanted, names)
    rows = np.flatnonzero(columns >= 0)
    return sp.csr_matrix((np.ones(len(rows), np.int32), (rows, columns[rows])), shape=(len(names), len(wanted)))


def common_genes(slices: list[np.ndarray]) -> list[str]:
    """Names that every slice has, in the order of the first slice."""
    shared = set(slices[0]).intersection(*slices[1:])
    return [str(gene) for gene in slices[0] if gene in shared]


def columns_of(names: Sequence[str] | np.ndarray, genes: Sequence[str] | np.ndarray) -> np.ndarray:
    """Place of each gene in `names`, -1 where it is not there: (len(genes),)."""
    place = {name: i for i, name in enumerate(names)}
    return np.array([place.get(gene, -1) for gene in genes])


@dataclass(frozen=True)
class Profile:
    """What the choice of a panel needs of one slice: sums per gene over its train spots, in the order of `names`."""

    names: np.ndarray  # (G,), each once
    n_spots: int
    totals: np.ndarray  # (G,) counts
    mean: np.ndarray  # (G,) counts per 10,000 of the spot
    squares: np.ndarray  # (G,) squared deviations from that mean, summed


def no_spots(names: np.ndarray) -> Profile:
    """The profile to merge others into."""
    return Profile(names, 0, np.zeros(len(names), np.int64), np.zeros(len(names)), np.zeros(len(names)))


def profile(counts: sp.csr_matrix, names: np.ndarray) -> Profile:
    """Of counts (S, G), none of them stored twice."""
    n_spots, n_genes = counts.shape
    if not n_spots:
        return no_spots(names)
    totals = np.asarray(counts.sum(0)).ravel()
    scale = 1e4 / np.maximum(np.asarray(counts.sum(1)).ravel(), 1)
    per_10k = counts.data * np.repeat(scale, np.diff(counts.indptr))
    mean = np.bincount(counts.indices, per_10k, n_genes) / n_spots
    unseen = n_spots - np.bincount(counts.indices, minlength=n_genes)
    per_10k -= mean[counts.indices]
    squares = np.bincount(counts.indices, np.square(per_10k, out=per_10k), n_genes) + unseen * mean**2
    return Profile(names, n_spots, totals, mean, squares)


def merged(first: Profile, second: Profile) -> Profile:
    """The profile of both sets of spots, without the cancellation of sums of squares (Chan, Golub, LeVeque 1979)."""
    n_spots = first.n_spots + second.n_spots
    fraction, difference = second.n_spots / max(n_spots, 1), second.mean - first.mean
    squares = first.squares + second.squares + difference**2 * first.n_spots * fraction
    return Profile(first.names, n_spots, first.totals + second.totals, first.mean + difference * fraction, squares)


def highest_expressed(slices: list[Profile], n: int) -> list[str]:
    """The n common genes with the highest total count, averaged over slices (the published rule)."""
    common = common_genes([slice_.names for slice_ in slices])
    totals = [slice_.totals[columns_of(slice_.names, common)] for slice_ in slices]
    order = np.argsort(-np.mean(totals, axis=0), kind="stable")
    return [common[i] for i in order[:n]]


def _dispersions(slice_: Profile, columns: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Dispersion of some genes of a slice, relative to genes of similar mean, and whether they have counts: (P,) both.

    log(variance / mean) of the counts per 10,000, standardised within 20 bins of equal width of log(1 + mean); a gene
    alone in its bin gets 1, one without counts 0, one that does not vary NaN (Satija 2015, scanpy's `seurat` flavour).
    """
    import pandas as pd

    mean, variance = slice_.mean[columns], slice_.squares[columns] / max(slice_.n_spots - 1, 1)
    seen, standardised = mean > 0, np.zeros(len(columns))
    if seen.any():
        dispersion = pd.Series(np.log(np.where(variance > 0, variance, np.nan)[seen] / mean[seen]))
        bins = dispersion.groupby(pd.cut(np.log1p(mean[seen]), bins=20, labels=False))
        centre, sd = bins.transform("mean"), bins.transform("std")
        alone = sd.isna()
        above, width = (dispersion - centre.mask(alone, 0)).round(12), sd.mask(alone, centre).round(12)
        standardised[seen] = (above / width).round(9)  # two in a bin are 1/sqrt(2) off, whatever the rounding errors
    return standardised, seen


def _highest(dispersions: np.ndarray, seen: np.ndarray, n: int) -> np.ndarray:
    """Whether a gene is among the n most dispersed of a slice, with all that equal the last of them: (P,) bool."""
    ranked = np.sort(dispersions[seen & ~np.isnan(dispersions)])[::-1]
    return seen & (dispersions >= ranked[min(n, len(ranked)) - 1]) if len(ranked) else np.zeros(len(seen), bool)


def highly_variable(slices: list[Profile], n: int) -> list[str]:
    """The n common genes that vary most: among the n most dispersed of most slices, then by mean dispersion.

    Equal to scanpy's `highly_variable_genes(flavor="seurat", batch_key=slice)` on log1p counts per 10,000, ties by
    name. scanpy itself needs the matrices of all train slices in memory (8 of 2,000 spots and 17,000 genes: 1.5 GB and
    16 s); sums per gene take one span of spots at a time (0.5 GB, 2 s).
    """
    common = common_genes([slice_.names for slice_ in slices])
    if len(common) <= n:
        return common
    per_slice = [_dispersions(slice_, columns_of(slice_.names, common)) for slice_ in slices if slice_.n_spots]
    n_slices = np.sum([_highest(dispersions, seen, n) for dispersions, seen in per_slice], axis=0)
    values = np.array([dispersions for dispersions, _ in per_slice])
    defined = ~np.isnan(values)
    mean = np.where(defined, values, 0).sum(0) / np.where(defined.any(0), defined.sum(0), np.nan)  # NaN sorts last
    chosen = set(np.lexsort((common, -mean, -n_slices))[:n])
    return [gene for i, gene in enumerate(common) if i in chosen]


def bin_tokens(counts: np.ndarray, total_counts: np.ndarray, out: np.ndarray | None = None) -> np.ndarray:
    """scBERT's tokens: floor(log2(1 + counts per 10,000)) cut at 5; (S, P), (S,) -> (S, P) uint8, in `out` if given."""
    out = np.empty(counts.shape, np.uint8) if out is None else out
    step = max(2**18 // max(counts.shape[1], 1), 1)  # spots at a time: 2 MiB of doubles, not 8 bytes for each count
    for first in range(0, len(counts), step):
        rows = slice(first, first + step)
        per_10k = counts[rows] * (1e4 / total_counts[rows, None])
        out[rows] = np.minimum(np.floor(np.log2(1 + per_10k)), HIGHEST_BIN)
    return out


def spot_seeds(slice_name: str, barcodes: np.ndarray) -> np.ndarray:
    """A seed for each spot, a hash of its slice's name and its barcode: (S,) uint64."""
    digests = (hashlib.sha256(f"{slice_name}\n{barcode}".encode()).digest() for barcode in barcodes)
    return np.array([int.from_bytes(digest[:8], "little") for digest in digests], np.uint64)


def downsample_counts(
    counts: np.ndarray, total_counts: np.ndarray, depth: int, seeds: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """`depth` of the counts of each spot, drawn without replacement over all its genes; spots with fewer stay.

    What is drawn of each panel gene, and of all other genes together, is multivariate hypergeometric: the whole matrix
    is not needed. The same seeds give the same counts.

    Parameters
    ----------
    counts : (S, P) whole numbers, of the panel's genes
    total_counts : (S,) over all genes of the slice
    depth : what no spot's total is above afterwards
    seeds : (S,) of `spot_seeds`

    Returns
    -------
    Counts (S, P) and total counts (S,), of the types given. Raises ValueError where a total is below the panel's sum.
    """
    sampled, totals = counts.copy(), np.minimum(total_counts, depth).astype(total_counts.dtype)
    for spot in np.flatnonzero(total_counts > depth):
        genes = np.flatnonzero(counts[spot])  # a few of 16,906
        numbers = counts[spot, genes].astype(np.int64)
        rest = int(total_counts[spot]) - numbers.sum()
        if rest < 0:
            raise ValueError(
                f"spot {spot}: expected a total over all genes, found {total_counts[spot]:g} below the {numbers.sum()} "
                "counts of its panel genes; run make_decoder_data.py again"
            )
        draws = np.random.default_rng(int(seeds[spot]))
        sampled[spot, genes] = draws.multivariate_hypergeometric([*numbers, rest], depth, method="marginals")[:-1]
    return sampled, totals


def panel_hash(genes: list[str]) -> str:
    return hashlib.sha256("\n".join(genes).encode()).hexdigest()


@dataclass(frozen=True)
class Panel:
    """One panel file: its spots, its genes, and how they were chosen. The counts stay in the file until `read_counts`:
    slices that are not worked on take no memory."""

    path: Path
    rows: np.ndarray  # (S,) of the file, in its order
    genes: list[str]
    measured: np.ndarray  # (P,) bool: the slice has this gene
    barcodes: np.ndarray  # (S,)
    total_counts: np.ndarray  # (S,) over all genes of the slice
    xy_fullres_px: np.ndarray  # (S, 2)
    pitch_fullres_px: float
    train_slices: list[str]  # that the panel was chosen on
    counts_hash: str
    val_strip: bool = False  # whether the spots of validation strips were left out of the choice
    files_hash: str = ""  # of the slice's matrix and positions that it was written from
    columns: np.ndarray | None = None  # (P,) of the file, -1 for a gene that it lacks; None: all, in its order

    def read_counts(self) -> np.ndarray:
        """Raw counts (S, P) int32 of the panel's genes, read from the file; zeros for a gene that the file lacks."""
        import h5py
        from anndata.io import read_elem

        with h5py.File(self.path) as file:
            stored = read_elem(file["X"])
        counts = np.asarray(stored[self.rows].toarray() if sp.issparse(stored) else stored[self.rows]).astype(np.int32)
        return counts if self.columns is None else np.where(self.columns >= 0, counts[:, self.columns], 0)

    def select_spots(self, rows: np.ndarray) -> Panel:
        """The panel file for some of its spots (n,)."""
        per_spot = ("rows", "barcodes", "total_counts", "xy_fullres_px")
        return replace(self, **{name: getattr(self, name)[rows] for name in per_spot})

    def like(self, other: Panel) -> Panel:
        """The panel file with the lists of another one where they are equal, which are then kept once."""
        names = [name for name in ("genes", "train_slices") if getattr(self, name) == getattr(other, name)]
        return replace(self, **{name: getattr(other, name) for name in names})

    def select_genes(self, wanted: list[str]) -> Panel:
        """The panel file for other genes, in their order: one that it lacks has zero counts and is not measured."""
        if wanted == self.genes:
            return self
        place = columns_of(self.genes, wanted)
        measured = (place >= 0) & self.measured[place]
        columns = place if self.columns is None else np.where(place >= 0, self.columns[place], -1)
        return replace(self, genes=list(wanted), measured=measured, columns=columns)


def panel_path(data: Path, panels: Path | None, slice_name: str, role: str) -> Path:
    """The panel file of a slice: in the slice's folder, or below --panels."""
    return (data if panels is None else panels) / slice_name / FILES[role]


def write_panel(path: Path, adata: Any, blocks: Iterable[sp.csr_matrix]) -> None:
    """Write a panel file whose counts come in blocks of spots, under a temporary name that is then renamed."""
    import h5py
    from anndata.io import sparse_dataset, write_elem

    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path, ending=".h5ad") as part:
        adata.write_h5ad(part)
        with h5py.File(part, "a") as file:
            for block in blocks:
                if "X" in file:
                    sparse_dataset(file["X"]).append(block)
                else:
                    write_elem(file, "X", block)


def read_panel(path: Path) -> Panel:
    """Raises ValueError where the file is missing, corrupt, or not one that make_decoder_data.py wrote."""
    import h5py

    if not path.exists():
        raise ValueError(
            f"{path}: expected a panel file, found none; run make_decoder_data.py, or give the folder with --panels"
        )
    try:
        with h5py.File(path) as file:
            note, genes, spots = file["uns/magic"], file["var"], file["obs"]
            barcodes = _texts(spots[spots.attrs["_index"]])
            return Panel(
                path=path,
                rows=np.arange(len(barcodes)),
                genes=_texts(genes[genes.attrs["_index"]]).tolist(),
                measured=genes["measured"][:].astype(bool),
                barcodes=barcodes.astype(str),
                total_counts=spots["total_counts"][:].astype(np.float64),
                xy_fullres_px=file["obsm/spatial"][:].astype(np.float64),
                pitch_fullres_px=float(note["spot_pitch_fullres_px"][()]),
                train_slices=np.atleast_1d(_texts(note["train_slices"])).tolist(),
                counts_hash=str(_texts(note["counts_hash"])),
                val_strip="val_strip" in note and bool(note["val_strip"][()]),
                files_hash=str(_texts(note["files_hash"])) if "files_hash" in note else "",
            )
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{path}: expected a file of make_decoder_data.py, found {error}; run make_decoder_data.py again"
        ) from error


def _texts(stored: Any) -> np.ndarray:
    """Text of a panel file as anndata stores it, one or many. anndata itself, which takes four times as long for a file
    of a thousand slices, is asked only for kinds of arrays that have more parts than their text."""
    import h5py

    if isinstance(stored, h5py.Dataset):
        return np.asarray(stored.asstr()[()], object)
    from anndata.io import read_elem

    return np.asarray(read_elem(stored), object)
