"""A run's page in headless Chromium: no console message, no request, nothing wider than the window.

`make browser-test` runs it. Screenshots lie in the folder that SCREENSHOTS names.
"""

import os
from pathlib import Path

import pytest
from playwright.sync_api import sync_playwright
from run_folders import finished_run, metrics, unfinished_run

from fitune.report.page import write_page

WIDTHS = (1440, 390)


@pytest.fixture(scope="module")
def pages(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("runs")
    finished, half = finished_run(folder / "finished"), unfinished_run(folder / "half")
    other = finished_run(folder / "other", metrics(loss=5.0), ("training.learning_rate=1e-4",))
    pages = {"finished": write_page(finished, price_per_hour=2.0), "half": write_page(half)}
    compared = folder / "compared.html"
    compared.write_text(write_page(other, (finished, half)).read_text())
    return pages | {"compared": compared}


@pytest.fixture(scope="module")
def chromium():
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=os.environ.get("CHROMIUM") or None, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("name", ["finished", "half", "compared"])
def test_the_page_is_whole_and_quiet(chromium, pages, name, width, scheme):
    page = chromium.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
    said, asked = [], []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("dialog", lambda dialog: said.append(dialog.message))
    page.on("request", lambda request: asked.append(request.url))
    page.goto(pages[name].as_uri())
    page.evaluate("document.querySelectorAll('details').forEach(element => element.open = true)")
    assert said == []
    assert asked == [pages[name].as_uri()]
    assert page.title() == f"{'other' if name == 'compared' else name} · fitune", "no script of an answer has run"
    assert page.evaluate("document.documentElement.scrollWidth") == width, "only tables and commands scroll sideways"
    for chart in page.query_selector_all("svg"):
        box = chart.bounding_box()
        assert box["width"] > 300 and box["height"] > 80
    sizes = page.evaluate(
        """[...document.querySelectorAll('svg text')].map(text => text.getBoundingClientRect().height)"""
    )
    assert min(sizes) >= 8, "text in charts can be read"
    ground, text = page.evaluate("(style => [style.backgroundColor, style.color])(getComputedStyle(document.body))")
    assert (_lightness(ground) > 200 and _lightness(text) < 60) == (scheme == "light")
    assert (_lightness(ground) < 60 and _lightness(text) > 200) == (scheme == "dark")
    if folder := os.environ.get("SCREENSHOTS"):
        page.screenshot(path=Path(folder) / f"{name}-{width}-{scheme}.png", full_page=True)
    page.close()


def _lightness(colour: str) -> float:
    """Mean of the channels of a CSS colour such as rgb(20, 23, 26)."""
    channels = [int(part) for part in colour.removeprefix("rgb(").removesuffix(")").split(",")]
    return sum(channels) / 3
