"""Augmentation: the random numbers of a spot, the eight turns, shifts, stains, and what stays as it is."""

import numpy as np
import pytest
import scipy.stats
import torch
import torch.nn.functional as F
from PIL import Image

from utils.features.cache import to_float
from utils.training import augment as module
from utils.training.augment import (
    JITTER,
    SHIFT,
    STAINS,
    augment,
    log_light,
    move,
    restain,
    stain_change,
    turns_and_shifts,
    uniforms,
)

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
    return torch.from_numpy(rng.integers(0, 256, (n, size, size, 3), dtype=np.uint8))


def draws_of(n, columns=10):
    return torch.from_numpy(uniforms(0, 0, np.arange(n), columns))


def moved(tiles, draws):
    """(B, Z, Z, 3), (B, 4) -> (B, 3, Z, Z) uint8."""
    size = tiles.shape[1]
    return move(tiles, *turns_and_shifts(draws, size)).view(-1, 3, size, size)


def restained(values, draws):
    """uint8 (B, 3, n), (B, 6) -> (B, 3, n) float32."""
    out = torch.empty(values.shape)
    restain(values, *stain_change(draws), log_light(values.device), out=out)
    return out


def turned(tile, quarter, mirror, x=STILL, y=STILL):
    """One tile with set draws: quarter turns 0..3, mirrored or not, shift draws."""
    draws = torch.tensor([[(quarter + 0.5) / 4, 0.25 if mirror else 0.75, x, y]], dtype=torch.float64)
    return moved(tile, draws)[0].numpy()


# ---- the slow references: floats, a sampled grid, one step of the stains after the other


def slow_move(tiles, draws):
    """Turned and shifted as a grid of places that is sampled: (B, 3, Z, Z), (B, 4) -> (B, 3, Z, Z)."""
    size = tiles.shape[-1]
    reach = int(SHIFT * size)
    quarter = (draws[:, 0] * 4).floor() * (torch.pi / 2)
    cos, sin = quarter.cos().round(), quarter.sin().round()
    mirror = 1 - 2 * (draws[:, 1] < 0.5).float()
    shift = ((draws[:, 2:4] * (2 * reach + 1)).floor() - reach) * 2 / size
    theta = torch.stack(
        [torch.stack([cos * mirror, -sin, shift[:, 0]], 1), torch.stack([sin * mirror, cos, shift[:, 1]], 1)], 1
    )
    grid = F.affine_grid(theta, list(tiles.shape), align_corners=False)
    return F.grid_sample(tiles, grid, mode="nearest", padding_mode="reflection", align_corners=False)


def slow_stains(tiles, draws):
    """Taken apart, changed and mixed again: (B, 3, Z, Z) in 0..1, (B, 6) -> (B, 3, Z, Z)."""
    stains = F.normalize(STAINS.float(), dim=1)
    factor = 1 + JITTER * (2 * draws[:, :3] - 1)
    offset = JITTER / 3 * (2 * draws[:, 3:] - 1)
    density = -torch.log(tiles.clamp(min=1 / 255))
    strength = torch.einsum("bczy,cs->bszy", density, torch.linalg.inv(stains))
    strength = strength * factor[:, :, None, None] + offset[:, :, None, None]
    return torch.exp(-torch.einsum("bszy,sc->bczy", strength, stains)).clamp(0, 1)


@pytest.mark.parametrize("size", [1, 2, 19, 20, 32, 33, 40, 224])
def test_every_pixel_lands_where_a_sampled_grid_puts_it(rng, size):
    tiles, draws = tiles_of(rng, 60, size), draws_of(60, 4)
    slow = slow_move(tiles.permute(0, 3, 1, 2).float(), draws.float())
    assert torch.equal(moved(tiles, draws).float(), slow)


@pytest.mark.parametrize("size", [32, 33, 224])
def test_the_table_and_the_one_matrix_are_the_steps_of_the_stains(rng, size):
    tiles, draws = tiles_of(rng, 20, size), draws_of(20, 6)
    tiles[0], tiles[1] = 0, 255
    planar = tiles.permute(0, 3, 1, 2).contiguous()
    found = restained(planar.flatten(2), draws).view(planar.shape)
    torch.testing.assert_close(found, slow_stains(planar.float() / 255, draws.float()), atol=1e-5, rtol=0)


