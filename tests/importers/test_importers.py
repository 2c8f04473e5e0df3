"""Writing an imported slice: compared before it gets its name, nothing half written, slices.csv kept as it is."""

from dataclasses import replace

import h5py
import numpy as np
import pandas as pd
import pytest
from importer_sources import assert_same_slice, image_of, to_anndata
from PIL import Image
from spaceranger_folders import refused

import import_slices
from utils.importers import images as importer_images
from utils.importers import slice_folder
from utils.importers.base import import_slice
from utils.importers.source import SPOT_COLUMNS, Source, place_spots
from utils.slices import splits, visium
from utils.slices.matrix import CountMatrix, whole_counts, write_matrix


@pytest.fixture
def root(simulated):
    return simulated / "P01_1"


@pytest.fixture
def source(root):
    found = visium.read_slice(root)
    xy_px, array = found.spots[["x_fullres_px", "y_fullres_px"]], found.spots[["array_row", "array_col"]]
    spots, lattice, _ = place_spots("S1", found.spots.index, xy_px.to_numpy(), array.to_numpy())
    names = (found.genes, found.gene_ids)
    return Source("S1", "P1", root, found.counts, *names, spots, lattice, 100.0, 55.0, image_of(root))


def test_a_slice_is_written_as_space_ranger_writes_it(source, root, tmp_path):
    import scanpy

    import_slice(source, tmp_path)
    found = assert_same_slice(tmp_path / "S1", root)
    adata = scanpy.read_10x_h5(tmp_path / "S1" / "filtered_feature_bc_matrix.h5")
    np.testing.assert_array_equal(adata.X.toarray(), source.counts.toarray())
    assert list(adata.var["gene_ids"]) == list(source.gene_ids)
    names = sorted(path.relative_to(tmp_path / "S1").as_posix() for path in (tmp_path / "S1").rglob("*.*"))
    images = [f"spatial/tissue_{kind}_image.png" for kind in ("hires", "lowres")]
    others = ["spatial/scalefactors_json.json", "spatial/tissue_positions.csv", "filtered_feature_bc_matrix.h5"]
    assert names == sorted([source.image.name, *images, *others])
    with Image.open(tmp_path / "S1" / images[1]) as small:
        assert max(small.size) == 600
    assert visium.read_scalefactors(found.root)["spot_diameter_fullres"] == 55


def test_a_missing_symbol_is_written_as_the_genes_id(source, tmp_path):
    genes, ids = source.genes.astype(object), source.gene_ids
    genes[:3], genes[3] = ["NA", "", '"NA"'], f'"{genes[3]}"'
    import_slice(replace(source, genes=genes.astype(str)), tmp_path)
    found = visium.read_slice(tmp_path / "S1")
    assert found.genes.tolist() == [*ids[:3], *source.genes[3:]] and (found.counts != source.counts).nnz == 0
    nameless = replace(source, genes=genes.astype(str), gene_ids=genes.astype(str))
    refused(f"{source.origin}: expected a name or an id of each gene, found 3 of 60", import_slice, nameless, tmp_path)


@pytest.mark.parametrize("name", ["he.png", "tissue_hires_image.png", ".he.png", "cytassist_image.tiff"])
def test_the_image_is_found_in_the_folder_whatever_it_was_called(source, tmp_path, name):
    (tmp_path / name).write_bytes(source.image.read_bytes())
    import_slice(replace(source, image=tmp_path / name), tmp_path / "out")
    found = visium.open_slice(tmp_path / "out" / "S1").source_image()
    assert found.kind == "fullres" and found.path.read_bytes() == source.image.read_bytes()
    assert splits.read_table(tmp_path / "out", None, split=False)[0][0].image == found.path.name


def test_files_that_belong_to_the_image_are_copied_with_it(source, tmp_path):
    for name in ("he.dcm", "he_2.dcm"):
        Image.open(source.image).save(tmp_path / name, "TIFF")
    import_slice(replace(source, image=tmp_path / "he.dcm"), tmp_path / "out")
    assert (tmp_path / "out" / "S1" / "he_2.dcm").read_bytes() == (tmp_path / "he_2.dcm").read_bytes()


