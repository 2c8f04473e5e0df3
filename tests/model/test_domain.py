"""model.domain: statistics of tiles known by hand, axes, distances to the nearest train spots."""

import numpy as np
import pytest
import torch
from scipy.spatial import KDTree

from model import domain
from model.domain import NAMES, tile_statistics


def named(tiles):
    """Statistics of tiles by name."""
    return dict(zip(NAMES, tile_statistics(tiles).T, strict=True))


def test_stain_statistics_are_those_of_the_optical_densities(rng):
    tiles = torch.from_numpy(rng.uniform(0.2, 1, (2, 3, 64, 64))).float()
    found, density = named(tiles), -np.log10(tiles.numpy())
    for i, colour in enumerate(domain.COLOURS):
        np.testing.assert_allclose(found[f"optical density, {colour}"], density[:, i].mean((1, 2)), rtol=1e-4)
        deviation = np.exp(found[f"log deviation, {colour}"]) - 0.01
        np.testing.assert_allclose(deviation, density[:, i].std((1, 2)), rtol=1e-4)
    pairs = [np.corrcoef(tile.reshape(3, -1))[[0, 0, 1], [1, 2, 2]] for tile in density]
    found = np.stack([found[f"correlation, {pair}"] for pair in domain.PAIRS], 1)
    np.testing.assert_allclose(found, pairs, atol=2e-3)


@pytest.mark.parametrize("level", range(domain.LEVELS))
def test_a_chessboard_has_detail_of_the_size_of_its_squares_alone(level):
    """Densities of 0 and 0.5 in squares of 2^level pixels: their deviation is 0.25, all of it diagonal."""
    squares = np.indices((64 >> level, 64 >> level)).sum(0) % 2
    image = torch.from_numpy(10.0 ** (-0.5 * squares.repeat(2**level, 0).repeat(2**level, 1)))
    found = named(image.expand(1, 3, 64, 64))
    detail = [float(10 ** found[f"grey, log detail of {2**i} px"]) - 1e-3 for i in range(domain.LEVELS)]
    expected = np.zeros(domain.LEVELS)
    expected[level] = 0.25
    np.testing.assert_allclose(detail, expected, atol=1e-4)
    assert found[f"grey, diagonal fraction of {2**level} px"].item() > 3
    colour = [float(10 ** found[f"colour, log detail of {2**i} px"]) - 1e-3 for i in range(domain.LEVELS)]
    np.testing.assert_allclose(colour, 0, atol=1e-4)


def test_one_edge_is_sparse_and_noise_is_not(rng):
    edge, noise = np.full((64, 64), 0.5), rng.uniform(0.3, 0.9, (64, 64))
    edge[:, 31:] = 0.8
    found = named(torch.from_numpy(np.stack([edge, noise])[:, None].repeat(3, 1)).float())
    sparse, dense = found["grey, sparseness of 1 px"].tolist()
    assert sparse < -0.5 < dense < 0


def test_tiles_of_any_side_and_content_have_finite_statistics():
    for side in (8, 32, 40, 96):
        for value in (0.0, 0.5, 1.0):
            found = tile_statistics(torch.full((2, 3, side, side), value))
            assert found.shape == (2, domain.N_STATISTICS) and torch.isfinite(found).all()


def gaussian(n, width=8, seed=0):
    """Correlated values with a mean: (n, D)."""
    mix = np.random.default_rng(7).normal(size=(width, width))
    rows = np.random.default_rng(seed).normal(size=(n, width)) @ mix + np.arange(width)
    return torch.from_numpy(rows).float()


def test_on_its_axes_a_train_set_is_uncorrelated_and_of_deviation_one():
    train = gaussian(4000)
    whitened = domain.on_axes(train, domain.fit_axes(train))
    np.testing.assert_allclose(whitened.mean(0), 0, atol=1e-3)
    np.testing.assert_allclose(np.cov(whitened.numpy().T), np.eye(8), atol=0.06)


def test_the_distance_is_that_to_the_fifth_nearest_train_spot():
    fitted, new = domain.fit_bank([gaussian(200), gaussian(150, seed=1)], seed=0), gaussian(40, seed=2)
    expected = KDTree(fitted["bank"].numpy()).query(domain.on_axes(new, fitted).numpy(), k=5)[0][:, 4]
    np.testing.assert_allclose(domain.distances(new, fitted), expected, rtol=1e-3)
    alone = domain.fit_bank([gaussian(2)], seed=0)
    assert torch.isfinite(domain.distances(new, alone)).all()


def test_of_many_spots_the_bank_keeps_the_same_fraction_of_each_slice(monkeypatch):
    monkeypatch.setattr(domain, "BANK", 60)
    slices = [gaussian(100), gaussian(200) + 1e3]
    one, same, other = (domain.fit_bank(slices, seed)["bank"] for seed in (0, 0, 1))
    assert torch.equal(one, same) and not torch.equal(one, other) and len(one) == 60
    far = (one - one[0]).norm(dim=1) > (one[0] - one[-1]).norm() / 2
    assert far.sum() == 40


def test_the_distance_of_a_slide_is_a_geometric_mean():
    assert domain.slide_distance(torch.tensor([1.0, 10.0, 100.0])).item() == pytest.approx(10)
