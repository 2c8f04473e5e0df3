"""report.html: what the file holds, how values are kept, names that are markup, joined pages, parts of both runs."""

import base64
import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from report_pages import HOSTILE, a_report, blocks_of, content_of
from tiny_runs import stderr_line

from utils.report import __main__ as report_command
from utils.report import page, page_data, page_parts
from utils.report.page import SliceMaps, Table, join_reports, write_report


def slow_values(text, bits, low, high, n_spots):
    """(S, G) as the page's script reads them, a gene and a spot at a time."""
    length, found = len(text) // len(low), []
    for gene in range(len(low)):
        raw = base64.b64decode(text[gene * length : (gene + 1) * length])
        width = bits // 8
        numbers = [int.from_bytes(raw[i * width : (i + 1) * width], "little") for i in range(n_spots)]
        steps = 2**bits - 2
        found.append([np.nan if n > steps else low[gene] + n * (high[gene] - low[gene]) / steps for n in numbers])
    return np.array(found).T


# ---- values


@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("n_spots", [1, 2, 3, 7])
def test_values_come_back_to_half_a_step(rng, bits, n_spots):
    values = rng.normal(size=(n_spots, 4)) * [1, 10, 0.1, 0] + [0, 5, 0, 2]
    values[0, 0], values[-1, 1] = np.nan, np.inf
    text, low, high = page_data.quantise(values, bits)
    found = slow_values(text, bits, low, high, n_spots)
    np.testing.assert_array_equal(np.isnan(found), ~np.isfinite(values))
    half = (np.array(high) - low) / (2**bits - 2) / 2
    known = np.isfinite(values)
    assert (np.abs(found - values)[known] <= np.broadcast_to(half + 1e-12, values.shape)[known]).all()


def test_a_gene_that_is_nowhere_known(rng):
    values = np.column_stack([np.full(5, np.nan), rng.normal(size=5)])
    text, low, high = page_data.quantise(values, 16)
    assert (low[0], high[0]) == (0, 0) and np.isnan(slow_values(text, 16, low, high, 5)[:, 0]).all()
    assert page_data.colour_range([values])[0][0] == 0


def test_no_spots_at_all():
    assert page_data.quantise(np.zeros((0, 2)), 16)[1:] == ([0, 0], [0, 0])


def test_colours_share_one_range_without_the_outermost_per_cent(rng):
    maps = [rng.normal(size=(300, 2)), rng.normal(size=(300, 2)) + 5]
    maps[0][0, 0] = 1e6
    maps[1][3, 1] = np.nan
    low, high = page_data.colour_range(maps)
    both = np.concatenate(maps)
    expected = [np.percentile(column[np.isfinite(column)], [1, 99]) for column in both.T]
    np.testing.assert_allclose(np.column_stack([low, high]), expected)
    assert high[0] < 10


# ---- the file


def test_the_file_holds_everything_and_nothing_beside_it(tmp_path):
    path = tmp_path / "new" / "report.html"
    write_report(path, a_report())
    assert [found.name for found in path.parent.iterdir()] == ["report.html"]
    text = path.read_text(encoding="utf-8")
    own = text.replace(re.search(r"<script>/\*\*\s+\* plotly.js.*?</script>", text, re.DOTALL)[0], "")
    assert not re.findall(r"(?:src|href)=[\"'](?!data:|#)", own), "no address but those in the page"
    assert not re.findall(r"url\(|@import|fetch\(|XMLHttpRequest|import\(", own)
    assert "https:" not in own and "http:" not in own
    assert "default-src 'none'" in text and "{{" not in own.split("<script")[0]
    assert text.count("'sha256-") == 5 == len(re.findall("<script>", text)), "every script is admitted by its hash"
    content = content_of(path)
    assert content["versions"]["numpy"] == np.__version__ and "Python" in content["versions"]
    assert content["settings"] == {"part": "test", "out": "x"}


