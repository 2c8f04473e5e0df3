"""Augmentation: the random numbers of a spot, the eight turns, shifts, stains, and what stays as it is."""

import numpy as np
import pytest
import scipy.stats
import torch
from PIL import Image

from utils.training.augment import JITTER, STAINS, augment, jitter_stains, to_float, turn_and_shift, uniforms

STILL = 0.5  # the middle of the draws: no shift, no jitter


def test_a_spot_draws_the_same_in_whatever_batch():
    spots = np.array([4, 17, 3, 900])
    whole = uniforms(0, 5, spots, 10)
    assert whole.shape == (4, 10)
    np.testing.assert_array_equal(uniforms(0, 5, spots[[2]], 10), whole[[2]])
    np.testing.assert_array_equal(uniforms(0, 5, spots[::-1], 10), whole[::-1])


def test_draws_differ_by_spot_epoch_and_seed():
    spots = np.arange(50)
    several = [uniforms(seed, epoch, spots, 10) for seed, epoch in ((0, 0), (0, 1), (1, 0), (1, 1))]
    assert len(np.unique(several)) == 4 * 50 * 10


def test_draws_are_uniform_and_independent():
    """Over spots and over epochs; the neighbouring columns and spots are uncorrelated."""
    draws = uniforms(3, 0, np.arange(5000), 10)
    assert draws.min() >= 0 and draws.max() < 1
    assert scipy.stats.kstest(draws.ravel(), "uniform").pvalue > 0.001
    assert all(scipy.stats.kstest(column, "uniform").pvalue > 1e-4 for column in draws.T)
    correlations = np.corrcoef(np.hstack([draws[:-1], draws[1:]]).T)
    assert np.abs(correlations[~np.eye(20, dtype=bool)]).max() < 0.07
    of_one_spot = np.concatenate([uniforms(0, epoch, np.array([7]), 10)[0] for epoch in range(500)])
    assert scipy.stats.kstest(of_one_spot, "uniform").pvalue > 0.001


def tiles_of(rng, n=1, size=32):
    return torch.from_numpy(rng.random((n, 3, size, size), dtype=np.float32))


def turned(tile, quarter, mirror, x=STILL, y=STILL):
    """One tile with set draws: quarter turns 0..3, mirrored or not, shift draws."""
    draws = torch.tensor([[(quarter + 0.5) / 4, 0.25 if mirror else 0.75, x, y]])
    return turn_and_shift(tile, draws)[0].numpy()


@pytest.mark.parametrize("size", [32, 33, 224])
def test_the_eight_turns_are_those_of_numpy(rng, size):
    """Without a shift every pixel only changes its place: the set of results is that of rot90 and flip."""
    tile = tiles_of(rng, size=size)
    picture = tile[0].numpy()
    every = [np.rot90(p, k, axes=(1, 2)) for p in (picture, picture[:, :, ::-1]) for k in range(4)]
    found = [turned(tile, quarter, mirror) for mirror in (False, True) for quarter in range(4)]
    which = [[i for i, expected in enumerate(every) if np.array_equal(one, expected)] for one in found]
    assert sorted(which) == [[i] for i in range(8)]
    assert np.array_equal(found[0], picture)


def test_each_turn_comes_as_often_as_the_others(rng):
    tile = tiles_of(rng, size=32).expand(4000, -1, -1, -1)
    draws = torch.from_numpy(uniforms(0, 0, np.arange(4000), 4)).float()
    draws[:, 2:] = STILL
    corner = turn_and_shift(tile, draws)[:, :, 0, 0]
    kinds, number = np.unique(corner.numpy(), axis=0, return_counts=True)
    assert len(kinds) == 4 and scipy.stats.chisquare(number).pvalue > 0.001


@pytest.mark.parametrize(("size", "reach"), [(32, 1), (64, 3), (224, 11)])
def test_shifts_are_whole_pixels_as_far_as_a_twentieth(rng, size, reach):
    """In the interior the shift is numpy's roll; the ends of the draws are the ends of the reach."""
    tile = tiles_of(rng, size=size)
    picture, edge = tile[0].numpy(), reach
    inside = (slice(None), slice(edge, -edge), slice(edge, -edge))
    for draw, by in ((0.0, -reach), (0.9999, reach), (STILL, 0)):
        for axis, (x, y) in ((2, (draw, STILL)), (1, (STILL, draw))):
            found = turned(tile, 0, False, x, y)
            np.testing.assert_array_equal(found[inside], np.roll(picture, -by, axis)[inside])


