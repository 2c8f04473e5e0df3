"""An image against its slice: what fits passes without a word, what cannot be the same image is refused."""

import os
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image, ImageFilter
from spaceranger_folders import refused

from utils.images.image import open_image
from utils.slices import checks, visium

REAL = os.environ.get("MAGIC_REAL_DATA")
real = [pytest.mark.realdata, pytest.mark.skipif(not REAL, reason="MAGIC_REAL_DATA does not name the data folder")]
GLASS, PINK = (243, 242, 244), (200, 110, 160)


@pytest.fixture
def slide(tmp_path, rng):
    """An image of 800 x 600 px with tissue left of the middle, its hires and lowres images, and spots on the tissue."""
    pixels = np.full((600, 800, 3), GLASS, np.uint8)
    pixels[60:420, 50:390] = PINK
    pixels[100:200, 90:200] = (120, 40, 130)
    image = Image.fromarray(pixels)
    paths = {"fullres": tmp_path / "he.png", "hires": tmp_path / "hires.png", "lowres": tmp_path / "lowres.png"}
    for kind, scale in (("fullres", 1), ("hires", 0.5), ("lowres", 0.1)):
        image.resize((round(800 * scale), round(600 * scale)), Image.Resampling.BOX).save(paths[kind])
    x, y = np.meshgrid(np.arange(80, 380, 30.0), np.arange(90, 400, 30.0))
    return image, paths, np.column_stack([x.ravel(), y.ravel()])


def pixels_of(image):
    return np.asarray(image.convert("RGB"))


def check_content(pixels, path, exported=False):
    """Pixels of he.png against the small image in a file."""
    with open_image(path) as small:
        return checks.check_content(
            Path("he.png"), pixels, small.thumbnail(checks.THUMBNAIL_PX)[0], path.name, exported
        )


def test_few_spots_may_lie_outside_and_many_are_refused():
    xy = np.column_stack([np.arange(100.0), np.full(100, 5.0)])
    assert checks.spots_on_image("a.png", xy, (100, 10)).all()
    inside = checks.spots_on_image("a.png", xy, (97, 10))
    assert (~inside).sum() == 3 and not inside[97:].any()
    assert "found 4 outside" in refused(
        "a.png: expected 100 spots on its 96 x 10 px", checks.spots_on_image, "a.png", xy, (96, 10)
    )
    assert "x and y swapped all would lie on it" in refused("a.png", checks.spots_on_image, "a.png", xy, (10, 100))
    refused("outside", checks.spots_on_image, "a.png", xy[:2] + 200, (100, 10))  # few, but all of them


@pytest.mark.parametrize("small", ["hires", "lowres"])
def test_the_same_image_in_other_colours_passes(slide, small):
    image, paths, _ = slide
    own = pixels_of(image)
    brighter = np.clip(own * 1.15 + 5, 0, 255).astype(np.uint8)
    gamma = (255 * (own / 255) ** 1.6).astype(np.uint8)
    stained = (own * [1.0, 0.85, 1.05]).clip(0, 255).astype(np.uint8)
    blurred = pixels_of(image.filter(ImageFilter.GaussianBlur(3)))
    for pixels in (own, brighter, gamma, stained, blurred):
        assert check_content(pixels, paths[small]) == []


@pytest.mark.parametrize(
    ("change", "hint"),
    [
        (lambda pixels: pixels[:, ::-1], "it fits mirrored left to right"),
        (lambda pixels: pixels[::-1], "it fits mirrored top to bottom"),
        (lambda pixels: pixels[::-1, ::-1], "it fits turned by 180 degrees"),
        (lambda pixels: pixels[..., ::-1], "it fits with red and blue exchanged"),
        (lambda pixels: np.full_like(pixels, 255), "found another (one colour"),
        (lambda pixels: np.zeros_like(pixels), "found another (one colour"),
        (lambda pixels: 255 - pixels, "found another"),
        (lambda pixels: np.roll(pixels, 80, 1), "found another"),
    ],
)
def test_another_image_is_refused(slide, change, hint):
    image, paths, _ = slide
    changed = np.ascontiguousarray(change(pixels_of(image)))
    for small in ("hires", "lowres"):
        assert hint in refused("he.png: expected the image", check_content, changed, paths[small])


