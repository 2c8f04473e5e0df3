"""Faults of images, positions, scale factors, tables, files and flags that test_bad_*.py do not have, and oddities
that are no faults: those go through."""

import json
import pickle

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from tiny_runs import TRAINING, Work, rewrite_matrix, snapshot, split_flag

from utils.slices import visium


def spatial(damaged, name="P01_1"):
    return damaged.data / name / "spatial"


def positions(damaged, edit):
    """Change a slice's table of positions, read without a header: `edit` takes and gives a frame of text."""
    (path,) = spatial(damaged).glob("tissue_positions*.csv")
    table = pd.read_csv(path, header=None, dtype=str)
    edit(table).to_csv(path, header=False, index=False)


def factors(damaged, **changed):
    path = spatial(damaged) / "scalefactors_json.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changed))


def image(damaged):
    return damaged.data / "P01_1" / "P01_1_he.jpg"


# ---- images


def test_an_image_of_floating_point_numbers(damaged, refused):
    size = Image.open(image(damaged)).size
    image(damaged).unlink()
    Image.fromarray(np.full(size[::-1], 0.5, np.float32)).save(damaged.data / "P01_1" / "P01_1_he.tif")
    (damaged.data / "slices.csv").unlink(missing_ok=True)
    refused("image_tilling", ["--tile_px", 16], r"P01_1_he.tif: expected unsigned samples .*convert it to 8-bit RGB")


@pytest.mark.parametrize("size", [(1, 1), (7, 5)])
def test_a_image_too_small_for_its_spots(damaged, refused, size):
    Image.new("RGB", size).save(image(damaged))
    refused("image_tilling", ["--tile_px", 16], "P01_1_he.jpg", "expected", "found")


def test_a_decompression_bomb(damaged, refused, monkeypatch):
    from utils.images import checks

    with monkeypatch.context() as patch:
        patch.setattr(checks, "BOMB_PX", 100_000)
        refused("image_tilling", ["--tile_px", 16], "P01_1_he.jpg: expected at most 100,000 pixels .* found", "--huge")
        assert damaged.exit_code("image_tilling", "--tile_px", 16, "--huge") == 0


def test_an_empty_file_and_a_text_in_place_of_a_image(damaged, refused):
    for content, found in ((b"", "an empty file"), (b"not an image", "text")):
        image(damaged).write_bytes(content)
        refused("image_tilling", ["--tile_px", 16], f"P01_1_he.jpg: expected an image .* found {found}")


# ---- positions and scale factors


@pytest.mark.parametrize("value", ["nan", "", "left", "inf", "1e400"])
def test_a_coordinate_that_is_no_number(damaged, refused, value):
    def edit(table):
        table.iloc[-1, 4] = value
        return table

    positions(damaged, edit)
    for script in ("image_tilling", "make_decoder_data"):
        refused(script, ["--tile_px", 16] if script == "image_tilling" else [], "tissue_positions", "expected", "found")


def test_a_barcode_that_stands_twice(damaged, refused):
    positions(damaged, lambda table: pd.concat([table, table.iloc[[-1]]]))
    refused("make_decoder_data", [], "tissue_positions.*: expected each barcode once, found .* again")


def test_barcodes_of_the_matrix_that_stand_twice(damaged, refused):
    rewrite_matrix(
        damaged.data / "P01_1", lambda counts, barcodes, names: (counts, [barcodes[1], *barcodes[1:]], names)
    )
    refused("make_decoder_data", [], "filtered_feature_bc_matrix.h5: expected each barcode once, found .* again")


def test_a_table_of_positions_that_is_cut_off(damaged, refused):
    (path,) = spatial(damaged).glob("tissue_positions*.csv")
    for content in (b"", path.read_bytes()[:300], b"a,b\n1,2\n"):
        path.write_bytes(content)
        refused("make_decoder_data", [], "P01_1", "expected", "found")


