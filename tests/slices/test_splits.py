"""slices.csv, the split, the leak guard and the strip, on folders that only look like slices."""

import csv
import dataclasses
import shutil

import numpy as np
import pytest
from scipy.spatial.distance import cdist
from spaceranger_folders import refused

from utils.slices import splits
from utils.slices.splits import SliceRow


@pytest.fixture
def data(tmp_path):
    """Five slice folders and one that is none."""
    for name in ("A1", "A2", "B1", "C1", "D1"):
        (tmp_path / "data" / name / "spatial").mkdir(parents=True)
    (tmp_path / "data" / "notes").mkdir()
    return tmp_path / "data"


def rows_of(*patients, part=""):
    return [SliceRow(f"{patient}{i}", patient, part, None, None) for i, patient in enumerate(patients)]


def parts(rows):
    return [row.part for row in rows]


def write(data, text, encoding="utf-8"):
    (data / "slices.csv").write_bytes(text.encode(encoding))
    return data


# ---- reading the table


def test_only_listed_slices_are_used(data):
    write(data, "slice,patient,part,spot_pitch_um,image\nB1,B,train,200,he.jpg\nA1,A,val,,\nC1,C,test,55.5,\nD1,,,,\n")
    rows, warnings = splits.read_table(data)
    assert rows == [
        SliceRow("B1", "B", "train", 200.0, "he.jpg"),
        SliceRow("A1", "A", "val", None, None),
        SliceRow("C1", "C", "test", 55.5, None),
    ]
    assert warnings == ["left out, without a part: D1"]
    everything, warnings = splits.read_table(data, split=False)
    assert [row.slice for row in everything] == ["B1", "A1", "C1", "D1"] and not warnings
    assert everything[3] == SliceRow("D1", "D1", "", None, None)  # no patient: its own


@pytest.mark.parametrize(
    "text",
    [
        "\ufeffslice,part\r\nA1,train\r\nB1,val\r\nC1,test\r\n",
        "part,slice\ntrain,A1\nval,B1\ntest,C1",
        " slice , part \n A1 , train \n\nB1,val\n,\nC1,test\n\n",
        'slice,part\n"A1",train\n./B1,val\nC1/,test\n',
    ],
)
def test_forms_of_one_table(data, text):
    rows, warnings = splits.read_table(write(data, text))
    assert [(row.slice, row.part) for row in rows] == [("A1", "train"), ("B1", "val"), ("C1", "test")] and not warnings


def test_another_table_is_used_when_named(data, tmp_path):
    write(data, "slice\nmissing\n")
    (tmp_path / "fold.csv").write_text("slice,part\nA1,train\n")
    assert splits.read_table(data, tmp_path / "fold.csv")[0] == [SliceRow("A1", "A1", "train", None, None)]
    refused("fold9.csv: .*--slices", splits.read_table, data, tmp_path / "fold9.csv")


GOOD = "slice,patient,part,spot_pitch_um,image\nA1,A,train,200,he.jpg\n"


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("", "an empty file"),
        ("\n\n", "an empty file"),
        ("slice,part\n", "only the header"),
        ("name,part\nA1,train\n", "found name,part"),
        ("slice;part\nA1;train\n", "found slice;part"),
        ("slice,part,part\nA1,train,val\n", "expected the header"),
        (GOOD + "A2,A,train,200,he.jpg,extra\n", "line 3: expected 5 cells, found 6"),
        (GOOD + "A2,A,train,200,5\n,A,train,,\n", "line 4: expected the name"),
        ("part,slice\ntrain\n", "line 2: expected the name"),
        (GOOD + "A1,A,val,,\n", "each slice once, found A1"),
        (GOOD + "A1/,A,val,,\n", "each slice once, found A1"),
        (GOOD + "E9,A,val,,\n", "E9: expected a slice folder, found no such folder"),
        (GOOD + "notes,A,val,,\n", "without spatial"),
        (GOOD + "../data/A2,A,val,,\n", "inside the folder"),
        (GOOD + "A2/../A2,A,val,,\n", "inside the folder"),
        (GOOD + "/tmp,A,val,,\n", "inside the folder"),
        (GOOD + ".,A,val,,\n", "inside the folder"),
        (GOOD + "A2,A,Train,,\n", "found Train"),
        (GOOD + "A2,A,validation,,\n", "found validation"),
        *[(GOOD + f"A2,A,train,{bad},\n", f"found {bad}") for bad in ("0", "-5", "nan", "inf", "200um")],
        (GOOD + "A2,A,train,,../he.jpg\n", "inside the folder"),
        (GOOD + "A2,A,train,,/he.jpg\n", "inside the folder"),
    ],
)
def test_bad_tables(data, text, match):
    assert len(splits.read_table(write(data, GOOD))[0]) == 1
    assert "slices.csv" in refused(match, splits.read_table, write(data, text))
    refused(match, splits.read_table, data, split=False)


