"""report.html in a real Chromium, used: a gene is typed, both maps change, a spot is read, a table is sorted."""

import time
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from PIL import Image, ImageChops
from report_pages import a_report

from utils.evaluation.metrics import UNITS

pytest_plugins = ["browser_page"]
pytestmark = [pytest.mark.browser, pytest.mark.slow]
BOTH = pytest.mark.parametrize("opened", ["webgl", "svg"], indirect=True)


def differ(a: Image.Image, b: Image.Image) -> float:
    """Share of pixels that changed."""
    return float((np.asarray(ImageChops.difference(a, b)).max(axis=2) > 20).mean())


def choose(page, field: str, value: str) -> None:
    """Another entry of a list."""
    page("get(arguments[0]).value = arguments[1]; get(arguments[0]).dispatchEvent(new Event('change'))", field, value)


@BOTH
def test_a_typed_gene_changes_both_maps(opened):
    page = opened(a_report(genes=["ACTB", "CD3E", "CD3D", "ERBB2"], n_spots=200))
    page.type_gene("ACTB")
    before = page.halves()
    page.type_gene("ERBB2")
    after = page.halves()
    assert all(differ(a, b) > 0.02 for a, b in zip(before, after, strict=True))
    assert "ERBB2" in page.text("#facts") and "ERBB2" in page.text("#status")
    page.type_gene("ACTB")
    assert all(differ(a, b) < 0.001 for a, b in zip(before, page.halves(), strict=True)), "and back"


def test_the_list_of_genes_follows_what_is_typed(opened):
    from selenium.webdriver.common.keys import Keys

    page = opened(a_report(genes=["ACTB", "CD3E", "XCD3", "ERBB2"]))
    box = page.one("#gene")
    box.send_keys(Keys.CONTROL, "a")
    box.send_keys("cd3")
    listed = "return [...get('gene-list').children].map((o) => o.firstChild.textContent)"
    assert page(listed) == ["CD3E", "XCD3"], "those that begin with it come first"
    assert box.get_attribute("aria-expanded") == "true"
    box.send_keys(Keys.ARROW_DOWN)
    active = box.get_attribute("aria-activedescendant")
    assert page.one(f"#{active}").get_attribute("aria-selected") == "true" and "XCD3" in page.text(f"#{active}")
    box.send_keys(Keys.ENTER)
    assert box.get_property("value") == "XCD3" and box.get_attribute("aria-expanded") == "false"
    box.send_keys(Keys.CONTROL, "a")
    box.send_keys("nothing of the kind")
    assert page.text("#status") == "No gene of that name." and page(listed) == []
    box.send_keys(Keys.ESCAPE)
    assert box.get_property("value") == "XCD3"


@BOTH
@pytest.mark.parametrize("panel", ["", "2"])
def test_a_spot_is_read_by_pointing(opened, panel):
    made = a_report(n_spots=100)
    page = opened(made)
    page.type_gene("C")
    page.hover(42, panel)
    page.until("return get('spot').textContent.startsWith('SPOT00042-1')", "the spot to be read")
    one = made.slices[0]
    kinds = (("measured", one.measured), ("predicted", one.predicted), ("prediction std", one.prediction_std))
    shown = page.text("#spot").replace("−", "-")
    for kind, values in kinds:
        found = float(shown.split(f"{kind} ")[1].split(" ")[0])
        assert found == pytest.approx(values[42, 2], abs=np.ptp(values[:, 2]) / 254 + 1e-3), kind
    assert float(shown.split("score ")[1]) == pytest.approx(one.domain_score[42], rel=1e-3)
    label = page.until("return document.querySelector('#plot .hoverlayer')?.textContent", "a label")
    assert "SPOT00042-1" in label
    centre = "const r = arguments[0].getBoundingClientRect(); return [r.width, r.height]"
    for ring in ("#ring-0", "#ring-1"):
        assert page.one(ring).is_displayed() and min(page(centre, page.one(ring))) > 5, "marked in both maps"


@BOTH
def test_spots_are_read_and_enlarged_by_keys(opened):
    from selenium.webdriver.common.keys import Keys

    page = opened(a_report(n_spots=100))
    page.type_gene("B")
    page.keys("#frame", Keys.ARROW_RIGHT)
    assert page.text("#spot").startswith("SPOT00000-1 · measured not known"), "the gene is unknown there"
    assert page.text("#status") == page.text("#spot"), "said aloud"
    page.keys("#frame", Keys.ARROW_RIGHT, Keys.ARROW_RIGHT)
    assert page.text("#spot").startswith("SPOT00002-1")
    page.keys("#frame", Keys.ARROW_DOWN)
    assert page("return state.spot") in (11, 12), "the row below, ten spots wide"
    size, width = page("return [spotPx(), view.x[1] - view.x[0]]")
    page.keys("#frame", "+")
    page.until(f"return view.x[1] - view.x[0] < {0.61 * width}", "the map to be enlarged")
    assert page("return plot.data[0].marker.size") > 1.5 * size, "spots keep their true size"
    page.type_gene("C")
    assert page("return view.x[1] - view.x[0]") < 0.61 * width, "another gene is seen in the same window"
    page.keys("#frame", "0")
    page.until(f"return Math.abs(view.x[1] - view.x[0] - {width}) < 1", "the whole")


