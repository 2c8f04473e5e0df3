"""predict_slide.py: slices and images, with and without counts; what is written."""

import importlib.util
import json
import re
import shutil
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from slide_runs import page_content, predict, read, record, strict
from test_geojson import check_qupath

from utils.evaluation import metrics
from utils.files.arrays import ArrayStore
from utils.images import tiles
from utils.prediction import outputs, slide_features
from utils.prediction.members import Member
from utils.prediction.predict import RunningMoments
from utils.training import checkpoint

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def unmeasured(trained, section, tmp_path_factory):
    """Results of its image alone, on a grid, with the deviation over flipped and rotated tiles."""
    flags = ("--um_per_px", 1, "--prediction_std")
    return predict(section[1], trained.decoder, tmp_path_factory.mktemp("unmeasured"), *flags)


# ---- what is predicted


def test_a_slice_is_predicted_as_decoder_similarity_does(evaluated, measured):
    """Of the same pixels, in the same precision."""
    similarity = evaluated.out / "results" / "similarity"
    ours, theirs = read(measured), read(similarity)
    theirs = theirs[ours.obs_names]
    np.testing.assert_allclose(ours.X, theirs.X, atol=1e-5)
    np.testing.assert_array_equal(ours.layers["counts"], theirs.layers["counts"])
    np.testing.assert_array_equal(ours.obsm["spatial"], theirs.obsm["spatial"])
    assert ours.obs["total_counts"].tolist() == theirs.obs["total_counts"].tolist()
    np.testing.assert_array_equal(ours.var["val_pcc"], theirs.var["val_pcc"])
    found, expected = (json.loads((out / "metrics.json").read_text()) for out in (measured, similarity))
    for figure in ("pcc_gene_mean", "pcc_spot_mean", "mse", "sd_ratio"):
        assert found["lognorm"]["model"][figure] == pytest.approx(expected["lognorm"]["model"][figure], abs=1e-5)


def test_positions_of_a_file_replace_those_of_the_slice_and_the_deviation_leaves_the_mean_alone(
    trained, section, measured, tmp_path
):
    positions = tmp_path / "spots of P03.csv"
    shutil.copy(next((section[0] / "spatial").glob("tissue_positions*")), positions)
    out = predict(section[1], trained.decoder, tmp_path / "out", "--positions", positions, "--prediction_std")
    one, other = read(out), read(measured)
    assert set(one.obs_names) == set(other.obs_names) and "prediction_std" in one.layers
    np.testing.assert_allclose(one[other.obs_names].X, other.X, atol=1e-4)
    assert "counts" not in one.layers and not (out / "metrics.json").exists()


def test_an_image_gets_a_grid_on_its_tissue(unmeasured, section):
    adata = read(unmeasured)
    spots = pd.read_csv(unmeasured / "predictions.csv", index_col="barcode")
    assert 40 < adata.n_obs < 90 and adata.obs_names[0].count("x") == 1
    distance = np.linalg.norm(adata.obsm["spatial"][:, None] - adata.obsm["spatial"], axis=2)
    assert np.sort(distance, axis=1)[:, 1].min() == pytest.approx(100, abs=0.01)
    place = adata.obs[["array_row", "array_col"]].to_numpy()
    assert (place.sum(1) % 2 == 0).all()
    np.testing.assert_allclose(spots[["x", "y"]], adata.obsm["spatial"], rtol=1e-5)
    np.testing.assert_allclose(spots[adata.var_names], adata.X, rtol=1e-4, atol=1e-4)
    assert spots.columns[:3].tolist() == ["x", "y", "domain_score"]
    assert (adata.layers["prediction_std"] > 0).all() and "measured" not in adata.layers


