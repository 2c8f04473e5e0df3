"""Where spots of a slide lie: grids, positions, masks, pictures smaller than the positions mean; what is refused."""

import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from utils.prediction import layout, measured
from utils.prediction.slides import Request
from utils.slices import visium

GLASS, STAINED = 240, (190, 90, 160)


def opened(width, height, um_per_px=None, metadata=None):
    return SimpleNamespace(width=width, height=height, um_per_px=um_per_px or metadata, metadata_um_per_px=metadata)


def thumbnail(height, width, tissue=np.s_[:, :]):
    picture = np.full((height, width, 3), GLASS, np.uint8)
    picture[tissue] = STAINED
    return picture


@pytest.fixture
def folder(simulated, tmp_path):
    """A slice with a hires picture of half the size, and no other."""
    shutil.copytree(simulated / "P03_1", tmp_path / "P03_1", ignore=shutil.ignore_patterns("*.jpg", "truth.h5ad"))
    spatial = tmp_path / "P03_1" / "spatial"
    picture = Image.open(spatial / "tissue_hires_image.png")
    picture.resize([side // 2 for side in picture.size]).save(spatial / "tissue_hires_image.png")
    scales = json.loads((spatial / "scalefactors_json.json").read_text())
    (spatial / "scalefactors_json.json").write_text(json.dumps(scales | {"tissue_hires_scalef": 0.5}))
    return tmp_path / "P03_1"


def laid(request, slide, picture, scale=1.0, kind="hexagonal"):
    return layout.lay(layout.plan(request), slide, picture, scale, kind)


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
    square = laid(Request(slide_file, pitch_um=50), opened(4000, 2000, metadata=0.5), half, 0.1, "square")
    assert len(square.barcodes) > 3 * len(spots.barcodes)


def test_a_given_scale_wins_over_the_files_with_a_warning(slide_file, capsys):
    spots = laid(Request(slide_file, um_per_px=0.25), opened(4000, 2000, 0.25, 0.5), thumbnail(200, 400), 0.1)
    assert spots.um_per_fullres_px == 0.25 and spots.pitch_fullres_px == 400
    assert "0.25 um per px, the file says 0.5; the former is used" in capsys.readouterr().out


def test_glass_and_unknown_scale_are_refused(slide_file):
    with pytest.raises(ValueError, match=r"no tissue found under a grid of 200.0 px; draw it"):
        laid(Request(slide_file), opened(4000, 2000, metadata=0.5), thumbnail(200, 400, np.s_[:0]), 0.1)
    with pytest.raises(ValueError, match=r"a.svs: its scale is not known .*; give --um_per_px$"):
        laid(Request(slide_file), opened(4000, 2000), thumbnail(200, 400), 0.1)


def test_a_mask_stands_in_for_the_tissue_found_and_thins_positions_out(slide_file, folder, tmp_path):
    marks = np.zeros((100, 200), np.uint8)
    marks[:, :50] = 1
    Image.fromarray(marks).save(tmp_path / "mask.png")
    request = Request(slide_file, mask=tmp_path / "mask.png")
    spots = laid(request, opened(4000, 2000, metadata=0.5), thumbnail(200, 400), 0.1)
    assert 0 < spots.xy_fullres_px[:, 0].max() < 1100
    width, height = Image.open(layout.plan(Request(folder)).picture).size
    small = thumbnail(height, width)
    Image.fromarray(small[..., 0] * (np.arange(width) < width / 2)).save(tmp_path / "left.png")
    every = laid(Request(folder), opened(width, height), small)
    left = laid(Request(folder, mask=tmp_path / "left.png"), opened(width, height), small)
    assert 0 < len(left.barcodes) < len(every.barcodes)
    assert (left.xy_picture_px[:, 0] <= width / 2).all() and left.pitch_fullres_px == every.pitch_fullres_px


def test_a_hires_picture_is_smaller_than_the_positions_mean(folder):
    planned = layout.plan(Request(folder, name="P03_1"))
    assert planned.picture_scale == 0.5 and planned.um_per_picture_px == pytest.approx(2, rel=1e-3)
    width, height = Image.open(planned.picture).size
    spots = layout.lay(planned, opened(width, height), thumbnail(height, width), 1.0, "hexagonal")
    expected = visium.tissue_spots(folder)[0]
    assert spots.barcodes.tolist() == expected.index.tolist()
    np.testing.assert_array_equal(spots.xy_picture_px * 2, expected[["x_fullres_px", "y_fullres_px"]])
    assert spots.pitch_fullres_px == visium.pitch_fullres_px(expected)
    assert {path.name for path in planned.files} > {"tissue_hires_image.png", "filtered_feature_bc_matrix.h5"}


def test_spots_outside_the_picture_are_counted_and_left_out(folder, capsys):
    width, height = Image.open(layout.plan(Request(folder)).picture).size
    spots = laid(Request(folder, name="P03_1"), opened(width // 2, height), thumbnail(height, width // 2))
    assert 0 < len(spots.barcodes) < 70
    said = f"P03_1: {70 - len(spots.barcodes)} of 70 spots lie outside the picture"
    assert said in capsys.readouterr().out


@pytest.mark.parametrize("name", ["my spots.csv", "spots.txt"])
def test_a_positions_file_may_have_any_name(folder, tmp_path, name):
    original = next((folder / "spatial").glob("tissue_positions*"))
    shutil.copy(original, tmp_path / name)
    assert layout.read_position_file(tmp_path / name).equals(visium.read_positions(folder))


def test_a_folder_without_a_picture_is_refused(folder):
    (folder / "spatial" / "tissue_hires_image.png").unlink()
    with pytest.raises(ValueError, match=r"expected a full-resolution picture or tissue_hires_image.png"):
        layout.plan(Request(folder))


def test_what_was_measured_follows_the_spots_asked_for(folder):
    source = visium.read_slice(folder)
    spots, wanted = source.spots.index.to_numpy(str)[::-2], [source.genes[3], "NO_GENE", source.genes[0]]
    found = measured.read_measured(folder, wanted, spots, 1e9)
    dense = source.counts.toarray()[::-2]
    np.testing.assert_array_equal(found.counts, np.column_stack([dense[:, 3], 0 * dense[:, 0], dense[:, 0]]))
    np.testing.assert_array_equal(found.total_counts, dense.sum(1))
    assert found.measured.tolist() == [True, False, True]
    by_id = measured.read_measured(folder, [f"{source.gene_ids[3]}.7", "NO_GENE", source.gene_ids[0]], spots, 1e9)
    np.testing.assert_array_equal(by_id.counts, found.counts)
    in_spans = measured.read_measured(folder, wanted, spots, 4000)
    np.testing.assert_array_equal(in_spans.counts, found.counts)
    assert in_spans.content == found.content
    (folder / "filtered_feature_bc_matrix.h5").unlink()
    assert measured.read_measured(folder, wanted, spots, 1e9) is None
