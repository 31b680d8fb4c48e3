"""The report in a real browser: it loads without complaints and its controls work. Needs a Chromium."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from PIL import Image

from browser import Browser, find_browser
from qdiff_fx.report.html import write_report
from qdiff_fx.safe_io import write_json
from report_runs import LAYERS, demo_document

pytestmark = pytest.mark.slow

SHOWN = (
    "[...document.querySelectorAll('#layer-table tbody tr')]"
    ".filter((row) => !row.hidden).map((row) => row.cells[%d].textContent)"
)
"""The texts of one column, in the order and choice that is on the screen."""


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    write_json(folder / "demo.json", demo_document(folder))
    return write_report(folder)


@pytest.fixture
def show(report: Path, tmp_path: Path) -> Iterator[Callable[..., Browser]]:
    find_browser()
    with ExitStack() as stack:

        def opened(**options: int | bool) -> Browser:
            browser = stack.enter_context(Browser(tmp_path / "profile", **options))
            browser.open(report)
            return browser

        yield opened


def click(browser: Browser, selector: str) -> None:
    browser.evaluate(f"document.querySelector({selector!r}).click()")


def choose(browser: Browser, selector: str, value: str) -> None:
    browser.evaluate(
        f"(() => {{ const field = document.querySelector({selector!r}); field.value = {value!r};"
        f" field.dispatchEvent(new Event('input', {{ bubbles: true }})); }})()"
    )


def test_it_loads_without_complaints_or_requests(show: Callable[..., Browser], report: Path) -> None:
    browser = show()
    assert browser.evaluate("document.readyState") == "complete"
    assert [url for url in browser.requests if not url.startswith("data:")] == [report.as_uri()]
    assert browser.complaints == []
    assert browser.evaluate("document.querySelectorAll('svg.chart').length") > 4
    assert browser.evaluate("[...document.images].every((image) => image.naturalWidth > 0)")


def test_columns_sort_both_ways_by_value(show: Callable[..., Browser]) -> None:
    browser = show()
    for selector, column in (("th:nth-child(7) button", 6), ("th:nth-child(6) button", 5)):
        values = f"{SHOWN % column}.map((text) => text === '–' ? 1e9 : Number(text.replace(',', '')))"
        click(browser, f"#layer-table {selector}")
        rising = browser.evaluate(values)
        assert rising == sorted(rising) and len(set(rising)) > 3
        click(browser, f"#layer-table {selector}")
        assert browser.evaluate(values) == sorted(rising, reverse=True)
    assert browser.evaluate("document.querySelectorAll('#layer-table [aria-sort]').length") == 1
    assert browser.complaints == []


def test_search_facets_and_blocks_filter(show: Callable[..., Browser]) -> None:
    browser = show()
    bar = "[data-for=layer-table]"
    choose(browser, f"{bar} input", "block1. CONV")
    assert browser.evaluate(SHOWN % 1) == ["block1.layer1", "block1.layer11"]
    assert browser.evaluate(f"document.querySelector('{bar} output').textContent") == f"2 of {LAYERS} rows"
    click(browser, f"{bar} .reset")
    assert len(browser.evaluate(SHOWN % 1)) == LAYERS
    choose(browser, f"{bar} select[data-facet='2']", "falls back")
    assert browser.evaluate(SHOWN % 0) == ["4"]
    click(browser, f"{bar} .reset")
    browser.evaluate(
        "document.querySelector('a[data-block=\"2\"]').dispatchEvent(new MouseEvent('click', {bubbles: true}))"
    )
    assert browser.evaluate(SHOWN % 2) == ["2"] * 4
    assert browser.complaints == []


def test_pictures_compare_by_slider_and_difference(show: Callable[..., Browser]) -> None:
    browser = show()
    over = "getComputedStyle(document.querySelector('.over'))"
    assert browser.evaluate(f"{over}.visibility") == "hidden"
    click(browser, "input[value=slider]")
    assert browser.evaluate(f"{over}.visibility") == "visible"
    choose(browser, ".amount input", "25")
    assert browser.evaluate("document.querySelector('.strips').style.getPropertyValue('--cut')") == "0.25"
    assert "repeating-linear-gradient" in browser.evaluate(f"{over}.maskImage")
    click(browser, "input[value=difference]")
    assert browser.evaluate(f"{over}.mixBlendMode") == "difference"
    assert browser.complaints == []


def test_the_keyboard_reaches_controls_and_marks(show: Callable[..., Browser]) -> None:
    browser = show()
    browser.evaluate("document.querySelector('#layer-table th:nth-child(7) button').focus()")
    browser.press("Enter")
    assert (
        browser.evaluate("document.querySelector('#layer-table th:nth-child(7)').getAttribute('aria-sort')")
        == "ascending"
    )
    browser.evaluate("document.querySelector('#error svg.chart').focus()")
    for key, step in (("ArrowRight", 1), ("ArrowRight", 2), ("ArrowLeft", 1)):
        browser.press(key)
        assert browser.evaluate("document.getElementById('tip').textContent").startswith(f"sampling step {step}\n")
    browser.press("Escape")
    assert browser.evaluate("document.getElementById('tip').hidden")


@pytest.mark.parametrize(("width", "dark"), [(1200, False), (1200, True), (380, False)])
def test_it_fits_desk_and_phone_in_light_and_dark(
    show: Callable[..., Browser], tmp_path: Path, width: int, dark: bool
) -> None:
    browser = show(width=width, dark=dark)
    assert browser.evaluate("document.documentElement.scrollWidth") == width
    browser.screenshot(tmp_path / "page.png")
    with Image.open(tmp_path / "page.png") as picture:
        brightness = sum(picture.convert("RGB").getpixel((2, 2))) / 3
        assert picture.width == width
        assert (brightness < 60) == dark
        assert len(picture.convert("RGB").getcolors(1 << 24) or ()) > 50  # something is drawn
    assert browser.complaints == []