def test_several_decoders_give_mean_and_deviation_and_share_features(trained, section, measured, tmp_path, monkeypatch):
    state = checkpoint.load(trained.decoder, "stage_two", "--decoder")
    state["model"]["target_mean"] += 2.0
    state["val_pcc"] = state["val_pcc"] + 0.5
    state.pop("format"), state.pop("kind")
    checkpoint.save(tmp_path / "other.pth", "stage_two", **state)
    calls, stream = [], tiles.cut_tiles
    monkeypatch.setattr(tiles, "cut_tiles", lambda s, c, *a, **k: calls.append(len(c)) or stream(s, c, *a, **k))
    both = [trained.decoder, tmp_path / "other.pth"]
    adata, alone = read(predict(section[0], both, tmp_path / "out")), read(measured)
    np.testing.assert_allclose(adata.X, alone.X + 1.0, atol=1e-4)
    np.testing.assert_allclose(adata.layers["prediction_std"], 1.0, atol=1e-4)
    np.testing.assert_allclose(adata.obs["domain_score"], alone.obs["domain_score"], rtol=1e-5)
    assert calls.count(adata.n_obs) == 1, "one pass over the tiles for both"
    np.testing.assert_allclose(pd.read_csv(tmp_path / "out" / "genes.csv")["val_pcc"], adata.var["val_pcc"], rtol=1e-5)
    np.testing.assert_allclose(adata.var["val_pcc"], alone.var["val_pcc"] + 0.25, rtol=1e-5)


def test_mean_and_deviation_one_after_the_other(rng, tmp_path):
    several = rng.normal(5, 2, (8, 30, 4)).astype(np.float32)
    moments = RunningMoments(ArrayStore(1e-9, tmp_path))
    assert moments.std is None
    for one in several:
        moments.add(one)
    np.testing.assert_allclose(moments.mean, several.mean(0), rtol=1e-5)
    np.testing.assert_allclose(moments.std, several.std(0), rtol=1e-4)


def test_tiles_are_asked_for_one_batch_after_the_other():
    asked = []

    def batches():
        for i in range(5):
            asked.append(i)
            yield np.full((2, 8, 8, 3), i, np.uint8)

    how = slide_features.TileEncoder(lambda t: t.flatten(1)[:, :1], 8, torch.device("cpu"), 2, 0)
    found = slide_features.encode_stream(how, batches(), 10, "slide")
    assert next(found).shape == (2, 1) and asked == [0]
    assert len(list(found)) == 4


# ---- what is written


def test_all_files_are_there_and_whole(measured, unmeasured):
    files = {"predictions.h5ad", "predictions.csv", "predictions.geojson", "report.html", "settings.json", "maps"}
    assert {path.name for path in unmeasured.iterdir()} == files
    assert {path.name for path in measured.iterdir()} == files | {"metrics.json", "genes.csv"}
    for out in (measured, unmeasured):
        maps = sorted(path.stem for path in (out / "maps").iterdir())
        best = read(out).var["val_pcc"].idxmax()
        assert maps == sorted([best, "domain_score"])
        assert record(out)["n_spots"] == read(out).n_obs
        assert "</html>" in (out / "report.html").read_text()


def test_scanpy_and_squidpy_plot_the_file_as_it_is(measured, unmeasured):
    import scanpy
    import squidpy

    plt.switch_backend("Agg")
    for out in (measured, unmeasured):
        adata = scanpy.read_h5ad(out / "predictions.h5ad")
        axes = scanpy.pl.spatial(adata, color="KRT8", show=False)[0]
        assert axes.images and axes.get_title() == "KRT8"
        squidpy.pl.spatial_scatter(adata, color=["ERBB2", "domain_score"])
        assert len(plt.gcf().axes) >= 2
        plt.close("all")


@pytest.fixture(scope="module")
def residuals(trained, section, tmp_path_factory):
    """Results of the slice by a model of which the predictions are taken as residuals."""
    out = tmp_path_factory.mktemp("residuals")
    state = checkpoint.load(trained.decoder, "stage_two", "--decoder") | {"target": "residuals"}
    state.pop("format"), state.pop("kind")
    checkpoint.save(out / "model.pth", "stage_two", **state)
    return predict(section[0], out / "model.pth", out / "predicted"), state


