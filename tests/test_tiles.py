"""Tiles: the published crop, the physical square, which spots have one, what is cut anew and what is kept."""

import io
import shutil

import numpy as np
import pytest
from PIL import Image
from spaceranger_folders import refused, write_spatial
from tile_slices import HIRES, INSIDE, PITCH_PX, SCALES, cut, grid_lines, pixels, record, times, write_slice
from tiny_runs import write_matrix

import image_tilling
from utils.files.atomic import write_record
from utils.images import tiles


@pytest.fixture
def data(tmp_path):
    return write_slice(tmp_path / "data")


# ---- the published crop


def test_crop_of_whole_pixels_is_the_published_rule(data):
    """Edges rounded as PIL rounds them (halves to even), Pillow's default JPEG."""
    lines = [f"S{i}-1,1,{i},{i},{200 + i * 0.4},{220 + i * 0.6}" for i in range(11)]  # hires centres 0.2, 0.3 px apart
    write_spatial(data / "slice", lines, scales=SCALES)
    noise = np.random.default_rng(0).integers(0, 255, (150, 200, 3), dtype=np.uint8)
    hires = Image.fromarray(noise)
    hires.save(data / "slice" / "spatial" / "tissue_hires_image.png")
    folder = cut(data, "--source", "hires", "--crop_size", 40)
    for i in range(11):
        c, r = (220 + i * 0.6) * HIRES, (200 + i * 0.4) * HIRES
        expected = io.BytesIO()
        hires.crop((c - 20, r - 20, c + 20, r + 20)).save(expected, "JPEG")
        assert (folder / f"S{i}-1.jpeg").read_bytes() == expected.getvalue()
    assert record(folder)["crop"] == record(folder)["size"] == 40


@pytest.mark.realdata
def test_golden_tiles_of_a_real_section(real_data, tmp_path):
    golden = real_data / "visium_1142243F"
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "slice").symlink_to(golden)
    folder = cut(tmp_path / "data", "--source", "hires", "--crop_size", 40)
    expected = sorted((golden / "tiles").iterdir())
    assert len(expected) == 300 and len(list(folder.glob("*.jpeg"))) == 4784  # every in-tissue position: no counts
    different = [path.name for path in expected if (pixels(path) != pixels(folder / path.name)).any()]
    assert different == []


# ---- the physical square


@pytest.mark.parametrize("source", ["fullres", "hires"])
def test_tile_is_the_stated_square_of_tissue_the_right_way_up(data, source):
    folder = cut(data, "--source", source, "--tile_um", 112)
    crop_px, um_per_px = 56.0, 4.0  # of the full-resolution picture; 112 um over 28 px
    assert record(folder)["um_per_px"] == pytest.approx(um_per_px)
    assert record(folder)["crop"] == pytest.approx(crop_px * (HIRES if source == "hires" else 1))
    for row, col in INSIDE:
        tile = pixels(folder / f"S{row}x{col}-1.jpeg")
        x, y = 60 + col * PITCH_PX / 2, 60 + row * PITCH_PX * np.sqrt(3) / 2
        for profile, centre_px in ((tile[..., 0].mean(0), x), (tile[..., 1].mean(1), y)):
            slope, level = np.polyfit(np.arange(28) - 13.5, profile, 1)
            assert slope == pytest.approx(0.5 * crop_px / 28, rel=0.03)
            assert level == pytest.approx(0.5 * centre_px - 0.25, abs=0.6), "within about one pixel"


def test_tile_equals_a_resampled_crop_of_the_whole_picture(data, rng):
    """The region is cut out with a margin: the edge pixels are those of the whole picture resampled."""
    picture = Image.fromarray(rng.integers(0, 255, (300, 400, 3), dtype=np.uint8))
    how = tiles.Cut("fullres", "he.png", 4.0, 57.3, 28, True)
    found = tiles.cut_tile(picture, np.array([150.4, 120.7]), how)
    box = (150.4 - 57.3 / 2, 120.7 - 57.3 / 2, 150.4 + 57.3 / 2, 120.7 + 57.3 / 2)
    expected = picture.resize((28, 28), Image.Resampling.BICUBIC, box=box)
    assert np.abs(np.asarray(found).astype(int) - np.asarray(expected)).max() <= 1


def test_a_tile_of_its_own_scale_is_stored_nearly_without_loss(data, rng):
    Image.fromarray(rng.integers(0, 255, (300, 400, 3), dtype=np.uint8)).save(data / "slice" / "he.png")
    folder = cut(data)
    table = Image.open(folder / "S0x0-1.jpeg").quantization
    buffer = io.BytesIO()
    Image.new("RGB", (28, 28)).save(buffer, "JPEG", quality=95)
    assert table == Image.open(buffer).quantization


