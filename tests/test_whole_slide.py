"""utils.images.image and tiff_levels: every format against a slow twin, files that must be refused."""

import sys
import zlib
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tifffile
from big_slide import paint_kinds, write_big_slide
from PIL import Image
from slide_files import WRITERS, draw, furthest, twin, write_ome

from utils.images import image as whole_slide
from utils.images import tiles
from utils.images.image import open_slide

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
def torn(tmp_path):
    """`torn(name)`: a file of that format that lacks its second half."""

    def write(name: str) -> Path:
        path = tmp_path / f"torn.{name}"
        WRITERS[name](path, np.random.default_rng(0).integers(0, 256, (301, 417, 3), np.uint8))
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
        return path

    return write


@pytest.mark.parametrize("name", WRITERS)
def test_a_region_of_every_format_is_its_twins(name, tmp_path):
    path, picture = tmp_path / f"slide.{name}", draw()
    WRITERS[name](path, picture)
    if name == "jpg":
        picture = np.asarray(Image.open(path))
    with open_slide(path) as slide:
        reader = type(slide.levels[0]).__name__
        assert reader == {"png": "Image", "jpg": "Image", "tiled.tif": "OpenSlideLevel"}.get(name, "TiffLevel")
        assert (slide.width, slide.height, slide.path) == (417, 301, path)
        slide.levels = slide.levels[:1]
        for place in PLACES:
            assert furthest(slide.region(*place), twin(picture, *place)) <= 2, place
        assert (slide.region(*PLACES[-1]) == 255).all()


def test_a_pyramid_gives_the_coarsest_level_that_is_fine_enough(pyramid):
    with Image.open(pyramid) as file:
        arrays = [np.asarray(file.convert("RGB")) for page in range(3) if not file.seek(page)]
    with open_slide(pyramid) as slide:
        assert [level.width for level in slide.levels] == [2048, 512, 128]
        for scale, px in ((0.5, 1), (2, 1), (3.9, 1), (4, 4), (3.97, 4), (15, 4), (16, 16), (40, 16)):
            assert slide.width / slide.level_for(scale).width == px
        for x, y in ((700.0, 900.0), (-100.0, 1900.0)):
            for side, out_px in ((448.0, 224), (448.0, 100), (960.0, 60)):
                level = {2.0: 0, 4.48: 1, 16.0: 2}[side / out_px]
                px = 4**level
                found = slide.region(x, y, side, out_px)
                assert furthest(found, twin(arrays[level], x / px, y / px, side / px, out_px)) <= 2
                shifts = [(a, b) for a in (-0.5, 0, 0.5) for b in (-0.5, 0, 0.5)]  # of pixels of the region
                step = side / out_px
                finest = [twin(arrays[0], x + a * step, y + b * step, side, out_px) for a, b in shifts]
                apart = [np.abs(found.astype(int) - other).mean() for other in finest]
                assert shifts[int(np.argmin(apart))] == (0, 0)


def test_openslide_and_tifffile_agree(pyramid, monkeypatch):
    with monkeypatch.context() as without:
        without.setitem(sys.modules, "openslide", None)
        other = open_slide(pyramid)
    with open_slide(pyramid) as slide, other:
        assert type(other.levels[0]).__name__ == "TiffLevel"
        assert [level.width for level in other.levels] == [2048, 512, 128]
        assert other.um_per_px == pytest.approx(slide.um_per_px) == pytest.approx(0.25)
        for place in ((700.0, 900.5, 448.0, 224), (-100.0, 1900.0, 448.0, 100), (0.0, 0.0, 2048.0, 100)):
            assert furthest(slide.region(*place), other.region(*place)) <= 1


@pytest.mark.parametrize("name", ["png", "tiled.tif", "ome.tif"])
def test_a_thumbnail_is_the_whole_slide_made_small(name, tmp_path, monkeypatch):
    monkeypatch.setattr(whole_slide, "BLOCK_PX", 100)
    path, picture = tmp_path / f"slide.{name}", draw()
    WRITERS[name](path, picture)
    with open_slide(path) as slide:
        small, scale = slide.thumbnail(139)
        assert small.shape == (100, 139, 3) and scale == pytest.approx(1 / 3)
        expected = np.asarray(Image.fromarray(picture).resize((139, 100), Image.Resampling.BICUBIC))
        assert np.abs(small.astype(int) - expected)[:-1].mean() < 3
        same, scale = slide.thumbnail(2000)
        assert scale == 1 and furthest(same, picture) <= 1


