"""Stage two on kept features: several views, budgets of memory and disk, the same result whatever they are."""

import json
import shutil
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from tiny_runs import LAST, Work, data_flags, row

import train_decoder
from utils.evaluation import metrics
from utils.slices import genes
from utils.training import checkpoint, datasets, distributed, feature_bank, features
from utils.training.spill import Spill

NO_MEMORY = ("--memory", 1e-9)


def run_decoder(trained, out, *flags):
    """An epoch of stage two below `out`; its last checkpoint."""
    work = Work(trained.data, trained.tiles, trained.panels, out)
    work.run("train_decoder", "--encoder", trained.encoder, "--Epoch", 1, "--Init_lr", 1e-3, *flags)
    return checkpoint.load(work.decoder.with_name(LAST), "stage_two", "--decoder")


def same_weights(one, other):
    return all(torch.equal(one["model"][name], other["model"][name]) for name in one["model"])


@pytest.fixture(scope="module")
def of_three_views(trained, tmp_path_factory):
    """A run with three views of the train slice: its folder and last checkpoint."""
    out = tmp_path_factory.mktemp("views")
    return out, run_decoder(trained, out, "--views", 3)


def kept_views(out):
    return sorted(path.name for path in (out / "decoder_model" / "features").glob("*.npy"))


# ---- views


def test_train_slices_have_all_views_the_others_one(of_three_views, trained):
    out, state = of_three_views
    assert kept_views(out) == ["P01_1.npy", "P01_1.view1.npy", "P01_1.view2.npy", "P02_1.npy"]
    plain, first, second = (np.load(out / "decoder_model" / "features" / name) for name in kept_views(out)[:3])
    assert plain.shape == first.shape == (70, 5, 32)
    for one, other in ((plain, first), (plain, second), (first, second)):
        assert (np.abs(one.astype(float) - other).max((1, 2)) > 1e-3).mean() > 0.9
    one_view = checkpoint.load(trained.decoder.with_name(LAST), "stage_two", "--decoder")
    assert not same_weights(state, one_view), "the views have taught"
    assert torch.equal(state["feature_moments"]["mean"], one_view["feature_moments"]["mean"]), "those of view 0"


def test_views_are_kept_apart(of_three_views, trained, tmp_path, monkeypatch):
    """Those that fit are read again; another seed draws other augmented views, but the tile stays what it is."""
    shutil.copytree(of_three_views[0] / "decoder_model" / "features", tmp_path / "decoder_model" / "features")
    encoded, encode_slice = [], features.encode_slice

    def recorded(how, one, view):
        encoded.append((one.name, view))
        return encode_slice(how, one, view)

    monkeypatch.setattr(features, "encode_slice", recorded)
    assert same_weights(run_decoder(trained, tmp_path, "--views", 3), of_three_views[1])
    run_decoder(trained, tmp_path, "--views", 2)
    assert not encoded
    run_decoder(trained, tmp_path, "--views", 2, "--seed", 1)
    assert encoded == [("P01_1", 1)]


def test_each_epoch_draws_a_view_of_each_spot_and_validation_sees_the_tile(trained, tmp_path, monkeypatch):
    drawn, batch = [], feature_bank.FeatureBank.batch

    def recorded(bank, spots, view=0):
        drawn.append((spots, view))
        return batch(bank, spots, view)

    monkeypatch.setattr(feature_bank.FeatureBank, "batch", recorded)
    epochs = []
    for first in (0, 1, 1):
        drawn.clear()
        run_decoder(trained, tmp_path, "--views", 3, "--Init_Epoch", first, "--Epoch", first + 1)
        of_spot = {
            spot: v for spots, views in drawn if np.ndim(views) for spot, v in zip(spots.tolist(), views, strict=True)
        }
        assert len(of_spot) == 64 and set(of_spot.values()) == {0, 1, 2} and max(of_spot) < 70
        assert {spot for spots, views in drawn if not np.ndim(views) for spot in spots} == set(range(70, 140))
        assert all(views == 0 for _, views in drawn if not np.ndim(views))
        epochs.append(of_spot)
    assert epochs[0] != epochs[1] == epochs[2]


def test_fewer_views_where_the_disk_budget_is_small(trained, tmp_path, capsys):
    """140 tiles of 5 x 32 numbers and 70 of the second view take 65.6 KiB, a third one 21.9 more."""
    run_decoder(trained, tmp_path, "--views", 3, "--feature_budget", 80 / 2**20)
    out = capsys.readouterr().out
    assert "2 of 3 views are kept: all of them need a --feature_budget of 0.001 GiB" in out
    assert kept_views(tmp_path) == ["P01_1.npy", "P01_1.view1.npy", "P02_1.npy"]


def test_not_one_view_in_the_disk_budget(refused):
    refused(
        "train_decoder", ["--feature_budget", 1e-5], "--feature_budget 1e-05: expected 0.001 GiB or more .* 140 tiles"
    )


# ---- memory


@pytest.mark.parametrize("flags", [(), ("--views", 2), ("--context", 0)])
def test_features_on_disk_teach_as_those_in_memory(trained, tmp_path, flags):
    one, other = (run_decoder(trained, tmp_path, *flags, *budget) for budget in ((), NO_MEMORY))
    assert same_weights(one, other) and torch.equal(one["val_pcc"], other["val_pcc"])
    assert not different_files(tmp_path), "what was spilled has no name"


