"""A browser for tests of report.html: starting it, opening a report, and doing what a user does.

Fixtures are found by `pytest_plugins = ["browser_page"]`.
"""

import base64
import io
import json
import shutil
import time
from pathlib import Path

import pytest
from PIL import Image

from utils.report.page import write_report

FLAGS = ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--hide-scrollbars", "--disable-extensions")
WEBGL = {"webgl": "--enable-unsafe-swiftshader", "svg": "--disable-3d-apis"}  # in software, and not at all


class Page:
    """A report in a browser, and what a user does with it."""

    def __init__(self, driver, path: Path, dark: bool):
        self.driver = driver
        self.open(path, dark)

    def open(self, path: Path, dark: bool) -> None:
        self.path = path
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme]})
        self.driver.execute_cdp_cmd("Performance.enable", {"timeDomain": "threadTicks"})
        self.driver.get(path.as_uri())
        self.until("return document.documentElement.dataset.ready", "the page to be ready")

    def __call__(self, script: str, *arguments):
        return self.driver.execute_script(script, *arguments)

    def until(self, script: str, what: str):
        end = time.monotonic() + 300
        while time.monotonic() < end:
            if found := self(script):
                return found
            time.sleep(0.05)
        raise AssertionError(f"waited five minutes for {what}; console: {self.driver.get_log('browser')}")

    def one(self, selector: str):
        return self.driver.find_element("css selector", selector)

    def text(self, selector: str) -> str:
        return self.one(selector).get_property("textContent")

    def type_gene(self, name: str) -> None:
        from selenium.webdriver.common.keys import Keys

        box = self.one("#gene")
        box.click()
        box.send_keys(Keys.CONTROL, "a")
        box.send_keys(name, Keys.ENTER)
        self.until(f"return plot.dataset.drawn.split(' ')[1] == report.genes.indexOf({json.dumps(name)})", name)

    def keys(self, selector: str, *keys: str) -> None:
        self.one(selector).send_keys(*keys)

    def halves(self) -> list[Image.Image]:
        """The two maps as they stand on the screen, without their titles."""
        image = Image.open(io.BytesIO(self.one("#plot").screenshot_as_png)).convert("RGB")
        middle, bottom = image.width // 2, image.height
        return [image.crop((left, 40, left + middle - 20, bottom - 70)) for left in (0, middle + 20)]

    def hover(self, spot: int, panel: str = "") -> None:
        from selenium.webdriver import ActionChains

        x, y = self(
            "const x = plot._fullLayout['xaxis' + arguments[1]], y = plot._fullLayout['yaxis' + arguments[1]];"
            "return [x._offset + x.l2p(slice().x[arguments[0]]), y._offset + y.l2p(slice().y[arguments[0]])]",
            *(spot, panel),
        )
        box = self.one("#plot")
        self("arguments[0].scrollIntoView({block: 'center', behavior: 'instant'})", box)
        size = box.size
        move = ActionChains(self.driver, duration=50)
        move.move_to_element_with_offset(box, 5 - size["width"] / 2, 5 - size["height"] / 2)
        move.move_to_element_with_offset(box, x - size["width"] / 2, y - size["height"] / 2).perform()

    def asked(self) -> set[str]:
        """Addresses of all requests so far, but those of data in the page."""
        messages = [json.loads(entry["message"])["message"] for entry in self.driver.get_log("performance")]
        sent = [m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"]
        return {url for url in sent if not url.startswith(("data:", "blob:"))}

    def work_s(self) -> float:
        """Processor seconds of the page's own thread so far: what a free machine would take, on a busy one too."""
        metrics = self.driver.execute_cdp_cmd("Performance.getMetrics", {})["metrics"]
        return next(one["value"] for one in metrics if one["name"] == "TaskDuration")

    def refused(self) -> set[str]:
        """Why requests so far were not sent."""
        messages = [json.loads(entry["message"])["message"] for entry in self.driver.get_log("performance")]
        return {m["params"].get("blockedReason") for m in messages if m["method"] == "Network.loadingFailed"}

    def errors(self) -> list[str]:
        return [entry["message"] for entry in self.driver.get_log("browser") if entry["level"] == "SEVERE"]

    def image(self) -> bytes:
        height = self("return document.documentElement.scrollHeight")
        clip = {"x": 0, "y": 0, "width": self("return innerWidth"), "height": height, "scale": 1}
        shot = {"captureBeyondViewport": True, "clip": clip}
        return base64.b64decode(self.driver.execute_cdp_cmd("Page.captureScreenshot", shot)["data"])


def start(flag: str):
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed: pip install selenium")
    from selenium.webdriver.chrome.service import Service

    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if not (browser and shutil.which("chromedriver")):
        pytest.skip("no browser: apt-get install chromium chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = browser
    for one in (*FLAGS, flag):
        options.add_argument(one)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    return webdriver.Chrome(options=options, service=Service(shutil.which("chromedriver")))


@pytest.fixture(scope="session")
def browsers():
    """`browsers("webgl")` and `browsers("svg")`, each started once."""
    started: dict = {}

    def get(kind):
        if kind not in started:
            started[kind] = start(WEBGL[kind])
        return started[kind]

    yield get
    for driver in started.values():
        driver.quit()


@pytest.fixture
def opened(browsers, request, tmp_path):
    """`opened(report, width, height, dark)` writes a report and opens it; at the end nothing may have gone wrong."""
    driver, pages = browsers(getattr(request, "param", "webgl")), []
    for log in ("browser", "performance"):
        driver.get_log(log)  # what another test left

    def open_page(report, width=1280, height=900, dark=False):
        path = tmp_path / f"report_{len(pages)}.html"
        write_report(path, report)
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        pages.append(Page(driver, path, dark))
        return pages[-1]

    yield open_page
    if pages:
        assert pages[-1].errors() == []
        assert pages[-1].asked() <= {one.path.as_uri() for one in pages}, "a report asks nothing of a network"