def test_a_smooth_image_that_its_grey_levels_do_not_tell_from_the_turned_one_is_refused(tmp_path):
    """Red falls with x, green rises with y: turned, their sum is the same."""
    x, y = np.meshgrid(np.linspace(0, 1, 200), np.linspace(0, 1, 200))
    pixels = np.stack([250 - 120 * x, 60 + 120 * y, np.full_like(x, 170)], -1).round().astype(np.uint8)
    Image.fromarray(pixels).save(tmp_path / "small.png")
    turned = np.ascontiguousarray(pixels.swapaxes(0, 1)[::-1, ::-1])
    assert "it fits with x and y swapped and both mirrored" in refused(
        "he.png: expected the image", check_content, turned, tmp_path / "small.png"
    )
    assert check_content(pixels, tmp_path / "small.png") == []


def test_an_image_that_is_transparent_everywhere_is_refused(slide, tmp_path):
    clear = np.dstack([pixels_of(slide[0]), np.zeros((600, 800), np.uint8)])
    Image.fromarray(clear).save(tmp_path / "clear.png")
    with open_image(tmp_path / "clear.png") as opened:
        thumbnail = opened.thumbnail()
    refused("found an image of one colour", checks.check_not_blank, "clear.png", thumbnail)


def test_a_grey_image_of_coloured_tissue_is_warned_of(slide, tmp_path):
    image, paths, _ = slide
    grey = np.asarray(image.convert("L").convert("RGB"))
    assert "is grey, hires.png is coloured" in check_content(grey, paths["hires"])[0]
    Image.fromarray(grey).resize((400, 300)).save(tmp_path / "grey.png")
    assert check_content(pixels_of(image), tmp_path / "grey.png") == []


def test_a_shift_is_warned_of_and_a_blank_image_tells_nothing(slide, tmp_path):
    image, paths, _ = slide
    shifted = np.roll(pixels_of(image), 12, 1)
    assert "may be shifted or cropped" in check_content(shifted, paths["hires"])[0]
    Image.new("RGBA", (60, 40)).save(tmp_path / "blank.png")
    assert check_content(pixels_of(image), tmp_path / "blank.png") == []


def test_sizes(slide):
    _, paths, _ = slide
    hires, lowres = (visium.SourceImage(kind, paths[kind], scale) for kind, scale in (("hires", 0.5), ("lowres", 0.1)))
    assert hires.size == (400, 300)
    for size, small in ([(800, 600), hires], [(803, 602), hires], [(812, 600), lowres]):  # whose pixels are 10 px wide
        checks.check_size(Path("he.png"), size, small.size, small)
    for size in ((400, 300), (1600, 1200), (600, 800), (808, 600), (800, 594)):
        refused("expected about 800 x 600", checks.check_size, Path("he.png"), size, hires.size, hires)


@pytest.fixture
def scanned(slide, simulated, tmp_path):
    """A slice folder with small images, and a function that puts its scan there, changed."""
    shutil.copytree(simulated / "P01_1", tmp_path / "S1", ignore=shutil.ignore_patterns("*_he.*", "truth*"))
    scan = Image.open(next((simulated / "P01_1").glob("*_he.*"))).convert("RGB")

    def put(change):
        image = change(scan)
        image.save(tmp_path / "S1" / "he.png")
        slice_ = visium.open_slice(tmp_path / "S1")
        source = slice_.source_image()
        with open_image(source.path) as opened:
            return source, checks.check_image(slice_, source, opened, opened.thumbnail(checks.THUMBNAIL_PX))

    return put


@pytest.mark.parametrize("factor", [0.5, 2.0, 1 / 3])
@pytest.mark.parametrize("only", ["tissue_hires_image.png", "tissue_lowres_image.png"])
def test_a_scan_that_was_exported_smaller_or_larger_has_its_scale(scanned, tmp_path, factor, only):
    for name in {"tissue_hires_image.png", "tissue_lowres_image.png"} - {only}:
        (tmp_path / "S1" / "spatial" / name).unlink()
    source, (inside, warnings) = scanned(lambda scan: scan.resize([round(side * factor) for side in scan.size]))
    assert source.scale == factor and inside.all()
    assert f"has {source.scale:.4g} times the size" in warnings[0] and len(warnings) == 1


@pytest.mark.parametrize("left_out", [0.01, 0.1, 0.5])
def test_a_part_of_the_scan_is_not_taken_for_a_smaller_export(scanned, left_out):
    def corner(scan):
        return scan.crop((0, 0, round(scan.width * (1 - left_out)), round(scan.height * (1 - left_out))))

    def middle(scan):
        off = [round(side * left_out / 2) for side in scan.size]
        return scan.crop((*off, scan.width - off[0], scan.height - off[1]))

    for part in (corner, middle):
        with pytest.raises(ValueError, match=r"he.png: expected"):
            scanned(part)


