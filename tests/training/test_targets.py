"""targets.py: what training learns from, against the plain formulas on all slices at once, and scikit-learn's PCA."""

import numpy as np
import pytest
from sklearn.decomposition import PCA
from tiny_runs import data_flags, row

from utils.evaluation import metrics
from utils.features import dataset
from utils.files.arrays import ArrayStore
from utils.genes import panels as gene_panels
from utils.training import targets


@pytest.fixture
def slices(prepared, monkeypatch):
    """Two train slices, of which the first has a validation strip and the second lacks a gene, and one to validate on;
    gene 17 has no count anywhere."""
    rows = row("P01_1"), row("P02_1"), row("P03_1", "val")
    found = [dataset.load_slice(one, data_flags(prepared), ("target",), one.slice == "P01_1") for one in rows]
    found[1].panels["target"].measured[4] = False
    as_read = gene_panels.Panel.read_counts
    monkeypatch.setattr(gene_panels.Panel, "read_counts", lambda panel: as_read(panel) * (np.arange(20) != 17))
    return found


def plain_scaled(one, scale):
    """(S, G) float64 of one slice, NaN where not measured."""
    panel = one.panels["target"]
    return np.where(panel.measured, metrics.to_scale(scale, panel.read_counts(), one.total_counts), np.nan)


def train_rows(slices, values):
    return np.concatenate([own[one.rows_of("train")] for one, own in zip(slices, values, strict=True)])


@pytest.mark.parametrize("scale", metrics.SCALES)
@pytest.mark.parametrize("gib", [1.0, 1e-9])
def test_targets_are_those_of_the_plain_formula(slices, tmp_path, scale, gib):
    """In groups that do not divide the genes."""
    target, mean, sd = targets.standardised(slices, scale, ArrayStore(gib, tmp_path))
    expected = [plain_scaled(one, scale) for one in slices]
    train_values = train_rows(slices, expected)
    expected_mean, expected_sd = np.nanmean(train_values, axis=0), np.maximum(np.nanstd(train_values, axis=0), 1e-6)
    assert isinstance(target, np.memmap) == (gib < 1) and target.dtype == np.float32
    np.testing.assert_allclose(mean, expected_mean, rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(sd, expected_sd, rtol=1e-5)
    whole = (np.concatenate(expected) - expected_mean) / expected_sd
    np.testing.assert_allclose(target, whole, rtol=1e-4, atol=1e-4)
    assert np.isnan(target[70:140, 4]).all() and np.isnan(target).sum() == 70 and not target[:, 17].any()


def test_depth_and_fractions_are_those_of_the_train_spots_that_measured_the_gene(slices):
    depth, fraction = targets.train_depth(slices)
    train = [
        (one.panels["target"].read_counts()[rows], one.total_counts[rows])
        for one in slices[:2]
        if len(rows := one.rows_of("train"))
    ]
    assert depth == np.median(np.concatenate([total for _, total in train])) > 0
    pooled = sum(counts.sum(0) for counts, _ in train) / sum(total.sum() for _, total in train)
    pooled[4] = train[0][0][:, 4].sum() / train[0][1].sum()
    np.testing.assert_allclose(fraction, pooled)
    assert fraction[17] == 0 and fraction.sum() < 1


def test_validation_is_judged_by_the_residuals_of_whole_slices(slices):
    found = targets.validation_residuals(slices)
    assert [part.shape for part in found] == [(17, 20), (0, 20), (70, 20)]
    for one, part in zip(slices, found, strict=True):
        expected = plain_scaled(one, "residuals")[one.rows_of("val")]
        assert part.dtype == np.float32
        np.testing.assert_allclose(part, expected, rtol=1e-5, atol=1e-6)
    slices[2].panels["target"].measured[2] = False
    assert np.isnan(targets.validation_residuals(slices)[2]).sum() == 70


def standardised_residuals(slices):
    """Train spots' residuals (n, G), genes standardised, 0 where not measured."""
    train_values = train_rows(slices, [plain_scaled(one, "residuals") for one in slices])
    return np.nan_to_num(
        (train_values - np.nanmean(train_values, axis=0)) / np.maximum(np.nanstd(train_values, axis=0), 1e-6)
    )


def test_components_are_those_of_scikit_learn(slices):
    z = standardised_residuals(slices)
    pca = PCA(6, svd_solver="full").fit(z)
    found = targets.components(slices, 6)
    np.testing.assert_allclose(found.basis.T @ found.basis, np.eye(6), atol=1e-8)
    np.testing.assert_allclose(np.abs(np.diag(found.basis.T @ pca.components_.T)), 1, atol=1e-5)
    np.testing.assert_allclose(found.score_sd, pca.transform(z).std(axis=0), rtol=1e-5)
    scores = found.scores(train_rows(slices, [targets.residuals(one) for one in slices]))
    signs = np.sign(np.diag(found.basis.T @ pca.components_.T))
    np.testing.assert_allclose(scores, signs * pca.transform(z) / pca.transform(z).std(axis=0), rtol=1e-3, atol=1e-3)


def test_scores_have_deviation_one_and_count_as_in_the_genes(slices, tmp_path):
    found = targets.components(slices, 5)
    assert np.mean(found.weights**2) == pytest.approx(1) and (np.diff(found.weights) < 0).all()
    np.testing.assert_allclose(found.weights / found.weights[0], found.score_sd / found.score_sd[0])
    train_values = targets.train_scores(slices, found, ArrayStore(1.0, tmp_path))
    assert (
        train_values.shape == (sum(len(one.rows_of("train")) for one in slices), 5) and train_values.dtype == np.float32
    )
    np.testing.assert_allclose(train_values.mean(axis=0), 0, atol=1e-5)
    np.testing.assert_allclose(train_values.std(axis=0), found.weights, rtol=1e-4)


@pytest.mark.parametrize("gib", [1.0, 1e-9])
def test_scores_are_of_the_train_spots_of_all_slices_in_turn(slices, tmp_path, gib):
    found = targets.components(slices, 3)
    train_values = targets.train_scores(slices, found, ArrayStore(gib, tmp_path))
    assert isinstance(train_values, np.memmap) == (gib < 1)
    own = [found.scores(targets.residuals(one)) * found.weights for one in slices]
    np.testing.assert_allclose(train_values, train_rows(slices, own), rtol=1e-5, atol=1e-6)


def test_no_more_components_than_the_genes_have(slices):
    """Of 20 genes one is flat; the others' components rebuild them all."""
    found = targets.components(slices, 100)
    assert found.basis.shape == (20, 19) and found.score_sd.min() > 0
    assert np.abs(found.basis[17]).max() < 1e-6
    train_values = train_rows(slices, [targets.residuals(one) for one in slices])
    rebuilt = found.scores(train_values) * found.score_sd @ found.basis.T
    np.testing.assert_allclose(rebuilt, standardised_residuals(slices), atol=1e-3)


def test_components_do_not_see_what_is_not_taught(slices):
    before = targets.components(slices, 4)
    alone = targets.components(slices[:2], 4)
    for name in ("mean", "sd", "score_sd"):
        np.testing.assert_array_equal(getattr(before, name), getattr(alone, name))
    assert not np.allclose(before.sd, targets.components(slices[:1], 4).sd)
