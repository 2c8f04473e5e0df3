"""Lattices of spots: pitch by hand, stated places held against the pixels, places measured from the pixels alone."""

import numpy as np
import pytest
from spaceranger_folders import refused

from utils.slices.lattice import array_places, fit_lattice, is_staggered

SQUARE = np.array([(r, c) for r in range(6) for c in range(7)])
VISIUM = np.array([(r, c) for r in range(6) for c in range(r % 2, 14, 2)])
STEPS = {"square": (1.0, 1.0), "visium": (np.sqrt(3) / 2, 0.5), "mirrored": (1.0, -1.0)}


def pixels(places, pitch=100.0, step=(1.0, 1.0), turn=0.0):
    """Pixels (S, 2) of places (row, column): pitch * step * place, turned by an angle in radians."""
    row, col = np.array(places, float).T
    x, y = pitch * step[1] * col, pitch * step[0] * row
    cos, sin = np.cos(turn), np.sin(turn)
    return np.column_stack([cos * x - sin * y + 50, sin * x + cos * y])


def test_is_staggered():
    assert is_staggered(VISIUM)
    assert not is_staggered(SQUARE)
    assert not is_staggered([(0, 0), (0, 2), (2, 4)])  # even rows alone
    assert is_staggered(VISIUM + np.array([0, 1])), "wherever rows and columns are counted from"
    assert not is_staggered([*VISIUM, (0, 1)])


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(("places", "step"), [(SQUARE, "square"), (VISIUM, "visium"), (SQUARE, "mirrored")])
def test_pitch_survives_turns_holes_and_rounding(places, step, seed):
    rng = np.random.default_rng(seed)
    pitch = rng.uniform(5, 400)
    xy = pixels(places, pitch, STEPS[step], turn=rng.uniform(0, 2 * np.pi))
    kept = rng.permutation(len(places))[: len(places) // 2]
    found = fit_lattice("x", xy[kept], places[kept])
    assert found.pitch_px == pytest.approx(pitch, rel=1e-9) and not found.measured
    assert found.mirrored == (step == "mirrored") and found.staggered == (step == "visium")
    np.testing.assert_array_equal(found.array, places[kept])
    assert fit_lattice("x", xy.round(), places).pitch_px == pytest.approx(pitch, abs=0.5)


def test_pitch_of_few_spots():
    for places, wanted in (([(0, 0), (0, 1)], 100), ([(0, 0), (0, 1), (0, 5), (0, 9)], 100)):
        assert fit_lattice("x", pixels(places), np.array(places)).pitch_px == pytest.approx(wanted)
    places = np.array([(0, 0), (0, 2), (0, 4)])
    assert fit_lattice("x", pixels(places, step=STEPS["visium"]), places).pitch_px == pytest.approx(100)
    places = np.array([(0, 0), (1, 1), (2, 2)])
    assert fit_lattice("x", pixels(places, turn=0.3), places).pitch_px == pytest.approx(100 * np.sqrt(2))
    assert not any(
        fit_lattice("x", pixels([(0, 0), place]), np.array([(0, 0), place])).mirrored for place in SQUARE[1:]
    )
    refused("two spots or more", fit_lattice, "x", np.zeros((1, 2)), np.zeros((1, 2), int))


@pytest.mark.parametrize(("places", "step"), [(SQUARE, "square"), (VISIUM, "visium")])
@pytest.mark.parametrize("kind", ["shuffled", "running", "two swapped", "one wrong", "every other", "all the same"])
def test_places_that_do_not_fit_are_measured(places, step, kind, rng):
    places = places[rng.permutation(len(places))[:-8]]  # holes, as of bins dropped before rows are numbered
    xy, number = pixels(places, 137.0, STEPS[step], turn=0.02), np.arange(len(places))
    stated = places.copy()
    if kind == "shuffled":
        stated = rng.permutation(places)
    elif kind == "running":
        stated = np.column_stack([number // 6, number % 6])
    elif kind == "two swapped":
        stated[[3, 20]] = places[[20, 3]]
    elif kind == "one wrong":
        stated[5] += (0, 40)
    elif kind == "every other":
        stated = 2 * places
    else:
        stated[:] = 1
    found = fit_lattice("x", xy, stated)
    assert found.measured and found.pitch_px == pytest.approx(137.0, rel=1e-6)
    assert found.staggered == (step == "visium") and len(np.unique(found.array, axis=0)) == len(places)


@pytest.mark.parametrize(("places", "step"), [(SQUARE, "square"), (VISIUM, "visium")])
@pytest.mark.parametrize("kind", ["in pixels", "skewed", "stretched"])
def test_places_of_no_known_array_are_measured(places, step, kind):
    """They fit the pixels exactly, and the area of a place is not that of a spot."""
    xy = pixels(places, 137.0, STEPS[step])
    row, column = places.T
    other = {"in pixels": xy[:, ::-1].round().astype(int), "stretched": np.column_stack([3 * row, column])}
    skewed = (column - row) // 2 if step == "visium" else column + row
    stated = other.get(kind, np.column_stack([row, skewed]))
    found = fit_lattice("x", xy, stated)
    assert found.measured and found.staggered == (step == "visium") and found.pitch_px == pytest.approx(137.0)


@pytest.mark.parametrize("chosen", ["every second row", "odd numbers", "rows backwards", "columns first"])
def test_visiums_array_however_it_is_numbered_and_cut(chosen):
    places = np.array([(row, column) for row in range(12) for column in range(row % 2, 30, 2)])
    kept = places[:, 0] % 2 == 0 if chosen == "every second row" else np.ones(len(places), bool)
    stated = {"odd numbers": places + np.array([1, 0]), "rows backwards": (11, 0) + (-1, 1) * places}
    stated |= {"columns first": places[:, ::-1]}
    found = fit_lattice("x", pixels(places, 100.0, STEPS["visium"], turn=0.4)[kept], stated.get(chosen, places)[kept])
    assert found.staggered and not found.measured and found.pitch_px == pytest.approx(100.0)


def test_scattered_spots_keep_places_that_fit(rng):
    places = np.array([(row, column) for row in range(40) for column in range(40)])
    few = places[rng.permutation(len(places))[:12]]
    found = fit_lattice("x", pixels(few, 100.0), few)
    assert not found.measured and found.pitch_px == pytest.approx(100.0)
    np.testing.assert_array_equal(found.array, few)


def test_hand_printed_arrays_wobble(rng):
    """As those of the HER2+ sections, one spot of which lies .30 pitches off: their places are kept."""
    places = np.array([(r, c) for r in range(16) for c in range(16)])
    xy = pixels(places, 290.0) + rng.normal(0, 0.07 * 290, (256, 2))
    found = fit_lattice("x", xy, places)
    assert not found.measured and found.pitch_px == pytest.approx(290.0, rel=0.01)


def test_an_offset_numbering_is_no_square_array():
    """Columns counted 0, 1, 2, ... in every row of a hexagonal array: the fit leaves each spot .27 pitches off."""
    places = np.array([(r, c) for r in range(10) for c in range(10)])
    xy = np.column_stack([100.0 * places[:, 1] + 50 * (places[:, 0] % 2), 50 * np.sqrt(3) * places[:, 0]])
    found = fit_lattice("x", xy, places)
    assert found.measured and found.staggered and found.pitch_px == pytest.approx(100.0)


def test_without_stated_places_they_are_measured():
    found = fit_lattice("x", pixels(VISIUM, 100, STEPS["visium"]))
    assert found.measured and found.staggered and not found.mirrored
    assert found.pitch_px == pytest.approx(100)
    shift = (found.array - VISIUM)[0]
    np.testing.assert_array_equal(found.array - shift, VISIUM)


def test_what_is_refused(rng):
    twice = np.concatenate([pixels(SQUARE), pixels(SQUARE)])
    places = np.concatenate([SQUARE, SQUARE])
    assert "found 2 at x 50, y 0; several sections" in refused("a.csv: ", fit_lattice, "a.csv", twice, places)
    scattered = rng.uniform(0, 100, (60, 2))
    refused("expected spots on a square or a staggered array", array_places, "x", scattered)
    refused("expected spots on a square or a staggered array", fit_lattice, "x", scattered)
    message = refused(
        "places that fit the pixels, found the spot at row", fit_lattice, "x", scattered, np.arange(120).reshape(60, 2)
    )
    assert "take places and pixels from one file" in message
    refused("three spots or more", array_places, "x", np.zeros((2, 2)))