@pytest.mark.parametrize("encoding", ["utf-16", "latin-1"])
def test_wrong_encoding(data, encoding):
    refused("UTF-8", splits.read_table, write(data, "slice,patient\nA1,Müller\n", encoding))


def test_columns_that_nothing_reads_are_named(data):
    write(data, "slice,pitch,part,\nA1,200,train,\n")
    rows, warnings = splits.read_table(data)
    assert rows[0].spot_pitch_um is None and len(warnings) == 1 and warnings[0].endswith("columns not used: pitch")


def test_without_a_table_every_slice_is_its_own_patient(data):
    rows, warnings = splits.read_table(data)
    assert [(row.slice, row.patient) for row in rows] == [(name, name) for name in ("A1", "A2", "B1", "C1", "D1")]
    assert parts(rows) == ["train", "train", "train", "val", "test"] and warnings[0].endswith("not used: notes")
    assert set(parts(splits.read_table(data, split=False)[0])) == {""}


def test_hidden_folders_and_files_are_no_slices(data):
    shutil.copytree(data / "A1", data / ".A1_copy")
    (data / "README.txt").write_text("five slices")
    rows, warnings = splits.read_table(data)
    assert [row.slice for row in rows] == ["A1", "A2", "B1", "C1", "D1"]
    assert not any("README" in line or "copy" in line for line in warnings)


def test_bad_data_folders(data, tmp_path):
    assert splits.read_table(data, split=False)[0]
    refused("found nothing; give it with --data", splits.read_table, tmp_path / "nowhere")
    (tmp_path / "file").write_text("")
    refused("found a file", splits.read_table, tmp_path / "file")
    (tmp_path / "empty").mkdir()
    refused("found no folder; give", splits.read_table, tmp_path / "empty")
    (tmp_path / "empty/notes").mkdir()
    refused("found 1 folder without; give", splits.read_table, tmp_path / "empty")
    refused("found a slice folder itself; give the folder above it", splits.read_table, data / "A1")


def test_bins_of_one_hd_run_are_one_patient(data):
    names = [f"hd/outs/binned_outputs/square_{um}um" for um in ("008", "016")]
    for name in names:
        (data / name / "spatial").mkdir(parents=True)
    write(data, f"slice,part\n{names[0]},train\n{names[1]},test\nA1,val\n")
    refused(r"hd \(test, train\)", splits.read_table, data)
    assert [row.patient for row in splits.read_table(data, split=False)[0]] == ["hd", "hd", "A1"]


@pytest.mark.parametrize("pitch_um", [None, 200.0, 0.1 + 0.2, 55.5])
def test_written_tables_are_read_back(data, pitch_um):
    rows = [SliceRow("A1", "Müller, A", "train", pitch_um, "h e.tif"), SliceRow("B1", "B", "", None, None)]
    splits.write_table(rows, data / "slices.csv")
    found = splits.read_table(data, split=False)[0]
    assert found[0].spot_pitch_um == (None if pitch_um is None else pytest.approx(pitch_um, rel=1e-11))
    assert [dataclasses.replace(found[0], spot_pitch_um=pitch_um), found[1]] == rows
    assert list(data.glob("*.part")) == []
    with (data / "slices.csv").open(newline="") as file:
        assert next(csv.reader(file)) == ["slice", "patient", "part", "spot_pitch_um", "image"]


def test_printed_table():
    text = splits.format_table(
        [SliceRow("A1", "A", "train", 200.0, "he.jpg"), SliceRow("long_name", "B", "", None, None)]
    )
    assert text.split("\n") == [
        "slice      patient  part   spot_pitch_um  image",
        "A1         A        train  200            he.jpg",
        "long_name  B        -      -              -",
    ]


# ---- the split


@pytest.mark.parametrize(("n", "n_val", "n_test"), [(3, 1, 1), (5, 1, 1), (10, 1, 2), (20, 2, 4), (29, 2, 5)])
def test_the_last_patients_are_held_out(n, n_val, n_test):
    rows = rows_of(*[f"p{i:02}" for i in range(n)])
    expected = ["train"] * (n - n_val - n_test) + ["val"] * n_val + ["test"] * n_test
    assert parts(splits.default_split(rows, val_strip=False)) == expected
    assert parts(splits.default_split(rows, val_strip=True)) == ["train"] * (n - n_test) + ["test"] * n_test


def test_slices_of_one_patient_stay_together():
    rows = splits.default_split(rows_of("C", "A", "B", "C", "A"), val_strip=False)
    assert [row.patient + " " + row.part for row in rows] == ["C test", "A train", "B val", "C test", "A train"]


