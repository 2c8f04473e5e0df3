"""Stage two on kept features: the same result in memory and beyond it."""

import json
import re
import shutil
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from tiny_runs import BEST, LAST, Work

from model.image_encoder import ImageEncoder
from utils import distributed
from utils.features import cache, neighbourhoods
from utils.features.domain import n_rows
from utils.training import checkpoint, decoder_initialisation, initialisation

NO_MEMORY = ("--memory", 1e-9)


def run_decoder(trained, out, *flags):
    """An epoch of stage two below `out`; its last checkpoint."""
    work = Work(trained.data, trained.tiles, trained.panels, out)
    work.run("train_decoder", "--encoder", trained.encoder, "--Epoch", 1, "--Init_lr", 1e-3, *flags)
    return checkpoint.load(work.decoder.with_name(LAST), "stage_two", "--decoder")


def same_weights(one, other):
    return all(torch.equal(one["model"][name], other["model"][name]) for name in one["model"])


@pytest.fixture(scope="module")
def kept_run(trained, tmp_path_factory):
    """A run of stage two: its folder and last checkpoint."""
    out = tmp_path_factory.mktemp("kept")
    return out, run_decoder(trained, out)


# ---- kept features


def test_features_are_read_again_whatever_the_seed(kept_run, trained, tmp_path, monkeypatch):
    out, state = kept_run
    assert np.load(out / "decoder_model" / "features" / "P01_1.npy").shape == (70, 2 + 4 + n_rows(32), 32), (
        "vectors, tokens, statistics"
    )
    shutil.copytree(out / "decoder_model" / "features", tmp_path / "decoder_model" / "features")
    monkeypatch.setattr(cache, "encode_slice", lambda how, slice_: pytest.fail("encoded again"))
    assert same_weights(run_decoder(trained, tmp_path), state)
    other = run_decoder(trained, tmp_path, "--seed", 1)
    assert not torch.equal(other["model"]["decoder.gene_embedding"], state["model"]["decoder.gene_embedding"])


# ---- the start


def best_and_last(trained, out, *flags):
    """The checkpoints of an epoch of stage two below `out`."""
    last = run_decoder(trained, out, *flags)
    return checkpoint.load(out / "decoder_model" / BEST, "stage_two", "--decoder"), last


@pytest.mark.parametrize("rate", [1e-30, 0.03])
def test_the_best_epoch_never_falls_behind_the_ridge(trained, tmp_path, capsys, rate):
    """A ruinous learning rate leaves the start as the best; none leaves the last where it started, too."""
    best, last = best_and_last(trained, tmp_path, "--Init_lr", rate)
    said = re.search(r"warm start by ridge: .* validation PCC per gene (\d\.\d+)", capsys.readouterr().out)
    begun = float(said[1])
    assert best["row"]["epoch"] == -1 and last["row"]["epoch"] == 0
    assert best["row"]["val_pcc_residuals"] == pytest.approx(begun, abs=1e-3)
    assert best["val_pcc"].mean().item() == pytest.approx(begun, abs=1e-3)
    assert last["best"] == best["row"]["val_pcc_residuals"] >= last["row"]["val_pcc_residuals"]
    if rate < 1e-9:
        torch.testing.assert_close(last["val_pcc"], best["val_pcc"], atol=1e-6, rtol=0)
    for name in ("landmarks", "scale", "gamma", "linear.weight"):
        assert torch.equal(last["model"][f"decoder.ridge.{name}"], best["model"][f"decoder.ridge.{name}"]), name


def test_the_start_is_numbered_before_the_first_epoch_and_is_not_solved_again(trained, tmp_path, monkeypatch):
    best, _ = best_and_last(trained, tmp_path, "--Init_lr", 1e-30, "--Init_Epoch", 3, "--Epoch", 4)
    assert best["row"]["epoch"] == 2
    monkeypatch.setattr(decoder_initialisation, "warm_start_decoder", lambda *_: pytest.fail("solved again"))
    resumed = run_decoder(trained, tmp_path, "--Init_lr", 1e-30, "--Init_Epoch", 3, "--Epoch", 5, "--resume")
    assert resumed["row"]["epoch"] == 4 and resumed["best"] == best["row"]["val_pcc_residuals"]


