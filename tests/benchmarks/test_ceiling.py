"""benchmarks/ceiling.py: the ceiling that halves of counts tell is that of counts whose expectation is known."""

import anndata
import numpy as np
import pytest

from benchmarks.ceiling import ceiling, main, parse_args
from utils.evaluation import metrics
from utils.slices import visium


def counted(rng, spread, n_spots=400, n_genes=40):
    """Poisson counts (S, G) whose expectations vary by `spread` on a log scale, the totals with 2,000 counts of other
    genes a spot, and their expectations."""
    expected = 5 * np.exp(spread * rng.normal(size=(n_spots, n_genes)))
    counts = rng.poisson(expected)
    return counts, counts.sum(1) + rng.poisson(2000, n_spots), expected


@pytest.mark.parametrize("spread", [0.1, 0.3, 0.8])
def test_halves_of_counts_tell_how_far_a_perfect_prediction_would_come(rng, spread):
    counts, total, expected = counted(rng, spread)
    perfect = metrics.pearson_residuals(expected, expected.sum(1) + 2000)
    known = metrics.pearson_per_gene(perfect, metrics.pearson_residuals(counts, total)).mean()
    assert ceiling(counts, total, seed=0) == pytest.approx(known, abs=0.03)


def test_pure_noise_has_no_ceiling(rng):
    counts, total, _ = counted(rng, 0.0, n_genes=300)
    assert ceiling(counts, total, seed=0) < 0.12


def test_a_simulated_slice_is_not_judged_below_its_known_ceiling(simulated):
    """Its genes vary by more than chance, which no image tells and both halves share: the bound lies above."""
    one = visium.read_slice(simulated / "P01_1")
    total = np.asarray(one.counts.sum(1)).ravel()
    truth = anndata.read_h5ad(simulated / "P01_1" / "truth.h5ad").var["ceiling_residuals"]
    known = truth.reindex(one.genes).fillna(0).mean()
    assert 0.2 < known < ceiling(one.counts.toarray(), total, seed=0) < 1


def test_the_same_seed_gives_the_same_ceiling(rng):
    counts, total, _ = counted(rng, 0.3, n_spots=60, n_genes=5)
    one, same, other = (ceiling(counts, total, seed) for seed in (1, 1, 2))
    assert one == same != other


def test_the_table_has_a_line_for_each_slice(simulated, capsys):
    main(parse_args(["--data", str(simulated), "--n_top_genes", "20"]))
    lines = [line.split(" | ") for line in capsys.readouterr().out.splitlines() if line.startswith("| P")]
    assert [(line[0], line[1]) for line in lines] == [("| P01_1", "70"), ("| P02_1", "70"), ("| P03_1", "70")]
    assert all(0 < float(line[3].rstrip(" |")) < 1 for line in lines)
