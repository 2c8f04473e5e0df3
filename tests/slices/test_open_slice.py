"""A slice folder opened once: its image, its pitch, and folders that are something else."""

import gzip
import shutil

import numpy as np
import pytest
from PIL import Image
from spaceranger_folders import BARCODES, HEADER, SCALES, position_lines, refused, write_h5, write_spatial

from utils.slices import splits, visium


@pytest.fixture
def folder(tmp_path):
    root = tmp_path / "A1"
    write_h5(root / "filtered_feature_bc_matrix.h5")
    write_spatial(root)
    return root


def test_the_full_resolution_image(folder):
    opened = visium.open_slice(folder)
    assert opened.fullres_image() is None
    for other in ("matrix.h5", "._he.tif", "detected_tissue_image.jpg"):
        (folder / other).write_text("")
    Image.new("RGB", (20, 30)).save(folder / "spatial" / "tissue_hires_image.png")
    opened = visium.open_slice(folder)
    assert opened.fullres_image() is None and opened.source_image().kind == "hires"
    Image.new("RGB", (100, 150)).save(folder / "he.TIF")
    assert opened.fullres_image() == folder / "he.TIF"
    assert opened.source_image() == visium.SourceImage("fullres", folder / "he.TIF", 1.0)
    assert opened.source_image("hires").scale == SCALES["tissue_hires_scalef"]
    (folder / "other.btf").write_text("")
    assert "he.TIF, other.btf" in refused("image column", opened.fullres_image)
    assert opened.fullres_image("other.btf") == folder / "other.btf"
    refused("the image gone.svs", opened.fullres_image, "gone.svs")
    (folder / "he.TIF").unlink(), (folder / "other.btf").unlink()
    refused("expected a full-resolution image, found none", opened.source_image, "fullres")


def test_a_link_to_nothing_is_named_and_not_passed_over_for_the_hires_image(folder, tmp_path):
    (folder / "he.tif").symlink_to(tmp_path / "gone.tif")
    refused("he.tif: expected an image, found no such file", visium.open_slice(folder).source_image)


def test_an_image_may_be_a_link_or_lie_in_the_root(folder, tmp_path):
    (tmp_path / "store.ndpi").write_text("")
    (folder / "he.ndpi").symlink_to(tmp_path / "store.ndpi")
    (folder / "gone.tif").symlink_to(tmp_path / "nowhere.tif")
    assert visium.open_slice(folder).fullres_image() == folder / "he.ndpi"
    write_spatial(tmp_path / "E1" / "outs")
    (tmp_path / "E1" / "outs" / "he.tif").write_text("")
    for named in (None, "he.tif", "outs/he.tif"):
        assert visium.open_slice(tmp_path / "E1").fullres_image(named) == tmp_path / "E1" / "outs" / "he.tif"


def test_pitch_as_stated_by_the_array_or_by_the_bins(folder):
    assert visium.open_slice(folder).known_pitch_um is None
    refused("--spot_pitch_um", lambda: visium.open_slice(folder).pitch_um)
    opened = visium.open_slice(folder, spot_pitch_um=200)
    assert opened.pitch_um == 200 and opened.pitch_px == pytest.approx(100) and opened.um_per_px == pytest.approx(2)
    write_spatial(folder, scales=SCALES | {"bin_size_um": 8.0})
    assert visium.open_slice(folder).pitch_um == 8
    places = [(0, 0), (0, 2), (1, 1), (1, 3)]
    staggered = [f"{b},1,{r},{c},{87 * r},{50 * c}" for b, (r, c) in zip(BARCODES, places, strict=True)]
    write_spatial(folder, staggered)
    assert visium.open_slice(folder).pitch_um == 100 and visium.open_slice(folder, spot_pitch_um=55).pitch_um == 55
    for wrong in (0, -1, float("nan"), float("inf")):
        refused("positive spot pitch", visium.open_slice, folder, spot_pitch_um=wrong)


def test_a_single_spot_has_no_pitch(folder):
    write_spatial(folder, [f"{BARCODES[0]},1,0,0,10,10"])
    opened = visium.open_slice(folder, spot_pitch_um=100)
    assert len(opened.spots) == 1 and opened.um_per_px is None and opened.lattice is None
    refused("two positions or more", lambda: opened.pitch_px)


def test_places_that_do_not_fit_are_measured_with_a_warning(simulated, tmp_path):
    shutil.copytree(simulated / "P01_1", tmp_path / "S1")
    true = visium.open_slice(tmp_path / "S1")
    assert true.warnings == () and not true.lattice.measured
    path = next((tmp_path / "S1" / "spatial").glob("tissue_positions*.csv"))
    table = visium.read_positions(tmp_path / "S1").sample(frac=1, random_state=0)
    places = table[["array_row", "array_col"]].to_numpy()
    positions = visium.read_positions(tmp_path / "S1")
    lines = [
        f"{barcode},{int(spot.in_tissue)},{row},{col},{spot.y_fullres_px},{spot.x_fullres_px}"
        for (barcode, spot), (row, col) in zip(positions.iterrows(), places, strict=True)
    ]
    path.unlink()
    (tmp_path / "S1" / "spatial" / "tissue_positions.csv").write_text("\n".join([HEADER, *lines]))
    found = visium.open_slice(tmp_path / "S1")
    assert "do not fit its pixels" in found.warnings[0] and found.lattice.measured
    assert found.pitch_px == pytest.approx(true.pitch_px, rel=1e-3)
    shift = found.spots[["array_row", "array_col"]].to_numpy() - true.spots[["array_row", "array_col"]].to_numpy()
    assert len(np.unique(shift, axis=0)) == 1  # the true places, counted from elsewhere


