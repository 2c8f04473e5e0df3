"""utils.images.image: regions and pyramids against a slow implementation, what is refused. See test_image_formats."""

import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import tifffile
from big_slide import paint_kinds, write_big_slide
from PIL import Image
from slide_files import WRITERS, draw, furthest, plain_region, write_ome

from utils.images import checks, tiff
from utils.images import image as images
from utils.images.image import SUFFIXES, image_size, open_image

pytest.importorskip("openslide", reason="the extra `slides` is not installed")
PLACES = [  # x, y, side, out_px: inside, enlarged, across each edge and corner, around the whole, beyond
    (30.25, 41.5, 96.0, 32),
    (100.0, 80.0, 20.5, 64),
    (-40.0, 100.3, 90.0, 30),
    (380.5, 260.25, 90.0, 45),
    (-30.0, -20.0, 64.0, 64),
    (-100.0, -150.0, 600.0, 50),
    (1000.0, 50.0, 64.0, 16),
    (50.0, -300.0, 64.0, 16),
]


@pytest.fixture(scope="module")
def pyramid(tmp_path_factory) -> Path:
    """Levels of 2,048, 512 and 128 pixels at 0.25 um per px."""
    path = tmp_path_factory.mktemp("pyramid") / "slide.tif"
    write_big_slide(path, side=2048, tile=256, shrink=(1, 4, 16))
    return path


@pytest.fixture
def corrupt(tmp_path):
    """`corrupt(name)`: a file of that format that lacks its second half."""

    def write(name: str) -> Path:
        path = tmp_path / f"corrupt.{name}"
        WRITERS[name](path, np.random.default_rng(0).integers(0, 256, (301, 417, 3), np.uint8))
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
        return path

    return write


@pytest.mark.parametrize("name", WRITERS)
def test_a_region_is_that_of_the_whole_image_resampled(name, tmp_path):
    path, image = tmp_path / f"slide.{name}", draw()
    WRITERS[name](path, image)
    if name == "jpg":
        image = np.asarray(Image.open(path))
    with open_image(path) as slide:
        reader = type(slide.levels[0]).__name__
        assert reader == ("PillowLevel" if name in ("png", "jpg") else "TiffLevel")
        assert (slide.width, slide.height, slide.path) == (417, 301, path)
        slide.levels = slide.levels[:1]
        for place in PLACES:
            assert furthest(slide.region(*place), plain_region(image, *place)) <= 2, place
        assert (slide.region(*PLACES[-1]) == 255).all()


def test_a_pyramid_gives_the_coarsest_level_that_is_fine_enough(pyramid):
    with Image.open(pyramid) as file:
        arrays = [np.asarray(file.convert("RGB")) for page in range(3) if not file.seek(page)]
    with open_image(pyramid) as slide:
        assert [level.width for level in slide.levels] == [2048, 512, 128]
        for scale, px in ((0.5, 1), (2, 1), (3.9, 1), (4, 4), (3.97, 4), (15, 4), (16, 16), (40, 16)):
            assert slide.width / slide.level_for(scale).width == px
        for x, y in ((700.0, 900.0), (-100.0, 1900.0)):
            for side, out_px in ((448.0, 224), (448.0, 100), (960.0, 60)):
                level = {2.0: 0, 4.48: 1, 16.0: 2}[side / out_px]
                px = 4**level
                found = slide.region(x, y, side, out_px)
                assert furthest(found, plain_region(arrays[level], x / px, y / px, side / px, out_px)) <= 2
                shifts = [(a, b) for a in (-0.5, 0, 0.5) for b in (-0.5, 0, 0.5)]  # of pixels of the region
                step = side / out_px
                finest = [plain_region(arrays[0], x + a * step, y + b * step, side, out_px) for a, b in shifts]
                apart = [np.abs(found.astype(int) - other).mean() for other in finest]
                assert shifts[int(np.argmin(apart))] == (0, 0)