@pytest.mark.parametrize("n", [1, 2, 7])
@pytest.mark.parametrize(("size", "wanted"), [(224, 224), (40, 40), (33, 33), (64, 48), (40, 96)])
def test_augmentation_is_the_slow_one(rng, n, size, wanted):
    """Through both steps and the resizing, over the chunks that a batch is cut into."""
    tiles, spots = tiles_of(rng, n, size), rng.integers(0, 2**40, n)
    draws = torch.from_numpy(uniforms(5, 3, spots, 10)).float()
    slow = slow_stains(slow_move(to_float(tiles, size), draws[:, :4]), draws[:, 4:])
    if wanted != size:
        slow = F.interpolate(slow, (wanted, wanted), mode="bicubic", antialias=True, align_corners=False).clamp(0, 1)
    found = augment(tiles, spots, seed=5, epoch=3, size=wanted)
    assert found.dtype == torch.float32 and found.is_contiguous()
    torch.testing.assert_close(found, slow, atol=2e-5, rtol=0)


@pytest.mark.parametrize("tiles_at_once", [1, 3, 100])
def test_the_chunks_of_a_batch_make_no_difference(rng, monkeypatch, tiles_at_once):
    tiles, spots = tiles_of(rng, 7), np.arange(7)
    whole = augment(tiles, spots, 0, 0, 32)
    monkeypatch.setattr(module, "CACHED_PX", tiles_at_once * 32 * 32)
    torch.testing.assert_close(augment(tiles, spots, 0, 0, 32), whole, atol=1e-6, rtol=0)


def test_tiles_are_not_changed_in_place_and_may_be_strided(rng):
    tiles, spots = tiles_of(rng, 6), np.arange(3)
    before = tiles.clone()
    torch.testing.assert_close(augment(tiles[::2], spots, 0, 0, 32), augment(before[::2].clone(), spots, 0, 0, 32))
    assert torch.equal(tiles, before)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device is there")
def test_the_accelerator_gives_what_the_processor_gives(rng):
    tiles, spots = tiles_of(rng, 9, 224), np.arange(9)
    found = augment(tiles.cuda(), spots, 0, 0, 224).cpu()
    torch.testing.assert_close(found, augment(tiles, spots, 0, 0, 224), atol=1e-5, rtol=0)


# ---- turns and shifts


@pytest.mark.parametrize("size", [32, 33, 224])
def test_the_eight_turns_are_those_of_numpy(rng, size):
    """Without a shift every pixel only changes its place: the set of results is that of rot90 and flip."""
    tile = tiles_of(rng, size=size)
    image = tile[0].permute(2, 0, 1).numpy()
    every = [np.rot90(p, k, axes=(1, 2)) for p in (image, image[:, :, ::-1]) for k in range(4)]
    found = [turned(tile, quarter, mirror) for mirror in (False, True) for quarter in range(4)]
    which = [[i for i, expected in enumerate(every) if np.array_equal(one, expected)] for one in found]
    assert sorted(which) == [[i] for i in range(8)]
    assert np.array_equal(found[0], image)


def test_each_turn_comes_as_often_as_the_others():
    tile = torch.arange(16, dtype=torch.uint8).view(1, 4, 4, 1).expand(4000, -1, -1, 3)
    corners = moved(tile, draws_of(4000, 4))[:, 0, :2, 0]  # two neighbours tell a turn; 4 px are too few for a shift
    kinds, number = np.unique(corners.numpy(), axis=0, return_counts=True)
    assert len(kinds) == 8 and scipy.stats.chisquare(number).pvalue > 0.001


@pytest.mark.parametrize(("size", "reach"), [(32, 1), (64, 3), (224, 11)])
def test_shifts_are_whole_pixels_as_far_as_a_twentieth(rng, size, reach):
    """In the interior the shift is numpy's roll; the ends of the draws are the ends of the reach."""
    tile = tiles_of(rng, size=size)
    image, edge = tile[0].permute(2, 0, 1).numpy(), reach
    inside = (slice(None), slice(edge, -edge), slice(edge, -edge))
    for draw, by in ((0.0, -reach), (np.nextafter(1.0, 0.0), reach), (STILL, 0)):
        for axis, (x, y) in ((2, (draw, STILL)), (1, (STILL, draw))):
            found = turned(tile, 0, False, x, y)
            np.testing.assert_array_equal(found[inside], np.roll(image, -by, axis)[inside])


