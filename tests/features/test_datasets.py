"""Slices as training sees them: joined by barcode, divided into parts, given out in batches."""

import multiprocessing
import pickle
import shutil

import h5py
import numpy as np
import pytest
import torch
from spaceranger_folders import refused
from tiny_runs import Work, data_flags, rewrite_matrix, row, stderr_line

from utils.features import dataset
from utils.files.arrays import ArrayStore
from utils.files.atomic import write_record
from utils.genes import panels as gene_panels
from utils.images import tiles
from utils.images.image import open_image
from utils.slices import splits, visium
from utils.training import loop

ROLES = ("input", "target")


def load(work, name="P01_1", part="train", roles=ROLES, val_strip=False):
    return dataset.load_slice(row(name, part), data_flags(work), roles, val_strip)


def repack(folder, rows, record=None):
    """Packed tiles and their record, changed: the given rows are kept, in the given order."""
    with h5py.File(folder / "tiles.h5") as file:
        barcodes, xy, img = file["barcode"].asstr()[:], file["coords"][:], file["img"][:]
    tiles.write_pack(folder, barcodes[rows], xy[rows], [img[rows]], img.shape[1])
    write_record(folder / "tiles.json", tiles.read_record(folder) | (record or {}))
    return barcodes


def square(work, name, barcode):
    """The tile of a spot, cut once more from its image."""
    root = work.data / name
    spot = visium.open_slice(root).spots.loc[barcode, ["x_fullres_px", "y_fullres_px"]]
    record = tiles.read_record(work.tiles / name)
    cut = tiles.Cut(**{key: record[key] for key in ("source", "image", "um_per_px", "crop", "size", "resampled")})
    with open_image(root / record["image"]) as image:
        return tiles.cut_tile(image, spot.to_numpy(float), cut)


# ---- joined by barcode


def test_every_spot_has_its_own_tile_whatever_the_order_of_the_pack(work):
    repack(work.tiles / "P01_1", np.random.default_rng(3).permutation(70))
    one = load(work)
    assert len(one.barcodes) == 70 and one.panels["target"].read_counts().shape == (70, 20)
    found = one.pack.read(one.tile_rows)
    for i, barcode in enumerate(one.barcodes):
        np.testing.assert_array_equal(found[i], square(work, "P01_1", barcode))


def test_a_slice_holds_what_its_panels_hold(work):
    one = load(work)
    for role in ROLES:
        panel = gene_panels.read_panel(gene_panels.panel_path(work.data, work.panels, "P01_1", role))
        np.testing.assert_array_equal(one.panels[role].read_counts(), panel.read_counts())
        np.testing.assert_array_equal(one.total_counts, panel.total_counts)
        np.testing.assert_array_equal(one.xy_fullres_px, panel.xy_fullres_px)
    expected = gene_panels.bin_tokens(one.panels["input"].read_counts(), one.total_counts)
    np.testing.assert_array_equal(one.bins(), expected)
    assert expected.max() == 5 and (one.name, one.patient) == ("P01_1", "P01")
    assert one.root == work.data / "P01_1"


def test_spots_without_a_tile_are_refused(work):
    barcodes = repack(work.tiles / "P01_1", np.r_[0:4, 5:9, 10:70])
    assert barcodes[4] in refused("expected a tile for each of 70 spots, found none for 2", load, work)


def test_spots_outside_the_image_are_left_out_and_said(work, capsys):
    barcodes = repack(work.tiles / "P01_1", np.r_[0:4, 6:70])
    write_record(
        work.tiles / "P01_1" / "tiles.json",
        tiles.read_record(work.tiles / "P01_1") | {"outside": barcodes[4:6].tolist()},
    )
    one = load(work)
    assert "P01_1: 2 spots outside the image left out" in capsys.readouterr().out
    assert len(one.barcodes) == len(one.total_counts) == len(one.part) == len(one.bins()) == 68
    assert set(one.barcodes).isdisjoint(barcodes[4:6])
    np.testing.assert_array_equal(one.pack.read(one.tile_rows[[40]])[0], square(work, "P01_1", one.barcodes[40]))


