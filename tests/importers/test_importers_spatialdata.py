"""SpatialData: circles and points on an image of their coordinate system come back as counts and pixels, exactly."""

import sys

import numpy as np
import pytest
from importer_sources import assert_same_slice, image_of, write_spatialdata, write_zarr
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


@pytest.fixture
def pixels(root):
    """The H&E of the slice (h, w, 3)."""
    return np.asarray(Image.open(image_of(root)).convert("RGB"))


@pytest.mark.parametrize("element", ["circles", "points"])
def test_a_zarr_comes_back_exactly(root, tmp_path, pixels, element):
    source = only(write_zarr(tmp_path / "sample.zarr", root, element))
    import_slice(source, tmp_path / "out")
    found = assert_same_slice(tmp_path / "out" / "sample", root)
    np.testing.assert_array_equal(np.asarray(Image.open(found.root / "sample.tif")), pixels)
    diameter = visium.read_scalefactors(found.root)["spot_diameter_fullres"]
    assert diameter == pytest.approx(27.5 if element == "circles" else 55, rel=0.01)  # radius 27.5 um at 2 um per px


def test_a_file_in_place_of_the_image(root, tmp_path):
    path = write_zarr(tmp_path / "sample.zarr", root)
    source = only(path, image_of(root))
    import_slice(source, tmp_path / "out")
    assert (tmp_path / "out" / "sample" / image_of(root).name).read_bytes() == image_of(root).read_bytes()
    Image.new("RGB", (50, 50)).save(tmp_path / "other.png")
    refused("other.png: expected 1150 x 1153 or 288 x 289 px", only, path, tmp_path / "other.png")
    Image.open(image_of(root)).transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(tmp_path / "mirrored.png")
    refused("mirrored.png: expected the image that he0 was made of", only, path, tmp_path / "mirrored.png")


def scaled(factor):
    from spatialdata.transformations import Scale

    return {"global": Scale([factor, factor], axes=("x", "y"))}


def test_a_file_of_which_the_zarr_holds_the_small_image_only(root, tmp_path, pixels):
    small = {"S_hires_image": (pixels[::2, ::2], scaled(2), {})}
    path = write_spatialdata(tmp_path / "sample.zarr", {"spots": root}, small)
    assert only(path).image.shape == (577, 575, 3) and only(path).lattice.pitch_px == pytest.approx(50, rel=0.01)
    source = only(path, image_of(root))
    np.testing.assert_allclose(
        source.spots, visium.read_slice(root).spots, rtol=2e-3
    )  # 575 px stand for 1150, 577 for 1153
    assert source.spot_diameter_px == pytest.approx(55, rel=2e-3)


def instrument(shape=(1400, 1400, 3)):
    return np.full(shape, 120, np.uint8)


@pytest.mark.parametrize("other", ["S_cytassist_image", "S_lowres_image", "IF", "dapi", "S.aligned_fiducials"])
def test_the_largest_image_is_not_taken_for_the_he(root, tmp_path, pixels, other):
    images = {other: (instrument(), scaled(1), {}), "S_full_image": (pixels, scaled(1), {})}
    images["S_hires_image"] = (pixels[::2, ::2], scaled(2), {})
    source = only(write_spatialdata(tmp_path / "sample.zarr", {"spots": root}, images))
    np.testing.assert_array_equal(source.image, pixels)
    assert source.notes == ["H&E: S_full_image"]


def test_the_scale_of_the_spots_goes_before_a_finer_image(root, tmp_path, pixels):
    finer = np.repeat(np.repeat(pixels, 2, axis=0), 2, axis=1)
    images = {"a": (finer, scaled(0.5), {}), "b": (pixels, scaled(1), {})}
    np.testing.assert_array_equal(only(write_spatialdata(tmp_path / "a.zarr", {"spots": root}, images)).image, pixels)
    images = {"a": (finer, scaled(0.5), {}), "c": (pixels[::4, ::4], scaled(4), {})}
    np.testing.assert_array_equal(only(write_spatialdata(tmp_path / "b.zarr", {"spots": root}, images)).image, finer)


def test_images_that_cannot_be_told_apart_are_refused(root, tmp_path, pixels):
    images = {"one": (instrument(), scaled(1), {}), "two": (pixels, scaled(1), {})}
    path = write_spatialdata(tmp_path / "a.zarr", {"spots": root}, images)
    refused("a.zarr: expected one H&E image that the spots lie on, found one, two", only, path)
    images = {"elsewhere": (pixels, {"another": scaled(1)["global"]}, {}), "off": (pixels[:300, :300], scaled(1), {})}
    path = write_spatialdata(tmp_path / "b.zarr", {"spots": root}, images)
    refused("b.zarr: expected an H&E that the spots lie on, found elsewhere, off", only, path)


