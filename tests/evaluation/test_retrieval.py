"""retrieval.py: galleries, ties and NaN, ranks against a full matrix, chance."""

import numpy as np
import pytest

from utils.evaluation import retrieval


def grid(columns, rows):
    return np.stack(np.meshgrid(np.arange(columns), np.arange(rows)), axis=-1).reshape(-1, 2).astype(float)


def test_neighbours_are_the_eight_nearest_and_the_spot_itself():
    xy = grid(5, 5) * 100
    gallery = retrieval.neighbour_candidates(xy, k=8)
    assert gallery.candidates.shape == (25, 9)
    centre = 12
    assert set(gallery.candidates[centre]) == {6, 7, 8, 11, 12, 13, 16, 17, 18}
    np.testing.assert_array_equal(gallery.candidates[np.arange(25), gallery.truth], np.arange(25))


def test_the_place_of_the_truth_is_spread_evenly_and_fixed_by_the_seed():
    gallery = retrieval.neighbour_candidates(grid(30, 30), k=8, seed=1)
    share = np.bincount(gallery.truth, minlength=9) / 900
    assert share.min() > 0.07 and share.max() < 0.15
    np.testing.assert_array_equal(gallery.candidates, retrieval.neighbour_candidates(grid(30, 30), 8, 1).candidates)
    assert (gallery.candidates != retrieval.neighbour_candidates(grid(30, 30), 8, 2).candidates).any()


def test_coinciding_spots_each_stay_in_their_own_gallery_once():
    gallery = retrieval.neighbour_candidates(np.zeros((20, 2)), k=4)
    own = gallery.candidates == np.arange(20)[:, None]
    assert (own.sum(axis=1) == 1).all()
    assert all(len(set(row)) == 5 for row in gallery.candidates)


@pytest.mark.parametrize("n_spots", [1, 2, 4])
def test_small_slices_are_padded(n_spots):
    near = retrieval.neighbour_candidates(grid(n_spots, 1), k=8)
    drawn = retrieval.random_candidates(n_spots, n=9)
    for gallery, width in ((near, 9), (drawn, 10)):
        assert gallery.candidates.shape == (n_spots, width)
        assert ((gallery.candidates >= 0).sum(axis=1) == n_spots).all()
        assert retrieval.chance(gallery.candidates) == pytest.approx(1 / n_spots)
        assert (gallery.candidates[np.arange(n_spots), gallery.truth] == np.arange(n_spots)).all()


def test_random_candidates_are_distinct_others_drawn_evenly():
    gallery = retrieval.random_candidates(400, n=9, seed=3)
    assert all(len(set(row)) == 10 for row in gallery.candidates)
    drawn = np.bincount(gallery.candidates.ravel(), minlength=400) - 1
    assert drawn.sum() == 3600 and drawn.max() < 25
    again = retrieval.random_candidates(400, n=9, seed=3)
    np.testing.assert_array_equal(gallery.candidates, again.candidates)


def test_a_hit_is_strictly_above_every_other_and_nan_is_a_miss():
    nan = np.nan
    scores = np.array([[1, 3, 2], [3, 3, 1], [1, nan, 0], [nan, 3, 2], [1, 2, 3], [nan, nan, nan]])
    truth = np.array([1, 0, 1, 1, 0, 2])
    assert retrieval.hits(scores, truth).tolist() == [True, False, False, False, False, False]


def test_constant_scores_hit_nothing_and_padding_is_ignored():
    gallery = retrieval.neighbour_candidates(grid(3, 2), k=8)
    assert not retrieval.hits(np.zeros((6, 9)), gallery.truth, gallery.candidates).any()
    scores = np.where(gallery.candidates < 0, np.nan, 0.0)
    scores[gallery.candidates < 0] = np.resize([np.nan, 99.0], (gallery.candidates < 0).sum())
    scores[np.arange(6), gallery.truth] = 1.0
    assert retrieval.hits(scores, gallery.truth, gallery.candidates).all()
    assert not retrieval.hits(scores, gallery.truth).any()


def test_depth_scores_prefer_the_nearest_depth():
    scores = retrieval.depth_scores(np.array([1.0, -1.0]), np.array([[0.0, 1.5, 3], [0, 1.5, -3]]))
    np.testing.assert_allclose(scores, [[-1, -0.5, -2], [-1, -2.5, -2]])


def test_tied_candidates_and_those_of_nan_rank_above_the_true_one():
    similarity, b = np.array([[5.0, 1, 2, 3], [5, 5, 1, 9], [1, 2, 0, 3], [0, 1, 1, 4]]), np.eye(4)
    assert retrieval.ranks_from_embeddings(similarity, b).tolist() == [1, 3, 4, 1]
    b[3] = np.nan
    assert retrieval.ranks_from_embeddings(similarity, b).tolist() == [2, 3, 4, 4]