@pytest.mark.parametrize("memory", [1, 64 * 200, np.inf])
def test_counts_written_by_spans_are_those_written_at_once(source, root, tmp_path, memory):
    matrix = CountMatrix(source.counts, source.spots.index.to_numpy(), source.genes, source.gene_ids)
    for name, given in (("one", np.inf), ("spans", memory)):
        write_matrix(tmp_path / f"{name}.h5", matrix, {}, memory=given)
    with h5py.File(tmp_path / "one.h5") as one, h5py.File(tmp_path / "spans.h5") as spans:
        for name in ("data", "indices", "indptr", "shape", "barcodes", "features/name"):
            np.testing.assert_array_equal(one["matrix"][name][:], spans["matrix"][name][:])
    stored = visium.read_slice(root, memory=memory)
    import_slice(replace(source, counts=stored.counts), tmp_path / "out", memory)
    assert_same_slice(tmp_path / "out" / "S1", root)


def test_control_features_are_in_no_import(source, tmp_path):
    genes = source.genes.astype(object)
    genes[[3, 10]] = "NegControlProbe_00001", "BLANK_0002"
    lines = import_slice(replace(source, genes=genes.astype(str)), tmp_path)
    assert lines[0].endswith("; 2 control features left out")
    found, kept = visium.read_slice(tmp_path / source.name), np.delete(np.arange(len(genes)), [3, 10])
    assert found.genes.tolist() == genes[kept].tolist()
    assert (found.counts != source.counts[:, kept]).nnz == 0


def test_importing_twice_changes_nothing_and_another_slice_is_refused(source, tmp_path):
    import_slice(source, tmp_path)
    (tmp_path / "S1" / "filtered_feature_bc_matrix_one.h5ad").write_bytes(b"of make_decoder_data.py")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*.*") if path.is_file()}
    import_slice(source, tmp_path)
    counts = source.counts.copy()
    counts.data[0] += 1
    message = refused(
        "expected no slice S1 yet, found .*S1 with another", import_slice, replace(source, counts=counts), tmp_path
    )
    assert "filtered_feature_bc_matrix.h5" in message
    assert {path: path.read_bytes() for path in tmp_path.rglob("*.*") if path.is_file()} == before


@pytest.mark.parametrize("what", ["counts", "barcodes", "pixel positions", "genes"])
def test_what_is_read_back_is_compared(source, tmp_path, monkeypatch, what):
    other = {
        "counts": lambda: replace(source, counts=source.counts[:, ::-1]),
        "barcodes": lambda: replace(source, spots=source.spots.set_index(source.spots.index[::-1])),
        "pixel positions": lambda: replace(
            source, spots=source.spots.assign(x_fullres_px=source.spots["x_fullres_px"] + 0.5)
        ),
        "genes": lambda: replace(source, genes=source.genes[::-1]),
    }[what]()
    write = slice_folder.write_folder
    monkeypatch.setattr(slice_folder, "write_folder", lambda part, _, memory: write(part, other, memory))
    refused(f"expected the .*{what}.* of .*found others", import_slice, source, tmp_path)
    assert not list(tmp_path.iterdir())


def test_what_a_killed_run_left_is_no_slice_and_is_replaced(source, root, tmp_path):
    (tmp_path / ".S1.part" / "spatial").mkdir(parents=True)
    refused("found no folder; give", splits.read_table, tmp_path)
    import_slice(source, tmp_path)
    assert_same_slice(tmp_path / "S1", root)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["S1", "slices.csv"]


