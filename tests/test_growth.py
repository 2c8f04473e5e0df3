"""growth.py: every part works at tiny sizes, its rows are written and kept, and nothing else stays on the disk."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import growth, growth_parts
from benchmarks.growth_parts import PARTS, Setting, Steps
from utils.images.tiles import TilePack
from utils.slices import splits, visium


@pytest.fixture
def tiny(tmp_path, monkeypatch) -> Setting:
    """Three slices of 20 spots, few genes, steps and batches."""
    for name, value in {"SLICE_SPOTS": 20, "N_LOADED": 3, "N_STEPS": 2, "N_QUERIES": 5, "FEW_GENES": 16}.items():
        monkeypatch.setattr(growth_parts, name, value)
    return Setting(60, tmp_path, "test_vit")


def row(part: str = "tiling", size: int = 1000, seconds: float = 1.0, **more) -> dict:
    found = {"part": part, "against": growth.AGAINST[part], "size": size, "seconds": seconds, "per_s": size / seconds}
    return {**found, "unit": "spots", "peak_mib": 400.0, "own_mib": 300.0, **more}


def run(part: str, setting: Setting) -> dict:
    prepare = PARTS[part][0]
    if prepare is not None:
        prepare(setting)
    return growth_parts.measure(part, setting)


@pytest.mark.usefixtures("another_precision")
@pytest.mark.parametrize(
    "part, size, items, unit",
    [
        ("tiling", 60, 60, "spots"),
        ("panels", 60, 60, "spots"),
        ("loading", 60, 3 * 32, "tiles"),
        ("loading", 7, 3 * 7, "tiles"),
        ("stage_two", 60, 2, "steps"),
        ("gallery", 60, 5, "queries"),
        ("gallery", 7, 5, "queries"),
        ("gene_forward", 16, 2, "spots"),
        ("gene_backward", 16, 2, "spots"),
        ("gene_batch", 3, 3, "spots"),
        ("image_batch", 2, 2, "spots"),
    ],
)
def test_every_part_works_and_counts_what_it_did(tiny, part, size, items, unit):
    found = run(part, Setting(size, tiny.folder, tiny.image_encoder))
    assert found["seconds"] > 0 and found["unit"] == unit
    assert found["per_s"] * found["seconds"] == pytest.approx(items)
    assert 50 < found["peak_mib"] < 20_000


def test_all_parts_are_drawn_named_and_measured():
    assert set(PARTS) == set(growth.AGAINST) == set(growth.LABELS)
    assert {part for part in PARTS if PARTS[part][0]} == set(growth.DISK_BYTES)


def test_tiling_cuts_a_tile_for_every_spot_of_every_slice(tiny):
    run("tiling", tiny)
    folders = sorted((tiny.folder / "tiles").iterdir())
    assert [folder.name for folder in folders] == tiny.slices and len(folders) == 3
    for folder in folders:
        assert len(list(folder.glob("*.jpeg"))) == len(TilePack(folder).barcodes) == 20


def test_panels_are_written_for_slices_that_differ(tiny):
    run("panels", tiny)
    assert len(list((tiny.folder / "panels").rglob("*.h5ad"))) == 2 * 3
    slices = [visium.read_slice(tiny.folder / "data" / name) for name in tiny.slices]
    assert len({visium.counts_hash(s.counts, s.spots.index.to_numpy(str), s.genes) for s in slices}) == 3


@pytest.mark.parametrize("n, train, val, test", [(1, 1, 0, 0), (10, 8, 1, 1)])
def test_eight_of_ten_slices_are_for_training(tiny, n, train, val, test):
    growth_parts.prepare_counts(Setting(20 * n, tiny.folder))
    parts = [one.part for one in splits.read_table(tiny.folder / "data")[0]]
    assert [parts.count(part) for part in ("train", "val", "test")] == [train, val, test]


def test_each_spot_sees_so_many_genes(rng):
    counts = growth_parts.some_counts(30, rng)
    assert ((counts > 0).sum(1) == growth_parts.SEEN_GENES).all() and counts.min() == 0
    assert counts.shape == (30, growth_parts.PANEL_GENES)


def test_spots_of_a_setting_are_those_of_its_slices():
    assert (Setting(1000, Path()).slices, Setting(1000, Path()).slice_spots) == (["slice0000"], 1000)
    large = Setting(10**6, Path())
    assert (len(large.slices), large.slice_spots, large.n_spots) == (200, 5000, 10**6)


def test_steps_go_on_through_epochs_until_they_are_enough():
    batches = list(Steps(100, 7))
    assert len(batches) == len(Steps(100, 7)) == 7 and {len(batch) for batch in batches} == {32}
    assert len({spot for batch in batches[:3] for spot in batch}) == 96 and batches[0] != batches[3]
    assert max(max(batch) for batch in Steps(10**5, 50)) > 90_000


def test_features_and_gallery_have_the_size_that_the_disk_is_asked_for(tiny):
    for part, prepare in ((part, PARTS[part][0]) for part in ("stage_two", "gallery", "loading")):
        folder = tiny.folder / part
        folder.mkdir()
        prepare(Setting(5000, folder))
        size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
        assert 0.5 * growth.DISK_BYTES[part] * 5000 < size < 1.1 * growth.DISK_BYTES[part] * 5000


def test_a_run_writes_rows_and_image_and_cleans_up(tmp_path, capsys):
    out = tmp_path / "out"
    growth.main(growth.parse_args(["--part", "gallery", "--largest", "64", "--out", str(out)]))
    assert sorted(path.name for path in out.iterdir()) == ["growth.json", "growth.png"]
    results = json.loads((out / "growth.json").read_text())
    (found,) = results["rows"]
    assert (found["part"], found["against"], found["size"]) == ("gallery", "spots", 64)
    assert found["seconds"] > 0 and 50 < found["own_mib"] < found["peak_mib"]
    assert "| gallery | spots | 64 |" in capsys.readouterr().out


def test_another_part_keeps_the_rows_there_and_all_are_in_the_table(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(growth, "measure", lambda part, size, out: row(part, size))
    for part in ("stage_two", "tiling"):
        growth.main(growth.parse_args(["--part", part, "--largest", "1e4", "--out", str(tmp_path)]))
    found = [(one["part"], one["size"]) for one in json.loads((tmp_path / "growth.json").read_text())["rows"]]
    assert found == [("tiling", 1000), ("tiling", 10**4), ("stage_two", 1000), ("stage_two", 10**4)]
    assert capsys.readouterr().out.count("| stage_two |") == 2 * 2


def test_without_out_the_results_of_the_repository_are_written(tmp_path, monkeypatch):
    monkeypatch.setattr(growth, "measure", lambda part, size, out: row(part, size))
    monkeypatch.setattr(growth, "FOLDER", tmp_path / "benchmarks")
    growth.FOLDER.mkdir()
    (growth.FOLDER / "RESULTS.md").write_text("# Results\n")
    for _ in range(2):
        growth.main(growth.parse_args([]))
    text = (growth.FOLDER / "RESULTS.md").read_text()
    assert text.startswith("# Results\n") and text.count("| tiling | spots | 1,000,000 |") == 1
    assert (growth.FOLDER / "growth.json").exists() and (tmp_path / "docs" / "growth.png").exists()


def refuse(setting: Setting) -> None:
    (setting.folder / "half.bin").write_bytes(b"half")
    raise ValueError("no more")


def test_an_error_leaves_no_temporary_files(tmp_path, monkeypatch):
    monkeypatch.setitem(PARTS, "gallery", (refuse, growth_parts.gallery))
    with pytest.raises(ValueError, match="no more"):
        growth.measure("gallery", 64, tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_size_that_the_disk_has_no_room_for_is_left_out(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(growth.DISK_BYTES, "gallery", 10**15)
    assert growth.measure("gallery", 64, tmp_path) is None
    assert "gallery 64: left out" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


def test_rows_measured_anew_stand_in_for_the_old_in_order():
    old = [row("gallery", 1000), row("tiling", 10**4), row("tiling", 1000)]
    found = growth.merged(old, [row("tiling", 1000, 2.0), row("panels", 1000)])
    assert [(one["part"], one["size"]) for one in found] == [
        *(("tiling", 1000), ("tiling", 10**4)),
        *(("panels", 1000), ("gallery", 1000)),
    ]
    assert found[0]["seconds"] == 2.0


def test_rows_of_another_machine_are_not_kept(tmp_path):
    path = tmp_path / "growth.json"
    assert growth.kept_rows(path, "this") == []
    path.write_text(json.dumps({"machine": "that", "rows": [row()]}))
    assert growth.kept_rows(path, "this") == [] and growth.kept_rows(path, "that") == [row()]


@pytest.mark.parametrize("content", ["{", "[]", '{"machine": "this"}'])
def test_a_damaged_file_of_rows_is_named(tmp_path, content):
    (tmp_path / "growth.json").write_text(content)
    with pytest.raises(ValueError, match=r"growth\.json: expected the rows of an earlier run, found .*; delete it"):
        growth.kept_rows(tmp_path / "growth.json", "this")


def test_own_memory_of_a_process_and_its_children_is_seen_and_gone_afterwards():
    hold = "import time; x = bytearray(80 * 2**20); print(1, flush=True); time.sleep(60)"
    nested = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {hold!r}])"
    process = subprocess.Popen([sys.executable, "-c", nested], stdout=subprocess.PIPE, start_new_session=True)
    try:
        process.stdout.readline()
        (child,) = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        assert 80 * 2**10 < growth.own_kib(int(child)) < growth.own_kib(process.pid) < 200 * 2**10
    finally:
        subprocess.run(["kill", child], check=True)
        process.wait()
    assert growth.own_kib(process.pid) == 0


def test_sizes_stop_at_the_largest():
    assert growth.sizes_of("tiling", 1e5) == [10**3, 10**4, 10**5]
    assert growth.sizes_of("gene_forward", 1e6) == [500, 2000, 5000, 16906]
    assert growth.sizes_of("gene_batch", 1.0) == [2] and growth.sizes_of("tiling", 64) == [64]


def test_the_image_has_a_line_per_part_and_the_eight_gib():
    rows = [row(part, size) for part, kind in growth.AGAINST.items() for size in growth.SIZES[kind]]
    panels = growth.image(rows).axes
    assert [len(axes.lines) for axes in panels[:3]] == [5, 2, 2]
    for axes in panels:
        assert axes.get_xscale() == axes.get_yscale() == "log"
    for axes in panels[3:]:
        assert any(list(line.get_ydata()) == [8192, 8192] for line in axes.lines)
    tiling = panels[0].lines[0]
    assert tiling.get_xdata().tolist() == list(growth.SIZES["spots"]) and set(tiling.get_ydata()) == {1.0}


def test_a_part_of_the_rows_can_be_drawn_too(tmp_path):
    growth.plotting.save(growth.image([row()]), tmp_path / "growth.png")
    assert (tmp_path / "growth.png").stat().st_size > 1000
