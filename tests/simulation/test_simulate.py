"""Simulated slices: they read back like Space Ranger's, they repeat, and their truth is true."""

import itertools
import json
import subprocess
import sys

import anndata
import h5py
import numpy as np
import pandas as pd
import pytest
from PIL import Image
from scipy import sparse
from scipy.ndimage import gaussian_filter
from scipy.spatial import cKDTree

from utils.evaluation import metrics
from utils.simulation import __main__ as command
from utils.simulation import counts as counting
from utils.simulation import slices as simulation
from utils.simulation.image import Scene, measure_tiles
from utils.simulation.tissue import FIBROBLAST, LYMPHOCYTE, TUMOUR, push_apart, smooth_field
from utils.slices.visium import read_slice

SIZE = {"n_patients": 3, "n_spots": 60, "n_genes": 80, "seed": 3}


@pytest.fixture(scope="module")
def slices(tmp_path_factory):
    return simulation.write_slices(tmp_path_factory.mktemp("simulated") / "data", **SIZE)


def read_counts(folder):
    """Counts (S, G) and barcodes, straight from the file."""
    with h5py.File(folder / "filtered_feature_bc_matrix.h5") as file:
        m = file["matrix"]
        counts = sparse.csc_matrix((m["data"][:], m["indices"][:], m["indptr"][:]), shape=m["shape"][:])
        return counts.T.toarray(), m["barcodes"][:].astype(str)


def read_positions(folder):
    path = folder / "spatial" / "tissue_positions.csv"
    if path.exists():
        return pd.read_csv(path)
    names = pd.read_csv(path.with_name("tissue_positions_list.csv"), header=None)
    return names.set_axis(
        ["barcode", "in_tissue", "array_row", "array_col", "pxl_row_in_fullres", "pxl_col_in_fullres"], axis=1
    )


def read_image(folder):
    return np.asarray(Image.open(folder / f"{folder.name}_he.jpg"))


def test_table_names_every_slice_its_part_and_image(slices):
    table = pd.read_csv(slices[0].parent / "slices.csv")
    assert list(table.columns) == ["slice", "patient", "part", "spot_pitch_um", "image"]
    assert list(table["slice"]) == [folder.name for folder in slices]
    assert list(table["part"]) == ["train", "val", "test"]
    assert (table["spot_pitch_um"] == 100).all()
    assert all((folder / image).is_file() for folder, image in zip(slices, table["image"], strict=True))


def test_matrix_follows_the_10x_schema_and_scanpy_agrees(slices):
    import scanpy

    counts, barcodes = read_counts(slices[0])
    adata = scanpy.read_10x_h5(slices[0] / "filtered_feature_bc_matrix.h5")
    np.testing.assert_array_equal(adata.X.toarray(), counts)
    assert list(adata.obs_names) == list(barcodes) == sorted(barcodes)
    assert adata.obs_names.str.fullmatch("[ACGT]{16}-1").all() and adata.obs_names.is_unique
    assert adata.var["gene_ids"].str.fullmatch(r"ENSG\d{11}").all() and adata.var_names.is_unique
    assert set(adata.var["feature_types"]) == {"Gene Expression"}
    with h5py.File(slices[0] / "filtered_feature_bc_matrix.h5") as file:
        assert file.attrs["library_ids"][0].decode() == slices[0].name
        assert file["matrix/data"].dtype == np.int32


def test_our_reader_reads_the_folder(slices):
    for folder in slices:
        counts, barcodes = read_counts(folder)
        read = read_slice(folder)
        np.testing.assert_array_equal(read.counts.toarray(), counts)
        assert list(read.spots.index) == list(barcodes)
        truth = anndata.read_h5ad(folder / "truth.h5ad")
        np.testing.assert_array_equal(read.spots[["x_fullres_px", "y_fullres_px"]], truth.obsm["spatial"])


