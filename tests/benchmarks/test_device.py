"""benchmarks/device.py: its count against torch's, and all of it at tiny sizes on a CPU; on a GPU if there is one."""

import json

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import device, device_count
from benchmarks.device_work import SMALL
from model.performer import favor, favor_backward


def test_operations_are_those_of_torchs_counter_and_bytes_those_read_and_written():
    a, b = torch.randn(6, 4), torch.randn(4, 5)
    with FlopCounterMode(display=False) as expected:
        (a @ b).relu().sum()
    with device_count.Cost() as cost:
        (a @ b).relu().sum()
    assert cost.operations == expected.get_total_flops() == 2 * 6 * 4 * 5
    product, relu, total = 24 + 20 + 30, 30 + 30, 30 + 1
    assert cost.nbytes == 4 * (product + relu + total)
    with device_count.Cost() as views:
        _ = a[:2].view(-1, 2).T
    assert views.nbytes == 0
    with device_count.Cost() as in_place:
        a.mul_(2.0)
    assert in_place.nbytes == 4 * (24 + 24)


def test_memory_is_what_is_held_at_once():
    with device_count.Cost(held=100) as cost:
        for _ in range(3):
            torch.zeros(1000) + 1  # two of 4,000 bytes at a time
    assert 8_100 <= cost.peak <= 12_100 and cost.live == 100


def test_favor_is_counted_as_kernels_that_keep_its_features():
    q, projection = torch.randn(1, 2, 8, 64), torch.randn(10, 64)
    with device_count.Cost() as forward:
        out, *kept = favor(q, q, q, projection, False)
    assert set(forward.by_name) == {"favor"}
    product = 2 * 2 * 8 * 64 * 32  # in each of two heads; 10 features, filled up to 32
    assert forward.operations == 4 * product
    largest, context, denominator = 1, 2 * 10 * 65, 2 * 8
    assert forward.nbytes == 4 * (4 * q.numel() + projection.numel() + largest + context + denominator)
    with device_count.Cost() as backward:
        favor_backward(q, q, q, q, projection, kept[0], kept[1], out, kept[2], False)
    assert backward.operations == 10 * product


def test_an_operator_takes_the_longer_of_its_two_times():
    card = device_count.H100
    assert card.seconds(0.6 * 989e12, 1, card.matrix) == pytest.approx(1)
    assert card.seconds(1, 0.7 * 3.35e12, card.matrix) == pytest.approx(1)
    assert device_count.hours(0.1, 256) == pytest.approx(295 * 100 * 0.1 / 3600)


def test_a_step_is_counted_without_values():
    few, many = (device_count.count("stage_two", device.of_batch(SMALL, n)) for n in (4, 8))
    assert 0 < few.matrix_s < few.seconds < many.seconds and few.peak < many.peak
    n_parameters = sum(p.numel() for p in device.PARTS["stage_two"][0](SMALL).parameters())
    assert few.peak > 4 * n_parameters
    figures = device.beside_count({"eager_s": 3.0, "compiled_s": 2.0}, "stage_two", SMALL, device_count.H100)
    assert figures["ratio"] == pytest.approx(2.0 / few.seconds)


def test_the_table_of_parts_gives_what_a_spot_costs():
    _, _, *lines = device_count.parts_table(SMALL)
    rows = {cells[1].split(":")[0].strip(): cells[2:-1] for cells in (line.split("|") for line in lines)}
    assert list(rows) == ["stage one", "evaluation", "stage two", "prediction"]
    cost = device_count.count("prediction", SMALL)
    moved, spots_per_s = float(rows["prediction"][1]), float(rows["prediction"][3].replace(",", ""))
    assert moved == pytest.approx(cost.nbytes / SMALL.batch_size / 1e6, abs=0.05)
    assert spots_per_s == pytest.approx(SMALL.batch_size / cost.seconds, rel=0.01)


def test_operators_are_named_by_their_part_of_a_step():
    _, _, *lines = device_count.operators_table(SMALL, most=3)
    by_name = device_count.count("stage_one", SMALL).by_name
    assert [line.split("`")[1] for line in lines] == [name for name, _ in by_name.most_common(3)]


def test_hours_of_cohorts_are_those_of_their_spots():
    _, _, *lines = device_count.cohorts_table(SMALL)
    cells = lines[1].split("|")
    cost = device_count.count("stage_two", SMALL)
    hours = 200_000_000 / SMALL.batch_size * cost.seconds / 3600
    assert float(cells[4]) == pytest.approx(hours, rel=0.01) and float(cells[5]) < float(cells[4])


def test_what_failed_and_what_is_slow_is_named():
    checks = {"loss": {"value": 0.2, "passed": False}, "gradients": {"value": 0.0, "passed": True}}
    parts = {"stage_one": {"ratio": 1.4}, "stage_two": {"ratio": 1.6}}
    results = {"checks": checks, "parts": parts}
    assert device.failures(results, timed=True) == ["loss 0.2", "stage_two 1.60 x its count"]
    assert device.failures(results, timed=False) == ["loss 0.2"]
    assert not device.Check(float("nan"), 1.0).passed


def run(tmp_path, *flags):
    device.main(device.parse_args(["--check", "--out", str(tmp_path / "device.json"), *flags]))
    return json.loads((tmp_path / "device.json").read_text())


def test_it_runs_at_tiny_sizes(tmp_path):
    results = run(tmp_path, "--quick", "--device", "cpu")
    assert all(check["passed"] for check in results["checks"].values())
    assert {"loss, bf16", "gradients, fp32", "FAVOR+, gradient of k", "augmentation"} < results["checks"].keys()
    assert set(results["parts"]) == set(device.PARTS)
    assert all(part["eager_s"] > 0 and part["peak_gib"] is None for part in results["parts"].values())


def test_the_published_size_is_for_gpus(tmp_path):
    with pytest.raises(ValueError, match="expected a CUDA device, found none; add --quick"):
        run(tmp_path, "--device", "cpu")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_gpu_is_right_and_as_fast_as_counted(tmp_path):
    assert run(tmp_path)["checks"]