def test_maps_are_read_back(tmp_path):
    made = a_report(n_spots=50)
    write_report(tmp_path / "r.html", made)
    content, blocks = content_of(tmp_path / "r.html"), blocks_of(tmp_path / "r.html")
    one, kept = made.slices[0], content["slices"][0]
    assert kept["barcodes"] == list(one.barcodes) and kept["maps"].keys() == {"measured", "predicted", "prediction_std"}
    for kind, tolerance in (("measured", 1e-3), ("predicted", 1e-3), ("prediction_std", 1e-2)):
        own = kept["maps"][kind]
        found = slow_values(blocks[own["block"]], own["bits"], own["low"], own["high"], 50)
        np.testing.assert_allclose(found, getattr(one, kind), atol=tolerance)
        low, high = np.nanpercentile(getattr(one, kind), [1, 99], axis=0)
        np.testing.assert_allclose([own["own"]["low"], own["own"]["high"]], [low, high])
    np.testing.assert_allclose(np.column_stack([kept["x"], kept["y"]]), one.xy_fullres_px, atol=0.051)
    height, width = np.array(one.image.shape[:2]) / one.image_scale
    assert (kept["image"]["width"], kept["image"]["height"]) == (width, height)
    assert blocks[kept["image"]["block"]].startswith("data:image/jpeg;base64,")


def test_hostile_names_are_text_wherever_they_stand(tmp_path):
    made = a_report(genes=[HOSTILE, "{{DATA}}", "B"], barcode=HOSTILE, name=HOSTILE)
    made = replace(made, title=HOSTILE, tables=[Table(HOSTILE, [HOSTILE, "x"], [[HOSTILE, 1]], HOSTILE)])
    made = replace(made, settings={HOSTILE: HOSTILE}, gene_columns={HOSTILE: np.ones(3)}, examples_note=HOSTILE)
    write_report(tmp_path / "r.html", made)
    text = (tmp_path / "r.html").read_text(encoding="utf-8")
    write_report(tmp_path / "plain.html", a_report())
    plain = (tmp_path / "plain.html").read_text(encoding="utf-8")
    for markup in ("<img", "<b>", "<script", "</script"):
        assert text.lower().count(markup) == plain.lower().count(markup)
    content = content_of(tmp_path / "r.html")
    assert content["genes"][:2] == [HOSTILE, "{{DATA}}"] and content["slices"][0]["barcodes"][0] == HOSTILE


def test_what_is_not_known_is_null(tmp_path):
    made = a_report()
    columns = {"PCC": np.array([0.5, np.nan, np.inf])}
    tables = [Table("t", ["a", "b"], [["x", float("nan")], ["y", None], ["z", np.int64(3)], ["w", np.float32(0.25)]])]
    write_report(tmp_path / "r.html", replace(made, gene_columns=columns, tables=tables))
    content = content_of(tmp_path / "r.html")
    assert content["columns"]["PCC"] == [0.5, None, None]
    assert [row[1] for row in content["tables"][0]["rows"]] == [None, None, 3, 0.25]


def test_tables_and_settings_are_there_without_javascript(tmp_path):
    rows = [["model", 0.43214, 1234], ["ridge", None, -12.345]]
    made = replace(a_report(), tables=[Table("Ours & <theirs>", ["method", "PCC", "n"], rows, "A note.")])
    write_report(tmp_path / "r.html", made)
    text = (tmp_path / "r.html").read_text(encoding="utf-8")
    assert "<h3>Ours &amp; &lt;theirs&gt;</h3>" in text and "A note." in text
    for words in ('<th scope="row">model</th><td>0.432</td><td>1,234</td>', "<td>–</td><td>−12.3</td>"):
        assert words in text
    assert "<dt>part</dt><dd>test</dd>" in text
    assert [page_data.shown(value) for value in ("x", "", 0.0, 2.0, 0.0004)] == ["x", "–", "0", "2", "0.000"]


def test_folders_of_the_machine_stay_out_of_the_page(tmp_path):
    places = {
        "decoder": [Path("/home/me/a.pth"), Path("data/b.pth")],
        "mask": "/secret/mask.png",
        "image": r"C:\me\he.tif",
    }
    write_report(tmp_path / "r.html", replace(a_report(), settings=places | {"out": Path("../me/out"), "mask2": None}))
    expected = {"decoder": "a.pth, data/b.pth", "mask": "mask.png", "image": "he.tif", "out": "out", "mask2": "–"}
    assert content_of(tmp_path / "r.html")["settings"] == expected


def test_genes_of_low_or_unknown_validation_pcc_are_greyed(tmp_path):
    write_report(tmp_path / "r.html", replace(a_report(), val_pcc=np.array([0.1, 0.099, np.nan])))
    content = content_of(tmp_path / "r.html")
    assert content["weak"] == [False, True, True] and content["columns"]["validation PCC"] == [0.1, 0.099, None]
    write_report(tmp_path / "r.html", replace(a_report(), val_pcc=None))
    assert content_of(tmp_path / "r.html")["weak"] is None


