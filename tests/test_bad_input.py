"""Bad slices, images and tables: one line that names the file or the flag, exit code 2, nothing on disk changed."""

import re

import numpy as np
import pytest
from tiny_runs import EVALUATION, FLAGS, PREPROCESSING, TRAINING, rewrite_matrix, split_flag, write_matrix

from utils.slices import visium

MATRIX = "filtered_feature_bc_matrix.h5"


def positions(damaged, name="P01_1"):
    (path,) = (damaged.data / name / "spatial").glob("tissue_positions*.csv")
    return path


# ---- slices


@pytest.mark.parametrize("script", FLAGS)
def test_data_folder_that_is_missing_empty_or_a_file(damaged, refused, script):
    refused(
        script, ["--data", damaged.out / "nowhere"], "nowhere: expected a folder of slices, found nothing", "--data"
    )
    (damaged.out / "empty").mkdir()
    refused(script, ["--data", damaged.out / "empty"], "empty: expected slice folders", "--data")
    refused(script, ["--data", positions(damaged)], "csv: expected a folder of slices, found a file")


@pytest.mark.parametrize("script", PREPROCESSING)
def test_missing_positions(damaged, refused, script):
    positions(damaged).unlink()
    refused(script, [], r"P01_1/spatial: expected one of tissue_positions.csv, .*found .*; add it")


@pytest.mark.parametrize("script", PREPROCESSING)
def test_no_barcode_in_common(damaged, refused, script):
    rewrite_matrix(damaged.data / "P01_1", lambda c, barcodes, names: (c, [b[:-1] + "2" for b in barcodes], names))
    refused(script, [], "P01_1: expected barcodes in common")


@pytest.mark.parametrize("script", PREPROCESSING)
@pytest.mark.parametrize("share", [0.0, 0.5, 0.95])
def test_truncated_h5(damaged, refused, script, share):
    path = damaged.data / "P01_1" / MATRIX
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])
    refused(script, [], f"P01_1/{MATRIX}: expected a 10x matrix in HDF5")


@pytest.mark.parametrize("script", PREPROCESSING)
def test_a_slice_without_tissue_spots(damaged, refused, script):
    path = positions(damaged)
    path.write_text(re.sub(r"(-1),1,", r"\1,0,", path.read_text()))
    refused(script, [], "P01_1: expected spots in tissue, found 0 of")


def test_missing_scale_factors(damaged, refused):
    (damaged.data / "P01_1" / "spatial" / "scalefactors_json.json").unlink()
    refused("image_tilling", [], "scalefactors_json.json: expected the scale factors")


@pytest.mark.parametrize("value", [0.5, -1, np.nan, np.inf])
def test_counts_that_are_none(damaged, refused, value):
    path = damaged.data / "P01_1" / MATRIX
    matrix = visium.read_matrix(path)
    counts = matrix.counts.toarray().astype(float)
    path.unlink()
    write_matrix(path, counts, matrix.barcodes, matrix.genes)
    assert visium.read_matrix(path).counts.sum() == matrix.counts.sum(), "whole numbers as floats are counts"
    counts[3, 5] = value
    path.unlink()
    write_matrix(path, counts, matrix.barcodes, matrix.genes)
    refused("make_decoder_data", [], f"{MATRIX}: expected raw counts", f"found {value}")


def test_no_count_at_all(damaged, refused):
    rewrite_matrix(damaged.data / "P01_1", lambda counts, barcodes, names: (counts * 0, barcodes, names))
    refused("make_decoder_data", [], "P01_1: expected spots of at least 1 count, found none")


# ---- images


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.95])
def test_corrupt_image(damaged, refused, share):
    """Packed tiles of other settings, cut from the whole image, stay."""
    path = damaged.data / "P01_1" / "P01_1_he.jpg"
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])
    words = "an empty file" if share == 0 else "one that cannot be read"
    refused("image_tilling", ["--tile_px", 16], f"P01_1_he.jpg: expected an image.*, found {words}")


def test_no_image(damaged, refused):
    (damaged.data / "P01_1" / "P01_1_he.jpg").unlink()
    refused("image_tilling", [], "expected the image P01_1_he.jpg")
    refused("image_tilling", ["--source", "hires"], "P01_1: expected a full-resolution image, found none")


# ---- the table and the split


@pytest.mark.parametrize("script", ["make_decoder_data", "train_mymodel", "get_accuracy_image"])
def test_no_split_of_two_patients(damaged, refused, script):
    line = refused(
        script, split_flag(damaged, "P01_1,A,\nP02_1,B,\nP03_1,B,\n"), "expected three patients or more to split"
    )
    assert "2 (A, B)" in line and "--val_strip" in line


@pytest.mark.parametrize("script", ["make_decoder_data", "train_mymodel", "train_decoder", "decoder_similarity"])
def test_a_test_patient_in_train(damaged, refused, script):
    parts = split_flag(damaged, "P01_1,A,train\nP02_1,B,val\nP03_1,A,test\n")
    refused(script, parts, r"patients in test and in another part: A \(test, train\)", "--allow_leak")


@pytest.mark.parametrize("script", TRAINING)
def test_no_validation_slice(damaged, refused, script):
    refused(script, split_flag(damaged, "P01_1,A,train\nP03_1,C,test\n"), "expected a slice of part val", "--val_strip")


@pytest.mark.parametrize("script", EVALUATION)
def test_a_slice_that_was_seen_in_training(damaged, refused, script):
    refused(
        script,
        split_flag(damaged, "P02_1,B,train\nP01_1,A,test\n"),
        "not trained on P01_1, held out here, found that it was",
    )


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("NOSUCH,A,train\n", "NOSUCH: expected a slice folder, found no such folder"),
        ("P01_1,A,training\n", "expected train, val, test or nothing as part, found training"),
        ("../P01_1,A,train\n", "expected a path inside the folder"),
        ("", "expected a line per slice, found only the header"),
    ],
)
def test_a_bad_table(damaged, refused, text, words):
    for script in ("image_tilling", "train_mymodel"):
        refused(script, split_flag(damaged, text), f"slices.csv.*{words}")
