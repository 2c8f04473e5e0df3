"""benchmarks/speed.py: its table, its place in RESULTS.md, and, slowly, each of its parts at tiny sizes."""

import json

import pytest

from benchmarks import speed

FOUND = {
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
    "flop_per_item": 3e9,
}


def test_a_row_gives_rate_and_shares_of_the_peak():
    row = speed.row_of("retrieval", FOUND, {"fp32": 10e9, "bf16": 60e9})
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells[:5] == ["retrieval", "30 (29 to 31.5)", "5 (4.9 to 5.1)", "**6.00**", "2 spots/s"]
    assert cells[5:8] == ["3", "10%", "10%"]  # 30 GFLOP in 30 s of 10 GFLOP/s, in 5 s of 60 GFLOP/s
    assert cells[8:] == ["4,096", "1,024", "plain: 2 of 10 spots"]


def test_the_table_replaces_the_last_one_of_its_name_and_no_other(tmp_path):
    page = tmp_path / "RESULTS.md"
    page.write_text("# Results\n\ntext\n")
    speed.put_into(page, "cpu", "one")
    speed.put_into(page, "gpu", "two")
    speed.put_into(page, "cpu", "three")
    assert page.read_text() == (
        "# Results\n\ntext\n\n<!-- speed: cpu -->\nthree\n<!-- speed: cpu -->\n\n<!-- speed: gpu -->\ntwo\n"
        "<!-- speed: gpu -->\n"
    )


def test_a_wrong_part_is_one_line(capsys):
    with pytest.raises(SystemExit) as stop:
        speed.parse_args(["--part", "everything"])
    assert stop.value.code == 2 and capsys.readouterr().err.count("\n") == 1


def test_the_committed_figures_name_every_part():
    found = json.loads((speed.FOLDER / "speed.json").read_text())
    assert set(found["parts"]) == set(speed.PARTS)
    for part in found["parts"].values():
        assert part["ratio"] == pytest.approx(part["plain_s"] / part["ours_s"])
        assert part["peak_mib"] > 0


@pytest.mark.slow
@pytest.mark.parametrize("part", speed.PARTS)
def test_each_part_runs_at_tiny_sizes(part, capsys):
    speed.main(speed.parse_args(["--small", "--part", part, "--rounds", "1", "--device", "cpu", "--batch_size", "2"]))
    last = capsys.readouterr().out.splitlines()[-1]
    name, word, ratio = last.split()
    assert (name, word) == (part, "ratio") and float(ratio) > 0
