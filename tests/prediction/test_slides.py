"""Which slides a call means: tables, names, folders."""

import pytest

from utils.prediction import slides as slide_list
from utils.prediction.slides import Request


@pytest.fixture
def slides(tmp_path):
    paths = [tmp_path / name for name in ("a.svs", "b.tif", "c d (1).ndpi")]
    for path in paths:
        path.touch()
    return paths


def listed(slides, **given):
    return slide_list.list_slides(slides, slides[0].parent / "out", Request(slides[0], **given))


def test_one_slide_has_the_folder_itself_several_one_each(slides, tmp_path):
    (only,) = listed(slides[:1])
    assert (only.name, only.out) == ("a", tmp_path / "out")
    assert [one.out.relative_to(tmp_path).as_posix() for one in listed(slides)] == ["out/a", "out/b", "out/c_d_1"]


def test_a_table_says_of_each_slide_what_flags_say_of_all(slides, tmp_path):
    (tmp_path / "m.png").touch()
    table = tmp_path / "t.CSV"
    table.write_text("﻿um_per_px,slide,mask\n0.5,a.svs,\n, b.tif ,m.png\n\n", encoding="utf-8")
    first, second = listed([table], um_per_px=0.25, spot_pitch_um=200.0)
    assert (first.um_per_px, first.mask, first.spot_pitch_um) == (0.5, None, 200.0)
    assert (second.um_per_px, second.mask, second.slide) == (0.25, tmp_path / "m.png", tmp_path / "b.tif")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "expected the column slide"),
        ("slide,patient\na.svs,P1\n", "found slide, patient"),
        ("slide\n", "the header alone"),
        ("slide,um_per_px\na.svs,-1\n", "line 2, um_per_px: expected a positive number"),
        ("slide,um_per_px\na.svs,nan\n", "line 2, um_per_px: expected a positive number"),
        ("slide,um_per_px\na.svs\n", "line 2: expected 2 cells"),
        ("slide\nx.svs\n", "x.svs: expected an image or a slice folder"),
        ("slide,mask\na.svs,x.png\n", "--mask: expected the file"),
    ],
)
def test_bad_tables(slides, tmp_path, text, expected):
    (tmp_path / "t.csv").write_text(text)
    with pytest.raises(ValueError, match=expected):
        listed([tmp_path / "t.csv", slides[1]])


def test_two_slides_of_one_name_and_one_file_for_several(slides, tmp_path):
    (tmp_path / "A.png").touch()
    with pytest.raises(
        ValueError, match=r"A.png: expected slides with names of their own, found .*a.svs, which would go to"
    ):
        listed([slides[0], tmp_path / "A.png"])
    with pytest.raises(ValueError, match="would go to"):
        listed([slides[0], slides[0]])
    (tmp_path / "m.png").touch()
    with pytest.raises(ValueError, match="--mask: expected one slide, found 3"):
        listed(slides, mask=tmp_path / "m.png")


def test_names_can_be_folders(tmp_path):
    (tmp_path / "P1" / "outs").mkdir(parents=True)
    assert slide_list.slide_name(tmp_path / "P1" / "outs") == "P1"
    assert slide_list.slide_name(tmp_path / "P1") == "P1"
    assert slide_list.slide_name(tmp_path / "…/ä..svs") == "unnamed"
    assert slide_list.file_name("../../HLA/A*01") == "HLA_A_01"