def test_grey_and_transparent_pictures_become_rgb_on_white(tmp_path):
    picture = draw()
    grey, alpha = picture[..., 0], np.tile(np.linspace(0, 255, 417).astype(np.uint8), (301, 1))
    clear = np.dstack([picture, alpha])
    Image.fromarray(grey).save(tmp_path / "grey.png")
    Image.fromarray(clear).save(tmp_path / "clear.png")
    tifffile.imwrite(tmp_path / "grey.tif", grey, compression="zlib")
    tifffile.imwrite(tmp_path / "clear.tif", clear, photometric="rgb", extrasamples=["unassalpha"])
    premultiplied = np.dstack([np.round(picture * (alpha[..., None] / 255)).astype(np.uint8), alpha])
    tifffile.imwrite(tmp_path / "light.tif", premultiplied, photometric="rgb", extrasamples=["assocalpha"])
    tifffile.imwrite(tmp_path / "more.tif", clear, photometric="rgb", extrasamples=["unspecified"])
    on_white = np.round(picture * (alpha[..., None] / 255) + (255.0 - alpha[..., None])).astype(np.uint8)
    expected = {"grey": np.dstack([grey] * 3), "clear": on_white, "light": on_white, "more": picture}
    for path in sorted(tmp_path.iterdir()):
        with open_slide(path) as slide:
            assert furthest(slide.thumbnail()[0], expected[path.stem]) <= 1, path.name