def test_spots_off_tissue_without_sensible_pixels_do_not_matter(folder):
    extra = [f"X{i}-1,0,9,{i},0,0" for i in range(3)]
    write_spatial(folder, [*position_lines(), *extra])
    opened = visium.open_slice(folder, spot_pitch_um=100)
    assert len(opened.spots) == 4 and opened.pitch_px == pytest.approx(100)


def test_sections_joined_are_refused(folder):
    lines = [*position_lines(), *position_lines([b.replace("-1", "-2") for b in BARCODES])]
    write_spatial(folder, lines)
    refused("expected spots at different pixels, found 2", visium.open_slice, folder)
    write_spatial(folder)
    write_h5(folder / "filtered_feature_bc_matrix.h5", barcodes=[*BARCODES[:3], "AAAA-2"])
    assert "-1, -2" in refused("spaceranger aggr", visium.open_slice, folder)


def staggered(rows, tissue):
    """Lines of positions of a Visium array of 8 columns, four of which are in tissue, the first being `tissue`."""
    places = [(r, c) for r in range(rows) for c in range(r % 2, 16, 2)]
    return [f"B{r}x{c}-1,{int(tissue <= c // 2 < tissue + 4)},{r},{c},{87 * r},{50 * c}" for r, c in places]


def test_counts_of_another_section_on_the_same_barcodes_are_warned_of(folder):
    """Tissue of 8 rows in columns 1 to 4 of the array, of the other section in columns 2 to 5."""
    write_spatial(folder, staggered(8, 1))
    of_both = {at: [line.split(",")[0] for line in staggered(8, at) if line.split(",")[1] == "1"] for at in (1, 2)}
    for name, barcodes, warned in (
        ("filtered_feature_bc_matrix.h5", of_both[1], False),
        ("filtered_feature_bc_matrix.h5", of_both[2], True),
        ("filtered_feature_bc_matrix.h5", of_both[2][:20], True),
        ("filtered_feature_bc_matrix.h5", of_both[1][:20], False),  # of some spots only
        ("raw_feature_bc_matrix.h5", of_both[2], False),
    ):
        (folder / "filtered_feature_bc_matrix.h5").unlink(missing_ok=True)
        write_h5(folder / name, np.ones((len(barcodes), 4), int), barcodes)
        warnings = visium.open_slice(folder).warnings
        assert len(warnings) == warned and all("are counts and spatial/ of one section?" in line for line in warnings)
    write_h5(folder / "filtered_feature_bc_matrix.h5", np.ones((32, 4), int), of_both[2])
    assert (
        "8 barcodes that are not in tissue by the positions, and 8 positions in tissue without counts, beside 24"
        in (visium.open_slice(folder).warnings[0])
    )


@pytest.mark.parametrize(
    ("pitch_um", "diameter_px", "spot_um"),
    [(None, 65, None), (100, 65, None), (151.97, 100 / 1.5197, None), (200, 65, "130"), (55, 55, "30.2")],
)
def test_a_stated_pitch_that_gives_spots_of_no_known_size_is_warned_of(folder, pitch_um, diameter_px, spot_um):
    (folder / "filtered_feature_bc_matrix.h5").unlink()
    write_spatial(folder, staggered(8, 1), scales=SCALES | {"spot_diameter_fullres": diameter_px})
    warnings = visium.open_slice(folder, spot_pitch_um=pitch_um).warnings
    assert len(warnings) == (spot_um is not None)
    assert all(f"spots would measure {spot_um} um at the stated pitch of {pitch_um} um" in line for line in warnings)


def test_scale_factors_of_another_image_are_warned_of(folder):
    write_spatial(folder, scales=SCALES | {"spot_diameter_fullres": 6.5})
    assert "0.065 times the distance" in visium.open_slice(folder).warnings[0]
    for kind, factor in (("hires", 0.2), ("lowres", 0.06)):  # positions in pixels of a small image
        write_spatial(folder, scales=SCALES | {"spot_diameter_fullres": 65 / factor})
        refused(f"as in pixels of the {kind} image; divide the positions", visium.open_slice, folder)
    write_spatial(folder, scales=SCALES | {"microns_per_pixel": 0.5, "bin_size_um": 8.0, "spot_diameter_fullres": 100})
    assert "0.08 um by the spots (8 um apart) but 0.5 um by microns_per_pixel" in visium.open_slice(folder).warnings[0]