@pytest.mark.parametrize("name", ["png", "tiled.tif", "ome.tif"])
def test_a_thumbnail_is_the_whole_slide_made_small(name, tmp_path, monkeypatch):
    monkeypatch.setattr(images, "BLOCK_PX", 100)
    path, image = tmp_path / f"slide.{name}", draw()
    WRITERS[name](path, image)
    with open_image(path) as slide:
        small, scale = slide.thumbnail(139)
        assert small.shape == (100, 139, 3) and scale == pytest.approx(1 / 3)
        expected = np.asarray(Image.fromarray(image).resize((139, 100), Image.Resampling.BICUBIC))
        assert np.abs(small.astype(int) - expected)[:-1].mean() < 3
        same, scale = slide.thumbnail(2000)
        assert scale == 1 and furthest(same, image) <= 1


def test_size_and_pixel_size_are_those_of_the_image_that_is_opened(tmp_path):
    for name, write in WRITERS.items():
        path = tmp_path / f"slide.{name}"
        write(path, draw())
        with open_image(path) as image:
            assert (image.width, image.height) == image_size(path) == (417, 301)
            assert images.stated_um_per_px(path) == image.metadata_um_per_px
    for path in (tmp_path / "none.tif", tmp_path):
        with pytest.raises(ValueError, match=r"expected an image, found (no such file|a folder)"):
            image_size(path)
        assert images.stated_um_per_px(path) is None


def test_pixel_size_is_the_files_unless_given(tmp_path, pyramid):
    write_ome(tmp_path / "nm.ome.tif", draw(), unit="nm", size=500.0)
    write_ome(tmp_path / "none.ome.tif", draw(), unit="pixel", size=1.0)
    Image.fromarray(draw()).save(tmp_path / "screen.tif", dpi=(72, 72))
    WRITERS["plain.tif"](tmp_path / "plain.tif", draw())
    Image.fromarray(draw()).save(tmp_path / "flat.png", dpi=(50800, 50800))
    said = {"nm.ome.tif": 0.5, "none.ome.tif": None, "screen.tif": None, "plain.tif": 0.25, "flat.png": 0.5}
    for path, um in [*((tmp_path / name, um) for name, um in said.items()), (pyramid, 0.25)]:
        with open_image(path) as slide, open_image(path, um_per_px=0.4) as given:
            assert slide.um_per_px == slide.metadata_um_per_px == given.metadata_um_per_px
            assert slide.um_per_px == (None if um is None else pytest.approx(um)), path.name
            assert given.um_per_px == 0.4


@pytest.mark.parametrize("name", WRITERS)
def test_a_torn_file_is_refused_when_it_is_opened(name, corrupt):
    with pytest.raises(ValueError, match=r"corrupt\..*expected an image, found one that cannot be read"):
        open_image(corrupt(name))


def write_svs(path: Path) -> None:
    words = "Aperio Image Library v11.2.1\n417x301|AppMag = 20|MPP = 0.5"
    tifffile.imwrite(path, draw(), photometric="rgb", tile=(64, 64), description=words, metadata=None)


@pytest.mark.parametrize("name", ["a.svs", "a.tif"])
def test_a_scanners_file_is_not_read_otherwise_where_openslide_is_missing(tmp_path, monkeypatch, name):
    write_svs(tmp_path / name)
    WRITERS["strips.tif"](tmp_path / "b.svs", draw())
    (tmp_path / "c.mrxs").write_bytes(b"\xff\xd8\xff an index that looks like JPEG")
    monkeypatch.setitem(sys.modules, "openslide", None)
    for path in (tmp_path / name, tmp_path / "c.mrxs"):
        with pytest.raises(ValueError, match=r"found none; pip install openslide-python openslide-bin"):
            open_image(path)
    open_image(tmp_path / "b.svs").close()