def test_the_table_of_genes_is_sorted_by_its_heads(opened):
    made = a_report(genes=["b", "a", "c"])
    page = opened(replace(made, gene_columns={"PCC": np.array([0.1, np.nan, 0.4])}))
    order = "return [...get('gene-table').tBodies[0].rows].map((r) => r.querySelector('button').textContent)"
    heads = "return [...get('gene-table').tHead.rows[0].cells].map((c) => c.getAttribute('aria-sort'))"
    assert page(order) == ["c", "b", "a"] and page(heads)[1] == "descending", "PCC first, the unknown last"
    by_gene, by_pcc = page.driver.find_elements("css selector", "#gene-table thead button")[:2]
    by_pcc.click()
    assert page(order) == ["b", "c", "a"] and page(heads)[1] == "ascending"
    by_gene.click()
    assert page(order) == ["a", "b", "c"] and page(heads)[:2] == ["ascending", "none"]
    assert "Sorted by gene" in page.text("#status")
    page.one("#gene-table tbody tr button").click()
    page.until("return plot.dataset.drawn.startsWith('0 1 ')", "the gene of the row")


def test_weak_genes_are_greyed(opened):
    page = opened(a_report())
    assert page("return report.genes[state.gene]") != "B", "the page begins with another"
    assert page("return getComputedStyle(document.querySelector('tr.weak button')).fontStyle") == "italic"
    page.type_gene("B")
    assert page.one("#weak").is_displayed() and "below 0.1" in page.text("#weak")
    scales = page("return plot.data.map((t) => JSON.stringify(t.marker.colorscale))")
    assert "#053061" in scales[0] and "#4a4a4a" in scales[1], "what was measured is as true as ever"
    page.type_gene("C")
    assert not page.one("#weak").is_displayed()


def test_opacity_range_and_kind_of_map(opened):
    page = opened(a_report(n_spots=100))
    first = page.halves()
    for name, script in (("opacity", "plot.data[0].marker.opacity"), ("image", "plot.layout.images[0].opacity")):
        page("arguments[0].value = 0; arguments[0].dispatchEvent(new Event('input'))", page.one(f"#{name}"))
        page.until(f"return {script} === 0", name)
        assert page.text(f"#{name}-value") == "0 %"
    assert all(differ(a, b) > 0.1 for a, b in zip(first, page.halves(), strict=True)), "nothing is left of either"
    limits = "return plot.data.map((t) => [t.marker.cmin, t.marker.cmax])"
    assert page(limits)[0] != page(limits)[1], "each map has its own range"
    choose(page, "range", "shared")
    page.until("return plot.dataset.drawn.endsWith('shared')", "one range")
    assert page(limits)[0] == page(limits)[1]
    for kind in ("prediction_std", "domain", "image"):
        choose(page, "right", kind)
        page.until(f"return plot.dataset.drawn.includes(' {kind} ')", kind)


def test_a_second_name_is_typed_over_the_first(opened):
    from selenium.webdriver.common.keys import Keys

    page = opened(a_report(genes=["EPCAM", "ERBB2", "CD3E"]))
    box = page.one("#gene")
    box.click()
    for typed, expected in (("epcam", "EPCAM"), ("cd", "CD3E"), ("nothing", "CD3E"), ("erb", "ERBB2")):
        box.send_keys(typed, Keys.ESCAPE if typed == "nothing" else Keys.ENTER)
        assert box.get_property("value") == expected
        assert page("return [get('gene').selectionStart, get('gene').selectionEnd]") == [0, len(expected)]
    box.send_keys("epc", Keys.TAB)
    assert box.get_property("value") == "ERBB2", "nothing was chosen"


