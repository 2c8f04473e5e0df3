"""Results as AnnData: spots of one or several slices, the small image, files that scanpy plots as they are."""

import anndata
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import scanpy
from PIL import Image
from spaceranger_folders import SCALES, write_spatial

from utils.slices import export

PIXELS = np.random.default_rng(0).integers(0, 255, (60, 80, 3), dtype=np.uint8)


def slice_root(folder, kind="hires"):
    spatial = write_spatial(folder)
    Image.fromarray(PIXELS).save(spatial / f"tissue_{kind}_image.png")
    return folder


def part(root, name="A", n=4):
    return name, root, np.array([f"{letter}-1" for letter in "ACGT"[:n]]), np.arange(2.0 * n).reshape(n, 2) + 100


def made(*parts):
    n = sum(len(one[2]) for one in parts)
    var = pd.DataFrame({"val_pcc": [0.5, 0.1]}, index=["TP53", "GAPDH"])
    return export.spots_anndata(list(parts), np.arange(2.0 * n).reshape(n, 2), var, {"total_counts": np.arange(n)})


@pytest.mark.parametrize("kind", ["hires", "lowres"])
def test_the_small_image_and_its_scale(tmp_path, kind):
    pixels, scale = export.small_image(slice_root(tmp_path, kind))
    np.testing.assert_array_equal(pixels, PIXELS)
    assert scale == SCALES[f"tissue_{kind}_scalef"]
    entry = export.spatial_entry(tmp_path)
    np.testing.assert_array_equal(entry["images"]["hires"], PIXELS)
    assert entry["scalefactors"]["tissue_hires_scalef"] == scale, "of the image that is there"
    assert entry["scalefactors"]["spot_diameter_fullres"] == 65.0


def test_hires_comes_before_lowres(tmp_path):
    slice_root(tmp_path, "hires")
    Image.new("RGB", (8, 6)).save(tmp_path / "spatial" / "tissue_lowres_image.png")
    assert export.small_image(tmp_path)[0].shape == (60, 80, 3)


def test_a_slice_without_a_image(tmp_path):
    write_spatial(tmp_path)
    assert export.small_image(tmp_path) is None
    assert export.spatial_entry(tmp_path)["images"] == {}
    assert made(part(tmp_path)).n_obs == 4


def test_spots_of_one_slice_keep_their_barcodes(tmp_path):
    adata = made(part(slice_root(tmp_path)))
    assert adata.obs_names.tolist() == ["A-1", "C-1", "G-1", "T-1"] and set(adata.obs["slice"]) == {"A"}
    assert adata.var["val_pcc"].tolist() == [0.5, 0.1] and adata.X.dtype == np.float32
    assert adata.obs["total_counts"].tolist() == [0, 1, 2, 3]
    np.testing.assert_array_equal(adata.obsm["spatial"], part(tmp_path)[3])


def test_spots_of_several_slices_have_names_of_their_own(tmp_path):
    first, second = part(slice_root(tmp_path / "a"), "A"), part(slice_root(tmp_path / "b"), "B/outs", 2)
    adata = made(first, second)
    assert adata.obs_names.tolist() == ["A:A-1", "A:C-1", "A:G-1", "A:T-1", "B/outs:A-1", "B/outs:C-1"]
    assert adata.obs["slice"].tolist() == ["A"] * 4 + ["B_outs"] * 2 and set(adata.uns["spatial"]) == {"A", "B_outs"}
    np.testing.assert_array_equal(adata.obsm["spatial"], np.concatenate([first[3], second[3]]))


def test_scanpy_reads_and_plots_the_file(tmp_path):
    plt.switch_backend("Agg")
    parts = part(slice_root(tmp_path / "a"), "A"), part(slice_root(tmp_path / "b"), "B/outs", 2)
    export.write_anndata(tmp_path / "out" / "predictions.h5ad", made(*parts))
    adata = scanpy.read_h5ad(tmp_path / "out" / "predictions.h5ad")
    for library in ("A", "B_outs"):
        one = adata[adata.obs["slice"] == library]
        axes = scanpy.pl.spatial(one, color="GAPDH", library_id=library, show=False)[0]
        assert axes.images and axes.get_title() == "GAPDH"
    plt.close("all")


def test_an_interrupted_write_leaves_the_old_file(tmp_path, monkeypatch):
    path, adata = tmp_path / "predictions.h5ad", made(part(slice_root(tmp_path)))
    export.write_anndata(path, adata)
    whole = path.read_bytes()

    def corrupt(self, file):
        file.write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(anndata.AnnData, "write_h5ad", corrupt)
    with pytest.raises(KeyboardInterrupt):
        export.write_anndata(path, adata)
    assert path.read_bytes() == whole
