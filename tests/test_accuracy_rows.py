"""The rows and diagnostics of benchmarks/accuracy.py, against direct calls and on cases with a known answer."""

from types import SimpleNamespace

import anndata
import numpy as np
import pandas as pd
import pytest
import torch
from tiny_runs import Work

from benchmarks import accuracy_diagnostics, accuracy_rows, accuracy_table, st_net
from benchmarks.accuracy_rows import Row
from model.image_encoder import ImageEncoder
from utils import distributed, settings
from utils.evaluation import baselines, metrics
from utils.evaluation.ridge import RANKS, fit_ridge
from utils.training import checkpoint


def test_rows_of_other_spots_or_genes_are_refused():
    first = Row(["a", "b"], ["X", "Y"], [np.zeros((2, 2))])
    accuracy_rows.check_rows({"ridge": first, "magic": first._replace(values=[np.ones((2, 2))])})
    for other in (first._replace(spots=["b", "a"]), first._replace(genes=["X"])):
        with pytest.raises(ValueError, match=r"row magic: expected the 2 .* of row ridge"):
            accuracy_rows.check_rows({"ridge": first, "magic": other})


def test_the_eight_views_are_all_turns_and_flips(rng):
    tile = torch.from_numpy(rng.random((1, 3, 4, 4)))
    views = {view.numpy().tobytes() for view in accuracy_rows.turned(tile)}
    mirrored = {view.numpy().tobytes() for view in accuracy_rows.turned(tile.flip(2).transpose(2, 3))}
    assert len(views) == 8 and views == mirrored
    assert torch.equal(accuracy_rows.turned(tile)[0], tile)