def different_files(out):
    expected = {"best_epoch_weights.pth", "last_epoch_weights.pth", "slices.csv", "features"}
    return {path.name for path in (out / "decoder_model").iterdir()} - expected


def test_the_evaluation_is_the_same_without_memory_and_goes_slice_by_slice(trained, tmp_path, monkeypatch):
    events, encode_slice, predict = [], features.encode_slice, feature_bank.predict

    def recorded_encode(how, one, *view):
        events.append(f"encode {one.name}")
        return encode_slice(how, one, *view)

    def recorded_predict(*args):
        events.append("predict")
        return predict(*args)

    monkeypatch.setattr(features, "encode_slice", recorded_encode)
    monkeypatch.setattr(feature_bank, "predict", recorded_predict)
    found = []
    for budget in ((), NO_MEMORY):
        events.clear()
        trained.run("decoder_similarity", "--part", "all", "--allow_leak", "--out", tmp_path, *budget)
        assert events[:6] == [event for i in (1, 2, 3) for event in (f"encode P0{i}_1", "predict")]
        found.append(json.loads((tmp_path / "metrics.json").read_text()))
    assert found[0] == found[1] and found[0]["n_spots"] == 210


def test_validation_in_training_is_that_of_the_evaluation(trained, tmp_path):
    """By groups of genes and from kept features there, of all genes at once and from tiles here."""
    trained.run("decoder_similarity", "--part", "val", "--out", tmp_path)
    genes = pd.read_csv(tmp_path / "genes.csv")
    np.testing.assert_allclose(genes["pcc_residuals_model"], genes["val_pcc"], atol=1e-5)


# ---- targets


def plain_targets(slices, scale):
    """All slices at once in float64."""
    found = []
    for one in slices:
        panel = one.panels["target"]
        scaled = metrics.to_scale(scale, panel.counts, one.total_counts)
        found.append(np.where(panel.measured, scaled, np.nan))
    train = np.concatenate([t[one.rows_of("train")] for t, one in zip(found, slices, strict=True)])
    return np.concatenate(found), np.nanmean(train, axis=0), np.maximum(np.nanstd(train, axis=0), 1e-6)


@pytest.mark.parametrize("scale", metrics.SCALES)
@pytest.mark.parametrize("gib", [1.0, 1e-9])
def test_targets_are_those_of_the_plain_formula(prepared, tmp_path, monkeypatch, scale, gib):
    """With a gene that one slice lacks and one without a count, in groups that do not divide the genes."""
    slices = [
        datasets.load_slice(row(name), data_flags(prepared), ("target",), strip)
        for name, strip in (("P01_1", True), ("P02_1", False))
    ]
    slices[1].panels["target"].measured[4] = False
    as_read = genes.Panel.counts.fget
    without_17 = property(lambda panel: as_read(panel) * (np.arange(20) != 17))
    monkeypatch.setattr(genes.Panel, "counts", without_17)
    target, mean, sd = train_decoder.targets_of(slices, scale, Spill(gib, tmp_path))
    expected, expected_mean, expected_sd = plain_targets(slices, scale)
    assert isinstance(target, np.memmap) == (gib < 1) and target.dtype == np.float32
    np.testing.assert_allclose(mean, expected_mean, rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(sd, expected_sd, rtol=1e-5)
    np.testing.assert_allclose(target, (expected - expected_mean) / expected_sd, rtol=1e-4, atol=1e-4)
    assert np.isnan(target[70:, 4]).all() and np.isnan(target).sum() == 70 and not target[:, 17].any()


# ---- precision


@pytest.mark.parametrize(
    ("precision", "device", "expected"),
    [("auto", "cpu", torch.float32), ("bf16", "cpu", torch.bfloat16), ("auto", "cuda", torch.bfloat16)],
)
def test_the_decoder_is_in_fp32_on_a_cpu_that_may_choose(precision, device, expected):
    accelerator = SimpleNamespace(device=torch.device(device), autocast=lambda: torch.autocast("cpu", torch.bfloat16))
    layer = torch.nn.Linear(4, 4)
    with distributed.decoder_autocast(accelerator, precision):
        assert layer(torch.ones(2, 4)).dtype == expected


@pytest.mark.usefixtures("another_precision")
def test_the_encoder_keeps_its_precision_where_the_decoder_has_another(trained, tmp_path, monkeypatch):
    from_encoder, from_decoder = [], []
    encode, autocast = features.TileEncoder.look, distributed.decoder_autocast
    monkeypatch.setattr("utils.training.distributed.bf16_is_fast", lambda device: True)

    def look(how, *args):
        tiles = encode(how, *args)
        from_encoder.append(how.encode(tiles).dtype)
        return tiles

    def recorded(accelerator, precision):
        from_decoder.append(type(autocast(accelerator, precision)).__name__)
        return autocast(accelerator, precision)

    monkeypatch.setattr(features.TileEncoder, "look", look)
    monkeypatch.setattr(distributed, "decoder_autocast", recorded)
    state = run_decoder(trained, tmp_path, "--precision", "auto")
    assert set(from_encoder) == {torch.bfloat16} and set(from_decoder) == {"nullcontext"}
    assert all(tensor.isfinite().all() for tensor in state["model"].values())