def test_grid_is_visiums(slices):
    for folder in slices:
        spots = read_positions(folder)
        assert ((spots["array_row"] + spots["array_col"]) % 2 == 0).all()
        assert spots["in_tissue"].sum() == SIZE["n_spots"] < len(spots)
        distance, _ = cKDTree(spots[["pxl_col_in_fullres", "pxl_row_in_fullres"]]).query(
            spots[["pxl_col_in_fullres", "pxl_row_in_fullres"]], k=2
        )
        np.testing.assert_allclose(distance[:, 1], 100, atol=1)  # um, at 1 um per pixel; positions are whole pixels
        assert set(read_counts(folder)[1]) == set(spots.loc[spots["in_tissue"] == 1, "barcode"])
    assert [(folder / "spatial" / "tissue_positions.csv").exists() for folder in slices] == [True, False, True]


def test_a_place_has_the_same_barcode_in_every_slice(slices):
    first, second = (read_positions(folder).set_index(["array_row", "array_col"])["barcode"] for folder in slices[:2])
    pd.testing.assert_series_equal(first, second)


def test_small_images_and_scale_factors_fit_the_full_image(tmp_path):
    (folder,) = simulation.write_slices(tmp_path / "fine", n_patients=1, n_spots=60, n_genes=30, um_per_px=0.5)
    scales = json.loads((folder / "spatial" / "scalefactors_json.json").read_text())
    height, width, _ = read_image(folder).shape
    assert max(height, width) > 2000
    for kind, longest in (("hires", 2000), ("lowres", 600)):
        image = Image.open(folder / "spatial" / f"tissue_{kind}_image.png")
        scale = scales[f"tissue_{kind}_scalef"]
        assert max(image.size) == longest and image.size == (round(width * scale), round(height * scale))
    assert scales["spot_diameter_fullres"] == 130 and scales["fiducial_diameter_fullres"] == 210  # 65 and 105 um
    spots = read_positions(folder)
    xy = spots[["pxl_col_in_fullres", "pxl_row_in_fullres"]]
    np.testing.assert_allclose(cKDTree(xy).query(xy, k=2)[0][:, 1], 200, atol=1)
    assert pd.read_csv(folder.parent / "slices.csv")["part"].isna().all()  # one patient cannot be split


def test_tissue_is_darker_than_the_glass_around(slices):
    for folder in slices:
        image, spots = read_image(folder).mean(axis=2), read_positions(folder)
        x, y = spots["pxl_col_in_fullres"], spots["pxl_row_in_fullres"]
        light = gaussian_filter(image, 30)[y, x]
        assert light[spots["in_tissue"] == 1].mean() < light[spots["in_tissue"] == 0].mean() - 20
        assert image[:20].std() < 12  # nothing but glass along the border


def test_slices_differ_in_stain_and_depth(slices):
    colours = [read_image(folder).reshape(-1, 3).mean(axis=0) for folder in slices]
    depths = [np.median(read_counts(folder)[0].sum(axis=1)) for folder in slices]
    assert min(np.abs(a - b).max() for a, b in itertools.pairwise(colours)) > 1
    assert max(depths) > 3 * min(depths)


def test_counts_are_drawn_around_the_truth(slices):
    for folder in slices:
        truth = anndata.read_h5ad(folder / "truth.h5ad")
        counts, barcodes = read_counts(folder)
        assert list(truth.obs_names) == list(barcodes)
        np.testing.assert_allclose(truth.X.sum(axis=1), 1, rtol=1e-5)
        mean = truth.X * truth.obs["depth"].to_numpy()[:, None]
        z = (counts - mean) / np.sqrt(mean + truth.var["dispersion"].to_numpy() * mean**2)
        assert abs(z.mean()) < 5 / np.sqrt(z.size) and 0.9 < z.std() < 1.1


def test_truth_says_what_a_gene_depends_on_and_how_far_it_can_be_known(slices):
    for folder in slices:
        truth = anndata.read_h5ad(folder / "truth.h5ad")
        driven = (truth.var.filter(like="loading_") != 0).any(axis=1)
        assert 0.8 < driven.mean() < 1
        for scale in ("lognorm", "residuals"):
            ceiling = truth.var[f"ceiling_{scale}"]
            assert ceiling.dropna().between(-1, 1).all() and 0.3 < ceiling[driven].mean() < 0.8
        assert abs(truth.var.loc[~driven, "ceiling_residuals"].mean()) < 0.2
        np.testing.assert_allclose(np.ptp(truth.X[:, ~driven], axis=0), 0, atol=1e-8)
        assert "Pearson correlation" in truth.uns["magic"]["ceiling"]
        assert (truth.obsm["programmes"] >= 0).all() and (truth.obsm["programmes"] <= 1).all()