def test_a_large_image_is_made_smaller_and_keeps_its_place(tmp_path, monkeypatch):
    monkeypatch.setattr(page, "IMAGE_PX", 20)
    made = a_report()
    write_report(tmp_path / "r.html", made)
    kept = content_of(tmp_path / "r.html")["slices"][0]["image"]
    assert kept["width"] == made.slices[0].image.shape[1] / made.slices[0].image_scale
    assert len(blocks_of(tmp_path / "r.html")[kept["block"]]) < 3000


@pytest.mark.parametrize(
    ("part", "change", "words"),
    [
        ("slice", {"predicted": np.zeros((4, 3))}, r"slice P1: predicted: expected \(30, 3\), found \(4, 3\)"),
        ("slice", {"measured": np.zeros((30, 2))}, r"measured: expected \(30, 3\), found \(30, 2\)"),
        ("slice", {"xy_fullres_px": np.zeros((30, 3))}, r"xy_fullres_px: expected \(30, 2\)"),
        ("slice", {"domain_score": np.zeros(29)}, r"domain_score: expected \(30,\), found \(29,\)"),
        ("report", {"gene_columns": {"PCC": np.zeros(2)}}, r"PCC: expected a value for each of 3 genes, found \(2,\)"),
        ("report", {"val_pcc": np.zeros(4)}, r"val_pcc: expected a value for each of 3 genes"),
    ],
)
def test_shapes_that_do_not_fit_are_refused_and_nothing_is_written(tmp_path, part, change, words):
    made = a_report()
    wrong = replace(made, **change) if part == "report" else replace(made, slices=[replace(made.slices[0], **change)])
    with pytest.raises(ValueError, match=words):
        write_report(tmp_path / "r.html", wrong)
    assert not list(tmp_path.iterdir())


def test_a_report_needs_neither_slices_nor_examples(tmp_path):
    for name, made in (
        ("retrieval", replace(a_report(), slices=[], genes=[], gene_columns={}, val_pcc=None)),
        ("maps", replace(a_report(), examples=[], tables=[])),
    ):
        write_report(tmp_path / f"{name}.html", made)
        content = content_of(tmp_path / f"{name}.html")
        assert bool(content["slices"]) == (name == "maps") == (not content["examples"])


# ---- several pages as one


def test_pages_are_joined(tmp_path):
    whole = a_report()
    maps = replace(whole, examples=[], examples_note="")
    rest = replace(whole, slices=[], genes=[], gene_columns={}, val_pcc=None, unit="", tables=[])
    write_report(tmp_path / "a.html", maps)
    write_report(tmp_path / "b.html", rest)
    for order in (("a", "b"), ("b", "a")):
        pages = {name: tmp_path / f"{name}.html" for name in order}
        join_reports(tmp_path / "joined.html", "Both", pages)
        write_report(tmp_path / "whole.html", whole)
        joined, expected = content_of(tmp_path / "joined.html"), content_of(tmp_path / "whole.html")
        settings = expected.pop("settings")
        assert joined.pop("settings") == {f"{n}: {k}": v for n in order for k, v in settings.items()}
        assert joined.pop("title") == "Both"
        expected.pop("title")
        assert joined == expected
        assert blocks_of(tmp_path / "joined.html") == blocks_of(tmp_path / "whole.html")


def test_what_cannot_be_joined_is_named(tmp_path):
    write_report(tmp_path / "a.html", a_report())
    (tmp_path / "b.html").write_text("<p>other</p>")
    with pytest.raises(ValueError, match=r"b\.html: expected a page written by write_report"):
        join_reports(tmp_path / "j.html", "", {"b": tmp_path / "b.html"})
    with pytest.raises(ValueError, match=r"a\.html: expected maps in one of the pages"):
        join_reports(tmp_path / "j.html", "", {"a": tmp_path / "a.html", "again": tmp_path / "a.html"})


# ---- what both evaluations put on it


def test_examples_follow_their_rule():
    ranks = np.array([5, 1, 30, 2, 9, 40, 7, 3, 20, 6])
    found = page_parts.choose_examples(ranks, 10, seed=0)
    by_kind = {kind: {spot for k, spot in found if k == kind} for kind in page_parts.KINDS}
    assert by_kind["best"] == {1, 3} and by_kind["median"] == {9, 6}
    assert len(by_kind["missed"]) == 2 and by_kind["missed"] <= {2, 5, 8}
    assert found == page_parts.choose_examples(ranks, 10, seed=0)
    seen = {tuple(page_parts.choose_examples(ranks, 10, seed)) for seed in range(20)}
    assert len(seen) > 1, "the missed ones are drawn"