def test_at_the_edge_a_shifted_tile_is_mirrored(rng):
    tile = tiles_of(rng, size=64)
    image = tile[0].permute(2, 0, 1).numpy()
    found = turned(tile, 0, False, x=0.9999)  # three pixels: the right edge is reflected
    np.testing.assert_array_equal(found[:, :, -3:], image[:, :, -1:-4:-1])


def test_the_last_number_below_one_is_a_draw_as_any_other(rng):
    """Rounded to 32 bits it would be 1: a fifth quarter turn, a shift beyond the reach."""
    last = torch.full((1, 4), np.nextafter(1.0, 0.0), dtype=torch.float64)
    tile = tiles_of(rng, size=40)
    assert torch.equal(moved(tile, last), moved(tile, torch.full((1, 4), 0.999, dtype=torch.float64)))


# ---- stains


def test_no_jitter_at_the_middle_of_the_draws():
    values = torch.arange(1, 256, dtype=torch.uint8).expand(3, 3, 255)
    still = torch.full((3, 6), STILL, dtype=torch.float64)
    torch.testing.assert_close(restained(values, still), values / 255, atol=1e-5, rtol=0)


def test_black_is_the_darkest_value_that_has_a_density():
    """The logarithm of 0 is none: 0 counts as 1."""
    black = restained(torch.zeros(1, 3, 1, dtype=torch.uint8), torch.full((1, 6), STILL, dtype=torch.float64))
    torch.testing.assert_close(black, torch.full((1, 3, 1), 1 / 255), atol=1e-6, rtol=0)


def test_a_stronger_stain_is_darker_in_its_own_colour():
    """Of haematoxylin's density its own factor takes more, and eosin's touches nothing."""
    stain = STAINS[0] / STAINS[0].norm()
    draws = torch.full((2, 6), STILL, dtype=torch.float64)
    draws[0, 0], draws[1, 1] = 1.0, 0.0
    matrix, offset = stain_change(draws)
    torch.testing.assert_close(matrix[0] @ stain.float(), (1 + JITTER) * stain.float())
    torch.testing.assert_close(matrix[1] @ stain.float(), stain.float())
    assert offset.abs().max() == 0


def test_an_added_stain_darkens_white_in_its_own_colour():
    draws = torch.full((1, 6), STILL, dtype=torch.float64)
    draws[0, 4] = 1.0
    found = restained(torch.full((1, 3, 1), 255, dtype=torch.uint8), draws)
    eosin = STAINS[1] / STAINS[1].norm()
    torch.testing.assert_close(found[0, :, 0], torch.exp(-JITTER / 3 * eosin).float(), atol=1e-6, rtol=0)


def test_jitter_moves_colours_but_keeps_them_in_range(rng):
    tiles = torch.cat([tiles_of(rng, 30), torch.zeros(1, 32, 32, 3), torch.full((1, 32, 32, 3), 255)]).to(torch.uint8)
    planar = tiles.permute(0, 3, 1, 2).flatten(2)
    found = restained(planar, draws_of(32, 6))
    assert found.isfinite().all() and found.min() >= 0 and found.max() <= 1
    shifted = (found - planar / 255).abs().mean(dim=(1, 2))
    assert (shifted > 1e-4).all() and shifted.max() < 0.15


def test_augmentation_depends_on_seed_epoch_and_spot_alone(rng):
    tiles = tiles_of(rng, 4)
    spots = np.array([9, 2, 40, 7])
    whole = augment(tiles, spots, seed=1, epoch=2, size=32)
    assert whole.shape == (4, 3, 32, 32)
    torch.testing.assert_close(augment(tiles[[2, 0]], spots[[2, 0]], 1, 2, 32), whole[[2, 0]])
    for seed, epoch, shift in ((0, 2, 0), (1, 3, 0), (1, 2, 1)):
        other = augment(tiles, spots + shift, seed, epoch, 32)
        assert ((other - whole).abs().amax(dim=(1, 2, 3)) > 0.01).all()


# ---- without augmentation


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
