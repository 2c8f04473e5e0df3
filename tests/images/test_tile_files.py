"""Images that tiles are cut from, good and bad, and the pack that training reads."""

import io
import multiprocessing
import pickle
from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace

import h5py
import numpy as np
import pytest
from PIL import Image
from spaceranger_folders import refused
from tile_slices import SIZE, cut, put_image, ramps, speckled, times, write_slice

from utils.files.atomic import write_record
from utils.images import tiles


@pytest.fixture
def data(tmp_path):
    return write_slice(tmp_path / "data")


# ---- images


@pytest.mark.parametrize("name", ["he.tif", "he.jpg", "he.TIFF", "he.btf", "he.webp"])
def test_kinds_of_files(data, name):
    expected = tiles.TilePack(cut(data)).read(np.arange(6)).astype(int)
    (data / "slice" / "he.png").unlink()
    kind = "TIFF" if name.endswith("btf") else None
    ramps(*SIZE).save(data / "slice" / name, kind, **({"lossless": True} if name.endswith("webp") else {}))
    folder = cut(data)
    assert tiles.read_record(folder)["image"] == name
    assert np.abs(tiles.TilePack(folder).read(np.arange(6)) - expected).max() < 4


def test_how_an_image_is_read_is_printed_once(data, capsys):
    import tifffile

    deep = np.asarray(ramps(*SIZE)).astype(np.uint16) << 4
    (data / "slice" / "he.png").unlink()
    tifffile.imwrite(data / "slice" / "he.tif", deep, photometric="rgb", extratags=[(274, 3, 1, 6, True)])
    cut(data)
    said = capsys.readouterr().out
    assert said.count("slice: he.tif: 16 bits per channel read as 12 (largest value 3,184)") == 1
    assert said.count("slice: he.tif: Orientation 6 ignored: positions are in stored pixels") == 1


@pytest.mark.parametrize("name", ["he.png", "he.jpg", "he.tif"])
@pytest.mark.parametrize("share", [0.0, 0.02, 0.3, 0.9])
def test_torn_images_are_refused_and_nothing_is_touched(data, rng, name, share):
    """Existing tiles of other settings stay: they are not removed for an image that cannot be read."""
    folder = cut(data)
    before = times(folder)
    (data / "slice" / "he.png").unlink()
    path = data / "slice" / name
    Image.fromarray(rng.integers(0, 255, (300, 400, 3), dtype=np.uint8)).save(path)
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])
    refused(f"{name}: expected an image.* found (one that cannot be read|an empty file)", cut, data, "--tile_px", 14)
    assert times(folder) == before


def test_a_file_that_is_no_image_is_refused(data):
    (data / "slice" / "he.png").write_text("hello " * 100)
    refused("he.png: expected an image .* found text", cut, data)
    assert not (data.parent / "tiles").exists()


@pytest.mark.parametrize(
    ("size", "fits"), [((400, 300), True), ((404, 303), True), ((300, 400), False), ((700, 525), False)]
)
def test_a_image_of_another_size_than_the_positions_is_refused(data, size, fits):
    ramps(*size).save(data / "slice" / "he.png")
    if fits:
        cut(data)
    else:
        refused(f"he.png: expected about 400 x 300 full-resolution px .* found {size[0]} x {size[1]}", cut, data)
        assert not (data.parent / "tiles").exists()


# ---- the pack


@pytest.fixture
def pack(tmp_path, rng):
    """Twelve packed tiles of 4 px, and their pixels."""
    pixels = rng.integers(0, 255, (12, 4, 4, 3), dtype=np.uint8)
    tiles.write_pack(tmp_path, np.array([f"b{i}" for i in range(12)]), rng.random((12, 2)), [pixels], 4)
    write_record(tmp_path / "tiles.json", {"outside": []})
    return SimpleNamespace(tiles=tiles.TilePack(tmp_path), pixels=pixels, folder=tmp_path)


