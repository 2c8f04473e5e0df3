"""Pictures that tiles are cut from, good and bad, the pack that training reads, and what is in memory meanwhile."""

import multiprocessing
import os
import pickle
from concurrent.futures import Future
from types import SimpleNamespace

import h5py
import numpy as np
import pytest
from PIL import Image
from spaceranger_folders import refused
from tile_slices import SIZE, cut, pixels, ramps, times, write_slice

import image_tilling
from utils.files.atomic import write_record
from utils.images import tiles


@pytest.fixture
def data(tmp_path):
    return write_slice(tmp_path / "data")


# ---- pictures


def replaced(data, mode, name="he.png"):
    (data / "slice" / "he.png").unlink()
    ramps(*SIZE).convert(mode).save(data / "slice" / name)
    return pixels(cut(data) / "S1x1-1.jpeg")


def test_grey_and_palette_pictures_become_rgb(data):
    grey = replaced(data, "L")
    assert grey.shape == (28, 28, 3) and np.ptp(grey, axis=2).max() <= 2


@pytest.mark.parametrize("name", ["he.tif", "he.jpg", "he.TIFF"])
def test_kinds_of_files(data, name):
    assert np.abs(replaced(data, "RGB", name) - pixels(cut(data) / "S1x1-1.jpeg")).max() < 8


def test_transparent_parts_are_glass(data):
    picture = ramps(*SIZE).convert("RGBA")
    picture.paste((0, 0, 0, 0), (0, 0, 85, 300))
    picture.save(data / "slice" / "he.png")
    tile = pixels(cut(data) / "S1x1-1.jpeg")  # its centre is at x 85
    assert (tile[:, :12] > 240).all() and (tile[:, 16:, 2] < 115).all()


@pytest.mark.parametrize("mode", ["I;16", "I", "F"])
def test_pictures_of_more_than_8_bits_are_refused(data, mode):
    grey = np.asarray(ramps(*SIZE).convert("L"))
    dtype = {"I;16": np.uint16, "I": np.int32, "F": np.float32}[mode]
    (data / "slice" / "he.png").unlink()
    Image.fromarray(grey.astype(dtype)).save(data / "slice" / "he.tif")
    refused(f"he.tif: expected 8 bits per channel, found mode {mode}", cut, data)


@pytest.mark.parametrize("name", ["he.png", "he.jpg", "he.tif"])
@pytest.mark.parametrize("share", [0.0, 0.02, 0.3, 0.9])
def test_torn_pictures_are_refused_and_nothing_is_touched(data, rng, name, share):
    """Existing tiles of other settings stay: they are not removed for a picture that cannot be read."""
    folder = cut(data)
    before = times(folder)
    (data / "slice" / "he.png").unlink()
    path = data / "slice" / name
    Image.fromarray(rng.integers(0, 255, (300, 400, 3), dtype=np.uint8)).save(path)
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])
    refused(f"{name}: expected a picture, found one that cannot be read", cut, data, "--tile_px", 14)
    assert times(folder) == before


def test_a_file_that_is_no_picture_is_refused(data):
    (data / "slice" / "he.png").write_text("hello " * 100)
    refused("he.png: expected a picture", cut, data)
    assert not (data.parent / "tiles").exists()


@pytest.mark.parametrize(
    ("size", "fits"), [((400, 300), True), ((404, 303), True), ((300, 400), False), ((800, 600), False)]
)
def test_a_picture_of_another_size_than_the_positions_is_refused(data, size, fits):
    ramps(*size).save(data / "slice" / "he.png")
    if fits:
        cut(data)
    else:
        refused(f"he.png: expected about 400 x 300 px .* found {size[0]} x {size[1]}", cut, data)
        assert not (data.parent / "tiles").exists()


def test_a_spoilt_tile_is_named(data):
    """It has its end, so that no stopped run has left it."""
    folder = cut(data)
    (folder / "S1x1-1.jpeg").write_bytes(b"\xff\xd8 spoilt \xff\xd9")
    (folder / "tiles.h5").unlink()
    refused("S1x1-1.jpeg: expected a tile of 28 x 28 px, found one that cannot be read", cut, data)
    assert not list(folder.glob("*.part"))


def test_a_tile_of_another_size_is_named(data):
    folder = cut(data)
    Image.new("RGB", (9, 10)).save(folder / "S1x1-1.jpeg")
    (folder / "tiles.h5").unlink()
    refused("S1x1-1.jpeg: expected a tile of 28 x 28 px, found 9 x 10; delete it", cut, data)
    assert not (folder / "tiles.h5").exists()


# ---- the pack


@pytest.fixture
def pack(tmp_path, rng):
    """Twelve packed tiles of 4 px, and their pixels."""
    pixels = rng.integers(0, 255, (12, 4, 4, 3), dtype=np.uint8)
    tiles.write_pack(tmp_path, np.array([f"b{i}" for i in range(12)]), rng.random((12, 2)), list(pixels), 4)
    write_record(tmp_path / "tiles.json", {"outside": []})
    return SimpleNamespace(tiles=tiles.TilePack(tmp_path), pixels=pixels, folder=tmp_path)


