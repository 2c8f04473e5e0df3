"""baselines.py against scikit-learn and slow loops."""

import numpy as np
import pytest
from sklearn.linear_model import Ridge
from sklearn.neighbors import KNeighborsRegressor

from utils.evaluation import baselines, metrics


def linear_slices(n_slices, n_spots=60, width=8, n_genes=5, noise=0.5, seed=0):
    rng = np.random.default_rng(seed)
    weights = np.random.default_rng(99).normal(size=(width, n_genes))
    x = [rng.normal(size=(n_spots, width)) for _ in range(n_slices)]
    return x, [part @ weights + 3 + noise * rng.normal(size=(n_spots, n_genes)) for part in x]


def test_standardise_gives_mean_zero_and_deviation_one_and_does_not_blow_up_noise():
    features = np.random.default_rng(0).normal(5, 3, size=(80, 3)).astype(np.float16)
    features[:, 2] = 1.0
    features[0, 2] = 1.001
    done, small = baselines.standardise([features, features[:9]], 1, min_spots=64)
    assert done.dtype == np.float32
    np.testing.assert_allclose(done[:, :2].mean(axis=0), 0, atol=1e-6)
    np.testing.assert_allclose(done[:, :2].std(axis=0), 1, rtol=1e-5)
    assert np.abs(done[:, 2]).max() < 1.1
    np.testing.assert_allclose(small, done[:9], err_msg="too few spots for a mean and a deviation of their own")


@pytest.mark.parametrize("width", [8, 300])
@pytest.mark.parametrize("penalty", [0.5, 100.0])
def test_ridge_equals_scikit_learn_in_primal_and_dual(width, penalty):
    x, y = linear_slices(3, width=width)
    ridge = baselines.fit_ridge(x[:2], y[:2], x[2:], y[2:], penalties=[penalty])
    expected = Ridge(alpha=penalty).fit(np.concatenate(x[:2]), np.concatenate(y[:2])).predict(x[2])
    np.testing.assert_allclose(ridge.predict(x[2]), expected, rtol=1e-8, atol=1e-10)
    r = metrics.pearson_per_gene(expected, y[2]).mean()
    assert ridge.val_pcc == pytest.approx(r) and ridge.penalty == penalty


def test_ridge_takes_the_penalty_that_validates_best():
    x, y = linear_slices(4, width=40, noise=8.0)
    penalties = [1e-3, 30.0, 1e3, 1e5]
    fits = [baselines.fit_ridge(x[:2], y[:2], x[2:], y[2:], penalties=[penalty]) for penalty in penalties]
    chosen = baselines.fit_ridge(x[:2], y[:2], x[2:], y[2:], penalties=penalties)
    assert chosen.val_pcc == pytest.approx(max(fit.val_pcc for fit in fits))
    assert chosen.penalty == penalties[np.argmax([fit.val_pcc for fit in fits])]


def test_validation_genes_that_are_flat_or_missing_leave_and_nothing_left_takes_the_strongest_penalty():
    x, y = linear_slices(3)
    y[2][:, 0], y[2][:, 1] = 4.0, np.nan
    ridge = baselines.fit_ridge(x[:2], y[:2], x[2:], y[2:])
    assert ridge.val_pcc > 0.9
    y[2][:] = 4.0
    assert baselines.fit_ridge(x[:2], y[:2], x[2:], y[2:], penalties=[1.0, 10.0]).penalty == 10


def test_ring_features_equal_a_double_loop():
    rng = np.random.default_rng(1)
    column, row = np.meshgrid(np.arange(7), np.arange(6))
    xy = np.column_stack([(column + 0.5 * (row % 2)).ravel(), (row * np.sqrt(0.75)).ravel()]) * 137.0  # staggered
    xy = np.concatenate([xy[rng.random(42) < 0.8], [[9999, 9999]]])
    features = rng.normal(size=(len(xy), 3))
    expected = np.zeros((len(xy), 9))
    for i in range(len(xy)):
        away = np.linalg.norm(xy - xy[i], axis=1) / 137.0
        expected[i, :3] = features[i]
        for ring, members in enumerate([(away > 0) & (away <= 1.2), (away > 1.2) & (away <= 2.3)], start=1):
            if members.any():
                expected[i, 3 * ring : 3 * ring + 3] = features[members].mean(axis=0)
    found = baselines.ring_features(features, xy, pitch=137.0)
    np.testing.assert_allclose(found, expected, atol=1e-12)
    assert (found[-1, 3:] == 0).all(), "a lone spot has average neighbours"