def image(rng, n=40):
    xy = np.column_stack([np.arange(n) % 8, np.arange(n) // 8]).astype(float)
    return {"features": rng.normal(size=(n, 6)), "xy": xy, "pitch": 1.0, "target": rng.normal(size=(n, 5))}


def test_ridge_on_averaged_features_is_a_low_rank_ridge_on_rings(rng):
    train, val, other = [image(rng), image(rng)], [image(rng)], image(rng)
    x = [[baselines.ring_features(p["features"], p["xy"], 1.0) for p in part] for part in (train, val)]
    y = [[p["target"] for p in part] for part in (train, val)]
    direct = fit_ridge(x[0], y[0], x[1], y[1], ranks=RANKS)
    expected = direct.predict(baselines.ring_features(other["features"], other["xy"], 1.0))
    parts = {"train": train, "val": val, "test": [other]}
    tissue = SimpleNamespace(images=lambda averaged, part: parts[part])
    val_pcc, (found,) = accuracy_rows.fit_turns_lowrank(tissue, [])
    np.testing.assert_allclose(found, expected)
    assert val_pcc == direct.val_pcc


def test_profiles_are_weighted_by_similarity(rng):
    image, gene = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (rng.normal(size=(n, 4)) for n in (3, 70)))
    values = rng.normal(size=(70, 2))
    found = accuracy_rows.weighted_profiles(image, gene, values, scale=5.0)
    for i, query in enumerate(image):
        near = np.argsort(-(gene @ query))[: accuracy_rows.N_PROFILES]
        weight = np.exp(5.0 * gene[near] @ query)
        np.testing.assert_allclose(found[i], weight @ values[near] / weight.sum(), rtol=1e-5)


def test_predictions_are_read_by_slice_in_the_order_of_the_file(tmp_path):
    obs = pd.DataFrame({"slice": pd.Categorical(["b", "b", "a"])}, index=["b:1", "b:2", "a:1"])
    x = np.arange(6, dtype=np.float32).reshape(3, 2)
    anndata.AnnData(x, obs=obs, var=pd.DataFrame(index=["X", "Y"])).write_h5ad(tmp_path / "predictions.h5ad")
    found = accuracy_rows.read_row(tmp_path)
    assert (found.spots, found.genes) == (["b:1", "b:2", "a:1"], ["X", "Y"])
    assert [part.tolist() for part in found.values] == [[[0, 1], [2, 3]], [[4, 5]]]


def stage_one_args(work: Work, *flags):
    import train_mymodel

    args = train_mymodel.parse_args(work.argv("train_mymodel", *flags))
    settings.check_training(args)
    return args


def test_the_pretrained_checkpoint_differs_by_the_image_encoder_alone(trained, tmp_path):
    args, target = stage_one_args(trained), tmp_path / "pretrained" / "best.pth"
    accuracy_rows.write_pretrained(trained.encoder, target, args)
    before, after = (checkpoint.load(path, "stage_one", "--encoder") for path in (trained.encoder, target))
    encoder = accuracy_rows.pretrained(args, args.crop_scales)
    fresh = {f"image_encoder.{name}": tensor for name, tensor in encoder.named_parameters()}
    assert set(after["model"]) == set(before["model"])
    for name, tensor in after["model"].items():
        assert torch.equal(tensor, fresh.get(name, before["model"][name])), name
    assert after["genes"] == before["genes"] and after["table"] == before["table"]
    assert any(not torch.equal(tensor, before["model"][name]) for name, tensor in after["model"].items())


def test_cheap_rows_are_of_every_test_spot_and_kept_for_other_seeds(prepared, tmp_path, monkeypatch):
    args = stage_one_args(prepared, "--crop_scales", 1, 0.5)
    tissue, accelerator = accuracy_rows.Tissue(args), distributed.start("cpu", "fp32")
    run = SimpleNamespace(fold_folder=tmp_path, data_key="data", prepare=[], args=SimpleNamespace(out=tmp_path))
    rows, choice = accuracy_rows.kept_cheap_rows(run, tissue, accelerator, args)
    assert tuple(rows) == accuracy_rows.KEPT and set(choice) == set(rows) > set(accuracy_table.CHEAP)
    assert {name: [v.shape for v in values] for name, values in rows.items()} == {name: [(70, 20)] for name in rows}
    monkeypatch.setattr(accuracy_rows, "cheap_rows", lambda *_: pytest.fail("computed again"))
    args.seed = 1
    again, _ = accuracy_rows.kept_cheap_rows(run, tissue, accelerator, args)
    assert all(np.array_equal(again[name][0], rows[name][0]) for name in rows) and args.seed == 1
    with pytest.raises(pytest.fail.Exception, match="computed again"):
        accuracy_rows.kept_cheap_rows(SimpleNamespace(**vars(run) | {"data_key": "x"}), tissue, accelerator, args)


def test_st_net_learns_expression_from_images(prepared):
    args = stage_one_args(prepared, "--Epoch", 12, "--Init_lr", 2e-3)
    tissue, accelerator = accuracy_rows.Tissue(args), distributed.start("cpu", "fp32")
    torch.manual_seed(0)
    targets = [tissue.targets[one.name] for one in tissue.taught]
    encoder = ImageEncoder("test_vit", 32, 32)
    (found,) = st_net.fit_predict(encoder, tissue.taught, targets, tissue.taught[:1], accelerator, args)
    assert found.shape == targets[0].shape
    assert metrics.scored_pearson_per_gene(found, targets[0]).mean() > 0.15
    np.testing.assert_allclose(found.mean(0), targets[0].mean(0), atol=0.5)  # in the units of the targets


# ---- diagnostics


def test_diagnostics_of_embeddings_with_known_answers(rng):
    assert accuracy_diagnostics.effective_rank(np.eye(8)) == pytest.approx(8)
    assert accuracy_diagnostics.effective_rank(np.ones((8, 3))) == pytest.approx(1)
    dead = rng.normal(size=(30, 4)) * [1, 0, 1, 1]
    assert accuracy_diagnostics.dead_units(dead) == 0.25
    apart, alike = ([rng.normal(size=(40, 5)) + shift * i for i in range(3)] for shift in (20, 0))
    assert accuracy_diagnostics.slice_accuracy(apart)["accuracy"] > 0.99
    assert accuracy_diagnostics.slice_accuracy(alike)["accuracy"] < 0.55
    assert accuracy_diagnostics.slice_accuracy(apart)["chance"] == pytest.approx(1 / 3)
    assert accuracy_diagnostics.slice_accuracy(apart[:1]) is None


def test_calibration_error_is_zero_where_scores_are_rates():
    logits = np.log(np.repeat([0.25, 0.75], 4) / (1 - np.repeat([0.25, 0.75], 4)))
    assert accuracy_diagnostics.calibration_error(logits, np.array([1, 0, 0, 0, 1, 1, 1, 0])) == pytest.approx(0)
    assert accuracy_diagnostics.calibration_error(np.full(4, 50.0), np.array([1, 0, 0, 0])) == pytest.approx(0.75)
