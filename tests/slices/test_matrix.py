"""Count matrices in every form, what must be refused about them, and their hash."""

import gzip
import hashlib

import h5py
import numpy as np
import pytest
import scipy.sparse as sp
from spaceranger_folders import (
    BARCODES,
    COUNTS,
    GENES,
    IDS,
    position_lines,
    refused,
    write_folder,
    write_h5,
    write_spatial,
)

from utils.slices import content, visium
from utils.slices.matrix import read_genes


@pytest.fixture
def slice_dir(tmp_path):
    """A good slice; tests of bad input change one thing about it."""
    root = tmp_path / "C2"
    write_h5(root / "filtered_feature_bc_matrix.h5")
    write_spatial(root)
    return root


@pytest.mark.parametrize(("columns", "ids"), [(1, GENES), (2, IDS), (3, IDS)])
def test_features_of_one_to_three_columns(tmp_path, columns, ids):
    matrix = visium.read_matrix(write_folder(tmp_path / "m", zipped=False, columns=columns))
    assert (matrix.genes.tolist(), matrix.gene_ids.tolist()) == (GENES, ids)


@pytest.mark.parametrize("quote", ["", '"'])
def test_a_missing_symbol_is_the_genes_id_and_quotes_of_r_are_no_part_of_a_name(tmp_path, quote):
    """As R writes a table of features whose symbols are missing."""
    names = ["NA", "TP53", "", "TP53 "]
    folder, expected = write_folder(tmp_path / "m", zipped=False), [IDS[0], "TP53", IDS[2], "TP53"]
    lines = ["\t".join(f"{quote}{cell}{quote}" for cell in line) for line in zip(IDS, names, strict=True)]
    (folder / "features.tsv").write_text("\n".join(lines) + "\n")
    (folder / "barcodes.tsv").write_text("".join(f"{quote}{barcode}{quote}\n" for barcode in BARCODES))
    path = write_h5(tmp_path / "m.h5")
    with h5py.File(path, "a") as file:
        del file["matrix/features/name"]
        file["matrix/features/name"] = [f"{quote}{name}{quote}".encode() for name in names]
    for form in (folder, path):
        matrix = visium.read_matrix(form)
        assert matrix.genes.tolist() == expected and matrix.gene_ids.tolist() == IDS
        assert matrix.barcodes.tolist() == BARCODES
        np.testing.assert_array_equal(matrix.counts.toarray(), COUNTS)
        assert read_genes(form)[0].tolist() == expected


def test_features_between_commas_or_blanks_are_refused(tmp_path):
    folder = write_folder(tmp_path / "m", zipped=False)
    for mark in (",", " "):
        lines = [mark.join(line) for line in zip(IDS, GENES, strict=True)]
        (folder / "features.tsv").write_text("\n".join(lines) + "\n")
        message = refused("expected columns separated by tabs, found ENSG0", visium.read_matrix, folder)
        assert "features.tsv: " in message
    names = ["ARG5,6", "CAN1", "HO", "ADE5,7"]  # of yeast
    (folder / "features.tsv").write_text("\n".join(names) + "\n")
    assert visium.read_matrix(folder).genes.tolist() == names


@pytest.mark.parametrize("zipped", [True, False])
def test_a_folder_of_cell_ranger_2_calls_features_genes(tmp_path, zipped):
    folder, end = write_folder(tmp_path / "m", zipped=zipped, columns=2), ".gz" if zipped else ""
    (folder / f"features.tsv{end}").rename(folder / f"genes.tsv{end}")
    matrix = visium.read_matrix(folder)
    np.testing.assert_array_equal(matrix.counts.toarray(), COUNTS)
    assert (matrix.genes.tolist(), matrix.gene_ids.tolist()) == (GENES, IDS)


