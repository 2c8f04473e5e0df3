"""Makes gene counts from what a tile shows: morphology -> programmes -> expected expression -> counts.

One part of the chain is determined by the image (factors, programmes, expected fractions, a part of the depth), the
other is chance (the rest of the depth, negative binomial counts). So it is known how well the best reader of images
can do: the `ceilings`.

Shapes: S spots; G genes; K programmes.
"""

from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy.special import expit

from utils.evaluation.metrics import pearson_per_gene, to_scale

# Tuned so that the best prediction of the 300 most expressed genes has a mean PCC of 0.5 to 0.6 on Pearson residuals.
EFFECT = 1.95  # natural log fold between a programme that is off and one that is on, mean over genes
DISPERSION = 0.25  # negative binomial: variance = mean + dispersion mean^2, median over genes
DEPTH_NOISE = 0.4  # standard deviation of the log depth that no image shows
INDEPENDENT = 0.1  # fraction of genes that no programme drives

# Programme: a name, and known genes of the kind it stands for, so that maps and tables can be read at a glance.
PROGRAMMES = {
    "epithelium": ["EPCAM", "KRT8", "KRT18", "KRT19", "ERBB2", "MUC1", "CDH1", "GATA3"],
    "cycle": ["MKI67", "TOP2A", "PCNA", "CCNB1", "TYMS", "STMN1", "TUBA1B", "HMGB2"],
    "grade": ["MYC", "VEGFA", "ENO1", "LDHA", "SLC2A1", "S100A8", "NDRG1", "CD24"],
    "immune": ["CD3E", "CD74", "PTPRC", "CXCL13", "CCL19", "MS4A1", "TRAC", "HLA-DRA"],
    "margin": ["CXCL9", "CXCL10", "IFI6", "ISG15", "STAT1", "GBP1", "MMP9", "SPP1"],
    "matrix": ["COL1A1", "COL1A2", "COL3A1", "FN1", "SPARC", "DCN", "LUM", "POSTN"],
    "secretion": ["SCGB2A2", "PIP", "AGR2", "TFF3", "AZGP1", "MUCL1", "CLU", "LTF"],
    "fat": ["ADIPOQ", "PLIN1", "FABP4", "LPL", "CD36", "CFD", "LEP", "PLIN4"],
}


@dataclass
class Genes:
    """The genes of a simulation, alike in all its slices.

    `names` (G,); `loadings` (K, G) natural log fold by programme; `base` (G,) log fraction when no programme is on;
    `dispersion` (G,) of the negative binomial.
    """

    names: list[str]
    loadings: np.ndarray
    base: np.ndarray
    dispersion: np.ndarray


def programme_activity(factors: pd.DataFrame) -> np.ndarray:
    """Activity (S, K), 0..1, of the programmes: fixed, smooth, nonlinear functions of what `measure_tiles` finds."""
    f = factors
    activity = {
        "epithelium": expit((f["tumour"] - 0.45) / 0.12),
        "cycle": expit((f["density"] - 5000) / 1100),
        "grade": expit((f["nuclear_size"] - 7.9) / 0.5),
        "immune": 1 - np.exp(-3.5 * f["lymphocytes"]),
        "margin": 4 * f["tumour"] * (1 - f["tumour"]) * np.sqrt(f["lymphocytes"]),
        "matrix": np.tanh(3 * f["collagen"]),
        "secretion": expit((f["eosin"] - 0.25) / 0.06),
        "fat": f["holes"] ** 2 / (f["holes"] ** 2 + 0.09),
    }
    return np.column_stack([activity[name] for name in PROGRAMMES])