def test_rows_are_read_in_any_order_and_repeated(pack):
    for rows in ([3], [5, 2, 9], [7, 7, 0, 7, 11, 0], list(range(11, -1, -1))):
        np.testing.assert_array_equal(pack.tiles.read(np.array(rows)), pack.pixels[rows])


def test_blocks_of_any_length_are_packed_alike(pack, tmp_path):
    names, xy = np.array([f"b{i}" for i in range(12)]), np.zeros((12, 2))
    for blocks in ([pack.pixels], [pack.pixels[:5], pack.pixels[5:11], pack.pixels[11:]], pack.pixels[:, None]):
        tiles.write_pack(tmp_path, names, xy, iter(blocks), 4)
        np.testing.assert_array_equal(tiles.TilePack(tmp_path).read(np.arange(12)), pack.pixels)


@pytest.mark.parametrize("how", [{"chunks": (2, 4, 4, 3)}, {"chunks": (1, 4, 4, 3), "compression": "gzip"}, {}])
def test_a_pack_that_another_program_rewrote_is_refused(pack, how):
    """Tiles are read as the bytes of their chunk: those of another layout would be noise."""
    with h5py.File(pack.folder / "tiles.h5", "a") as file:
        del file["img"]
        file.create_dataset("img", data=pack.pixels, **how)
    refused("tiles.h5: expected packed tiles, found chunks .* run image_tilling.py again", tiles.TilePack, pack.folder)


@pytest.mark.parametrize("row", [12, -1])
def test_a_row_beyond_the_pack_is_an_error(pack, row):
    with pytest.raises((OSError, ValueError, RuntimeError, OverflowError)):
        pack.tiles.read(np.array([0, row]))


def test_rows_agree_with_those_that_h5py_selects(pack):
    rows = np.array([11, 3, 3, 0, 7])
    with h5py.File(pack.folder / "tiles.h5") as file:
        expected = np.stack([file["img"][row] for row in rows])
    np.testing.assert_array_equal(pack.tiles.read(rows), expected)
    assert pack.tiles.read(rows[:0]).shape == (0, 4, 4, 3)


def test_a_pack_is_read_by_several_processes(pack):
    pack.tiles.read(np.array([0]))  # opened here before it is handed on
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        found = pool.map(pack.tiles.read, [np.array([i, 0]) for i in range(12)])
        assert all((rows == pack.pixels[[i, 0]]).all() for i, rows in enumerate(found))
    again = pickle.loads(pickle.dumps(pack.tiles))
    np.testing.assert_array_equal(again.read(np.array([8, 1])), pack.pixels[[8, 1]])


@pytest.mark.parametrize("lost", ["tiles.json", "tiles.h5"])
def test_a_pack_without_its_record_and_a_record_without_its_pack_are_refused(pack, lost):
    (pack.folder / lost).unlink()
    refused("expected tiles.json and tiles.h5, found none; run image_tilling", tiles.TilePack, pack.folder)


def test_the_order_of_a_record_does_not_change_what_a_pack_holds(pack):
    contents = set()
    for record in ({"um_per_px": 0.5, "outside": []}, {"outside": [], "um_per_px": 0.5}):
        write_record(pack.folder / "tiles.json", record)
        contents.add(tiles.TilePack(pack.folder).content)
    assert len(contents) == 1


def test_open_files_do_not_grow_with_the_packs(tmp_path, monkeypatch):
    def n_open():
        return sum(path.resolve().name == "tiles.h5" for path in Path("/proc/self/fd").iterdir())

    monkeypatch.setattr(tiles, "_open_pack", lru_cache(3)(tiles._open_pack.__wrapped__))
    packs = []
    for i in range(8):
        pixels = np.full((2, 4, 4, 3), i, np.uint8)
        (tmp_path / str(i)).mkdir()
        tiles.write_pack(tmp_path / str(i), np.array(["a", "b"]), np.zeros((2, 2)), [pixels], 4)
        write_record(tmp_path / str(i) / "tiles.json", {"outside": []})
        packs.append(tiles.TilePack(tmp_path / str(i)))
    before = n_open()
    for _ in range(2):
        assert [int(pack.read(np.array([1, 0])).mean()) for pack in packs] == list(range(8))
    assert n_open() - before == 3


