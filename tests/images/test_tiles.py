"""Tiles: the published crop, the physical square, which spots have one, what is cut anew and what is kept."""

import io
import os

import numpy as np
import pytest
from PIL import Image
from spaceranger_folders import refused, write_spatial
from tile_slices import (
    HIRES,
    INSIDE,
    PITCH_PX,
    SCALES,
    cut,
    grid_lines,
    pixels,
    put_image,
    record,
    speckled,
    times,
    write_slice,
)
from tiny_runs import write_matrix

from utils.images import tiles
from utils.images.image import open_image
from utils.slices import visium


@pytest.fixture
def data(tmp_path):
    return write_slice(tmp_path / "data")


def packed(folder, barcode):
    """The packed tile of a spot: (Z, Z, 3) float."""
    pack = tiles.TilePack(folder)
    return pack.read(np.flatnonzero(pack.barcodes == barcode))[0].astype(float)


# ---- the published crop


def test_crop_of_whole_pixels_is_the_published_rule(data):
    """Edges rounded as PIL rounds them (halves to even), Pillow's default JPEG."""
    lines = [f"S{i}-1,1,{i},{i},{200 + i * 0.4},{220 + i * 0.6}" for i in range(11)]  # hires centres 0.2, 0.3 px apart
    write_spatial(data / "slice", lines, scales=SCALES)
    noise = np.random.default_rng(0).integers((150, 60, 110), (240, 140, 200), (150, 200, 3), dtype=np.uint8)
    hires = Image.fromarray(noise)
    hires.save(data / "slice" / "spatial" / "tissue_hires_image.png")
    folder = cut(data, "--source", "hires", "--crop_size", 40)
    packed = tiles.TilePack(folder).read(np.arange(11))
    for i in range(11):
        c, r = (220 + i * 0.6) * HIRES, (200 + i * 0.4) * HIRES
        expected, tile = io.BytesIO(), hires.crop((c - 20, r - 20, c + 20, r + 20))
        tile.save(expected, "JPEG")
        assert (folder / f"S{i}-1.jpeg").read_bytes() == expected.getvalue()
        np.testing.assert_array_equal(packed[i], tile)
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
    crop_px, um_per_px = 56.0, 4.0  # of the full-resolution image; 112 um over 28 px
    assert record(folder)["um_per_px"] == pytest.approx(um_per_px)
    assert record(folder)["crop"] == pytest.approx(crop_px * (HIRES if source == "hires" else 1))
    for row, col in INSIDE:
        tile = packed(folder, f"S{row}x{col}-1")
        x, y = 60 + col * PITCH_PX / 2, 60 + row * PITCH_PX * np.sqrt(3) / 2
        for profile, centre_px in ((tile[..., 0].mean(0), x), (tile[..., 1].mean(1), y)):
            slope, level = np.polyfit(np.arange(28) - 13.5, profile, 1)
            assert slope == pytest.approx(0.5 * crop_px / 28, rel=0.03)
            assert level == pytest.approx(0.5 * centre_px - 0.25, abs=0.6), "within about one pixel"


def test_tile_equals_a_resampled_crop_of_the_whole_image(tmp_path, rng):
    """The region is cut out with a margin: the edge pixels are those of the whole image resampled."""
    image = Image.fromarray(rng.integers(0, 255, (300, 400, 3), dtype=np.uint8))
    image.save(tmp_path / "he.png")
    how = tiles.Cut("fullres", "he.png", 4.0, 57.3, 28, True)
    with open_image(tmp_path / "he.png") as opened:
        found = tiles.cut_tile(opened, np.array([150.4, 120.7]), how)
    box = (150.4 - 57.3 / 2, 120.7 - 57.3 / 2, 150.4 + 57.3 / 2, 120.7 + 57.3 / 2)
    expected = image.resize((28, 28), Image.Resampling.BICUBIC, box=box)
    assert np.abs(found.astype(int) - np.asarray(expected)).max() <= 1


