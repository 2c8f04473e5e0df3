"""Which analyses of predicted expression agree with those of the measured one, and which mislead?

    python -m benchmarks.downstream --predictions predicted/predictions.h5ad

Reads a predictions.h5ad that holds both, of a slice with counts by predict_slide.py or of test slices by
decoder_similarity.py, and computes every figure on X and on the layer `measured`, in the scale of the model's target.
Prints a table per slice; --keep puts it into docs/downstream.md. Clusters need the package igraph (pip install igraph).

Shapes: S spots of a slice, G genes that were measured and vary.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.record import machine_name, put_into, table_lines
from utils import arguments
from utils import settings as shared_settings
from utils.evaluation import metrics
from utils.evaluation.bootstrap import blocks
from utils.slices.lattice import nearest_px

if TYPE_CHECKING:
    from anndata import AnnData
    from scipy.sparse import csr_matrix

PAGE = Path(__file__).resolve().parents[1] / "docs" / "downstream.md"
NEIGHBOUR_PITCHES = 1.2  # the six nearest of a staggered array, the four of a square one
BEST, SIGNATURE, REGION_PITCHES, COMPONENTS = 50, 10, 4, 10
NEIGHBOURS, RESOLUTION = 15, 1.0  # of the clusters: scanpy's defaults
Row = tuple[str, str, str]  # figure, predicted (or both), measured


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The flags of downstream.py."""

    predictions: Path
    seed: int
    keep: bool
    debug: bool


@dataclass(frozen=True)
class Pair:
    """Prediction and measurement of one slice; the genes in the order of falling validation PCC."""

    name: str
    xy: np.ndarray  # (S, 2)
    pitch: float
    predicted: np.ndarray  # (S, G)
    measured: np.ndarray  # (S, G)
    n_left_out: int  # genes that were not measured, or are flat on either side


def parse_args(argv: list[str] | None = None) -> Settings:
    parser = arguments.Parser(__doc__)
    parser.add_argument("--predictions", type=Path, required=True, help="predictions.h5ad of a slice with counts")
    parser.add_argument("--seed", type=arguments.count_or_zero, default=0, help="of the clusters (default: 0)")
    parser.add_argument("--keep", action="store_true", help="put the table into docs/downstream.md")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return Settings(**vars(parser.parse_args(argv)))


# ---- statistics


def neighbour_weights(xy: np.ndarray, pitch: float) -> csr_matrix:
    """1 for each pair of neighbouring spots, both ways: (S, 2) -> (S, S)."""
    from scipy.sparse import csr_matrix
    from scipy.spatial import cKDTree

    pairs = cKDTree(xy).query_pairs(NEIGHBOUR_PITCHES * pitch, output_type="ndarray")
    row, column = np.concatenate([pairs, pairs[:, ::-1]]).T
    return csr_matrix((np.ones(len(row)), (row, column)), shape=(len(xy), len(xy)))


def morans_i(values: np.ndarray, weights: csr_matrix) -> np.ndarray:
    """Spatial autocorrelation of each gene (Moran 1950): (S, G), (S, S) -> (G,). Noise has -1 / (S - 1)."""
    z = values - values.mean(axis=0)
    return len(z) / weights.sum() * (z * (weights @ z)).sum(axis=0) / (z**2).sum(axis=0)


def gene_correlations(values: np.ndarray) -> np.ndarray:
    """Pearson r of each pair of genes: (S, G) -> (G (G - 1) / 2,)."""
    return np.corrcoef(values.T)[np.triu_indices(values.shape[1], 1)]


def component_fractions(values: np.ndarray) -> np.ndarray:
    """Fraction of the variance in each principal component, falling: (S, G) -> (min(S, G),)."""
    squares = np.linalg.svd(values - values.mean(axis=0), compute_uv=False) ** 2
    return squares / squares.sum()


def region_means(values: np.ndarray, regions: np.ndarray) -> np.ndarray:
    """Mean over the spots of each region: (S, G), (S,) -> (regions, G)."""
    sums = np.zeros((regions.max() + 1, values.shape[1]))
    np.add.at(sums, regions, values)
    return sums / np.bincount(regions)[:, None]


