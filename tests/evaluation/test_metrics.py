"""metrics.py against SciPy, scanpy and cases known by hand."""

import numpy as np
import pytest
import scipy.stats

from utils.evaluation import metrics


def counts_of_a_slice(n_spots=60, n_genes=12, seed=0):
    """Raw counts with depths that differ tenfold: (S, G)."""
    rng = np.random.default_rng(seed)
    depth = rng.uniform(20, 200, size=(n_spots, 1))
    return rng.poisson(depth * rng.dirichlet(np.ones(n_genes), size=n_spots)).astype(float)


def test_pearson_agrees_with_scipy_and_marks_flat_genes():
    rng = np.random.default_rng(0)
    true = rng.poisson(3.0, size=(40, 3)).astype(float)
    pred = np.column_stack([true[:, :2] + rng.normal(size=(40, 2)), np.full(40, 0.1)])
    expected = [scipy.stats.pearsonr(pred[:, g], true[:, g]).statistic for g in range(2)]
    np.testing.assert_allclose(metrics.pearson_per_gene(pred, true), [*expected, np.nan], rtol=1e-12)


def test_pearson_keeps_signs_and_spreads_nan_over_its_gene_only():
    true = np.array([[1.0, 1, 1], [2, 2, 2], [3, 3, 4]])
    pred = np.array([[3.0, 1, 1], [2, np.nan, 2], [1, 3, 4]])
    np.testing.assert_allclose(metrics.pearson_per_gene(pred, true), [-1, np.nan, 1])


def test_pearson_of_large_numbers_in_half_precision_is_computed_in_double():
    true = np.arange(50, dtype=np.float16)[:, None] * 40
    np.testing.assert_allclose(metrics.pearson_per_gene(true, true), [1])


def test_pearson_per_spot_agrees_with_scipy():
    rng = np.random.default_rng(1)
    pred, true = rng.normal(size=(2, 5, 30))
    expected = [scipy.stats.pearsonr(p, t).statistic for p, t in zip(pred, true, strict=True)]
    np.testing.assert_allclose(metrics.scored_pearson_per_spot(pred, true), expected, rtol=1e-12)


def test_a_constant_prediction_scores_zero_and_a_flat_measurement_leaves():
    true = np.column_stack([[1.0, 2, 3, 4], [1, 2, 3, 4], [5, 5, 5, 5], [1, np.nan, 2, 3]])
    pred = np.column_stack([[1.0, 2, 3, 4], [7, 7, 7, 7], [1, 2, 3, 4], [1, 2, 3, 4]])
    np.testing.assert_allclose(metrics.scored_pearson_per_gene(pred, true), [1, 0, np.nan, np.nan])
    pred[0, 0] = np.nan
    np.testing.assert_allclose(metrics.scored_pearson_per_gene(pred, true)[0], 0)


def test_scored_pearson_per_spot_has_one_value_per_spot():
    true, pred = np.array([[1.0, 2, 3], [4, 4, 4], [1, 2, 3]]), np.array([[1.0, 2, 3], [1, 2, 3], [0, 0, 0]])
    np.testing.assert_allclose(metrics.scored_pearson_per_spot(pred, true), [1, np.nan, 0])


def test_spearman_averages_ties_as_scipy_does():
    rng = np.random.default_rng(2)
    pred, true = rng.poisson(2.0, size=(2, 50, 4)).astype(float)
    expected = [scipy.stats.spearmanr(pred[:, g], true[:, g]).statistic for g in range(4)]
    np.testing.assert_allclose(metrics.spearman_per_gene(pred, true), expected, rtol=1e-12)
    pred[0, 1] = np.nan
    assert np.isnan(metrics.spearman_per_gene(pred, true)).tolist() == [False, True, False, False]


def test_partial_pearson_is_the_correlation_of_what_regression_leaves():
    rng = np.random.default_rng(3)
    depth = rng.normal(size=80)
    pred, true = rng.normal(size=(2, 80, 3)) + depth[:, None]
    design = np.column_stack([np.ones(80), depth])

    def rest(y):
        return y - design @ np.linalg.lstsq(design, y, rcond=None)[0]

    expected = metrics.pearson_per_gene(rest(pred), rest(true))
    np.testing.assert_allclose(metrics.partial_pearson_per_gene(pred, true, depth), expected, rtol=1e-10)


def test_partial_pearson_of_the_covariate_itself_is_undefined_and_a_flat_covariate_takes_nothing_out():
    rng = np.random.default_rng(4)
    depth, true = rng.normal(size=30), rng.normal(size=(30, 1))
    assert np.isnan(metrics.partial_pearson_per_gene(3 * depth[:, None] + 1, true, depth)).all()
    pred = rng.normal(size=(30, 1))
    partial = metrics.partial_pearson_per_gene(pred, true, np.full(30, 2.0))
    np.testing.assert_allclose(partial, metrics.pearson_per_gene(pred, true))