def test_an_index_without_its_folder_is_not_taken_for_the_slide(tmp_path):
    Image.fromarray(draw()).save(tmp_path / "c.mrxs", "JPEG")
    with pytest.raises(ValueError, match=r"c\.mrxs: expected an image .* found an index without its folder c; put"):
        open_image(tmp_path / "c.mrxs")


def test_a_missing_codec_names_its_remedy(tmp_path, monkeypatch):
    WRITERS["strips.tif"](tmp_path / "b.tif", draw())

    def without(*_, **__):
        raise ValueError("<COMPRESSION.LZW: 5> requires the 'imagecodecs' package")

    with open_image(tmp_path / "b.tif") as image:
        monkeypatch.setattr(tiff.Segmented, "_decode", without)
        with pytest.raises(ValueError, match=r"b\.tif: expected a compression that the installed imagecodecs knows"):
            image.region(0, 0, 10, 10)


def test_all_suffixes_are_lower_case_and_none_is_listed_twice():
    assert len(set(SUFFIXES)) == len(SUFFIXES) and all(s.startswith(".") and s == s.lower() for s in SUFFIXES)
    assert {".tif", ".tiff", ".btf", ".tf8", ".jpg", ".jpeg", ".png", ".svs", ".ndpi", ".mrxs"} <= set(SUFFIXES)


def test_a_bomb_is_refused_before_it_is_decoded(tmp_path, monkeypatch):
    path = tmp_path / "bomb.png"
    Image.new("L", (8, 8)).save(path)
    data = bytearray(path.read_bytes())
    data[16:24] = (60_000).to_bytes(4, "big") * 2
    data[29:33] = zlib.crc32(data[12:29]).to_bytes(4, "big")
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"at most 536,870,912 pixels .* found 60,000 x 60,000; .* --huge \(13 GiB\)"):
        open_image(path)
    monkeypatch.setattr(checks, "BOMB_PX", 50_000)
    for name in WRITERS:
        path = tmp_path / f"large.{name}"
        WRITERS[name](path, draw())
        if name in ("png", "jpg"):
            with pytest.raises(ValueError, match="--huge"):
                open_image(path)
        open_image(path, huge=True).close()
    tifffile.imwrite(tmp_path / "one.tif", draw(), photometric="rgb", rowsperstrip=301, compression="zlib")
    with pytest.raises(ValueError, match=r"found 417 x 301; .*--huge"):
        open_image(tmp_path / "one.tif")


def test_the_big_slides_pixels_are_those_of_its_kinds(pyramid):
    kinds = paint_kinds(256, 0)
    with open_image(pyramid) as slide:
        corner, middle = slide.region(0, 0, 256, 256), slide.region(1024, 1024, 256, 256)
    assert np.abs(corner.astype(int) - kinds[0]).mean() < 3
    assert np.abs(middle.astype(int) - kinds[1]).mean() < 12  # grain is lost in JPEG


def test_the_head_of_a_png_is_read_without_its_pixels(tmp_path, monkeypatch):
    """Pillow decodes all of them to look for EXIF behind them; where it stands there, it is found."""
    from PIL.PngImagePlugin import PngImageFile

    exif, path = Image.Exif(), tmp_path / "a.png"
    exif[274] = 6
    Image.new("RGB", (8, 5)).save(path, exif=exif)
    data = path.read_bytes()
    start = data.index(b"eXIf") - 4
    stop = start + 12 + int.from_bytes(data[start : start + 4], "big")
    end = data.index(b"IEND") - 4
    path.write_bytes(data[:start] + data[stop:end] + data[start:stop] + data[end:])
    with open_image(path) as image:
        assert image.notes == ("Orientation 6 ignored: positions are in stored pixels",)
    Image.new("RGB", (8, 5)).save(path)
    monkeypatch.setattr(PngImageFile, "load", lambda *_: pytest.fail("decoded"))
    assert image_size(path) == (8, 5)
