"""utils.evaluation.intervals: ranks known by hand, coverage of exchangeable values, genes that were not measured."""

import numpy as np
import pytest

from utils.evaluation.intervals import conformal_offsets, coverage


def test_the_ends_are_the_kth_smallest_and_the_kth_largest_error(rng):
    errors = rng.permutation(np.arange(1.0, 40)).reshape(39, 1)  # k = floor(40 x 0.05) = 2
    np.testing.assert_array_equal(conformal_offsets(errors), [[2], [38]])
    np.testing.assert_array_equal(conformal_offsets(errors, level=0.5), [[10], [30]])


def test_too_few_errors_give_no_interval(rng):
    assert np.isnan(conformal_offsets(rng.normal(size=(18, 2)))).all()
    assert np.isfinite(conformal_offsets(rng.normal(size=(19, 2)))).all()
    assert np.isnan(conformal_offsets(np.empty((0, 2)))).all()


def test_a_gene_that_some_slices_lack_has_the_ends_of_the_others(rng):
    errors = rng.normal(size=(100, 2))
    missing = np.vstack([errors, np.full((50, 2), np.nan)])
    missing[100:, 1] = 9
    found = conformal_offsets(missing)
    np.testing.assert_array_equal(found[:, 0], conformal_offsets(errors)[:, 0])
    assert found[1, 1] == 9


@pytest.mark.parametrize("n", [25, 60, 400])
def test_new_values_of_the_same_kind_are_covered_at_the_stated_rate(rng, n):
    """Skewed errors; the guarantee is of the mean over calibration sets, here 300 genes."""
    errors, new = rng.exponential(size=(2, n + 500, 300))[:, :, :]
    low, high = conformal_offsets(errors[:n])
    covered = coverage(new, low, high)
    exact = 1 - 2 * np.floor((n + 1) * 0.05) / (n + 1)
    assert covered.mean() == pytest.approx(exact, abs=0.012) and exact >= 0.9


def test_coverage_leaves_out_what_is_not_known():
    measured = np.array([[0.0, 5.0, np.nan], [np.nan, np.nan, np.nan]])
    low, high = np.array([-1.0, -1.0, -1.0]), np.array([1.0, 1.0, 1.0])
    np.testing.assert_array_equal(coverage(measured, low, high), [0.5, np.nan])
    with pytest.raises(ValueError, match="between 0 and 1"):
        conformal_offsets(measured, level=1.0)