def test_at_the_edge_a_shifted_tile_is_mirrored(rng):
    tile = tiles_of(rng, size=64)
    picture = tile[0].numpy()
    found = turned(tile, 0, False, x=0.9999)  # three pixels: the right edge is reflected
    np.testing.assert_array_equal(found[:, :, -3:], picture[:, :, -1:-4:-1])


def test_all_that_moves_is_there_before(rng):
    """Nearest pixels: no value that the tile did not have, whatever the draws."""
    tiles = tiles_of(rng, 20)
    found = turn_and_shift(tiles, torch.from_numpy(uniforms(0, 0, np.arange(20), 4)).float())
    assert all(np.isin(one, before).all() for one, before in zip(found.numpy(), tiles.numpy(), strict=True))


def test_no_jitter_at_the_middle_of_the_draws(rng):
    tiles = tiles_of(rng, 3).clamp(min=2 / 255)
    torch.testing.assert_close(jitter_stains(tiles, torch.full((3, 6), STILL)), tiles, atol=1e-5, rtol=0)


def test_a_stronger_stain_is_darker_in_its_own_colour():
    """In pure haematoxylin its own factor counts, and eosin's touches nothing."""
    stain = STAINS[0] / STAINS[0].norm()
    tile = torch.exp(-0.6 * stain)[None, :, None, None].expand(1, 3, 4, 4)
    draws = torch.full((1, 6), STILL)
    draws[0, 0] = 1.0
    expected = torch.exp(-0.6 * (1 + JITTER) * stain)
    torch.testing.assert_close(jitter_stains(tile, draws)[0, :, 0, 0], expected, atol=1e-5, rtol=0)
    draws[0, :2] = torch.tensor([STILL, 0.0])
    torch.testing.assert_close(jitter_stains(tile, draws), tile, atol=1e-5, rtol=0)


def test_jitter_moves_colours_but_keeps_them_in_range(rng):
    tiles = torch.cat([tiles_of(rng, 30), torch.zeros(1, 3, 32, 32), torch.ones(1, 3, 32, 32)])
    draws = torch.from_numpy(uniforms(0, 0, np.arange(32), 6)).float()
    found = jitter_stains(tiles, draws)
    assert found.isfinite().all() and found.min() >= 0 and found.max() <= 1
    moved = (found - tiles).abs().mean(dim=(1, 2, 3))
    assert (moved > 1e-4).all() and moved.max() < 0.15


def test_augmentation_depends_on_seed_epoch_and_spot_alone(rng):
    tiles = tiles_of(rng, 4)
    spots = np.array([9, 2, 40, 7])
    whole = augment(tiles, spots, seed=1, epoch=2)
    assert whole.shape == tiles.shape
    torch.testing.assert_close(augment(tiles[[2, 0]], spots[[2, 0]], 1, 2), whole[[2, 0]])
    for seed, epoch, shift in ((0, 2, 0), (1, 3, 0), (1, 2, 1)):
        other = augment(tiles, spots + shift, seed, epoch)
        assert ((other - whole).abs().amax(dim=(1, 2, 3)) > 0.01).all()


def test_to_float_keeps_tiles_of_the_right_size():
    tiles = torch.arange(2 * 4 * 4 * 3, dtype=torch.uint8).view(2, 4, 4, 3)
    found = to_float(tiles, 4)
    assert found.dtype == torch.float32 and found.shape == (2, 3, 4, 4)
    torch.testing.assert_close(found[1, 2, 3, 0], tiles[1, 3, 0, 2] / 255)


@pytest.mark.parametrize("size", [16, 20, 100])
def test_to_float_resizes_as_pillow_does(rng, size):
    """Bicubic with antialiasing: noise made smaller is grey, not a choice of its pixels."""
    pixels = rng.integers(90, 160, (64, 64, 3), dtype=np.uint8)
    expected = np.asarray(Image.fromarray(pixels).resize((size, size), Image.Resampling.BICUBIC))
    found = to_float(torch.from_numpy(pixels)[None], size)
    assert found.shape == (1, 3, size, size)
    np.testing.assert_allclose(found[0].permute(1, 2, 0).numpy() * 255, expected, atol=1.5)


def test_to_float_stays_in_range_where_bicubic_overshoots(rng):
    pixels = torch.from_numpy(rng.choice(np.array([0, 255], np.uint8), (1, 64, 64, 3)))
    found = to_float(pixels, 100)
    assert found.min() == 0 and found.max() == 1