def test_a_part_of_a_smooth_image_correlates_with_the_whole_but_has_other_colours(tmp_path):
    x, y = np.meshgrid(np.linspace(0, 1, 400), np.linspace(0, 1, 300))
    whole = np.stack([250 - 120 * x, 60 + 120 * y, np.full_like(x, 170)], -1).astype(np.uint8)
    Image.fromarray(whole).save(tmp_path / "small.png")
    part = np.ascontiguousarray(whole[:150, :200])
    assert check_content(whole, tmp_path / "small.png", exported=True) == []
    message = refused("he.png: expected", check_content, part, tmp_path / "small.png", True)
    assert "other colours" in message


def test_the_whole_scan_passes(scanned):
    source, (inside, warnings) = scanned(lambda scan: scan)
    assert source.scale == 1 and inside.all() and warnings == []


def scaled(slice_, kind, factor):
    """Warnings about positions on a small image whose scale factor is wrong by `factor`."""
    small = slice_.small_image(kind)
    with open_image(small.path) as image:
        size, thumbnail = (image.width, image.height), image.thumbnail(checks.THUMBNAIL_PX)
    return checks.check_positions(slice_, replace(small, scale=small.scale * factor), size, thumbnail)


@pytest.mark.parametrize("name", ["P01_1", "P02_1", "P03_1"])
@pytest.mark.parametrize("factor", [0.6, 0.8, 1.0, 1.6])
def test_a_scale_at_which_positions_off_tissue_lie_on_it_is_warned_of(simulated, name, factor):
    warnings = scaled(visium.open_slice(simulated / name), "hires", factor)
    assert len(warnings) == (factor != 1)
    for line in warnings:
        assert line.endswith("check tissue_hires_scalef")
        assert float(line.split(" times the scale")[0].split()[-1]) == pytest.approx(1 / factor, rel=0.1)


def test_only_an_image_whose_scale_nothing_else_shows_is_checked_by_positions(scanned, tmp_path):
    """A scan alone, exported at twice its size: all positions lie on its upper left quarter."""
    for name in ("hires", "lowres"):
        (tmp_path / "S1" / "spatial" / f"tissue_{name}_image.png").unlink()
    for factor in (1, 1.6):
        _, (_, warnings) = scanned(lambda scan, factor=factor: scan.resize([round(factor * n) for n in scan.size]))
        assert "to check its scale by" in warnings[-1] and len(warnings) == (1 if factor == 1 else 2)
        assert factor == 1 or "times the scale: check the full-resolution image" in warnings[0]


def test_one_of_several_sections_on_a_capture_area_is_no_other_scale(simulated):
    """Four cores; positions on the others count as off tissue."""
    pixels = np.full((800, 800, 3), GLASS, np.uint8)
    x, y = (axis.ravel() for axis in np.meshgrid(np.arange(60, 750, 20.0), np.arange(60, 750, 20.0)))
    cores = {(at_x, at_y): np.hypot(x - at_x, y - at_y) < 110 for at_x in (250, 550) for at_y in (250, 550)}
    for at_x, at_y in cores:
        pixels[np.hypot(*np.ogrid[-at_y : 800 - at_y, -at_x : 800 - at_x]) < 115] = PINK
    opened = visium.open_slice(simulated / "P01_1")
    for chosen in cores.values():
        spots = pd.DataFrame({"x_fullres_px": x, "y_fullres_px": y})
        slice_ = replace(opened, spots=spots[chosen], off_tissue_px=spots[~chosen].to_numpy())
        source = visium.SourceImage("hires", Path("hires.png"), 1.0)
        assert checks.check_positions(slice_, source, (800, 800), (pixels, 1.0)) == []


@pytest.mark.parametrize(
    ("name", "kind", "factor"),
    [
        *[
            pytest.param("visium_1142243F", kind, factor, marks=real)
            for kind in ("hires", "lowres")
            for factor in (1, 1.25)
        ],
        *[pytest.param("spaceranger_samples/scanpy_visium_1.0.0", "lowres", f, marks=real) for f in (0.8, 1, 1.25)],
        pytest.param("spaceranger_samples/mouse_embryo_3.0.0", "lowres", 1, marks=real),
    ],
)
def test_the_scale_of_real_slices(name, kind, factor):
    assert len(scaled(visium.open_slice(Path(REAL) / name), kind, factor)) == (factor != 1)


def axes(slide, change, mirrored=False):
    image, _, xy = slide
    return checks.check_axes("he.png", change(xy), image.size, 8.0, (pixels_of(image), 1.0), mirrored)


def test_spots_on_tissue_pass_and_a_mirrored_array_is_named(slide):
    assert axes(slide, lambda xy: xy) == []
    (warning,) = axes(slide, lambda xy: xy, mirrored=True)
    assert "axes swapped or mirrored, or a flipped scan (100% of the spots lie on tissue" in warning


