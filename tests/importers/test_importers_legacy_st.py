"""Legacy ST: simulated sections come back exactly, real ones equal their published conversion; odd tables."""

import gzip
import os
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from importer_sources import legacy_counts, write_legacy, write_square_legacy
from PIL import Image
from spaceranger_folders import refused

from utils.importers.base import import_slice
from utils.importers.legacy_st import STAGGERED_PITCH_UM, read_legacy_st
from utils.slices import visium

REAL = os.environ.get("MAGIC_REAL_DATA")
real = [pytest.mark.realdata, pytest.mark.skipif(not REAL, reason="MAGIC_REAL_DATA does not name the data folder")]


@pytest.fixture(scope="module")
def her2st(simulated, tmp_path_factory):
    sections = {"A1": simulated / "P01_1", "A2": simulated / "P02_1", "MOB1": simulated / "P03_1"}
    return write_legacy(tmp_path_factory.mktemp("legacy") / "her2st", sections), sections


def only(*args):
    (source,) = read_legacy_st(*args)
    return source


def test_all_sections_of_a_folder(her2st):
    folder, sections = her2st
    sources = list(read_legacy_st(folder))
    assert [(s.name, s.patient) for s in sources] == [("A1", "A"), ("A2", "A"), ("MOB1", "MOB1")]
    for source, root in zip(sources, sections.values(), strict=True):
        true = visium.read_slice(root)
        assert (source.counts != true.counts).nnz == 0
        np.testing.assert_array_equal(source.genes, true.genes)
        np.testing.assert_array_equal(source.spots.to_numpy(), true.spots.to_numpy())
        assert source.spots.index[0] == f"{true.spots['array_col'].iloc[0]}x{true.spots['array_row'].iloc[0]}-1"
        assert source.left_out == {
            "not selected": 1,
            "without a row in the spot file": 1,
            "selected without counts": 1,
        }
        assert source.image.name == f"{root.name}_he.jpg"


def test_one_table_of_counts_is_one_section(her2st):
    folder, _ = her2st
    assert only(folder / "ST-cnts" / "A2.tsv.gz").name == "A2"
    names, genes, counts = legacy_counts(folder, "A2")
    assert len(names) == len(counts) and len(genes) == counts.shape[1]


def test_plain_folder_and_its_scale(tmp_path):
    source = only(write_square_legacy(tmp_path / "mouse"))
    assert (source.name, source.patient, source.pitch_um) == ("mouse", "mouse", 200)
    assert source.genes.tolist() == ["A", "B", "A", "C"]
    assert source.spot_diameter_px == pytest.approx(14.5)
    assert source.um_per_px == pytest.approx(200 / 29, rel=0.01)  # pixels are rounded
    assert only(tmp_path / "mouse" / "counts.tsv").name == "mouse"
    assert only(tmp_path / "mouse", None, 100.0).spot_diameter_px == pytest.approx(29)  # 100 um spots


def test_a_place_of_the_staggered_array_is_100_um(tmp_path):
    source = only(write_square_legacy(tmp_path / "dense", 23.0, staggered=True))
    assert source.pitch_um == STAGGERED_PITCH_UM and "staggered" in source.notes[0]
    assert source.um_per_px == pytest.approx(100 / 23, rel=0.01)
    assert source.spot_diameter_px == pytest.approx(23)


def test_a_header_without_the_first_cell_and_with_quotes(tmp_path):
    folder = write_square_legacy(tmp_path / "mouse")
    true, text = only(folder), (folder / "counts.tsv").read_text()
    (folder / "counts.tsv").write_text(text.replace("\tA\tB\tA\tC", '"A"\t"B"\t"A"\t"C"'))
    found = only(folder)
    assert found.genes.tolist() == ["A", "B", "A", "C"] and (found.counts != true.counts).nnz == 0


@pytest.mark.parametrize("header", ["\tA\tB\tA\tC", "A\tB\tA\tC"])
def test_a_byte_order_mark_is_no_part_of_a_name(tmp_path, header):
    folder = write_square_legacy(tmp_path / "mouse")
    true, text = only(folder), (folder / "counts.tsv").read_text()
    (folder / "counts.tsv").write_text(text.replace("\tA\tB\tA\tC", "\ufeff" + header), encoding="utf-8")
    (folder / "spots.tsv").write_text("\ufeff" + (folder / "spots.tsv").read_text(), encoding="utf-8")
    found = only(folder)
    assert found.genes.tolist() == ["A", "B", "A", "C"] and (found.counts != true.counts).nnz == 0


@pytest.mark.parametrize(("cell", "found"), [("", "an empty cell"), ("NA", "NA")])
def test_a_cell_without_a_count_is_named(tmp_path, cell, found):
    folder = write_square_legacy(tmp_path / "mouse")
    lines = [line.split("\t") for line in (folder / "counts.tsv").read_text().splitlines()]
    lines[2][4] = cell
    (folder / "counts.tsv").write_text("\n".join(map("\t".join, lines)) + "\n")
    refused(
        f"counts.tsv: expected raw counts .* found {found} in the row 4x3, column C; correct the cell", only, folder
    )


