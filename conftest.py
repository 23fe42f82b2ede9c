"""What every test shares: nbval made to agree with nbdev, repeatable hypothesis runs, and where the photographs lie."""
import os
import re
import shutil
from pathlib import Path

import pytest
from hypothesis import settings

ROOT = Path(__file__).resolve().parent

if "PYTEST_XDIST_WORKER" in os.environ:  # a process a core, and one thread in each
    os.environ.setdefault("OMP_NUM_THREADS", "1")

# the same examples on every run, no time limit on a busy machine, and no folder left behind
settings.register_profile("repeatable", derandomize=True, deadline=None, database=None)
settings.load_profile("repeatable")

# begun first, so that no process waits at the end for one long file; the others follow in their order
LONG_FILES = ("test_workflow.py", "test_slurm.py", "test_training.py", "test_site.py", "test_browser.py", "test_explore.py", "test_figures.py")

SKIPPED_CELL = re.compile(r"^#\|\s*(eval:\s*false|notest|slow|gpu)\b", re.MULTILINE)


def pytest_collection_modifyitems(items):
    "Begin with the long files, let nbval compare notebooks that nbdev_clean has stripped of execution counts, and honour nbdev's flags."
    place = {name: number for number, name in enumerate(LONG_FILES)}
    items.sort(key=lambda item: place.get(item.path.name, len(place)))
    for item in items:
        cell = getattr(item, "cell", None)
        if cell is None:
            continue
        if cell.get("outputs") and cell.get("execution_count") is None:
            cell.execution_count = 1
        if SKIPPED_CELL.search(cell.source):
            item.add_marker(pytest.mark.skip(reason="the cell's nbdev flag leaves it out"))


@pytest.fixture(scope="session")
def shared_data():
    "The folder that `PATCHMIX_DATA` names; without one the test is skipped."
    folder = os.environ.get("PATCHMIX_DATA", "")
    if not folder or not Path(folder).is_dir():
        pytest.skip("PATCHMIX_DATA names no folder; point it at the photographs to run this test")
    return Path(folder)


@pytest.fixture
def graph(tmp_path):
    "A copy of what the graph reads, to run it in: Snakemake's locks belong to a folder, and a run that ends deletes those of another."
    folder = tmp_path / "graph"
    for name in ("nbs", "workflow", "results"):
        shutil.copytree(ROOT / name, folder / name)
    shutil.copy(ROOT / "settings.ini", folder)
    return folder