def test_scanpy_users_find_what_they_expect(evaluated, measured, unmeasured, residuals):
    found, state = read(residuals[0]), residuals[1]
    n, p = state["train_depth"], state["gene_fraction"].numpy()
    expected = metrics.to_lognorm("residuals", found.X, n, p)
    np.testing.assert_allclose(found.layers["lognorm"], expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(read(measured).layers["lognorm"], read(measured).X)
    theirs = read(evaluated.out / "results" / "similarity")
    for adata in (read(measured), read(unmeasured), found, theirs):
        assert (adata.obs["in_tissue"] == 1).all()
        (library,) = adata.uns["spatial"].values()
        assert set(library["images"]) == {"hires", "lowres"}
        about = adata.uns["magic"]
        assert len(about["model_hash"]) == 64 and about["scale"] == about["target"]
        assert set(about["units"]) == {"X", *adata.layers}
        assert about["units"]["X"] in about["X"] and about["units"]["lognorm"] == "log1p counts per 10,000"
    assert "test_pcc" not in read(unmeasured).var
    ours, genes = read(measured), pd.read_csv(measured / "genes.csv", index_col="gene")
    np.testing.assert_allclose(ours.var["test_pcc"], genes.loc[ours.var_names, "pcc_residuals_model"])
    np.testing.assert_allclose(theirs.var["test_pcc"], ours.var["test_pcc"], atol=0.02)
    np.testing.assert_allclose(theirs[ours.obs_names].layers["measured"], ours.layers["measured"], rtol=1e-5)


def test_scanpy_and_squidpy_work_on_the_layers_and_the_lowres_image(residuals):
    import scanpy
    import squidpy

    plt.switch_backend("Agg")
    adata = scanpy.read_h5ad(residuals[0] / "predictions.h5ad")
    library = adata.uns["spatial"]["P03_1"]
    axes = scanpy.pl.spatial(adata, color="KRT8", layer="lognorm", img_key="lowres", show=False)[0]
    assert axes.images[0].get_array().shape == library["images"]["lowres"].shape
    x, y = adata.obsm["spatial"].T * library["scalefactors"]["tissue_lowres_scalef"]
    (left, right), (bottom, top) = axes.get_xlim(), axes.get_ylim()
    assert left < x.min() < x.max() < right and top < y.min() < y.max() < bottom, "the spots lie in the window"
    squidpy.pl.spatial_scatter(adata, color="KRT8", layer="lognorm", img_res_key="lowres")
    plt.close("all")
    scanpy.pp.pca(adata, layer="lognorm", n_comps=5)
    adata.obs["half"] = np.where(adata.obsm["spatial"][:, 0] > np.median(adata.obsm["spatial"][:, 0]), "right", "left")
    adata.obs["half"] = adata.obs["half"].astype("category")
    scanpy.tl.rank_genes_groups(adata, "half", layer="lognorm", use_raw=False)
    first = scanpy.get.rank_genes_groups_df(adata, "right")["names"][0]
    lognorm, right = adata[:, first].layers["lognorm"], (adata.obs["half"] == "right").to_numpy()
    assert lognorm[right].mean() > lognorm[~right].mean() and np.isfinite(adata.obsm["X_pca"]).all()


def test_the_code_of_downstream_md_runs(residuals, monkeypatch):
    plt.switch_backend("Agg")
    monkeypatch.chdir(residuals[0].parent)
    blocks = re.findall(r"(?ms)^```python\n(.*?)^```$", (ROOT / "docs" / "downstream.md").read_text())
    known: dict = {}
    for block in blocks:
        if "leiden" not in block or importlib.util.find_spec("igraph"):
            exec(compile(block, "docs/downstream.md", "exec"), known)
    adata, ranked = known["adata"], known["ranked"]
    assert (np.diff(adata[ranked, known["genes"][0]].X.ravel()) <= 0).all(), "the highest spot first"
    of_spots = adata[:, known["genes"][:1]].layers["lognorm"][adata.obs["region"] == known["means"].obs_names[0]]
    assert known["means"].layers["mean"][0, adata.var_names.get_loc(known["genes"][0])] == pytest.approx(
        of_spots.mean()
    )
    assert np.isfinite(adata.obs["signature"]).all() and (residuals[0].parent / "maps.png").exists()
    assert known["measured"].uns["moranI"]["I"].between(-1, 1.2).all()
    plt.close("all")


def test_the_geojson_is_what_qupath_reads(measured):
    adata = read(measured)
    made = check_qupath(strict((measured / "predictions.geojson").read_text()))
    assert [one["properties"]["name"] for one in made] == adata.obs_names.tolist()
    assert set(made[0]["properties"]["measurements"]) == {"domain_score", *adata.var_names}
    centre = np.mean(made[0]["geometry"]["coordinates"][0][:-1], axis=0)
    np.testing.assert_allclose(centre, adata.obsm["spatial"][0], atol=0.01)


def test_metrics_are_json_and_beside_the_mean_profile(measured):
    found = strict((measured / "metrics.json").read_text())
    assert set(found["residuals"]) == {"model", "mean"} and found["n_spots"] == 70
    assert found["residuals"]["mean"]["pcc_gene_mean"] is None
    assert found["lognorm"]["model"]["mse"] > 0 and found["residuals"]["model"]["mse"] is None
    assert len(pd.read_csv(measured / "genes.csv")) == found["n_genes"] == 20


def test_the_page_has_the_columns_of_genes_csv_and_no_folder(measured, unmeasured, trained):
    for out in (measured, unmeasured):
        text = (out / "report.html").read_text()
        assert str(out) not in text and str(trained.decoder.parent) not in text and str(trained.data) not in text
        assert set(page_content(out)["columns"]) == set(page_content(out)["geneNotes"])
    columns, genes = page_content(measured)["columns"], pd.read_csv(measured / "genes.csv")
    np.testing.assert_allclose(columns["PCC, residuals"], genes["pcc_residuals_model"], rtol=1e-5)
    np.testing.assert_allclose(columns["PCC, lognorm"], genes["pcc_lognorm_model"], rtol=1e-5)
    assert next(iter(columns)) == "PCC, residuals" and "PCC, residuals" not in page_content(unmeasured)["columns"]


def by_hand(adata):
    from utils.prediction.layout import SlideSpots

    place = adata.obs[["array_row", "array_col"]].to_numpy()
    spots = SlideSpots(
        "P03_1", adata.obs_names.to_numpy(str), adata.obsm["spatial"], place, 100, 55, 1, 1, np.ones(adata.n_obs)
    )
    library = adata.uns["spatial"]["P03_1"]
    scale = library["scalefactors"]["tissue_hires_scalef"]
    return outputs.Prediction(
        spots=spots,
        genes=adata.var_names.tolist(),
        target="lognorm",
        predicted=adata.X,
        prediction_std=None,
        domain_score=adata.obs["domain_score"].to_numpy(),
        interval=(np.full(adata.n_vars, -1.0), np.ones(adata.n_vars)),
        val_pcc=adata.var["val_pcc"].to_numpy(),
        image=library["images"]["hires"],
        image_scale=scale,
    )


@pytest.mark.slow
def test_the_spatialdata_file_is_read_again(measured, tmp_path):
    spatialdata = pytest.importorskip("spatialdata")
    one = by_hand(read(measured))
    for _ in range(2):  # over an earlier one
        outputs.write_spatialdata(tmp_path / "a.zarr", one)
    found = spatialdata.read_zarr(tmp_path / "a.zarr")
    np.testing.assert_allclose(found.tables["predicted"].X, one.predicted, rtol=1e-6)
    centres = np.array([[p.x, p.y] for p in found.shapes["spots"].geometry])
    np.testing.assert_allclose(centres, one.spots.xy_fullres_px)
    assert found.images["image"].shape == (3, *one.image.shape[:2])


# ---- out of domain, scale


def test_a_slide_unlike_anything_is_warned_of(trained, tmp_path, rng, capsys):
    """Noise in colours no stain has, few spots of it: the train statistics serve, too."""
    noise = rng.integers(0, 255, (60, 60, 3), dtype=np.uint8)
    Image.fromarray(noise).resize((600, 600), Image.Resampling.NEAREST).save(tmp_path / "noise.png")
    full = Image.new("L", (60, 60), 1)
    full.save(tmp_path / "mask.png")
    flags = ("--um_per_px", 1, "--mask", tmp_path / "mask.png", "--grid", "square")
    out = predict(tmp_path / "noise.png", trained.decoder, tmp_path / "out", *flags)
    said = capsys.readouterr().out
    assert "warning: noise: unlike the slides that the model was trained on: 100% of the spots" in said
    assert "under 64" in said and (read(out).obs["out_of_domain"]).all()
    verdict = record(out)["domain"]["verdict"]
    assert verdict in (out / "report.html").read_text() and verdict == read(out).uns["magic"]["domain"]["verdict"]


def test_the_models_own_kind_of_slide_is_not_warned_of(measured, unmeasured):
    for out in (measured, unmeasured):
        domain, adata = record(out)["domain"], read(out)
        assert domain["flagged"] == adata.obs["out_of_domain"].mean() < 0.3
        assert domain["calibrated_on"] == "validation slices" and domain["slide_score"] < 2
        assert (adata.obs["tissue_fraction"] > 0.3).mean() > 0.9 and domain["bare_glass"] < 4


def test_a_coarser_image_is_enlarged_with_a_warning(trained, section, unmeasured, tmp_path, capsys):
    image = Image.open(section[1])
    small = image.resize([side // 7 for side in image.size], Image.Resampling.LANCZOS)
    small.save(tmp_path / "small.png")
    out = predict(tmp_path / "small.png", trained.decoder, tmp_path / "out", "--um_per_px", 7)
    assert (
        "7 um per px, the model was trained on 3.5 (tiles of 3.5 from scans of 1): 2.0 times" in capsys.readouterr().out
    )
    assert abs(read(out).n_obs - read(unmeasured).n_obs) < 12
    assert record(out)["spot_pitch_fullres_px"] == pytest.approx(100 / 7)


def test_intervals_lie_around_the_prediction_and_are_those_of_the_checkpoint(trained, measured):
    adata, ends = read(measured), checkpoint.load(trained.decoder, "stage_two", "--decoder")["interval"]
    low, high = adata.layers["interval_low"], adata.layers["interval_high"]
    np.testing.assert_allclose(high, adata.X + ends["high"].numpy(), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(low, np.maximum(adata.X + ends["low"].numpy(), 0), rtol=1e-4, atol=1e-4)
    inside = (adata.layers["measured"] >= low) & (adata.layers["measured"] <= high)
    assert inside.mean() > 0.7


def test_a_gene_is_predictable_by_validation_on_other_patients(trained, section, measured, tmp_path):
    adata = read(measured)
    assert adata.var["val_pcc_above_0.1"].tolist() == (adata.var["val_pcc"] >= 0.1).tolist()
    state = checkpoint.load(trained.decoder, "stage_two", "--decoder")
    state["table"] = [line | {"patient": "P01"} for line in state["table"]]
    state.pop("format"), state.pop("kind")
    checkpoint.save(tmp_path / "shared.pth", "stage_two", **state, left_out_pcc=torch.full((20,), 0.2))
    adata = read(predict(section[0], tmp_path / "shared.pth", tmp_path / "out"))
    assert adata.var["val_pcc_above_0.1"].isna().all() and adata.var["left_out_pcc"].eq(np.float32(0.2)).all()
    assert "shares P01" in adata.uns["magic"]["genes"]["val_pcc_above_0.1"]
    assert '"weak":null' in (tmp_path / "out" / "report.html").read_text()


def test_spots_of_another_pitch_than_the_models_are_warned_of(capsys):
    from utils.prediction.layout import SlideSpots, warn_of_pitch

    places = (np.array(["a"]), np.zeros((1, 2)), np.zeros((1, 2), int))
    for pitch_um, warned in ((100, True), (170, False), (200, False), (260, True)):
        warn_of_pitch(SlideSpots("slide", *places, pitch_um / 0.5, 50, 0.5, 1, np.ones(1)), 200.0)
        assert ("200 um apart, whose neighbours it reads" in capsys.readouterr().out) is warned


def test_the_detail_of_an_image_is_compared_with_the_scans_of_training(capsys):
    def said(scan, um_per_px):
        state = {"tile_scale": [224, 1.0], "scan_um_per_px": scan}
        slide_features.warn_of_detail(Member(None, state, ""), "slide", um_per_px)
        return capsys.readouterr().out

    assert "2.0 times coarser" in said(0.5, 2.0) and not said(0.5, 1.0) and not said(0.5, 0.25)
    assert not said(3.0, 3.0), "the train tiles were enlarged as much"
    assert "2.0 times coarser" in said(3.0, 6.0) and "6.0 times finer" in said(3.0, 0.5)


def test_a_slice_that_the_model_was_trained_on_is_warned_of(trained, tmp_path, capsys):
    predict(trained.data / "P01_1", trained.decoder, tmp_path)
    assert "the model was trained on this slice" in capsys.readouterr().out


def test_genes_that_a_slice_lacks_are_undefined(trained, section, tmp_path):
    from tiny_runs import rewrite_matrix

    shutil.copytree(section[0], tmp_path / "P03_1")
    rewrite_matrix(tmp_path / "P03_1", lambda c, b, names: (c, b, np.where(names == "KRT8", "OTHER", names)))
    out = predict(tmp_path / "P03_1", trained.decoder, tmp_path / "out")
    adata = read(out)
    assert np.isnan(adata[:, "KRT8"].layers["measured"]).all() and np.isfinite(adata[:, "KRT8"].X).all()
    assert np.isfinite(adata[:, "ERBB2"].layers["measured"]).all()
    assert strict((out / "metrics.json").read_text())["n_genes"] == 19
