"""AnnData and the HEST-1k layout: counts wherever they stand, array places measured, sizes of pixels compared."""

import json

import anndata
import h5py
import numpy as np
import pandas as pd
import pytest
from importer_sources import assert_same_slice, image_of, to_anndata, write_hest
from PIL import Image
from spaceranger_folders import refused

from utils.importers.base import import_slice
from utils.importers.h5ad import read_h5ad
from utils.slices import splits, visium


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
    source = only(saved(to_anndata(root), tmp_path), image_of(root))
    lines = import_slice(source, tmp_path / "out")
    assert_same_slice(tmp_path / "out" / "sample", root)
    total = int(visium.read_slice(root).counts.sum())
    assert lines[0] == f"sample: 70 spots, 60 genes, {total:,} counts, 1 um per px"
    assert len(lines) == 2 and "no small image and no pixel size to check it by" in lines[1]
    (row,), _ = splits.read_table(tmp_path / "out", split=False)
    assert (row.patient, row.spot_pitch_um, row.image) == ("sample", 100, image_of(root).name)


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
        assert source.lattice.staggered
        shift = found.spots[["array_row", "array_col"]] - true.spots[["array_row", "array_col"]]
        assert (shift.nunique() == 1).all()  # the array itself, but for where it begins
        factors = visium.read_scalefactors(found.root)
        assert factors["spot_diameter_fullres"] == pytest.approx(55, rel=0.01)
    rows, _ = splits.read_table(tmp_path / "out", split=False)
    assert [(row.patient, row.image) for row in rows] == [(f"Patient {n}", f"{n}.tif") for n in samples]


def test_a_pixel_size_that_the_spots_contradict_is_reported(root, tmp_path):
    folder = write_hest(tmp_path / "hest", {"S": root}, um_per_px=0.5)
    _, line = import_slice(only(folder), tmp_path / "out")
    assert line == (
        "warning: S: a pixel has 1 um by the spots (100 um from spot to spot) but 0.5 um by pixel_size_um_estimated "
        "(metadata), 0.5 um by S.tif; check --image and --spot_pitch_um"
    )


def test_a_difference_of_five_percent_is_none(root, tmp_path):
    folder = write_hest(tmp_path / "hest", {"S": root}, um_per_px=1.04)
    assert len(import_slice(only(folder), tmp_path / "out")) == 1


def test_spots_outside_tissue_and_features_that_are_no_genes(root, tmp_path):
    adata = to_anndata(root)
    adata.obs["in_tissue"] = [0, *[1] * 69]
    adata.var["feature_types"] = ["Antibody Capture", *["Gene Expression"] * 59]
    source = only(saved(adata, tmp_path), image_of(root))
    assert source.counts.shape == (69, 59) and source.left_out == {"not in tissue": 1}
    assert source.notes == ["1 features that are no genes left out"]
    adata.obs["in_tissue"] = 0
    refused("expected spots in tissue", only, saved(adata, tmp_path))
    adata.obs["in_tissue"] = 2
    refused("expected 0 or 1 in obs", only, saved(adata, tmp_path))


def library(pixels, scale=0.5, diameter=65.0):
    factors = {"tissue_hires_scalef": scale, "tissue_lowres_scalef": scale / 2, "spot_diameter_fullres": diameter}
    return {"images": {"hires": pixels}, "scalefactors": factors}


@pytest.fixture
def pixels(root):
    """The H&E of the slice (h, w, 3)."""
    return np.asarray(Image.open(image_of(root)).convert("RGB"))


def hires_of(folder):
    return np.asarray(Image.open(folder / "spatial" / "tissue_hires_image.png"))


def test_without_a_file_the_small_image_serves(root, tmp_path, pixels):
    adata, hires = to_anndata(root), pixels[::4, ::4]
    factors = {"tissue_hires_scalef": 0.25, "spot_diameter_fullres": 60.0}
    adata.uns["spatial"] = {"lib": {"images": {"hires": (hires / 255).astype(np.float32)}, "scalefactors": factors}}
    import_slice(only(saved(adata, tmp_path)), tmp_path / "out")
    found = assert_same_slice(tmp_path / "out" / "sample", root)
    np.testing.assert_array_equal(hires_of(found.root), hires)
    written = visium.read_scalefactors(found.root)
    assert written["tissue_hires_scalef"] == 0.25 and written["spot_diameter_fullres"] == 60
    assert written["tissue_lowres_scalef"] == pytest.approx(600 / 1156)  # of 288 x 289 px over .25
    adata.uns["spatial"]["second"] = {}
    assert only(saved(adata, tmp_path)).small.keys() == {"hires"}


