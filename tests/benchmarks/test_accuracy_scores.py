"""The paired bootstrap of accuracy.py against resampled spots, and on cases with a known answer."""

import numpy as np

from benchmarks.accuracy_scores import Resamples, block_correlations, pcc_draws, resample
from benchmarks.accuracy_table import interval
from utils.evaluation import metrics

N_GENES = 7


def made_up(rng, n_spots=40, n_genes=N_GENES, n_blocks=6, noise=1.0):
    """A slice: measured, predicted (S, G), block of each spot, with sizes that differ."""
    true = rng.gamma(1.0, 2.0, size=(n_spots, n_genes)) * 10.0 ** np.arange(n_genes)
    pred = true + noise * true.std(axis=0) * rng.normal(size=true.shape)
    member = np.unique(rng.integers(0, n_blocks, n_spots), return_inverse=True)[1]
    return true, pred, member


def spots_of(member, times):
    """Rows of a resampled slice: each spot as often as its block was drawn."""
    return np.repeat(np.arange(len(member)), times[member])


def slow_draws(preds, trues, drawn: Resamples):
    """Every draw with its spots and genes repeated, scored as any other table."""
    values = []
    for d, genes in enumerate(drawn.genes):
        chosen, means = np.repeat(np.arange(len(genes)), genes), []
        for p, t, member, times in zip(preds, trues, drawn.members, drawn.blocks, strict=True):
            rows = spots_of(member, times[d])
            r = metrics.scored_pearson_per_gene(p[rows][:, chosen], t[rows][:, chosen])
            means.append(r[~np.isnan(r)].mean())
        values.append(np.mean(means))
    return np.array(values)


def test_draws_are_those_of_repeated_spots_and_genes(rng):
    slices = [made_up(rng), made_up(rng, n_spots=60, n_blocks=9)]
    trues, preds, members = (list(each) for each in zip(*slices, strict=True))
    drawn = resample(members, N_GENES, n_draws=30, seed=3)
    np.testing.assert_allclose(pcc_draws(preds, trues, drawn), slow_draws(preds, trues, drawn), rtol=1e-9)


def test_flat_and_unknown_genes_are_scored_as_without_resampling(rng):
    true, pred, member = made_up(rng)
    true[:, 0], true[:, 1], pred[:, 2] = np.nan, 0.1, 0.3
    true[member != 0, 3] = 5.0  # flat wherever block 0 is not drawn
    drawn = resample([member], N_GENES, n_draws=40)
    r = block_correlations(pred, true, member, drawn.blocks[0])
    assert np.isnan(r[:, :2]).all() and (r[:, 2] == 0).all()
    missed = drawn.blocks[0][:, 0] == 0
    assert missed.any() and (np.isnan(r[:, 3]) == missed).all()
    for d in range(40):
        rows = spots_of(member, drawn.blocks[0][d])
        np.testing.assert_allclose(r[d], metrics.scored_pearson_per_gene(pred[rows], true[rows]), rtol=1e-8)


def test_numbers_far_from_zero_lose_no_digits(rng):
    true, pred, member = made_up(rng)
    drawn = resample([member], N_GENES, n_draws=20)
    near = pcc_draws([pred], [true], drawn)
    np.testing.assert_allclose(pcc_draws([pred * 1e-6 + 1e3], [true + 1e9], drawn), near, rtol=1e-5)


def test_a_difference_that_is_the_same_in_every_resample_has_an_interval_without_width(rng):
    true, _, member = made_up(rng)
    drawn = resample([member], N_GENES)
    perfect, opposite, constant = (pcc_draws([p], [true], drawn) for p in (true, -true, np.ones_like(true)))
    np.testing.assert_allclose(interval([perfect], [opposite]), [2, 2], rtol=1e-9)
    np.testing.assert_allclose(interval([perfect, opposite], [constant, constant]), [0, 0], atol=1e-9)
    np.testing.assert_allclose(interval([3 * true[:, 0] * 0 + 1], [true[:, 0] * 0 + 0.25]), [0.75, 0.75])


def test_a_clear_difference_excludes_zero(rng):
    true, good, member = made_up(rng, n_spots=200, n_blocks=20, noise=0.5)
    poor = true + 3 * true.std(axis=0) * rng.normal(size=true.shape)
    drawn = resample([member], N_GENES, n_draws=500)
    low, high = interval([pcc_draws([good], [true], drawn)], [pcc_draws([poor], [true], drawn)])
    measured = [metrics.scored_pearson_per_gene(p, true).mean() for p in (good, poor)]
    assert 0 < low < measured[0] - measured[1] < high


def test_two_methods_of_equal_worth_differ_by_an_interval_that_covers_zero():
    covered = []
    for seed in range(120):
        rng = np.random.default_rng(seed)
        true = rng.normal(size=(100, 20))
        ones, others = (true + 2 * rng.normal(size=true.shape) for _ in range(2))
        drawn = resample([np.arange(100) // 4], 20, n_draws=200, seed=seed)
        low, high = interval([pcc_draws([ones], [true], drawn)], [pcc_draws([others], [true], drawn)])
        covered.append(low <= 0 <= high)
    assert 0.9 <= np.mean(covered) <= 1.0  # genes and blocks both drawn: rather too wide than too narrow


def test_blocks_are_drawn_within_their_slice_and_are_the_same_for_a_seed(rng):
    members = [np.repeat([0, 1, 2], 4), np.zeros(5, int)]
    drawn, again = resample(members, 3, n_draws=50, seed=1), resample(members, 3, n_draws=50, seed=1)
    assert (drawn.blocks[0].sum(1) == 2).all() and (drawn.blocks[1].sum(1) == 4).all()  # one block: its spots are
    assert (drawn.genes.sum(1) == 2).all() and drawn.genes.shape == (50, 3)
    assert all((a == b).all() for a, b in zip(drawn.blocks, again.blocks, strict=True))
    assert (resample(members, 3, n_draws=50, seed=2).genes != drawn.genes).any()