def test_few_patients():
    refused(r"found 2 \(A, B\).*--val_strip", splits.default_split, rows_of("A", "B", "B"), False)
    assert parts(splits.default_split(rows_of("A", "B", "B"), True)) == ["train", "test", "test"]
    assert parts(splits.default_split(rows_of("A", "A"), True)) == ["train", "train"]


def test_a_table_with_parts_is_not_split():
    rows = [*rows_of("A", part="train"), *rows_of("B")]
    assert splits.default_split(rows, False) == rows


# ---- the leak guard


def test_patients_in_two_parts(data):
    good = [*rows_of("A", part="train"), *rows_of("B", part="val"), *rows_of("C", part="test"), *rows_of("C")]
    assert splits.check_patients(good, allow_leak=False) == []
    for part in ("train", "val"):
        bad = [*good, *rows_of("C", part=part)]
        assert f"C ({', '.join(sorted(['test', part]))})" in refused("--allow_leak", splits.check_patients, bad, False)
        assert "C (" in splits.check_patients(bad, allow_leak=True)[0]
    odd = splits.check_patients([*good, *rows_of("B", part="train")], allow_leak=False)
    assert odd == ["patients in train and in val: B"]
    write(data, "slice,patient,part\nA1,A,train\nA2,A,test\n")
    refused("patients in test", splits.read_table, data)
    assert len(splits.read_table(data, split=False)[0]) == 2
    assert "A (test, train)" in splits.read_table(data, allow_leak=True)[1][0]


SPELLINGS = [("P01", "p01"), ("Patient 1", "Patient_1"), ("P 1", "P  1"), ("P-1", "P_1"), ("1", "1.0"), ("7", "007")]


@pytest.mark.parametrize(("one", "other"), [*SPELLINGS, ("M\u00fcller", "Mu\u0308ller")])
def test_a_patient_spelt_in_two_ways_is_one(data, one, other):
    write(data, f"slice,patient,part\nA1,{one},train\nB1,B,val\nC1,{other},test\n")
    refused(f"patients in test and in another part: {one} .test, train.", splits.read_table, data)
    rows, warnings = splits.read_table(write(data, f"slice,patient\nA1,{one}\nB1,B\nC1,C\nA2,{other}\n"))
    assert rows[0].patient == rows[3].patient == one and rows[0].part == rows[3].part
    assert [line.partition("slices.csv: ")[2] for line in warnings] == [
        f"taken for one patient: {one} = {other}; spell a patient in one way, or name different ones otherwise"
    ]


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("P1", "P2"),
        ("P1", "P11"),
        ("1-2", "12"),
        ("1.5", "15"),
        ("HER2+", "HER2-"),
        ("10", "1"),
        ("-1", "1"),
        ("A", "AA"),
    ],
)
def test_different_patients_stay_apart(data, one, other):
    rows, warnings = splits.read_table(write(data, f"slice,patient,part\nA1,{one},train\nB1,B,val\nC1,{other},test\n"))
    assert [row.patient for row in rows] == [one, "B", other] and warnings == []


def test_identical_slices():
    rows = [*rows_of("A", "B", part="train"), *rows_of("x", "y", "C", part="test"), *rows_of("D")]
    hashes = {row.slice: row.slice for row in rows}
    assert splits.check_identical(rows, hashes, allow_leak=False) == []
    assert splits.check_identical(rows, hashes | {"B1": "A0"}, allow_leak=False) == []  # both in train
    assert splits.check_identical(rows, hashes | {"D0": "A0"}, allow_leak=False) == []  # one is left out
    same = hashes | {"C2": "A0"}
    assert "A0 (train), C2 (test)" in refused("--allow_leak", splits.check_identical, rows, same, False)
    assert splits.check_identical(rows, same, True) == [
        "slices with identical counts in two parts: A0 (train), C2 (test)"
    ]


def sections(rng, n=300):
    """Barcodes and counts (S, G) of three sections on the same array; depth falls to one side in all of them."""
    barcodes = np.array([f"{i % 20}x{i // 20}-1" for i in range(n)])
    depth = np.linspace(0.5, 2, n)[:, None] * rng.gamma(5, 0.2, (3, n, 1))
    return barcodes, rng.poisson(depth * rng.gamma(0.3, 20, 200))


