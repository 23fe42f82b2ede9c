"""The training notebook as a reader meets it: opened in JupyterLab, in a real browser, and run from top to bottom."""
import os
import secrets
import shutil
import socket
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from urllib.error import URLError
from urllib.request import urlopen

import nbformat
import pytest

TRAIN = Path(__file__).resolve().parents[1] / "nbs" / "train.ipynb"
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
SMALL = {"epochs": 1, "max_steps": 2, "test_images": 100}  # enough to pass through every cell
SECONDS = 240  # patience with a busy machine; a run takes a fraction of it
RUN_ALL = "window.jupyterapp.commands.execute('notebook:run-all-cells')"
SAVE = "window.jupyterapp.commands.execute('docmanager:save')"
IDLE = """() => {
    const panel = window.jupyterapp?.shell.currentWidget;
    return panel?.sessionContext?.session?.kernel?.status === 'idle' && panel.content.widgets.length > 1;
}"""
DONE = """() => {
    const panel = window.jupyterapp.shell.currentWidget;
    const code = panel.content.widgets.filter(c => c.model.type === 'code' && c.model.sharedModel.getSource().trim());
    const failed = code.some(c => c.model.outputs.toJSON().some(o => o.output_type === 'error'));
    const ran = code.every(c => c.model.executionCount > 0);
    return failed || (ran && panel.sessionContext.session.kernel.status === 'idle');
}"""


def needed(name, found):
    if not found:
        pytest.skip(f"{name} is absent; pip install -e '.[dev,browser]' and install Debian's chromium to run the browser test")


def small_copy(folder):
    "The notebook with few steps and its own output folder, parameters injected as papermill does."
    from papermill.iorw import load_notebook_node
    from papermill.parameterize import parameterize_notebook

    notebook = parameterize_notebook(load_notebook_node(str(TRAIN)), {**SMALL, "out": str(folder / "run")})
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    path = folder / "work" / "train.ipynb"
    path.parent.mkdir()
    nbformat.write(notebook, path)
    return path


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture
def lab(tmp_path):
    "A JupyterLab of its own on a copy of the notebook: (address, path of the copy)."
    needed("playwright", find_spec("playwright"))
    needed("chromium", CHROMIUM)
    notebook, port, token = small_copy(tmp_path), free_port(), secrets.token_hex(16)
    own = {f"JUPYTER_{kind}_DIR": str(tmp_path / kind.lower()) for kind in ("CONFIG", "DATA", "RUNTIME")}
    own |= {"JUPYTERLAB_SETTINGS_DIR": str(tmp_path / "settings"), "JUPYTERLAB_WORKSPACES_DIR": str(tmp_path / "workspaces")}
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", "--expose-app-in-browser", "--ServerApp.ip=127.0.0.1"]
    command += [f"--ServerApp.port={port}", f"--IdentityProvider.token={token}", f"--ServerApp.root_dir={notebook.parent}"]
    with open(tmp_path / "server.log", "wb") as log:
        server = subprocess.Popen(command, env={k: v for k, v in os.environ.items() if k != "MPLBACKEND"} | own, stdout=log, stderr=log)
        try:
            wait_for(f"http://127.0.0.1:{port}/api?token={token}", server)
            yield f"http://127.0.0.1:{port}/lab/tree/train.ipynb?token={token}&reset", notebook
        finally:
            server.terminate()
            server.wait(30)


def wait_for(address, server):
    "Return when the server answers; fail when it stops or takes too long."
    deadline = time.monotonic() + SECONDS
    while time.monotonic() < deadline:
        assert server.poll() is None, "JupyterLab stopped"
        try:
            return urlopen(address, timeout=5).close()
        except (URLError, OSError):
            time.sleep(0.3)
    pytest.fail("JupyterLab did not answer")


def run_all(address):
    "Open the page, run every cell as the menu does, save."
    from playwright.sync_api import sync_playwright

    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-dev-shm-usage"])
        page = browser.new_page(viewport={"width": 1280, "height": 1000})
        page.set_default_timeout(SECONDS * 1000)
        page.goto(address)
        page.wait_for_function(IDLE)
        page.evaluate(RUN_ALL)
        page.wait_for_function(DONE)
        page.evaluate(SAVE)
        browser.close()


def test_the_training_notebook_runs_in_jupyterlab(lab):
    address, path = lab
    run_all(address)
    code = [c for c in nbformat.read(path, as_version=4).cells if c.cell_type == "code" and c.source.strip()]
    errors = [o.evalue for c in code for o in c.outputs if o.output_type == "error"]
    assert not errors and all(c.execution_count for c in code)
    pictures = [o for c in code for o in c.outputs if {"image/png", "image/svg+xml"} & set(o.get("data", {}))]
    assert pictures, "the run ends with pictures"
    assert any((path.parents[1] / "run").iterdir()), "the run left its files in `out`"