def test_ceiling_is_one_without_chance_and_nought_without_signal(monkeypatch):
    rng = np.random.default_rng(0)
    genes = counting.draw_genes(rng, 80)
    fractions = counting.expected_fractions(rng.random((200, len(counting.PROGRAMMES))), genes, np.zeros(80))
    monkeypatch.setattr(counting, "DEPTH_NOISE", 0.0)
    for used, low, high in ((fractions, 0.97, 1.0), (np.repeat(fractions[:1], 200, axis=0), -0.05, 0.05)):
        depth, dispersion = np.full(200, 1e7), np.full(80, 1e-5)
        counts = counting.draw_counts(rng, depth[:, None] * used, dispersion)
        best = counting.ceilings(rng, counts, used, depth, dispersion, redraws=8)
        driven = (genes.loadings != 0).any(axis=0)
        assert low < best["lognorm"][driven].mean() < high and low < best["residuals"][driven].mean() < high


def test_measured_tile_by_hand():
    nuclei = pd.DataFrame({"x_um": [100, 110, 144, 300], "y_um": [100.0, 90, 100, 100], "kind": 0})
    nuclei["kind"] = [TUMOUR, LYMPHOCYTE, FIBROBLAST, TUMOUR]
    nuclei["length_um"], nuclei["width_um"] = [9.0, 6, 16, 20], [4.0, 6, 4, 20]
    left_half = np.zeros((100, 100), np.float32)
    left_half[:, :25] = 1  # 4 um a cell: x below 100 um
    maps = {"tumour": left_half, "stroma": 1 - left_half, "collagen": 0.5 + 0 * left_half, "eosin": 1 + 0 * left_half}
    white = np.zeros((200, 200), np.float32)
    white[22:50] = 1  # 2 um a pixel: y from 44 to 100 um
    scene = Scene(np.zeros((200, 200, 3), np.uint8), 2.0, nuclei, maps, np.full((200, 200), 0.3, np.float32), white)
    tile = measure_tiles(scene, np.array([[100.0, 100.0]])).iloc[0]
    assert tile["density"] == pytest.approx(3 / 0.112**2) and tile["nuclear_size"] == pytest.approx((6 + 6 + 8) / 3)
    assert tile["lymphocytes"] == tile["spindles"] == pytest.approx(1 / 3)
    assert tile["tumour"] == tile["holes"] == pytest.approx(0.5)
    assert tile["collagen"] == pytest.approx(0.25) and tile["eosin"] == pytest.approx(0.3)


def test_fields_are_smooth_and_nuclei_make_room():
    field = smooth_field(np.random.default_rng(0), (200, 300), 20.0)
    assert field.shape == (200, 300) and field.std() == pytest.approx(1, rel=1e-5)
    assert np.abs(np.diff(field, axis=0)).mean() < 0.1  # neighbours of white noise differ by 1.1
    points = np.random.default_rng(0).uniform(0, 50, (20, 2))
    apart = push_apart(points, np.full(20, 3.0), rounds=50)
    assert cKDTree(points).query(points, k=2)[0][:, 1].min() < 3 < 5.5 < cKDTree(apart).query(apart, k=2)[0][:, 1].min()
    assert np.abs(apart - points).max() < 10


def image_statistics(image, spots):
    """(S, 13) simple statistics of the 112 px tiles, standardised over the slice: colour, dark pixels, texture."""
    rows = []
    for x, y in spots.astype(int):
        tile = image[y - 56 : y + 56, x - 56 : x + 56].astype(float)
        light = tile.mean(axis=2)
        texture = [np.log(np.var(gaussian_filter(light, s / 2) - gaussian_filter(light, s)) + 1) for s in (1, 2, 4, 8)]
        dark = [(light < level).mean() for level in (110, 140, 215)]
        rows.append([*tile.mean(axis=(0, 1)), *tile.std(axis=(0, 1)), *dark, *texture])
    return (np.array(rows) - np.mean(rows, axis=0)) / np.std(rows, axis=0)


