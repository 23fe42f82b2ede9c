"""Every page as HTML in a real browser, wide and on a phone: pictures load, headings are in order, nothing comes from a foreign host."""
import os
import shutil
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
PAGES = {path.stem: path for path in sorted((ROOT / "nbs").rglob("*.ipynb")) if ".ipynb_checkpoints" not in path.parts}
LOOK = """() => ({
    broken: [...document.images].filter(i => !(i.complete && i.naturalWidth > 0)).length,
    pictures: document.images.length + document.querySelectorAll('svg').length,
    unnamed: [...document.images].filter(i => !i.alt || i.alt.startsWith('No description')).length,
    levels: [...document.querySelectorAll('h1, h2, h3, h4')].map(h => +h.tagName[1]),
    over: document.documentElement.scrollWidth - window.innerWidth,
    text: document.body.innerText.length,
})"""


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    "All notebooks as plain pages, by the writer that a sweep uses."
    import sys

    sys.path.insert(0, str(ROOT / "workflow"))
    try:
        from site_pages import write_site
    finally:
        sys.path.pop(0)
    folder = tmp_path_factory.mktemp("site")
    write_site(PAGES, "# All pages\n\n" + "\n".join(f"- [{name}]({name}.html)" for name in PAGES), folder)
    return folder


@pytest.fixture(scope="module")
def browser():
    if not CHROMIUM or find_spec("playwright") is None:
        pytest.skip("chromium or playwright is absent; pip install -e '.[dev,browser]' and install Debian's chromium to look at the pages")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as play:
        started = play.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"] if os.getuid() == 0 else [])
        yield started
        started.close()


def look(browser, path, width):
    "What a reader of this width sees, and every address that the page asks for."
    page, asked = browser.new_page(viewport={"width": width, "height": 900}), []
    page.on("request", lambda request: asked.append(request.url))
    page.goto(path.as_uri(), wait_until="load")
    seen = page.evaluate(LOOK)
    page.close()
    return seen, [url for url in asked if not url.startswith(("file:", "data:", "blob:"))]


@pytest.mark.parametrize("name", ["index", *PAGES])
def test_a_page_reads_well_wide_and_on_a_phone(site, browser, name):
    for width in (1280, 390):
        seen, foreign = look(browser, site / f"{name}.html", width)
        assert not foreign, f"asks for {foreign[:3]}"
        assert not seen["broken"], f"{seen['broken']} pictures do not load"
        assert not seen["unnamed"], f"{seen['unnamed']} pictures have no words for who cannot see them: give the cell a #| fig-alt line"
        assert seen["levels"][0] == 1 and seen["levels"].count(1) == 1, "one title, first"
        assert all(b - a <= 1 for a, b in zip(seen["levels"], seen["levels"][1:])), f"a heading skips a level: {seen['levels']}"
        assert seen["over"] <= 1, f"the page is {seen['over']} px wider than {width}"
        assert seen["text"] > 200


def test_a_page_with_a_fault_is_seen(browser, tmp_path):
    (tmp_path / "bad.html").write_text('<h2>Not a title</h2><img src="nothing.png"><div style="width:900px">wide</div>', encoding="utf-8")
    seen, _ = look(browser, tmp_path / "bad.html", 390)
    assert seen["broken"] == 1 and seen["levels"] == [2] and seen["over"] > 1 and seen["unnamed"] == 1
