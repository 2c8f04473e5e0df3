"""ridge.py: predictions along few components of the target, against scikit-learn's Ridge and PCA."""

import numpy as np
import pytest
from sklearn.decomposition import PCA
from sklearn.linear_model import Ridge

from utils.evaluation.ridge import PENALTIES, RANKS, fit_ridge, validation_pcc

GENES, FACTORS = 12, 2


def low_rank_slices(n_slices, n_spots=60, width=8, noise=0.0, seed=0):
    """Features, and genes of very different sizes that two programmes of the features drive."""
    rng, fixed = np.random.default_rng(seed), np.random.default_rng(99)
    weights = fixed.normal(size=(width, FACTORS)) @ fixed.normal(size=(FACTORS, GENES))
    size = np.logspace(-2, 2, GENES)
    x = [rng.normal(size=(n_spots, width)) for _ in range(n_slices)]
    return x, [(part @ weights + noise * rng.normal(size=(n_spots, GENES)) + 3) * size for part in x]


def plain_low_rank(x_train, y_train, x, penalty, rank):
    """Ridge, then what the first principal components of the standardised target keep of it."""
    x_train, y_train = np.concatenate(x_train), np.concatenate(y_train)
    mean, sd = y_train.mean(axis=0), y_train.std(axis=0)
    pca = PCA(rank, svd_solver="full").fit((y_train - mean) / sd)
    predicted = (Ridge(alpha=penalty).fit(x_train, y_train).predict(x) - mean) / sd
    return pca.inverse_transform(pca.transform(predicted)) * sd + mean


@pytest.mark.parametrize("width", [8, 300])
@pytest.mark.parametrize("rank", [1, 3, 11])
def test_low_rank_predictions_are_those_of_scikit_learn(width, rank):
    x, y = low_rank_slices(3, width=width, noise=2.0)
    found = fit_ridge(x[:2], y[:2], x[2:], y[2:], penalties=[20.0], ranks=[rank])
    expected = plain_low_rank(x[:2], y[:2], x[2], 20.0, rank)
    np.testing.assert_allclose(found.predict(x[2]), expected, rtol=1e-6, atol=1e-8)
    assert found.rank == rank and found.val_pcc == pytest.approx(validation_pcc([expected], y[2:]))


def test_all_components_are_the_full_rank():
    x, y = low_rank_slices(3, noise=2.0)
    whole, full = (fit_ridge(x[:2], y[:2], x[2:], y[2:], ranks=[rank]) for rank in (GENES, None))
    np.testing.assert_allclose(whole.predict(x[2]), full.predict(x[2]), rtol=1e-8)
    assert full.rank is None and whole.penalty == full.penalty


def test_penalty_and_rank_that_validate_best_are_taken_together():
    x, y = low_rank_slices(4, width=40, noise=8.0)
    parts = x[:2], y[:2], x[2:], y[2:]
    single = {
        (penalty, rank): fit_ridge(*parts, penalties=[penalty], ranks=[rank]).val_pcc
        for penalty in (1.0, 100.0, 1e4)
        for rank in (1, 2, 4, None)
    }
    found = fit_ridge(*parts, penalties=(1.0, 100.0, 1e4), ranks=(1, 2, 4, None))
    assert (found.penalty, found.rank) == max(single, key=single.get)
    assert found.val_pcc == pytest.approx(max(single.values()))


def test_few_components_help_where_few_programmes_drive_noisy_genes():
    x, y = low_rank_slices(4, n_spots=40, width=30, noise=10.0)
    truth = low_rank_slices(4, n_spots=40, width=30)[1]
    full = fit_ridge(x[:2], y[:2], x[2:], truth[2:])
    found = fit_ridge(x[:2], y[:2], x[2:], truth[2:], ranks=(FACTORS, None))
    assert found.rank == FACTORS and found.val_pcc > full.val_pcc + 0.02


def test_of_equally_good_choices_the_strongest_penalty_and_the_first_rank():
    x, y = low_rank_slices(3)
    y[2][:] = 4.0  # nothing to validate on
    found = fit_ridge(x[:2], y[:2], x[2:], y[2:], ranks=RANKS)
    assert (found.penalty, found.rank, found.val_pcc) == (max(PENALTIES), RANKS[0], -np.inf)


def test_a_flat_gene_stays_flat_and_disturbs_no_other():
    x, y = low_rank_slices(3, noise=1.0)
    before = fit_ridge(x[:2], y[:2], x[2:], y[2:], penalties=[5.0], ranks=[3]).predict(x[2])
    flat = [np.column_stack([part, np.full(len(part), 7.0)]) for part in y]
    after = fit_ridge(x[:2], flat[:2], x[2:], flat[2:], penalties=[5.0], ranks=[3]).predict(x[2])
    np.testing.assert_allclose(after[:, :GENES], before, rtol=1e-8)
    np.testing.assert_allclose(after[:, GENES], 7.0)


def test_more_components_than_genes_are_all_of_them():
    x, y = low_rank_slices(3, noise=1.0)
    found, full = (fit_ridge(x[:2], y[:2], x[2:], y[2:], penalties=[5.0], ranks=[rank]) for rank in (40, None))
    np.testing.assert_allclose(found.predict(x[2]), full.predict(x[2]), rtol=1e-8)
