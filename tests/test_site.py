"""Every page as HTML in a real browser, wide and on a phone: pictures load, headings are in order, nothing comes from a foreign host."""
import os
import re
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import unquote, urlsplit

import nbformat
import pytest
from nbconvert.filters import markdown2html

ROOT = Path(__file__).resolve().parents[1]
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
PAGES = {path.stem: path for path in sorted((ROOT / "nbs").rglob("*.ipynb")) if ".ipynb_checkpoints" not in path.parts}
TEXTS = ("README", "CHANGELOG")  # the home page of the site, and what changed
LOOK = """() => ({
    broken: [...document.images].filter(i => !(i.complete && i.naturalWidth > 0)).length,
    pictures: document.images.length + document.querySelectorAll('svg').length,
    unnamed: [...document.images].filter(i => !i.alt || i.alt.startsWith('No description')).length,
    levels: [...document.querySelectorAll('h1, h2, h3, h4')].map(h => +h.tagName[1]),
    over: document.documentElement.scrollWidth - window.innerWidth,
    text: document.body.innerText.length,
    links: [...document.links].map(a => a.href).filter(href => href.startsWith('file:')),
})"""


@pytest.fixture(scope="module")
def filtered(tmp_path_factory):
    "Every notebook as nbdev_filter hands it to Quarto, or the error it stops with; one process for all."
    folder = tmp_path_factory.mktemp("filtered")
    code = "import os, sys, pathlib, traceback\nfrom nbdev.cli import nbdev_filter\nout = pathlib.Path(sys.argv[1])\n"
    code += "for name in map(pathlib.Path, sys.argv[2:]):\n    try: text, end = nbdev_filter(fname=name, printit=False), '.ipynb'\n"
    code += "    except BaseException: text, end = traceback.format_exc(), '.error'\n"
    code += "    (out / (name.stem + end)).write_text(text, encoding='utf-8')\n"
    code += "os._exit(0)"  # without: IPython collects garbage once for each of its shells, of which there is one a notebook
    subprocess.run([sys.executable, "-c", code, folder, *PAGES.values()], cwd=ROOT, check=True, capture_output=True, env={**os.environ, "MPLBACKEND": "agg"})
    return folder


@pytest.mark.parametrize("name", PAGES)
def test_the_site_filter_accepts_the_notebook(filtered, name):
    error = filtered / f"{name}.error"
    assert not error.exists(), error.read_text(encoding="utf-8")[-2000:]
    text = "\n".join(cell.source for cell in nbformat.read(filtered / f"{name}.ipynb", as_version=4).cells)
    assert "#| export" not in text and "default_exp" not in text


@pytest.fixture(scope="module")
def site(filtered, tmp_path_factory):
    "All filtered notebooks, the home page and the changelog as plain pages, by the writer that a sweep uses."
    sys.path.insert(0, str(ROOT / "workflow"))
    try:
        from site_pages import page, relink, slugged, write_site
    finally:
        sys.path.pop(0)
    folder = tmp_path_factory.mktemp("site")
    write_site({name: filtered / f"{name}.ipynb" for name in PAGES}, "# All pages\n\n" + "\n".join(f"- [{name}]({name}.html)" for name in PAGES), folder)
    for name in TEXTS:
        body = relink(slugged(markdown2html((ROOT / f"{name}.md").read_text(encoding="utf-8"))), PAGES, folder)
        body = re.sub(r'(href|src)="([^":#]+)', lambda found: f'{found[1]}="{ROOT / found[2]}' if (ROOT / found[2]).exists() else found[0], body)
        (folder / f"{name}.html").write_text(page(name, body), encoding="utf-8")
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


def look(browser, path, *widths):
    "What a reader sees at each of these widths, and every address that the page asks for."
    page, asked, seen = browser.new_page(viewport={"width": widths[0], "height": 900}), [], []
    page.on("request", lambda request: asked.append(request.url))
    page.goto(path.as_uri(), wait_until="load")
    for width in widths:
        page.set_viewport_size({"width": width, "height": 900})
        seen.append(page.evaluate(LOOK))
    page.close()
    return seen, [url for url in asked if not url.startswith(("file:", "data:", "blob:"))]