def standardised(values: np.ndarray) -> np.ndarray:
    return (values - values.mean(axis=0)) / values.std(axis=0)


def signatures(values: np.ndarray, members: np.ndarray) -> np.ndarray:
    """Means of standardised genes: (S, G), genes of each signature (n, m) -> (S, n)."""
    return standardised(values)[:, members].mean(axis=2)


def programmes(predicted: np.ndarray) -> np.ndarray:
    """Each gene with those whose predictions correlate with its own most: (S, G) -> (G, SIGNATURE at most)."""
    return np.argsort(-np.corrcoef(predicted.T), axis=1, kind="stable")[:, :SIGNATURE]


def clusters(values: np.ndarray, seed: int) -> np.ndarray:
    """Leiden clusters of the spots with scanpy's defaults: (S, G) -> (S,)."""
    import scanpy
    from anndata import AnnData

    adata = AnnData(values.astype(np.float32))
    scanpy.pp.pca(adata, n_comps=min(50, *(side - 1 for side in values.shape)), random_state=seed)
    scanpy.pp.neighbors(adata, n_neighbors=NEIGHBOURS, random_state=seed)
    scanpy.tl.leiden(adata, RESOLUTION, flavor="igraph", n_iterations=2, directed=False, random_state=seed)
    return adata.obs["leiden"].to_numpy(str)


# ---- the file


def read_predictions(path: Path) -> AnnData:
    import anndata

    try:
        adata = anndata.read_h5ad(path)
    except OSError as error:
        raise ValueError(
            f"{path}: expected a predictions.h5ad, found {error}; give what predict_slide.py wrote"
        ) from error
    lacking = [name for name in ("measured", "val_pcc") if name not in (*adata.layers, *adata.var)]
    if lacking or "slice" not in adata.obs or "spatial" not in adata.obsm:
        raise ValueError(
            f"{path}: expected predictions with the layer measured, found layers {', '.join(adata.layers) or 'none'}; "
            "predict a slice folder with counts"
        )
    return adata


def pair_of(adata: AnnData, name: str) -> Pair:
    """One slice of the file. Raises ValueError where fewer than two genes or 30 spots can be compared."""
    one = adata[adata.obs["slice"] == name]
    order = np.argsort(-np.nan_to_num(one.var["val_pcc"].to_numpy(), nan=-2.0), kind="stable")
    predicted, measured = (np.asarray(values, np.float64)[:, order] for values in (one.X, one.layers["measured"]))
    kept = np.isfinite(measured).all(0) & ~metrics.is_flat(np.nan_to_num(measured)) & ~metrics.is_flat(predicted)
    if kept.sum() < 2 or len(one) < 30:
        raise ValueError(
            f"slice {name}: expected 30 spots and two genes that vary, found {len(one)} spots and {kept.sum()} such "
            "genes; give a larger slice"
        )
    xy = np.asarray(one.obsm["spatial"], np.float64)
    pitch = float(np.median(nearest_px(xy)))
    return Pair(name, xy, pitch, predicted[:, kept], measured[:, kept], int((~kept).sum()))


# ---- the tables


def cells(values: Sequence[float], form: str = ".2f") -> tuple[str, str]:
    """Two figures as text."""
    first, second = (format(value, form) for value in values)
    return first, second


def sound_rows(pair: Pair) -> list[Row]:
    """Agreement of what is read of one gene, of regions and of a signature."""
    regions = blocks(pair.xy, pair.pitch, REGION_PITCHES)
    pcc, rho = (f(pair.predicted, pair.measured) for f in (metrics.pearson_per_gene, metrics.spearman_per_gene))
    of_regions = metrics.pearson_per_gene(*(region_means(v, regions) for v in (pair.predicted, pair.measured)))
    best = min(BEST, len(pcc))
    alike, mixed = programmes(pair.predicted[:, :best]), np.arange(min(SIGNATURE, best))[None]
    of_alike, of_mixed = (
        metrics.pearson_per_gene(*(signatures(v, members) for v in (pair.predicted, pair.measured)))
        for members in (alike, mixed)
    )

    def medians(values: np.ndarray) -> tuple[str, str]:
        return cells([np.median(values[:best]), np.median(values)])

    side = f"{REGION_PITCHES} x {REGION_PITCHES} pitches"
    return [
        ("a gene over spots, PCC", *medians(pcc)),
        ("ranking spots by a gene, Spearman", *medians(rho)),
        (f"means of {regions.max() + 1} regions of {side}, PCC", *medians(of_regions)),
        (f"signature of {alike.shape[1]} genes with like predictions, PCC", f"{np.median(of_alike):.2f}", "–"),
        (f"signature of the first {mixed.shape[1]} genes, whatever they are, PCC", f"{of_mixed[0]:.2f}", "–"),
    ]