@pytest.mark.parametrize("size", [1, 20, 21])
def test_a_crop_has_the_asked_size_wherever_its_centre_lies(tmp_path, rng, size):
    """Edges at .5 are rounded to even: of an odd size both would go to the same side or apart."""
    pixels = rng.integers(0, 255, (60, 60, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "hires.png")
    how = tiles.Cut("hires", "hires.png", None, float(size), size, False)
    with open_image(tmp_path / "hires.png") as image:
        for x in (30.0, 31.0, 30.5, 30.25):
            left = round(x - size / 2)
            expected = pixels[left : left + size, left : left + size]
            np.testing.assert_array_equal(tiles.cut_tile(image, np.array([x, x]), how), expected)


def test_a_tile_of_its_own_scale_is_stored_nearly_without_loss(data, rng):
    put_image(data, speckled(rng))
    folder = cut(data, "--jpeg")
    table = Image.open(folder / "S0x0-1.jpeg").quantization
    buffer = io.BytesIO()
    Image.new("RGB", (28, 28)).save(buffer, "JPEG", quality=95)
    assert table == Image.open(buffer).quantization


def test_beyond_the_edge_the_tile_is_white(data):
    write_spatial(data / "slice", [*grid_lines(INSIDE), "EDGE-1,1,6,20,290,395"], scales=SCALES)
    tile = packed(cut(data), "EDGE-1")  # 5 px from the right edge, 10 px from the lower one; 2 px per tile pixel
    assert (tile[:, 18:] > 230).all() and (tile[21:] > 230).all()
    assert (tile[:17, :14, 2] < 110).all()


def test_spots_outside_the_image_are_counted_and_have_no_tile(data, capsys):
    write_spatial(data / "slice", [*grid_lines(INSIDE), "OUT-1,1,6,20,290,405", "UP-1,1,0,20,-1,100"], scales=SCALES)
    folder = cut(data)
    assert "6 tiles of 28 px from he.png, 2 outside the image" in capsys.readouterr().out
    assert record(folder)["outside"] == ["OUT-1", "UP-1"] and record(folder)["number"] == 6
    assert len(tiles.TilePack(folder).barcodes) == 6


def test_positions_that_all_miss_the_image_are_refused(data):
    lines = [line.replace("S", "T") for line in grid_lines([(20, 20), (21, 21), (22, 20)])]
    write_spatial(data / "slice", lines, scales=SCALES)
    refused("he.png: expected 3 spots on its 400 x 300 px, found 3 outside", cut, data)
    assert not (data.parent / "tiles").exists()


def test_hires_alone_is_used_with_a_warning_that_states_its_scale(data, capsys):
    assert record(cut(data))["source"] == "fullres" and "warning" not in capsys.readouterr().out
    (data / "slice" / "he.png").unlink()
    assert record(cut(data))["source"] == "hires"
    assert "warning: slice: tiles of 112 um come from the hires image at 4.00 um per px" in capsys.readouterr().out
    refused("expected a full-resolution image, found none", cut, data, "--source", "fullres")


def test_a_square_array_needs_its_pitch_unless_pixels_are_given(data):
    lines = [f"S{i}-1,1,{i // 3},{i % 3},{60 + 50 * (i // 3)},{60 + 50 * (i % 3)}" for i in range(9)]
    write_spatial(data / "slice", lines, scales=SCALES)
    refused("--spot_pitch_um", cut, data)
    assert record(cut(data, "--crop_size", 20))["um_per_px"] is None
    assert record(cut(data, "--spot_pitch_um", 200, "--tile_um", 112))["crop"] == pytest.approx(28)


def test_the_flag_states_the_pitch_of_slices_whose_pitch_is_unknown_alone(data, capsys):
    crops = [record(cut(data, "--tile_um", 112))["crop"]]  # a Visium array
    crops.append(record(cut(data, "--tile_um", 112, "--spot_pitch_um", 200))["crop"])
    assert "slice: spots are 100 um apart by its array; --spot_pitch_um is not used" in capsys.readouterr().out
    lines = [f"S{i}-1,1,{i // 3},{i % 3},{60 + 50 * (i // 3)},{60 + 50 * (i % 3)}" for i in range(9)]
    write_spatial(data / "slice", lines, scales=SCALES)
    (data / "slices.csv").write_text("slice,spot_pitch_um\nslice,100\n")
    crops.append(record(cut(data, "--tile_um", 112, "--spot_pitch_um", 200))["crop"])
    assert "slice: spots are 100 um apart by slices.csv; --spot_pitch_um is not used" in capsys.readouterr().out
    assert crops == pytest.approx([1.12 * PITCH_PX, 1.12 * PITCH_PX, 1.12 * 50])


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
    refused("expected barcodes that can be file names, found", cut, data)
    assert not (data.parent / "tiles").exists(), "nothing half written"


# ---- a second run


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("flags", [(), ("--jpeg",), ("--crop_size", 20)])
def test_a_second_run_does_nothing(data, capsys, flags):
    before = times(cut(data, *flags))
    assert ("S1x1-1.jpeg" in before) == bool(flags)
    assert times(cut(data, *flags)) == before
    assert "slice: 6 tiles are there" in capsys.readouterr().out


def other_pixels(data):
    """The image mirrored in place, of the same size in bytes and the same time of change."""
    path = data / "slice" / "he.png"
    size, times_ns = path.stat().st_size, (path.stat().st_atime_ns, path.stat().st_mtime_ns)
    put_image(data, Image.fromarray(np.asarray(Image.open(path))[:, ::-1]))
    path.write_bytes(path.read_bytes().ljust(size, b"\0")[: max(size, path.stat().st_size)])
    os.utime(path, ns=times_ns)


def moved_spot(data):
    lines = grid_lines(INSIDE)
    write_spatial(data / "slice", [lines[0].replace("60.0,60.0", "61.0,60.0"), *lines[1:]], scales=SCALES)


def lost_spot(data):
    write_spatial(data / "slice", grid_lines(INSIDE[:5]), scales=SCALES)


def torn_pack(data):
    path = data.parent / "tiles" / "slice" / "tiles.h5"
    path.write_bytes(path.read_bytes()[:-3000])


def torn_record(data):
    (data.parent / "tiles" / "slice" / "tiles.json").write_text('{"source": "fu')


def lost(name):
    return lambda data: (data.parent / "tiles" / "slice" / name).unlink()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (other_pixels, "another content of the image"),
        (moved_spot, ""),
        (lost_spot, ""),
        (torn_pack, ""),
        (torn_record, ""),
        (lost("tiles.h5"), ""),
        (lost("tiles.json"), ""),
        (lost("S1x3-1.jpeg"), ""),
    ],
)
def test_whatever_the_tiles_depend_on_is_noticed_and_all_is_cut_anew(data, capsys, change, words):
    before = times(cut(data, "--jpeg"))
    change(data)
    capsys.readouterr()
    folder = cut(data, "--jpeg")
    said = capsys.readouterr().out
    assert "are there" not in said and words in said
    after = times(folder)
    assert not [name for name in after if after[name] == before.get(name)]
    fresh = cut(data, "--jpeg", "--tiles", data.parent / "fresh").parents[1] / "fresh" / "slice"
    assert contents(folder).keys() == contents(fresh).keys()
    ours, theirs = tiles.TilePack(folder), tiles.TilePack(fresh)
    np.testing.assert_array_equal(ours.read(np.arange(len(ours.barcodes))), theirs.read(np.arange(len(ours.barcodes))))
    assert ours.record == theirs.record and ours.content == theirs.content


