"""AnnData and the HEST-1k layout: counts wherever they stand, array places measured, sizes of pixels compared."""

import json

import anndata
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from importer_sources import assert_same_slice, picture_of, to_anndata, write_hest, write_tiff
from scipy.sparse import csc_matrix
from scipy.spatial import KDTree
from spaceranger_folders import refused

from utils.importers.base import import_slice
from utils.importers.h5ad import read_h5ad
from utils.slices import splits, visium
from utils.slices.lattice import array_places


@pytest.fixture
def root(simulated):
    return simulated / "P01_1"


def only(*args):
    (source,) = read_h5ad(*args)
    return source


def saved(adata, tmp_path, name="sample"):
    adata.write_h5ad(tmp_path / f"{name}.h5ad")
    return tmp_path / f"{name}.h5ad"


def test_an_h5ad_comes_back_exactly(root, tmp_path):
    source = only(saved(to_anndata(root), tmp_path), picture_of(root))
    lines = import_slice(source, tmp_path / "out")
    assert_same_slice(tmp_path / "out" / "sample", root)
    assert lines == [f"sample: 70 spots, 60 genes, {int(visium.read_slice(root).counts.sum()):,} counts, 1 um per px"]
    (row,), _ = splits.read_table(tmp_path / "out", split=False)
    assert (row.patient, row.spot_pitch_um, row.image) == ("sample", 100, picture_of(root).name)


def test_a_hest_folder_comes_back_exactly(simulated, tmp_path):
    samples = {"TENX1": simulated / "P01_1", "TENX2": simulated / "P02_1"}
    folder = write_hest(tmp_path / "hest", samples)
    for source, (name, root) in zip(read_h5ad(folder), samples.items(), strict=True):
        assert len(import_slice(source, tmp_path / "out")) == 1  # no warning
        assert source.notes == ["50 patches, not imported"]
        found, true = visium.read_slice(tmp_path / "out" / name), visium.read_slice(root)
        assert (found.counts != true.counts).nnz == 0
        px = ["x_fullres_px", "y_fullres_px"]
        np.testing.assert_array_equal(found.spots[px], true.spots[px])
        assert visium.is_staggered(found.spots)
        shift = found.spots[["array_row", "array_col"]] - true.spots[["array_row", "array_col"]]
        assert (shift.nunique() == 1).all()  # the array itself, but for where it begins
        factors = visium.read_scalefactors(found.root)
        assert factors["spot_diameter_fullres"] == pytest.approx(55, rel=0.01)
    rows, _ = splits.read_table(tmp_path / "out", split=False)
    assert [(row.patient, row.image) for row in rows] == [(f"Patient {n}", f"{n}.tif") for n in samples]


def test_a_pixel_size_that_the_spots_contradict_is_reported(root, tmp_path):
    folder = write_hest(tmp_path / "hest", {"S": root}, um_per_px=0.5)
    lines = import_slice(only(folder), tmp_path / "out")
    assert len(lines) == 3 and all(
        line.startswith("warning: S: a pixel has 1 um by the spots (100 um") for line in lines[1:]
    )
    assert "0.5 um by pixel_size_um_estimated (metadata)" in lines[1] and "0.5 um by S.tif" in lines[2]


def test_a_difference_of_five_percent_is_none(root, tmp_path):
    folder = write_hest(tmp_path / "hest", {"S": root}, um_per_px=1.04)
    assert len(import_slice(only(folder), tmp_path / "out")) == 1


def test_where_the_counts_stand(root, tmp_path):
    adata = to_anndata(root)
    true = adata.X.copy()
    adata.layers["counts"], adata.X = csc_matrix(true), np.log1p(true.toarray())
    assert (only(saved(adata, tmp_path), picture_of(root)).counts != true).nnz == 0
    raw = to_anndata(root)
    raw.raw = raw.copy()
    raw = raw[:, :20].copy()
    raw.X = np.log1p(raw.X.toarray())
    source = only(saved(raw, tmp_path), picture_of(root))
    assert source.counts.shape == (70, 60) and (source.counts != true).nnz == 0 and len(source.genes) == 60
    del adata.layers["counts"]
    refused(r"expected raw counts .* found fractions or negative numbers in X;", only, saved(adata, tmp_path))


