"""Whole runs that differ from the plain one: resumed, with a validation strip, another encoder, the real sections."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from tiny_runs import BEST, LAST, STAGES, Work, data_flags, different, progress, rewrite_matrix, row, snapshot, state

from utils.features import dataset
from utils.features.domain import n_rows
from utils.files import tensors
from utils.genes import panels as gene_panels
from utils.images import tiles
from utils.slices import splits
from utils.training import augment, loop

# ---- epochs


@pytest.mark.parametrize("script", STAGES)
def test_one_epoch_and_another_are_two(script, trained, tmp_path):
    """At a constant rate, which does not depend on the number of epochs; resumed once more, nothing is touched."""
    flags = ("--expression_weight", 1) if script == "train_mymodel" else ("--encoder", trained.encoder)
    flags = (*flags, "--Init_lr", 1e-3, "--Min_lr", 1e-3)
    once, twice = (Work(trained.data, trained.tiles, trained.panels, tmp_path / name) for name in ("once", "twice"))
    once.run(script, *flags, "--Epoch", 2)
    twice.run(script, *flags, "--Epoch", 1)
    twice.run(script, *flags, "--Epoch", 2, "--resume")
    assert not different(progress(twice, script), progress(once, script))
    before = snapshot(once.out / STAGES[script])
    once.run(script, *flags, "--Epoch", 2, "--resume")
    assert snapshot(once.out / STAGES[script]) == before


@pytest.mark.parametrize("script", STAGES)
def test_order_and_augmentation_are_those_of_the_epoch_and_the_spot(script, trained, tmp_path, monkeypatch):
    batches, seen, whole_order, augment_batch = {}, [], loop.EpochOrder.__iter__, augment.augment

    def recorded_order(order):
        for batch in whole_order(order):
            batches.setdefault(order.epoch, []).append(batch)
            yield batch

    def recorded_augment(tiles, spots, seed, epoch, *size):
        seen.extend((seed, epoch, int(spot)) for spot in spots)
        return augment_batch(tiles, spots, seed, epoch, *size)

    monkeypatch.setattr(loop.EpochOrder, "__iter__", recorded_order)
    monkeypatch.setattr(augment, "augment", recorded_augment)
    work = Work(trained.data, trained.tiles, trained.panels, tmp_path)
    flags = ("--batch_neighbours", 0) if script == "train_mymodel" else ("--encoder", trained.encoder)
    work.run(script, *flags, "--Init_Epoch", 1, "--Epoch", 3, "--seed", 4)
    assert set(batches) == {1, 2} and batches[1] != batches[2]
    if script == "train_mymodel":
        expected = [(4, epoch, spot) for epoch in (1, 2) for batch in batches[epoch] for spot in batch]
        assert seen == expected and len(set(seen)) == 128


# ---- a strip of each train slice as validation


@pytest.fixture(scope="module")
def strip(prepared, tmp_path_factory):
    """Two patients: one to train and validate on, one to test."""
    out = tmp_path_factory.mktemp("strip")
    (out / "slices.csv").write_text("slice,patient,part\nP01_1,P01,train\nP03_1,P03,test\n")
    work, split = Work(prepared.data, prepared.tiles, out / "panels", out), ("--slices", out / "slices.csv")
    work.run("make_decoder_data", *split, "--val_strip")
    for script in STAGES:
        work.run(script, *split, "--val_strip", "--Epoch", 1)
    return work, split


def test_a_strip_validates_and_the_gap_is_not_used(strip):
    work, _ = strip
    one = dataset.load_slice(row("P01_1"), data_flags(work), ("input",), val_strip=True)
    n_train, n_val = len(one.rows_of("train")), len(one.rows_of("val"))
    assert n_val == 17 and n_train + n_val < 70
    for script, stage in (("train_mymodel", "stage_one"), ("train_decoder", "stage_two")):
        (log,) = (work.out / "logs" / stage).iterdir()
        assert json.loads((log / "settings.json").read_text())["n_train_spots"] == n_train
        assert state(work, script, BEST)["settings"]["val_strip"] is True
    (log,) = (work.out / "logs" / "stage_one").iterdir()
    assert json.loads((log / "log.jsonl").read_text())["val_R@5_chance"] == pytest.approx(5 / 17)


@pytest.mark.parametrize(("part", "n_spots", "name"), [("val", 17, "P01_1"), ("test", 70, "P03_1")])
def test_the_strip_is_evaluated_as_val(strip, tmp_path, part, n_spots, name):
    work, split = strip
    for script in ("get_accuracy_image", "decoder_similarity"):
        work.run(script, *split, "--part", part, "--out", tmp_path / script)
        metrics = json.loads((tmp_path / script / "metrics.json").read_text())
        assert metrics["n_spots"] == n_spots and list(metrics["per_slice"]) == [name]
    if part == "val":
        genes = pd.read_csv(tmp_path / "decoder_similarity" / "genes.csv")
        np.testing.assert_allclose(genes["pcc_residuals_model"], genes["val_pcc"], atol=1e-5)


# ---- genes that a slice lacks


def test_a_gene_is_neither_learnt_nor_judged_where_it_was_not_measured(trained, tmp_path):
    """One target gene is missing in a train slice, another in the test slice."""
    unread = shutil.ignore_patterns("*.jpg", "*.png", "truth.h5ad")
    work = Work(
        shutil.copytree(trained.data, tmp_path / "data", ignore=unread), trained.tiles, tmp_path / "p", tmp_path
    )
    (work.data / "slices.csv").write_text("slice,patient,part\nP01_1,A,train\nP02_1,B,train\nP03_1,C,test\n")
    names = gene_panels.read_panel(gene_panels.panel_path(trained.data, trained.panels, "P01_1", "target")).genes
    (tmp_path / "list.txt").write_text("\n".join(names))
    for name, lost in (("P02_1", names[2]), ("P03_1", names[5])):
        rewrite_matrix(work.data / name, lambda c, b, n, lost=lost: (c[:, n != lost], b, n[n != lost]))
    work.run("make_decoder_data", "--target_genes", tmp_path / "list.txt", "--val_strip")
    work.run("train_decoder", "--encoder", trained.encoder, "--val_strip", "--Epoch", 1)
    assert all(value.isfinite().all() for value in state(work, "train_decoder", LAST)["model"].values())
    work.run("decoder_similarity")
    table_of_genes = pd.read_csv(tmp_path / "results" / "similarity" / "genes.csv", index_col="gene")
    for scale in ("lognorm", "residuals", "counts"):
        found = table_of_genes[f"pcc_{scale}_model"]
        assert found.isna().sum() == 1 and np.isnan(found[names[5]])
    text = (tmp_path / "results" / "similarity" / "metrics.json").read_text()
    assert "NaN" not in text and json.loads(text)["residuals"]["model"]["pcc_gene_mean"] is not None


# ---- another encoder


def test_a_convolutional_encoder_goes_through_both_stages(prepared, tmp_path):
    work = Work(prepared.data, prepared.tiles, prepared.panels, tmp_path)
    flags = ("--image_encoder", "tf_efficientnet_lite0", "--image_size", 64, "--batch_size", 64, "--Epoch", 1)
    work.run("train_mymodel", *flags)
    (log,) = (tmp_path / "logs" / "stage_one").iterdir()
    assert np.isfinite(json.loads((log / "log.jsonl").read_text())["loss"])
    assert state(work, "train_mymodel", LAST)["schedule"]["last_epoch"] == 1, "one step"
    work.run("train_decoder", "--Epoch", 1)
    kept = np.load(tmp_path / "decoder_model" / "features" / "P01_1.npy")
    rows = 1280 // 32 + 4 + n_rows(32)
    assert kept.shape == (70, rows, 32), "pooled features, a feature map of 2 x 2 at 64 px, statistics"
    one, two = (tensors.read_tensors(path, "--test")["model"] for path in (work.encoder, work.decoder))
    shared = [name for name in one if name.startswith("image_encoder.")]
    assert shared and not [name for name in shared if not torch.equal(one[name], two[name])], "BatchNorm is frozen, too"


def test_several_scales_go_through_both_stages_and_their_evaluation(prepared, tmp_path):
    work = Work(prepared.data, prepared.tiles, prepared.panels, tmp_path)
    work.run("train_mymodel", "--crop_scales", 1, 0.5, "--Epoch", 1)
    work.run("train_decoder", "--Epoch", 1)
    for script in ("get_accuracy_image", "decoder_similarity"):
        work.run(script)
    one, two = (state(work, script, BEST) for script in STAGES)
    assert list(one["sizes"]["crop_scales"]) == list(two["sizes"]["crop_scales"]) == [1, 0.5]
    weight = "image_encoder.to_vector.weight"
    assert one["model"][weight].shape[1] == 2 * 64 and torch.equal(one["model"][weight], two["model"][weight])


# ---- real sections


@pytest.mark.realdata
def test_all_spots_and_all_counts_of_the_real_sections(real_data, tmp_path):
    data = real_data / "Breast_cancer"
    before = {path: path.stat().st_mtime_ns for path in data.rglob("*")}
    work = Work(data, tmp_path / "tiles", tmp_path / "panels", tmp_path)
    work.run("image_tilling")
    work.run("make_decoder_data", "--n_input_genes", 500, "--n_top_genes", 300)
    rows, _ = splits.read_table(data)
    assert sorted(one.slice for one in rows) == ["B4", "C2", "C3", "C4", "C5"]
    spots, umis = 0, 0
    for one in rows:
        for role, n in (("input", 500), ("target", 300)):
            panel = gene_panels.read_panel(gene_panels.panel_path(data, work.panels, one.slice, role))
            assert len(panel.genes) == n and panel.train_slices == ["C2", "C3", "C4"]
        pack = tiles.TilePack(work.tiles / one.slice)
        assert set(pack.barcodes) == set(panel.barcodes) and pack.record["um_per_px"] == 3.5
        spots, umis = spots + len(pack.barcodes), umis + panel.total_counts.sum()
    assert (spots, umis) == (1015, 9123331)
    assert {path: path.stat().st_mtime_ns for path in data.rglob("*")} == before, "nothing is written there"


@pytest.mark.realdata
def test_scripts_and_results_are_as_agreed(real_data, evaluated):
    contract = real_data.parent / "checks" / "contract.py"
    if not contract.exists():
        pytest.skip("no contract beside the real sections")
    results = [str(evaluated.out / "results" / kind / "metrics.json") for kind in ("retrieval", "similarity")]
    for argv in ([], results):
        found = subprocess.run(
            [sys.executable, str(contract), *argv], cwd=Path(__file__).parents[2], capture_output=True, text=True
        )
        assert (found.returncode, found.stdout) == (0, "in accordance\n"), found.stdout
