"""The spot pitch, from array places and pixels."""

import numpy as np
import pandas as pd
import pytest
from spaceranger_folders import SCALES, refused, write_spatial

from utils.slices import visium

SQUARE = [(r, c) for r in range(6) for c in range(7)]
VISIUM = [(r, c) for r in range(6) for c in range(r % 2, 14, 2)]
VISIUM_STEP = (np.sqrt(3) / 2, 0.5)


def array(places, pitch_px=100.0, step=(1.0, 1.0), turn=0.0):
    """Positions of array places (row, col): pixels = pitch * step * place, turned by an angle in radians."""
    row, col = np.array(places).T
    x, y = pitch_px * step[1] * col, pitch_px * step[0] * row
    cos, sin = np.cos(turn), np.sin(turn)
    columns = {
        "array_row": row,
        "array_col": col,
        "x_fullres_px": cos * x - sin * y + 50,
        "y_fullres_px": sin * x + cos * y,
    }
    return pd.DataFrame(columns)


def test_is_staggered():
    assert visium.is_staggered(array(VISIUM))
    assert not visium.is_staggered(array(SQUARE))
    assert not visium.is_staggered(array([(0, 0), (0, 2), (2, 4)]))  # even rows alone
    assert not visium.is_staggered(array([(r, c + 1) for r, c in VISIUM]))


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(("places", "step"), [(SQUARE, (1, 1)), (VISIUM, VISIUM_STEP), (SQUARE, (1, -1))])
def test_pitch_survives_turns_holes_and_order(places, step, seed):
    rng = np.random.default_rng(seed)
    pitch_px = rng.uniform(5, 400)
    positions = array(places, pitch_px, step, turn=rng.uniform(0, 2 * np.pi))
    kept = positions.sample(len(positions) // 2, random_state=seed)
    assert visium.pitch_fullres_px(kept) == pytest.approx(pitch_px, rel=1e-9)
    noisy = positions.assign(
        x_fullres_px=positions["x_fullres_px"].round(), y_fullres_px=positions["y_fullres_px"].round()
    )
    assert visium.pitch_fullres_px(noisy) == pytest.approx(pitch_px, abs=0.5)


def test_pitch_of_few_spots():
    assert visium.pitch_fullres_px(array([(0, 0), (0, 1)])) == pytest.approx(100)
    assert visium.pitch_fullres_px(array([(0, 0), (0, 2), (0, 4)], step=VISIUM_STEP)) == pytest.approx(100)
    assert visium.pitch_fullres_px(array([(0, 0), (0, 1), (0, 5), (0, 9)])) == pytest.approx(100)
    assert visium.pitch_fullres_px(array([(0, 0), (1, 1), (2, 2)], turn=0.3)) == pytest.approx(100 * np.sqrt(2))
    refused("two spots or more", visium.pitch_fullres_px, array([(0, 0)]))
    refused("different pixels", visium.pitch_fullres_px, array([(0, 0), (0, 1)], pitch_px=0.0))


def test_spot_pitch_um(tmp_path):
    write_spatial(tmp_path)
    assert visium.spot_pitch_um(tmp_path, array(VISIUM)) == 100
    assert visium.spot_pitch_um(tmp_path, array(SQUARE), given=200) == 200
    assert visium.spot_pitch_um(tmp_path, array(VISIUM), given=55) == 55
    refused("--spot_pitch_um", visium.spot_pitch_um, tmp_path, array(SQUARE))
    write_spatial(tmp_path, scales=SCALES | {"bin_size_um": 8.0})
    assert visium.spot_pitch_um(tmp_path, array(SQUARE)) == 8
    for wrong in (0, -1, float("nan"), float("inf")):
        refused("positive spot pitch", visium.spot_pitch_um, tmp_path, array(VISIUM), given=wrong)
