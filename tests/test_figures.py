"""A reader's clone re-draws the committed figures to the same bytes, with the pinned versions."""
import re
from importlib.metadata import version
from pathlib import Path

import papermill
import pytest

ROOT = Path(__file__).resolve().parents[1]
DRAWN_BY = ("matplotlib", "numpy", "pandas", "scipy", "pyarrow")  # what a figure's bytes depend on


def other_versions():
    pinned = dict(re.findall(r"^([\w.-]+)==(\S+)", (ROOT / "constraints.txt").read_text(encoding="utf-8"), re.MULTILINE))
    assert set(DRAWN_BY) <= set(pinned)
    return {name: version(name) for name in DRAWN_BY if version(name) != pinned[name]}


@pytest.mark.parametrize("page", ["report", "replacement", "remixer_backgrounds", "selectivity_table"])
def test_a_page_draws_the_committed_figures_again(page, tmp_path):
    if found := other_versions():
        pytest.skip(f"not the versions of constraints.txt: {found}")
    papermill.execute_notebook(str(ROOT / "nbs" / "results" / f"{page}.ipynb"), str(tmp_path / "out.ipynb"), {"figures": str(tmp_path)}, kernel_name="python3", cwd=str(ROOT), progress_bar=False)
    drawn = sorted(path for path in tmp_path.iterdir() if path.suffix in (".svg", ".csv"))
    assert {path.suffix for path in drawn} == {".svg", ".csv"}
    for path in drawn:
        assert path.read_bytes() == (ROOT / "figures" / path.name).read_bytes(), f"{path.name}: papermill nbs/results/{page}.ipynb out.ipynb -p figures figures"