def test_a_jpg_lies_as_it_is_stored(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter when shown
    Image.fromarray(draw()).save(tmp_path / "turned.jpg", exif=exif)
    with open_slide(tmp_path / "turned.jpg") as slide:
        assert (slide.width, slide.height) == (417, 301) == tiles.picture_size(slide.path)


def test_pixel_size_is_the_files_unless_given(tmp_path, pyramid):
    write_ome(tmp_path / "nm.ome.tif", draw(), unit="nm", size=500.0)
    write_ome(tmp_path / "none.ome.tif", draw(), unit="pixel", size=1.0)
    Image.fromarray(draw()).save(tmp_path / "screen.tif", dpi=(72, 72))
    WRITERS["plain.tif"](tmp_path / "plain.tif", draw())
    Image.fromarray(draw()).save(tmp_path / "flat.png", dpi=(50800, 50800))
    said = {"nm.ome.tif": 0.5, "none.ome.tif": None, "screen.tif": None, "plain.tif": 0.25, "flat.png": None}
    for path, um in [*((tmp_path / name, um) for name, um in said.items()), (pyramid, 0.25)]:
        with open_slide(path) as slide, open_slide(path, um_per_px=0.4) as given:
            assert slide.um_per_px == slide.metadata_um_per_px == given.metadata_um_per_px
            assert slide.um_per_px == (None if um is None else pytest.approx(um)), path.name
            assert given.um_per_px == 0.4


@pytest.mark.parametrize("name", WRITERS)
def test_a_torn_file_is_refused_when_it_is_opened(name, torn):
    with pytest.raises(ValueError, match=r"torn\..*expected a picture, found one that cannot be read"):
        open_slide(torn(name))


def write_odd(path: Path, what: str) -> None:
    picture = draw()
    deep = picture[..., 0].astype(np.uint16) * 200
    {
        "16 bit png": lambda: Image.fromarray(deep).save(path),
        "16 bit tiff": lambda: tifffile.imwrite(path, deep),
        "16 bit tiles": lambda: tifffile.imwrite(path, np.dstack([deep] * 3), photometric="rgb", tile=(64, 64)),
        "bilevel": lambda: tifffile.imwrite(path, picture[..., 0] > 128),
        "planar": lambda: tifffile.imwrite(
            path, picture.transpose(2, 0, 1), photometric="rgb", planarconfig="separate"
        ),
        "channels": lambda: tifffile.imwrite(path, picture.transpose(2, 0, 1), ome=True, metadata={"axes": "CYX"}),
        "palette": lambda: Image.fromarray(picture).quantize(16).save(path),
        "text": lambda: path.write_text("no picture\n" * 100),
        "folder": path.mkdir,
        "nothing": lambda: None,
    }[what]()


@pytest.mark.parametrize(
    ("name", "what", "expected"),
    [
        ("a.png", "16 bit png", "expected 8 bits per channel, found mode I;16; convert"),
        ("a.tif", "16 bit tiff", r"expected 8 bits per channel, found 16 bits \(uint16\); convert"),
        ("a.tif", "16 bit tiles", r"expected 8 bits per channel, found 16 bits \(uint16\); convert"),
        ("a.tif", "bilevel", "expected 8 bits per channel, found 1 bits"),
        ("a.tif", "planar", "found .*(planar|axes SYX).*; convert"),
        ("a.ome.tif", "channels", "found axes CYX of sizes 3 x 301 x 417; convert"),
        ("a.tif", "palette", "found colours PALETTE; convert"),
        *((f"a.{kind}", "text", "cannot be read") for kind in ("png", "jpg", "tif", "svs", "ndpi", "mrxs")),
        ("a.txt", "text", r"expected a slide \(svs ndpi .* png\), found \.txt; convert"),
        ("a.svs", "folder", "found a folder"),
        ("a.svs", "nothing", "found no such file"),
    ],
)
def test_what_cannot_be_read_is_refused_in_one_line(name, what, expected, tmp_path):
    write_odd(tmp_path / name, what)
    with pytest.raises(ValueError, match=expected) as error:
        open_slide(tmp_path / name)
    assert str(error.value).startswith(str(tmp_path / name)) and "\n" not in str(error.value)


def test_missing_readers_name_their_remedy(tmp_path, monkeypatch):
    (tmp_path / "a.svs").write_bytes(b"II")
    monkeypatch.setitem(sys.modules, "openslide", None)
    with pytest.raises(ValueError, match=r"a\.svs: whole-slide files need `pip install openslide-python"):
        open_slide(tmp_path / "a.svs")
    WRITERS["strips.tif"](tmp_path / "b.tif", draw())
    with open_slide(tmp_path / "b.tif") as slide:

        def without(*_, **__):
            raise ValueError("<COMPRESSION.LZW: 5> requires the 'imagecodecs' package")

        monkeypatch.setattr(slide.levels[0], "_page", SimpleNamespace(**_fields(slide.levels[0]._page), decode=without))
        with pytest.raises(ValueError, match=r"b\.tif: this compression needs `pip install imagecodecs`"):
            slide.region(0, 0, 10, 10)


def _fields(page) -> dict:
    return {name: getattr(page, name) for name in ("dataoffsets", "databytecounts", "jpegtables", "parent")}


def test_a_bomb_is_refused_before_it_is_decoded(tmp_path, monkeypatch):
    path = tmp_path / "bomb.png"
    Image.new("L", (8, 8)).save(path)
    data = bytearray(path.read_bytes())
    data[16:24] = (60_000).to_bytes(4, "big") * 2
    data[29:33] = zlib.crc32(data[12:29]).to_bytes(4, "big")
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"at most 536,870,912 pixels .* found 60,000 x 60,000; .* --huge \(13 GiB\)"):
        open_slide(path)
    monkeypatch.setattr(tiles, "BOMB_PX", 50_000)
    for name in WRITERS:
        path = tmp_path / f"large.{name}"
        WRITERS[name](path, draw())
        if name in ("png", "jpg"):
            with pytest.raises(ValueError, match="--huge"):
                open_slide(path)
        open_slide(path, huge=True).close()
    tifffile.imwrite(tmp_path / "one.tif", draw(), photometric="rgb", rowsperstrip=301, compression="zlib")
    with pytest.raises(ValueError, match=r"found 417 x 301; .*--huge"):
        open_slide(tmp_path / "one.tif")


def test_the_big_slides_pixels_are_those_of_its_kinds(pyramid):
    kinds = paint_kinds(256, 0)
    with open_slide(pyramid) as slide:
        corner, middle = slide.region(0, 0, 256, 256), slide.region(1024, 1024, 256, 256)
    assert np.abs(corner.astype(int) - kinds[0]).mean() < 3
    assert np.abs(middle.astype(int) - kinds[1]).mean() < 12  # grain is lost in JPEG