@pytest.mark.parametrize("block", [1, 7, 64, 1024])
def test_blockwise_ranks_equal_those_of_the_whole_matrix(block):
    a, b = np.random.default_rng(0).normal(size=(2, 50, 6))
    ranks = retrieval.ranks_from_embeddings(a, b, block=block)
    slow = [1 + sum(a[i] @ b[j] >= a[i] @ b[i] for j in range(50) if j != i) for i in range(50)]
    np.testing.assert_array_equal(ranks, slow)


def test_collapsed_embeddings_rank_last_despite_rounding():
    one = np.random.default_rng(1).normal(size=(1, 37)).astype(np.float32)
    same = np.repeat(one / np.linalg.norm(one), 101, axis=0)
    assert (retrieval.ranks_from_embeddings(same, same, block=10) == 101).all()
    same[3] = np.nan
    assert retrieval.ranks_from_embeddings(same, same, block=10)[3] == 101


def test_ranks_follow_the_spots_when_these_are_reordered():
    a, b = np.random.default_rng(2).normal(size=(2, 40, 5))
    order = np.random.default_rng(3).permutation(40)
    ranks = retrieval.ranks_from_embeddings(a, b)
    np.testing.assert_array_equal(retrieval.ranks_from_embeddings(a[order], b[order]), ranks[order])


def test_recall_median_rank_and_chance_by_hand():
    ranks = np.array([1, 2, 6, 20])
    found = retrieval.slice_figures(ranks, np.ones(4, dtype=int))
    assert found["image_to_gene"] == {"R@1": 0.25, "R@5": 0.5, "R@10": 0.75, "median_rank": 4.0}
    assert found["gene_to_image"] == {"R@1": 1.0, "R@5": 1.0, "R@10": 1.0, "median_rank": 1.0}
    assert found["chance"] == {"R@1": 0.25, "R@5": 1.0, "R@10": 1.0, "median_rank": 2.5}
    other = retrieval.slice_figures(np.ones(20, dtype=int), np.ones(20, dtype=int))
    mean = retrieval.mean_slice_figures([found, other])
    assert mean["image_to_gene"]["R@1"] == pytest.approx(0.625), "slices count alike, whatever their size"
    assert mean["chance"]["R@1"] == pytest.approx((0.25 + 0.05) / 2)


def test_random_scores_reach_chance_and_a_perfect_row_reaches_one():
    rng = np.random.default_rng(4)
    galleries = [retrieval.neighbour_candidates(grid(n, n), k=8) for n in (20, 30)]
    blocks = [np.arange(n * n) // 25 for n in (20, 30)]
    perfect = [(g.candidates == np.arange(len(g.truth))[:, None]).astype(float) for g in galleries]
    scores = {"contrastive": [rng.normal(size=g.candidates.shape) for g in galleries], "matching": perfect}
    found = retrieval.evaluate_gallery(scores, galleries, blocks, n_draws=300)
    assert found["chance"] == pytest.approx(1 / 9)
    low, high = found["interval"]["contrastive"]
    assert low < 1 / 9 < high and low < found["contrastive"] < high
    assert found["matching"] == 1 and found["interval"]["matching"] == [1, 1]


# ---- re-ranking


def test_log_softmax_leaves_padding_out():
    found = retrieval.log_softmax(np.array([[1.0, 2.0, 9.0]]), np.array([[4, 0, -1]]))
    np.testing.assert_allclose(np.exp(found[0, :2]), np.exp([1.0, 2.0]) / np.exp([1.0, 2.0]).sum())


def test_the_weight_of_matching_is_that_which_ranks_the_own_profile_best(rng):
    """Where candidates are drawn with odds softmax(c (s + 0.6 m)), 0.6 is found whatever the confidence c, which the
    scores need not know; for a matching that is noise, 0."""
    n, k = 20_000, 5
    similarity, matching = rng.normal(size=(2, n, k))
    for confidence in (1.0, 0.3):
        odds = np.exp(confidence * (similarity + 0.6 * matching))
        truth = (rng.random(n)[:, None] > (odds / odds.sum(1, keepdims=True)).cumsum(1)).sum(1)
        gallery = retrieval.Gallery(np.zeros((n, k), int), truth)
        assert retrieval.reranking_weight([similarity], [matching], [gallery]) == pytest.approx(0.6, abs=0.11)
    assert retrieval.reranking_weight([similarity], [rng.normal(size=(n, k)) * 9], [gallery]) == 0
    assert retrieval.reranking_weight([], [], []) == 0


def test_reciprocal_ranks_by_hand_ties_count_against_and_padding_does_not():
    scores = np.array([[3.0, 2.0, 2.0, 9.0], [1.0, 0.0, 0.5, 0.2]])
    gallery = retrieval.Gallery(np.array([[0, 1, 2, -1], [1, 0, 2, 3]]), np.array([1, 0]))
    np.testing.assert_allclose(retrieval.reciprocal_ranks(scores, gallery), [1 / 3, 1.0])
    scores[:, 0] = np.nan
    found = retrieval.reciprocal_ranks(scores, gallery)
    np.testing.assert_allclose(found, [1 / 3, 1 / 4], err_msg="a candidate of NaN ranks above the true one")