def geo(folder):
    """Files as GEO keeps them: flat, with a prefix, packed."""
    for path in [*(folder / "spatial").iterdir(), *folder.glob("*.h5")]:
        (folder / f"GSM1_P1_{path.name}.gz").write_bytes(gzip.compress(path.read_bytes()))
        path.unlink()
    (folder / "spatial").rmdir()


def flat(folder):
    for path in list((folder / "spatial").iterdir()):
        path.rename(folder / f"GSM1-{path.name}")
    (folder / "spatial").rmdir()


def packed(folder):
    for path in list((folder / "spatial").iterdir()):
        path.with_name(path.name + ".gz").write_bytes(gzip.compress(path.read_bytes()))
        path.unlink()


def prefixed(folder):
    for path in list((folder / "spatial").iterdir()):
        path.rename(path.with_name(f"GSM1_{path.name}"))


def archived(folder):
    shutil.rmtree(folder / "spatial")
    (folder / "GSM1_spatial.tar.gz").write_bytes(b"")


def renamed(folder):
    (folder / "spatial").rename(folder / "GSM1_P1_spatial")


def segmented(folder):
    (folder / "outs").mkdir()
    (folder / "spatial").rename(folder / "outs" / "spatial")
    next((folder / "outs" / "spatial").glob("tissue_positions*")).unlink()
    (folder / "outs" / "segmented_outputs").mkdir()


def aggregated(folder):
    (folder / "aggregation.csv").write_text("library_id,molecule_h5\n")
    next((folder / "spatial").glob("tissue_positions*")).rename(folder / "spatial" / "aggr_tissue_positions.csv")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (geo, "gunzip"),
        (flat, "as in a GEO download"),
        (packed, "gunzip"),
        (prefixed, "GEO download"),
        (archived, "GEO download"),
        (renamed, "GEO download"),
        (segmented, "segmented"),
        (aggregated, "aggr"),
    ],
)
def test_folders_that_are_something_else_are_named(folder, change, words):
    change(folder)
    message = refused(words, visium.open_slice, folder)
    assert str(folder) in message
    if not visium.is_slice(folder):  # then the table of slices says it
        assert words in refused(str(folder), splits.read_table, folder.parent, split=False)
        (folder.parent / "slices.csv").write_text("slice\nA1\n")
        assert words in refused(str(folder), splits.read_table, folder.parent, split=False)


def test_files_of_several_sections_beside_each_other_are_named(folder, tmp_path):
    geo(folder)
    for path in list(folder.iterdir()):
        path.rename(tmp_path / path.name)
    folder.rmdir()
    assert str(tmp_path) in refused("as in a GEO download", splits.read_table, tmp_path, split=False)


def test_one_packed_file_among_good_ones_is_not_passed_over(folder):
    (folder / "spatial" / "tissue_hires_image.png.gz").write_bytes(b"")
    refused(r"found tissue_hires_image.png.gz; gunzip", visium.open_slice, folder)
    (folder / "spatial" / "tissue_hires_image.png").write_bytes(b"")
    visium.open_slice(folder)


def test_a_packed_scan_is_not_passed_over_for_the_hires_image(folder):
    Image.new("RGB", (20, 30)).save(folder / "spatial" / "tissue_hires_image.png")
    for name in ("A1_he.png.gz", "A1_he.tif.zip"):
        (folder / name).write_bytes(b"")
        refused(f"found {name}; unpack it", visium.open_slice(folder).source_image)
        assert visium.open_slice(folder).source_image("hires").kind == "hires"
        (folder / name).unlink()
    (folder / "fastq.zip").write_bytes(b"")
    assert visium.open_slice(folder).source_image().kind == "hires"


@pytest.mark.parametrize("suffix", [".vsi", ".isyntax", ".lif", ".nd2", ".zvi", ".oir", ".PSD"])
def test_a_scan_that_nothing_reads_is_not_passed_over_for_the_hires_image(folder, suffix):
    Image.new("RGB", (20, 30)).save(folder / "spatial" / "tissue_hires_image.png")
    (folder / f"A1{suffix}").write_bytes(bytes(600))
    refused(f"A1{suffix}: expected an image .* convert it to a tiled RGB TIFF", visium.open_slice(folder).source_image)
    Image.new("RGB", (20, 30)).save(folder / "A1_converted.png")
    assert visium.open_slice(folder).source_image().path.name == "A1_converted.png"


@pytest.mark.parametrize("suffix", [".jfif", ".jpe", ".JPF"])
def test_other_suffixes_of_jpeg_are_found(folder, suffix):
    Image.new("RGB", (20, 30)).save(folder / f"A1{suffix}", format="JPEG")
    source = visium.open_slice(folder).source_image()
    assert (source.kind, source.path.name, source.size) == ("fullres", f"A1{suffix}", (20, 30))


def test_a_table_row_stays_inside_the_folder(folder):
    for image in ("../B1/he.tif", str(folder / "he.TIF")):
        (folder.parent / "slices.csv").write_text(f"slice,image\nA1,{image}\n")
        refused("inside the folder", splits.read_table, folder.parent, split=False)
