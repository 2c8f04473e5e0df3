"""Where spots of a slide lie: grids, positions, masks, images smaller than the positions mean; what is refused."""

import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from utils.evaluation import metrics
from utils.images.image import open_image
from utils.prediction import layout, measured
from utils.prediction.slides import Request
from utils.slices import visium

GLASS, STAINED = 240, (190, 90, 160)


def opened(width, height, um_per_px=None, metadata=None):
    return SimpleNamespace(width=width, height=height, um_per_px=um_per_px or metadata, metadata_um_per_px=metadata)


def thumbnail(height, width, tissue=np.s_[:, :]):
    image = np.full((height, width, 3), GLASS, np.uint8)
    image[tissue] = STAINED
    return image


@pytest.fixture
def folder(simulated, tmp_path):
    """A slice with a hires image of half the size, and no other."""
    shutil.copytree(simulated / "P03_1", tmp_path / "P03_1", ignore=shutil.ignore_patterns("*.jpg", "truth.h5ad"))
    spatial = tmp_path / "P03_1" / "spatial"
    image = Image.open(spatial / "tissue_hires_image.png")
    image.resize([side // 2 for side in image.size]).save(spatial / "tissue_hires_image.png")
    scales = json.loads((spatial / "scalefactors_json.json").read_text())
    (spatial / "scalefactors_json.json").write_text(json.dumps(scales | {"tissue_hires_scalef": 0.5}))
    return tmp_path / "P03_1"


def laid(request, slide, pixels, scale=1.0, kind="hexagonal"):
    return layout.place_spots(layout.plan(request), slide, pixels, scale, kind, 112)


def laid_folder(request):
    """The spots of a slice folder, on its own image."""
    planned = layout.plan(request)
    with open_image(planned.source.path, planned.um_per_image_px) as image:
        return layout.place_spots(planned, image, *image.thumbnail(), "hexagonal", 112)


@pytest.fixture
def slide_file(tmp_path):
    (tmp_path / "a.svs").touch()
    return tmp_path / "a.svs"


def test_a_grid_covers_the_tissue_alone(slide_file):
    half = thumbnail(200, 400, np.s_[:, 200:])
    spots = laid(Request(slide_file, name="a"), opened(4000, 2000, metadata=0.5), half, 0.1)
    assert (spots.xy_fullres_px[:, 0] > 1900).all() and spots.pitch_fullres_px == 200
    assert spots.diameter_fullres_px == pytest.approx(110) and spots.um_per_fullres_px == 0.5
    assert len(set(spots.barcodes)) == len(spots.barcodes) > 80
    square = laid(Request(slide_file, spot_pitch_um=50), opened(4000, 2000, metadata=0.5), half, 0.1, "square")
    assert len(square.barcodes) > 3 * len(spots.barcodes)


def test_a_given_scale_wins_over_the_files_with_a_warning(slide_file, capsys):
    spots = laid(Request(slide_file, um_per_px=0.25), opened(4000, 2000, 0.25, 0.5), thumbnail(200, 400), 0.1)
    assert spots.um_per_fullres_px == 0.25 and spots.pitch_fullres_px == 400
    assert "0.25 um per px by flags or positions, 0.5 by the file; the former is used" in capsys.readouterr().out


def test_glass_and_unknown_scale_are_refused(slide_file):
    with pytest.raises(ValueError, match=r"expected tissue under a grid of 200.0 px, found none.*; draw it"):
        laid(Request(slide_file), opened(4000, 2000, metadata=0.5), thumbnail(200, 400, np.s_[:0]), 0.1)
    with pytest.raises(ValueError, match=r"a.svs: expected a scale .*, found none; give --um_per_px$"):
        laid(Request(slide_file), opened(4000, 2000), thumbnail(200, 400), 0.1)


def test_a_mask_stands_in_for_the_tissue_found_and_thins_positions_out(slide_file, folder, tmp_path):
    marks = np.zeros((100, 200), np.uint8)
    marks[:, :50] = 1
    Image.fromarray(marks).save(tmp_path / "mask.png")
    request = Request(slide_file, mask=tmp_path / "mask.png")
    spots = laid(request, opened(4000, 2000, metadata=0.5), thumbnail(200, 400), 0.1)
    assert 0 < spots.xy_fullres_px[:, 0].max() < 1100
    width, height = Image.open(folder / "spatial" / "tissue_hires_image.png").size
    Image.fromarray(np.uint8(255 * (np.indices((height, width))[1] < width / 2))).save(tmp_path / "left.png")
    every = laid_folder(Request(folder))
    left = laid_folder(Request(folder, mask=tmp_path / "left.png"))
    assert 0 < len(left.barcodes) < len(every.barcodes)
    assert (left.xy_image_px[:, 0] <= width / 2 + 20).all() and left.pitch_fullres_px == every.pitch_fullres_px


def test_a_hires_image_is_smaller_than_the_positions_mean(folder):
    planned = layout.plan(Request(folder, name="P03_1"))
    assert planned.source.scale == 0.5 and planned.um_per_image_px == pytest.approx(2, rel=1e-3)
    spots = laid_folder(Request(folder, name="P03_1"))
    expected = visium.open_slice(folder)
    assert spots.barcodes.tolist() == expected.spots.index.tolist()
    np.testing.assert_array_equal(spots.xy_image_px * 2, expected.xy_fullres_px)
    assert spots.pitch_fullres_px == expected.pitch_px
    assert spots.diameter_fullres_px == expected.scalefactors["spot_diameter_fullres"]
    assert {path.name for path in planned.files} > {"tissue_hires_image.png", "filtered_feature_bc_matrix.h5"}


@pytest.mark.parametrize("given", ["", "outs"])
def test_a_table_beside_the_folder_names_its_image_and_pitch(folder, given):
    """As the tiles of training were cut by it."""
    for name in ("a.png", "b.png"):
        shutil.copy(folder / "spatial" / "tissue_hires_image.png", folder / name)
    (folder.parent / "slices.csv").write_text(
        "slice,patient,part,spot_pitch_um,image\nP03_1,P03,,200,b.png\nP04_1,,,,\n"
    )
    if given:
        whole = folder.rename(folder.with_name("whole"))
        folder.mkdir()
        whole.rename(folder / given)
    planned = layout.plan(Request(folder / given, name="P03_1"))
    assert planned.source.path.name == "b.png" and planned.pitch_um == 200
    assert layout.plan(Request(folder / given, name="P03_1", spot_pitch_um=55)).pitch_um == 55
    for cell in ("./P03_1", "P03_1/", "P03_1/outs"):
        (folder.parent / "slices.csv").write_text(f"slice,part,image\n{cell},training,b.png\nP04_1,?,\n")
        assert layout.plan(Request(folder / given, name="P03_1")).source.path.name == "b.png"
    (folder.parent / "slices.csv").write_text("name;value\n1;2\n")
    with pytest.raises(ValueError, match="expected one full-resolution image"):
        layout.plan(Request(folder / given, name="P03_1"))
    (folder.parent / "slices.csv").write_text("slice,image\nP04_1,b.png\n")
    with pytest.raises(ValueError, match=r"expected one full-resolution image, found .*a\.png"):
        layout.plan(Request(folder / given, name="P03_1"))


def test_a_few_spots_outside_the_image_are_left_out_and_more_are_refused(slide_file, folder, tmp_path, capsys):
    positions = next((folder / "spatial").glob("tissue_positions*"))
    xy = visium.open_slice(folder).xy_fullres_px
    request, right = Request(slide_file, 1.0, positions, name="P03_1"), np.sort(xy[:, 0])
    for n_outside in (2, 20):
        size = int(right[-n_outside]), int(xy[:, 1].max() + 50)
        whole = thumbnail(*size[::-1])
        if n_outside == 20:
            with pytest.raises(ValueError, match=r"a.svs: expected 70 spots on its .*, found 2\d outside"):
                laid(request, opened(*size), whole)
            continue
        spots = laid(request, opened(*size), whole)
        left_out = int((xy[:, 0] >= size[0]).sum())
        assert len(spots.barcodes) == 70 - left_out and 2 <= left_out <= 3
        assert f"P03_1: {left_out} of 70 spots outside the image" in capsys.readouterr().out


def test_a_single_position_is_a_spot(slide_file, tmp_path):
    (tmp_path / "one.csv").write_text("A-1,1,0,0,500,600\n")
    request = Request(slide_file, 0.5, tmp_path / "one.csv", name="a")
    spots = laid(request, opened(4000, 2000), thumbnail(200, 400), 0.1)
    assert spots.barcodes.tolist() == ["A-1"] and spots.xy_fullres_px.tolist() == [[600, 500]]
    assert spots.pitch_fullres_px == 200 and spots.um_per_fullres_px == 0.5


@pytest.mark.parametrize("name", ["my spots.csv", "spots.txt"])
def test_a_positions_file_may_have_any_name(folder, tmp_path, name):
    original = next((folder / "spatial").glob("tissue_positions*"))
    shutil.copy(original, tmp_path / name)
    spots, lattice = layout._given_spots(tmp_path / name)
    assert spots.equals(visium.open_slice(folder).spots.loc[spots.index]) and lattice.pitch_px > 0


def test_a_folder_without_an_image_is_refused(folder):
    (folder / "spatial" / "tissue_hires_image.png").unlink()
    with pytest.raises(ValueError, match=r"expected a full-resolution image or spatial/tissue_hires_image.png"):
        layout.plan(Request(folder))


def test_what_was_measured_follows_the_spots_asked_for(folder):
    source = visium.read_slice(folder)
    spots, wanted = source.spots.index.to_numpy(str)[::-2], [source.genes[3], "NO_GENE", source.genes[0]]
    found = measured.read_measured(visium.open_slice(folder), wanted, spots, 1e9)
    dense = source.counts.toarray()[::-2]
    np.testing.assert_array_equal(found.counts, np.column_stack([dense[:, 3], 0 * dense[:, 0], dense[:, 0]]))
    np.testing.assert_array_equal(found.total_counts, dense.sum(1))
    assert found.slice["measured"].tolist() == [True, False, True]
    whole = metrics.to_scale("residuals", source.counts.toarray()[:, [3, 0]], source.counts.toarray().sum(1))[::-2]
    np.testing.assert_allclose(found.in_scale("residuals")[:, [0, 2]], whole)
    assert np.isnan(found.in_scale("residuals")[:, 1]).all()
    by_id = measured.read_measured(
        visium.open_slice(folder), [f"{source.gene_ids[3]}.7", "NO_GENE", source.gene_ids[0]], spots, 1e9
    )
    np.testing.assert_array_equal(by_id.counts, found.counts)
    in_spans = measured.read_measured(visium.open_slice(folder), wanted, spots, 4000)
    np.testing.assert_array_equal(in_spans.counts, found.counts)
    assert in_spans.content == found.content
    (folder / "filtered_feature_bc_matrix.h5").unlink()
    assert measured.read_measured(visium.open_slice(folder), wanted, spots, 1e9) is None