def test_every_train_slice_has_a_spot_in_the_ridge_however_few_are_drawn(trained, tmp_path, monkeypatch):
    """Two train slices, each with a strip to validate on."""
    (tmp_path / "slices.csv").write_text("slice,patient,part\nP01_1,P01,train\nP02_1,P02,train\n")
    drawn, batch = [], neighbourhoods.FeatureBank.batch
    monkeypatch.setattr(
        neighbourhoods.FeatureBank, "batch", lambda bank, spots: drawn.append(spots) or batch(bank, spots)
    )
    monkeypatch.setattr(initialisation, "START_SPOTS", 1)
    monkeypatch.setattr(decoder_initialisation, "LANDMARKS", 2)
    split = ("--slices", tmp_path / "slices.csv", "--val_strip", "--panels", tmp_path / "panels")
    trained.run("make_decoder_data", *split)
    state = run_decoder(trained, tmp_path, *split, "--allow_leak")
    landmarks, again, first, second = (spots.tolist() for spots in drawn[:4])
    assert first[0] < 70 <= second[0] and landmarks == again == first + second
    assert state["sizes"]["landmarks"] == len(state["model"]["decoder.ridge.landmarks"]) == 2


@pytest.mark.parametrize("tta", [1, 8])
def test_features_are_those_of_the_augmentation(kept_run, trained, tmp_path, tta):
    """And kept features of another number of views are not taken for them."""
    kept = tmp_path / "decoder_model" / "features"
    shutil.copytree(kept_run[0] / "decoder_model" / "features", kept)
    before = np.load(kept / "P01_1.npy")
    state = run_decoder(trained, tmp_path, "--tta", tta)
    assert state["sizes"]["tta"] == tta
    assert np.array_equal(np.load(kept / "P01_1.npy"), before) == (tta == 1)


# ---- memory


@pytest.mark.parametrize("flags", [(), ("--context", 0)])
def test_training_on_features_on_disk_equals_that_on_features_in_memory(trained, tmp_path, flags):
    one, other = (run_decoder(trained, tmp_path, *flags, *budget) for budget in ((), NO_MEMORY))
    assert same_weights(one, other) and torch.equal(one["val_pcc"], other["val_pcc"])
    assert not different_files(tmp_path), "what was mapped_too has no name"


def different_files(out):
    expected = {
        "best_epoch_weights.pth",
        "last_epoch_weights.pth",
        "previous_epoch_weights.pth",
        "slices.csv",
        "features",
    }
    return {path.name for path in (out / "decoder_model").iterdir()} - expected


def test_the_evaluation_is_the_same_without_memory_and_goes_slice_by_slice(trained, tmp_path, monkeypatch):
    events, encode_slice, predict = [], cache.encode_slice, neighbourhoods.predict

    def recorded_encode(how, slice_):
        events.append(f"encode {slice_.name}")
        return encode_slice(how, slice_)

    def recorded_predict(*args):
        events.append("predict")
        return predict(*args)

    monkeypatch.setattr(cache, "encode_slice", recorded_encode)
    monkeypatch.setattr(neighbourhoods, "predict", recorded_predict)
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


def test_the_encoder_keeps_its_precision_where_the_decoder_has_another(trained, tmp_path, monkeypatch):
    from_encoder, from_decoder = [], []
    grid_tokens, autocast = ImageEncoder.grid_tokens, distributed.decoder_autocast
    monkeypatch.setattr("utils.distributed.bf16_is_fast", lambda device: True)

    def tokens(*args):
        from_encoder.append(grid_tokens(*args).dtype)
        return grid_tokens(*args)

    def recorded(accelerator, precision):
        from_decoder.append(type(autocast(accelerator, precision)).__name__)
        return autocast(accelerator, precision)

    monkeypatch.setattr(ImageEncoder, "grid_tokens", tokens)
    monkeypatch.setattr(distributed, "decoder_autocast", recorded)
    state = run_decoder(trained, tmp_path, "--precision", "auto")
    assert set(from_encoder) == {torch.bfloat16} and set(from_decoder) == {"nullcontext"}
    assert all(tensor.isfinite().all() for tensor in state["model"].values())
