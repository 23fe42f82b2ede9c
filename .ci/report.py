"""Write the answers, the findings and the report card into README.md between their marks: run after `publish`."""
import re
from pathlib import Path

from patchmix_repro.core import project_root
from patchmix_repro.home import answers, found, in_short
from patchmix_repro.report_card import report_card

MARKS = {name: re.compile(rf"(<!-- {name} -->\n)(.*?)(<!-- end of the {name} -->\n)", re.DOTALL) for name in ("answers", "findings", "report card")}


def blocks():
    "The texts between the marks, from results/."
    cards = {f"{data}, mini": report_card(project_root() / "results", data, "mini") for data in ("shapes9", "caltech9")}
    return {"answers": "".join(f"- {line}\n" for line in answers(cards)), "findings": "".join(f"- {sentence}\n" for sentence in found(cards)), "report card": in_short(cards)}


if __name__ == "__main__":
    page = Path(project_root() / "README.md")
    text = page.read_text(encoding="utf-8")
    for name, block in blocks().items():
        text = MARKS[name].sub(lambda match, block=block: match[1] + block + match[3], text)
    page.write_text(text, encoding="utf-8")
