"""Every format of docs/images.md: right pixels in tiles and in regions alike, or refused in one line by both."""

import re
from pathlib import Path

import numpy as np
import pytest
from image_files import CASES, HEIGHT, WIDTH, coded

from utils.images import tiles
from utils.images.image import SUFFIXES, image_size, open_image, stated_um_per_px

pytest.importorskip("openslide", reason="the extra `slides` is not installed")
ROOT = Path(__file__).parents[2]
SIDE = 32  # of tiles and regions, in whole pixels, so that nothing is resampled
CORNERS = [(x, y) for y in (-10, 40, HEIGHT - 20) for x in (-10, 30, 70, WIDTH - 20)]


def expected_square(pixels: np.ndarray, x: int, y: int) -> np.ndarray:
    ground = np.pad(pixels, ((SIDE, SIDE), (SIDE, SIDE), (0, 0)), constant_values=255)
    return ground[y + SIDE : y + 2 * SIDE, x + SIDE : x + 2 * SIDE]


def off(found: np.ndarray, expected: np.ndarray) -> int:
    assert found.shape == expected.shape and found.dtype == np.uint8
    return int(np.abs(found.astype(int) - expected).max())


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if not case.refused])
def test_pixels_are_right_in_tiles_regions_and_thumbnail(name, tmp_path):
    case, pixels = CASES[name], coded()
    path = tmp_path / case.file
    written = case.write(path, pixels)
    pixels = pixels if written is None else written
    squares = np.stack([expected_square(pixels, x, y) for x, y in CORNERS])
    assert image_size(path) == (WIDTH, HEIGHT)
    with open_image(path) as image:
        assert (image.width, image.height) == (WIDTH, HEIGHT)
        regions = np.stack([image.region(x, y, SIDE, SIDE) for x, y in CORNERS])
        assert off(regions, squares) <= case.within
        for resampled in (True, False):
            cut = tiles.Cut("fullres", case.file, 1.0, SIDE, SIDE, resampled)
            batches = tiles.cut_tiles(image, np.array(CORNERS) + SIDE / 2, cut, batch_size=5, workers=2)
            assert off(np.concatenate(list(batches)), squares) <= case.within
        thumbnail, scale = image.thumbnail()
        assert scale == 1 and off(thumbnail, pixels) <= case.within
        assert off(image.crop(0, 0, WIDTH, HEIGHT), pixels) <= case.within
        assert not case.notes or any(case.notes in note for note in image.notes), image.notes
        assert bool(image.notes) <= bool(case.notes), image.notes
        um_per_px = case.um_per_px and pytest.approx(case.um_per_px)
        assert image.um_per_px == image.metadata_um_per_px == stated_um_per_px(path) == um_per_px


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.refused])
def test_a_refusal_is_one_line_that_names_file_and_remedy(name, tmp_path):
    case = CASES[name]
    path = tmp_path / case.file
    case.write(path, coded())
    with pytest.raises(ValueError) as error:
        open_image(path)
    line = str(error.value)
    assert line.startswith(f"{path}: ") and case.refused in line and "\n" not in line
    assert re.search(r"; .*(convert|save|copy|name|export|fetch|download|correct|flatten)", line), line


READ = {case.row: name for name, case in reversed(CASES.items()) if not case.refused}  # the first case of each row


def opened_or_refused(path: Path) -> np.ndarray | None:
    """Pixels (h, w, 3); None where the file is refused, which is one line that names it."""
    try:
        image_size(path), stated_um_per_px(path)
        with open_image(path) as image:
            return image.thumbnail()[0]
    except ValueError as error:
        assert str(error).startswith(str(path)) and "\n" not in str(error)
        return None


@pytest.mark.parametrize("name", READ.values(), ids=READ)
def test_a_file_that_is_cut_short_is_never_read_in_part(name, tmp_path, rng):
    path = tmp_path / CASES[name].file
    CASES[name].write(path, coded())
    whole, data = opened_or_refused(path), path.read_bytes()
    for end in (0, 7, 100, *rng.integers(0, len(data), 8), len(data) - 1):
        path.write_bytes(data[:end])
        found = opened_or_refused(path)
        assert found is None or np.array_equal(found, whole), f"{end} of {len(data)} bytes"


@pytest.mark.parametrize("name", READ.values(), ids=READ)
def test_damaged_bytes_are_read_or_refused(name, tmp_path, rng):
    path = tmp_path / CASES[name].file
    CASES[name].write(path, coded())
    data = path.read_bytes()
    for limit in (100, 600, len(data)) * 3:
        damaged = bytearray(data)
        for place in rng.integers(0, min(limit, len(data)), 4):
            damaged[place] = rng.integers(256)
        path.write_bytes(bytes(damaged))
        opened_or_refused(path)


def rows_of_the_table() -> list[str]:
    text = (ROOT / "docs" / "images.md").read_text(encoding="utf-8")
    table = text[text.index("| format |") :].split("\n\n")[0]
    return [line.split("|")[1].strip() for line in table.splitlines()[2:]]


def test_every_row_of_the_documentation_has_a_case_and_every_case_a_row():
    rows = rows_of_the_table()
    assert len(rows) == len(set(rows)) and set(rows) == {case.row for case in CASES.values()}


def test_the_documentation_names_every_suffix():
    text = (ROOT / "docs" / "images.md").read_text(encoding="utf-8")
    assert " ".join(SUFFIXES) in " ".join(text.split())