def misleading_rows(pair: Pair, seed: int) -> list[Row]:
    """Figures that differ between prediction and measurement because one is smooth and the other is counted."""
    both = pair.predicted, pair.measured
    weights = neighbour_weights(pair.xy, pair.pitch)
    moran = [morans_i(values, weights) for values in both]
    larger = f"larger when predicted: {(moran[0] > moran[1]).sum()} of {len(moran[0])} genes"
    r = [gene_correlations(values) for values in both]
    variance = [np.cumsum(component_fractions(values)) for values in both]
    held = [v[min(COMPONENTS, len(v)) - 1] for v in variance]
    needed = [int(np.searchsorted(v, 0.9)) + 1 for v in variance]
    rank = metrics.spearman_per_gene(moran[0][:, None], moran[1][:, None])[0]
    return [
        (f"Moran's I, median ({larger})", *cells([np.median(values) for values in moran])),
        ("abs. correlation between two genes, median", *cells([np.median(np.abs(values)) for values in r])),
        (f"variance in {COMPONENTS} principal components", *cells(held, ".1%")),
        ("components for 90 % of the variance", *cells(needed, "d")),
        ("standard deviation of a gene, predicted over measured", f"{metrics.sd_ratio(*both):.2f}", "1"),
        ("order of the genes by Moran's I, Spearman of both", f"{rank:.2f}", "1"),
        ("correlations between genes, PCC of both", f"{np.corrcoef(r[0], r[1])[0, 1]:.2f}", "1"),
        *cluster_rows(pair, seed),
    ]


def cluster_rows(pair: Pair, seed: int) -> list[Row]:
    if importlib.util.find_spec("igraph") is None:
        print("warning: no clusters without the package igraph; pip install igraph")
        return []
    from sklearn.metrics import adjusted_rand_score

    found = [clusters(values, seed) for values in (pair.predicted, pair.measured)]
    return [
        ("Leiden clusters", *cells([len(set(labels)) for labels in found], "d")),
        ("Leiden clusters, adjusted Rand index of both", f"{adjusted_rand_score(*found):.2f}", "1"),
    ]


def tables(pair: Pair, seed: int) -> list[str]:
    n_spots, n_genes = pair.predicted.shape
    best = min(BEST, n_genes)
    return [
        "",
        f"Slice {pair.name}: {n_spots} spots, {n_genes} genes ({pair.n_left_out} left out: flat or not measured).",
        "",
        *table_lines(("agreement with the measurement, median over genes", f"best {best}", "all"), sound_rows(pair)),
        "",
        *table_lines(("figure", "predicted", "measured"), misleading_rows(pair, seed)),
    ]


def main(settings: Settings) -> None:
    adata = read_predictions(settings.predictions)
    unit = adata.uns["magic"]["units"]["X"]
    lines = [
        f"`python -m benchmarks.downstream --predictions {settings.predictions.name}`, {date.today().isoformat()}, "
        f"{machine_name('cpu')}, seed {settings.seed}; {unit}. *Best*: by validation PCC."
    ]
    for name in adata.obs["slice"].unique():
        lines += tables(pair_of(adata, str(name)), settings.seed)
    text = "\n".join(lines)
    print(text)
    if settings.keep:
        put_into(PAGE, "downstream", text)


if __name__ == "__main__":
    shared_settings.run(main, parse_args())
