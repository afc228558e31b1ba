"""The report as a browser shows it: every section and figure there, no complaint, nothing wider than a phone.

Needs Chromium and the `browser` extra; `make test-browser` installs both. LORICA_SCREENSHOTS=DIR keeps what was seen.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import report_cases as cases
from lorica.report import page, reading

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
SECTIONS = {"verdict", "loss", "scores", "recovery", "matrix", "search", "spectra", "costs", "provenance"}
LONG = ("zeroth order by eight one-sided directions, with a warm start of its last block", "x" * 90)
PAPER = {"light": "rgb(255, 255, 255)", "dark": "rgb(20, 23, 26)"}


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A report on one of each, with arms of long names; LORICA_REPORT names another one, such as the demo's."""
    if "LORICA_REPORT" in os.environ:
        return Path(os.environ["LORICA_REPORT"]).resolve()
    folder = tmp_path_factory.mktemp("shown")
    cases.study(folder / "study", arms=("lora", "full", *LONG))
    cases.sweep(folder / "sweep")
    cases.merge(folder / "ties")
    cases.matrix(folder / "matrix")
    return page.write(reading.read([folder]), folder / "report")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    driver = pytest.importorskip("playwright.sync_api", reason="the browser extra is not installed: make test-browser")
    if CHROMIUM is None:
        pytest.skip("there is no Chromium on the path: make test-browser")
    with driver.sync_playwright() as started:
        shown = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield shown
        shown.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 400])
def test_the_page_is_whole(browser: Any, report: Path, tmp_path: Path, width: int, scheme: str) -> None:
    context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
    shown, complaints = context.new_page(), []
    shown.on("console", lambda message: complaints.append(message.text))
    shown.on("pageerror", lambda error: complaints.append(str(error)))
    shown.on("request", lambda request: complaints.append(request.url) if "://" in request.url[5:] else None)
    shown.goto(report.as_uri())

    found = set(shown.eval_on_selector_all("section", "all => all.map(each => each.id)"))
    assert found == SECTIONS if "LORICA_REPORT" not in os.environ else found >= {"verdict", "loss", "provenance"}
    assert shown.evaluate("document.documentElement.scrollWidth") <= width
    assert shown.evaluate("getComputedStyle(document.body).backgroundColor") == PAPER[scheme]
    for table in shown.locator("#verdict .scroll").all():
        assert table.evaluate("each => each.scrollWidth <= each.clientWidth")
        assert "LORICA_REPORT" in os.environ or all(name in table.inner_text() for name in LONG)
    drawn = shown.locator("figure .panels:visible svg")
    assert drawn.count() == shown.locator("figure .panels:visible > div").count() > 0
    for box in (each.bounding_box() for each in drawn.all()):
        assert box["width"] > 250
        assert box["height"] > 60

    path = Path(os.environ.get("LORICA_SCREENSHOTS", tmp_path)) / f"report-{width}-{scheme}.png"
    shown.screenshot(path=path, full_page=True)
    assert path.stat().st_size > 50_000
    assert complaints == []
    context.close()


def test_other_views_and_colours_are_a_click_away(browser: Any, report: Path) -> None:
    context = browser.new_context(color_scheme="light")
    shown = context.new_page()
    shown.goto(report.as_uri())
    figure = shown.locator("#loss figure").first
    before = figure.locator("svg:visible").first.get_attribute("aria-label")
    figure.get_by_text("Forward passes", exact=True).click()
    after = figure.locator("svg:visible").first.get_attribute("aria-label")
    assert "against steps" in before
    assert "against forward passes" in after
    shown.get_by_role("button", name="Switch to dark colours").click()
    assert shown.evaluate("getComputedStyle(document.body).backgroundColor") == PAPER["dark"]
    context.close()


def test_without_scripts_everything_can_be_read(browser: Any, report: Path) -> None:
    context = browser.new_context(java_script_enabled=False)
    shown = context.new_page()
    shown.goto(report.as_uri())
    assert not shown.locator("#theme").is_visible()
    shown.locator("#loss figure").first.get_by_text("Seconds", exact=True).click()
    assert "against seconds" in shown.locator("#loss svg:visible").first.get_attribute("aria-label")
    context.close()