def test_bad_sources_are_refused_before_anything_is_written(source, tmp_path):
    spots = source.spots
    repeated = spots.set_index(pd.Index([spots.index[0]] * len(spots), name="barcode"))
    slashed = spots.set_index(pd.Index([f"a/{b}" for b in spots.index], name="barcode"))
    for changed, match in (
        ({"spots": repeated}, "each barcode once"),
        ({"spots": slashed}, "expected barcodes that can be file names, found"),
        ({"spots": spots.assign(x_fullres_px=np.nan)}, "finite spot positions"),
        ({"spots": spots + 1e6}, "expected 70 spots on its 1150 x 1153 px, found 70 outside"),
        ({"image": None}, "found none; name it with --image"),
        ({"spots": spots.iloc[:0], "counts": source.counts[:0], "left_out": {"not selected": 3}}, "3 not selected"),
    ):
        refused(match, import_slice, replace(source, **changed), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_few_spots_beyond_the_image_are_counted_and_more_refused(source, tmp_path):
    pixels = np.asarray(Image.open(source.image).convert("RGB"))
    x = np.sort(source.spots["x_fullres_px"].to_numpy())
    few, many = int(x[-1]), int(x[-20])
    assert 0 < (x >= few).sum() <= 3
    (line,) = import_slice(replace(source, image=pixels[:, :few]), tmp_path)
    assert f"{(x >= few).sum()} outside the image" in line
    refused(f"found {(x >= many).sum()} outside", import_slice, replace(source, image=pixels[:, :many]), tmp_path / "b")


def swapped(source, image):
    spots = source.spots.rename(columns={"x_fullres_px": "y_fullres_px", "y_fullres_px": "x_fullres_px"})
    array, xy_px = (spots[columns].to_numpy() for columns in (SPOT_COLUMNS[:2], SPOT_COLUMNS[2:]))
    placed, lattice, _ = place_spots("S1", spots.index, xy_px, array)
    return replace(source, spots=placed, lattice=lattice, image=image)


def test_swapped_axes_are_warned_of_and_refused_where_the_tissue_contradicts(source, tmp_path):
    tissue = np.full((1153, 1153, 3), (200, 110, 160), np.uint8)
    _, warning = import_slice(swapped(source, tissue), tmp_path)
    assert warning.startswith("warning: S1: ") and "axes swapped or mirrored" in warning
    x, y = source.spots[["x_fullres_px", "y_fullres_px"]].to_numpy().T
    tissue[:] = (243, 242, 244)
    for column, row in zip(x.astype(int), y.astype(int), strict=True):
        tissue[row - 50 : row + 50, column - 50 : column + 50] = (200, 110, 160)
    assert len(import_slice(replace(source, image=tissue), tmp_path / "right")) == 1
    refused("with x and y swapped; correct the axes", import_slice, swapped(source, tissue), tmp_path / "wrong")


def test_an_image_that_the_small_ones_were_not_made_of_is_refused(source, root, tmp_path):
    small = {"hires": root / "spatial" / "tissue_hires_image.png"}
    kept = replace(source, small=small, scalefactors=visium.read_scalefactors(root))
    import_slice(kept, tmp_path)
    assert (tmp_path / "S1" / "spatial" / small["hires"].name).read_bytes() == small["hires"].read_bytes()
    pixels = np.asarray(Image.open(source.image).convert("RGB"))
    refused(
        "expected about 1150 x 1153",
        import_slice,
        replace(kept, image=np.pad(pixels, ((0, 0), (0, 90), (0, 0)))),
        tmp_path / "b",
    )
    mirrored = replace(kept, image=np.ascontiguousarray(pixels[:, ::-1]))
    refused("found another|lie on|on tissue", import_slice, mirrored, tmp_path / "b")
    assert not list((tmp_path / "b").glob("*"))


def test_an_image_too_large_to_decode_is_read_by_blocks(source, tmp_path, monkeypatch):
    import_slice(source, tmp_path / "whole")
    monkeypatch.setattr(importer_images, "LARGEST_PX", 1000)
    import_slice(source, tmp_path / "blocks")
    for kind in ("hires", "lowres"):
        name = f"S1/spatial/tissue_{kind}_image.png"
        pixels = [np.asarray(Image.open(tmp_path / out / name)).astype(float) for out in ("whole", "blocks")]
        assert pixels[0].shape == pixels[1].shape and np.abs(pixels[0] - pixels[1]).mean() < 3


@pytest.mark.parametrize("values", [[1.5], [-1.0], [np.nan], [2.0**40], ["1"]])
def test_what_is_no_count_is_refused(values):
    refused("x: expected raw counts", whole_counts, "x", np.array(values))


def test_whole_floats_are_counts():
    assert whole_counts("x", np.array([0.0, 3.0])).tolist() == [0, 3]


def row(name="S1", pitch=200.0, image="a.jpg"):
    return splits.SliceRow(name, "P", "", pitch, image)


@pytest.fixture
def listed(simulated, tmp_path):
    """Two slices in a folder without a table."""
    for name in ("A", "S1"):
        (tmp_path / name).symlink_to(simulated / "P01_1")
    return tmp_path


def test_a_new_table_lists_the_slices_that_were_there(listed):
    slice_folder.add_row(listed, row())
    assert (listed / "slices.csv").read_text() == "slice,patient,part,spot_pitch_um,image\nA,A,,,\nS1,P,,200,a.jpg\n"


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("slice,patient,part\nA,me,train\n", "slice,patient,part,spot_pitch_um,image\nA,me,train\nS1,P,,200,a.jpg\n"),
        ('\nslice,note\nA,"x,y"', '\nslice,note,patient,part,spot_pitch_um,image\nA,"x,y"\nS1,,P,,200,a.jpg\n'),
        ("\ufeffslice\r\nA\r\n", "\ufeffslice,patient,part,spot_pitch_um,image\r\nA\r\nS1,P,,200,a.jpg\r\n"),
        ("image,slice\n", "image,slice,patient,part,spot_pitch_um\na.jpg,S1,P,,200\n"),
        ("slice,part\n S1 ,test\n", "slice,part\n S1 ,test\n"),
        ("slice,part\n./S1/,test\n", "slice,part\n./S1/,test\n"),
        ('note,slice\n"two\nlines",S1\n', 'note,slice\n"two\nlines",S1\n'),
        ("slice\rA\r", "slice,patient,part,spot_pitch_um,image\nA\nS1,P,,200,a.jpg\n"),
    ],
)
def test_lines_of_a_table_stay_as_they_are(listed, before, after):
    (listed / "slices.csv").write_bytes(before.encode())
    slice_folder.add_row(listed, row())
    assert (listed / "slices.csv").read_bytes().decode() == after
    rows, _ = splits.read_table(listed, split=False)
    assert rows[-1].slice == "S1" and len(rows) == ("A" in before) + 1


