"""predict_slide.py over several slides: interrupted, resumed, shared out, refused in one line."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from slide_runs import exit_code, predict, read, record
from tiny_runs import snapshot, stderr_line

from utils.features import neighbourhoods
from utils.images import tiles
from utils.training import checkpoint

ROOT = Path(__file__).parents[2]


# ---- several slides, resumed, shared out


def test_an_interrupted_slide_goes_on_from_its_features(trained, section, measured, tmp_path, monkeypatch, capsys):
    out, calls, stream, ask = tmp_path / "out", [], tiles.cut_tiles, neighbourhoods.predict
    monkeypatch.setattr(tiles, "cut_tiles", lambda s, c, *a, **k: calls.append(len(c)) or stream(s, c, *a, **k))
    monkeypatch.setattr(neighbourhoods, "predict", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        predict(section[0], trained.decoder, out)
    assert calls.count(70) == 1 and list(out.rglob("*.npy")) and not (out / "settings.json").exists()
    monkeypatch.setattr(neighbourhoods, "predict", ask)
    predict(section[0], trained.decoder, out)
    assert calls.count(70) == 1, "the kept features serve"
    np.testing.assert_array_equal(read(out).X, read(measured).X)
    assert not list(out.rglob("*.npy")) and not (out / ".lock").exists()
    before = snapshot(out)
    capsys.readouterr()
    predict(section[0], trained.decoder, out)
    assert "done already" in capsys.readouterr().out and snapshot(out) == before
    predict(section[0], trained.decoder, out, "--maps", 2)
    assert len(list((out / "maps").iterdir())) == 3, "other flags, other files"


def test_a_table_of_slides_is_worked_off_and_a_corrupt_one_does_not_stop_it(trained, section, tmp_path, capsys):
    (tmp_path / "corrupt.png").write_bytes(b"no image")
    (tmp_path / "P03_1").symlink_to(section[0])
    table = tmp_path / "cohort.csv"
    table.write_text(f"slide,um_per_px,spot_pitch_um\ncorrupt.png,1,\nP03_1,,\n\n{section[1]},1,150\n")
    out = tmp_path / "out"
    assert exit_code(table, trained.decoder, out) == 2
    stderr_line(capsys, "1 of 3 slides could not be predicted: corrupt .*corrupt.png")
    assert {path.name for path in out.iterdir()} == {"P03_1", "P03_1_he"}
    assert record(out / "P03_1")["n_spots"] == 70
    assert record(out / "P03_1_he")["spot_pitch_fullres_px"] == pytest.approx(150)


def test_help_and_checks_come_before_torch():
    code = "import sys, predict_slide; predict_slide.parse_args(['a.svs', '--out', 'x']); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


# ---- what is refused


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ((), "P03_1_he.jpg: expected a scale .*, found none; give --um_per_px$"),
        (("--um_per_px", 1, "--positions", "nothing.csv"), "--positions: expected the file nothing.csv"),
        (("--um_per_px", 1, "--mask", "nothing.png"), "--mask: expected the file nothing.png"),
        (("--um_per_px", 1, "--spot_pitch_um", 1e-3), "spot pitch"),
        (("--um_per_px", 1, "--decoder", "nothing.pth"), "--decoder: expected the file nothing.pth"),
    ],
)
def test_one_line_says_what_is_missing(trained, section, tmp_path, capsys, flags, expected):
    assert exit_code(section[1], trained.decoder, tmp_path / "out", *flags) == 2
    stderr_line(capsys, expected)
    assert not (tmp_path / "out").exists(), "nothing is left behind"


def test_a_model_of_tiles_without_scale_and_unlike_members_are_refused(trained, section, tmp_path, capsys):
    state = checkpoint.load(trained.decoder, "stage_two", "--decoder")
    state.pop("format"), state.pop("kind")
    checkpoint.save(tmp_path / "a.pth", "stage_two", **state | {"tile_scale": [32, None]})
    checkpoint.save(tmp_path / "b.pth", "stage_two", **state | {"genes": state["genes"][::-1]})
    assert exit_code(section[0], tmp_path / "a.pth", tmp_path / "out") == 2
    stderr_line(capsys, "a.pth: expected a model of tiles of a stated scale")
    assert exit_code(section[0], [trained.decoder, tmp_path / "b.pth"], tmp_path / "out") == 2
    stderr_line(capsys, "b.pth: expected the genes of .*, found others")
    assert exit_code(section[0], [trained.decoder, tmp_path / "b.pth"], tmp_path / "out", "--prediction_std") == 2
    stderr_line(capsys, "--prediction_std: expected one --decoder, found 2")


def test_a_launcher_of_several_processes_is_refused(trained, section, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert exit_code(section[0], trained.decoder, tmp_path / "out") == 2
    stderr_line(capsys, "expected one process, found a launcher's several; .* --shard I/N")


def test_positions_of_another_image_and_corrupt_ones(trained, section, tmp_path, capsys):
    far, corrupt = tmp_path / "far.csv", tmp_path / "corrupt.csv"
    far.write_text("".join(f"A{i}-1,1,{i},{i % 2},{9000 + 100 * i},{9000 + 50 * (i % 2)}\n" for i in range(4)))
    corrupt.write_text("barcode,in_tissue\nA,1\n")
    assert exit_code(section[1], trained.decoder, tmp_path / "out", "--positions", far, "--um_per_px", 1) == 2
    stderr_line(capsys, "expected 4 spots on its .* found 4 outside")
    assert exit_code(section[1], trained.decoder, tmp_path / "out", "--positions", corrupt) == 2
    stderr_line(capsys, f"--positions: {corrupt}: expected the comma-separated columns")


@pytest.mark.realdata
def test_a_real_section_with_counts_and_its_image_alone(trained, real_data, tmp_path):
    folder = real_data / "Breast_cancer" / "B4"
    out = predict(folder, trained.decoder, tmp_path / "slice", "--spot_pitch_um", 200)
    adata = read(out)
    assert adata.n_obs == 283 and np.isfinite(adata.X).all()
    assert np.isfinite(adata.layers["measured"]).any(0).sum() > 5
    flags = ("--spot_pitch_um", 200, "--um_per_px", record(out)["um_per_fullres_px"])
    alone = read(predict(next(folder.glob("*.jpg")), trained.decoder, tmp_path / "alone", *flags))
    assert 250 < alone.n_obs < 450