def test_ring_features_of_a_single_spot_and_order_of_spots():
    assert baselines.ring_features(np.ones((1, 2)), np.zeros((1, 2)), 1.0).tolist() == [[1, 1, 0, 0, 0, 0]]
    rng = np.random.default_rng(2)
    xy, features, order = rng.uniform(0, 6, size=(40, 2)), rng.normal(size=(40, 3)), rng.permutation(40)
    found = baselines.ring_features(features, xy, 1.0)
    np.testing.assert_allclose(baselines.ring_features(features[order], xy[order], 1.0), found[order], atol=1e-12)


@pytest.mark.parametrize("cosine", [True, False])
def test_knn_equals_scikit_learn(cosine):
    x, y = linear_slices(3)
    knn = baselines.fit_knn(x[:2], y[:2], x[2:], y[2:], ks=(3, 7, 500), cosine=cosine)
    slow = KNeighborsRegressor(knn.k, metric="cosine" if cosine else "euclidean", algorithm="brute")
    expected = slow.fit(np.concatenate(x[:2]), np.concatenate(y[:2])).predict(x[2])
    np.testing.assert_allclose(knn.predict(x[2]), expected, rtol=1e-10)
    assert knn.k in (3, 7) and knn.val_pcc == pytest.approx(metrics.pearson_per_gene(expected, y[2]).mean())


def test_knn_is_capped_by_the_number_of_train_spots():
    x, y = linear_slices(2, n_spots=6)
    knn = baselines.fit_knn(x[:1], y[:1], x[1:], y[1:])
    assert knn.k == 6
    np.testing.assert_allclose(knn.predict(x[1]), np.tile(y[0].mean(axis=0), (6, 1)))


def test_depth_is_learnt_relative_to_the_slice():
    x, _ = linear_slices(3, width=4)
    depth = [part[:, 0] + level for part, level in zip(x, (2.0, 9.0, 5.0), strict=True)]
    fitted = baselines.fit_depth(x[:2], depth[:2], x[2:], depth[2:])
    predicted = fitted.predict(x[2])
    assert predicted.shape == (60, 1)
    assert np.corrcoef(predicted[:, 0], depth[2])[0, 1] > 0.99
    assert abs(predicted.mean()) < 0.5


def make_slice(x, y, seed):
    column, row = np.meshgrid(np.arange(10), np.arange(6))
    xy = np.column_stack([column.ravel(), row.ravel()]) * 100.0
    log_depth = np.random.default_rng(seed).normal(8, 1, size=60)
    (features,) = baselines.standardise([x], 1)
    rings = baselines.ring_features(features, xy, 100.0)
    return {"features": features, "rings": rings, "target": y, "log_depth": log_depth}


def test_all_baselines_predict_every_gene_and_learn_what_there_is():
    slices = [make_slice(x, y, seed) for seed, (x, y) in enumerate(zip(*linear_slices(4), strict=True))]
    rows = baselines.fit_baselines(slices[:2], slices[2:3])
    unseen = {key: slices[3][key] for key in ("features", "rings")}
    predicted = {row: predict(unseen) for row, predict in rows.items()}
    assert list(predicted) == ["mean", "depth", "ridge", "ridge_neighbours", "knn"]
    assert all(p.shape == (60, 5) and np.isfinite(p).all() for p in predicted.values())
    train_mean = np.concatenate([s["target"] for s in slices[:2]]).mean(axis=0)
    np.testing.assert_allclose(predicted["mean"], np.tile(train_mean, (60, 1)))
    assert (np.ptp(predicted["depth"], axis=1) == 0).all(), "one column for all genes"
    score = {row: metrics.scored_pearson_per_gene(p, slices[3]["target"]).mean() for row, p in predicted.items()}
    assert score["ridge"] > 0.95 and score["ridge_neighbours"] > 0.9 and score["knn"] > 0.4 and score["mean"] == 0


def test_a_gene_that_one_train_slice_lacks_is_learnt_from_the_others():
    slices = [make_slice(x, y, seed) for seed, (x, y) in enumerate(zip(*linear_slices(4), strict=True))]
    slices[0]["target"][:, 2] = np.nan
    predicted = {row: predict(slices[3]) for row, predict in baselines.fit_baselines(slices[:2], slices[2:3]).items()}
    np.testing.assert_allclose(predicted["mean"][:, 2], slices[1]["target"][:, 2].mean())
    assert metrics.pearson_per_gene(predicted["ridge"], slices[3]["target"])[2] > 0.9


def test_wrong_input_is_named():
    x, y = linear_slices(2)
    with pytest.raises(ValueError, match="found 1 and 0"):
        baselines.fit_ridge(x[:1], y[:1], [], [])
    with pytest.raises(ValueError, match=r"features \(60, 8\) and targets \(59, 5\)"):
        baselines.fit_ridge([x[0]], [y[0][1:]], x[1:], y[1:])
    y[0][0, 0] = np.nan
    with pytest.raises(ValueError, match="finite"):
        baselines.fit_knn(x[:1], y[:1], x[1:], y[1:])