def test_panels_of_other_spots_are_refused(work):
    path = gene_panels.panel_path(work.data, work.panels, "P01_1", "target")
    shutil.copy(gene_panels.panel_path(work.data, work.panels, "P02_1", "target"), path)
    refused("filtered_feature_bc_matrix_decoder.h5ad: expected the .* spots of", load, work)


def test_slices_of_another_panel_or_another_tile_scale_are_refused(work):
    rows = [row("P01_1"), row("P02_1", "val")]
    assert len(dataset.load_slices(rows, data_flags(work), ROLES, False)) == 2
    write_record(work.tiles / "P02_1" / "tiles.json", tiles.read_record(work.tiles / "P02_1") | {"um_per_px": 5.0})
    words = "P02_1: expected tiles of 32 px at 3.5 um per px .* found 32 px at 5 um"
    refused(words, dataset.load_slices, rows, data_flags(work), ROLES, False)
    other = Work(work.data, work.tiles, work.out / "other", work.out)
    other.run("make_decoder_data", "--n_top_genes", 19)
    for role in gene_panels.FILES:
        shutil.copy(
            gene_panels.panel_path(other.data, other.panels, "P02_1", role),
            gene_panels.panel_path(work.data, work.panels, "P02_1", role),
        )
    refused(
        "expected the target genes of P01_1, found others", dataset.load_slices, rows, data_flags(work), ROLES, False
    )
    refused("tiles of", dataset.load_slices, rows, data_flags(work), ("input",), False)


def test_the_scale_of_tiles(work):
    one = load(work)
    assert dataset.tile_scale(one) == (32, 3.5), "112 um over 32 px"
    assert dataset.um_per_fullres_px(one) == pytest.approx(1.0, rel=0.01), "as simulated"
    of_hires = one.pack.record | {"source": "hires", "crop": one.pack.record["crop"] * 0.3, "scale": 0.3}
    one.pack.record = of_hires
    assert dataset.um_per_fullres_px(one) == pytest.approx(1.0, rel=0.01)
    one.pack.record = of_hires | {"resampled": False}
    assert dataset.tile_scale(one) == (32, None), "a published crop states no scale"
    one.pack.record = of_hires | {"um_per_px": None}
    assert dataset.um_per_fullres_px(one) is None


def test_the_scale_of_tiles_is_kept_as_it_is(work):
    """A prediction cuts its tiles at the kept scale: to three decimals they would not be those of training."""
    one = load(work)
    one.pack.record = one.pack.record | {"um_per_px": 310 / 224}
    assert dataset.tile_scale(one) == (32, 310 / 224)


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ((32, 310 / 224), [32, 1.384], True),
        ((32, 55 / 224), [32, 0.246], True),
        ((32, 3.5), (64, 3.5), False),
        ((32, 3.5), (32, 3.51), False),
        ((32, None), [32, None], True),
        ((32, None), (32, 3.5), False),
        ((32, None), (64, None), False),
    ],
)
def test_scales_that_agree(one, other, same):
    assert dataset.same_scale(one, other) is dataset.same_scale(other, one) is same


# ---- parts


def test_parts_of_a_slice(work):
    one = load(work, part="val")
    assert one.rows_of("val").tolist() == one.rows_of("all").tolist() == list(range(70))
    assert not len(one.rows_of("train"))


def test_the_strip_of_a_train_slice_and_of_no_other(work):
    one = load(work, val_strip=True)
    np.testing.assert_array_equal(one.part, splits.strip_parts(one.xy_fullres_px, one.pitch_fullres_px))
    assert [len(one.rows_of(part)) for part in ("val", "all")] == [17, 70]
    assert 0 < len(one.rows_of("train")) < 53 and "gap" in one.part
    assert set(load(work, part="test", val_strip=True).part) == {"test"}