def test_barcodes_of_any_letters(tmp_path):
    barcodes = [f"{barcode}-Gewebe ä" for barcode in BARCODES]  # of AnnData.concat with such keys
    path = write_h5(tmp_path / "m.h5", barcodes=[barcode.encode() for barcode in barcodes])
    assert visium.read_matrix(path).barcodes.tolist() == barcodes == visium.read_barcodes(path).tolist()


def test_cell_ranger_2_keeps_genes_beside_the_counts(tmp_path):
    path = write_h5(tmp_path / "m.h5", group="mm10")
    with h5py.File(path, "a") as file:
        file["mm10/gene_names"], file["mm10/genes"] = file["mm10/features/name"][:], file["mm10/features/id"][:]
        del file["mm10/features"]
    matrix = visium.read_matrix(path)
    np.testing.assert_array_equal(matrix.counts.toarray(), COUNTS)
    assert (matrix.genes.tolist(), matrix.gene_ids.tolist()) == (GENES, IDS)


def test_order_of_the_preferred_matrix(tmp_path):
    """Each form comes to lie beside the ones it is preferred to; their totals tell them apart."""
    write_folder(tmp_path / "raw_feature_bc_matrix", zipped=False)
    assert visium.read_matrix(tmp_path).counts.sum() == COUNTS.sum()
    write_h5(tmp_path / "raw_feature_bc_matrix.h5", counts=np.eye(4, dtype=int))
    assert visium.read_matrix(tmp_path).counts.sum() == 4
    write_folder(tmp_path / "filtered_feature_bc_matrix", zipped=True)
    assert visium.read_matrix(tmp_path).counts.sum() == COUNTS.sum()
    write_h5(tmp_path / "filtered_feature_bc_matrix.h5", counts=2 * np.eye(4, dtype=int))
    assert visium.read_matrix(tmp_path).counts.sum() == 8


def test_a_matrix_of_three_files_in_the_slice_folder_is_the_slices_matrix(tmp_path):
    """As in a GEO download whose prefix was cut off; spots are in another order than in the positions."""
    spatial = write_spatial(tmp_path / "S1", position_lines(BARCODES[::-1]))
    for path in write_folder(tmp_path / "m", zipped=True).iterdir():
        path.rename(tmp_path / "S1" / path.name)
    found = visium.read_slice(tmp_path / "S1")
    assert found.matrix == tmp_path / "S1" and found.spots.index.tolist() == BARCODES
    np.testing.assert_array_equal(found.counts.toarray(), COUNTS)
    assert found.spots["y_fullres_px"].tolist() == [1100, 1100, 1000, 1000]
    known = content.files_hash(tmp_path / "S1")
    for other in (tmp_path / "S1" / ".DS_Store", tmp_path / "S1" / "he.tif", spatial / "aligned_fiducials.jpg"):
        other.write_bytes(b"another")
    assert content.files_hash(tmp_path / "S1") == known
    barcodes = gzip.compress("".join(f"{barcode}\n" for barcode in BARCODES[::-1]).encode())
    (tmp_path / "S1" / "barcodes.tsv.gz").write_bytes(barcodes)
    assert content.files_hash(tmp_path / "S1") not in (known, None)


def test_counts_are_of_the_spots_that_were_matched(slice_dir):
    opened = visium.open_slice(slice_dir)
    write_h5(slice_dir / "filtered_feature_bc_matrix.h5", barcodes=BARCODES[::-1])
    assert "filtered_feature_bc_matrix.h5" in refused("expected the barcodes that were there", opened.with_counts)
    write_h5(slice_dir / "filtered_feature_bc_matrix.h5", COUNTS[:2], BARCODES[:2])
    refused("expected the barcodes that were there", opened.with_counts)


def test_a_matrix_with_a_prefix_is_named(tmp_path):
    write_spatial(tmp_path)
    (tmp_path / "GSM1_matrix.mtx.gz").write_bytes(b"")
    refused("cut the prefix off its name", visium.read_slice, tmp_path)


