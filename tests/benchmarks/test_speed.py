"""benchmarks/speed.py: its tables, their place in RESULTS.md, and, slowly, each of its parts at tiny sizes."""

import json
import mmap
import time

import numpy as np
import pytest

from benchmarks import record, speed, speed_growth
from utils.images.tiles import TilePack
from utils.slices import splits, visium

PARTS_OF_GROWTH = (speed_growth.tiling, speed_growth.panels, speed_growth.training, speed_growth.stage_two)

FIGURES = {
    "plain_s": 30.0,
    "ours_s": 5.0,
    "ratio": 6.0,
    "peak_mib": 1024.0,
    "plain_peak_mib": 4096.0,
    "plain_range_s": [29.0, 31.5],
    "ours_range_s": [4.9, 5.1],
    "items": 10,
    "unit": "spots",
    "note": "plain: 2 of 10 spots",
}


def test_a_row_gives_times_ratio_rate_and_memory():
    cells = speed.table_row("retrieval", FIGURES)
    assert cells[:5] == ["retrieval", "30 (29 to 31.5)", "5 (4.9 to 5.1)", "**6.00**", "2 spots/s"]
    assert cells[5:] == ["4,096", "1,024", "plain: 2 of 10 spots"]


def test_the_table_replaces_the_last_one_of_its_name_and_no_other(tmp_path):
    page = tmp_path / "RESULTS.md"
    page.write_text("# Results\n\ntext\n")
    record.put_into(page, "cpu", "one")
    record.put_into(page, "gpu", "two")
    record.put_into(page, "cpu", "three")
    assert page.read_text() == (
        "# Results\n\ntext\n\n<!-- table: cpu -->\nthree\n<!-- table: cpu -->\n\n<!-- table: gpu -->\ntwo\n"
        "<!-- table: gpu -->\n"
    )


def test_a_wrong_part_is_one_line(capsys):
    with pytest.raises(SystemExit) as stop:
        speed.parse_args(["--part", "everything"])
    assert stop.value.code == 2 and capsys.readouterr().err.count("\n") == 1


def test_the_committed_figures_are_of_every_part_and_those_of_results_md():
    results = json.loads((speed.FOLDER / "speed.json").read_text())
    assert set(results["parts"]) == set(speed.PARTS)
    for part in results["parts"].values():
        assert part["ratio"] == pytest.approx(part["plain_s"] / part["ours_s"])
        assert part["peak_mib"] > 0
    assert speed.table(results) in (speed.FOLDER / "RESULTS.md").read_text()


def test_growth_counts_what_it_did_without_worker_processes(tmp_path, monkeypatch):
    monkeypatch.setattr(speed_growth, "SPOTS", 40)
    monkeypatch.setattr(speed_growth, "GENES", 200)
    monkeypatch.setattr(speed_growth, "GENES_A_SPOT", 20)
    monkeypatch.setattr(speed_growth, "N_BATCHES", 3)
    monkeypatch.setattr(speed_growth, "N_STEPS", 1)
    speed_growth.write_slices(tmp_path, 3)
    rows = [row for part in PARTS_OF_GROWTH for row in part(tmp_path, 3)]
    assert [row.part for row in rows] == ["tiling", "panels", "start-up", "loading", "bank", "decoder"]
    assert [row.items for row in rows] == [120, 120, 120, 96, 120, 32] and {row.n_slices for row in rows} == {3}
    assert all(row.seconds > 0 and row.memory_mib > 50 for row in rows)  # of the process, with all tests before
    packs = [TilePack(folder) for folder in sorted((tmp_path / "tiles").iterdir())]
    assert [len(pack.barcodes) for pack in packs] == [40] * 3
    slices = [visium.read_slice(folder) for folder in sorted((tmp_path / "data").glob("slice*/"))]
    assert len({visium.counts_hash(s.counts, s.spots.index.to_numpy(str), s.genes) for s in slices}) == 3
    assert [row.part for row in splits.read_table(tmp_path / "data")[0]] == ["train", "train", "val"]


def test_the_table_of_growth_has_a_line_per_part_and_size():
    rows = [
        speed_growth.Growth("tiling", 10, 9.0, 5.0, 10_000, 123.4),
        speed_growth.Growth("loading", 10, 1.0, 0.5, 6400, 99.0),
    ]
    lines = speed_growth.table(rows).splitlines()
    assert lines[-2:] == [
        "| tiling | 10 | 10,000 | 9 | 5 | 0.5 | 123 |",
        "| loading | 10 | 10,000 | 1 | 0.5 | 0.0781 | 99 |",
    ]


def until(condition, seconds=300):
    """Wait for what another thread sees, however busy the machine is."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_memory_of_the_process_is_seen():
    with speed_growth.peak_memory() as peak_mib:
        until(lambda: peak_mib() > 0)
        before = peak_mib()
        with mmap.mmap(-1, 400 * 2**20) as block:  # new to the process, unlike what an allocator kept
            np.frombuffer(block, np.uint8)[:] = 1
            until(lambda: peak_mib() - before > 350)


@pytest.mark.slow
@pytest.mark.parametrize("part", speed.PARTS)
def test_each_part_runs_at_tiny_sizes(part, capsys):
    speed.main(speed.parse_args(["--small", "--part", part, "--rounds", "1", "--device", "cpu", "--batch_size", "2"]))
    last = capsys.readouterr().out.splitlines()[-1]
    name, word, ratio = last.split()
    assert (name, word) == (part, "ratio") and float(ratio) > 0