def test_spots_of_several_slices(work):
    slices = [load(work), load(work, "P02_1", "val"), load(work, "P03_1", "train")]
    found = dataset.spots_of(slices, "train")
    assert found.tolist() == [[0, i] for i in range(70)] + [[2, i] for i in range(70)]
    assert dataset.all_spots(slices[0]).tolist() == [[0, i] for i in range(70)]


# ---- batches


def test_an_epoch_gives_every_spot_at_most_once_and_drops_the_rest():
    order = loop.EpochOrder(70, 16, seed=0)
    batches = list(order)
    assert len(order) == len(batches) == 4 and all(len(batch) == 16 for batch in batches)
    spots = [spot for batch in batches for spot in batch]
    assert len(set(spots)) == 64 and set(spots) <= set(range(70)) and spots != sorted(spots)
    assert all(isinstance(spot, int) for spot in spots)


def test_the_order_is_that_of_seed_and_epoch():
    def drawn(seed, epoch, n=70):
        order = loop.EpochOrder(n, 16, seed)
        order.epoch = epoch
        return list(order)

    assert drawn(0, 3) == drawn(0, 3)
    assert drawn(0, 3) != drawn(0, 4) != drawn(1, 3)
    missing = {tuple(set(range(70)) - {spot for batch in drawn(0, e) for spot in batch}) for e in range(5)}
    assert len(missing) > 1, "not always the same spots are dropped"


