"""benchmarks/downstream.py: its statistics by hand, and its table of predictions whose truth is known."""

import anndata
import numpy as np
import pandas as pd
import pytest
from tiny_runs import stderr_line

from benchmarks import downstream
from utils import settings


def grid(side: int, pitch: float = 10.0) -> np.ndarray:
    row, column = np.divmod(np.arange(side * side), side)
    return np.column_stack([column, row]) * pitch


def test_morans_i_by_hand():
    """Four spots in a row: three pairs of neighbours, both ways."""
    xy = np.column_stack([np.arange(4.0), np.zeros(4)])
    weights = downstream.neighbour_weights(xy, 1.0)
    assert weights.sum() == 6
    rising, alternating = [0.0, 1, 2, 3], [0.0, 1, 0, 1]
    found = downstream.morans_i(np.column_stack([rising, alternating]), weights)
    # rising: 4 / 6 * 2 (0.75 + 0.25 * -1 + 0.75) / 5 with z = -1.5, -0.5, 0.5, 1.5; alternating: 4 / 6 * -1.5 / 1
    np.testing.assert_allclose(found, [4 / 6 * 2 * (0.75 - 0.25 + 0.75) / 5, -1.0])


def test_neighbours_are_four_on_a_square_array_and_six_on_a_staggered_one():
    side = 5
    row, column = np.divmod(np.arange(side * side), side)
    staggered = np.column_stack([column + 0.5 * (row % 2), row * np.sqrt(3) / 2])
    for xy, most in ((grid(side, 1.0), 4), (staggered, 6)):
        assert downstream.neighbour_weights(xy, 1.0).sum(axis=1).max() == most


def test_components_and_regions_by_hand():
    values = np.array([[3.0, 0], [-3, 0], [0, 1], [0, -1]])
    np.testing.assert_allclose(downstream.component_fractions(values), [0.9, 0.1])
    np.testing.assert_allclose(downstream.region_means(values, np.array([0, 0, 1, 0])), [[0, -1 / 3], [0, 1]])


def test_signatures_are_means_of_standardised_genes(rng):
    first, second = rng.normal(size=(2, 40))
    values = np.column_stack([first, second, first + 0.1 * second, -first])
    assert set(downstream.programmes(values)[0][:2]) == {0, 2} and downstream.programmes(values)[0][-1] == 3
    found = downstream.signatures(values * [1, 5, 1, 3] + 7, np.array([[0, 3], [1, 1]]))
    np.testing.assert_allclose(found[:, 0], 0, atol=1e-12)
    np.testing.assert_allclose(found[:, 1], (second - second.mean()) / second.std())


def write(path, rng, measured=True):
    """Predictions that are the smooth part of the measurement, at a third of its size."""
    xy = grid(12)
    smooth = np.column_stack([np.sin(xy @ rng.normal(size=2) / 40 + rng.uniform(0, 6)) for _ in range(30)])
    counted = smooth + rng.normal(size=smooth.shape)
    adata = anndata.AnnData(smooth / 3, obs=pd.DataFrame({"slice": pd.Categorical(["A"] * len(xy))}))
    adata.obs_names, adata.var_names = [f"s{i}" for i in range(len(xy))], [f"g{i}" for i in range(30)]
    adata.var["val_pcc"], adata.obsm["spatial"] = np.linspace(0.5, 0, 30), xy
    if measured:
        adata.layers["measured"] = counted
        adata.layers["measured"][:, 3] = np.nan
    adata.uns["magic"] = {"units": {"X": "Pearson residuals"}}
    adata.write_h5ad(path)
    return path


def test_the_table_says_what_smoothing_does(rng, tmp_path, capsys):
    path = write(tmp_path / "predictions.h5ad", rng)
    downstream.main(downstream.parse_args(["--predictions", str(path)]))
    printed = capsys.readouterr().out
    assert "Slice A: 144 spots, 29 genes (1 left out" in printed
    lines = [line.strip("| ").split(" | ") for line in printed.splitlines() if line.startswith("|")]
    figures = {cells[0].split(",")[0].split(" (")[0]: [cells[1], cells[2]] for cells in lines}
    moran = [float(cell) for cell in figures["Moran's I"]]
    assert moran[0] > 0.8 > moran[1] and "29 of 29 genes" in printed
    of_pair = [float(cell) for cell in figures["abs. correlation between two genes"]]
    assert of_pair[0] > 1.5 * of_pair[1]
    over_spots, of_regions = (
        float(figures[name][1]) for name in ("a gene over spots", "means of 9 regions of 4 x 4 pitches")
    )
    assert of_regions > over_spots > 0.3


@pytest.mark.parametrize("kind", ["text", "unmeasured"])
def test_other_files_are_refused_in_one_line(rng, tmp_path, capsys, kind):
    path = tmp_path / "predictions.h5ad"
    if kind == "text":
        path.write_text("no predictions")
    else:
        write(path, rng, measured=False)
    with pytest.raises(SystemExit) as stop:
        settings.run(downstream.main, downstream.parse_args(["--predictions", str(path)]))
    assert stop.value.code == 2
    stderr_line(capsys, "predictions.h5ad: expected")
