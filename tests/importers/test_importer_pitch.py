"""The pitch in um: of several statements the one that fits the spots, whatever the others state."""

import numpy as np
import pytest
from spaceranger_folders import refused

from utils.importers import pitch
from utils.slices.lattice import Lattice


def lattice(pitch_px, staggered=False):
    return Lattice(np.zeros((2, 2), int), pitch_px, staggered, False, False)


def stated(pitch_px, estimate=None, embedded=None, file=None, distance=None, bin_um=None):
    found = pitch.pixel_size("estimate", estimate, "estimate") + pitch.pixel_size("embedded", embedded, "image file")
    found += pitch.pixel_size("a.tif", file, "image file") + pitch.distance("inter_spot_dist", distance, pitch_px)
    return found + pitch.distance("bin_size_um", bin_um, pitch_px)


NAN = float("nan")


@pytest.mark.parametrize(
    ("pitch_px", "sizes", "wanted"),
    [
        (256, {"estimate": 0.5}, 128),
        (256, {"estimate": 0.5, "distance": 2.0}, 128),  # of the bins that were pooled: .0078 um per px
        (256, {"estimate": 0.5, "distance": 16.0}, 128),
        (256, {"estimate": 0.5, "distance": NAN, "embedded": None}, 128),
        (256, {"file": 0.5, "distance": 2.0}, 128),
        (290, {"distance": 200}, 200),
        (290, {"distance": 200, "embedded": 0.26}, 200),  # .26 would be 75 um, of no array
        (290, {"distance": 200, "embedded": 0.26, "file": 0.26}, 200),  # one origin, stated twice
        (290, {"distance": 200, "estimate": 0.69, "embedded": 0.26}, 200),
        (290, {"distance": 200, "embedded": 2540.000115}, 200),
        (290, {"distance": 200, "estimate": 0.000469}, 200),
        (32, {"bin_um": 16, "estimate": 0.5}, 16),
        (32.2, {"bin_um": 16, "estimate": 0.5}, 16),  # a distance that agrees is exact
        (150, {"estimate": 1.0}, 150),  # of no known array, but all there is
        (150, {"estimate": 1.0, "embedded": 1.02, "distance": 100}, 150),
    ],
)
def test_the_statement_that_fits_a_square_array(pitch_px, sizes, wanted):
    found = pitch.choose_pitch_um("x", lattice(pitch_px), None, stated(pitch_px, **sizes))
    assert found == pytest.approx(wanted)


def test_a_staggered_array_is_visiums_and_a_given_pitch_is_taken():
    sizes = stated(200, estimate=2.0, distance=200)
    assert pitch.choose_pitch_um("x", lattice(200, staggered=True), None, sizes) == 100
    assert pitch.choose_pitch_um("x", lattice(200, staggered=True), 55.0, sizes) == 55


@pytest.mark.parametrize("sizes", [{}, {"estimate": 2540.0}, {"distance": 2.0}, {"embedded": 0.0004, "file": 30.0}])
def test_nothing_plausible_is_refused(sizes):
    refused("a.h5ad: .*use --spot_pitch_um", pitch.choose_pitch_um, "a.h5ad", lattice(256), None, stated(256, **sizes))


def test_what_is_compared_with_the_spots():
    """Sizes that no microscope has are ignored in silence; distances are statements about the array."""
    found = pitch.contradictions(stated(256, estimate=0.5, embedded=2540.0, distance=2.0))
    assert found == {"estimate": 0.5, "inter_spot_dist 2 um": 2 / 256}


@pytest.mark.parametrize(("value", "number"), [("0.5", 0.5), (3, 3.0), (np.float32(2), 2.0)])
def test_positive_numbers(value, number):
    assert pitch.positive(value) == number


@pytest.mark.parametrize("value", [None, "", "x", 0, -1, NAN, float("inf"), {}, [1, 2]])
def test_what_is_no_positive_number(value):
    assert pitch.positive(value) is None