@pytest.mark.parametrize(
    "entry",
    [
        {"images": {"hires": "/home/me/tissue_hires_image.png"}, "scalefactors": {"tissue_hires_scalef": 0.5}},
        {"images": {"hires": np.zeros(0)}, "scalefactors": {"tissue_hires_scalef": 0.5}},
        {"images": np.zeros((5, 5, 3)), "scalefactors": {"tissue_hires_scalef": 0.5}},
        {"images": {}, "scalefactors": "scalefactors_json.json"},
        {"images": "none", "scalefactors": np.zeros(3)},
    ],
)
def test_what_is_no_image_of_a_library_is_left_aside(root, tmp_path, entry):
    adata = to_anndata(root)
    adata.uns["spatial"] = {"lib": entry}
    path = saved(adata, tmp_path)
    import_slice(only(path, image_of(root)), tmp_path / "out")
    assert_same_slice(tmp_path / "out" / "sample", root)
    refused("sample.h5ad: expected an H&E image, found none; name it with --image", import_slice, only(path), tmp_path)


def test_the_image_of_the_section_among_several_libraries(root, tmp_path, pixels):
    adata, hires = to_anndata(root), pixels[::2, ::2]
    others = {"A": library(np.full_like(hires, 90), diameter=80.0), "B": library(hires)}
    adata.uns["spatial"] = others
    refused("found A, B and no column of obs", only, saved(adata, tmp_path))
    assert only(saved(adata, tmp_path), image_of(root)).small == {}  # with the image none of them is needed
    adata.obs["library_id"] = "B"
    source = only(saved(adata, tmp_path))
    np.testing.assert_array_equal(source.small["hires"], hires)
    assert source.spot_diameter_px == 65
    adata.obs["library_id"] = "renamed"
    adata.uns["spatial"] = others | {"A": library(hires[:99, :99])}  # on which the spots do not lie
    np.testing.assert_array_equal(only(saved(adata, tmp_path)).small["hires"], hires)


def test_a_cellxgene_file(root, tmp_path, pixels):
    adata = to_anndata(root)
    genes, ids = adata.var_names.to_numpy(), [f"ENSG{i:011d}" for i in range(adata.n_vars)]
    adata.var = pd.DataFrame({"feature_name": pd.Categorical(genes), "feature_biotype": "gene"}, index=ids)
    adata.raw = adata
    adata.X = np.log1p(adata.X.toarray())
    adata.obs["donor_id"] = "D1"
    adata.obs["in_tissue"] = 1
    entry = library(pixels[::2, ::2])
    adata.uns["spatial"] = {"is_single": np.True_, "lib": entry | {"images": entry["images"] | {"fullres": pixels}}}
    source = only(saved(adata, tmp_path))
    np.testing.assert_array_equal(source.genes, genes)
    np.testing.assert_array_equal(source.gene_ids, ids)
    np.testing.assert_array_equal(source.image, pixels)
    assert source.patient == "D1" and (source.counts != adata.raw.X).nnz == 0
    import_slice(source, tmp_path / "out")
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "out" / "sample" / "sample.tif")), pixels)
    np.testing.assert_array_equal(hires_of(tmp_path / "out" / "sample"), pixels[::2, ::2])
    adata.uns["spatial"] = {"is_single": np.False_}
    refused("is_single", only, saved(adata, tmp_path))


def test_another_image_than_that_of_uns_is_refused(root, tmp_path, pixels):
    adata = to_anndata(root)
    adata.uns["spatial"] = {"lib": library(pixels[::2, ::2])}
    import_slice(only(saved(adata, tmp_path), image_of(root)), tmp_path / "out")
    np.testing.assert_array_equal(hires_of(tmp_path / "out" / "sample"), pixels[::2, ::2])
    adata.uns["spatial"] = {"lib": library(np.ascontiguousarray(pixels[::-2, ::-2]))}
    other = only(saved(adata, tmp_path), image_of(root))
    refused("found another .* it fits turned by 180 degrees", import_slice, other, tmp_path / "other")
    adata.uns["spatial"] = {"lib": library(pixels[::2, ::2] / 100)}
    assert "hires: of uns['spatial'] cannot be read" in only(saved(adata, tmp_path), image_of(root)).notes


def test_positions_in_pixels_of_another_image_are_warned_of(root, tmp_path, pixels):
    adata = to_anndata(root)
    adata.uns["spatial"] = {"lib": library(pixels[::2, ::2])}
    assert not only(saved(adata, tmp_path)).warnings
    adata.obsm["spatial"] *= 0.5  # pixels of the hires image
    source = only(saved(adata, tmp_path))
    assert source.warnings[0].startswith("spot_diameter_fullres of the scale factors is 1.3 times the distance")
    assert source.spot_diameter_px == pytest.approx(27.5, rel=0.01)  # of the pitch, in its place


