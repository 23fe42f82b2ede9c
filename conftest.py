"""What every test shares: nbval made to agree with nbdev, a folder for what the pages draw, repeatable hypothesis runs, and where the photographs lie."""
import os
import re
import shutil
import socket
import tempfile
from pathlib import Path

import pytest
from hypothesis import settings
from jupyter_client.connect import LocalPortCache
from warm_kernels import warm

ROOT = Path(__file__).resolve().parent

if "PYTEST_XDIST_WORKER" in os.environ:  # a process a core, and one thread in each
    os.environ.setdefault("OMP_NUM_THREADS", "1")

# the same examples on every run, no time limit on a busy machine, and no folder left behind
settings.register_profile("repeatable", derandomize=True, deadline=None, database=None)
settings.load_profile("repeatable")

# begun first, so that no process waits at the end for one long file; the others follow in their order
LONG_FILES = ("test_workflow.py", "test_slurm.py", "test_training.py", "test_site.py", "test_browser.py", "test_explore.py")
LAST_FILE = "test_figures.py"  # compares what the pages drew

SKIPPED_CELL = re.compile(r"^#\|\s*(eval:\s*false|notest|slow|gpu)\b", re.MULTILINE)


def own_ports(number):
    "Kernels that begin at once in two processes may be given one port, and one of them dies: each process takes its own range, below the system's."
    def find_available_port(self, ip):
        for port in range(20000 + 1000 * (number % 12), 21000 + 1000 * (number % 12)):
            if port not in self.currently_used_ports:
                with socket.socket() as free:
                    if not free.connect_ex((ip, port)):
                        continue  # somebody listens there
                self.currently_used_ports.add(port)
                return port
        raise OSError(f"no port is free in the range of process {number}")

    LocalPortCache.find_available_port = find_available_port


def pytest_configure(config):
    "One folder for the figures of all processes, and kernels that begin quickly, with ports of their own."
    own_ports(int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw")))
    warm()
    if not hasattr(config, "workerinput"):
        os.environ["PATCHMIX_DRAWN"] = tempfile.mkdtemp(prefix="drawn-")


def pytest_unconfigure(config):
    if not hasattr(config, "workerinput"):
        shutil.rmtree(os.environ["PATCHMIX_DRAWN"], ignore_errors=True)


def pytest_runtest_teardown(item, nextitem):
    "A page that nbval has run to its end leaves a mark beside its figures."
    if hasattr(item, "cell") and (nextitem is None or nextitem.path != item.path):
        Path(os.environ["PATCHMIX_DRAWN"], f"{item.path.stem}.done").touch()


def pytest_collection_modifyitems(items):
    "Begin with the long files, let nbval compare notebooks that nbdev_clean has stripped of execution counts and have them draw, and honour nbdev's flags."
    place = {name: number for number, name in enumerate(LONG_FILES)} | {LAST_FILE: len(LONG_FILES) + 1}
    items.sort(key=lambda item: place.get(item.path.name, len(LONG_FILES)))
    for item in items:
        cell = getattr(item, "cell", None)
        if cell is None:
            continue
        if cell.get("outputs") and cell.get("execution_count") is None:
            cell.execution_count = 1
        if "parameters" in cell.metadata.get("tags", []) and re.search(r"^figures\b", cell.source, re.MULTILINE):
            cell.source += f"\nfigures = {os.environ['PATCHMIX_DRAWN']!r}"
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
