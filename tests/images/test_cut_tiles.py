"""Tiles as a stream: their order, how far it cuts ahead, errors, and memory on a huge slide."""

import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import tifffile
from big_slide import write_big_slide
from slide_files import WRITERS

from utils.images import tiff, tiles
from utils.images.image import open_image
from utils.images.tiles import AT_A_TIME, Cut, cut_tiles

pytest.importorskip("openslide", reason="the extra `slides` is not installed")


@pytest.fixture(scope="module")
def pyramid(tmp_path_factory) -> Path:
    """Levels of 2,048, 512 and 128 pixels at 0.25 um per px."""
    path = tmp_path_factory.mktemp("pyramid") / "slide.tif"
    write_big_slide(path, side=2048, tile=256, shrink=(1, 4, 16))
    return path


def square(crop: float, size: int) -> Cut:
    return Cut("fullres", "slide.tif", 1.0, crop, size, resampled=True)


def test_tiles_come_in_order_and_are_the_regions(pyramid, rng):
    centres = rng.uniform(-100, 2148, (23, 2))
    with open_image(pyramid) as slide:
        expected = np.stack([slide.region(x - 100, y - 100, 200, 50) for x, y in centres])
        for workers in (None, 0, 1, 3):
            batches = list(cut_tiles(slide, centres, square(200, 50), batch_size=5, workers=workers))
            assert [len(batch) for batch in batches] == [5, 5, 5, 5, 3]
            np.testing.assert_array_equal(np.concatenate(batches), expected)
        assert list(cut_tiles(slide, np.empty((0, 2)), square(200, 50), 5)) == []
        for bad in (centres[0], centres[:, :1], np.array([[np.nan, 1.0]])):
            with pytest.raises(ValueError, match=r"slide\.tif: expected finite centres \(S, 2\)"):
                cut_tiles(slide, bad, square(200, 50), 5)


class Counting:
    """An image that counts what was read of it and fails at one tile."""

    def __init__(self, fail_at: float = np.inf):
        self.n_read, self.fail_at, self.path, self.read_one = 0, fail_at, Path("counting"), threading.Condition()

    def region(self, x, y, side, out_px):
        with self.read_one:
            self.n_read += 1
            self.read_one.notify_all()
        if x + side / 2 == self.fail_at:
            raise ValueError("counting: corrupt")
        return np.full((out_px, out_px, 3), x + side / 2, np.uint8)


def numbered(n: int) -> np.ndarray:
    return np.column_stack([np.arange(n), np.zeros(n)])


def reader_threads() -> list:
    return [thread for thread in threading.enumerate() if thread.name.startswith("tiles")]


@pytest.mark.parametrize("batch_size", [1, 4, 50])
def test_reading_goes_ahead_but_not_far(batch_size):
    slide = Counting()
    stream = cut_tiles(slide, numbered(2000), square(2, 8), batch_size, workers=2)
    next(stream)
    most = batch_size * (2 + -(-2 * 2 * AT_A_TIME // batch_size))  # the consumer's, and what is under way
    with slide.read_one:
        assert slide.read_one.wait_for(lambda: slide.n_read >= most, timeout=300)
    stream.close()  # waits for the threads
    assert slide.n_read == most and not reader_threads()


@pytest.mark.parametrize(
    ("asked", "processors", "threads"), [(None, 64, 4), (None, 3, 3), (None, None, 1), (6, 64, 6), (0, 64, 1)]
)
def test_threads_are_those_asked_for_or_four_at_most(monkeypatch, asked, processors, threads):
    monkeypatch.setattr("os.cpu_count", lambda: processors)
    monkeypatch.setattr(tiles, "_stream", lambda image, centres, cut, batch_size, workers: workers)
    assert cut_tiles(Counting(), numbered(3), square(2, 8), 2, asked) == threads


def test_a_readers_error_reaches_the_consumer_where_it_is_due():
    stream = cut_tiles(Counting(fail_at=9), numbered(40), square(2, 8), batch_size=4, workers=3)
    assert [int(next(stream)[-1, 0, 0, 0]) for _ in range(2)] == [3, 7]
    with pytest.raises(ValueError, match="counting: corrupt"):
        next(stream)
    assert not reader_threads()


@pytest.mark.parametrize("name", ["tiled.tif", "ome.tif"])
def test_damage_in_the_middle_is_an_error_where_it_is_read(name, tmp_path):
    path = tmp_path / f"slide.{name}"
    WRITERS[name](path, np.random.default_rng(0).integers(0, 256, (640, 640, 3), np.uint8))
    with tifffile.TiffFile(path) as file:
        offset = file.pages[0].dataoffsets[30]
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(b"\xff" * 2000)
    with open_image(path) as slide:
        y, x = np.mgrid[32:640:64, 32:640:64]
        stream = cut_tiles(slide, np.column_stack([x.ravel(), y.ravel()]), square(32, 32), batch_size=10, workers=1)
        next(stream)
        with pytest.raises(ValueError, match=r"expected an image, found one that cannot be read .*; copy it anew"):
            list(stream)


def test_segments_are_decoded_once_and_kept_within_bounds():
    cache, made, all_asked = tiff.SegmentCache(1000), [], threading.Event()

    def decode():
        assert all_asked.wait(60)
        made.append(1)
        return np.zeros(400, np.uint8)

    threads = [threading.Thread(target=cache.get, args=("a", decode)) for _ in range(8)]
    [thread.start() for thread in threads]
    all_asked.set()
    [thread.join() for thread in threads]
    assert len(made) == 1
    cache.get("b", decode), cache.get("a", decode), cache.get("c", decode)
    assert list(cache._kept) == ["a", "c"]  # b was not used for longest
    cache.get("large", lambda: np.zeros(5000, np.uint8))
    assert list(cache._kept) == ["large"]
    for _ in range(2):
        with pytest.raises(ZeroDivisionError):
            cache.get("bad", lambda: 1 / 0)


MEMORY = """
import resource, sys
from pathlib import Path
import numpy as np, openslide, tifffile
from utils.images.image import open_image
from utils.images.tiles import Cut, cut_tiles
from utils.images.tissue import grid
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
before = peak()
with open_image(Path(sys.argv[1])) as slide:
    thumbnail, scale = slide.thumbnail()
    centres = grid(slide.width, slide.height, 400.0)[0]
    some = centres[len(centres) // 2 :][:200]
    cut = Cut("fullres", "big.tif", 0.5, 448, 224, resampled=True)
    n = sum(len(batch) for batch in cut_tiles(slide, some, cut, batch_size=64, workers=2))
print(slide.width, thumbnail.shape[0], n, peak() - before)
"""


def test_memory_is_flat_on_a_slide_of_40_000_pixels(tmp_path):
    """4.8 GB of pixels: the process that reads the thumbnail and hundreds of tiles grows by a tenth at most."""
    path = tmp_path / "big.tif"
    write_big_slide(path)
    assert path.stat().st_size < 10 * 2**20
    code = [sys.executable, "-c", MEMORY, str(path)]
    done = subprocess.run(code, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2])
    width, thumbnail, n, grown_mib = map(float, done.stdout.split())
    assert (width, thumbnail, n) == (40_000, 2000, 200)
    assert grown_mib < 500
