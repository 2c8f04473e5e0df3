"""Array places measured from pixels: a property of any turn, pitch, hole and wobble."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial import KDTree

from utils.slices.lattice import array_places

lattices = st.tuples(st.booleans(), st.floats(-np.pi, np.pi), st.floats(4, 400), st.integers(0, 2**32 - 1))


@settings(max_examples=40, deadline=None)
@given(lattices)
def test_neighbours_on_the_array_are_those_in_the_image(lattice):
    staggered, turn, pitch_px, seed = lattice
    rng = np.random.default_rng(seed)
    row, col = (axis.ravel() for axis in np.meshgrid(np.arange(30), np.arange(24), indexing="ij"))
    xy = np.column_stack([col + row % 2 / 2, row * np.sqrt(3) / 2]) if staggered else np.column_stack([col, row])
    there = np.linalg.norm(xy - rng.uniform(5, 20, 2), axis=1) > 4  # a hole, and scattered ones
    there &= rng.random(len(xy)) > 0.1
    cos, sin = np.cos(turn), np.sin(turn)
    xy = xy[there] @ np.array([[cos, sin], [-sin, cos]]) * pitch_px + rng.uniform(0, 999, 2)
    xy += rng.uniform(-0.04, 0.04, xy.shape) * pitch_px
    places = array_places("test", xy)
    assert places.min() >= 0 and (places[:, 0].min(), places[:, 1].min() // 2) == (0, 0)
    near = {tuple(pair) for pair in KDTree(xy).query_pairs(1.2 * pitch_px, output_type="ndarray")}
    step = np.abs(places[:, None] - places[None])
    if staggered:
        assert (places.sum(1) % 2 == 0).all()
        beside = ((step == [0, 2]) | (step == [1, 1])).all(-1)
    else:
        beside = step.sum(-1) == 1
    beside = {(i, j) for i, j in zip(*np.nonzero(beside), strict=True) if i < j}
    assert beside == near
