"""Genes: names made unique, panels chosen on train slices, the two panel files per slice written and read.

The order of genes lives in these files. Letters: S spots, G genes of a slice, P genes of a panel.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import scipy.sparse as sp

FILES = {
    "input": "filtered_feature_bc_matrix_one.h5ad",  # what stage one reads
    "target": "filtered_feature_bc_matrix_decoder.h5ad",  # what stage two predicts
}
N_BINS = 5  # the highest bin; scBERT's cut


def is_ensembl(name: str) -> bool:
    return name.startswith("ENS") and name[-1:].isdigit()


def symbols_by_id(names: np.ndarray, ids: np.ndarray) -> dict[str, str]:
    """Ensembl id without version -> symbol, as far as one slice's features table tells."""
    pairs = zip(ids, names, strict=True)
    return {str(i).split(".")[0]: str(n) for i, n in pairs if is_ensembl(str(i)) and not is_ensembl(str(n))}


def unique_genes(
    counts: sp.csr_matrix, names: np.ndarray, symbols: dict[str, str]
) -> tuple[sp.csr_matrix, np.ndarray, int]:
    """Ensembl names turned into symbols where a slice's table knows them, then counts of one name summed.

    counts (S, G), names (G,) -> counts (S, G'), names (G',) in the order of first appearance, number of names summed.
    """
    mapped = np.array([symbols.get(n.split(".")[0], n) if is_ensembl(n) else n for n in names.astype(str)])
    unique, first, inverse = np.unique(mapped, return_index=True, return_inverse=True)
    order = np.argsort(first)
    if len(unique) == len(mapped):
        return counts, mapped, 0
    place = np.empty(len(order), int)
    place[order] = np.arange(len(order))
    gather = sp.csr_matrix((np.ones(len(mapped), counts.dtype), (np.arange(len(mapped)), place[inverse])))
    return (counts @ gather).tocsr(), unique[order], len(mapped) - len(unique)


def read_gene_list(path: Path) -> list[str]:
    """One gene name per line (the first column of a table). Raises ValueError on an empty list or a name twice."""
    if not path.is_file():
        raise ValueError(f"{path}: expected a text file with one gene per line, found none")
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: expected UTF-8 text with one gene per line, found {error.reason}") from error
    genes = [line.replace(",", "\t").split("\t")[0].strip() for line in lines]
    genes = [gene for gene in genes if gene and not gene.startswith("#")]
    if not genes:
        raise ValueError(f"{path}: expected one gene per line, found none")
    twice = {gene for gene in genes if genes.count(gene) > 1} if len(set(genes)) < len(genes) else set()
    if twice:
        raise ValueError(f"{path}: {len(twice)} genes stand twice (first: {min(twice)}); keep one of each")
    return genes


def read_vocabulary(path: Path) -> list[str]:
    """Genes in the order of gene2vec's rows: the var_names of an h5ad, or the lines of a text file."""
    if path.suffix != ".h5ad":
        return read_gene_list(path)
    import anndata

    try:
        return [str(gene) for gene in anndata.read_h5ad(path, backed="r").var_names]
    except (OSError, KeyError) as error:
        raise ValueError(f"{path}: expected an h5ad file with genes in var, found {error}") from error


def common_genes(slices: list[np.ndarray]) -> list[str]:
    """Names that every slice has, in the order of the first slice."""
    shared = set(slices[0]).intersection(*slices[1:])
    return [str(gene) for gene in slices[0] if gene in shared]


def columns_of(names: np.ndarray, genes: list[str]) -> np.ndarray:
    """Place of each gene in `names`, -1 where it is not there: (len(genes),)."""
    place = {name: i for i, name in enumerate(names)}
    return np.array([place.get(gene, -1) for gene in genes])


