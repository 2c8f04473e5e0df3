"""utils.images.tissue: the mask on drawn slides and on real ones, masks from files, grids, spots on tissue."""

import numpy as np
import pytest
import tifffile
from PIL import Image, ImageDraw
from scipy.ndimage import binary_dilation, gaussian_filter
from scipy.spatial import KDTree

from utils.images.image import open_image
from utils.images.tissue import MOST_SPOTS, grid, on_tissue, read_mask, tissue_mask
from utils.slices import visium
from utils.slices.lattice import fit_lattice

GLASS, PINK, PURPLE = (238, 234, 236), (214, 160, 196), (110, 104, 160)
INKS = {"blue": (35, 60, 175), "green": (30, 140, 80), "black": (28, 26, 30)}
REAL = ("B4", "C2", "C3", "C4", "C5")


def drawn(rng, size: int = 1000, strokes: dict | None = None) -> tuple[np.ndarray, np.ndarray]:
    """A slide with a disc of tissue, half of it dense, a hole in it, dust beside it: image, where tissue truly is."""
    image = Image.new("RGB", (size, size), GLASS)
    pen, truth = ImageDraw.Draw(image), Image.new("1", (size, size))
    for draw, dense, pale in ((pen, PURPLE, PINK), (ImageDraw.Draw(truth), 1, 1)):
        draw.ellipse((250, 300, 750, 800), fill=pale)
        draw.pieslice((250, 300, 750, 800), 90, 270, fill=dense)
        draw.ellipse((600, 450, 680, 530), fill=GLASS if draw is pen else 0)  # a duct
    for x, y in rng.integers(300, 700, (40, 2)):
        pen.ellipse((x, y, x + 4, y + 4), fill=GLASS)  # gaps
    for x, y in rng.integers(20, 230, (30, 2)):
        pen.ellipse((x, y, x + 3, y + 3), fill=PURPLE)  # dust
    for colour, line in (strokes or {}).items():
        pen.line(line, fill=INKS[colour], width=14)
    grain = np.asarray(image, np.float32) + rng.normal(0, 3, (size, size, 1))
    return np.clip(gaussian_filter(grain, (0.8, 0.8, 0)), 0, 255).astype(np.uint8), np.asarray(truth)


def shared(a: np.ndarray, b: np.ndarray) -> float:
    return (a & b).sum() / (a | b).sum()


def test_tissue_is_found_without_specks_and_small_holes(rng):
    image, truth = drawn(rng)
    mask = tissue_mask(image)
    assert mask.shape == (1000, 1000) and mask.dtype == bool
    assert shared(mask, truth) > 0.96
    assert not mask[:240, :240].any()  # dust
    assert not mask[470:510, 620:660].any()  # the duct is no small hole
    assert mask[350:450, 350:450].all() and mask[600:700, 400:600].all()


@pytest.mark.parametrize("colour", INKS)
def test_pen_marks_are_no_tissue(colour, rng):
    strokes = {colour: [(100, 900), (500, 880), (950, 700), (900, 100)]}
    image, truth = drawn(rng, strokes=strokes)
    inked = Image.new("1", (1000, 1000))
    ImageDraw.Draw(inked).line(strokes[colour], fill=1, width=14)
    mask = tissue_mask(image)
    assert not mask[np.asarray(inked)].any()
    assert shared(mask, truth) > 0.96
    across = {colour: [(200, 550), (800, 560)]}  # over the tissue, too
    image, truth = drawn(rng, strokes=across)
    mask = tissue_mask(image)
    assert not mask[553:557, 300:700].any()
    assert mask[truth].mean() > 0.85


def test_the_black_beyond_the_scan_is_no_tissue(rng):
    image, truth = drawn(rng)
    image[:150] = 0
    image[:, 900:] = (12, 10, 11)
    assert shared(tissue_mask(image), truth) > 0.96


@pytest.mark.parametrize("level", [255, 243, 200])
def test_glass_alone_is_no_tissue(level, rng):
    grain = rng.normal(level, 3, (400, 300, 3))
    assert not tissue_mask(np.clip(grain, 0, 255).astype(np.uint8)).any()
    assert not tissue_mask(np.full((400, 300, 3), level, np.uint8)).any()


def test_tissue_alone_is_all_tissue(rng):
    dense = rng.random((40, 30)) < 0.5
    image = np.where(dense[..., None], PURPLE, PINK).repeat(10, 0).repeat(10, 1) + rng.normal(0, 5, (400, 300, 3))
    assert tissue_mask(image.astype(np.uint8)).mean() > 0.99
    assert tissue_mask(np.full((50, 60, 3), PINK, np.uint8)).all()


def test_eosin_that_bled_onto_the_glass_is_no_tissue(rng):
    """Glass around the tissue as pink as pale tissue, without its texture."""
    image, truth = drawn(rng)
    tinted = image.copy()
    glass = ~binary_dilation(np.asarray(truth), iterations=4)
    tinted[glass] = np.clip(image[glass].astype(float) * (0.97, 0.83, 0.94), 0, 255)
    saturation = 1 - tinted[900, 500].min() / tinted[900, 500].max()
    assert 0.12 < saturation < 0.2
    assert shared(tissue_mask(tinted)[:, 200:], np.asarray(truth)[:, 200:]) > 0.93