def test_spots_far_outside_the_image(damaged, refused):
    def edit(table):
        inside = table[1] == "1"
        table.loc[inside, [4, 5]] = (table.loc[inside, [4, 5]].astype(float) + 1e6).astype(int).astype(str)
        return table

    positions(damaged, edit)
    refused("image_tilling", ["--tile_px", 16], "P01_1", "expected", "found")


@pytest.mark.parametrize("value", [0, -0.1, "a tenth", None, float("nan")])  # without small images it may be missing
def test_a_scale_factor_of_no_use(damaged, refused, value):
    factors(damaged, tissue_hires_scalef=value)
    refused("image_tilling", ["--tile_px", 16], "scalefactors_json.json: expected .*tissue_hires_scalef", "found")


@pytest.mark.parametrize("content", ["", "{", "[1, 2]", "null"])
def test_scale_factors_that_are_no_table(damaged, refused, content):
    (spatial(damaged) / "scalefactors_json.json").write_text(content)
    refused("image_tilling", ["--tile_px", 16], "scalefactors_json.json: expected", "found")


# ---- tables and checkpoints


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("P01_1,A,train\nP01_1,A,test\n", "P01_1"),
        ("/etc,A,train\n", "expected a path inside"),
        ("P01_1,A,Train \n", "expected train, val, test"),
    ],
)
def test_a_table_with_a_bad_line(damaged, refused, text, words):
    refused("image_tilling", split_flag(damaged, text), "slices.csv", words)


def test_a_table_in_another_encoding(damaged, refused):
    flag, path = split_flag(damaged, "")
    path.write_bytes("slice,patient,part\nP01_1,Jürgen,train\n".encode("latin-1"))
    refused("image_tilling", [flag, path], "slices.csv: expected .*UTF-8", "found")


def test_an_image_outside_its_slice(damaged, refused):
    flag, path = split_flag(damaged, "")
    path.write_text("slice,patient,part,spot_pitch_um,image\nP01_1,A,train,100,../P02_1/P02_1_he.jpg\n")
    refused("image_tilling", [flag, path], "slices.csv.*expected a path inside")


class Code:
    def __reduce__(self):
        return print, ("ran",)


@pytest.mark.parametrize("script", ["get_accuracy_image", "decoder_similarity", "train_decoder"])
def test_code_in_a_checkpoint_is_refused_and_never_run(damaged, refused, capsys, script):
    stage, flag = ("decoder", "--decoder") if script == "decoder_similarity" else ("encoder", "--encoder")
    path = getattr(damaged, stage)
    torch.save({"format": 3, "kind": f"stage_{'two' if stage == 'decoder' else 'one'}", "model": Code()}, path)
    refused(script, [], f"{flag}: .*best_epoch_weights.pth")
    path.write_bytes(pickle.dumps(Code()))
    refused(script, [], f"{flag}: .*best_epoch_weights.pth")
    assert "ran" not in capsys.readouterr().out


# ---- flags


@pytest.mark.parametrize(
    ("script", "flags"),
    [
        *(
            (script, flags)
            for script in TRAINING
            for flags in (
                ["--batch_size", 0],
                ["--batch_size", 1],
                ["--Init_lr", -1],
                ["--Init_lr", "nan"],
                ["--Min_lr", 1],
                ["--momentum", 2],
                ["--Init_Epoch", 5, "--Epoch", 5],
                ["--max_minutes", 0],
                ["--seed", -1],
                ["--memory", 0],
                ["--no_such_flag"],
            )
        ),
        ("train_mymodel", ["--alpha", 1.5]),
        ("train_mymodel", ["--crop_scales", 0]),
        ("train_mymodel", ["--tune", "some"]),
        ("train_mymodel", ["--accumulate", 0]),
        ("train_decoder", ["--tta", 3]),
        ("image_tilling", ["--tile_px", 0]),
        ("image_tilling", ["--tile_um", -5]),
        ("make_decoder_data", ["--n_top_genes", 0]),
        ("get_accuracy_image", ["--neighbours", 0]),
        ("get_accuracy_image", ["--part", "all of them"]),
    ],
)
def test_a_flag_out_of_range(trained, tmp_path, capsys, script, flags):
    """One line, before anything is read or written."""
    import importlib

    from utils import settings

    work = Work(trained.data, trained.tiles, trained.panels, tmp_path)
    before = snapshot(trained.out)
    module = importlib.import_module(script)
    with pytest.raises(SystemExit) as stop:
        settings.run(module.main, module.parse_args(work.argv(script, *flags)))
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count("\n") == 1 and "Traceback" not in error
    assert str(flags[0]) in error or str(flags[-2]) in error
    assert snapshot(trained.out) == before and not list(tmp_path.iterdir())


