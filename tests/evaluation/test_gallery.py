"""gallery.py: the k best by blocks against the whole product, stably sorted."""

import numpy as np
import pytest
import torch

from utils.evaluation import gallery


def slow_top_k(queries, rows, k):
    scores = (queries @ rows.T).nan_to_num(-torch.inf, torch.inf, -torch.inf)
    best = scores.sort(dim=1, descending=True, stable=True)
    return best.values[:, :k], best.indices[:, :k]


def check(queries, rows, k, **flags):
    """Whole numbers below 2^24 multiply without rounding: the two must be equal."""
    scores, found = gallery.top_k(queries, rows, k, **flags)
    expected = slow_top_k(queries, rows, k)
    assert torch.equal(found, expected[1]) and torch.equal(scores, expected[0])
    return scores, found


def whole(rng, *shape, below=1000):
    return torch.from_numpy(rng.integers(-below, below, shape).astype(np.float32))


@pytest.mark.parametrize("block", [1, 16, 50, 128, 1000, 5000])
@pytest.mark.parametrize("k", [1, 7, 40])
def test_any_block_gives_the_best_of_the_whole_product(rng, block, k):
    check(whole(rng, 23, 6), whole(rng, 1000, 6), k, block=block)


@pytest.mark.parametrize("below", [1, 2, 3])
@pytest.mark.parametrize("block", [16, 96, 4096])
def test_ties_go_to_the_lower_row(rng, below, block):
    """Few different scores, in the last case (all zero) a single one."""
    queries, rows = whole(rng, 9, 3, below=4), whole(rng, 500, 3, below=below)
    check(queries, rows, 12, block=block)
    _, found = check(queries, torch.zeros(500, 3), 12, block=block)
    assert (found == torch.arange(12)).all()


@pytest.mark.parametrize("order", [1, -1])
def test_rising_and_falling_scores(order):
    """Rising, every block holds all the new best."""
    rows = torch.arange(700.0)[::order] if order == 1 else torch.arange(700.0).flip(0)
    scores, found = check(torch.ones(4, 1), rows[:, None], 10, block=32)
    assert scores[0].tolist() == list(range(699, 689, -1))
    assert found[0].tolist() == (list(range(699, 689, -1)) if order == 1 else list(range(10)))


@pytest.mark.parametrize("block", [16, 64, 4096])
def test_nan_never_wins_and_counts_as_the_lowest(rng, block):
    queries, rows = whole(rng, 8, 4), whole(rng, 300, 4)
    rows[rng.random(300) < 0.3] = torch.nan
    queries[5] = torch.nan
    scores, found = check(queries, rows, 20, block=block)
    assert not scores.isnan().any() and not rows[found[0]].isnan().any()
    assert found[5].tolist() == list(range(20)) and (scores[5] == -torch.inf).all()
    rows[3:] = torch.nan
    scores, found = check(queries[:5], rows, 20, block=block)
    assert (scores[:, :-17].isfinite().sum(1) == (~rows[:3].isnan().any(1)).sum()).all()


@pytest.mark.parametrize("block", [16, 64, 4096])
def test_infinite_scores_are_scores(rng, block):
    queries, rows = whole(rng, 8, 4).abs() + 1, whole(rng, 300, 4)
    rows[[7, 200]], rows[[3, 250]] = torch.inf, -torch.inf
    _, found = check(queries, rows, 300, block=block)
    assert (found[:, :2] == torch.tensor([7, 200])).all() and (found[:, -2:] == torch.tensor([3, 250])).all()


@pytest.mark.parametrize(
    ("n_queries", "n_rows", "k"), [(1, 1, 1), (1, 70, 3), (5, 3, 2), (5, 33, 33), (3, 100, 99), (0, 9, 2)]
)
@pytest.mark.parametrize("block", [8, 32, 4096])
def test_small_sizes(rng, n_queries, n_rows, k, block):
    scores, found = check(whole(rng, n_queries, 5), whole(rng, n_rows, 5), k, block=block)
    assert scores.shape == found.shape == (n_queries, k)


def test_many_queries_go_in_several_parts(rng, monkeypatch):
    monkeypatch.setattr(gallery, "QUERIES_AT_ONCE", 4)
    check(whole(rng, 11, 5), whole(rng, 200, 5), 6, block=32)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
def test_real_numbers_in_the_precision_of_the_queries(rng, dtype, tolerance):
    queries, rows = (torch.from_numpy(rng.normal(size=(n, 64))).to(dtype) for n in (30, 3000))
    scores, found = gallery.top_k(queries, rows, 10, block=256)
    expected = slow_top_k(queries.double(), rows.double(), 10)
    assert scores.dtype == dtype and torch.equal(found, expected[1])
    torch.testing.assert_close(scores.double(), expected[0], rtol=tolerance, atol=tolerance)


def test_a_gallery_in_half_precision_on_disk(rng, tmp_path):
    np.save(tmp_path / "rows.npy", whole(rng, 500, 8, below=100).numpy().astype(np.float16))
    rows = torch.from_numpy(np.load(tmp_path / "rows.npy", mmap_mode="c"))
    queries = whole(rng, 10, 8)
    scores, found = gallery.top_k(queries, rows, 5, block=64)
    assert scores.dtype == torch.float32 and torch.equal(found, slow_top_k(queries, rows.float(), 5)[1])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_on_a_gpu_the_best_are_the_same(rng):
    queries, rows = whole(rng, 23, 6), whole(rng, 1000, 6)
    scores, found = gallery.top_k(queries.cuda(), rows, 7, block=128)
    expected = slow_top_k(queries, rows, 7)
    assert torch.equal(found.cpu(), expected[1]) and torch.equal(scores.cpu(), expected[0])


@pytest.mark.parametrize(
    ("queries", "rows", "k", "line"),
    [
        ((2, 3), (4, 3), 5, r"expected k from 1 to the 4 rows of the gallery, found 5"),
        ((2, 3), (4, 3), 0, r"expected k from 1 to the 4 rows of the gallery, found 0"),
        ((2, 3), (0, 3), 1, r"the 0 rows"),
        ((2, 3), (4, 2), 1, r"one width D, found shapes \(2, 3\) and \(4, 2\)"),
        ((3,), (4, 3), 1, r"found shapes \(3,\) and \(4, 3\)"),
    ],
)
def test_what_does_not_fit_is_named(queries, rows, k, line):
    with pytest.raises(ValueError, match=line):
        gallery.top_k(torch.ones(queries), torch.ones(rows), k)