@pytest.mark.parametrize("batch_size", [16, 5])
def test_a_batch_with_neighbours_has_each_spot_beside_one_of_its_nearest(batch_size):
    near = np.stack([np.arange(70) + 100, np.arange(70) + 200], axis=1)  # told apart from the spots themselves
    order = loop.EpochOrder(70, batch_size, seed=0, near=near)
    batches = list(order)
    assert len(batches) == len(order) == 70 // batch_size and {len(batch) for batch in batches} == {batch_size}
    flat = np.concatenate(batches)
    spots, neighbours = flat[: len(flat) // 2 * 2].reshape(-1, 2).T
    assert len(set(spots)) == len(spots) and (spots < 70).all()
    assert (neighbours % 100 == spots).all() and set(neighbours // 100) == {1, 2}
    order.first = 2
    assert list(order) == batches[2:], "resumed, the batches are the same"


def test_nearest_spots_are_of_the_same_slice_and_the_same_part(work):
    slices = [load(work), load(work, "P02_1", "val"), load(work, "P03_1", "train")]
    spots = dataset.spots_of(slices, "train")
    near = dataset.nearest_spots(slices, spots, 3)
    assert near.shape == (140, 3)
    for i, (slice_, here) in enumerate(spots):
        xy = slices[slice_].xy_fullres_px
        distance = np.linalg.norm(xy - xy[here], axis=1)
        assert (spots[near[i], 0] == slice_).all() and i not in near[i]
        np.testing.assert_allclose(distance[spots[near[i], 1]], np.sort(distance)[1:4])


def test_a_slice_of_few_spots_fills_up_with_the_spot_itself(work):
    slice_ = load(work)
    near = dataset.nearest_spots([slice_, slice_], np.array([[0, 4], [0, 9], [1, 5]]), 3)
    assert near.tolist() == [[1, 0, 0], [0, 1, 1], [2, 2, 2]]


def test_spots_in_turn():
    assert dataset.in_turn(5, 2) == [[0, 1], [2, 3], [4]]


@pytest.fixture
def batches(work):
    slices = [load(work), load(work, "P02_1", "train")]
    spots = dataset.spots_of(slices, "train")
    bins = [one.bins() for one in slices]
    extra = {"bins": np.stack([bins[i][r] for i, r in spots])}
    return dataset.TileBatches(slices, spots, extra), slices


def test_a_batch_over_two_slices_keeps_its_order(batches, work):
    data, slices = batches
    numbers = [100, 3, 69, 70, 3]
    (found,) = dataset.loader(data, [numbers], 0)
    assert len(data) == 140 and found["spot"].tolist() == numbers and found["tiles"].dtype == torch.uint8
    for i, number in enumerate(numbers):
        one, at = slices[number // 70], number % 70
        np.testing.assert_array_equal(found["tiles"][i], square(work, one.name, one.barcodes[at]))
        np.testing.assert_array_equal(found["bins"][i], one.bins()[at])


def test_reading_processes_give_the_same_batches(batches):
    data, _ = batches
    order = loop.EpochOrder(len(data), 16, seed=4)
    alone, two = dataset.loader(data, order, 0), dataset.loader(data, order, 2)
    for epoch in range(2):
        order.epoch = epoch
        expected, found = list(alone), list(two)
        assert len(expected) == len(found) == 8
        for one, other in zip(expected, found, strict=True):
            assert set(one) == set(other) == {"tiles", "spot", "bins"}
            assert all(torch.equal(one[name], other[name]) for name in one)
    assert [batch["spot"].tolist() for batch in expected] == list(order)


def test_reading_processes_are_handed_where_tiles_lie_and_no_more(batches, tmp_path):
    """Whatever is kept per spot stays in this process, in memory or in a file without a name."""
    data, _ = batches
    before = len(pickle.dumps(data))
    data.extra["wide"] = ArrayStore(0, tmp_path).empty((len(data), 10_000), np.uint8)
    assert len(pickle.dumps(data)) == before < 200 * len(data)
    again = pickle.loads(pickle.dumps(data))
    np.testing.assert_array_equal(again.__getitems__([5, 99])["tiles"], data.__getitems__([5, 99])["tiles"])


def test_reading_processes_end_with_the_block(batches):
    data, _ = batches
    with pytest.raises(KeyError), dataset.loader(data, dataset.in_turn(len(data), 16), 2) as loader:
        next(iter(loader))
        readers = [child for child in multiprocessing.active_children() if child.is_alive()]
        assert len(readers) == 2
        raise KeyError("training")
    assert not [reader for reader in readers if reader.is_alive()]
    with pytest.raises(ValueError, match="found one whose block has ended"):
        next(iter(loader))


def replaced(data, what):
    """Another file of the same kind in a slice, as a user would put it there."""
    if what == "counts":
        rewrite_matrix(data / "P01_1", lambda counts, *names: (counts + (counts > 0), *names))
    else:
        path = next((data / "P01_1" / "spatial").glob("tissue_positions*"))
        lines = path.read_text().splitlines(keepends=True)
        path.write_text("".join([lines[0], lines[1].rstrip("\n") + "1\n", *lines[2:]]))


@pytest.mark.parametrize("what", ["counts", "positions"])
@pytest.mark.parametrize("script", ["train_mymodel", "train_decoder", "get_accuracy_image", "decoder_similarity"])
def test_panels_of_replaced_files_are_refused(what, script, trained, tmp_path, capsys):
    """Whatever was made of a slice says which files it was made of."""
    data = shutil.copytree(trained.data, tmp_path / "data")
    replaced(data, what)
    work = Work(data, trained.tiles, trained.panels, tmp_path)
    model = ("--decoder", trained.decoder) if script == "decoder_similarity" else ("--encoder", trained.encoder)
    flags = () if script == "train_mymodel" else model
    flags += ("--part", "train", "--allow_leak") if script in ("get_accuracy_image", "decoder_similarity") else ()
    assert work.exit_code(script, *flags) == 2
    stderr_line(capsys, "P01_1/.*h5ad: expected genes of the counts and positions in .*found those of other files; fix")


def test_panels_of_counts_that_are_no_longer_there_serve(trained, work):
    """Counts may be put away once the panels are written."""
    data = work.out / "data"
    shutil.copytree(trained.data, data, ignore=shutil.ignore_patterns("filtered_feature_bc_matrix.h5"))
    flags = data_flags(Work(data, work.tiles, work.panels, work.out))
    assert len(dataset.load_slice(row("P01_1", "train"), flags, ROLES, False).barcodes) == 70
