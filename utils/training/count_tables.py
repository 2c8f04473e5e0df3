"""Count tables without images: any folder of h5ad files, brought to the input panel to pretrain the gene encoder.

A file with the name of a validation or test slice, with its counts, or with a spot of the same counts is
refused. Letters: S spots, G input genes, A genes of a file.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import scipy.sparse as sp

from utils import words
from utils.features.dataset import SliceData
from utils.genes import names as gene_names
from utils.genes import panels as gene_panels
from utils.settings import SharedSettings
from utils.slices import content, splits
from utils.slices.matrix import whole_counts

LEAST_SEEN = 10  # panel genes that a spot must express before another one of the same counts is taken for the same spot


@dataclass(frozen=True)
class CountTable:
    """Spots of one file to pretrain on."""

    name: str
    bins: np.ndarray  # (S, G) uint8; genes that the file lacks are zero
    measured: np.ndarray  # (G,) bool
    counts_hash: str


@dataclass(frozen=True)
class HeldOut:
    """What no table may hold."""

    names: set[str]
    hashes: dict[str, str]  # slice by hash of its counts
    counts: list[tuple[str, np.ndarray]]  # slice, panel counts (S, G)


def read_tables(
    folder: Path,
    slices: list[SliceData],
    rows: list[splits.SliceRow],
    settings: SharedSettings,
    downsample_counts: int | None = None,
) -> list[CountTable]:
    """Read every `*.h5ad` of a folder and report on each in a line.

    Raises ValueError where a file is not one of raw counts, has under half of the panel's genes, or holds held-out
    spots.

    Parameters
    ----------
    slices : of the train and validation part
    rows : the whole table with the test slices
    settings : data, panels, allow_leak
    downsample_counts : spots with more counts are downsampled to it
    """
    paths = sorted(folder.glob("*.h5ad")) if folder.is_dir() else []
    if not paths:
        found = "no such file in it" if folder.is_dir() else "no such folder"
        raise ValueError(f"--pretrain_data: expected a folder of .h5ad files, found {found}: {folder}; fix the path")
    panel, held_out = slices[0].panels["input"].genes, find_held_out(slices, rows, settings)
    return [read_one(path, panel, held_out, settings.allow_leak, downsample_counts) for path in paths]


def find_held_out(slices: list[SliceData], rows: list[splits.SliceRow], settings: SharedSettings) -> HeldOut:
    """Spots of the validation part, also where it is a strip, and of the test slices, read from their panel files."""
    names = {row.slice for row in rows if row.part != "train"}
    hashes, counts = {}, []
    for slice_ in slices:
        val_rows, panel = slice_.rows_of("val"), slice_.panels["input"]
        if len(val_rows):
            hashes[panel.counts_hash] = slice_.name
            counts.append((slice_.name, panel.read_counts()[val_rows]))
    for row in splits.of_part(rows, "test"):
        panel = gene_panels.read_panel(gene_panels.panel_path(settings.data, settings.panels, row.slice, "input"))
        if panel.genes != slices[0].panels["input"].genes:
            raise ValueError(
                f"{panel.path}: expected the input genes of {slices[0].name}, found others, so that --pretrain_data "
                "cannot be checked against this test slice; run make_decoder_data.py again on all slices"
            )
        hashes[panel.counts_hash] = row.slice
        counts.append((row.slice, panel.read_counts()))
    return HeldOut(names, hashes, counts)


def read_one(
    path: Path, panel: list[str], held_out: HeldOut, allow_leak: bool, downsample_counts: int | None
) -> CountTable:
    names, barcodes, counts, total = read_counts(path)
    called = gene_names.renamed(names, panel, gene_names.known_names(None, {}))
    measured = np.isin(panel, called)
    if 2 * measured.sum() < len(panel):
        raise ValueError(
            f"{path}: expected at least half of the {len(panel)} input genes by name in var, found {measured.sum()} "
            f"(it has {names[0]}, ..., they are {panel[0]}, ...); rename its genes, or take the file away"
        )
    of_panel = (counts @ gene_panels.gather(called, panel)).toarray().astype(np.int32)
    counts_hash = content.counts_hash(counts, barcodes, names)
    for leak in leaks(path, of_panel, measured, counts_hash, held_out):
        if not allow_leak:
            raise ValueError(f"{leak}; take the file out of --pretrain_data, or use --allow_leak and report it")
        print(f"warning: {leak}")
    kept = np.flatnonzero(total > 0)
    notes = [f"{(~measured).sum()} of {len(panel)} input genes absent, read as zero"] if not measured.all() else []
    without = len(total) - len(kept)
    notes += [f"{words.count_of(without, 'spot')} without a count left out"] if without else []
    size = [words.count_of(len(kept), "spot"), words.count_of(measured.sum(), "input gene")]
    print(f"{path.name}: {', '.join([*size, *notes])}")
    of_panel, total = of_panel[kept], total[kept]
    if downsample_counts:
        seeds = gene_panels.spot_seeds(path.stem, barcodes[kept])
        of_panel, total = gene_panels.downsample_counts(of_panel, total, downsample_counts, seeds)
    return CountTable(path.stem, gene_panels.bin_tokens(of_panel, total), measured, counts_hash)


def read_counts(path: Path) -> tuple[np.ndarray, np.ndarray, sp.csr_matrix, np.ndarray]:
    """Gene names (A,), barcodes (S,), counts (S, A) and all counts of each spot (S,): those of obs, else the sums.

    Control features are left out, names that were made unique are merged.
    """
    import anndata

    try:
        adata = anndata.read_h5ad(path)
        counts = sp.csr_matrix(adata.X)
        total = adata.obs["total_counts"].to_numpy(np.float64) if "total_counts" in adata.obs else None
    except Exception as error:  # whatever a corrupt file makes HDF5 or anndata stumble over
        reason = words.cut(error)
        raise ValueError(f"{path}: expected an h5ad file with counts in X, found: {reason}; write it again") from error
    counts.data = whole_counts(f"{path}, X", counts.data)
    names = gene_names.without_unique_suffixes(adata.var_names.to_numpy())
    of_genes = ~gene_names.are_controls(names)
    if not of_genes.all():
        print(f"{path.name}: {words.count_of((~of_genes).sum(), 'control feature')} left out")
    names, counts = names[of_genes], counts[:, of_genes].astype(np.int64)
    counts.sum_duplicates()
    sums = np.asarray(counts.sum(1)).ravel()
    total = sums.astype(np.float64) if total is None else total
    below = ~(np.isfinite(total) & (total >= sums))
    if below.any():
        raise ValueError(
            f"{path}: expected obs['total_counts'] of at least the spot's counts, found {total[below][0]:g} where they "
            f"are {sums[below][0]}; fix or remove the column"
        )
    return names, adata.obs_names.to_numpy(str), counts, total


def leaks(path: Path, counts: np.ndarray, measured: np.ndarray, counts_hash: str, held_out: HeldOut) -> Iterator[str]:
    """Which held-out names, counts and spots a file with panel counts (S, G) has, a line each."""
    if path.stem in held_out.names:
        yield f"{path}: has the name of the slice {path.stem}, which is held out"
    if counts_hash in held_out.hashes:
        yield f"{path}: has the counts of {held_out.hashes[counts_hash]}, which is held out"
    keys = spot_keys(counts[:, measured])
    for name, others in held_out.counts:
        shared = len(keys & spot_keys(others[:, measured]))
        if shared:
            yield f"{path}: has {shared} spots with the counts of spots of {name} that are held out"


def spot_keys(counts: np.ndarray) -> set[bytes]:
    """The counts of every spot that expresses enough genes to be recognised by them: (S, A) int32."""
    return {row.tobytes() for row in counts[(counts > 0).sum(1) >= LEAST_SEEN]}
