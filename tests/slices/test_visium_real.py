"""The real folders that MAGIC_REAL_DATA points to, against the figures published beside them."""

import os
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from spaceranger_folders import refused

from utils.slices import splits, visium

REAL = os.environ.get("MAGIC_REAL_DATA")
real = [pytest.mark.realdata, pytest.mark.skipif(not REAL, reason="MAGIC_REAL_DATA does not name the data folder")]
SECTIONS = {  # spots, genes, UMIs, pitch along x and y in px
    "C2": (187, 15706, 1926633, 289.81, 291.50),
    "C3": (180, 15821, 2033498, 289.69, 292.24),
    "C4": (184, 15842, 2213922, 289.94, 291.65),
    "C5": (181, 15721, 2014132, 289.75, 291.21),
    "B4": (283, 15289, 935146, 289.75, 291.85),
}
# folder: (matrix spots, genes, total), (positions, in tissue), spots of the slice, pitch in um
SAMPLES = {
    "scanpy_visium_1.0.0": ((100, 100, 932), (4992, 4235), 100, 100),
    "SpatialExperiment_10xVisium/section1": ((50, 50, 682), (50, 22), 22, 100),
    "SpatialExperiment_10xVisium/section2": ((50, 50, 682), (49, 22), 22, 100),
    "SpatialFeatureExperiment_sample01": ((12, 5, 2951), (12, 12), 12, 100),
    "SpatialFeatureExperiment_sample02": ((13, 5, 2762), (13, 13), 13, 100),
    "VisiumIO_10xVisium/section1": ((50, 49, 607), (50, 22), 22, 100),
    "VisiumIO_10xVisium/section2": ((50, 49, 419), (49, 22), 22, 100),
    "VisiumIO_visium_hd": ((10, 10, 0), (10, 10), 10, 2),
    "seurat_visium": ((2695, 100, 132231), (4992, 2695), 2695, 100),
    "seurat_visium_hd/binned_outputs/square_008um": ((2695, 100, 132231), (4992, 2516), 1368, 8),
    "seurat_visium_hd/binned_outputs/square_016um": ((2695, 100, 132231), (1248, 655), 336, 16),
    "mouse_embryo_3.0.0": ((2898, 19465, 3085005), (4992, 2898), 2898, 100),
}


def marked(cases):
    return [pytest.param(*case, marks=real) for case in cases.items()]


@pytest.mark.parametrize(("name", "expected"), marked(SECTIONS))
def test_the_five_sections(name, expected):
    spots, genes, umis, *pitches_px = expected
    found = visium.read_slice(Path(REAL) / "Breast_cancer" / name)
    assert (*found.counts.shape, found.counts.sum()) == (spots, genes, umis)
    assert set(found.unmatched.values()) == {0} and not found.lattice.staggered
    assert found.warnings == () and not found.lattice.measured and not found.lattice.mirrored
    assert found.pitch_px == pytest.approx(np.mean(pitches_px), abs=1.5)
    assert found.known_pitch_um is None
    refused("--spot_pitch_um", lambda: found.pitch_um)


@pytest.mark.parametrize(("folder", "expected"), marked(SAMPLES))
def test_every_sample_is_read(folder, expected):
    matrix_is, positions_are, n_spots, pitch_um = expected
    folder = Path(REAL) / "spaceranger_samples" / folder
    root = visium.find_root(folder)
    matrix, positions, found = visium.read_matrix(root), visium.read_positions(root), visium.read_slice(folder)
    assert (*matrix.counts.shape, matrix.counts.sum()) == matrix_is
    assert (len(positions), positions["in_tissue"].sum()) == positions_are
    assert found.counts.shape == (n_spots, matrix_is[1]) and len(found.spots) == n_spots
    pd.testing.assert_frame_equal(visium.open_slice(folder).spots, found.spots)
    assert found.pitch_um == pitch_um and found.pitch_px > 0 and not found.lattice.measured
    assert visium.read_scalefactors(root)["tissue_hires_scalef"] > 0


@pytest.mark.parametrize(
    ("name", "match"), marked({"scanpy_probe_2.1.0": "no slice", "seurat_visium_hd": "one bin size"})
)
def test_samples_that_are_refused(name, match):
    refused(match, visium.read_slice, Path(REAL) / "spaceranger_samples" / name)


@pytest.mark.parametrize("name", [pytest.param("scanpy_probe_2.1.0/raw_probe_bc_matrix.h5", marks=real)])
def test_the_probe_matrix_is_read_as_a_matrix(name):
    matrix = visium.read_matrix(Path(REAL) / "spaceranger_samples" / name)
    assert (*matrix.counts.shape, matrix.counts.sum()) == (4987, 1000, 3372)


@pytest.mark.parametrize("name", [pytest.param("visium_1142243F", marks=real)])
def test_a_slice_without_counts_can_be_tiled(name):
    root = Path(REAL) / name
    assert len(visium.open_slice(root).spots) == 4784
    refused("expected counts", visium.read_slice, root)


@pytest.mark.parametrize("name", [pytest.param("SpatialExperiment_10xVisium", marks=real)])
def test_the_same_counts_twice_have_one_hash(name):
    matrices = [
        visium.read_matrix(visium.find_root(Path(REAL) / "spaceranger_samples" / name / s))
        for s in ("section1", "section2")
    ]
    hashes = {visium.counts_hash(m.counts, m.barcodes, m.genes) for m in matrices}
    assert len(hashes) == 1


@pytest.mark.parametrize("name", [pytest.param("Breast_cancer", marks=real)])
def test_the_table_of_the_five_sections(name):
    data = Path(REAL) / name
    rows, warnings = splits.read_table(data)
    assert [(row.slice, row.part) for row in rows] == [
        *(("C2", "train"), ("C3", "train"), ("C4", "train"), ("C5", "val"), ("B4", "test")),
    ]
    assert warnings == ["patients in train and in val: C"] and {row.spot_pitch_um for row in rows} == {200.0}
    for row in rows:
        slice_ = visium.open_slice(splits.slice_folder(data, row), row.slice, row.spot_pitch_um)
        found = slice_.fullres_image(row.image)
        assert found is not None and found.name == row.image and slice_.fullres_image() == found