def test_beyond_the_edge_the_tile_is_white(data):
    write_spatial(data / "slice", [*grid_lines(INSIDE), "EDGE-1,1,6,20,290,395"], scales=SCALES)
    tile = pixels(cut(data) / "EDGE-1.jpeg")  # 5 px from the right edge, 10 px from the lower one; 2 px per tile pixel
    assert (tile[:, 18:] > 230).all() and (tile[21:] > 230).all()
    assert (tile[:17, :14, 2] < 110).all()


def test_spots_outside_the_picture_are_counted_and_have_no_tile(data, capsys):
    write_spatial(data / "slice", [*grid_lines(INSIDE), "OUT-1,1,6,20,290,405", "UP-1,1,0,20,-1,100"], scales=SCALES)
    folder = cut(data)
    assert "6 tiles of 28 px from he.png, 2 outside the picture" in capsys.readouterr().out
    assert record(folder)["outside"] == ["OUT-1", "UP-1"] and record(folder)["number"] == 6
    assert len(list(folder.glob("*.jpeg"))) == len(tiles.TilePack(folder).barcodes) == 6


def test_positions_that_all_miss_the_picture_are_refused(data):
    lines = [line.replace("S", "T") for line in grid_lines([(20, 20), (21, 21), (22, 20)])]
    write_spatial(data / "slice", lines, scales=SCALES)
    refused("he.png: expected .* spots on it, found none on its 400 x 300 px", cut, data)
    assert not (data.parent / "tiles").exists()


def test_hires_alone_is_used_with_a_warning_that_states_its_scale(data, capsys):
    assert record(cut(data))["source"] == "fullres" and "warning" not in capsys.readouterr().out
    (data / "slice" / "he.png").unlink()
    assert record(cut(data))["source"] == "hires"
    assert "slice: warning: tiles of 112 um come from the hires image at 4.00 um per px" in capsys.readouterr().out
    refused("expected a full-resolution picture, found none", cut, data, "--source", "fullres")


def test_a_square_array_needs_its_pitch_unless_pixels_are_given(data):
    lines = [f"S{i}-1,1,{i // 3},{i % 3},{60 + 50 * (i // 3)},{60 + 50 * (i % 3)}" for i in range(9)]
    write_spatial(data / "slice", lines, scales=SCALES)
    refused("--spot_pitch_um", cut, data)
    assert record(cut(data, "--crop_size", 20))["um_per_px"] is None
    assert record(cut(data, "--spot_pitch_um", 200, "--tile_um", 112))["crop"] == pytest.approx(28)


# ---- which spots


def test_counts_say_which_spots_and_in_which_order(data, capsys):
    kept = ["S1x1-1", "S0x0-1", "ELSE-1"]
    write_matrix(data / "slice" / "filtered_feature_bc_matrix.h5", np.eye(3, dtype=int), kept, list("abc"))
    folder = cut(data)
    assert tiles.TilePack(folder).barcodes.tolist() == kept[:2]
    line = "2 tiles of 28 px from he.png, 1 counts without position, 4 tissue positions without counts"
    assert line in capsys.readouterr().out


def test_without_counts_every_position_in_tissue_has_a_tile(data):
    assert tiles.TilePack(cut(data)).barcodes.tolist() == [f"S{r}x{c}-1" for r, c in INSIDE]


@pytest.mark.parametrize("barcode", ["a/b-1", "../up", ".hidden", "a\\b"])
def test_barcodes_that_are_no_file_names_are_refused(data, barcode):
    write_spatial(data / "slice", [*grid_lines(INSIDE[:3]), f"{barcode},1,3,5,200,200"], scales=SCALES)
    refused("cannot be a file name", cut, data)
    assert not (data.parent / "tiles").exists(), "nothing half written"


# ---- a second run


def test_a_second_run_does_nothing(data, capsys):
    before = times(cut(data))
    assert times(cut(data)) == before
    assert "slice: 6 tiles are there" in capsys.readouterr().out


def test_only_what_is_missing_is_cut(data):
    folder = cut(data)
    before, packed = times(folder), tiles.TilePack(folder).read(np.arange(6))
    (folder / "S1x3-1.jpeg").unlink()
    after = times(cut(data))
    changed = {name for name in after if after[name] != before[name]}
    assert changed == {"S1x3-1.jpeg", "tiles.h5", "tiles.json"}
    np.testing.assert_array_equal(tiles.TilePack(folder).read(np.arange(6)), packed)