def test_genes_in_rows_are_turned(tmp_path):
    folder = write_square_legacy(tmp_path / "mouse")
    true = only(folder)
    table = pd.read_csv(folder / "counts.tsv", sep="\t", index_col=0, header=None, dtype=str, keep_default_na=False)
    table.T.to_csv(folder / "counts.tsv", sep="\t", index=False, header=["", *table.index[1:]])
    assert (folder / "counts.tsv").read_text().startswith("\t3x3\t4x3\t")
    found = only(folder)
    assert found.genes.tolist() == ["A", "B", "A", "C"] and (found.counts != true.counts).nnz == 0
    pd.testing.assert_frame_equal(found.spots, true.spots)


def test_rows_named_y_x_are_refused(tmp_path):
    folder = write_square_legacy(tmp_path / "mouse")
    lines = [line.split("\t", 1) for line in (folder / "counts.tsv").read_text().splitlines()]
    turned = ["\t".join(["x".join(name.split("x")[::-1]), rest]) for name, rest in lines]
    (folder / "counts.tsv").write_text("\n".join(turned) + "\n")
    refused("counts.tsv: expected rows `<x>x<y>` of the spots in spots.tsv, found 25 of 30, and 30 as", only, folder)


def test_places_that_the_pixels_do_not_follow_are_refused(tmp_path, rng):
    folder = write_square_legacy(tmp_path / "mouse")
    spots = pd.read_csv(folder / "spots.tsv", sep="\t")
    shuffled = spots.assign(**{"pixel_x": rng.permutation(spots["pixel_x"].to_numpy())})
    shuffled.to_csv(folder / "spots.tsv", sep="\t", index=False)
    refused("spots.tsv: expected", only, folder)
    spots[["pixel_x", "pixel_y"]] = spots[["pixel_x", "pixel_y"]].to_numpy()[rng.permutation(len(spots))]
    spots.to_csv(folder / "spots.tsv", sep="\t", index=False)
    refused("expected pixel_x and pixel_y of the places x and y", only, folder)


def test_swapped_pixels_are_warned_of(tmp_path):
    folder = write_square_legacy(tmp_path / "mouse")
    size = only(folder).spot_diameter_px
    spots = pd.read_csv(folder / "spots.tsv", sep="\t").rename(columns={"pixel_x": "pixel_y", "pixel_y": "pixel_x"})
    spots.to_csv(folder / "spots.tsv", sep="\t", index=False)
    Image.new("RGB", (300, 300), (200, 110, 160)).save(folder / "image.jpg")
    source = only(folder)
    assert source.spot_diameter_px == pytest.approx(size)
    warnings = import_slice(source, tmp_path / "out")[1:]
    assert "axes swapped or mirrored" in warnings[-1]


def test_spots_outside_the_image_are_refused(tmp_path):
    folder = write_square_legacy(tmp_path / "mouse")
    Image.effect_noise((200, 280), 50).convert("RGB").save(folder / "image.jpg")
    refused(
        "image.jpg: expected 30 spots on its 200 x 280 px, found 10 outside",
        import_slice,
        only(folder),
        tmp_path / "out",
    )


def test_every_second_place_is_as_good(tmp_path):
    folder = write_square_legacy(tmp_path / "mouse")
    true = only(folder)
    for name, columns in (("spots.tsv", ["x", "y"]), ("counts.tsv", [])):
        table = pd.read_csv(folder / name, sep="\t", index_col=None if columns else 0)
        table[columns] *= 2
        if not columns:
            table.index = ["x".join(str(2 * int(n)) for n in place.split("x")) for place in table.index]
            table.columns = ["A", "B", "A", "C"]
        table.to_csv(folder / name, sep="\t", index=not columns)
    found = only(folder)
    assert found.um_per_px == pytest.approx(true.um_per_px) and found.spots.index[0] == "6x6-1"
    assert found.spot_diameter_px == pytest.approx(true.spot_diameter_px, rel=1e-6)


def edited(tmp_path, name, old, new):
    folder = write_square_legacy(tmp_path / "mouse")
    text = (folder / name).read_text()
    assert old in text
    (folder / name).write_text(text.replace(old, new, 1))
    return folder


@pytest.mark.parametrize(
    ("name", "old", "new", "match"),
    [
        ("counts.tsv", "\n4x3\t", "\n3x3\t", "each barcode once, found 3x3 again"),
        ("counts.tsv", "\n4x3\t", "\n4x3\t0.5", r"counts.tsv: expected raw counts .*found 0\.5"),
        ("counts.tsv", "\n4x3\t", "\n4x3\t-", "counts.tsv: expected raw counts"),
        ("counts.tsv", "\n4x3\t", "\n4x3\tmany", "counts.tsv: expected raw counts"),
        ("counts.tsv", "\tA\tB", "\tA", "expected a header of genes"),
        ("spots.tsv", "\n4\t3\t", "\n3\t3\t", "each barcode once, found 3x3 again"),
        ("spots.tsv", "\n4\t3\t", "\n4.5\t3\t", "whole x, y"),
        ("spots.tsv", "\n4\t3\t", "\n4\t3\tnan", "finite pixels"),
        ("spots.tsv", "pixel_x", "px", "spot file"),
    ],
)
def test_bad_tables_are_refused(tmp_path, name, old, new, match):
    refused(match, only, edited(tmp_path, name, old, new))