def test_spots_outside_tissue_and_features_that_are_no_genes(root, tmp_path):
    adata = to_anndata(root)
    adata.obs["in_tissue"] = [0, *[1] * 69]
    adata.var["feature_types"] = ["Antibody Capture", *["Gene Expression"] * 59]
    source = only(saved(adata, tmp_path), picture_of(root))
    assert source.counts.shape == (69, 59) and source.left_out == {"not in tissue": 1}
    assert source.notes == ["1 features that are no genes left out"]
    adata.obs["in_tissue"] = 0
    refused("expected spots in tissue", only, saved(adata, tmp_path))
    adata.obs["in_tissue"] = 2
    refused("expected 0 or 1 in obs", only, saved(adata, tmp_path))


def test_without_a_file_the_small_picture_serves(root, tmp_path):
    adata = to_anndata(root)
    hires = np.random.default_rng(0).integers(0, 256, (200, 300, 3), dtype=np.uint8)
    factors = {"tissue_hires_scalef": 0.25, "spot_diameter_fullres": 60.0}
    adata.uns["spatial"] = {"lib": {"images": {"hires": (hires / 255).astype(np.float32)}, "scalefactors": factors}}
    import_slice(only(saved(adata, tmp_path)), tmp_path / "out")
    found = assert_same_slice(tmp_path / "out" / "sample", root)
    from PIL import Image

    np.testing.assert_array_equal(np.asarray(Image.open(found.root / "spatial" / "tissue_hires_image.png")), hires)
    written = visium.read_scalefactors(found.root)
    assert written["tissue_hires_scalef"] == 0.25 and written["spot_diameter_fullres"] == 60
    assert written["tissue_lowres_scalef"] == 0.5  # 600 px of 1200
    adata.uns["spatial"]["second"] = {}
    refused("expected one slice in uns", only, saved(adata, tmp_path))


def test_bad_files_are_refused(root, tmp_path):
    adata = to_anndata(root)
    for spoil, match in (
        (lambda a: a.obsm.pop("spatial"), r"expected obsm\['spatial'\]"),
        (lambda a: a.obsm["spatial"].__setitem__((0, 0), np.nan), r"expected obsm\['spatial'\]"),
        (lambda a: setattr(a, "obs_names", ["AA-1"] * 2 + list(a.obs_names[2:])), "each barcode once, found AA-1"),
    ):
        bad = adata.copy()
        spoil(bad)
        refused(match, only, saved(bad, tmp_path))
    refused("expected an H&E picture, found none", import_slice, only(saved(adata, tmp_path)), tmp_path / "out")
    (tmp_path / "torn.h5ad").write_bytes(b"no HDF5")
    refused("torn.h5ad: expected an .h5ad file", only, tmp_path / "torn.h5ad")
    refused("no such file or folder", only, tmp_path / "nowhere.h5ad")
    refused("expected an .h5ad file or a folder", only, tmp_path)


def test_a_hest_folder_without_a_picture(simulated, tmp_path):
    folder = write_hest(tmp_path / "hest", {"A": simulated / "P01_1", "B": simulated / "P02_1"})
    (folder / "wsis" / "B.tif").unlink()
    refused("one H&E picture of B, found none; name it with --image", lambda: next(read_h5ad(folder)))
    refused("--image: expected one sample, found A, B", lambda: next(read_h5ad(folder, folder / "wsis" / "A.tif")))


def square(n=6, px=20.0):
    axes = np.meshgrid(np.arange(n), np.arange(n + 2))
    return np.column_stack([axis.ravel() for axis in axes]) * px


def test_a_square_array_needs_a_pitch_or_the_size_of_a_pixel(tmp_path, root):
    adata = anndata.AnnData(np.ones((48, 3), np.float32))
    adata.obsm["spatial"] = square() + 30
    refused("use --spot_pitch_um", only, saved(adata, tmp_path))
    assert only(saved(adata, tmp_path), None, 55.0).pitch_um == 55
    adata.uns["pixel_size_um_estimated"] = 0.4
    assert only(saved(adata, tmp_path)).pitch_um == pytest.approx(8)