@pytest.mark.realdata
@pytest.mark.parametrize("name", ["B4", "C5"])
def test_a_grid_on_a_real_section_has_no_spot_on_bare_glass(name, real_data):
    """Glass is smooth: its darkest channel deviates by less than 4 grey levels, that of 199 in 200 spots by more."""
    with open_image(next((real_data / "Breast_cancer" / name).glob("*.jpg"))) as slide:
        thumbnail, scale = slide.thumbnail()
        centres, _ = grid(slide.width, slide.height, 145)
    centres = centres[on_tissue(centres, tissue_mask(thumbnail), scale, 40)] * scale
    dark = thumbnail.min(2)
    deviation = [dark[int(y) - 8 : int(y) + 9, int(x) - 8 : int(x) + 9].std() for x, y in centres]
    assert len(centres) > 800 and np.quantile(deviation, 0.005) > 4


@pytest.mark.parametrize("shape", [(1, 1), (1, 300), (3, 2)])
def test_thumbnails_of_any_shape(shape):
    assert not tissue_mask(np.full((*shape, 3), 255, np.uint8)).any()
    assert not tissue_mask(np.zeros((*shape, 3), np.uint8)).any()
    assert tissue_mask(np.full((*shape, 3), PINK, np.uint8)).shape == shape


def check_spots_are_on_the_mask(folder) -> None:
    """At least 95 % of the spots in tissue, on less than half of the image."""
    positions = visium.read_positions(folder)
    spots = positions[positions["in_tissue"] == 1][["x_fullres_px", "y_fullres_px"]].to_numpy()
    with open_image(next(path for path in sorted(folder.iterdir()) if path.suffix in (".jpg", ".png"))) as slide:
        thumbnail, scale = slide.thumbnail()
    mask = tissue_mask(thumbnail)
    found = on_tissue(spots, mask, scale, visium.read_scalefactors(folder)["spot_diameter_fullres"] / 2)
    assert found.mean() >= 0.95
    assert mask.mean() < 0.5


@pytest.mark.realdata
@pytest.mark.parametrize("name", REAL)
def test_measured_spots_are_on_the_mask(name, real_data):
    check_spots_are_on_the_mask(real_data / "Breast_cancer" / name)


def test_simulated_spots_are_on_the_mask(tmp_path, rng):
    """The same, on a drawn slide in a folder as Space Ranger writes it."""
    image, truth = drawn(rng)
    centres, places = grid(1000, 1000, 25.0)
    inside = on_tissue(centres, truth, 1.0, 7.0).astype(int)
    (tmp_path / "spatial").mkdir()
    rows = zip(inside, places, centres.round().astype(int), strict=True)
    lines = [f"SPOT{i}-1,{t},{row},{col},{y},{x}" for i, (t, (row, col), (x, y)) in enumerate(rows)]
    (tmp_path / "spatial" / "tissue_positions_list.csv").write_text("\n".join(lines) + "\n")
    scales = '{"tissue_hires_scalef": 1.0, "tissue_lowres_scalef": 0.3, "spot_diameter_fullres": 14.0}'
    (tmp_path / "spatial" / "scalefactors_json.json").write_text(scales)
    Image.fromarray(image).save(tmp_path / "slide.png")
    check_spots_are_on_the_mask(tmp_path)


def test_a_mask_file_of_any_size_and_kind(tmp_path):
    truth = np.zeros((60, 90), bool)
    truth[10:30, 20:80] = True
    large = truth.repeat(4, 0).repeat(4, 1)
    label = Image.fromarray(large.astype(np.uint8), "P")  # label 1 is drawn black by this palette
    label.putpalette([0, 0, 0] * 2)
    images = {
        "grey": Image.fromarray(large.astype(np.uint8)),
        "bilevel": Image.fromarray(large),
        "deep": Image.fromarray(large.astype(np.uint16) * 300),
        "colour": Image.fromarray(np.dstack([large * 0, large * 9, large * 0]).astype(np.uint8)),
        "clear": Image.fromarray(np.dstack([large * 200, large * 9, large * 0, large * 0 + 255]).astype(np.uint8)),
        "label": label,
    }
    for name, image in images.items():
        image.save(tmp_path / f"{name}.png")
        np.testing.assert_array_equal(read_mask(tmp_path / f"{name}.png", (60, 90)), truth, err_msg=name)
        if name in ("grey", "bilevel", "deep", "colour"):
            tags = [(274, 3, 1, 3, True)]  # Orientation: shown turned by 180 degrees
            tifffile.imwrite(tmp_path / f"{name}.tif", np.asarray(image), extratags=tags)
            np.testing.assert_array_equal(read_mask(tmp_path / f"{name}.tif", (60, 90)), truth, err_msg=name)
    twice = read_mask(tmp_path / "grey.png", (480, 720))
    np.testing.assert_array_equal(twice, large.repeat(2, 0).repeat(2, 1))
    assert read_mask(tmp_path / "grey.png", (61, 90)).shape == (61, 90)  # within 2 %


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("turned.png", r"expected the slide's ratio of sides, 1\.500 .*, found 60 x 90 px, 0\.667"),
        ("empty.png", "found zeros only"),
        ("text.png", "expected an image, found one that cannot be read"),
        ("missing.png", "found no such file"),
    ],
)
def test_a_bad_mask_is_refused(name, expected, tmp_path):
    Image.new("L", (60, 90), 255).save(tmp_path / "turned.png")
    Image.new("L", (90, 60)).save(tmp_path / "empty.png")
    (tmp_path / "text.png").write_text("no image")
    with pytest.raises(ValueError, match=expected) as error:
        read_mask(tmp_path / name, (60, 90))
    assert name in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("kind", ["hexagonal", "square"])