def test_a_lost_pack_is_packed_again_from_the_tiles(data):
    folder = cut(data)
    before, packed = times(folder), tiles.TilePack(folder).read(np.arange(6))
    (folder / "tiles.h5").unlink()
    after = times(cut(data))
    assert all(after[name] == before[name] for name in after if name.endswith(".jpeg"))
    np.testing.assert_array_equal(tiles.TilePack(folder).read(np.arange(6)), packed)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--tile_px", 14], "um_per_px 4.0 -> 8.0, size 28 -> 14"),
        (["--tile_um", 56], "um_per_px 4.0 -> 2.0, crop 56"),
        (["--source", "hires"], "source fullres -> hires, image he.png -> tissue_hires_image.png"),
        (["--crop_size", 28], "resampled True -> False"),
    ],
)
def test_changed_settings_are_said_and_all_is_cut_anew(data, capsys, flags, words):
    before = times(cut(data))
    folder = cut(data, *flags)
    said = capsys.readouterr().out
    assert "slice: settings changed (" in said and words in said
    after = times(folder)
    assert set(after) == set(before) and not [name for name in after if after[name] == before[name]]
    size = record(folder)["size"]
    assert tiles.TilePack(folder).size == size and pixels(folder / "S1x1-1.jpeg").shape == (size, size, 3)


def stop_after_blocks(data, monkeypatch, n):
    def stop_half_way(folder, barcodes, xy, blocks, size):
        for _ in range(n):
            next(blocks)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(tiles, "write_pack", stop_half_way)
        with pytest.raises(KeyboardInterrupt):
            cut(data)


@pytest.mark.parametrize("left", [0, 1, 0.5, -1])
def test_a_torn_tile_of_a_killed_run_is_cut_again_and_the_others_are_kept(data, monkeypatch, left):
    """Tiles are written in place: what a kill can leave is a file without its end, empty at the least."""
    whole = {path.name: path.read_bytes() for path in cut(data).glob("*.jpeg")}
    folder = data.parent / "tiles" / "slice"
    shutil.rmtree(folder)
    stop_after_blocks(data, monkeypatch, 1)
    torn = folder / "S1x3-1.jpeg"
    torn.write_bytes(torn.read_bytes()[: int(left * len(whole[torn.name])) if isinstance(left, float) else left])
    before = times(folder)
    after = times(cut(data))
    assert {name for name in whole if after[name] != before[name]} == {torn.name}
    assert {path.name: path.read_bytes() for path in folder.glob("*.jpeg")} == whole
    packed = tiles.TilePack(folder)
    for barcode, tile in zip(packed.barcodes, packed.read(np.arange(6)), strict=True):
        np.testing.assert_array_equal(tile, pixels(folder / f"{barcode}.jpeg"))


def test_an_interrupted_run_goes_on_where_it_stopped(data, monkeypatch):
    folder = data.parent / "tiles" / "slice"
    monkeypatch.setattr(image_tilling, "CHUNK", 1)
    stop_after_blocks(data, monkeypatch, 3)
    assert (folder / "started.json").exists() and not (folder / "tiles.json").exists()
    refused("run image_tilling.py first", tiles.TilePack, folder)
    (folder / "S3x5-1.jpeg").unlink(missing_ok=True)
    before = times(folder)
    after = times(cut(data))
    assert set(after) == {f"S{r}x{c}-1.jpeg" for r, c in INSIDE} | {"tiles.h5", "tiles.json"}
    assert all(after[name] == before[name] for name in before if name.endswith(".jpeg"))


def test_an_interrupted_run_of_other_settings_is_not_mixed_in(data, capsys):
    folder = data.parent / "tiles" / "slice"
    folder.mkdir(parents=True)
    old = tiles.Cut("fullres", "he.png", 8.0, 56.0, 14, True)
    write_record(folder / "started.json", old.__dict__)
    Image.new("RGB", (14, 14)).save(folder / "S0x0-1.jpeg")
    cut(data)
    assert "settings changed" in capsys.readouterr().out
    assert tiles.TilePack(folder).size == 28


def test_several_processes_cut_the_same_tiles(data, monkeypatch):
    monkeypatch.setattr(image_tilling, "CHUNK", 2)
    one = tiles.TilePack(cut(data)).read(np.arange(6))
    cut(data, "--workers", 3, "--tiles", data.parent / "other")
    np.testing.assert_array_equal(tiles.TilePack(data.parent / "other" / "slice").read(np.arange(6)), one)