def test_another_place_of_the_same_image_is_no_change(data, capsys):
    before = times(cut(data))
    path = data / "slice" / "he.png"
    path.write_bytes(path.read_bytes())
    os.utime(path, (1, 1))
    assert times(cut(data)) == before and "6 tiles are there" in capsys.readouterr().out


def test_the_content_of_a_pack_follows_its_record_and_its_spots(data):
    first = tiles.TilePack(cut(data)).content
    assert tiles.TilePack(cut(data)).content == first
    moved_spot(data)
    second = tiles.TilePack(cut(data)).content
    other_pixels(data)
    third = tiles.TilePack(cut(data)).content
    fourth = tiles.TilePack(cut(data, "--tile_um", 56)).content
    assert len({first, second, third, fourth}) == 4


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--tile_px", 14], "um_per_px 4.0 -> 8.0, size 28 -> 14"),
        (["--tile_um", 56], "um_per_px 4.0 -> 2.0, crop 56"),
        (["--source", "hires"], "source fullres -> hires, image he.png -> tissue_hires_image.png"),
        (["--crop_size", 28], "resampled True -> False"),
    ],
)
def test_changed_settings_are_reported_and_all_is_cut_anew(data, capsys, flags, words):
    before = times(cut(data, "--jpeg"))
    folder = cut(data, "--jpeg", *flags)
    said = capsys.readouterr().out
    assert "slice: settings changed (" in said and words in said
    after = times(folder)
    assert set(after) == set(before) and not [name for name in after if after[name] == before[name]]
    size = record(folder)["size"]
    assert tiles.TilePack(folder).size == size and pixels(folder / "S1x1-1.jpeg").shape == (size, size, 3)


