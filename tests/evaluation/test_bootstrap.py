"""bootstrap.py: blocks by hand, intervals by hand, and coverage where spots are alike."""

import numpy as np
import pytest
from scipy import stats
from scipy.ndimage import gaussian_filter

from utils.evaluation.bootstrap import block_bootstrap_interval, blocks


def grid(side):
    return np.stack(np.meshgrid(np.arange(side), np.arange(side)), axis=-1).reshape(-1, 2).astype(float)


def test_blocks_are_five_by_five_pitches_and_survive_rounded_positions():
    xy = np.round(grid(10) * 289.8 + np.random.default_rng(0).uniform(-9, 9, size=(100, 2)) + 1000)
    ids = blocks(xy, pitch=289.8)
    assert np.bincount(ids).tolist() == [25, 25, 25, 25]
    column, row = (grid(10) // 5).T
    assert len(set(zip(ids, column, row, strict=True))) == 4


def test_blocks_do_not_depend_on_unit_or_order():
    xy, order = grid(12), np.random.default_rng(1).permutation(144)
    ids = blocks(xy, 1.0)
    np.testing.assert_array_equal(blocks(xy * 0.55, 0.55), ids)
    np.testing.assert_array_equal(blocks(xy[order], 1.0), ids[order])
    with pytest.raises(ValueError, match="pitch"):
        blocks(xy, 0)


def test_equal_blocks_leave_no_width():
    assert block_bootstrap_interval(np.tile([0.0, 1.0], 50), np.repeat([0, 1], 50)) == (0.5, 0.5)


def test_blocks_of_one_size_give_the_interval_of_student():
    values = np.array([0.1, 0.5, 0.2, 0.9, 0.4, 0.8])
    low, high = block_bootstrap_interval(np.repeat(values, 3), np.repeat(np.arange(6), 3), n_draws=100_000)
    mean, half = values.mean(), stats.t.ppf(0.975, 5) * values.std(ddof=1) / 6**0.5
    np.testing.assert_allclose([low, high], [mean - half, mean + half], atol=0.01 * half)


def test_degrees_of_freedom_are_those_of_the_slices_that_vary():
    """One slice of four blocks, one of a hundred alike: half the interval of the first slice's mean."""
    ids = np.concatenate([np.arange(4), np.arange(100)])
    values, strata = np.concatenate([[0.0, 1, 3, 4], np.zeros(100)]), np.repeat(["a", "b"], [4, 100])
    both = block_bootstrap_interval(values, ids, n_draws=100_000, strata=strata)
    alone = block_bootstrap_interval(values[:4], ids[:4], n_draws=100_000)
    np.testing.assert_allclose(both, np.divide(alone, 2), atol=0.02)


def test_a_block_weighs_as_many_spots_as_it_has():
    """Blocks of 3 ones and 1 zero: the two equally likely draws of one block have means 1 and 0."""
    values, ids = np.array([1.0, 1, 1, 0]), np.array([0, 0, 0, 1])
    low, high = block_bootstrap_interval(values, ids, n_draws=100_000)
    assert (low + high) / 2 == pytest.approx(0.75)
    assert high - low == pytest.approx(2 * stats.t.ppf(0.975, 1) * 0.5, rel=0.01)


def test_a_single_block_is_resampled_by_spot():
    values = (np.arange(100) < 30).astype(float)
    low, high = block_bootstrap_interval(values, np.zeros(100, dtype=int))
    assert 0.15 < low < 0.3 < high < 0.45
    assert np.isnan(block_bootstrap_interval(np.array([1.0]), np.array([0]))).all(), "one spot has no interval"


def test_slices_count_alike_and_keep_their_own_blocks():
    """Slice means 1 and 0 of very different size: their mean is 1/2, whichever blocks of either are drawn."""
    values, strata = np.repeat([1.0, 0.0], [10, 90]), np.repeat(["a", "b"], [10, 90])
    ids = np.concatenate([np.arange(10), np.arange(90)])
    assert block_bootstrap_interval(values, ids, strata=strata) == (0.5, 0.5)
    assert block_bootstrap_interval(values, ids)[1] < 0.5, "pooled, the large slice decides"


def test_same_seed_same_interval_and_nan_is_not_hidden():
    values, ids = np.random.default_rng(2).normal(size=100), np.repeat(np.arange(10), 10)
    first = block_bootstrap_interval(values, ids, seed=3)
    assert first == block_bootstrap_interval(values, ids, seed=3) != block_bootstrap_interval(values, ids, seed=4)
    assert first[0] < values.mean() < first[1]
    values[0] = np.nan
    assert np.isnan(block_bootstrap_interval(values, ids)).all()
    with pytest.raises(ValueError, match="found 100, 99, 100"):
        block_bootstrap_interval(values, ids[1:])


@pytest.mark.parametrize("n_blocks", [(4,), (10,), (4, 60), (4, 60, 60), (30, 100)])
def test_coverage_of_few_blocks_and_of_slices_of_different_size(n_blocks):
    """Independent block effects about a true mean of 0, 400 times."""
    rng, covered = np.random.default_rng(0), 0
    strata, ids = np.repeat(np.arange(len(n_blocks)), n_blocks), np.concatenate([np.arange(n) for n in n_blocks])
    for draw in range(400):
        low, high = block_bootstrap_interval(rng.normal(size=len(ids)), ids, n_draws=400, seed=draw, strata=strata)
        covered += low <= 0 <= high
    assert 0.925 <= covered / 400 <= 0.98


def test_coverage_on_autocorrelated_slices_where_single_spots_fail():
    """A Gaussian field (alike over some two pitches) and as much noise on 20 x 20 spots; the true mean is 0."""
    rng, xy, n_slices = np.random.default_rng(5), grid(20), 400
    by_block, by_spot = blocks(xy, 1.0), np.arange(400)
    covered = np.zeros(2)
    for draw in range(n_slices):
        field = gaussian_filter(rng.normal(size=(40, 40)), 0.8)[10:30, 10:30].ravel() * 1.6 * np.sqrt(np.pi)
        values = field + rng.normal(size=400)
        for i, ids in enumerate([by_block, by_spot]):
            low, high = block_bootstrap_interval(values, ids, n_draws=400, seed=draw)
            covered[i] += low <= 0 <= high
    blockwise, spotwise = covered / n_slices
    assert blockwise >= 0.88
    assert spotwise < 0.75
