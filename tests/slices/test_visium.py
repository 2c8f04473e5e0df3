"""Space Ranger folders of every version: positions, scale factors, and the spots that have both sides."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from spaceranger_folders import (
    BARCODES,
    COUNTS,
    GENES,
    HEADER,
    IDS,
    SCALES,
    position_lines,
    refused,
    write_folder,
    write_h5,
    write_spatial,
)

from utils.slices import visium

GOOD_LINE = "a-1,1,0,0,10.5,20"


@pytest.fixture
def slice_dir(tmp_path):
    """A good slice; tests of bad input change one thing about it."""
    root = tmp_path / "C2"
    write_h5(root / "filtered_feature_bc_matrix.h5")
    write_spatial(root)
    return root


@pytest.mark.parametrize("positions", ["list", "header", "parquet"])
@pytest.mark.parametrize("matrix", ["h5", "float h5", "old h5", "plain", "gz", "raw h5", "raw gz"])
def test_every_form_reads_the_same(tmp_path, positions, matrix):
    kind = "raw" if "raw" in matrix else "filtered"
    path = tmp_path / f"{kind}_feature_bc_matrix"
    if "h5" in matrix:
        group = "GRCh38" if matrix == "old h5" else "matrix"
        write_h5(path.with_suffix(".h5"), dtype="float64" if "float" in matrix else None, group=group)
    else:
        write_folder(path, zipped="gz" in matrix)
    write_spatial(tmp_path, form=positions)
    found = visium.read_slice(tmp_path)
    np.testing.assert_array_equal(found.counts.toarray(), COUNTS)
    assert (found.counts.dtype, found.counts.format, found.name) == (np.int32, "csr", tmp_path.name)
    assert (found.genes.tolist(), found.gene_ids.tolist()) == (GENES, IDS)
    assert found.spots.index.tolist() == BARCODES and set(found.unmatched.values()) == {0}
    assert found.spots.columns.tolist() == ["array_row", "array_col", "x_fullres_px", "y_fullres_px"]
    np.testing.assert_array_equal(found.spots["x_fullres_px"], [2000, 2100, 2000, 2100])
    np.testing.assert_array_equal(found.spots["y_fullres_px"], [1000, 1000, 1100, 1100])
    assert found.spots["x_fullres_px"].dtype == np.float64


def test_positions_with_windows_line_ends_and_byte_order_mark(slice_dir):
    path = slice_dir / "spatial" / "tissue_positions.csv"
    path.write_bytes(("\ufeff" + "\r\n".join([HEADER, *position_lines()]) + "\r\n").encode())
    found = visium.read_positions(slice_dir)
    path.unlink()  # the list without a header is left
    pd.testing.assert_frame_equal(found, visium.read_positions(slice_dir))


@pytest.mark.parametrize("case", [str, str.upper, str.title])
def test_a_header_of_positions_in_any_order_and_case(tmp_path, case):
    table = pd.DataFrame([line.split(",") for line in position_lines()], columns=HEADER.split(","))
    table = table[["pxl_col_in_fullres", "in_tissue", "array_col", "barcode", "array_row", "pxl_row_in_fullres"]]
    table.rename(columns=case).to_csv(tmp_path / "p.csv", index=False)
    found = visium.read_position_file(tmp_path / "p.csv")
    write_spatial(tmp_path)
    pd.testing.assert_frame_equal(found, visium.read_positions(tmp_path))


@pytest.mark.parametrize("words", [("True", "False"), ("TRUE", "FALSE"), ("1.0", "0.0")])
def test_tissue_as_words(tmp_path, words):
    write_spatial(tmp_path, position_lines(in_tissue=[words[0], words[0], words[1], words[0]]))
    assert visium.read_positions(tmp_path)["in_tissue"].tolist() == [True, True, False, True]


def test_parquet_with_the_barcode_as_index(tmp_path):
    spatial = write_spatial(tmp_path, form="parquet")
    expected = visium.read_positions(tmp_path)
    path = spatial / "tissue_positions.parquet"
    pd.read_parquet(path).set_index("barcode").to_parquet(path)
    pd.testing.assert_frame_equal(visium.read_positions(tmp_path), expected)


def test_spots_follow_the_matrix_and_what_is_left_aside_is_counted(tmp_path):
    positions = ["CCCCCCCCCCCCCCCC-1", "X-1", "GGGGGGGGGGGGGGGG-1", "AAAAAAAAAAAAAAAA-1"]
    write_spatial(tmp_path, position_lines(positions, in_tissue=(1, 1, 0, 1)))
    write_h5(tmp_path / "raw_feature_bc_matrix.h5")
    found = visium.read_slice(tmp_path, "mine")
    assert found.name == "mine" and found.spots.index.tolist() == [BARCODES[0], BARCODES[1]]
    np.testing.assert_array_equal(found.counts.toarray(), COUNTS[:2])
    expected = {"counts without position": 1, "tissue positions without counts": 1, "not in tissue": 1}
    assert found.unmatched == expected
    assert visium.format_unmatched(expected | {"not in tissue": 1234}).endswith(", 1,234 not in tissue")
    assert visium.format_unmatched(dict.fromkeys(expected, 0)) == ""


@pytest.mark.parametrize("seed", range(5))
def test_an_opened_slice_has_the_spots_of_its_counts(tmp_path, seed):
    rng = np.random.default_rng(seed)
    lines = rng.permutation(position_lines(rng.permutation(BARCODES), in_tissue=rng.permutation([1, 1, 1, 0])))
    write_spatial(tmp_path, list(lines))
    write_h5(tmp_path / "filtered_feature_bc_matrix.h5", counts=COUNTS[:3], barcodes=BARCODES[:3])
    found, opened = visium.read_slice(tmp_path), visium.open_slice(tmp_path)
    spots = opened.spots
    pd.testing.assert_frame_equal(spots, found.spots)
    assert opened.unmatched == found.unmatched
    np.testing.assert_array_equal(visium.read_matrix(tmp_path).barcodes[opened.rows], spots.index)
    place = visium.read_positions(tmp_path).loc[spots.index]
    assert place["in_tissue"].all() and place["x_fullres_px"].equals(spots["x_fullres_px"])


def test_tiling_works_without_counts(tmp_path):
    write_spatial(tmp_path, position_lines(in_tissue=(1, 0, 1, 1)))
    found = visium.open_slice(tmp_path)
    assert found.spots.index.tolist() == [BARCODES[0], BARCODES[2], BARCODES[3]] and found.matrix is None
    assert found.unmatched["not in tissue"] == 1
    refused("expected counts .* found spatial", visium.read_slice, tmp_path)


def test_root_is_found_in_outs_and_in_the_only_bin(tmp_path, slice_dir):
    assert visium.find_root(slice_dir) == slice_dir
    write_spatial(tmp_path / "v1" / "outs")
    assert visium.find_root(tmp_path / "v1") == tmp_path / "v1" / "outs"
    square = tmp_path / "hd" / "outs" / "binned_outputs" / "square_016um"
    write_spatial(square, form="parquet")
    (tmp_path / "hd" / "outs" / "spatial").mkdir()  # as Space Ranger leaves it: images without positions
    assert visium.find_root(tmp_path / "hd") == visium.find_root(square.parents[1]) == square
    write_spatial(square.with_name("square_008um"), form="parquet")
    message = refused("one bin size", visium.find_root, tmp_path / "hd")
    assert "hd/outs/binned_outputs/square_008um, hd/outs/binned_outputs/square_016um" in message
    assert visium.is_slice(tmp_path / "hd") and visium.find_root(square) == square


def test_what_is_no_slice(tmp_path, slice_dir):
    assert visium.is_slice(slice_dir)
    probes = write_h5(tmp_path / "probes" / "raw_probe_bc_matrix.h5")
    assert not visium.is_slice(probes.parent) and visium.read_matrix(probes).counts.sum() == COUNTS.sum()
    refused("without positions is no slice; found raw_probe", visium.read_slice, probes.parent)
    refused("found a file", visium.read_slice, probes)
    refused("found nothing", visium.read_slice, tmp_path / "missing")
    assert not visium.is_slice(tmp_path / "missing")


def test_repeated_barcodes(slice_dir, tmp_path):
    twice = [BARCODES[0], *BARCODES[:3]]
    path = write_h5(tmp_path / "bad" / "filtered_feature_bc_matrix.h5", barcodes=twice)
    refused(f"each barcode once, found {BARCODES[0]}", visium.read_matrix, path)
    refused("each barcode once", visium.read_barcodes, path)
    write_spatial(slice_dir, position_lines(twice))
    refused("tissue_positions_list.csv: expected each barcode once", visium.read_slice, slice_dir)


def test_no_barcode_in_common(slice_dir):
    write_spatial(slice_dir, position_lines(["a-1", "b-1", "c-1", "d-1"]))
    message = refused("expected barcodes in common", visium.open_slice, slice_dir)
    assert "a-1" in message and BARCODES[0] in message


def test_no_spot_in_tissue(slice_dir):
    write_spatial(slice_dir, position_lines(in_tissue=(0, 0, 0, 0)))
    refused("expected spots in tissue, found 0 of 4", visium.open_slice, slice_dir)
    (slice_dir / "filtered_feature_bc_matrix.h5").unlink()
    refused("expected spots in tissue", visium.open_slice, slice_dir)


@pytest.mark.parametrize(
    "line",
    [
        "a-1,1,0,0,10.5",
        "a-1,1,0,0,10.5,20,7",
        "a-1;1;0;0;10.5;20",
        "a-1,1,0,0,NaN,20",
        "a-1,1,0,0,,20",
        "a-1,1,0,0,inf,20",
        "a-1,2,0,0,10.5,20",
        "a-1,1,0.5,0,10.5,20",
        "a-1,yes,0,0,10.5,20",
        "barcode,in_tissue,row,col,y,x",
        HEADER + ",more\na-1,1,0,0,10.5,20,7",
        HEADER + "\na-1,1,0,0,10.5,20,7",
        HEADER + "\na-1,1,0,0,10.5",
        "",
        "\x00\x01\xff",
    ],
)
def test_bad_positions(tmp_path, line):
    spatial = write_spatial(tmp_path, [GOOD_LINE])
    good = visium.read_positions(tmp_path).iloc[0].tolist()
    assert good == [True, 0, 0, 20.0, 10.5]
    (spatial / "tissue_positions_list.csv").write_bytes(line.encode("latin-1"))
    refused("tissue_positions_list.csv: expected", visium.read_positions, tmp_path)


def test_missing_and_damaged_position_files(tmp_path):
    spatial = write_spatial(tmp_path)
    (spatial / "tissue_positions_list.csv").unlink()
    refused("expected one of tissue_positions.csv", visium.read_positions, tmp_path)
    refused("expected one of tissue_positions.csv", visium.open_slice, tmp_path)
    write_spatial(tmp_path, form="parquet")
    whole = (spatial / "tissue_positions.parquet").read_bytes()
    (spatial / "tissue_positions.parquet").write_bytes(whole[:100])
    refused("parquet: expected", visium.read_positions, tmp_path)
    pd.DataFrame({"barcode": ["a"]}).to_parquet(spatial / "tissue_positions.parquet")
    refused("parquet: expected", visium.read_positions, tmp_path)


@pytest.mark.parametrize("name", ["p.zip", "p.xz", "p.tar", "p.zst", "p.bz2"])
def test_a_table_of_positions_that_cannot_be_unpacked(tmp_path, name):
    (tmp_path / name).write_bytes(b"no such archive")
    refused(f"{name}: expected a table of spot positions, found", visium.read_position_file, tmp_path / name)


@pytest.mark.parametrize("value", [0, -1, float("nan"), float("inf"), None, "", "x", [1, 2], True])
@pytest.mark.parametrize("key", ["tissue_hires_scalef", "spot_diameter_fullres"])
def test_bad_scale_factors(tmp_path, key, value):
    write_spatial(tmp_path)
    expected = {name: number for name, number in SCALES.items() if name != "note"}
    assert visium.read_scalefactors(tmp_path) == expected
    write_spatial(tmp_path, scales=SCALES | {key: value})
    assert str(value) in refused(f"positive number as {key}", visium.read_scalefactors, tmp_path)


def test_scale_factors_as_r_writes_them(tmp_path):
    """jsonlite writes a number as the only one of an array, others as text."""
    write_spatial(tmp_path, scales={key: [value] for key, value in SCALES.items()} | {"bin_size_um": "8.0"})
    expected = {key: number for key, number in SCALES.items() if key != "note"}
    assert visium.read_scalefactors(tmp_path) == expected | {"bin_size_um": 8.0}


def test_missing_scale_factors(tmp_path):
    spatial = write_spatial(tmp_path, scales={"tissue_hires_scalef": 1.0})
    refused("spot_diameter_fullres, found no such key", visium.read_scalefactors, tmp_path)
    write_spatial(tmp_path, scales={"spot_diameter_fullres": 65})
    assert visium.read_scalefactors(tmp_path) == {"spot_diameter_fullres": 65.0}, "without small images"
    (spatial / "tissue_lowres_image.png").write_bytes(b"")
    refused("tissue_lowres_scalef, found no such key", visium.read_scalefactors, tmp_path)
    for text in ("{", "[1]", ""):
        (spatial / "scalefactors_json.json").write_text(text)
        refused("scale factors in JSON", visium.read_scalefactors, tmp_path)
    (spatial / "scalefactors_json.json").unlink()
    refused("no such file", visium.read_scalefactors, tmp_path)


def test_reading_needs_no_heavy_package():
    code = "import sys, utils.slices.splits; print({'torch', 'scanpy', 'anndata'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert done.stdout.strip() == "set()", done.stderr