def draw_genes(rng: np.random.Generator, n_genes: int) -> Genes:
    """Genes with one or two programmes each, effects of varied size, mostly upwards; some have none."""
    programmes = len(PROGRAMMES)
    named = [name for eight in zip(*PROGRAMMES.values(), strict=True) for name in eight][:n_genes]
    first = np.concatenate([np.arange(len(named)) % programmes, rng.integers(programmes, size=n_genes - len(named))])
    loadings = np.zeros((programmes, n_genes))
    sign = np.where(rng.random(n_genes) < 0.75, 1, -1)
    sign[: len(named)] = 1  # a known marker rises with what it marks
    loadings[first, np.arange(n_genes)] = EFFECT * rng.gamma(6, 1 / 6, n_genes) * sign
    second = (first + rng.integers(1, programmes, size=n_genes)) % programmes
    loadings[second, np.arange(n_genes)] = EFFECT * 0.5 * rng.normal(size=n_genes) * (rng.random(n_genes) < 0.5)
    alone = len(named) + rng.permutation(n_genes - len(named))[: round(INDEPENDENT * n_genes)]
    loadings[:, alone] = 0
    names = named + [f"SIM{g:04d}" for g in range(1, n_genes - len(named) + 1)]
    return Genes(names, loadings, rng.normal(0, 1.0, n_genes), DISPERSION * np.exp(rng.normal(0, 0.4, n_genes)))


def expected_fractions(activity: np.ndarray, genes: Genes, offset: np.ndarray) -> np.ndarray:
    """Fractions (S, G), each row summing to 1, from activity (S, K) and a patient's own log offset per gene (G,)."""
    level = np.exp(genes.base + offset)
    driven = (genes.loadings != 0).any(axis=0)
    fractions = level / level.sum() * np.ones((len(activity), 1))
    # Only driven genes share what they gain and lose: a gene that no programme drives must not sink as others rise.
    moved = level[driven] * np.exp((activity - 0.5) @ genes.loadings[:, driven])
    fractions[:, driven] = fractions[:, driven].sum(axis=1, keepdims=True) * moved / moved.sum(axis=1, keepdims=True)
    return fractions


def image_depth(factors: pd.DataFrame, median_umis: float) -> np.ndarray:
    """The part of the depth (S,) that the image shows, in UMIs: many cells give much RNA, fat gives little."""
    cells = np.sqrt(np.clip(factors["density"].to_numpy() / 4000, 0.05, None))
    return median_umis * cells / np.median(cells)


def draw_depth(rng: np.random.Generator, from_image: np.ndarray) -> np.ndarray:
    """Depth (S,) in UMIs of one experiment: permeabilisation and capture differ from spot to spot, unseen."""
    return from_image * np.exp(rng.normal(0, DEPTH_NOISE, len(from_image)))


def draw_counts(rng: np.random.Generator, expected: np.ndarray, dispersion: np.ndarray) -> np.ndarray:
    """Negative binomial counts (S, G) int32 around `expected` (S, G): a Poisson whose mean is gamma-distributed."""
    return rng.poisson(rng.gamma(1 / dispersion, expected * dispersion)).astype(np.int32)


def ceilings(
    rng: np.random.Generator,
    counts: np.ndarray,
    fractions: np.ndarray,
    depth_from_image: np.ndarray,
    dispersion: np.ndarray,
    redraws: int,
) -> dict[str, np.ndarray]:
    """How well each gene of a slice could be predicted from its image, by a reader that knows everything but chance.

    The best prediction from the image is the conditional mean. It is taken as the mean of `redraws` repeats of the
    experiment on the same image (new random depth, new counts), each transformed like the measurement. Its PCC with
    the measurement, per gene over spots, is the ceiling (64 redraws leave it about 2 % too low, 32 about 4 %).

    Parameters
    ----------
    counts
        (S, G) the measurement.
    fractions, depth_from_image, dispersion
        (S, G), (S,), (G,): what the image determines.

    Returns
    -------
    `lognorm` and `residuals`: (G,) PCC; NaN for a gene that was not seen.
    """
    scales = ("lognorm", "residuals")
    best = {scale: np.zeros(counts.shape) for scale in scales}
    for _ in range(redraws):
        expected = draw_depth(rng, depth_from_image)[:, None] * fractions
        again = draw_counts(rng, expected, dispersion)
        for scale in scales:
            best[scale] += to_scale(scale, again, again.sum(axis=1)) / redraws
    measured = {scale: to_scale(scale, counts, counts.sum(axis=1)) for scale in scales}
    return {scale: pearson_per_gene(measured[scale], best[scale]) for scale in scales}