# ---- oddities that go through


@pytest.mark.parametrize("mode", ["L", "RGBA"])
def test_grey_and_transparent_images_are_cut(damaged, mode):
    Image.open(image(damaged)).convert(mode).save(damaged.data / "P01_1" / "P01_1_he.png")
    image(damaged).unlink()
    flag, path = split_flag(damaged, "")
    path.write_text("slice,patient,part,spot_pitch_um,image\nP01_1,A,train,100,P01_1_he.png\n")
    damaged.run("image_tilling", flag, path, "--tiles", damaged.out / "fresh", "--jpeg")
    assert len(list((damaged.out / "fresh" / "P01_1").glob("*.jpeg"))) == 70


def test_a_image_turned_by_exif_is_taken_as_its_pixels_lie(damaged):
    whole = Image.open(image(damaged)).convert("RGB")
    damaged.run("image_tilling", "--tiles", damaged.out / "plain", "--jpeg")
    exif = whole.getexif()
    exif[0x0112] = 6  # turn by a quarter to be shown
    whole.save(image(damaged), quality=95, exif=exif)
    damaged.run("image_tilling", "--tiles", damaged.out / "turned", "--jpeg")
    first = sorted((damaged.out / "plain" / "P01_1").glob("*.jpeg"))[0].name
    plain, turned = (np.asarray(Image.open(damaged.out / d / "P01_1" / first), float) for d in ("plain", "turned"))
    assert np.abs(plain - turned).mean() < 6


def test_windows_line_ends_and_a_byte_order_mark(damaged):
    flag, path = split_flag(damaged, "")
    text = "\ufeffslice,patient,part\r\nP01_1,A,train\r\nP02_1,B,val\r\nP03_1,C,test\r\n"
    path.write_bytes(text.encode())
    damaged.run("make_decoder_data", flag, path)


def test_names_with_spaces_and_other_letters(damaged):
    (damaged.data / "P01_1").rename(damaged.data / "Größe 1 (left)")
    flag, path = split_flag(damaged, "Größe 1 (left),Ä b,train\nP02_1,B,val\nP03_1,C,test\n")
    for script in ("image_tilling", "make_decoder_data", "train_mymodel"):
        damaged.run(script, flag, path, *(("--Epoch", 1) if script in TRAINING else ()))


def test_genes_that_stand_twice_are_summed(damaged):
    rewrite_matrix(damaged.data / "P01_1", lambda counts, barcodes, names: (counts, barcodes, [names[1], *names[1:]]))
    counts = visium.read_slice(damaged.data / "P01_1").counts.toarray()
    damaged.run("make_decoder_data")
    import anndata

    panel = anndata.read_h5ad(damaged.panels / "P01_1" / "filtered_feature_bc_matrix_one.h5ad")
    names = visium.read_matrix(damaged.data / "P01_1" / "filtered_feature_bc_matrix.h5").genes
    if names[1] in panel.var_names:
        np.testing.assert_array_equal(panel[:, names[1]].X.toarray()[:, 0], counts[:, :2].sum(1))


def test_debug_shows_the_traceback(damaged):
    import importlib

    module = importlib.import_module("image_tilling")
    from utils import settings

    args = module.parse_args(damaged.argv("image_tilling", "--data", damaged.out / "nowhere", "--debug"))
    with pytest.raises(ValueError, match="expected a folder of slices"):
        settings.run(module.main, args)
