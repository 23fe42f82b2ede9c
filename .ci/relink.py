"""After quarto render: mend the API links that nbdev writes.

A link names a page without its number, at the address of the site: it becomes relative, with the number.
A link in the comment of a signature shows as raw Markdown: it becomes the bare name.
A link to a private name leads nowhere: it becomes the name.
"""
import configparser
import os
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SITE = Path(os.environ.get("QUARTO_PROJECT_OUTPUT_DIR", ROOT / "_docs"))


def api_base() -> str:
    "The address that nbdev writes before every page name."
    config = configparser.ConfigParser(interpolation=None)
    config.read(ROOT / "settings.ini")
    return config["DEFAULT"]["doc_host"] + config["DEFAULT"]["doc_baseurl"] + "/"


def pages(site: Path) -> dict[str, Path]:
    "Page name without its number, as nbdev writes it, to the rendered file."
    folder = site / "nbs"
    found = {re.sub(r"^\d+[a-z]?_", "", str(p.relative_to(folder))): p for p in folder.rglob("*.html")}
    return {name.replace(os.sep, "/"): path for name, path in found.items()}


def relink(html: str, page: Path, site: Path, base: str) -> str:
    "The page's text with its API links mended; a page that the site does not have stays as it is."
    known = pages(site)
    html = re.sub(r"\[`([^`]+)`\]\(" + re.escape(base) + r"[^)]*\)", r"\1", html)
    html = re.sub(f'<a href="{re.escape(base)}[^"]*#_[^"]*">(.*?)</a>', r"\1", html)

    def local(match: re.Match) -> str:
        target = known.get(match[1])
        return Path(os.path.relpath(target, page.parent)).as_posix() if target else match[0]

    return re.sub(re.escape(base) + r"([\w/]+\.html)", local, html)


def main() -> None:
    base = api_base()
    for page in SITE.rglob("*.html"):
        page.write_text(relink(page.read_text(encoding="utf-8"), page, SITE, base), encoding="utf-8")


if __name__ == "__main__":
    main()
