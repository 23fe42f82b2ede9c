"""Executed pages of results as plain HTML that needs no foreign host: what `snakemake` shows where Quarto is not at hand."""
import html
import os
import re
from pathlib import Path

import nbformat
from nbconvert import HTMLExporter
from nbconvert.filters import markdown2html

NOTEBOOKS = Path(__file__).resolve().parents[1] / "nbs"
API = "{doc_host}{doc_baseurl}/".format_map(dict(re.findall(r"^(\w+) = (.*)$", (NOTEBOOKS.parent / "settings.ini").read_text(encoding="utf-8"), re.MULTILINE)))
STYLE = """:root { color-scheme: light dark }
body { max-width: 62rem; margin: 2rem auto; padding: 0 1rem; font: 16px/1.5 system-ui, sans-serif; color: #222; background: #fff }
a { color: #0072b2 } img, svg { max-width: 100%; height: auto } table { display: block; max-width: 100%; overflow-x: auto; border-collapse: collapse; font-size: .85rem } p code, li code, td code { overflow-wrap: anywhere } .table, .output, .jp-OutputArea { overflow-x: auto }
th, td { padding: .2rem .6rem; border-bottom: 1px solid #ccc; text-align: left } pre { overflow-x: auto; background: #f4f4f4; padding: .5rem; font-size: .8rem }
.prompt, .jp-InputPrompt, .jp-OutputPrompt, .anchor-link { display: none }
@media (max-width: 600px) { p:has(> img), .jp-OutputArea-output, .output { overflow-x: auto } p > img, .output img, .output svg, .jp-OutputArea img, .jp-OutputArea svg { max-width: 48rem } }
@media (prefers-color-scheme: dark) { body { color: #ddd; background: #16181c } a { color: #6cb6ff } pre { background: #22252b } img, svg { background: #fff } th, td { border-color: #444 } }"""


def page(title, body):
    "One HTML page around a body."
    return f'<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1"><title>{html.escape(title)}</title><style>{STYLE}</style></head><body>{body}</body></html>'


def api_links(body, places):
    """Links that nbdev writes to the API, at the address of the site and without a page's number: to their place, page name -> address.

    In the comment of a signature such a link shows as raw Markdown, and a private name has no place of its own: both become the bare name.
    """
    body = re.sub(r"\[`([^`]+)`\]\(" + re.escape(API) + r"[^)]*\)", r"\1", body)
    body = re.sub(f'<a href="{re.escape(API)}[^"]*#_[^"]*">(.*?)</a>', r"\1", body)
    return re.sub(re.escape(API) + r"(?:\w+/)*(\w+)\.html", lambda found: places.get(found[1], found[0]), body)


def unnumbered(name):
    "A page's name as nbdev writes it."
    return re.sub(r"^\d+[a-z]?_", "", name)


def relink(body, pages, folder):
    "Links to notebooks: to a page of this site where there is one, else to the clone's notebook."

    def target(found):
        name, anchor = Path(found[1]).stem, found[2] or ""
        if name in pages:
            return f'href="{name}.html{anchor}"'
        place = next(iter(NOTEBOOKS.rglob(f"{name}.ipynb")), None)
        return f'href="{os.path.relpath(place, folder)}{anchor}"' if place else found[0]

    return re.sub(r'href="(?!https?:)([^"#]+)\.ipynb(#[^"]*)?"', target, api_links(body, {unnumbered(name): f"{name}.html" for name in pages}))


def slugged(body):
    "Headings with the anchors that GitHub and Quarto give them, so that one link serves everywhere."

    def slug(found):
        return found[1] + re.sub(r"[^\w\-]", "", html.unescape(found[2]).lower()) + '"'

    return re.sub(r'(href="#)([^"]+)"', slug, re.sub(r'(<h[1-6][^>]*?\bid=")([^"]+)"', slug, body))


def described(notebook):
    "The same notebook as a reader wants it: pictures carry the words of their `#| fig-alt` line, and Quarto's lines do what they say."
    for cell in notebook.cells:
        if cell.cell_type == "code":
            if words := re.search(r"^#\| fig-alt: (.+)$", cell.source, re.MULTILINE):
                for output in cell.outputs:
                    for kind in ("image/png", "image/svg+xml"):
                        if kind in output.get("data", {}):
                            output.setdefault("metadata", {}).setdefault(kind, {})["alt"] = words[1]
            for output in cell.outputs:
                if "text/markdown" in output.get("data", {}):
                    output["data"]["text/markdown"] = re.sub(r"\{target=[^}]*\}", "", "".join(output["data"]["text/markdown"]))
            if re.search(r"^#\| echo: false$", cell.source, re.MULTILINE):
                cell.transient = {"remove_source": True}
            cell.source = re.sub(r"^#\|.*\n?", "", cell.source, flags=re.MULTILINE)
    return notebook


def write_site(pages, front, folder):
    "Write index.html from Markdown and one page for each executed notebook: name -> path."
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    exporter = HTMLExporter(template_name="basic", exclude_input_prompt=True, exclude_output_prompt=True, filters={"clean_html": lambda html: html})  # the clone's own notebooks: nothing to sanitise
    for name, path in pages.items():
        body, _ = exporter.from_notebook_node(described(nbformat.read(path, as_version=4)))
        (folder / f"{name}.html").write_text(page(name.replace("_", " "), f'<p><a href="index.html">All pages</a></p>{relink(slugged(body), pages, folder)}'), encoding="utf-8")
    title = re.search(r"^# (.+)$", front, re.MULTILINE)[1]
    (folder / "index.html").write_text(page(title, relink(markdown2html(front), pages, folder)), encoding="utf-8")
