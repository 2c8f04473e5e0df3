"""report.html in a real Chromium, used: a gene is typed, both maps change, a spot is read, a table is sorted."""

from dataclasses import replace

import numpy as np
import pytest
from PIL import Image, ImageChops
from report_pages import a_report

pytest_plugins = ["browser_page"]
pytestmark = [pytest.mark.browser, pytest.mark.slow]
BOTH = pytest.mark.parametrize("opened", ["webgl", "svg"], indirect=True)


def differ(a: Image.Image, b: Image.Image) -> float:
    """Share of pixels that changed."""
    return float((np.asarray(ImageChops.difference(a, b)).max(axis=2) > 20).mean())


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
    assert "Viridis" in scales[0] and "#4a4a4a" in scales[1], "what was measured is as true as ever"
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
    assert page(limits)[0] == page(limits)[1]
    page("get('range').value = 'own'; get('range').dispatchEvent(new Event('change'))")
    page.until("return plot.dataset.drawn.endsWith('own')", "own ranges")
    assert page(limits)[0] != page(limits)[1]
    for kind in ("prediction_std", "domain", "image"):
        page("get('right').value = arguments[0]; get('right').dispatchEvent(new Event('change'))", kind)
        page.until(f"return plot.dataset.drawn.includes(' {kind} ')", kind)
