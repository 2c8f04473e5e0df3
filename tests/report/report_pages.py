"""Reports for tests of report.html: small ones, a realistic large one, and reading the data of a page."""

import json
import re

import numpy as np

from utils.report.page import Report, RetrievalExample, SliceMaps, Table

HOSTILE = "</script><img src=x onerror=alert(1)><b>&amp;\u2028'\""
BLOCK = re.compile(r'<script type="text/plain" id="([^"]+)">(.*?)</script>', re.DOTALL)


def content_of(path) -> dict:
    text = path.read_text(encoding="utf-8")
    return json.loads(re.search(r'<script type="application/json" id="report">(.*?)</script>', text, re.DOTALL)[1])


def blocks_of(path) -> dict[str, str]:
    return dict(BLOCK.findall(path.read_text(encoding="utf-8")))


def hexagonal(n_spots: int, pitch: float) -> np.ndarray:
    """A staggered array, as wide as high."""
    side = int(np.ceil(np.sqrt(n_spots)))
    row, column = np.divmod(np.arange(n_spots), side)
    return np.column_stack([(column + 1 + 0.5 * (row % 2)) * pitch, (row + 1) * pitch * 0.866])


def tissue(side: int, rng: np.random.Generator) -> np.ndarray:
    """An image that a JPEG does not make smaller than real tissue: (side, side, 3)."""
    coarse = rng.uniform(size=(side // 16 + 1, side // 16 + 1, 1)).repeat(16, 0).repeat(16, 1)[:side, :side]
    colour = np.array([205, 150, 195]) + coarse * [30, 60, 30] + rng.normal(scale=9, size=(side, side, 1))
    return np.clip(colour, 0, 255).astype(np.uint8)


def a_report(genes=("A", "B", "C"), n_spots=30, name="P1", barcode=None, image_px=60, seed=0) -> Report:
    """All that a report can hold. The second gene is weak, and unknown in the measurement of the first spot."""
    rng = np.random.default_rng(seed)
    pitch, n_genes = 20.0, len(genes)
    xy = hexagonal(n_spots, pitch)
    phase = rng.uniform(0, 6, size=n_genes)
    predicted = np.sin(xy[:, :1] / xy.max() * 6 + phase) + np.cos(xy[:, 1:] / xy.max() * 4 + phase)
    measured = predicted + rng.normal(size=(n_spots, n_genes))
    measured[0, 1] = np.nan
    barcodes = [f"SPOT{i:05d}-1" for i in range(n_spots)]
    barcodes[0] = barcode or barcodes[0]
    val_pcc = np.where(np.arange(n_genes) == 1, 0.05, rng.uniform(0.2, 0.8, size=n_genes))
    tiles = rng.integers(0, 255, size=(4, 16, 16, 3), dtype=np.uint8)
    one = SliceMaps(
        name=name,
        image=tissue(image_px, rng),
        image_scale=image_px / (xy.max() + pitch),
        xy_fullres_px=xy,
        spot_diameter_px=0.6 * pitch,
        barcodes=barcodes,
        predicted=predicted,
        measured=measured,
        prediction_std=rng.uniform(0.1, 0.5, size=predicted.shape),
        domain_score=rng.uniform(0.5, 2, size=n_spots),
        um_per_fullres_px=5.0,
    )
    candidates = [(tiles[1], "rank 1: AAA", 0.9, False), (None, "rank 2: CCC", 0.8, True)]
    return Report(
        title="A report",
        unit="Pearson residuals",
        genes=list(genes),
        slices=[one],
        gene_columns={"PCC": val_pcc + 0.05, "mean counts per 10,000": rng.uniform(1, 50, size=n_genes)},
        val_pcc=val_pcc,
        tables=[Table("Metrics", ["row", "PCC", "n"], [["model", 0.4321, 3], ["ridge", None, 4]], "A note.")],
        examples=[RetrievalExample(tiles[0], "P1, SPOT00003-1", candidates)],
        settings={"part": "test", "out": "x"},
        examples_note="By a rule.",
    )
