"""The report in a real browser: from the disk, offline, at both widths, light and dark, with a silent console."""

import os
import shutil

import pytest

from msae.web.report import report
from tests.test_reporting_report import full, made  # noqa: F401  # fixtures

playwright = pytest.importorskip(
    "playwright.sync_api", reason="playwright is not installed; type: pip install playwright"
)
CHROMIUM = os.environ.get("MSAE_CHROMIUM") or shutil.which("chromium")


@pytest.fixture(scope="module")
def browser():
    if CHROMIUM is None:
        pytest.skip("chromium is not installed; on Debian type: apt-get install chromium")
    with playwright.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
def test_it_opens_from_the_disk_and_asks_for_nothing(browser, full, width, scheme):  # noqa: F811
    context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme, offline=True)
    page = context.new_page()
    said, asked = [], []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("request", lambda request: asked.append(request.url))
    page.on("dialog", lambda dialog: said.append(dialog.message))
    path = full[0].path
    page.goto(path.resolve().as_uri())
    assert said == [] and [url for url in asked if not url.startswith("data:")] == [path.resolve().as_uri()]
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.locator("img").count() > 8
    assert page.evaluate("[...document.images].every(image => image.naturalWidth > 0 && image.alt)")
    # Words are as light as the ground is dark, in the page and in the drawings.
    ink = page.evaluate("getComputedStyle(document.querySelector('svg text')).fill")
    assert (max(map(int, ink.strip("rgb()").split(","))) > 150) == (scheme == "dark")
    context.close()


def test_links_jump_and_captions_are_text(browser, full):  # noqa: F811
    page = browser.new_page()
    page.goto(full[0].path.resolve().as_uri())
    page.get_by_role("link", name="Audit of a classifier").click()
    assert page.url.endswith("#audit")
    assert page.locator("script").count() == 0 and "<script>alert" in page.inner_text("body")


def test_a_bare_report_opens_too(browser, made, tmp_path):  # noqa: F811
    found = report(made / "bare", out=tmp_path / "bare.html")
    page = browser.new_page()
    said = []
    page.on("console", lambda message: said.append(message.text))
    page.goto(found.path.as_uri())
    assert said == [] and page.locator(".lacks").count() >= 5