def test_bad_folders_are_refused(tmp_path, her2st):
    folder = write_square_legacy(tmp_path / "mouse")
    image = folder / "image.jpg"
    (folder / "other.png").write_bytes(b"")
    refused("expected one H&E image of mouse, found image.jpg, other.png; name it with --image", only, folder)
    assert only(folder, image).image == image
    for path in (image, folder / "other.png"):
        path.unlink()
    refused("found none; name it with --image", only, folder)
    (folder / "spots.tsv").unlink()
    refused("one table of counts and one spot file", only, folder)
    refused("found nothing", only, tmp_path / "nowhere")
    (tmp_path / "geo").mkdir()
    (tmp_path / "geo" / "GSM9_counts.txt.gz").write_text("")
    refused("geo: expected one table .* found files as GEO keeps them .GSM9_counts.txt.gz", only, tmp_path / "geo")
    refused("--image: expected one section, found A1, A2, MOB1", only, her2st[0], image)
    (tmp_path / "empty" / "ST-cnts").mkdir(parents=True)
    refused("expected tables of counts", only, tmp_path / "empty")


def test_a_section_without_spot_file_or_spots_in_common(tmp_path, simulated):
    folder = write_legacy(tmp_path / "st", {"A1": simulated / "P01_1"})
    spots = folder / "ST-spotfiles" / "A1_selection.tsv"
    text = spots.read_text()
    table = pd.read_csv(spots, sep="\t").assign(selected=0)
    table.to_csv(spots, sep="\t", index=False)
    refused("0 spots selected", only, folder)
    spots.write_text(text.replace("selected\n", "chosen\n"))
    assert only(folder).left_out["not selected"] == 0  # no such column: all spots are under tissue
    spots.unlink()
    refused("expected the spot file .*A1_selection.tsv", only, folder)
    with gzip.open(folder / "ST-cnts" / "A1.tsv.gz", "wb") as file:
        file.write(b"")
    spots.write_text(text)
    refused("A1.tsv.gz", only, folder)


@pytest.mark.parametrize("name", [pytest.param(name, marks=real) for name in ("B4", "C2", "C3", "C4", "C5")])
def test_the_real_sections_equal_their_published_conversion(name, tmp_path):
    source = only(Path(REAL) / "her2st" / "ST-cnts" / f"{name}.tsv.gz")
    line, warning = import_slice(source, tmp_path)
    assert line.startswith(f"{name}: ") and source.patient == name[0]
    assert warning.startswith(f"warning: {name}: ") and "no small image and no pixel size to check it by" in warning
    found, true = (visium.read_slice(folder / name) for folder in (tmp_path, Path(REAL) / "Breast_cancer"))
    assert (found.counts != true.counts).nnz == 0
    pd.testing.assert_frame_equal(found.spots, true.spots)
    for key in ("genes", "gene_ids"):
        np.testing.assert_array_equal(getattr(found, key), getattr(true, key))
    factors = visium.read_scalefactors(true.root)
    assert visium.read_scalefactors(found.root) == pytest.approx(factors, rel=1e-12)
    for kind in ("hires", "lowres"):
        files = [one.root / "spatial" / f"tissue_{kind}_image.png" for one in (found, true)]
        pixels = [np.asarray(Image.open(file)).astype(int) for file in files]
        assert np.abs(pixels[0] - pixels[1]).max() <= 2  # another Pillow may round otherwise
    images = [next(one.root.glob("*.jpg")) for one in (found, true)]
    assert images[0].name == images[1].name and images[0].read_bytes() == images[1].read_bytes()


MOB = {  # spots, genes, counts, um per px, left out
    "legacy_st_MOB1": ("MOB1", 379, 1000, 958111, 4.38, 1544 + 11),
    "legacy_st_xfuse_MOB": ("legacy_st_xfuse_MOB", 282, 10, 92636, 6.90, 0),
}


@pytest.mark.parametrize(("folder", "expected"), [pytest.param(*case, marks=real) for case in MOB.items()])
def test_the_real_mouse_sections(folder, expected, tmp_path):
    name, n_spots, n_genes, total, um_per_px, left_out = expected
    source = only(Path(REAL) / folder)
    assert (source.name, sum(source.left_out.values())) == (name, left_out)
    import_slice(source, tmp_path)
    found = visium.read_slice(tmp_path / name)
    assert (*found.counts.shape, found.counts.sum()) == (n_spots, n_genes, total)
    assert source.um_per_px == pytest.approx(um_per_px, abs=0.01)
    table = pd.read_csv(source.origin, sep="\t", index_col=0)  # read once more, as plainly as can be
    names = found.spots.index.str.removesuffix("-1")
    np.testing.assert_array_equal(found.counts.toarray(), table.loc[names].to_numpy())
    assert list(found.genes) == list(table.columns)