@pytest.mark.parametrize("unit", [UNITS["residuals"], UNITS["lognorm"]])
def test_residuals_diverge_around_zero(opened, unit):
    made = replace(a_report(n_spots=100), unit=unit)
    page = opened(made)
    page.type_gene("C")
    assert page("return [state.left, state.right]") == ["measured", "predicted"]
    limits = page("return plot.data.map((t) => [t.marker.cmin, t.marker.cmax])")
    edges = [np.nanpercentile(values[:, 2], [1, 99]) for values in (made.slices[0].measured, made.slices[0].predicted)]
    diverging = unit == UNITS["residuals"]
    expected = [np.abs(edge).max() * np.array([-1, 1]) if diverging else edge for edge in edges]
    np.testing.assert_allclose(limits, expected, rtol=1e-6)
    white = page("return Math.min(...coloursOf(scaleOf('predicted', 2))[128].match(/\\d+/g)) > 240")
    assert white == diverging, "zero is white"
    choose(page, "right", "prediction_std")
    page.until("return plot.dataset.drawn.includes('prediction_std')", "the deviation")
    assert page("return plot.data[1].marker.cmin") > 0, "a deviation does not lie around zero"


@BOTH
def test_measured_against_predicted(opened):
    made = a_report(n_spots=100)
    page = opened(made)
    page.type_gene("B")
    one = made.slices[0]
    x, y = (np.array(page(f"return Array.from(scatter.data[0].{axis})")) for axis in "xy")
    assert len(x) == 99, "one spot was not measured"
    np.testing.assert_allclose(x, one.measured[1:, 1], atol=1e-3)
    np.testing.assert_allclose(y, one.predicted[1:, 1], atol=1e-3)
    facts = [float(value.text) for value in page.driver.find_elements("css selector", "#agreement-facts dd")]
    r, ratio = np.corrcoef(x, y)[0, 1], y.std() / x.std()
    np.testing.assert_allclose(facts, [r, ratio, 99], atol=6e-4)


def test_several_genes_side_by_side(opened):
    page = opened(a_report(genes=[f"G{i}" for i in range(8)], n_spots=100))
    names = "return [...document.querySelectorAll('.card .name')].map((b) => b.textContent)"
    ink = (
        "return [...document.querySelectorAll('.card canvas')].map((c) => c.toDataURL().length > 5000 && c.toDataURL())"
    )
    best = page("return orderedGenes().filter((g) => !isWeak(g)).slice(0, 4).map((g) => report.genes[g])")
    assert page(names) == best and "G1" not in best
    page.type_gene("G1")
    page.one("#pin").click()
    page.until("return document.querySelectorAll('.card').length === 5", "a card more")
    assert page(names)[-1] == "G1" and page.text("#pin") == "G1 is shown" and not page.one("#pin").is_enabled()
    before = page(ink)
    assert all(before) and len(set(before)) == 5, "five different maps"
    choose(page, "card-kind", "measured")
    page.until("return get('cards').dataset.drawn.includes('measured')", "what was measured")
    assert all(a != b for a, b in zip(before, page(ink), strict=True))
    page.one(".card [aria-label^='Remove']").click()
    page.until("return document.querySelectorAll('.card').length === 4", "a card less")
    assert page(names) == [*best[1:], "G1"]
    page.one(".card .name").click()
    page.until(f"return report.genes[state.gene] === '{best[1]}'", "its name to draw it in the large maps")


def test_tables_are_saved_as_csv(opened, tmp_path):
    names = ["A", 'quoted "name", with a comma', "line\nbreak"]
    made = a_report(genes=names)
    page = opened(replace(made, gene_columns=made.gene_columns | {"other": np.array([0.5, np.nan, -1e-3])}))
    page.driver.execute_cdp_cmd("Browser.setDownloadBehavior", {"behavior": "allow", "downloadPath": str(tmp_path)})
    page.one("#genes-csv").click()
    page.one(".csv").click()
    page.until("return get('status').textContent.startsWith('metrics.csv')", "both files")
    genes, metrics = (saved(tmp_path / name) for name in ("genes.csv", "metrics.csv"))
    assert sorted(genes.index) == sorted(names)
    np.testing.assert_allclose(genes.loc[names, "PCC"], made.gene_columns["PCC"], rtol=1e-5)
    np.testing.assert_allclose(genes.loc[names, "other"], [0.5, np.nan, -1e-3])
    assert genes.index.tolist() == page("return orderedGenes().map((g) => report.genes[g])"), "in the order of the page"
    assert metrics["PCC"].tolist()[0] == 0.4321 and np.isnan(metrics["PCC"].iloc[1])


def saved(path) -> pd.DataFrame:
    """A table that the browser writes: it is there under its name once it is whole."""
    for _ in range(200):
        if path.exists():
            return pd.read_csv(path, index_col=0)
        time.sleep(0.05)
    raise AssertionError(f"{path.name} was not saved; there are {[p.name for p in path.parent.iterdir()]}")


def test_every_column_is_explained_beside_its_table(opened):
    page = opened(a_report())
    for section in ("genes", "tables"):
        terms = [term.text for term in page.driver.find_elements("css selector", f"#{section} .notes dt")]
        assert "PCC" in terms or "model" in terms
        assert all(d.is_displayed() for d in page.driver.find_elements("css selector", f"#{section} .notes dd"))