@pytest.mark.parametrize(("width", "height", "pitch"), [(4000, 3000, 97.3), (1000, 5000, 100.0)])
def test_a_grid_has_the_pitch_and_covers_the_slide(kind, width, height, pitch):
    centres, places = grid(width, height, pitch, kind)
    assert len(centres) == len(places) == len(np.unique(places, axis=0))
    assert ((centres > 0) & (centres < (width, height))).all()
    near = KDTree(centres)
    n_near = 7 if kind == "hexagonal" else 5
    inner = ((centres > 2 * pitch) & (centres < np.array([width, height]) - 2 * pitch)).all(1)
    np.testing.assert_allclose(near.query(centres[inner], k=n_near)[0][:, 1:], pitch)
    anywhere = np.stack(np.meshgrid(np.arange(0, width, 20), np.arange(0, height, 20)), -1).reshape(-1, 2)
    assert near.query(anywhere)[0].max() < 1.3 * pitch
    mirrored = np.sort(width - centres[:, 0])  # as far from the left as from the right
    assert np.abs(mirrored[0] - centres[:, 0].min()) <= pitch / 2
    order = np.lexsort((places[:, 1], places[:, 0]))
    np.testing.assert_array_equal(order, np.arange(len(places)))  # row by row


def test_a_hexagonal_grid_is_read_as_visiums():
    """The pitch and the stagger that the reader measures on Space Ranger's positions are those of the grid."""
    for kind in ("hexagonal", "square"):
        centres, places = grid(5000, 4000, 137.0, kind)
        found = fit_lattice("grid", centres, places)
        assert found.staggered == (kind == "hexagonal") and found.pitch_px == pytest.approx(137.0)
        assert not found.measured and not found.mirrored


def test_a_small_slide_has_one_spot_and_a_senseless_pitch_is_refused():
    for kind in ("hexagonal", "square"):
        centres, places = grid(40, 30, 100.0, kind)
        np.testing.assert_array_equal(centres, [[20.0, 15.0]])
        np.testing.assert_array_equal(places, [[0, 0]])
        for pitch in (0.4, 0.0, -3.0, np.nan, np.inf):
            with pytest.raises(ValueError, match=rf"at most {MOST_SPOTS:,} spots, found .* px on 40,000"):
                grid(40_000, 40_000, pitch, kind)
    with pytest.raises(ValueError, match="hexagonal or square grid, found 'round'"):
        grid(40, 30, 10.0, "round")


def test_half_of_the_disc_decides(rng):
    mask = np.zeros((100, 200), bool)
    mask[:, :100] = True
    scale, radius = 0.1, 80.0  # the edge of the tissue is at x = 1000
    x = np.array([500.0, 960.0, 1040.0, 1500.0])
    np.testing.assert_array_equal(on_tissue(np.column_stack([x, x * 0 + 500]), mask, scale, radius), x < 1000)
    edge = np.array([[0.0, 500.0], [-40.0, 500.0], [500.0, 1010.0], [5.0, 5.0], [50.0, 50.0]])
    np.testing.assert_array_equal(on_tissue(edge, mask, scale, radius)[1:], [False, False, False, True])
    assert on_tissue(np.empty((0, 2)), mask, scale, radius).shape == (0,)
    blobs = gaussian_filter(rng.normal(size=(300, 300)), 6) > 0
    centres = rng.uniform(0, 3000, (300, 2))
    y, x = (np.mgrid[:300, :300] + 0.5) / scale
    for radius in (20.0, 150.0):
        inside = [np.hypot(x - cx, y - cy) <= radius for cx, cy in centres]
        covered = np.array([blobs[disc].sum() / (np.pi * (radius * scale) ** 2) for disc in inside])
        found = on_tissue(centres, blobs, scale, radius)
        clear = np.abs(covered - 0.5) > (0.05 if radius == 150 else 0.25)
        np.testing.assert_array_equal(found[clear], covered[clear] > 0.5)
