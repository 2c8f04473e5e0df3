"""The six scripts in their order on tiny slices: what they write, what the next one reads, and that it repeats."""

import json
import math
import shutil

import anndata
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import scanpy
import torch
from PIL import Image
from tiny_runs import BEST, LAST, PREVIOUS, Work, snapshot

from model.domain import N_STATISTICS
from model.image_encoder import ImageEncoder
from utils import distributed
from utils.features import cache
from utils.genes import panels as gene_panels
from utils.slices import splits
from utils.training import checkpoint

ACCURACY = ("depth", "contrastive", "matching", "reranked")
ROWS = ("model", "mean", "depth", "ridge", "ridge_neighbours", "knn")
FIGURES = {
    *("pcc_gene_mean", "pcc_gene_median", "pcc_gene_top50", "pcc_gene_given_depth", "pcc_spot_mean"),
    *("spearman_gene_mean", "mse", "mae", "sd_ratio", "undefined_genes"),
}
WITHOUT = {
    "mean": {f for f in FIGURES if f.startswith(("pcc_gene", "spearman"))} | {"sd_ratio"},
    "depth": {"mse", "mae", "sd_ratio", "pcc_spot_mean", "pcc_gene_given_depth"},
}
ERRORS = {"mse", "mae", "sd_ratio"}  # null outside the fitted scale


def read_json(path):
    def refuse(word):
        raise AssertionError(f"{path} holds {word}")

    return json.loads(path.read_text(), parse_constant=refuse)


def numbers(tree):
    if isinstance(tree, dict | list):
        return [n for branch in (tree.values() if isinstance(tree, dict) else tree) for n in numbers(branch)]
    return [tree]


# ---- training


@pytest.mark.parametrize(("stage", "folder"), [("stage_one", "encoder_model"), ("stage_two", "decoder_model")])
def test_training_writes_its_checkpoints_its_table_and_its_log(evaluated, stage, folder):
    out, (log,) = evaluated.out / folder, (evaluated.out / "logs" / stage).iterdir()
    assert {path.name for path in out.iterdir() if path.is_file()} == {BEST, LAST, PREVIOUS, "slices.csv"}
    rows, _ = splits.read_table(evaluated.data, out / "slices.csv")
    assert [(row.slice, row.part) for row in rows] == [("P01_1", "train"), ("P02_1", "val"), ("P03_1", "test")]
    assert {"settings.json", "log.jsonl", "epoch_loss.png"} <= {path.name for path in log.iterdir()}
    assert Image.open(log / "epoch_loss.png").format == "PNG"
    settings = read_json(log / "settings.json")
    assert settings["Init_lr"] == 1e-3 and settings["n_train_spots"] == 70
    (line,) = (log / "log.jsonl").read_text().splitlines()
    row = json.loads(line)
    assert row["epoch"] == 0 and all(math.isfinite(value) for value in row.values())


def test_the_losses_of_stage_one_stand_beside_their_chance(evaluated):
    (log,) = (evaluated.out / "logs" / "stage_one").iterdir()
    row = json.loads((log / "log.jsonl").read_text())
    candidates = [16 + 16 * step for step in range(4)]  # the queue holds 70 - 16 spots at most: 16, 32, 48, 64
    within_the_batch = np.log(16)
    assert row["contrast_chance"] == pytest.approx((within_the_batch + np.mean(np.log(candidates))) / 2)
    assert row["val_R@5_chance"] == pytest.approx(5 / 70)
    assert row["matching_chance"] == pytest.approx(0.6365, abs=1e-4)
    parts = ("contrast_loss", "matching_loss", "expression_loss")
    assert row["loss"] == pytest.approx(sum(row[part] for part in parts), rel=1e-5), "each of weight 1 here"


def test_a_checkpoint_holds_what_is_needed_elsewhere(evaluated):
    one = checkpoint.load(evaluated.encoder, "stage_one", "--encoder")
    two = checkpoint.load(evaluated.decoder, "stage_two", "--decoder")
    for role, state in (("input", one), ("target", two)):
        panel = gene_panels.read_panel(gene_panels.panel_path(evaluated.data, evaluated.panels, "P01_1", role))
        assert state["genes"] == panel.genes and state["tile_scale"] == [32, 3.5]
        assert state["counts_hashes"]["P01_1"] == panel.counts_hash and state["settings"]["seed"] == 0
    assert two["val_pcc"].shape == (20,) and two["target"] == "lognorm"
    assert {"mean", "sd"} == set(two["feature_moments"]) and two["sizes"]["decoder_width"] == 16
    assert two["domain"]["bank"].shape == (70, N_STATISTICS) and two["domain_calibration"] == "validation slices"
    assert two["domain"]["limit"] > 0 and two["domain"]["slide_limit"] > 0
    interval = two["interval"]
    assert interval["n_spots"] == 70 and (interval["low"] < interval["high"]).all()
    assert (two["spot_pitch_um"], two["grid"]) == (100.0, "hexagonal")
    assert two["scan_um_per_px"] == pytest.approx(1, rel=0.01)
    prefix = "image_encoder."
    shared = {name for name in one["model"] if name.startswith(prefix)}
    assert shared and all(torch.equal(one["model"][name], two["model"][name]) for name in shared), "frozen"


