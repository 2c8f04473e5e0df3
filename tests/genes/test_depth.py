"""Counts downsampled to a common depth, against the distribution's moments and against scanpy."""

import anndata
import numpy as np
import pytest
import scanpy
import scipy.sparse as sp
from spaceranger_folders import refused

from utils.genes.panels import bin_tokens, downsample_counts, spot_seeds

DRAWS = 4000


def seeds(n):
    return spot_seeds("slice", np.arange(n).astype(str))


@pytest.mark.parametrize("rest", [0, 50])
def test_moments_are_those_of_the_multivariate_hypergeometric(rest):
    counts, depth = np.array([60, 0, 25, 10, 5]), 40
    total = counts.sum() + rest
    sampled, totals = downsample_counts(np.tile(counts, (DRAWS, 1)), np.full(DRAWS, total), depth, seeds(DRAWS))
    fraction = counts / total
    covariance = depth * (total - depth) / (total - 1) * (np.diag(fraction) - np.outer(fraction, fraction))
    found = np.cov(sampled.T)
    error = np.sqrt(np.diag(covariance) / DRAWS)  # of a mean
    assert (np.abs(sampled.mean(0) - depth * fraction) <= 4 * error).all()
    error_of_covariance = np.sqrt((covariance**2 + np.outer(np.diag(covariance), np.diag(covariance))) / DRAWS)
    assert (np.abs(found - covariance) <= 4 * error_of_covariance + 1e-12).all()
    assert (sampled <= counts).all() and (totals == depth).all()


def test_a_panel_of_all_genes_keeps_exactly_the_depth(rng):
    counts = rng.poisson(3.0, (200, 30)).astype(np.int32)
    total = counts.sum(1).astype(np.float64)
    thinned, totals = downsample_counts(counts, total, 80, seeds(200))
    np.testing.assert_array_equal(thinned.sum(1), np.minimum(total, 80))
    np.testing.assert_array_equal(totals, np.minimum(total, 80))
    assert thinned.dtype == counts.dtype and totals.dtype == total.dtype
    assert 0 < (total <= 80).sum() < 200
    np.testing.assert_array_equal(thinned[total <= 80], counts[total <= 80], "spots with fewer stay")


def test_the_distribution_is_that_of_scanpy_on_the_whole_matrix():
    """Both give the same fraction of each outcome; scanpy needs the other genes too, and has one seed for all spots."""
    panel, rest, depth, expected = np.array([2, 1]), 3, 3, []
    for seed in range(1000):
        whole = anndata.AnnData(sp.csr_matrix([[*panel, rest]], dtype=np.float32))
        scanpy.pp.downsample_counts(whole, counts_per_cell=depth, random_state=seed)
        expected.append(whole.X.toarray()[0, :2])
    found, _ = downsample_counts(np.tile(panel, (DRAWS, 1)), np.full(DRAWS, 6), depth, seeds(DRAWS))
    outcomes = np.unique(expected, axis=0)
    assert len(outcomes) == 6
    fractions = [[(draws == outcome).all(1).mean() for outcome in outcomes] for draws in (expected, found)]
    assert np.sum(fractions, axis=1) == pytest.approx(1)
    np.testing.assert_allclose(*fractions, atol=0.05)


def test_a_spots_counts_do_not_depend_on_other_spots_or_runs(rng):
    counts = rng.poisson(3.0, (50, 30))
    total, names = counts.sum(1) + 20, np.char.add("b", np.arange(50).astype(str))
    whole, _ = downsample_counts(counts, total, 60, spot_seeds("A", names))
    some = rng.permutation(50)[:20]
    part, _ = downsample_counts(counts[some], total[some], 60, spot_seeds("A", names[some]))
    np.testing.assert_array_equal(part, whole[some])
    other, _ = downsample_counts(counts, total, 60, spot_seeds("B", names))
    assert (other != whole).any(), "of another slice, another draw"
    assert len(set(spot_seeds("A", names)) | set(spot_seeds("B", names))) == 100


def test_counts_given_are_not_changed_and_none_are_made_up(rng):
    counts = rng.poisson(3.0, (9, 4))
    before, total = counts.copy(), counts.sum(1) + 500
    thinned, totals = downsample_counts(counts, total, 1, seeds(9))
    np.testing.assert_array_equal(counts, before)
    assert (thinned.sum(1) <= 1).all() and (totals == 1).all()
    empty, _ = downsample_counts(np.zeros((2, 3), np.int32), np.array([500, 5]), 10, seeds(2))
    assert not empty.any()
    assert downsample_counts(np.zeros((0, 3), np.int32), np.zeros(0), 10, seeds(0))[0].shape == (0, 3)


def test_bins_of_two_depths_become_alike(rng):
    """One tissue, once 15 times deeper: of 1000 counts a single one is in bin 3, so lower bins tell of depth alone."""
    share = rng.dirichlet(np.full(200, 0.2))
    shallow, deep = (rng.multinomial(depth, share, size=300) for depth in (1000, 15000))
    bins = [bin_tokens(one, one.sum(1)) for one in (shallow, deep)]
    bins.append(bin_tokens(*downsample_counts(deep, deep.sum(1), 1000, seeds(300))))
    lowest = [((one == 1) | (one == 2)).mean() for one in bins]
    assert lowest[0] == lowest[2] == 0 and lowest[1] > 0.1
    assert abs(bins[2].mean() - bins[0].mean()) < 0.03


def test_a_total_below_the_panels_sum_is_refused():
    refused(
        "found 25 below the 30 counts of its panel genes",
        downsample_counts,
        np.array([[10, 20]]),
        np.array([25]),
        5,
        seeds(1),
    )