def test_antibodies_are_dropped(slice_dir):
    kinds = ["Gene Expression", "Antibody Capture", "Gene Expression", "Gene Expression"]
    write_h5(slice_dir / "filtered_feature_bc_matrix.h5", kinds=kinds)
    found = visium.read_slice(slice_dir)
    np.testing.assert_array_equal(found.counts.toarray(), COUNTS[:, [0, 2, 3]])
    assert found.genes.tolist() == ["EPCAM", "GAPDH", "TP53"]
    path = write_h5(slice_dir / "only.h5", kinds=["Antibody Capture"] * 4)
    refused("Gene Expression, found .*Antibody Capture", visium.read_matrix, path)


def test_an_empty_matrix_is_read(slice_dir):
    write_h5(slice_dir / "filtered_feature_bc_matrix.h5", counts=np.zeros((4, 4), int))
    found = visium.read_slice(slice_dir)
    assert found.counts.shape == (4, 4) and found.counts.sum() == 0


@pytest.mark.parametrize("zipped", [True, False])
def test_barcodes_alone(tmp_path, zipped):
    write_folder(tmp_path / "filtered_feature_bc_matrix", zipped)
    assert visium.read_barcodes(tmp_path / "filtered_feature_bc_matrix").tolist() == BARCODES


def test_a_probe_level_matrix_is_read_but_is_no_slice(slice_dir):
    path = slice_dir / "filtered_feature_bc_matrix.h5"
    with h5py.File(path, "a") as file:
        file["matrix/features/probe_region"] = np.array([b"spliced"] * 4)
    assert visium.read_matrix(path).counts.sum() == COUNTS.sum()
    refused("probe-level", visium.read_slice, slice_dir)
    refused("probe-level", visium.read_slice_genes, slice_dir)


@pytest.mark.parametrize(
    ("values", "found"),
    [([0.5, 1, 2, 3], "0.5"), ([1, -1, 2, 3], "-1"), ([1, np.nan, 2, 3], "nan"), ([3e9, 1, 1, 1], "3000000000")],
)
def test_counts_that_are_no_counts(tmp_path, values, found):
    good = visium.read_matrix(write_h5(tmp_path / "good.h5", counts=np.diag([1.0, 2.0, 3.0, 4.0])))
    assert good.counts.data.tolist() == [1, 2, 3, 4]
    message = refused("raw counts", visium.read_matrix, write_h5(tmp_path / "bad.h5", counts=np.diag(values)))
    assert "bad.h5" in message and found in message


