"""SpatialData: circles and points in um on a scaled image come back as counts and pixels of the image, exactly."""

import sys

import numpy as np
import pytest
from importer_sources import assert_same_slice, image_of, write_zarr
from PIL import Image
from spaceranger_folders import refused

from utils.importers.base import import_slice
from utils.importers.spatialdata import read_spatialdata
from utils.slices import visium

pytest.importorskip("spatialdata")


def only(*args):
    (source,) = read_spatialdata(*args)
    return source


@pytest.fixture
def root(simulated):
    return simulated / "P01_1"


@pytest.mark.parametrize("element", ["circles", "points"])
def test_a_zarr_comes_back_exactly(root, tmp_path, element):
    source = only(write_zarr(tmp_path / "sample.zarr", root, element))
    import_slice(source, tmp_path / "out")
    found = assert_same_slice(tmp_path / "out" / "sample", root)
    pixels = np.asarray(Image.open(image_of(root)).convert("RGB"))
    np.testing.assert_array_equal(np.asarray(Image.open(found.root / "sample.tif")), pixels)
    diameter = visium.read_scalefactors(found.root)["spot_diameter_fullres"]
    assert diameter == pytest.approx(27.5 if element == "circles" else 55, rel=0.01)  # radius 27.5 um at 2 um per px


def test_a_file_in_place_of_the_image(root, tmp_path):
    path = write_zarr(tmp_path / "sample.zarr", root)
    source = only(path, image_of(root))
    import_slice(source, tmp_path / "out")
    assert (tmp_path / "out" / "sample" / image_of(root).name).read_bytes() == image_of(root).read_bytes()
    other = Image.new("RGB", (50, 50))
    other.save(tmp_path / "other.png")
    refused("other.png: expected .* px", only, path, tmp_path / "other.png")


def test_bad_zarrs_are_refused(root, tmp_path):
    refused("no such file or folder", only, tmp_path / "nowhere.zarr")
    (tmp_path / "empty.zarr").mkdir()
    refused("empty.zarr: expected", only, tmp_path / "empty.zarr")
    refused("several of one size", only, write_zarr(tmp_path / "two.zarr", root, n_images=2))
    path = write_zarr(tmp_path / "none.zarr", root, n_images=0)
    refused("found none; name it with --image", import_slice, only(path), tmp_path / "out")
    refused("expected one table that ends with _016um, found table; choose one with --bin", only, path, None, None, 16)


def test_without_the_package_one_line_says_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "spatialdata", None)
    refused("pip install 'spatialdata>=0.5'", only, tmp_path / "sample.zarr")
