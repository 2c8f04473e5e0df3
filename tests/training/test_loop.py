"""Seeds, the learning rate over a run, which weights decay, the stop on a bad loss, the log of a run."""

import itertools
import json
import math
import random
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from spaceranger_folders import refused

from utils import distributed
from utils.training import loop
from utils.training.trainer import RunLog


def drawn(*seed):
    distributed.seed_everything(*seed)
    return random.random(), np.random.rand(), torch.rand(1).item()  # noqa: NPY002


def test_the_same_seed_repeats_every_generator():
    assert drawn(3, 1) == drawn(3, 1)
    several = [drawn(*seed) for seed in ((3, 1), (3, 2), (4, 1), (1, 3), (3,), (0,))]
    for generator in zip(*several, strict=True):
        assert len(set(generator)) == len(several)


# ---- the learning rate


def test_warm_up_is_linear_over_3_percent():
    rates = [loop.rate_at(step, 1000, "cos", 0.01) for step in range(1000)]
    assert rates[:30] == pytest.approx([(i + 1) / 30 for i in range(30)])
    assert rates[29] == rates[30] == 1 and rates[31] < 1


def test_cosine_by_its_formula():
    for step, fraction in ((100, 0.0), (475, 0.5), (287, 0.25), (850, 1.0)):
        found = loop.rate_at(step * 4, 3400, "cos", 0.01)
        n, warm = 3400, 102
        done = (step * 4 - warm) / (n - warm)
        assert found == pytest.approx(0.01 + 0.99 * (1 + math.cos(math.pi * done)) / 2)
        assert done == pytest.approx(fraction, abs=0.12)
    rates = [loop.rate_at(step, 3400, "cos", 0.01) for step in range(102, 3401)]
    assert all(after < before for before, after in itertools.pairwise(rates)) and rates[-1] == 0.01


def test_ten_even_stairs_down_to_the_lowest():
    rates = [loop.rate_at(step, 1030, "step", 0.01) for step in range(31, 1030)]
    stairs = list(dict.fromkeys(rates))
    assert stairs == pytest.approx([0.01 ** (i / 9) for i in range(10)])
    lengths = [rates.count(stair) for stair in stairs]
    assert max(lengths) - min(lengths) <= 2
    assert loop.rate_at(5000, 1030, "step", 0.0) < 1e-11, "a lowest rate of 0 has no logarithm"


@pytest.mark.parametrize("kind", ["cos", "step"])
@pytest.mark.parametrize("n_steps", [1, 2, 5, 20])
def test_short_runs_have_a_rate_too(kind, n_steps):
    rates = [loop.rate_at(step, n_steps, kind, 0.01) for step in range(n_steps + 3)]
    assert rates[0] == 1 and all(0.009 < rate <= 1 for rate in rates)
    assert rates[n_steps + 2] == pytest.approx(0.01), "beyond the end the rate stays low"


def test_the_schedule_moves_the_optimizer_between_its_two_rates():
    args = SimpleNamespace(Init_lr=0.2, Min_lr=0.05, lr_decay_type="cos", weight_decay=0.0, momentum=0.9)
    optimizer = loop.make_optimizer([torch.nn.Parameter(torch.zeros(2, 2))], args)
    schedule = loop.schedule(optimizer, 10, args)
    rates = []
    for _ in range(11):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert rates == pytest.approx([0.2 * loop.rate_at(step, 10, "cos", 0.25) for step in range(11)])
    assert rates[0] == 0.2 and rates[-1] == pytest.approx(0.05)


def test_matrices_decay_and_vectors_do_not():
    model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.LayerNorm(2), torch.nn.Linear(2, 1))
    model[2].requires_grad_(False)
    model.register_parameter("temperature", torch.nn.Parameter(torch.tensor(1.0)))
    args = SimpleNamespace(Init_lr=0.1, weight_decay=0.05, momentum=0.8)
    optimizer = loop.make_optimizer(model.parameters(), args)
    decayed, others = optimizer.param_groups
    assert [p.shape for p in decayed["params"]] == [(2, 3)] and decayed["weight_decay"] == 0.05
    assert len(others["params"]) == 4 and others["weight_decay"] == 0, "what is frozen is in neither"
    assert decayed["betas"] == (0.8, 0.999) and decayed["lr"] == 0.1


# ---- the stop


@pytest.mark.parametrize("loss", [math.nan, math.inf, -math.inf])
def test_a_bad_loss_stops_with_advice(loss):
    line = refused(rf"expected a finite loss, found {loss} at epoch 3, step 14", loop.stop_if_not_finite, loss, 3, 14)
    assert "last epoch's weights are kept" in line and "--Init_lr" in line
    loop.stop_if_not_finite(1e30, 3, 14)


# ---- the log


def test_a_run_keeps_its_settings_and_a_line_per_epoch(tmp_path):
    rows = [{"epoch": i, "loss": 1 / (i + 1), "seconds": 0.5} for i in range(3)]
    log = RunLog(tmp_path, "stage_one", {"out": Path("a/b"), "Min_lr": 1e-6, "slices": None})
    for row in rows:
        log.add(row)
    assert log.folder.parent == tmp_path / "stage_one" and log.rows == rows
    assert json.loads((log.folder / "settings.json").read_text()) == {"out": "a/b", "Min_lr": 1e-6, "slices": None}
    assert [json.loads(line) for line in (log.folder / "log.jsonl").read_text().splitlines()] == rows


def test_a_line_is_there_as_soon_as_its_epoch_is_over(tmp_path):
    log = RunLog(tmp_path, "stage_one", {})
    log.add({"epoch": 0, "loss": 1.0})
    assert (log.folder / "log.jsonl").read_text() == '{"epoch": 0, "loss": 1.0}\n'


def test_runs_of_one_second_do_not_share_a_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(time, "strftime", lambda form: "2025-01-01_00-00-00")
    folders = [RunLog(tmp_path, "stage_two", {}).folder for _ in range(3)]
    assert [folder.name for folder in folders] == [f"2025-01-01_00-00-00{end}" for end in ("", ".2", ".3")]


def test_tensorboard_events_where_it_is_installed(tmp_path):
    pytest.importorskip("torch.utils.tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log = RunLog(tmp_path, "stage_one", {})
    log.add({"epoch": 4, "loss": 0.25, "name": "text"})
    log.close()
    events = EventAccumulator(str(log.folder)).Reload()
    assert events.Tags()["scalars"] == ["loss"]
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(4, 0.25)]


def test_without_tensorboard_the_log_is_kept_all_the_same(tmp_path, monkeypatch):
    monkeypatch.setattr(RunLog, "_tensorboard", lambda self: None)
    log = RunLog(tmp_path, "stage_one", {})
    log.add({"epoch": 0, "loss": 1.0})
    assert sorted(path.name for path in log.folder.iterdir()) == ["log.jsonl", "settings.json"]