def test_joined_sections_are_refused_and_split_on_request(simulated, tmp_path):
    roots = [simulated / name for name in ("P01_1", "P02_1")]
    parts = [to_anndata(root) for root in roots]
    joined = anndata.concat(parts, label="library_id", keys=["L1", "L2"], index_unique="-", merge="same")
    joined.obs["patient"] = np.repeat(["P1", "P2"], 70)
    hires = [np.asarray(Image.open(image_of(root)).convert("RGB"))[::2, ::2] for root in roots]
    joined.uns["spatial"] = {"L1": library(hires[0], diameter=60.0), "L2": library(hires[1], diameter=70.0)}
    path = saved(joined, tmp_path)
    refused("found 2 that obs.'library_id'. tells apart .*--library_key library_id", only, path)
    refused(
        "_he.jpg: expected the image of one section",
        lambda: list(read_h5ad(path, image_of(roots[0]), None, "library_id")),
    )
    for number, source in enumerate(read_h5ad(path, None, None, "library_id")):
        import_slice(source, tmp_path / "out")
        name, root = f"L{number + 1}", roots[number]
        barcodes = [f"{barcode}-{name}" for barcode in visium.read_slice(root).spots.index]
        found = assert_same_slice(tmp_path / "out" / name, root, barcodes)
        np.testing.assert_array_equal(hires_of(found.root), hires[number])
        assert visium.read_scalefactors(found.root)["spot_diameter_fullres"] == 60 + 10 * number
    rows, _ = splits.read_table(tmp_path / "out", split=False)
    assert [(row.slice, row.patient) for row in rows] == [("L1", "P1"), ("L2", "P2")]
    refused(
        "expected one section", lambda: list(read_h5ad(saved(joined_under_one(joined), tmp_path), None, None, "batch"))
    )


def joined_under_one(joined):
    joined.obs["batch"] = "one"
    return joined


def test_places_that_do_not_fit_are_measured(root, tmp_path):
    adata, order = to_anndata(root), np.random.default_rng(1).permutation(70)
    adata.obs["array_row"], adata.obs["array_col"] = (
        adata.obs[c].to_numpy()[order] for c in ("array_row", "array_col")
    )
    lines = import_slice(only(saved(adata, tmp_path), image_of(root)), tmp_path / "out")
    assert "the stated array places do not fit the pixels; measured ones are written" in lines[0]
    found = visium.open_slice(tmp_path / "out" / "sample")
    assert found.pitch_px == pytest.approx(100, rel=0.01) and found.lattice.staggered and not found.warnings


def test_pooled_bins_of_hest(root, tmp_path, rng):
    """Visium HD in HEST-1k: bins of 128 um at .5 um per px, numbered after empty ones were dropped; 2 um are stated."""
    row, column = (axis.ravel() for axis in np.meshgrid(np.arange(9), np.arange(10), indexing="ij"))
    kept = rng.random(90) > 0.2
    adata = anndata.AnnData(rng.poisson(2, (kept.sum(), 5)).astype(np.float32), var=pd.DataFrame(index=list("ABCDE")))
    adata.obsm["spatial"] = np.column_stack([column, row])[kept] * 256.0 + 200
    adata.obs["array_row"], adata.obs["array_col"] = np.divmod(np.arange(kept.sum()), 10)
    folder = tmp_path / "hest"
    for name in ("st", "wsis", "metadata"):
        (folder / name).mkdir(parents=True)
    adata.write_h5ad(folder / "st" / "HD.h5ad")
    Image.new("RGB", (2700, 2500), (200, 110, 160)).save(folder / "wsis" / "HD.tif")
    sizes = {"pixel_size_um_embedded": None, "pixel_size_um_estimated": 0.5, "inter_spot_dist": 2.0}
    (folder / "metadata" / "HD.json").write_text(json.dumps(sizes | {"spot_diameter": 2.0, "patient": float("nan")}))
    line, warning = import_slice(only(folder), tmp_path / "out")
    assert "0.5 um per px" in line and "0.007813 um by inter_spot_dist 2 um" in warning
    (found,), _ = splits.read_table(tmp_path / "out", split=False)
    assert (found.spot_pitch_um, found.patient) == (pytest.approx(128), "HD")
    opened = visium.open_slice(tmp_path / "out" / "HD")
    assert opened.pitch_px == pytest.approx(256) and not opened.warnings
    assert opened.scalefactors["spot_diameter_fullres"] == pytest.approx(128)  # the stated 2 um are of another bin