@pytest.mark.parametrize("n_spots", [1, 2, 3, 5])
def test_examples_of_a_small_slice_stand_once_each(n_spots):
    found = page_parts.choose_examples(np.arange(1, n_spots + 1), 10, seed=0)
    spots = [spot for _, spot in found]
    assert len(set(spots)) == len(spots) and 1 <= len(spots) <= n_spots


@pytest.fixture(scope="module")
def pages(evaluated, tmp_path_factory):
    """Both evaluations of the tiny models, with their pages, and the joined one."""
    out = shutil.copytree(evaluated.out / "results", tmp_path_factory.mktemp("pages") / "results")
    report_command.main([str(out), "--html", str(out / "report.html")])
    return out


def test_every_column_and_row_is_explained_and_no_folder_named(pages, evaluated):
    for part in ("similarity", "retrieval"):
        path = pages / part / "report.html"
        content, text = content_of(path), path.read_text(encoding="utf-8")
        words = {
            word for table in content["tables"] for word in (*table["columns"], *(row[0] for row in table["rows"]))
        }
        assert words - {"method"} == set(content["tableNotes"])
        assert set(content["columns"]) == set(content["geneNotes"])
        assert str(evaluated.out) not in text and str(evaluated.data) not in text


def test_the_expression_page_shows_the_part(pages):
    content, blocks = (read(pages / "similarity" / "report.html") for read in (content_of, blocks_of))
    metrics = json.loads((pages / "similarity" / "metrics.json").read_text())
    (one,) = content["slices"]
    assert one["name"] == "P03_1" and len(one["barcodes"]) == 70 and len(content["genes"]) == 20
    assert np.mean(content["columns"]["PCC, residuals"]) == pytest.approx(
        metrics["residuals"]["model"]["pcc_gene_mean"], abs=1e-5
    )
    assert content["unit"] == "log1p counts per 10,000" and one["umPerPx"] > 0
    assert [row[0] for row in content["tables"][0]["rows"]] == list(metrics["residuals"])
    assert content["settings"]["part"] == "test" and content["settings"]["training: Init_lr"] == "0.001"
    own = {kind: one["maps"][kind] for kind in ("measured", "predicted")}
    values = {k: slow_values(blocks[m["block"]], 16, m["low"], m["high"], 70) for k, m in own.items()}
    error = np.mean((values["predicted"] - values["measured"]) ** 2)
    assert error == pytest.approx(metrics["lognorm"]["model"]["mse"], rel=1e-3)


def test_the_retrieval_page_marks_one_true_profile_of_each_image(pages):
    content = content_of(pages / "retrieval" / "report.html")
    assert 4 <= len(content["examples"]) <= 6 and content["tables"]
    for one in content["examples"]:
        (own,) = [c for c in one["candidates"] if c["own"]]
        barcode = one["title"].split(", ")[1].split(":")[0]
        rank = int(re.search(r"rank (\d+) of 70", one["title"])[1])
        assert own["label"] == f"rank {rank}: {barcode}" and 6 <= len(one["candidates"]) <= 7
        scores = [c["score"] for c in one["candidates"]]
        assert scores == sorted(scores, reverse=True)
        assert all(c["tile"].startswith("data:image/jpeg") for c in one["candidates"])


def test_one_page_of_both(pages):
    content = content_of(pages / "report.html")
    assert content["slices"] and content["examples"] and len(content["tables"]) == 5
    assert {"expression: part", "retrieval: part"} <= set(content["settings"])


def test_a_missing_page_is_named_in_one_line(pages, tmp_path, capsys):
    for kind in ("retrieval", "similarity"):
        (tmp_path / kind).mkdir()
        (tmp_path / kind / "metrics.json").write_bytes((pages / kind / "metrics.json").read_bytes())
    capsys.readouterr()
    for argv, words in (
        (
            [tmp_path, "--html", tmp_path / "r.html"],
            "--html: .*similarity/report.html: expected results, found none; run dec",
        ),
        ([tmp_path, tmp_path, "--html", tmp_path / "r.html"], "--html: expected one folder of results, found 2"),
    ):
        with pytest.raises(SystemExit) as stop:
            report_command.main([str(word) for word in argv])
        assert stop.value.code == 2
        stderr_line(capsys, words)


def test_the_fields_are_those_that_are_drawn():
    assert set(page.BITS) <= set(SliceMaps.__dataclass_fields__)