@pytest.mark.parametrize("text", ["", "name,patient\n"])
def test_a_table_that_is_none_is_refused(tmp_path, text):
    (tmp_path / "slices.csv").write_text(text)
    refused("slices.csv: expected the header", slice_folder.check_table, tmp_path)


def test_a_table_in_another_encoding_is_refused_before_anything_is_written(simulated, tmp_path):
    to_anndata(simulated / "P01_1").write_h5ad(tmp_path / "one.h5ad")
    (tmp_path / "out").mkdir()
    (tmp_path / "out/slices.csv").write_bytes("slice,patient\nA,Müller\n".encode("cp1252"))
    flags = ["--format", "h5ad", tmp_path / "one.h5ad", "--image", image_of(simulated / "P01_1")]
    args = import_slices.parse_args([str(flag) for flag in (*flags, "--out", tmp_path / "out")])
    refused("slices.csv: expected comma-separated text in UTF-8, found: .*; save it as such", import_slices.main, args)
    assert [path.name for path in (tmp_path / "out").iterdir() if path.name[0] != "."] == ["slices.csv"]


def test_files_that_are_no_images(tmp_path):
    (tmp_path / "a.txt").write_text("")
    refused("--image .*a.txt: expected an image .* found a file .txt", importer_images.check_image, tmp_path / "a.txt")
    refused("found no such file", importer_images.check_image, tmp_path / "b.tif")
    assert importer_images.check_image(None) is None
