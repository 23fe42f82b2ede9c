"""A reader's clone re-draws every committed figure to the same bytes, with the pinned versions."""
import os
import re
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).resolve().parents[1]
DRAWN_BY = ("matplotlib", "numpy", "pandas", "scipy", "pyarrow")  # what a figure's bytes depend on
DRAW = """
import sys
from execnb.nbio import read_nb
from execnb.shell import CaptureShell
for page in sys.argv[2:]:
    notebook = read_nb(page)
    for cell in notebook.cells:
        if "parameters" in cell.metadata.get("tags", []):
            cell.source += f"\\nfigures = {sys.argv[1]!r}"
    CaptureShell(page).run_all(notebook, exc_stop=True)
"""


def other_versions():
    pinned = dict(re.findall(r"^([\w.-]+)==(\S+)", (ROOT / "constraints.txt").read_text(encoding="utf-8"), re.MULTILINE))
    assert set(DRAWN_BY) <= set(pinned)
    return {name: version(name) for name in DRAWN_BY if version(name) != pinned[name]}


def draws(path):
    "Whether a page has a parameter for the folder of its figures."
    cells = nbformat.read(path, as_version=4).cells
    return any("parameters" in cell.metadata.get("tags", []) and re.search(r"^figures\b", cell.source, re.MULTILINE) for cell in cells)


@pytest.fixture(scope="module")
def drawn(request):
    "What all pages draw: those that nbval runs in this session draw there, the others one after the other in one process."
    if found := other_versions():
        pytest.skip(f"not the versions of constraints.txt: {found}")
    folder, pages = Path(os.environ["PATCHMIX_DRAWN"]), [path for path in sorted((ROOT / "nbs" / "results").glob("*.ipynb")) if draws(path)]
    run = {item.path for item in request.session.items if hasattr(item, "cell")}
    if alone := [path for path in pages if path not in run]:
        done = subprocess.run([sys.executable, "-c", DRAW, folder, *alone], cwd=ROOT, capture_output=True, text=True)
        assert not done.returncode, done.stderr[-3000:]
    deadline = time.monotonic() + 600
    while waits := [path.stem for path in pages if path in run and not (folder / f"{path.stem}.done").exists()]:
        assert time.monotonic() < deadline, f"nbval did not come to the end of {', '.join(waits)}"
        time.sleep(0.5)
    return folder


COMMITTED = sorted(path.name for path in (ROOT / "figures").iterdir() if path.suffix in (".svg", ".csv"))


@pytest.mark.parametrize("name", COMMITTED)
def test_the_pages_draw_a_committed_figure_again(drawn, name):
    assert (drawn / name).exists(), f"no page draws {name}: take it out of figures/"
    assert (drawn / name).read_bytes() == (ROOT / "figures" / name).read_bytes(), "draw it again: papermill nbs/results/PAGE.ipynb out.ipynb -p figures figures"


def test_every_figure_has_its_table():
    assert {name.removesuffix(".svg") for name in COMMITTED if name.endswith(".svg")} <= {name.removesuffix(".csv") for name in COMMITTED if name.endswith(".csv")}