def test_bad_files_are_refused(root, tmp_path):
    adata = to_anndata(root)
    for spoil, match in (
        (lambda a: a.obsm.pop("spatial"), r"expected obsm\['spatial'\]"),
        (lambda a: a.obsm["spatial"].__setitem__((0, 0), np.nan), r"expected obsm\['spatial'\]"),
        (lambda a: a.obsm.__setitem__("spatial", np.full((70, 2), "x")), r"sample.h5ad: expected obsm.*no numbers"),
        (lambda a: setattr(a, "obs_names", ["AA-1"] * 2 + list(a.obs_names[2:])), "found the barcode AA-1 again"),
    ):
        bad = adata.copy()
        spoil(bad)
        refused(match, only, saved(bad, tmp_path))
    refused("expected an H&E image, found none", import_slice, only(saved(adata, tmp_path)), tmp_path / "out")
    (tmp_path / "corrupt.h5ad").write_bytes(b"no HDF5")
    refused("corrupt.h5ad: expected an .h5ad file", only, tmp_path / "corrupt.h5ad")
    refused("no such file or folder", only, tmp_path / "nowhere.h5ad")
    refused("expected an .h5ad file or a folder", only, tmp_path)


def test_a_hest_folder_without_an_image(simulated, tmp_path):
    folder = write_hest(tmp_path / "hest", {"A": simulated / "P01_1", "B": simulated / "P02_1"})
    (folder / "wsis" / "B.tif").unlink()
    refused("one H&E image of B, found none; name it with --image", lambda: next(read_h5ad(folder)))
    refused("--image: expected one sample, found A, B", lambda: next(read_h5ad(folder, folder / "wsis" / "A.tif")))


def square(n=6, px=20.0):
    axes = np.meshgrid(np.arange(n), np.arange(n + 2))
    return np.column_stack([axis.ravel() for axis in axes]) * px


def test_a_square_array_needs_a_pitch_or_the_size_of_a_pixel(tmp_path, rng):
    adata = anndata.AnnData(rng.poisson(2, (48, 3)).astype(np.float32), var=pd.DataFrame(index=list("ABC")))
    adata.obsm["spatial"] = square() + 30
    refused("use --spot_pitch_um", only, saved(adata, tmp_path))
    assert only(saved(adata, tmp_path), None, 55.0).pitch_um == 55
    adata.uns["pixel_size_um_estimated"] = 0.4
    assert only(saved(adata, tmp_path)).pitch_um == pytest.approx(8)


@pytest.mark.parametrize(
    ("name", "content", "found"),
    [
        ("a.h5ad.gz", b"", "a packed file: gunzip it first"),
        ("a.h5ad", b"\x1f\x8b\x08", "a packed file: gunzip it first"),
        ("a.loom", b"", "a loom file"),
        ("a.rds", b"", "a file of R"),
        ("a.RData", b"", "a file of R"),
        ("a.h5mu", b"", "a MuData file"),
        ("a.h5Seurat", b"", "a Seurat file"),
        ("GSE1_RAW.tar", b"", "an archive"),
    ],
)
def test_files_of_other_forms_are_named(tmp_path, name, content, found):
    (tmp_path / name).write_bytes(content)
    refused(f"{name}: expected an .h5ad file, found {found}", only, tmp_path / name)


@pytest.mark.parametrize(
    ("keys", "found"),
    [(["matrix"], "a 10x matrix"), (["matrix", "row_attrs", "col_attrs"], "a loom"), (["x"], "with x")],
)
def test_other_hdf5_is_named(tmp_path, keys, found):
    with h5py.File(tmp_path / "a.h5ad", "w") as file:
        for key in keys:
            file.create_group(key)
    refused(f"a.h5ad: expected an .h5ad file, found .*{found}", only, tmp_path / "a.h5ad")


def test_folders_of_other_forms_are_named(simulated, tmp_path):
    for name, files, found in (
        ("store.zarr", ["x"], "a zarr store: --format spatialdata"),
        ("store", [".zgroup"], "a zarr store"),
        ("several", ["a.h5ad", "b.h5ad"], "a.h5ad, b.h5ad; give one of them"),
        ("geo", ["GSM1_A_barcodes.tsv.gz", "GSM1_A_matrix.mtx.gz"], "files as GEO keeps them .GSM1_A_barcodes.tsv.gz"),
    ):
        (tmp_path / name).mkdir()
        for file in files:
            (tmp_path / name / file).write_text("")
        refused(found, only, tmp_path / name)
    refused(f"a Space Ranger folder, which needs no import: use --data {simulated}", only, simulated / "P01_1")


def test_metadata_that_is_no_json(root, tmp_path):
    folder = write_hest(tmp_path / "hest", {"S": root})
    (folder / "metadata" / "S.json").write_text("{")
    refused("S.json: expected metadata in JSON", only, folder)
    (folder / "metadata" / "S.json").write_text(json.dumps({"pixel_size_um_estimated": None, "inter_spot_dist": "x"}))
    assert only(folder).pitch_um == 100 and only(folder).patient == "S"
    (folder / "metadata" / "S.json").write_text('{"patient": NaN}')
    assert only(folder).patient == "S"
