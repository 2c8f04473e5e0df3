"""report.html in a real Chromium, looked at: hostile names, screen readers, contrast, widths, size, images of it.

env MAGIC_SCREENSHOTS=docs pytest tests/report/test_browser_page.py -k images  # docs/report{,_dark}.png
pytest tests/report/test_browser_page.py -k large -s  # size and times of the largest report
"""

import io
import os
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from report_pages import HOSTILE, a_report

from utils.report.page import Table

pytest_plugins = ["browser_page"]
pytestmark = [pytest.mark.browser, pytest.mark.slow]
BOTH = pytest.mark.parametrize("opened", ["webgl", "svg"], indirect=True)
CONTRAST = 4.5  # WCAG AA for text
TEXT_AND_GROUND = """
const seen = [...document.querySelectorAll('main *, header *')].filter((e) => !e.closest('svg, option, .unseen')
  && e.offsetParent && [...e.childNodes].some((n) => n.nodeType === 3 && n.data.trim()));
return seen.map((e) => {
  let ground = e;
  while (ground && getComputedStyle(ground).backgroundColor.endsWith(', 0)')) ground = ground.parentElement;
  const behind = getComputedStyle(ground ?? document.body).backgroundColor;
  return [e.outerHTML.slice(0, 90), getComputedStyle(e).color, behind];
});
"""
ANOTHER_GENE = """
const start = performance.now();
return new Promise((done) => {
  chooseGene(200);
  const drawn = () => plot.dataset.drawn.startsWith("0 200 ");
  const look = () => (drawn() ? done(performance.now() - start) : requestAnimationFrame(look));
  look();
});
"""


def test_everything_is_reached_and_named_for_a_screen_reader(opened):
    page = opened(a_report())
    nodes = page.driver.execute_cdp_cmd("Accessibility.getFullAXTree", {})["nodes"]
    asks = {"button", "combobox", "slider", "link", "textbox", "listbox", "table", "image", "region"}
    named = [(n["role"]["value"], n.get("name", {}).get("value")) for n in nodes if not n["ignored"] and "role" in n]
    unnamed = [role for role, name in named if role in asks and not name]
    assert unnamed == [] and {role for role, _ in named} >= {"main", "banner", "heading", "combobox", "table", "slider"}
    assert page("return document.documentElement.lang") == "en"
    ids = page("return [...document.querySelectorAll('[id]')].map((e) => e.id)")
    assert len(ids) == len(set(ids))
    unreachable = page(
        "return [...document.querySelectorAll('button, input, select, a[href], [tabindex]')]"
        ".filter((e) => e.tabIndex < 0 && !e.closest('#plot, #depth')).map((e) => e.outerHTML)"
    )
    assert unreachable == []


def test_hostile_names_do_nothing(opened):
    made = a_report(genes=[HOSTILE, "B", "<a href='http://example.org'>x</a>"], barcode=HOSTILE, name=HOSTILE)
    table = Table(HOSTILE, [HOSTILE, "x"], [[HOSTILE, HOSTILE]], HOSTILE)
    examples = [replace(e, title=HOSTILE, candidates=[(None, HOSTILE, 1.0, True)]) for e in made.examples]
    made = replace(made, title=HOSTILE, unit=HOSTILE, tables=[table], examples=examples, settings={HOSTILE: HOSTILE})
    page = opened(replace(made, gene_columns=made.gene_columns | {HOSTILE: np.ones(3)}, examples_note=HOSTILE))
    page("chooseGene(0)")
    page.until("return plot.dataset.drawn.startsWith('0 0 ')", "the gene")
    page.hover(0)
    page.until("return get('spot').textContent.includes('onerror')", "the spot, as text")
    assert page("return [...document.images].filter((i) => !i.src.startsWith('data:')).length") == 0
    assert page("return document.querySelectorAll('a[href^=http], body b b, svg a').length") == 0
    assert page.driver.title.startswith("</script><img") and page.text("h1") == page("return report.title")
    assert HOSTILE.replace("\u2028", "") in page.text("#gene-table").replace("\u2028", "")


def test_a_script_that_got_in_would_not_run(opened):
    page = opened(a_report())
    page("const s = document.createElement('script'); s.textContent = 'window.harm = 1'; document.body.append(s)")
    image = '<img src="http://127.0.0.1:9/x.png" onerror="window.harm = 2">'
    page("document.body.insertAdjacentHTML('beforeend', arguments[0])", image)
    assert page("return window.harm") is None
    refused = page.errors()
    assert refused and all("Content Security Policy" in line for line in refused)
    assert page.refused() == {"csp"}, "the image was not asked for"