def test_features_are_computed_once_for_each_encoder(evaluated, tmp_path, monkeypatch):
    work = Work(evaluated.data, evaluated.tiles, evaluated.panels, tmp_path)
    shutil.copytree(evaluated.decoder.parent / "features", work.decoder.parent / "features")
    kept = snapshot(work.decoder.parent / "features")
    assert {path.name for path in kept} == {f"P0{i}_1.{kind}" for i in (1, 2) for kind in ("npy", "json")}
    with monkeypatch.context() as patch:
        patch.setattr(cache, "encode_slice", lambda *_: pytest.fail("computed again"))
        work.run("train_decoder", "--encoder", evaluated.encoder, "--Epoch", 1, "--Init_lr", 1e-3)
    assert snapshot(work.decoder.parent / "features") == kept
    same, other = (checkpoint.load(one.decoder, "stage_two", "--decoder")["model"] for one in (work, evaluated))
    assert all(torch.equal(same[name], other[name]) for name in other), "kept features teach as fresh ones do"
    shutil.copy(evaluated.encoder.with_name(LAST), tmp_path / "encoder.pth")
    work.run("train_decoder", "--encoder", tmp_path / "encoder.pth", "--Epoch", 1)
    assert snapshot(work.decoder.parent / "features") != kept


# ---- retrieval


def check_retrieval(metrics, n_spots):
    """The keys of the design, accuracies in 0..1, intervals around them."""
    assert metrics["n_spots"] == n_spots
    for name, chance in (("neighbours", 1 / 9), ("random10", 1 / 10)):
        gallery = metrics[name]
        assert gallery["chance"] == pytest.approx(chance, abs=0.01)
        assert set(gallery) == {"chance", "interval", *ACCURACY} and set(gallery["interval"]) == set(ACCURACY)
        for row in ACCURACY:
            low, high = gallery["interval"][row]
            assert 0 <= low <= gallery[row] <= high <= 1
    ways = metrics["slice"]
    assert set(ways) == {"image_to_gene", "gene_to_image", "chance"}
    for way in ways.values():
        assert set(way) == {"R@1", "R@5", "R@10", "median_rank"}
        assert 0 <= way["R@1"] <= way["R@5"] <= way["R@10"] <= 1 <= way["median_rank"] <= n_spots
    assert [ways["chance"][f"R@{k}"] for k in (1, 5, 10)] == pytest.approx([k / n_spots for k in (1, 5, 10)])


def test_retrieval_figures(evaluated):
    metrics = read_json(evaluated.out / "results" / "retrieval" / "metrics.json")
    check_retrieval(metrics, 70)
    assert set(metrics) == {"n_spots", "neighbours", "random10", "slice", "per_slice", "leak"} and metrics["leak"] == []
    assert set(metrics["per_slice"]) == {"P03_1"}
    check_retrieval(metrics["per_slice"]["P03_1"], 70)
    assert all(isinstance(n, int | float) for n in numbers(metrics))


def test_retrieval_files(evaluated):
    out = evaluated.out / "results" / "retrieval"
    spots = pd.read_csv(out / "spots.csv", index_col="spot")
    metrics = read_json(out / "metrics.json")
    assert len(spots) == 70
    for gallery in ("neighbours", "random10"):
        for row in ACCURACY:
            assert spots[f"{gallery}_{row}"].mean() == pytest.approx(metrics[gallery][row])
    for way in ("image_to_gene", "gene_to_image"):
        assert (spots[f"rank_{way}"] <= 5).mean() == pytest.approx(metrics["slice"][way]["R@5"])
    assert Image.open(out / "retrieval_curve.png").format == "PNG"
    adata = anndata.read_h5ad(out / "predictions.h5ad")
    for kind in ("image", "gene"):
        np.testing.assert_allclose(np.linalg.norm(adata.obsm[f"X_{kind}"], axis=1), 1, atol=1e-5)
    similarity = adata.obsm["X_image"] @ adata.obsm["X_gene"].T
    ranks = (similarity >= np.diag(similarity)[:, None]).sum(1)
    np.testing.assert_array_equal(adata.obs["rank_image_to_gene"], ranks)
    panel = gene_panels.read_panel(gene_panels.panel_path(evaluated.data, evaluated.panels, "P03_1", "input"))
    np.testing.assert_array_equal(adata.X, gene_panels.bin_tokens(panel.read_counts(), panel.total_counts))


# ---- expression


def check_similarity(metrics, fitted):
    for scale in ("lognorm", "residuals", "counts"):
        assert set(metrics[scale]) == set(ROWS)
        for row, found in metrics[scale].items():
            null = WITHOUT.get(row, set()) | (set() if scale == fitted else ERRORS)
            assert set(found) == FIGURES
            absent = {figure for figure, value in found.items() if value is None}
            assert absent == null, (scale, row)
            assert all(math.isfinite(value) for value in found.values() if value is not None)
            assert all(-1 <= value <= 1 for figure, value in found.items() if "pcc" in figure and value is not None)


