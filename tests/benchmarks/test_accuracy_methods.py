"""The methods of benchmarks/accuracy.py, against direct calls and on cases with a known answer."""

from types import SimpleNamespace

import anndata
import numpy as np
import pandas as pd
import pytest
import torch
from tiny_runs import Work

from benchmarks import accuracy_methods, accuracy_table, st_net
from benchmarks.accuracy_methods import Table
from model.image_encoder import ImageEncoder
from utils import distributed, settings
from utils.evaluation import baselines, metrics
from utils.evaluation.ridge import RANKS, fit_ridge
from utils.training import checkpoint


def test_predictions_of_other_spots_or_genes_are_refused():
    first = Table(["a", "b"], ["X", "Y"], [np.zeros((2, 2))])
    accuracy_methods.check_tables({"ridge": first, "magic": first._replace(values=[np.ones((2, 2))])})
    for other in (first._replace(spots=["b", "a"]), first._replace(genes=["X"])):
        with pytest.raises(ValueError, match=r"method magic: expected the 2 .* of ridge"):
            accuracy_methods.check_tables({"ridge": first, "magic": other})


def test_the_eight_views_are_all_rotations_and_reflections(rng):
    tile = torch.from_numpy(rng.random((1, 3, 4, 4)))
    views = {view.numpy().tobytes() for view in accuracy_methods.dihedral(tile)}
    mirrored = {view.numpy().tobytes() for view in accuracy_methods.dihedral(tile.flip(2).transpose(2, 3))}
    assert len(views) == 8 and views == mirrored
    assert torch.equal(accuracy_methods.dihedral(tile)[0], tile)


def image(rng, n=40):
    xy = np.column_stack([np.arange(n) % 8, np.arange(n) // 8]).astype(float)
    features = rng.normal(size=(n, 6))
    rings = baselines.ring_features(features, xy, 1.0)
    return {"features": features, "rings": rings, "target": rng.normal(size=(n, 5))}


def test_ridge_on_averaged_features_is_a_low_rank_ridge_on_rings(rng):
    train, val, other = [image(rng), image(rng)], [image(rng)], image(rng)
    x = [[p["rings"] for p in part] for part in (train, val)]
    y = [[p["target"] for p in part] for part in (train, val)]
    direct = fit_ridge(x[0], y[0], x[1], y[1], ranks=RANKS)
    expected = direct.predict(other["rings"])
    parts = {"train": train, "val": val, "test": [other]}
    tissue = SimpleNamespace(images=lambda averaged, part: parts[part])
    val_pcc, (found,) = accuracy_methods.fit_ridge_tta(tissue, [])
    np.testing.assert_allclose(found, expected)
    assert val_pcc == direct.val_pcc


def test_profiles_are_weighted_by_similarity(rng):
    image, gene = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (rng.normal(size=(n, 4)) for n in (3, 70)))
    values = rng.normal(size=(70, 2))
    found = accuracy_methods.weighted_profiles(image, gene, values, scale=5.0)
    for i, query in enumerate(image):
        near = np.argsort(-(gene @ query))[: accuracy_methods.N_PROFILES]
        weight = np.exp(5.0 * gene[near] @ query)
        np.testing.assert_allclose(found[i], weight @ values[near] / weight.sum(), rtol=1e-5)


def test_predictions_are_read_by_slice_in_the_order_of_the_file(tmp_path):
    obs = pd.DataFrame({"slice": pd.Categorical(["b", "b", "a"])}, index=["b:1", "b:2", "a:1"])
    x = np.arange(6, dtype=np.float32).reshape(3, 2)
    anndata.AnnData(x, obs=obs, var=pd.DataFrame(index=["X", "Y"])).write_h5ad(tmp_path / "predictions.h5ad")
    found = accuracy_methods.read_table(tmp_path)
    assert (found.spots, found.genes) == (["b:1", "b:2", "a:1"], ["X", "Y"])
    assert [part.tolist() for part in found.values] == [[[0, 1], [2, 3]], [[4, 5]]]


def stage_one_settings(work: Work, *flags):
    import train_mymodel

    parsed = train_mymodel.parse_args(work.argv("train_mymodel", *flags))
    settings.check_training(parsed)
    return parsed


def test_the_pretrained_checkpoint_differs_by_the_image_encoder_alone(trained, tmp_path):
    parsed, target = stage_one_settings(trained), tmp_path / "pretrained" / "best.pth"
    accuracy_methods.write_pretrained(trained.encoder, target, parsed)
    before, after = (checkpoint.load(path, "stage_one", "--encoder") for path in (trained.encoder, target))
    encoder = accuracy_methods.pretrained(parsed, parsed.crop_scales, parsed.seed)
    fresh = {f"image_encoder.{name}": tensor for name, tensor in encoder.named_parameters()}
    assert set(after["model"]) == set(before["model"])
    for name, tensor in after["model"].items():
        assert torch.equal(tensor, fresh.get(name, before["model"][name])), name
    assert after["genes"] == before["genes"] and after["table"] == before["table"]
    assert any(not torch.equal(tensor, before["model"][name]) for name, tensor in after["model"].items())


def test_baselines_predict_every_test_spot(prepared):
    parsed = stage_one_settings(prepared, "--crop_scales", 1, 0.5)
    tissue, accelerator = accuracy_methods.Tissue(parsed), distributed.start("cpu", "fp32")
    predictions = accuracy_methods.predict_baselines(tissue, accelerator, parsed)
    assert set(predictions) == {*accuracy_table.BASELINES, "ridge_scales"}
    assert {name: [v.shape for v in values] for name, values in predictions.items()} == {
        name: [(70, 20)] for name in predictions
    }


def test_st_net_learns_expression_from_images(prepared):
    parsed = stage_one_settings(prepared, "--Epoch", 12, "--Init_lr", 2e-3)
    tissue, accelerator = accuracy_methods.Tissue(parsed), distributed.start("cpu", "fp32")
    torch.manual_seed(0)
    slice_, target = tissue.learning[0]
    encoder = ImageEncoder("test_vit", 32, 32)
    (predicted,) = st_net.fit_predict(encoder, tissue.learning, [slice_], accelerator, parsed)
    assert predicted.shape == target.shape
    assert metrics.scored_pearson_per_gene(predicted, target).mean() > 0.15
    np.testing.assert_allclose(predicted.mean(0), target.mean(0), atol=0.5)  # in the units of the targets
