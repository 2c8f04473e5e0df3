"""utils/doctor: a folder in order gives 0; every damage gives a line with what was found and how to fix it."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from tiny_runs import rewrite_matrix, snapshot

from utils.doctor import __main__ as doctor
from utils.doctor import environment
from utils.doctor.findings import Findings
from utils.genes import panels as gene_panels
from utils.images import tiles

ROOT = Path(__file__).parents[2]


def look(capsys, data, tiles_at, panels, *flags) -> tuple[int, str, list[str]]:
    """Exit code, what was printed, and the lines of the problems."""
    argv = ["--data", data, "--tiles", tiles_at, "--panels", panels, "--out", Path(tiles_at).parent, *flags]
    capsys.readouterr()
    code = doctor.main(doctor.parse_args([str(flag) for flag in argv]))
    printed = capsys.readouterr().out
    return code, printed, re.findall(r"(?m)^  \d+\. (.*)", printed)


@pytest.fixture
def own(prepared, tmp_path):
    """All that two scripts read and wrote, to be damaged."""
    for name in ("data", "tiles", "panels"):
        shutil.copytree(getattr(prepared, name), tmp_path / name)
    return tmp_path


@pytest.fixture
def seen(own, capsys):
    """`seen(*flags, expect=[...])`: the damaged folder has exactly these problems, in this order."""

    def run(*flags, expect, also=()):
        code, printed, problems = look(capsys, own / "data", own / "tiles", own / "panels", *flags)
        assert code == 1 and len(problems) == len(expect), problems
        for problem, pattern in zip(problems, expect, strict=True):
            assert re.search(pattern, problem), problem
            assert re.match(r"found .*; fix: \S", problem)
        for pattern in also:
            assert re.search(pattern, printed), printed
        return printed

    return run


def test_a_prepared_folder_is_in_order_and_nothing_is_written(prepared, tmp_path, capsys):
    before = snapshot(prepared.data, prepared.tiles, prepared.panels)
    code, printed, problems = look(capsys, prepared.data, prepared.tiles, prepared.panels)
    assert (code, problems) == (0, []) and printed.endswith("All in order\n")
    for pattern in (
        r"P01_1 \(patient P01, train\)\n    70 spots, 60 genes, [\d,]+ counts",
        r"staggered array, pitch 100 um = 100\.0 px: 1\.000 um per px",
        r"image P01_1_he\.jpg, \d+ x \d+ px, 70 of 70 spots on it",
        r"70 tiles of 32 px at 3\.500 um per px, 112 um wide",
        r"50 input genes, chosen on P01_1\n    20 target genes, chosen on P01_1",
        r"CPU: \d+ cores?, AMX (yes|no)",
        r"disk: [\d.]+ GiB free",
        r"Python \d+\.\d+",
    ):
        assert re.search(pattern, printed), pattern
    assert snapshot(prepared.data, prepared.tiles, prepared.panels) == before


def test_a_folder_before_tiling_is_in_order_too(simulated, tmp_path, capsys):
    code, printed, _ = look(capsys, simulated, tmp_path / "tiles", tmp_path / "panels")
    assert code == 0 and "image_tilling.py cuts them" in printed and "make_decoder_data.py writes them" in printed


def test_the_totals_are_those_of_the_matrix_in_spans(simulated, tmp_path, capsys):
    from utils.slices import visium

    total = visium.read_slice(simulated / "P02_1").counts.sum()
    whole = look(capsys, simulated, tmp_path / "t", tmp_path / "p")[1]
    in_spans = look(capsys, simulated, tmp_path / "t", tmp_path / "p", "--memory", 1e-4)[1]
    assert f"{total:,} counts" in whole
    slices = [text[text.index("Slices in") :] for text in (whole, in_spans)]
    assert slices[0] == slices[1]


def test_two_damaged_slices_are_both_found_and_the_third_is_looked_at(own, seen):
    (own / "data/P01_1/spatial/scalefactors_json.json").unlink()
    corrupt = own / "data/P02_1/filtered_feature_bc_matrix.h5"
    corrupt.write_bytes(corrupt.read_bytes()[:1000])
    printed = seen(
        expect=[r"P01_1: .*scalefactors_json.json: expected .*; fix: add it", r"P02_1: .*bc_matrix.h5: .*; fix: copy"]
    )
    assert "P03_1 (patient P03, test)\n    70 spots" in printed


def make_square(folder: Path) -> None:
    """Places and pixels of an array that is not staggered, as legacy arrays are not."""
    for path in (folder / "spatial").glob("tissue_positions*.csv"):
        lines = path.read_text().splitlines()
        start = int(lines[0].startswith("barcode"))
        for i, line in enumerate(lines[start:], start):
            cells = line.split(",")
            row, col = int(cells[2]), int(cells[3])
            cells[3], cells[5] = str(col // 2), f"{float(cells[5]) - 50 * (row % 2):.2f}"
            lines[i] = ",".join(cells)
        path.write_text("\n".join(lines) + "\n")


def test_a_square_array_asks_for_its_pitch(own, seen):
    make_square(own / "data" / "P01_1")
    table = own / "slices.csv"
    table.write_text("slice,patient,part\nP01_1,P01,train\nP02_1,P02,val\nP03_1,P03,test\n")
    seen("--slices", table, expect=[r"found a square array; fix: add the column spot_pitch_um"])


def test_images_missing_doubled_or_of_another_slide(own, seen):
    (own / "slices.csv").write_text("slice,patient,part\nP01_1,P01,train\nP02_1,P02,val\nP03_1,P03,test\n")
    first, second, third = (own / "data" / name for name in ("P01_1", "P02_1", "P03_1"))
    shutil.copy(first / "P01_1_he.jpg", first / "again.jpg")
    (second / "P02_1_he.jpg").unlink()
    (second / "spatial/tissue_hires_image.png").unlink()
    shutil.copy(first / "P01_1_he.jpg", third / "P03_1_he.jpg")
    seen(
        "--slices",
        own / "slices.csv",
        expect=[
            r"P01_1: .*expected one full-resolution image, found .*; fix: name it in the image column",
            r"P02_1: .*expected a full-resolution image or .*, found none; fix: put the H&E image",
            r"P03_1: .*P03_1_he.jpg: expected the image that tissue_hires_image.png was made of, found another",
        ],
    )


def test_the_hires_image_alone_is_a_note(own, capsys):
    for name in ("P01_1", "P02_1", "P03_1"):
        (own / f"data/{name}/{name}_he.jpg").unlink()
    (own / "slices.csv").write_text("slice,patient,part\nP01_1,P01,train\nP02_1,P02,val\nP03_1,P03,test\n")
    code, printed, _ = look(capsys, own / "data", own / "no", own / "panels", "--slices", own / "slices.csv")
    assert code == 0 and len(re.findall(r"note: P0\d_1: only the hires image \([\d.]+ um per px\)", printed)) == 3


@pytest.mark.parametrize(
    ("lines", "flags", "expect"),
    [
        ("P01_1,A,train\nP02_1,B,val\nP03_1,A,test\n", (), ["patients in test and in another part: A"]),
        ("P01_1,A,train\nP02_1,B,test\nP03_1,C,test\n", (), ["no slice of part val; .*--val_strip"]),
        ("P01_1,A,val\nP02_1,B,val\nP03_1,C,test\n", (), ["no slice of part train", "P01_1: genes chosen on P01_1"]),
        (
            "P01_1,A,train\nP09_1,B,val\n",
            (),
            ["line 3: .*found no such folder; fix: correct the slice column"],
        ),
        ("P01_1,A,test\nP02_1,B,val\nP03_1,C,train\n", (), ["P01_1: genes chosen on P01_1, outside the train part"]),
    ],
)
def test_table_and_split(own, seen, lines, flags, expect):
    table = own / "slices.csv"
    table.write_text("slice,patient,part\n" + lines)
    if "genes chosen" in expect[-1]:  # once for each of the three slices
        expect = [*expect, "P02_1: genes chosen on P01_1", "P03_1: genes chosen on P01_1"]
    printed = seen("--slices", table, *flags, expect=expect)
    assert "P03_1 (patient" in printed, "a wrong table does not hide the slices"


def test_a_leak_that_is_allowed_is_a_note(own, capsys):
    (own / "slices.csv").write_text("slice,patient,part\nP01_1,A,train\nP02_1,B,val\nP03_1,A,test\n")
    flags = ("--slices", own / "slices.csv", "--allow_leak")
    code, printed, _ = look(capsys, own / "data", own / "tiles", own / "panels", *flags)
    assert code == 0 and "note: patients in test and in another part" in printed


def test_one_slice_under_two_names(own, seen):
    shutil.rmtree(own / "data/P03_1")
    shutil.copytree(own / "data/P01_1", own / "data/P03_1")
    (own / "data/P03_1/P01_1_he.jpg").rename(own / "data/P03_1/P03_1_he.jpg")
    shutil.rmtree(own / "tiles")
    shutil.rmtree(own / "panels")
    seen(expect=[r"identical counts in two parts: P01_1 \(train\), P03_1 \(test\); fix: .*parts"])
    rewrite_matrix(own / "data/P03_1", lambda counts, barcodes, names: (counts[1:], barcodes[1:], names))
    seen(expect=[r"the same spots in two parts: P01_1 \(train\), P03_1 \(test\); fix: .*parts"])


def test_counts_that_changed_after_the_panels(own, seen):
    rewrite_matrix(own / "data/P02_1", lambda counts, barcodes, names: (counts + 1, barcodes, names))
    seen(expect=[r"P02_1, found those of other counts", r"in the target genes: no file of P02_1"])


def test_tiles_missing_interrupted_or_of_another_scale(own, seen):
    first, second, third = (own / "tiles" / name for name in ("P01_1", "P02_1", "P03_1"))
    (first / tiles.RECORD).unlink(), (first / tiles.PACK).rename(first / f"{tiles.PACK}.part")
    (second / tiles.PACK).unlink()
    record = json.loads((third / tiles.RECORD).read_text())
    (third / tiles.RECORD).write_text(json.dumps(record | {"um_per_px": 1.0}))
    seen(
        expect=[
            r"P01_1: .*expected tiles.h5, found one that was interrupted; fix: run image_tilling.py again",
            r"P02_1: .*expected tiles.json and tiles.h5, found none",
            r"in the tiles: none of P01_1, P02_1",
        ]
    )


def test_scales_within_a_thousandth_are_one(own, capsys):
    for name, um_per_px in (("P01_1", 3.4994), ("P03_1", 3.5006)):  # either side of what three decimals tell apart
        path = own / "tiles" / name / tiles.RECORD
        path.write_text(json.dumps(json.loads(path.read_text()) | {"um_per_px": um_per_px}))
    assert look(capsys, own / "data", own / "tiles", own / "panels")[2] == []


def test_two_tile_scales_and_two_panels(own, seen):
    record = json.loads((own / "tiles/P03_1" / tiles.RECORD).read_text())
    (own / "tiles/P03_1" / tiles.RECORD).write_text(json.dumps(record | {"um_per_px": 1.0}))
    path = own / "panels/P03_1" / gene_panels.FILES["input"]
    shutil.copy(own / "panels/P03_1" / gene_panels.FILES["target"], path)
    seen(expect=[r"in the tiles: 32 px at 1 um per px and 32 px at 3\.5", r"in the input genes: 2 different panels"])


def test_a_spot_without_tile(own, seen):
    pack = tiles.TilePack(own / "tiles/P01_1")
    barcodes, rows = pack.barcodes[1:], pack.read(np.arange(1, len(pack.barcodes)))
    tiles.write_pack(own / "tiles/P01_1", barcodes, np.zeros((len(barcodes), 2)), [rows], pack.size)
    seen(expect=[r"P01_1: .*each of 70 spots, found none for 1", r"in the tiles: none of P01_1"])


def test_a_data_folder_that_is_not_there_or_is_a_slice(own, capsys, tmp_path):
    code, _, problems = look(capsys, own / "nothing", own / "tiles", own / "panels")
    assert code == 1 and "found nothing; fix: give it with --data" in problems[0]
    code, _, problems = look(capsys, own / "data/P01_1", own / "tiles", own / "panels")
    assert code == 1 and "fix: give the folder above it" in problems[0]


def test_without_data_the_machine_alone_is_looked_at(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert doctor.main(doctor.parse_args([])) == 0
    assert "data/Breast_cancer is not there yet" in capsys.readouterr().out


def test_unmet_requirements_are_named_and_slices_wait(tmp_path, capsys):
    (tmp_path / "requirements.txt").write_text("numpy>=999\nno-such-package-at-all>=1  # why\n\npillow>=1\n")
    findings = Findings()
    assert environment.check_versions(findings, tmp_path / "requirements.txt") is False
    assert [p.split(";")[0] for p in findings.problems] == [
        f"found numpy {np.__version__}, needed is >=999",
        "found no-such-package-at-all not installed, needed is >=1",
    ]
    doctor.check_data(doctor.parse_args(["--data", str(tmp_path)]), False, findings)
    assert "not checked before" in capsys.readouterr().out


def test_what_this_repository_needs_is_installed_here():
    findings = Findings()
    assert environment.check_versions(findings) and not findings.problems


def test_room_for_tiles(own, seen, monkeypatch):
    usage = shutil.disk_usage(own)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    shutil.rmtree(own / "tiles")
    seen(expect=[r"0\.0 GiB free for .*tiles, about 0\.0 GiB of tiles to come; fix: make room"])


def test_a_driver_that_torch_does_not_see(monkeypatch, capsys):
    import torch

    if torch.cuda.is_available():
        pytest.skip("torch sees a CUDA device here")
    monkeypatch.setattr(environment, "driver_versions", lambda: ["550.54"])
    findings = Findings()
    environment.check_device(findings)
    assert "an NVIDIA driver 550.54, but torch" in findings.problems[0]


@pytest.mark.gpu
def test_a_cuda_device_is_named_with_driver_and_memory(capsys):
    import torch

    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    findings = Findings()
    environment.check_device(findings)
    assert not findings.problems
    assert re.search(r"GPU 0: .*, [\d.]+ GiB, CUDA [\d.]+, driver [\d.]+, ", capsys.readouterr().out)


def test_help_and_a_wrong_flag_come_before_torch_and_pandas():
    imports = "import sys; from utils.doctor import __main__ as doctor; "
    code = imports + "doctor.parse_args([]); print({'torch', 'pandas'} & {*sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
    done = subprocess.run(
        [sys.executable, "-m", "utils.doctor", "--dta", "x"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "--dta" in done.stderr


def test_the_command_ends_with_the_exit_code(simulated, tmp_path):
    command = [sys.executable, "-m", "utils.doctor", "--data", str(tmp_path), "--tiles", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and "; fix: " in done.stdout and not done.stderr


@pytest.mark.realdata
def test_the_real_sections_are_in_order(real_data, tmp_path, capsys):
    code, printed, problems = look(capsys, real_data / "Breast_cancer", tmp_path / "tiles", tmp_path / "panels")
    assert code == 0, problems
    assert "square array, pitch 200 um" in printed and "note: patients in train and in val: C" in printed