lattices = st.tuples(st.booleans(), st.floats(-np.pi, np.pi), st.floats(4, 400), st.integers(0, 2**32 - 1))


@settings(max_examples=40, deadline=None)
@given(lattices)
def test_neighbours_on_the_array_are_those_on_the_picture(lattice):
    staggered, turn, pitch_px, seed = lattice
    rng = np.random.default_rng(seed)
    row, col = (axis.ravel() for axis in np.meshgrid(np.arange(30), np.arange(24), indexing="ij"))
    xy = np.column_stack([col + row % 2 / 2, row * np.sqrt(3) / 2]) if staggered else np.column_stack([col, row])
    there = np.linalg.norm(xy - rng.uniform(5, 20, 2), axis=1) > 4  # a hole, and scattered ones
    there &= rng.random(len(xy)) > 0.1
    cos, sin = np.cos(turn), np.sin(turn)
    xy = xy[there] @ np.array([[cos, sin], [-sin, cos]]) * pitch_px + rng.uniform(0, 999, 2)
    xy += rng.uniform(-0.04, 0.04, xy.shape) * pitch_px
    places = array_places("test", xy)
    assert places.min() >= 0 and (places[:, 0].min(), places[:, 1].min() // 2) == (0, 0)
    near = {tuple(pair) for pair in KDTree(xy).query_pairs(1.2 * pitch_px, output_type="ndarray")}
    step = np.abs(places[:, None] - places[None])
    if staggered:
        assert (places.sum(1) % 2 == 0).all()
        beside = ((step == [0, 2]) | (step == [1, 1])).all(-1)
    else:
        beside = step.sum(-1) == 1
    beside = {(i, j) for i, j in zip(*np.nonzero(beside), strict=True) if i < j}
    assert beside == near


def test_spots_on_no_array_are_refused(rng):
    refused("expected spots on a square or a staggered array", array_places, "x", rng.uniform(0, 100, (60, 2)))
    refused("three spots or more", array_places, "x", np.zeros((5, 2)))


def test_metadata_that_is_no_json(root, tmp_path):
    folder = write_hest(tmp_path / "hest", {"S": root})
    (folder / "metadata" / "S.json").write_text("{")
    refused("S.json: expected metadata in JSON", only, folder)
    (folder / "metadata" / "S.json").write_text(json.dumps({"pixel_size_um_estimated": None, "inter_spot_dist": "x"}))
    assert only(folder).pitch_um == 100 and only(folder).patient == "S"
    (folder / "metadata" / "S.json").write_text('{"patient": NaN}')
    assert only(folder).patient == "S"


def test_stated_sizes_of_pictures(root, tmp_path):
    from PIL import Image

    from utils.images.image import stated_um_per_px

    assert stated_um_per_px(write_tiff(tmp_path / "a.tif", picture_of(root), 0.5)) == pytest.approx(0.5, rel=1e-3)
    picture = Image.new("RGB", (32, 32))
    for name, dpi, um in (("b.jpg", 72, None), ("c.jpg", 25400, 1.0), ("d.png", 50800, 0.5), ("e.png", 300, None)):
        picture.save(tmp_path / name, dpi=(dpi, dpi))
        assert stated_um_per_px(tmp_path / name) == (um and pytest.approx(um, rel=1e-3))
    picture.save(tmp_path / "f.tif", dpi=(72, 72))
    picture.save(tmp_path / "g.tif")
    assert stated_um_per_px(tmp_path / "f.tif") is None and stated_um_per_px(tmp_path / "g.tif") is None
    import tifffile

    ome = {"axes": "YXS", "PhysicalSizeX": 0.25, "PhysicalSizeY": 0.25, "PhysicalSizeXUnit": "µm"}
    tifffile.imwrite(tmp_path / "h.ome.tif", np.zeros((32, 32, 3), np.uint8), photometric="rgb", metadata=ome)
    assert stated_um_per_px(tmp_path / "h.ome.tif") == pytest.approx(0.25)
