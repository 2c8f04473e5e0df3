"""utils.features.domain: statistics beside features, calibration by validation slices or left-out train slices."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from model.domain import N_STATISTICS, tile_statistics
from utils.features import domain


@pytest.mark.parametrize("width", [16, 43, 64])
@pytest.mark.parametrize("views", [(), (3,)])
def test_statistics_go_beside_the_features_and_come_back(width, views):
    tiles, features = torch.rand(5, 3, 32, 32), torch.randn(5, *views, 7, width)
    kept = domain.with_statistics(features, tiles).numpy()
    assert kept.shape == (5, *views, 7 + -(-N_STATISTICS // width), width)
    found, statistics = domain.split_statistics(kept)
    np.testing.assert_array_equal(found, features)
    np.testing.assert_allclose(statistics, tile_statistics(tiles), rtol=1e-6)


def slice_of(*parts):
    """A slice with so many spots of each part."""
    part = np.concatenate([np.full(n, name) for name, n in parts])
    return SimpleNamespace(rows_of=lambda name: np.flatnonzero(part == name), n=len(part))


def fitted(rng, *slices, shift=0.0):
    made = [rng.normal(size=(s.n, N_STATISTICS)).astype(np.float32) for s in slices]
    made[-1] += shift
    return domain.fit(slices, made, seed=0), made


def test_validation_slices_calibrate_where_there_are_any(rng):
    (found, name), made = fitted(rng, slice_of(("train", 300)), slice_of(("val", 400)), shift=0.5)
    assert name == "validation slices"
    score, slide = domain.scores(made[1], found)
    assert (score > 1).mean() == pytest.approx(0.01, abs=0.005) and slide < 1 / 1.2
    far, slide = domain.scores(made[1] + 3, found)
    assert (far > 1).all() and slide > 1
    assert {"mean", "axes", "bank", "limit", "slide_limit"} == set(found)


def test_without_them_each_train_slice_is_left_out_in_turn(rng):
    """A validation strip lies in a train slice: its spots are nearer than those of a new slice."""
    strips = [slice_of(("train", 200), ("val", 40)) for _ in range(3)]
    (found, name), _ = fitted(rng, *strips)
    assert name == "left-out train slices"
    apart, _ = fitted(rng, *strips, shift=2.0)
    assert apart[0]["limit"] > 1.5 * found["limit"]
    (_, name), _ = fitted(rng, strips[0])
    assert name == "validation strip of the train slice"


def test_few_spots_give_finite_scores(rng):
    (found, _), made = fitted(rng, slice_of(("train", 6)), slice_of(("val", 3)))
    score, slide = domain.scores(made[1], found)
    assert np.isfinite(score).all() and np.isfinite(slide)
