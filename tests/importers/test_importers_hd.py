"""Visium HD: the bins of a simulated and of the real runs, exactly, with images and scale factors kept."""

import json
import os
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from importer_sources import image_of, write_hd
from spaceranger_folders import refused

from utils.importers.base import import_slice
from utils.importers.visium_hd import find_bin, read_visium_hd
from utils.slices import splits, visium

REAL = os.environ.get("MAGIC_REAL_DATA")
real = [pytest.mark.realdata, pytest.mark.skipif(not REAL, reason="MAGIC_REAL_DATA does not name the data folder")]


@pytest.fixture(scope="module")
def run(simulated, tmp_path_factory):
    return write_hd(tmp_path_factory.mktemp("hd") / "my_run", simulated / "P01_1")


def imported(source, out, **flags):
    (found,) = read_visium_hd(source, **flags)
    import_slice(found, out, flags.get("memory", np.inf))
    return out / found.name


def assert_bins(out: Path, square: Path) -> None:
    """All that read_slice reads of the bins is what is written, and no bin outside tissue."""
    found, true = visium.read_slice(out), visium.read_slice(square)
    assert (found.counts != true.counts).nnz == 0 and not any(found.unmatched.values())
    for key in ("genes", "gene_ids"):
        np.testing.assert_array_equal(getattr(found, key), getattr(true, key))
    pd.testing.assert_frame_equal(found.spots, true.spots, rtol=1e-12)
    assert visium.read_positions(out)["in_tissue"].all()
    names = ("scalefactors_json.json", *(path.name for path in (square / "spatial").glob("*.png")))
    texts = [(folder / "spatial" / "scalefactors_json.json").read_text() for folder in (out, square)]
    assert json.loads(texts[0]) == json.loads(texts[1])
    for name in names[1:]:
        assert (out / "spatial" / name).read_bytes() == (square / "spatial" / name).read_bytes()


@pytest.mark.parametrize("bin_um", [None, 8])
@pytest.mark.parametrize("memory", [np.inf, 64 * 500])
def test_bins_come_back_exactly(run, tmp_path, bin_um, memory):
    size = bin_um or 16
    out = imported(run, tmp_path, bin_um=bin_um, memory=memory)
    assert out.name == f"my_run_{size:03d}um"
    assert_bins(out, run / "binned_outputs" / f"square_{size:03d}um")
    (row,), _ = splits.read_table(tmp_path, split=False)
    assert (row.patient, row.spot_pitch_um, row.part, row.image) == ("my_run", size, "", None)


def test_fractions_of_a_pixel_are_kept(run, tmp_path):
    spots = visium.read_slice(imported(run, tmp_path)).spots
    assert spots["x_fullres_px"].iloc[0] % 1 == pytest.approx(2 / 3, abs=1e-9) or spots["x_fullres_px"].iloc[0] % 1 > 0


def test_several_bin_sizes_stand_side_by_side(run, tmp_path):
    for size in (8, 16):
        imported(run, tmp_path, bin_um=size)
    rows, _ = splits.read_table(tmp_path, split=False)
    assert [(row.slice, row.patient) for row in rows] == [("my_run_008um", "my_run"), ("my_run_016um", "my_run")]


def test_where_the_bins_may_lie(run, tmp_path):
    square = run / "binned_outputs" / "square_008um"
    assert find_bin(run, 8) == find_bin(run / "binned_outputs", 8) == find_bin(square, None) == ("my_run", 8, square)
    (tmp_path / "run" / "outs").mkdir(parents=True)
    (tmp_path / "run" / "outs" / "binned_outputs").symlink_to(run / "binned_outputs")
    assert find_bin(tmp_path / "run", 16)[:2] == find_bin(tmp_path / "run" / "outs", 16)[:2] == ("run", 16)


def test_a_wrong_bin_names_those_there(run, tmp_path):
    refused("found --bin 4; use --bin with: 8, 16", find_bin, run, 4)
    refused("found --bin 16; use --bin with: 8", find_bin, run / "binned_outputs" / "square_008um", 16)
    refused("expected binned_outputs/square_", find_bin, tmp_path, None)
    (tmp_path / "GSM1_P1_filtered_feature_bc_matrix.h5").write_text("")
    refused("found files as GEO keeps them .GSM1_P1_filtered_feature_bc_matrix.h5.: gunzip", find_bin, tmp_path, None)
    refused("no such file or folder", find_bin, tmp_path / "nowhere", None)


def test_an_image_is_copied_and_the_others_made_of_it(simulated, tmp_path):
    root, image = simulated / "P01_1", image_of(simulated / "P01_1")
    run = write_hd(tmp_path / "run", root, sizes=(16,), images=())
    out = imported(run, tmp_path / "out", image=image)
    assert (out / image.name).read_bytes() == image.read_bytes()
    factors = [(folder / "spatial" / "scalefactors_json.json") for folder in (out, run / "binned_outputs/square_016um")]
    assert json.loads(factors[0].read_text()) == json.loads(factors[1].read_text())
    for kind in ("hires", "lowres"):
        name = f"spatial/tissue_{kind}_image.png"
        assert (out / name).read_bytes() != b"" and visium.open_slice(out).fullres_image() == out / image.name
    refused("expected an H&E image, found none; name it with --image", imported, run, tmp_path / "none")
    assert not list((tmp_path / "none").glob("*"))


def test_the_wrong_image_is_refused(simulated, run, tmp_path):
    from PIL import Image

    Image.new("RGB", (40, 40)).save(tmp_path / "small.png")
    refused(
        "small.png: expected 67 spots on its 40 x 40 px, found 67 outside",
        imported,
        run,
        tmp_path / "out",
        image=tmp_path / "small.png",
    )
    Image.new("RGB", (9000, 950), "pink").save(tmp_path / "other.png")
    refused("other.png: expected about", imported, run, tmp_path / "out", image=tmp_path / "other.png")
    assert not list((tmp_path / "out").glob("*"))


CASES = [("seurat_visium_hd", 8, 1368), ("seurat_visium_hd", 16, 336), ("VisiumIO_visium_hd", 2, 10)]


@pytest.mark.parametrize(("name", "size", "n_bins"), [pytest.param(*case, marks=real) for case in CASES])
def test_the_real_bins(name, size, n_bins, tmp_path):
    source = Path(REAL) / "spaceranger_samples" / name
    out = imported(source, tmp_path, bin_um=size)
    assert len(visium.read_slice(out).spots) == n_bins
    assert_bins(out, source / "binned_outputs" / f"square_{size:03d}um")
