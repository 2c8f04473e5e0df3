"""Maps of genes over the H&E: which panels, in which range, of which size."""

import numpy as np
import pytest
from matplotlib.collections import EllipseCollection

from utils.files.atomic import write_figure
from utils.report.spot_maps import spot_maps
from utils.report.spots import SpotsOnImage

XY = np.array([[10.0, 20], [30, 20], [50, 60]])


def spots(image=None, um_per_px=None, scale=1.0):
    """Three spots of a diameter of 8 px, in pixels of the image."""
    return SpotsOnImage(
        name="P1",
        image=image,
        image_scale=scale,
        xy_fullres_px=XY / scale,
        spot_diameter_px=8 / scale,
        barcodes=["a", "b", "c"],
        um_per_fullres_px=None if um_per_px is None else um_per_px * scale,
    )


def discs(axes):
    return next(c for c in axes.collections if isinstance(c, EllipseCollection))


@pytest.mark.parametrize("scale", [1.0, 0.25])
def test_measured_and_predicted_share_one_range_and_true_sizes(tmp_path, scale):
    image = np.random.default_rng(0).integers(0, 255, size=(80, 70, 3), dtype=np.uint8)
    panels = {"measured": np.array([0.0, 5, np.nan]), "predicted": np.array([1.0, 2, 3])}
    figure = spot_maps(spots(image, um_per_px=5, scale=scale), panels, "GENE", "counts")
    histology, measured, predicted = figure.axes[:3]
    assert [axes.get_title(loc="left") for axes in figure.axes[:3]] == ["H&E", "measured", "predicted"]
    assert discs(measured).get_clim() == discs(predicted).get_clim()
    np.testing.assert_allclose(discs(measured).get_clim(), np.percentile([0, 5, 1, 2, 3], [0, 99]))
    np.testing.assert_array_equal(discs(measured).get_offsets(), XY[:2], "what was not measured is not drawn")
    assert discs(predicted).get_widths().tolist() == [8, 8, 8]
    assert not histology.collections and histology.get_xlabel() == "50 µm"
    top, bottom = sorted(histology.get_ylim(), reverse=True)
    assert histology.yaxis_inverted() and top > 60 > 20 > bottom
    write_figure(tmp_path / "map.png", figure)


@pytest.mark.parametrize("value", [2.0, np.nan])
def test_maps_without_image_of_a_flat_or_missing_gene(tmp_path, value):
    panels = {"measured": np.full(3, value), "predicted": np.full(3, value)}
    figure = spot_maps(spots(), panels, "GENE", "counts")
    assert [axes.get_title(loc="left") for axes in figure.axes[:2]] == ["measured", "predicted"]
    assert figure.axes[0].get_xlabel() == "x (image px)"
    write_figure(tmp_path / "map.png", figure)


def test_the_deviation_has_a_range_of_its_own_from_zero(tmp_path):
    panels, std = {"predicted": np.array([5.0, 6, 7])}, np.array([0.5, 0.6, 0.7])
    figure = spot_maps(spots(), panels, "GENE", "counts", std)
    predicted, deviation = figure.axes[:2]
    assert deviation.get_title(loc="left") == "prediction std"
    assert discs(predicted).get_clim()[0] == 5 and discs(deviation).get_clim()[0] == 0
    assert discs(deviation).get_clim()[1] == pytest.approx(np.percentile(std, 99))
    write_figure(tmp_path / "map.png", figure)
