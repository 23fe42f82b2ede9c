"""Write the report card into README.md between its two marks: run after `publish`."""
import re
from pathlib import Path

from patchmix_repro.core import project_root
from patchmix_repro.home import in_short
from patchmix_repro.report_card import report_card

MARKS = re.compile(r"(<!-- report card -->\n).*?(<!-- end of the report card -->\n)", re.DOTALL)


def block():
    "The text between the marks, from results/."
    return in_short({f"{data}, mini": report_card(project_root() / "results", data, "mini") for data in ("shapes9", "caltech9")})


if __name__ == "__main__":
    page = Path(project_root() / "README.md")
    page.write_text(MARKS.sub(lambda found: found[1] + block() + found[2], page.read_text(encoding="utf-8")), encoding="utf-8")