@pytest.mark.parametrize(
    ("change", "name"),
    [
        (lambda xy: np.column_stack([800 - xy[:, 0], xy[:, 1]]), "x mirrored"),
        (lambda xy: np.column_stack([800 - xy[:, 0], 600 - xy[:, 1]]), "x and y mirrored"),
    ],
)
def test_spots_on_glass_that_mirrored_lie_on_tissue_are_refused(slide, change, name):
    assert f"100% with {name}" in refused("he.png: expected spots on tissue, found 0%", axes, slide, change)


def test_a_mirrored_array_is_refused_where_the_tissue_says_which_way(slide):
    def down(xy):
        return np.column_stack([xy[:, 0], 600 - xy[:, 1]])

    own = axes(slide, down)  # most spots are still on tissue: by itself no reason
    assert own == []
    assert "with y mirrored" in refused("expected spots on tissue", axes, slide, down, mirrored=True)


def test_spots_of_which_hardly_one_is_on_tissue_are_refused(slide):
    image, _, xy = slide
    pixels = pixels_of(image).copy()
    pixels[:, :] = GLASS
    pixels[450:590, 300:780] = PINK  # elsewhere, and where no turn of the spots reaches
    message = refused(
        "expected spots on tissue", checks.check_axes, "he.png", xy, image.size, 8.0, (pixels, 1.0), False
    )
    assert "found 0% of 110 there; give the image" in message


def test_fat_of_which_only_septa_are_found_is_warned_of(slide):
    image, _, xy = slide
    pixels = np.full((600, 800, 3), GLASS, np.uint8)
    pixels[95:400:30, 60:380] = pixels[80:400, 95:380:30] = PINK  # lines between the spots, none on them
    (warning,) = checks.check_axes("he.png", xy, image.size, 8.0, (pixels, 1.0), False)
    assert "0% of the spots under tissue lie on what looks like tissue" in warning
    pixels[450:590, 600:780] = PINK  # 25,200 px elsewhere: more than 110 discs of 201 px
    refused("found 0% of 110 there", checks.check_axes, "he.png", xy, image.size, 8.0, (pixels, 1.0), False)


def test_spots_on_black_parts_are_warned_of_and_refused_where_they_are_most(slide):
    image, _, xy = slide  # 11 rows of 10 spots, from y = 90 to 390

    def black_from(y):
        pixels = pixels_of(image).copy()
        pixels[y:] = 0
        return checks.check_not_black("he.png", xy, 8.0, (pixels, 1.0))

    assert black_from(600) == black_from(400) == []
    (warning,) = black_from(300)
    assert warning.startswith("he.png: is black (0, 0, 0) under 40 of 110 spots, as where parts of the file are")
    refused(r"he.png: expected tissue .* found black \(0, 0, 0\) under 60 of 110 spots; copy", black_from, 235)


def test_spots_beside_the_tissue_are_warned_of(slide):
    (warning,) = axes(slide, lambda xy: xy + np.array([200, 0]))
    assert "40% of the spots under tissue lie on what looks like tissue" in warning


@pytest.mark.parametrize("name", [pytest.param(name, marks=real) for name in ("B4", "C2", "C3", "C4", "C5")])
def test_real_sections_pass_and_their_neighbours_images_do_not(name):
    data = Path(REAL) / "Breast_cancer"
    slice_ = visium.open_slice(data / name, spot_pitch_um=200)
    source = slice_.source_image("hires")
    with open_image(source.path) as image:
        thumbnail = image.thumbnail(checks.THUMBNAIL_PX)
        inside, warnings = checks.check_image(slice_, source, image, thumbnail)
    assert inside.all() and warnings == []
    for other in {"B4", "C2", "C3", "C4", "C5"} - {name}:
        small = data / other / "spatial" / "tissue_hires_image.png"
        refused("found another", check_content, thumbnail[0], small)


@pytest.mark.parametrize("name", [pytest.param(name, marks=real) for name in ("C2", "C4")])
def test_swapped_axes_of_a_real_section_are_refused(name):
    slice_ = visium.open_slice(Path(REAL) / "Breast_cancer" / name)
    source = slice_.source_image("hires")
    with open_image(source.path) as image:
        thumbnail, size = image.thumbnail(checks.THUMBNAIL_PX), (image.width, image.height)
    xy = slice_.xy_fullres_px[:, ::-1] * source.scale
    radius = slice_.scalefactors["spot_diameter_fullres"] / 2 * source.scale
    refused("with x and y swapped", checks.check_axes, "C.jpg", xy, size, radius, thumbnail, True)