def highest_expressed(slices: list[tuple[sp.csr_matrix, np.ndarray]], n: int) -> list[str]:
    """The n common genes with the highest total count, averaged over slices (the published rule)."""
    common = common_genes([names for _, names in slices])
    totals = [np.asarray(counts.sum(0)).ravel()[columns_of(names, common)] for counts, names in slices]
    order = np.argsort(-np.mean(totals, axis=0), kind="stable")
    return [common[i] for i in order[:n]]


def highly_variable(slices: list[tuple[sp.csr_matrix, np.ndarray]], n: int) -> list[str]:
    """The n common genes that vary most, by scanpy's `seurat` flavour per slice on log1p counts per 10,000."""
    import anndata
    import scanpy

    common = common_genes([names for _, names in slices])
    if len(common) <= n:
        return common
    blocks, batch = [], []
    for i, (counts, names) in enumerate(slices):
        total = np.maximum(np.asarray(counts.sum(1)), 1)
        blocks.append(counts[:, columns_of(names, common)].multiply(1e4 / total).log1p())
        batch += [str(i)] * counts.shape[0]
    stacked = anndata.AnnData(sp.vstack(blocks, format="csr").astype(np.float32), obs={"slice": batch})
    scanpy.pp.highly_variable_genes(stacked, n_top_genes=n, flavor="seurat", batch_key="slice")
    return [gene for gene, chosen in zip(common, stacked.var["highly_variable"], strict=True) if chosen]


def bin_tokens(counts: np.ndarray, total_counts: np.ndarray) -> np.ndarray:
    """scBERT's tokens: floor(log2(1 + counts per 10,000)) cut at 5; (S, P), (S,) -> (S, P) uint8."""
    per_10k = counts * (1e4 / total_counts[:, None])
    return np.minimum(np.floor(np.log2(1 + per_10k)), N_BINS).astype(np.uint8)


def panel_hash(genes: list[str]) -> str:
    return hashlib.sha256("\n".join(genes).encode()).hexdigest()


@dataclass(frozen=True)
class Panel:
    """One panel file: counts (S, P) int32 of the panel's genes, and what it says of the slice and of the choice."""

    path: Path
    counts: np.ndarray
    genes: list[str]
    measured: np.ndarray  # (P,) bool: the slice has this gene
    barcodes: np.ndarray  # (S,)
    total_counts: np.ndarray  # (S,) over all genes of the slice
    xy_fullres_px: np.ndarray  # (S, 2)
    pitch_fullres_px: float
    train_slices: list[str]  # that the panel was chosen on
    counts_hash: str


def panel_path(data: Path, panels: Path | None, slice_name: str, role: str) -> Path:
    """Where the panel file of a slice lies: in the slice's folder, or below --panels."""
    return (data if panels is None else panels) / slice_name / FILES[role]


def read_panel(path: Path) -> Panel:
    """Raises ValueError where the file is missing, torn, or not one that make_decoder_data.py wrote."""
    import anndata

    if not path.exists():
        raise ValueError(f"{path}: expected a panel file, found none; run make_decoder_data.py first")
    try:
        adata = anndata.read_h5ad(path)
        note = adata.uns["magic"]
        counts = np.asarray(adata.X.toarray() if sp.issparse(adata.X) else adata.X).astype(np.int32)
        return Panel(
            path=path,
            counts=counts,
            genes=[str(g) for g in adata.var_names],
            measured=adata.var["measured"].to_numpy(bool),
            barcodes=adata.obs_names.to_numpy(str),
            total_counts=adata.obs["total_counts"].to_numpy(np.float64),
            xy_fullres_px=np.asarray(adata.obsm["spatial"], np.float64),
            pitch_fullres_px=float(note["spot_pitch_fullres_px"]),
            train_slices=[str(s) for s in np.atleast_1d(note["train_slices"])],
            counts_hash=str(note["counts_hash"]),
        )
    except (OSError, KeyError) as error:
        raise ValueError(
            f"{path}: expected a file of make_decoder_data.py, found {error}; run make_decoder_data.py again"
        ) from error