def test_jpegs_of_other_tiles_do_not_stay(data):
    cut(data, "--jpeg")
    assert set(times(cut(data, "--tile_px", 14))) == {"tiles.h5", "tiles.json"}


def stop_at(data, monkeypatch, where, *flags):
    """A run that is interrupted when it calls `where` of the module tiles."""

    def stop(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(tiles, where, stop)
        with pytest.raises(KeyboardInterrupt):
            cut(data, *flags)


def test_an_interrupted_run_leaves_the_old_tiles_as_they_were(data, monkeypatch):
    before = contents(cut(data, "--jpeg"))
    for where in ("_write_pack", "cut_tile"):
        stop_at(data, monkeypatch, where, "--jpeg", "--tile_px", 14)
        assert contents(data.parent / "tiles" / "slice") == before


def test_a_run_interrupted_while_it_replaces_leaves_no_record(data, monkeypatch):
    folder = cut(data, "--jpeg")
    stop_at(data, monkeypatch, "write_record", "--jpeg", "--tile_px", 14)
    assert not (folder / "tiles.json").exists() and not list(folder.glob("*.part"))
    refused("run image_tilling.py, or give the folder of tiles with --tiles", tiles.TilePack, folder)
    cut(data)
    assert tiles.TilePack(folder).size == 28 and set(times(folder)) == {"tiles.h5", "tiles.json"}


def test_a_run_that_fails_leaves_nothing(data, monkeypatch):
    stop_at(data, monkeypatch, "_write_pack")
    assert not (data.parent / "tiles" / "slice").exists()


def test_several_threads_cut_the_same_tiles(data):
    one = tiles.TilePack(cut(data)).read(np.arange(6))
    cut(data, "--workers", 3, "--tiles", data.parent / "other")
    np.testing.assert_array_equal(tiles.TilePack(data.parent / "other" / "slice").read(np.arange(6)), one)


def test_a_slice_folder_is_read_once(data, monkeypatch):
    calls = []

    def counted(name, read):
        return lambda *args: calls.append(name) or read(*args)

    names = ["fit_lattice", "open_slice", "read_positions", "read_scalefactors", "slice_matrix"]
    for name in names:
        monkeypatch.setattr(visium, name, counted(name, getattr(visium, name)))
    cut(data)
    assert sorted(calls) == names