def test_errors_and_ratio_of_deviations_by_hand():
    true, pred = np.array([[0.0, 5], [2, 5]]), np.array([[0.5, 5], [1.5, 8]])
    assert metrics.mse(pred, true) == pytest.approx((0.25 + 0.25 + 0 + 9) / 4)
    assert metrics.mae(pred, true) == pytest.approx((0.5 + 0.5 + 0 + 3) / 4)
    assert metrics.sd_ratio(pred, true) == pytest.approx(0.5), "the flat gene is left out"


def test_normalisation_divides_by_the_total_over_all_genes():
    counts, total = np.array([[1.0, 4], [0, 0]]), np.array([100, 0])
    np.testing.assert_allclose(metrics.counts_per_10k(counts, total), [[100, 400], [0, 0]])
    np.testing.assert_allclose(metrics.log1p_cp10k(counts, total), np.log1p([[100, 400], [0, 0]]))


def test_log1p_counts_per_10k_are_those_of_scanpy():
    import anndata
    import scanpy

    counts = counts_of_a_slice()
    data = anndata.AnnData(counts.copy())
    scanpy.pp.normalize_total(data, target_sum=1e4)
    scanpy.pp.log1p(data)
    np.testing.assert_allclose(metrics.log1p_cp10k(counts, counts.sum(axis=1)), data.X, rtol=1e-12)


@pytest.mark.parametrize("theta", [100, 10])
def test_residuals_equal_scanpy_on_the_whole_matrix_restricted_to_the_panel(theta):
    import anndata
    import scanpy

    counts = counts_of_a_slice()
    counts[0, 3] = 500  # beyond the clip at sqrt(n)
    data = anndata.AnnData(counts.copy())
    scanpy.experimental.pp.normalize_pearson_residuals(data, theta=theta)
    panel = [3, 0, 7]
    residuals = metrics.pearson_residuals(counts[:, panel], counts.sum(axis=1), theta=theta)
    np.testing.assert_allclose(residuals, data.X[:, panel], rtol=1e-10, atol=1e-12)
    assert residuals[0, 0] == np.sqrt(60)


def test_residuals_of_an_absent_gene_are_zero_and_of_a_missing_one_stay_missing():
    counts = counts_of_a_slice(n_genes=3)
    total = counts.sum(axis=1)
    counts[:, 1], counts[:, 2] = 0, np.nan
    residuals = metrics.pearson_residuals(counts, total)
    assert (residuals[:, 1] == 0).all() and np.isnan(residuals[:, 2]).all() and np.isfinite(residuals[:, 0]).all()


@pytest.mark.parametrize("scale", metrics.SCALES)
def test_no_scale_depends_on_the_order_of_spots(scale):
    counts = counts_of_a_slice()
    total, order = counts.sum(axis=1) + 10, np.random.default_rng(5).permutation(60)
    shuffled = metrics.to_scale(scale, counts[order], total[order])
    np.testing.assert_allclose(shuffled, metrics.to_scale(scale, counts, total)[order], rtol=1e-12)


def test_wrong_input_is_named():
    counts = np.ones((3, 2))
    with pytest.raises(ValueError, match="expected one of lognorm, residuals, counts, found 'log'"):
        metrics.to_scale("log", counts, np.full(3, 9))
    with pytest.raises(ValueError, match="sums over all genes, found 3 spots with less"):
        metrics.counts_per_10k(counts, np.ones(3))
    with pytest.raises(ValueError, match="negative"):
        metrics.counts_per_10k(-counts, np.ones(3))
    with pytest.raises(ValueError, match=r"found \(3, 2\) and \(3, 1\)"):
        metrics.mse(counts, counts[:, :1])


def test_residuals_are_inverted_to_log_counts(rng):
    """Where all spots have the depth that residuals are inverted at, the measured counts come back."""
    counts = rng.poisson([3.0, 40.0, 0.2], size=(60, 3)).astype(float)
    total = np.full(60, 5000.0)
    fraction = counts.sum(0) / total.sum()
    residuals = metrics.pearson_residuals(counts, total)
    assert np.abs(residuals).max() < np.sqrt(60), "none is clipped"
    found = metrics.to_lognorm("residuals", residuals, 5000.0, fraction)
    np.testing.assert_allclose(found, metrics.log1p_cp10k(counts, total), atol=1e-9)
    by_hand = metrics.to_lognorm("residuals", np.array([[0.0], [1.0], [-9.0]]), 1000.0, np.array([0.1]))
    np.testing.assert_allclose(by_hand[:, 0], np.log1p([1000, 10 * (100 + np.sqrt(200)), 0]))


def test_other_scales_as_log_counts():
    values = np.array([[1.0, -0.5]])
    np.testing.assert_array_equal(metrics.to_lognorm("lognorm", values, 0.0, np.zeros(2)), values)
    np.testing.assert_allclose(metrics.to_lognorm("counts", values, 0.0, np.zeros(2)), [[np.log(2), 0]])