@pytest.mark.parametrize(
    ("spots", "genes"),
    [
        (slice(1, None), slice(None)),  # one spot less
        (slice(None, None, -2), slice(None)),  # half of them, in another order
        (slice(None), slice(1, None)),
        (slice(5, None), slice(None, 180)),
    ],
)
def test_a_section_without_some_spots_or_genes_is_known(rng, spots, genes):
    barcodes, counts = sections(rng)
    rows = [*rows_of("A", "B", part="train"), *rows_of("C", part="val"), *rows_of("D", part="test")]
    hashes = {row.slice: row.slice for row in rows}
    counts[..., 100:] = np.minimum(counts[..., 100:], 1)  # rare genes
    counts[..., 0] = np.minimum(counts[..., 0], 1)
    totals = {row.slice: (barcodes, section.sum(1)) for row, section in zip(rows, counts, strict=False)}
    renamed = np.array([f"{barcode}-0" for barcode in barcodes[spots]])
    totals["D0"] = (renamed, counts[0][spots][:, genes].sum(1))
    message = refused("--allow_leak", splits.check_identical, rows, hashes, False, totals)
    assert "found slices with the same spots in two parts: A0 (train), D0 (test);" in message
    assert splits.check_identical(rows, hashes | {"D0": "A0"}, True, totals) == [
        "slices with identical counts in two parts: A0 (train), D0 (test)"
    ]
    train = [dataclasses.replace(row, part="train") for row in rows]
    assert splits.check_identical(train, hashes, False, totals) == []


def test_different_sections_are_no_copies(rng):
    barcodes, counts = sections(rng)
    rows = [*rows_of("A", part="train"), *rows_of("B", part="val"), *rows_of("C", part="test")]
    hashes = {row.slice: row.slice for row in rows}

    def checked(*totals):
        of_slices = {row.slice: (barcodes, total) for row, total in zip(rows, totals, strict=True)}
        return splits.check_identical(rows, hashes, False, of_slices)

    assert checked(*counts.sum(2)) == []
    assert checked(*np.full((3, 300), 1000)) == []  # all brought to one depth
    assert checked(*1000 + rng.integers(-5, 5, (3, 300))) == []
    assert checked(*rng.integers(0, 3, (3, 300))) == []  # hardly a count
    assert checked(*np.zeros((3, 300))) == []


def test_of_part():
    rows = [*rows_of("A", part="train"), *rows_of("B", part="val"), *rows_of("C")]
    assert [row.patient for row in splits.of_part(rows, "val", "train")] == ["A", "B"]
    assert splits.of_part(rows, "test") == []


# ---- the strip


def grid(rows, columns, pitch_px=10.0):
    y, x = np.mgrid[:rows, :columns]
    return pitch_px * np.column_stack([x.ravel(), y.ravel()]).astype(float)


def test_strip_known_by_hand():
    found = splits.strip_parts(grid(2, 8), 10.0)  # eight columns: train 0-4, gap 5, val 6-7
    assert found.reshape(2, 8).tolist() == [["train"] * 5 + ["gap"] + ["val"] * 2] * 2
    turned = splits.strip_parts(grid(8, 2), 10.0)  # along y where that side is longer
    assert turned.reshape(8, 2)[:, 0].tolist() == ["train"] * 5 + ["gap"] + ["val"] * 2


@pytest.mark.parametrize("seed", range(6))
def test_strip_of_any_slice(seed):
    rng = np.random.default_rng(seed)
    xy_px = grid(25, 40, 7.0)
    xy_px = xy_px[rng.permutation(len(xy_px))[:600]] + rng.normal(scale=0.5, size=(600, 2))
    found = splits.strip_parts(xy_px, 7.0)
    assert (found == "val").sum() == 150
    assert xy_px[found == "val", 0].min() >= xy_px[found != "val", 0].max()
    to_val_px = cdist(xy_px, xy_px[found == "val"]).min(axis=1)
    assert (to_val_px[found == "train"] >= 14).all() and (to_val_px[found == "gap"] < 14).all()
    assert (found == "gap").any() and (found == "train").any()
    order = rng.permutation(600)
    assert (splits.strip_parts(xy_px[order], 7.0) == found[order]).all()
    assert (splits.strip_parts(xy_px * 3 + 11, 21.0) == found).all()


def test_strip_of_very_few_spots():
    assert splits.strip_parts(np.zeros((1, 2)), 1.0).tolist() == ["val"]
    assert splits.strip_parts(grid(1, 4), 10.0).tolist() == ["train", "train", "gap", "val"]


def test_slices_of_a_part():
    rows = [SliceRow(name, name, part, None, None) for name, part in (("a", "train"), ("b", "test"), ("c", ""))]
    assert [row.slice for row in splits.chosen(rows, "all")] == ["a", "b", "c"]
    assert [row.slice for row in splits.chosen(rows, "test")] == ["b"]
    with pytest.raises(ValueError, match="expected a slice of part val, found slices of part train, test; "):
        splits.chosen(rows, "val")