@pytest.mark.parametrize(
    ("change", "channels"),
    [
        (lambda p: p.astype(np.uint16) * 257, None),
        (lambda p: (p / 255).astype(np.float32), None),
        (lambda p: p[..., ::-1], ["b", "g", "r"]),
        (lambda p: p[..., [1, 0, 2]], ["Green", "Red", "Blue"]),
        (lambda p: np.dstack([p, np.full(p.shape[:2], 255, np.uint8)]), ["r", "g", "b", "a"]),
    ],
)
def test_depths_and_channels(root, tmp_path, pixels, change, channels):
    more = {} if channels is None else {"c_coords": channels}
    markers = {"c_coords": ["DAPI", "CD45", "panCK"]}
    images = {"scan": (np.ascontiguousarray(change(pixels)), scaled(1), more), "stack": (pixels, scaled(1), markers)}
    source = only(write_spatialdata(tmp_path / "sample.zarr", {"spots": root}, images))
    np.testing.assert_array_equal(source.image, pixels)


def test_regions_are_split_on_request(simulated, tmp_path):
    roots = {"S1": simulated / "P01_1", "S2": simulated / "P02_1"}
    pixels = {name: np.asarray(Image.open(image_of(root)).convert("RGB")) for name, root in roots.items()}
    images = {f"{name}_full_image": (found, scaled(1), {}) for name, found in pixels.items()}
    path = write_spatialdata(tmp_path / "joined.zarr", roots, images)
    refused(
        "joined.zarr: expected a table of one section, found S1, S2; split them with --library_key region", only, path
    )
    refused("--image .*: expected the image of one section", only, path, image_of(roots["S1"]), None, None, "region")
    for source, (name, root) in zip(read_spatialdata(path, library_key="region"), roots.items(), strict=True):
        np.testing.assert_array_equal(source.image, pixels[name])
        import_slice(source, tmp_path / "out")
        barcodes = [f"{barcode}-{list(roots).index(name)}" for barcode in visium.read_slice(root).spots.index]
        assert_same_slice(tmp_path / "out" / name, root, barcodes)


def test_one_table_of_several(root, tmp_path, pixels):
    images = {"he": (pixels, scaled(1), {})}
    bins = ("square_008um", "square_016um")
    path = write_spatialdata(tmp_path / "bins.zarr", {"spots": root}, images, tables=bins)
    refused("expected one table of spots, found square_008um, square_016um; choose one with --bin", only, path)
    refused("one table that ends with _002um", only, path, None, None, 2)
    assert only(path, None, None, 16).pitch_um == 16
    path = write_spatialdata(tmp_path / "two.zarr", {"spots": root}, images, tables=("table", "other"))
    refused("found other, table; keep that of the spots", only, path)


def test_bad_zarrs_are_refused(root, tmp_path):
    refused("no such file or folder", only, tmp_path / "nowhere.zarr")
    (tmp_path / "empty.zarr").mkdir()
    refused("empty.zarr: expected", only, tmp_path / "empty.zarr")
    refused("found he0, he1, small", only, write_zarr(tmp_path / "two.zarr", root, n_images=2))
    path = write_zarr(tmp_path / "none.zarr", root, n_images=0)
    refused("found none; name it with --image", import_slice, only(path), tmp_path / "out")


@pytest.mark.parametrize("name", ["X/data", "X/indices"])
def test_missing_chunks_of_counts_are_refused(root, tmp_path, name):
    path = write_zarr(tmp_path / "sample.zarr", root)
    assert only(path).counts.sum() > 0
    (path / "tables/table" / name / "c/0").unlink()
    refused(f"sample.zarr: expected 1 chunks of tables/table/{name}, found 0; copy the zarr again", only, path)


def test_missing_gene_names_are_refused(root, tmp_path):
    path = write_zarr(tmp_path / "sample.zarr", root)
    for name in ("_index", "gene_ids"):
        (path / "tables/table/var" / name / "c/0").unlink()
    refused("sample.zarr: expected a name or an id for each gene, found 60 without; name them in var", only, path)


def test_missing_chunks_of_the_image_are_warned_of(root, tmp_path, pixels):
    images = {"he": (pixels, scaled(1), {"chunks": (3, 400, 400)})}
    path = write_spatialdata(tmp_path / "sample.zarr", {"spots": root}, images)
    assert not any("black" in line for line in import_slice(only(path), tmp_path / "whole"))
    (path / "images/he/s0/c/0/1/1").unlink()
    lines = import_slice(only(path), tmp_path / "lacking")
    xy_px = visium.open_slice(root).xy_fullres_px
    n_inside = int(((xy_px >= 400) & (xy_px < 800)).all(axis=1).sum())
    (n_black,) = [int(line.split(" under ")[1].split()[0]) for line in lines if "is black (0, 0, 0) under" in line]
    assert n_black == pytest.approx(n_inside, abs=3)  # a thumbnail blurs the edges


def test_without_the_package_one_line_says_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "spatialdata", None)
    refused("pip install 'spatialdata>=0.5'", only, tmp_path / "sample.zarr")