def test_rows_are_read_in_any_order_and_repeated(pack):
    for rows in ([3], [5, 2, 9], [7, 7, 0, 7, 11, 0], list(range(11, -1, -1))):
        np.testing.assert_array_equal(pack.tiles.read(np.array(rows)), pack.pixels[rows])


def test_blocks_of_tiles_are_packed_as_single_ones_are(pack, tmp_path):
    names, xy = np.array([f"b{i}" for i in range(12)]), np.zeros((12, 2))
    for blocks in ([pack.pixels], [pack.pixels[:5], pack.pixels[5:11], pack.pixels[11:]], pack.pixels):
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
    own_file = pack.tiles._file
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        found = pool.map(pack.tiles.read, [np.array([i, 0]) for i in range(12)])
        assert all((rows == pack.pixels[[i, 0]]).all() for i, rows in enumerate(found))
    np.testing.assert_array_equal(pack.tiles.read(np.array([4])), pack.pixels[[4]])
    assert pack.tiles._file is own_file
    pack.tiles._pid = os.getpid() + 1  # as a fork finds it
    np.testing.assert_array_equal(pack.tiles.read(np.array([4])), pack.pixels[[4]])
    assert pack.tiles._file is not own_file


def test_a_pack_is_pickled_without_its_handle(pack):
    pack.tiles.read(np.array([0]))
    again = pickle.loads(pickle.dumps(pack.tiles))
    assert again._file is None
    np.testing.assert_array_equal(again.read(np.array([8, 1])), pack.pixels[[8, 1]])


def test_a_torn_pack_is_refused(pack):
    path = pack.folder / "tiles.h5"
    path.write_bytes(path.read_bytes()[:100])
    refused("tiles.h5: expected packed tiles", tiles.TilePack, pack.folder)


def test_a_torn_record_is_refused(pack):
    (pack.folder / "tiles.json").write_text('{"source": "fu')
    refused("tiles.json: expected JSON", tiles.TilePack, pack.folder)


def test_an_interrupted_pack_leaves_the_old_one(pack):
    before = (pack.folder / "tiles.h5").read_bytes()

    def torn():
        yield pack.pixels[0]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tiles.write_pack(pack.folder, np.array(["a", "b"]), np.zeros((2, 2)), torn(), 4)
    assert (pack.folder / "tiles.h5").read_bytes() == before and not list(pack.folder.glob("*.part"))


@pytest.mark.parametrize("flags", [("--source", "hires", "--crop_size", 40), ("--tile_px", 28)])
@pytest.mark.parametrize("chunk", [1, 4, 64])
def test_the_pack_is_what_the_jpegs_decode_to(data, rng, monkeypatch, flags, chunk):
    """In the order of the barcodes, whether the tiles are new or kept, and however they are handed out."""
    monkeypatch.setattr(image_tilling, "CHUNK", chunk)
    Image.fromarray(rng.integers(0, 255, (300, 400, 3), dtype=np.uint8)).save(data / "slice" / "he.png")
    for _ in range(2):
        folder = cut(data, *flags, "--workers", 2)
        pack = tiles.TilePack(folder)
        expected = [np.asarray(Image.open(folder / f"{barcode}.jpeg")) for barcode in pack.barcodes]
        np.testing.assert_array_equal(pack.read(np.arange(6)), expected)
        (folder / "tiles.h5").unlink()
        (folder / "S2x4-1.jpeg").unlink()


# ---- memory


class CountingPool:
    """Runs nothing before it is asked for, and counts."""

    def __init__(self):
        self.submitted = 0

    def submit(self, work, task):
        self.submitted += 1
        done = Future()
        done.set_result(work(task))
        return done


def test_few_blocks_are_under_way_at_once_however_many_there_are():
    """A million tasks; the slow writer takes one result after the other."""
    pool, taken = CountingPool(), 0
    results = image_tilling.in_order(pool, lambda task: task**2, range(1_000_000), ahead=4)
    for taken in range(1, 50):
        assert next(results) == (taken - 1) ** 2
        assert pool.submitted <= taken + 4


@pytest.mark.parametrize("n", [0, 1, 3, 4, 9])
def test_every_result_comes_once_and_in_order(n):
    pool = CountingPool()
    assert list(image_tilling.in_order(pool, str, range(n), ahead=4)) == [str(i) for i in range(n)]
    assert pool.submitted == n


def test_a_chunk_that_fails_stops_the_run(data, monkeypatch):
    monkeypatch.setattr(image_tilling, "CHUNK", 1)
    Image.new("RGB", (9, 10)).save(cut(data) / "S2x4-1.jpeg")
    (data.parent / "tiles" / "slice" / "tiles.h5").unlink()
    refused("S2x4-1.jpeg: expected a tile of 28 x 28 px, found 9 x 10", cut, data, "--workers", 2)


def test_the_folder_is_listed_and_not_asked_for_every_tile(data, monkeypatch):
    folder = cut(data)
    asked, exists = [], type(folder).exists

    def counted(path):
        asked.append(path.name)
        return exists(path)

    monkeypatch.setattr(type(folder), "exists", counted)
    cut(data)
    assert not [name for name in asked if name.endswith(".jpeg")]
