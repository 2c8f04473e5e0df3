"""Results as AnnData: spots of one or several slices, the small image, files that scanpy plots as they are."""

from dataclasses import replace
from types import SimpleNamespace

import anndata
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import scanpy
import torch
from PIL import Image
from spaceranger_folders import SCALES, write_spatial

from utils.report import anndata_files
from utils.report.anndata_files import spots_anndata, write_anndata
from utils.report.spots import SpotsOnImage, spots_on_image

PIXELS = np.random.default_rng(0).integers(0, 255, (60, 80, 3), dtype=np.uint8)


def slice_root(folder, kind="hires"):
    spatial = write_spatial(folder)
    Image.fromarray(PIXELS).save(spatial / f"tissue_{kind}_image.png")
    return folder


def part(root, name="A", n=4):
    """Spots of a slice as training reads it, without a record of tiles."""
    slice_ = SimpleNamespace(
        name=name,
        root=root,
        barcodes=np.array([f"{letter}-1" for letter in "ACGT"]),
        xy_fullres_px=np.arange(8.0).reshape(4, 2) + 100,
        pitch_fullres_px=100.0,
        pack=SimpleNamespace(record=None),
    )
    return spots_on_image(slice_, np.arange(n))


def made(*parts):
    n = sum(len(one.barcodes) for one in parts)
    var = pd.DataFrame({"val_pcc": [0.5, 0.1]}, index=["TP53", "GAPDH"])
    return spots_anndata(list(parts), np.arange(2.0 * n).reshape(n, 2), var, {"total_counts": np.arange(n)})


@pytest.mark.parametrize("kind", ["hires", "lowres"])
def test_the_small_image_and_its_scale(tmp_path, kind):
    spots = part(slice_root(tmp_path, kind))
    np.testing.assert_array_equal(spots.image, PIXELS)
    assert spots.image_scale == SCALES[f"tissue_{kind}_scalef"]
    assert spots.scalefactors["tissue_hires_scalef"] == spots.image_scale, "of the image that is there"
    assert spots.scalefactors["spot_diameter_fullres"] == 65.0 and spots.spot_diameter_px == 80.0
    entry = made(spots).uns["spatial"]["A"]
    np.testing.assert_array_equal(entry["images"]["hires"], PIXELS)
    scale = spots.image_scale
    expected = spots.scalefactors | {"tissue_hires_scalef": scale, "tissue_lowres_scalef": scale}
    assert entry["scalefactors"] == expected, "an image of under 600 px is both"


def test_the_lowres_image_has_the_scale_of_its_own_pixels():
    image = np.zeros((500, 1500, 3), np.uint8)
    image[200:210, 1200:1210] = 255
    spots = replace(
        SpotsOnImage(
            name="A",
            image=image,
            image_scale=0.5,
            xy_fullres_px=np.array([[2410.0, 410]]),
            spot_diameter_px=1,
            barcodes=["A-1"],
        ),
        scalefactors={"tissue_lowres_scalef": 9.0},
    )
    entry = spots_anndata([spots], np.zeros((1, 1)), pd.DataFrame(index=["TP53"]), {}).uns["spatial"]["A"]
    lowres = entry["images"]["lowres"]
    assert lowres.shape == (200, 600, 3)
    column, row = np.round(spots.xy_fullres_px[0] * entry["scalefactors"]["tissue_lowres_scalef"]).astype(int)
    assert lowres[row, column].min() > 200 and lowres.mean() < 1


def test_rows_are_chosen(tmp_path):
    spots = part(slice_root(tmp_path), n=2)
    assert spots.barcodes == ["A-1", "C-1"] and spots.xy_fullres_px.tolist() == [[100, 101], [102, 103]]


def test_hires_comes_before_lowres(tmp_path):
    slice_root(tmp_path, "hires")
    Image.new("RGB", (8, 6)).save(tmp_path / "spatial" / "tissue_lowres_image.png")
    assert part(tmp_path).image.shape == (60, 80, 3)


def test_a_slice_without_an_image(tmp_path):
    write_spatial(tmp_path)
    adata = made(part(tmp_path))
    assert part(tmp_path).image is None and adata.uns["spatial"]["A"]["images"] == {} and adata.n_obs == 4


def test_spots_of_one_slice_keep_their_barcodes(tmp_path):
    adata = made(part(slice_root(tmp_path)))
    assert adata.obs_names.tolist() == ["A-1", "C-1", "G-1", "T-1"] and set(adata.obs["slice"]) == {"A"}
    assert adata.var["val_pcc"].tolist() == [0.5, 0.1] and adata.X.dtype == np.float32
    assert adata.obs["total_counts"].tolist() == [0, 1, 2, 3]
    np.testing.assert_array_equal(adata.obsm["spatial"], part(tmp_path).xy_fullres_px)


def test_spots_of_several_slices_have_names_of_their_own(tmp_path):
    first, second = part(slice_root(tmp_path / "a"), "A"), part(slice_root(tmp_path / "b"), "B/outs", 2)
    adata = made(first, second)
    assert adata.obs_names.tolist() == ["A:A-1", "A:C-1", "A:G-1", "A:T-1", "B/outs:A-1", "B/outs:C-1"]
    assert adata.obs["slice"].tolist() == ["A"] * 4 + ["B_outs"] * 2 and set(adata.uns["spatial"]) == {"A", "B_outs"}
    np.testing.assert_array_equal(adata.obsm["spatial"], np.concatenate([first.xy_fullres_px, second.xy_fullres_px]))


def test_scanpy_reads_and_plots_the_file(tmp_path):
    plt.switch_backend("Agg")
    parts = part(slice_root(tmp_path / "a"), "A"), part(slice_root(tmp_path / "b"), "B/outs", 2)
    write_anndata(tmp_path / "out" / "predictions.h5ad", made(*parts))
    adata = scanpy.read_h5ad(tmp_path / "out" / "predictions.h5ad")
    for library in ("A", "B_outs"):
        one = adata[adata.obs["slice"] == library]
        axes = scanpy.pl.spatial(one, color="GAPDH", library_id=library, show=False)[0]
        assert axes.images and axes.get_title() == "GAPDH"
    plt.close("all")


def test_lognorm_of_several_models_is_at_their_mean_depth(monkeypatch):
    monkeypatch.setattr(anndata_files, "SPOTS_AT_ONCE", 2)
    known = ((1e3, 0.2), (3e3, 0.4))
    states = [
        {"target": "residuals", "train_depth": n, "gene_fraction": torch.tensor([p], dtype=torch.float64)}
        for n, p in known
    ]
    found = anndata_files.predicted_lognorm(states, np.array([[0.0], [-99], [0]], np.float32))
    np.testing.assert_allclose(found[:, 0], np.log1p([3000, 0, 3000]), rtol=1e-6)
    found = anndata_files.predicted_lognorm([states[0] | {"target": "counts"}], np.ones((1, 1)))
    np.testing.assert_allclose(found, np.log(2))


def test_an_interrupted_write_leaves_the_old_file(tmp_path, monkeypatch):
    path, adata = tmp_path / "predictions.h5ad", made(part(slice_root(tmp_path)))
    write_anndata(path, adata)
    whole = path.read_bytes()

    def corrupt(self, file):
        file.write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(anndata.AnnData, "write_h5ad", corrupt)
    with pytest.raises(KeyboardInterrupt):
        write_anndata(path, adata)
    assert path.read_bytes() == whole