def test_expression_figures(evaluated):
    metrics = read_json(evaluated.out / "results" / "similarity" / "metrics.json")
    assert (metrics["n_spots"], metrics["n_genes"]) == (70, 20)
    check_similarity(metrics, "lognorm")
    assert set(metrics["per_slice"]) == {"P03_1"} and metrics["pooled"]
    one = metrics["per_slice"]["P03_1"]
    check_similarity(one, "lognorm")
    assert one["residuals"]["model"] == metrics["residuals"]["model"], "the mean over one slice"


def test_expression_files(evaluated):
    out = evaluated.out / "results" / "similarity"
    by_gene = pd.read_csv(out / "genes.csv")
    state = checkpoint.load(evaluated.decoder, "stage_two", "--decoder")
    assert by_gene["gene"].tolist() == state["genes"]
    np.testing.assert_allclose(by_gene["val_pcc"], state["val_pcc"], atol=1e-6)
    metrics = read_json(out / "metrics.json")
    mean = by_gene["pcc_residuals_model"].mean()
    assert mean == pytest.approx(metrics["residuals"]["model"]["pcc_gene_mean"], abs=1e-5)
    images = {"pcc_histogram.png", *(f"map_P03_1_{kind}.png" for kind in ("best", "median", "worst"))}
    assert images <= {path.name for path in out.iterdir()}
    adata = anndata.read_h5ad(out / "predictions.h5ad")
    panel = gene_panels.read_panel(gene_panels.panel_path(evaluated.data, evaluated.panels, "P03_1", "target"))
    assert adata.obs_names.tolist() == panel.barcodes.tolist() and adata.var_names.tolist() == panel.genes
    np.testing.assert_array_equal(adata.layers["counts"], panel.read_counts())
    np.testing.assert_array_equal(adata.obs["total_counts"], panel.total_counts)
    np.testing.assert_allclose(adata.var["val_pcc"], state["val_pcc"], atol=1e-6)


def test_the_error_is_that_of_the_file(evaluated):
    """mse of the model's row, computed again from predictions.h5ad."""
    out = evaluated.out / "results" / "similarity"
    adata = anndata.read_h5ad(out / "predictions.h5ad")
    truth = np.log1p(adata.layers["counts"] / adata.obs["total_counts"].to_numpy()[:, None] * 1e4)
    found = read_json(out / "metrics.json")["lognorm"]["model"]
    assert np.mean((adata.X - truth) ** 2) == pytest.approx(found["mse"], rel=1e-4)


@pytest.mark.parametrize("kind", ["retrieval", "similarity"])
def test_scanpy_plots_the_predictions(evaluated, kind):
    plt.switch_backend("Agg")
    adata = scanpy.read_h5ad(evaluated.out / "results" / kind / "predictions.h5ad")
    gene = adata.var_names[0]
    axes = scanpy.pl.spatial(adata, color=gene, show=False)[0]
    assert axes.get_title() == gene and axes.images and len(axes.collections) == 1
    assert scanpy.pl.embedding(adata, basis="spatial", color=gene, show=False).get_title() == gene
    plt.close("all")


# ---- other parts, other scales


def test_another_part_is_evaluated_on_request(evaluated, tmp_path):
    for script, name in (("get_accuracy_image", "r"), ("decoder_similarity", "s")):
        evaluated.run(script, "--part", "val", "--out", tmp_path / name)
        metrics = read_json(tmp_path / name / "metrics.json")
        assert metrics["n_spots"] == 70 and set(metrics["per_slice"]) == {"P02_1"}


def test_an_evaluation_repeats(evaluated, tmp_path):
    for script, name in (("get_accuracy_image", "retrieval"), ("decoder_similarity", "similarity")):
        evaluated.run(script, "--out", tmp_path / name)
        again = (tmp_path / name / "metrics.json").read_text()
        assert again == (evaluated.out / "results" / name / "metrics.json").read_text()


@pytest.mark.parametrize("target", ["residuals", "counts"])
def test_other_targets(evaluated, tmp_path, target):
    work = Work(evaluated.data, evaluated.tiles, evaluated.panels, tmp_path)
    work.run("train_decoder", "--encoder", evaluated.encoder, "--Epoch", 1, "--target", target, "--context", 0)
    work.run("decoder_similarity")
    check_similarity(read_json(tmp_path / "results" / "similarity" / "metrics.json"), target)


def test_an_encoder_without_training_is_the_pretrained_one(evaluated, tmp_path):
    """With hardly any learning rate the saved trunk is the random one that the baselines are computed on."""
    work = Work(evaluated.data, evaluated.tiles, evaluated.panels, tmp_path)
    work.run("train_mymodel", "--Epoch", 1, "--Init_lr", 1e-30, "--seed", 5)
    state = checkpoint.load(work.encoder, "stage_one", "--encoder")
    distributed.seed_everything(5)
    pretrained = ImageEncoder("test_vit", 32, 32, None).state_dict()
    trunk = {name for name in pretrained if name.startswith("trunk.")}
    assert trunk
    for name in trunk:
        torch.testing.assert_close(state["model"][f"image_encoder.{name}"], pretrained[name], atol=1e-20, rtol=0)