def test_a_page_of_several_slices_without_measurements_or_images(opened):
    made = a_report()
    bare = replace(made.slices[0], name="P2", image=None, measured=None, prediction_std=None, domain_score=None)
    page = opened(replace(made, slices=[replace(made.slices[0], measured=None), bare]))
    assert page("return [state.left, state.right]") == ["image", "predicted"]
    page("get('slice').value = '1'; get('slice').dispatchEvent(new Event('change'))")
    page.until("return plot.dataset.drawn.startsWith('1 ')", "the other slice")
    assert page("return [state.left, state.right]") == ["predicted", "predicted"]


def test_a_page_of_retrieval_alone(opened):
    page = opened(replace(a_report(), slices=[], genes=[], gene_columns={}, val_pcc=None))
    assert not page.one("#maps").is_displayed() and not page.one("#genes").is_displayed()
    (own,) = page.driver.find_elements("css selector", ".candidate.own")
    assert "its own" in own.text and "rank 2: CCC" in own.text
    assert [h.text for h in page.driver.find_elements("css selector", "nav a")] == [
        *("Retrieval examples", "Metrics", "Settings and versions")
    ]


@pytest.mark.parametrize("dark", [False, True])
def test_text_stands_out(opened, dark):
    page = opened(a_report(), dark=dark)
    page.type_gene("B")
    assert page("return document.documentElement.dataset.theme") == ("dark" if dark else "light")
    pairs = page(TEXT_AND_GROUND)
    assert len(pairs) > 50
    faint = [(what, round(contrast(ink, ground), 2)) for what, ink, ground in pairs if contrast(ink, ground) < CONTRAST]
    assert faint == []
    page.one("#theme").click()
    assert page("return document.documentElement.dataset.theme") == ("light" if dark else "dark")


def contrast(one: str, other: str) -> float:
    """WCAG 2: ratio of the relative luminances of two CSS colours."""

    def luminance(colour):
        parts = np.array([float(p) for p in colour[colour.index("(") + 1 : -1].split(",")[:3]]) / 255
        linear = np.where(parts <= 0.04045, parts / 12.92, ((parts + 0.055) / 1.055) ** 2.4)
        return linear @ [0.2126, 0.7152, 0.0722]

    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("width", [360, 768, 1280])
def test_no_page_is_wider_than_its_window(opened, width):
    page = opened(a_report(genes=[f"GENE{i}" for i in range(30)]), width=width)
    assert page("return document.documentElement.scrollWidth") <= width
    sizes = page("return [plot.clientWidth, ...plot.querySelectorAll('svg')].slice(1).map((s) => s.clientWidth)")
    assert max(sizes) <= width
    assert page("return stacked()") == (width < 800)


@BOTH
def test_a_large_report_is_below_15_mb_and_says_how_fast_it_was(opened):
    made = a_report(genes=[f"GENE{i:03d}" for i in range(300)], n_spots=5000, image_px=2000)
    page = opened(replace(made, slices=[replace(made.slices[0], prediction_std=None)]))
    work = page.work_s()
    size = page.path.stat().st_size
    assert size < 15e6
    page.type_gene("GENE123")
    elapsed = page(ANOTHER_GENE) / 1000
    ready, drawn = page("return [Number(document.documentElement.dataset.ready) / 1000, drawnBy]")
    print(
        f"{size / 1e6:.1f} MB by {drawn}: ready after {ready:.2f} s ({work:.2f} s of processor), a gene {elapsed:.2f} s"
    )


def test_images_for_the_documentation(opened):
    """Only where MAGIC_SCREENSHOTS names a folder: of demo/report.html, where `make demo` has left one."""
    folder = os.environ.get("MAGIC_SCREENSHOTS")
    if not folder:
        pytest.skip("MAGIC_SCREENSHOTS names no folder for the images")
    shown = opened(a_report(genes=[f"GENE{i:03d}" for i in range(40)], n_spots=600, image_px=1200))
    own, demo = shown.path, Path(__file__).resolve().parents[2] / "demo" / "report.html"
    for name, dark in (("report", False), ("report_dark", True)):
        shown.open(demo if demo.exists() else own, dark)
        shown.hover(30)
        time.sleep(0.5)  # the label fades in
        image = Image.open(io.BytesIO(shown.image())).convert("RGB").crop((0, 0, 1280, 1700))
        image.quantize(256).save(Path(folder) / f"{name}.png", optimize=True)
    shown.asked()  # another page's
