"""import_slices.py as it is called: every format to the tiles and panels of the next scripts; flags and refusals."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from importer_sources import image_of, to_anndata, write_hd, write_hest, write_legacy, write_zarr
from tiny_runs import snapshot, stderr_line

import import_slices
from utils import settings
from utils.images.tiles import TilePack
from utils.slices import splits, visium

ROOT = Path(__file__).parents[2]
REAL = os.environ.get("MAGIC_REAL_DATA")
HIRES = np.full((600, 600, 3), (200, 110, 160), np.uint8)
FACTORS = {"tissue_hires_scalef": 0.5, "spot_diameter_fullres": 65.0}


def run(*flags):
    import_slices.main(import_slices.parse_args([str(flag) for flag in flags]))


def exit_code(*flags):
    with pytest.raises(SystemExit) as stop:
        settings.run(import_slices.main, import_slices.parse_args([str(flag) for flag in flags]))
    return stop.value.code


@pytest.fixture(scope="module")
def formats(simulated, tmp_path_factory):
    """A source of each format, made of the first simulated slice, and its further flags."""
    folder, root = tmp_path_factory.mktemp("formats"), simulated / "P01_1"
    to_anndata(root).write_h5ad(folder / "one.h5ad")
    return {
        "legacy_st": [write_legacy(folder / "st", {"A1": root}), "--spot_pitch_um", 100],
        "visium_hd": [write_hd(folder / "hd", root), "--bin", 8],
        "h5ad": [folder / "one.h5ad", "--image", image_of(root)],
        "spatialdata": [write_zarr(folder / "sample.zarr", root)],
    }


@pytest.mark.parametrize("form", import_slices.FORMATS)
def test_every_format_becomes_slices_that_the_next_scripts_read(formats, simulated, tmp_path, capsys, form):
    before = snapshot(*[path for path in [formats[form][0]] if path.is_dir()])
    out = tmp_path / "data" / "new"
    run("--format", form, *formats[form], "--out", out)
    assert "1 slice imported into" in capsys.readouterr().out
    assert snapshot(*[path for path in [formats[form][0]] if path.is_dir()]) == before
    assert not [path for path in out.iterdir() if path.name.startswith(".")]
    rows, warnings = splits.read_table(out, split=False)
    found = visium.read_slice(out / rows[0].slice)
    true = visium.read_slice(simulated / "P01_1")
    n_bins = 67 if form == "visium_hd" else 70
    assert found.counts.shape == (n_bins, 60) and not warnings
    assert found.counts.sum() == (true.counts.sum() if n_bins == 70 else true.counts[3:].sum())
    import image_tilling

    flags = ["--data", out, "--tiles", tmp_path / "tiles", "--tile_px", 32, "--workers", 0]
    image_tilling.main(image_tilling.parse_args([str(flag) for flag in flags]))
    assert len(TilePack(tmp_path / "tiles" / rows[0].slice).barcodes) == n_bins


def test_formats_share_a_folder(formats, tmp_path):
    for form in ("h5ad", "legacy_st"):
        run("--format", form, *formats[form], "--out", tmp_path)
    text = (tmp_path / "slices.csv").read_text()
    run("--format", "h5ad", *formats["h5ad"], "--out", tmp_path)  # again: it is there already, the same
    assert (tmp_path / "slices.csv").read_text() == text and text.count("\n") == 3


def test_joined_sections_are_split_by_a_column(simulated, tmp_path, capsys):
    import anndata

    parts = [to_anndata(simulated / name) for name in ("P01_1", "P02_1")]
    joined = anndata.concat(parts, label="batch", index_unique="-", merge="same")
    joined.uns["spatial"] = {name: {"images": {"hires": HIRES}, "scalefactors": FACTORS} for name in ("0", "1")}
    joined.write_h5ad(tmp_path / "joined.h5ad")
    flags = ["--format", "h5ad", tmp_path / "joined.h5ad", "--out", tmp_path / "out"]
    assert exit_code(*flags) == 2
    stderr_line(capsys, "joined.h5ad: expected one section, found 2 .*batch.*--library_key batch")
    assert not (tmp_path / "out").exists()
    run(*flags, "--library_key", "batch")
    assert "2 slices imported into" in capsys.readouterr().out
    for number, name in enumerate(("P01_1", "P02_1")):
        found, true = visium.read_slice(tmp_path / "out" / f"joined_{number}"), visium.read_slice(simulated / name)
        assert (found.counts != true.counts).nnz == 0 and found.spots["x_fullres_px"].tolist() == true.spots[
            "x_fullres_px"
        ].tolist()


def test_a_missing_image_stops_before_the_first_section_is_written(simulated, tmp_path, capsys):
    source = write_legacy(tmp_path / "st", {"A1": simulated / "P01_1", "A2": simulated / "P02_1"})
    image_of(source / "ST-imgs" / "A" / "A2").unlink()
    assert exit_code("--format", "legacy_st", source, "--out", tmp_path / "out") == 2
    stderr_line(capsys, "ST-imgs: expected one H&E image of A2, found none; name it with --image")
    assert not (tmp_path / "out").exists()
    source = write_hest(tmp_path / "hest", {"A1": simulated / "P01_1"})
    (source / "wsis" / "A1.tif").unlink()
    assert exit_code("--format", "h5ad", source, "--out", tmp_path / "out") == 2
    stderr_line(capsys, "wsis: expected one H&E image of A1, found none; name it with --image")


def test_wrong_flags_give_one_line(formats, tmp_path, capsys):
    source = formats["h5ad"][0]
    assert exit_code("--format", "h5ad", source, "--out", tmp_path / "out", "--bin", 8) == 2
    stderr_line(capsys, "--bin 8: expected --format visium_hd or spatialdata, found h5ad")
    flags = ["--out", tmp_path / "out", "--library_key", "sample"]
    assert exit_code("--format", "visium_hd", formats["visium_hd"][0], *flags) == 2
    stderr_line(capsys, "--library_key sample: expected --format h5ad or spatialdata, found visium_hd")
    assert exit_code("--format", "h5ad", source, "--out", tmp_path / "out", "--image", tmp_path / "no.tif") == 2
    stderr_line(capsys, "--image .*no.tif: expected an image")
    assert exit_code("--format", "visium_hd", formats["visium_hd"][0], "--out", tmp_path / "out", "--bin", 2) == 2
    stderr_line(capsys, "found --bin 2; use --bin with: 8, 16")
    assert not (tmp_path / "out").exists()
    for flags in (["--format", "loom"], ["--format", "h5ad", "--bin", "0"], ["--bins", "8"]):
        with pytest.raises(SystemExit):
            import_slices.parse_args([*flags, "x", "--out", "y"])
        stderr_line(capsys, "see .* --help")


def test_help_imports_nothing_heavy():
    code = (
        "import sys, import_slices\nheavy = {'torch', 'scanpy', 'anndata', 'spatialdata', 'timm', 'openslide', 'scipy'}"
    )
    code += "\nassert not heavy & set(sys.modules), heavy & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


@pytest.mark.realdata
@pytest.mark.skipif(not REAL, reason="MAGIC_REAL_DATA does not name the data folder")
def test_the_real_samples_share_a_folder(tmp_path):
    samples = {"legacy_st_MOB1": "legacy_st", "legacy_st_xfuse_MOB": "legacy_st"}
    samples |= {f"spaceranger_samples/{name}": "visium_hd" for name in ("seurat_visium_hd", "VisiumIO_visium_hd")}
    for name, form in samples.items():
        bins = ["--bin", 2] if name.endswith("VisiumIO_visium_hd") else []
        run("--format", form, Path(REAL) / name, "--out", tmp_path, *bins)
    rows, _ = splits.read_table(tmp_path, split=False)
    total = {row.slice: int(visium.read_slice(tmp_path / row.slice).counts.sum()) for row in rows}
    assert total == {
        "MOB1": 958111,
        "legacy_st_xfuse_MOB": 92636,
        "seurat_visium_hd_016um": 16029,
        "VisiumIO_visium_hd_002um": 0,
    }