def test_damaged_matrices(slice_dir):
    path = slice_dir / "filtered_feature_bc_matrix.h5"
    whole = path.read_bytes()
    for broken in (whole[: len(whole) // 2], b"", b"not an HDF5 file"):
        path.write_bytes(broken)
        for function, place in (
            (visium.read_matrix, slice_dir),
            (visium.read_slice, slice_dir),
            (visium.read_barcodes, path),
        ):
            assert path.name in refused("expected a 10x matrix in HDF5, found", function, place)
    path.write_bytes(whole)
    with h5py.File(path, "a") as file:
        del file["matrix/indptr"]
    refused("indptr", visium.read_matrix, slice_dir)
    path.write_bytes(whole)
    with h5py.File(path, "a") as file:
        del file["matrix/data"]
        file.create_group("matrix/data")
    refused("h5: expected a 10x matrix in HDF5, found", visium.read_matrix, slice_dir)


@pytest.mark.parametrize(("key", "value"), [("indices", [9] * 9), ("indptr", [0, 9, 1, 2, 9]), ("shape", [4, 7])])
def test_matrices_that_contradict_themselves(tmp_path, key, value):
    path = write_h5(tmp_path / "m.h5")
    assert visium.read_matrix(path).counts.shape == (4, 4)
    with h5py.File(path, "a") as file:
        del file[f"matrix/{key}"]
        file[f"matrix/{key}"] = np.array(value)
    refused("m.h5", visium.read_matrix, path)


@pytest.mark.parametrize("line", ["9 9 2", "1 1 -1", "1 1 99999999999", "1 1 99999999999999999999", "1 1 x", "1 1", ""])
def test_bad_lines_of_a_matrix_market_file(tmp_path, line):
    path = write_folder(tmp_path / "m", zipped=False) / "matrix.mtx"
    head = "%%MatrixMarket matrix coordinate integer general\n4 4 1\n"
    path.write_text(head + "1 1 3\n")
    assert visium.read_matrix(path.parent).counts.sum() == 3
    path.write_text(head + line + "\n")
    refused("m.*: expected", visium.read_matrix, path.parent)


def test_damaged_folders(tmp_path):
    folder = write_folder(tmp_path / "m", zipped=True)
    assert visium.read_matrix(folder).counts.sum() == COUNTS.sum()
    for name in ("matrix.mtx.gz", "features.tsv.gz", "barcodes.tsv.gz"):
        whole = (folder / name).read_bytes()
        for broken in (whole[: len(whole) // 2], b"", b"plain text"):
            (folder / name).write_bytes(broken)
            refused("m", visium.read_matrix, folder)
        (folder / name).unlink()
        if name != "matrix.mtx.gz":
            refused(f"expected {name[:-3]} or {name}, found", visium.read_matrix, folder)
        (folder / name).write_bytes(whole)


def test_lengths_must_agree(tmp_path):
    message = refused("one size", visium.read_matrix, write_folder(tmp_path / "m", False, barcodes=BARCODES[:3]))
    assert "4 x 4 counts, 3 barcodes, 4 features" in message


@pytest.mark.parametrize("seed", range(5))
def test_hash_ignores_order_and_sees_every_change(seed):
    rng = np.random.default_rng(seed)
    counts, barcodes, genes = (
        rng.poisson(0.7, (30, 20)),
        np.array([f"b{i}" for i in range(30)]),
        rng.integers(0, 15, 20),
    )
    genes = np.char.add("g", genes.astype(str))  # some repeat
    counts[0, 0] = 1
    rows, cols = rng.permutation(30), rng.permutation(20)
    known = visium.counts_hash(sp.csr_matrix(counts), barcodes, genes)
    assert known == visium.counts_hash(sp.csr_matrix(counts[rows][:, cols]), barcodes[rows], genes[cols])
    assert known == visium.counts_hash(sp.csr_matrix(counts.astype(np.int32)), barcodes.astype(object), genes)
    wider = np.column_stack([np.zeros(30, int), counts])
    assert known == visium.counts_hash(sp.csr_matrix(wider), barcodes, np.array(["never", *genes]))
    with_zero = sp.csr_matrix(counts + (counts == 0))
    with_zero.data[counts.ravel() == 0] = 0  # zeros that are stored
    assert known == visium.counts_hash(with_zero, barcodes, genes)
    more = counts.copy()
    more[0, 0] += 1
    other = {visium.counts_hash(sp.csr_matrix(more), barcodes, genes)}
    other.add(visium.counts_hash(sp.csr_matrix(counts), np.array(["new", *barcodes[1:]]), genes))
    other.add(visium.counts_hash(sp.csr_matrix(counts), barcodes, np.array(["new", *genes[1:]])))
    assert known not in other and len(other) == 3


def test_hash_known_by_hand():
    """Two spots, two genes, one pair exchanged: names sorted, then row starts, gene places and counts, 8 bytes each."""
    text = b"a\nb\n\ng\nh\n"
    numbers = np.array([0, 1, 3, 1, 0, 1, 5, 2, 3], dtype="<i8").tobytes()
    counts = sp.csr_matrix([[3, 2], [5, 0]])  # spots b, a; genes h, g
    found = visium.counts_hash(counts, np.array(["b", "a"]), np.array(["h", "g"]))
    assert found == hashlib.sha256(text + numbers).hexdigest()