def broken(links):
    "Links of a page to files or to places in them that do not exist."
    for link in dict.fromkeys(links):
        file, place = Path(unquote(urlsplit(link).path)), unquote(urlsplit(link).fragment)
        if not file.exists() or place and file.suffix == ".html" and f'id="{place}"' not in file.read_text(encoding="utf-8"):
            yield link


@pytest.mark.parametrize("name", ["index", *TEXTS, *PAGES])
def test_a_page_reads_well_wide_and_on_a_phone(browser, site, name):
    widths = (1280, 390)
    looks, foreign = look(browser, site / f"{name}.html", *widths)
    assert not foreign, f"asks for {foreign[:3]}"
    for width, seen in zip(widths, looks):
        assert not seen["broken"], f"{seen['broken']} pictures do not load"
        assert not seen["unnamed"], f"{seen['unnamed']} pictures have no words for who cannot see them: give the cell a #| fig-alt line"
        assert seen["levels"][0] == 1 and seen["levels"].count(1) == 1, "one title, first"
        assert all(b - a <= 1 for a, b in zip(seen["levels"], seen["levels"][1:])), f"a heading skips a level: {seen['levels']}"
        assert seen["over"] <= 1, f"the page is {seen['over']} px wider than {width}"
        assert seen["text"] > 200
    assert list(broken(seen["links"])) == []


def test_a_page_with_a_fault_is_seen(browser, tmp_path):
    (tmp_path / "bad.html").write_text('<h2>Not a title</h2><img src="nothing.png"><div style="width:900px">wide</div><a href="gone.html">a</a><a href="bad.html#gone">b</a><a id="here" href="#here">c</a>', encoding="utf-8")
    (wide, seen), _ = look(browser, tmp_path / "bad.html", 1280, 390)
    assert wide["over"] <= 1 and seen["broken"] == 1 and seen["levels"] == [2] and seen["over"] > 1 and seen["unnamed"] == 1
    assert [Path(link).name for link in broken(seen["links"])] == ["gone.html", "bad.html#gone"]


FAINT = """() => {
    const parts = colour => colour.match(/[\\d.]+/g).map(Number);
    const luminance = ([r, g, b]) => [r, g, b].map(v => (v /= 255) <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4).reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
    const behind = e => { for (; e; e = e.parentElement) { const c = parts(getComputedStyle(e).backgroundColor); if (c.length < 4 || c[3] > 0) return c; } return [255, 255, 255]; };
    const found = [];
    const walk = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
    for (let node; node = walk.nextNode();) {
        const e = node.parentElement;
        if (!node.textContent.trim() || e.closest('svg, script, style') || !e.getClientRects().length) continue;
        const [one, two] = [parts(getComputedStyle(e).color), behind(e)].map(luminance).sort((a, b) => b - a);
        if ((one + 0.05) / (two + 0.05) < 4.5) found.push(node.textContent.trim().slice(0, 40));
    }
    return found;
}"""  # text below the contrast that WCAG 2 asks of it


def faint(browser, path, scheme):
    page = browser.new_page(color_scheme=scheme)
    page.goto(path.as_uri(), wait_until="load")
    found, ground = page.evaluate(FAINT), page.evaluate("getComputedStyle(document.body).backgroundColor")
    page.close()
    return found, ground


@pytest.mark.parametrize("name", ["README", "report", "every_number", "records", "mixing", "how_to_run"])
def test_text_stands_out_in_the_light_and_in_the_dark(browser, site, name):
    path = next(site.glob(f"*{name}.html"))
    (light, white), (dark, black) = faint(browser, path, "light"), faint(browser, path, "dark")
    assert white != black, "the page has one ground for both"
    assert not light and not dark, f"hard to read: in the light {light[:5]}, in the dark {dark[:5]}"


def test_faint_text_is_seen(browser, tmp_path):
    (tmp_path / "faint.html").write_text('<body style="background: #fff"><p style="color: #bbb">pale</p><p style="color: #222">dark</p></body>', encoding="utf-8")
    assert faint(browser, tmp_path / "faint.html", "light") == (["pale"], "rgb(255, 255, 255)")