def test_the_image_shows_what_drives_the_genes(slices):
    """Ridge on hand-made statistics, two patients to the third, comes to half of the ceiling even on 120 tiles."""
    truths = [anndata.read_h5ad(folder / "truth.h5ad") for folder in slices]
    x = [image_statistics(read_image(f), t.obsm["spatial"]) for f, t in zip(slices, truths, strict=True)]
    counts = [read_counts(folder)[0] for folder in slices]
    y = [metrics.pearson_residuals(found, found.sum(axis=1)) for found in counts]
    y = [values - values.mean(axis=0) for values in y]
    scores = []
    for held in range(3):
        train_x, train_y = (np.vstack([v for i, v in enumerate(values) if i != held]) for values in (x, y))
        weights = np.linalg.solve(train_x.T @ train_x + 30 * np.eye(train_x.shape[1]), train_x.T @ train_y)
        pcc = metrics.pearson_per_gene(x[held] @ weights, y[held])
        scores.append(np.nanmean(pcc) / np.nanmean(truths[held].var["ceiling_residuals"]))
    assert np.mean(scores) > 0.5, scores


def test_same_seed_same_pixels_and_counts_another_seed_others(slices, tmp_path):
    again = simulation.write_slices(tmp_path / "again", **SIZE)
    other = simulation.write_slices(tmp_path / "other", **SIZE | {"n_patients": 1, "seed": 4})
    for one, two in zip(slices, again, strict=True):
        np.testing.assert_array_equal(read_counts(one)[0], read_counts(two)[0])
        assert (one / f"{one.name}_he.jpg").read_bytes() == (two / f"{two.name}_he.jpg").read_bytes()
    assert not np.array_equal(read_counts(slices[0])[0], read_counts(other[0])[0])
    assert not np.array_equal(read_image(slices[0]), read_image(other[0]))


def test_patients_slices_are_different_pieces_of_one_patient(tmp_path):
    one, two = simulation.write_slices(tmp_path / "out", n_patients=1, slices_per_patient=2, n_spots=30, n_genes=20)
    assert [one.name, two.name] == ["P01_1", "P01_2"]
    assert not np.array_equal(read_counts(one)[0], read_counts(two)[0])
    assert set(pd.read_csv(tmp_path / "out" / "slices.csv")["patient"]) == {"P01"}


def test_command_line_prints_the_ceilings_and_writes_only_into_out(tmp_path, monkeypatch, capsys):
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    out = tmp_path / "deep" / "data"
    flags = ["--patients", "1", "--spots", "20", "--genes", "20"]
    command.main(command.parse_args(["--out", str(out), *flags]))
    assert "mean ceiling of the top 20 genes: 0." in capsys.readouterr().out
    assert sorted(p.name for p in out.iterdir()) == ["P01_1", "slices.csv"]
    assert not any((tmp_path / "elsewhere").iterdir()) and {p.name for p in tmp_path.iterdir()} == {"deep", "elsewhere"}
    with pytest.raises(ValueError, match="expected a new or an empty folder"):
        command.main(command.parse_args(["--out", str(out), *flags]))


@pytest.mark.parametrize(
    "wrong", [{"n_patients": 0}, {"n_spots": 5}, {"n_genes": 1}, {"um_per_px": 10}, {"slices_per_patient": 0}]
)
def test_what_cannot_be_simulated_is_refused_before_anything_is_written(tmp_path, wrong):
    with pytest.raises(ValueError, match="found"):
        simulation.write_slices(tmp_path / "out", **wrong)
    assert not (tmp_path / "out").exists()


def test_an_interrupted_run_leaves_no_complete_looking_slice(tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(simulation, "write_truth", fail)
    with pytest.raises(KeyboardInterrupt):
        simulation.write_slices(tmp_path, n_patients=1, n_spots=20, n_genes=20)
    assert [p.name for p in tmp_path.iterdir()] == ["P01_1.part"]


def test_no_heavy_imports():
    code = "import sys, utils.simulation.slices; print({'torch', 'scanpy', 'anndata'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "set()"