def test_a_pack_that_is_replaced_while_it_is_read_is_noticed_and_the_open_one_stays(pack, tmp_path):
    """Another run of image_tilling.py puts new tiles in the same place: those of two runs are never mixed."""
    later = tiles.TilePack(tmp_path)
    np.testing.assert_array_equal(pack.tiles.read(np.array([3])), pack.pixels[[3]])
    tiles._open_pack.cache_clear()
    tiles.write_pack(tmp_path, np.array(["b"]), np.zeros((1, 2)), [pack.pixels[:1] + 1], 4)
    refused("tiles.h5: expected the tiles of the start of this run, found changed ones", later.read, np.array([3]))
    np.testing.assert_array_equal(tiles.TilePack(tmp_path).read(np.array([0])), pack.pixels[:1] + 1)


def test_a_torn_pack_is_refused(pack):
    path = pack.folder / "tiles.h5"
    path.write_bytes(path.read_bytes()[:100])
    refused("tiles.h5: expected packed tiles", tiles.TilePack, pack.folder)


def test_a_torn_record_is_refused(pack):
    (pack.folder / "tiles.json").write_text('{"source": "fu')
    refused("tiles.json: expected JSON", tiles.TilePack, pack.folder)


def test_a_pack_that_lacks_tiles_is_refused(pack):
    with h5py.File(pack.folder / "tiles.h5", "a") as file:
        del file["img"]
        file.create_dataset("img", (12, 4, 4, 3), "uint8", chunks=(1, 4, 4, 3))
        file["img"].id.write_direct_chunk((0, 0, 0, 0), pack.pixels[0].tobytes())
    refused("tiles.h5: expected packed tiles, found 1 tiles of 12 spots", tiles.TilePack, pack.folder)


def test_an_interrupted_pack_leaves_the_old_one(pack):
    before = (pack.folder / "tiles.h5").read_bytes()

    def corrupt():
        yield pack.pixels[:1]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tiles.write_pack(pack.folder, np.array(["a", "b"]), np.zeros((2, 2)), corrupt(), 4)
    assert (pack.folder / "tiles.h5").read_bytes() == before and not list(pack.folder.glob("*.part"))


@pytest.mark.parametrize("flags", [("--source", "hires", "--crop_size", 40), ("--tile_px", 28, "--jpeg")])
def test_the_jpegs_are_those_of_the_packed_pixels(data, rng, flags):
    """Each under its barcode, in whatever order they were cut."""
    put_image(data, speckled(rng))
    folder = cut(data, *flags, "--workers", 2)
    pack, quality = tiles.TilePack(folder), 75 if "--crop_size" in flags else 95
    assert len(list(folder.glob("*.jpeg"))) == 6
    for barcode, tile in zip(pack.barcodes, pack.read(np.arange(6)), strict=True):
        expected = io.BytesIO()
        Image.fromarray(tile).save(expected, "JPEG", quality=quality)
        assert (folder / f"{barcode}.jpeg").read_bytes() == expected.getvalue()


def test_tiles_are_cut_in_reading_order_and_packed_in_that_of_the_barcodes(rng):
    centres = rng.uniform(0, 1000, (50, 2))
    cut_of = tiles.Cut("fullres", "he.png", 1.0, 100.0, 50, True)
    order = tiles.reading_order(centres, cut_of)
    assert sorted(order) == list(range(50))
    band, x = centres[order, 1] // 100, centres[order, 0]
    assert (np.diff(band) >= 0).all() and (np.diff(x)[np.diff(band) == 0] >= 0).all()
