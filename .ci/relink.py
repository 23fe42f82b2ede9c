"""After quarto render: mend the API links that nbdev writes, as in the pages that a sweep writes."""
import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "workflow"))

from site_pages import api_links, unnumbered  # noqa: E402

SITE = Path(os.environ.get("QUARTO_PROJECT_OUTPUT_DIR", ROOT / "_docs"))


def relink(html: str, page: Path, site: Path) -> str:
    "The page's text with its API links mended; a page that the site does not have stays as it is."
    return api_links(html, {unnumbered(path.stem): Path(os.path.relpath(path, page.parent)).as_posix() for path in (site / "nbs").rglob("*.html")})


def main() -> None:
    for page in SITE.rglob("*.html"):
        page.write_text(relink(page.read_text(encoding="utf-8"), page, SITE), encoding="utf-8")


if __name__ == "__main__":
    main()
