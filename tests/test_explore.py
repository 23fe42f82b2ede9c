"""The explore notebooks: views from plain values, and controls that move figure, table and prediction."""
import io
import os
import re
import secrets
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import matplotlib.pyplot as plt
import nbformat
import numpy as np
import pytest
import torch
from PIL import Image
from test_browser import CHROMIUM, DONE, IDLE, RUN_ALL, SECONDS, free_port, needed, wait_for

from patchmix_repro.battery import open_networks
from patchmix_repro.core import InputError
from patchmix_repro.data import to_float
from patchmix_repro.explanations import ExplainConfig, explain_sets, open_split
from patchmix_repro.explore import heat_sheet, hide, mixing_view, occluder_view, png, probabilities, sheets
from patchmix_repro.occluders import load_occluders
from patchmix_repro.occlusion import Replace
from patchmix_repro.placing import Piece, occlude

EXPLORE = Path(__file__).resolve().parents[1] / "nbs" / "explore"
HOUSE, BOAT = 33, 28


@pytest.fixture(scope="module")
def networks():
    return open_networks()


@pytest.fixture(scope="module")
def data(networks):
    return open_split(ExplainConfig(), networks)


@pytest.fixture(autouse=True)
def no_figures_left():
    yield
    plt.close("all")


# ---- views ----

def test_label_weights_by_hand(networks, data):
    "floor(0.35 49) = 17 of 49 patches; a share of 0 leaves image, label and prediction."
    _, table = mixing_view(networks, data, HOUSE, BOAT, 0.35, 7)
    assert table["label weight"].sum() == pytest.approx(1)
    assert table.loc["boat", "label weight"] == pytest.approx(17 / 49) and table.loc["house", "label weight"] == pytest.approx(32 / 49)
    _, clean = mixing_view(networks, data, HOUSE, BOAT, 0.0, 7)
    assert clean.drop(columns="label weight").equals(probabilities(networks, to_float(data.images[HOUSE])))
    assert clean.loc["house", "label weight"] == 1
    _, same = mixing_view(networks, data, HOUSE, HOUSE, 0.5, 7)
    assert same.loc["house", "label weight"] == pytest.approx(1)


def test_predictions_are_those_of_the_mixed_image(networks, data):
    ids, model = torch.tensor([HOUSE]), networks["convnext_mini_patchmix"].model
    mixed = Replace(0.5, 14, seed=2)(to_float(data.images[ids]), ids, {"donor": to_float(data.images[[BOAT]])})
    x = (mixed - torch.tensor(model.pretrained_cfg["mean"]).view(3, 1, 1)) / torch.tensor(model.pretrained_cfg["std"]).view(3, 1, 1)
    with torch.no_grad():
        wanted = model(x).softmax(1)[0]
    _, table = mixing_view(networks, data, HOUSE, BOAT, 0.5, 14, seed=2)
    assert np.allclose(table["convnext_mini_patchmix"], wanted, atol=1e-5)


def test_a_grid_that_does_not_divide_the_image(networks, data):
    with pytest.raises(InputError, match="does not divide"):
        mixing_view(networks, data, HOUSE, BOAT, 0.3, 5)


def test_hide_by_hand(data):
    patches = tuple(i in (0, 8) for i in range(49))
    part = hide(data, HOUSE, BOAT, patches)
    wanted = to_float(data.images[HOUSE]).clone()
    for side in (slice(0, 8), slice(8, 16)):
        wanted[:, side, side] = to_float(data.images[BOAT])[:, side, side]
    assert torch.equal(part.images[0], wanted) and part.own.sum() == 56 * 56 - 128
    assert part.labels.item() == data.labels[HOUSE] and part.donors.item() == data.labels[BOAT]
    cut = load_occluders("embedded")
    found = occlude(data.images[HOUSE].permute(1, 2, 0).numpy(), (Piece("heart/0.png", "", 314, 0.0, 14, 28),), cut)
    part = hide(data, HOUSE, BOAT, occluder="heart/0.png", area=0.1, x=0.25, y=0.5)
    assert np.array_equal((part.images[0] * 255).round().byte().permute(1, 2, 0), found.image)
    assert np.array_equal(part.own[0, 0], ~found.mask) and part.donors is None


def test_the_title_says_selectivity_only_where_there_is_something_else(networks, data):
    figure, table = occluder_view(networks, data, HOUSE, BOAT, num_masks=16)
    assert "mass" not in figure.get_label() and np.allclose(table.sum(), 1)
    figure, _ = occluder_view(networks, data, HOUSE, BOAT, num_masks=16, patches=tuple(i < 9 for i in range(49)))
    assert len(re.findall(r"mass [+-]0\.\d{3}", figure.get_label())) == 2


def test_sheets_name_what_they_show(networks, data):
    found = explain_sets(ExplainConfig(images=3, num_masks=16), networks, data)
    figures, table = sheets(found, data.classes, count=2)
    assert list(figures) == ["patch", "smd"] and len(table) == 2 * 2 * 2
    figure, rows = heat_sheet({name: found["patch", name] for name in networks}, data.classes)
    one = found["patch", "convnext_mini_original"]
    assert rows["predicted"][:3].tolist() == [data.classes[k] for k in one.predicted] and rows["label"][:3].tolist() == [data.classes[k] for k in one.part.labels]
    assert len(figure.axes) == 9 and figure.get_label().startswith("c-RISE maps of 3 images. Right predictions: convnext_mini_original ")


def test_png_is_a_picture_and_closes_the_figure(networks, data):
    figure, _ = mixing_view(networks, data, HOUSE, BOAT)
    assert Image.open(io.BytesIO(png(figure))).width > 300 and not plt.fignum_exists(figure.number)


# ---- the notebooks, their widgets moved from Python ----

def opened(name):
    "The names a notebook leaves after its code cells, run in this process."
    if not find_spec("ipywidgets"):
        pytest.skip("ipywidgets is absent; pip install -e '.[notebook]'")
    space = {}
    for cell in nbformat.read(EXPLORE / f"{name}.ipynb", as_version=4).cells:
        if cell.cell_type == "code":
            exec(cell.source, space)  # our own file
    return space


def moved(space, control, value):
    "Whether setting a control changes picture and table."
    before = space["picture"].value, space["shown"].value
    control.value = value
    return space["picture"].value != before[0], space["shown"].value != before[1]


def test_moving_the_controls_of_mixing():
    space = opened("mix_patches")
    controls = space["controls"]
    assert set(controls) == {"image", "donor", "share", "grid", "seed"}
    assert Image.open(io.BytesIO(space["picture"].value)).format == "PNG" and "label weight" in space["shown"].value
    for name, value in (("share", 0.6), ("grid", 14), ("donor", 2), ("seed", 5), ("image", 13)):
        assert moved(space, controls[name], value) == (True, True), name
    assert moved(space, controls["seed"], 5) == (False, False)
    _, table = mixing_view(space["networks"], space["data"], 13, 2, 0.6, 14, 5)
    assert f"{table.iloc[0, 1]:.3f}" in space["shown"].value


def test_moving_patches_and_occluder():
    space = opened("occluder")
    controls, switches = space["controls"], space["switches"]
    assert len(switches) == 49 and {"image", "donor", "occluder", "area", "x", "y"} <= set(controls)
    assert moved(space, switches[24], True) == (True, True)
    assert moved(space, controls["x"], 0.8) == (True, True)
    assert moved(space, controls["area"], 0.4) == (True, True)
    assert moved(space, controls["occluder"], None) == (True, True)
    assert moved(space, controls["y"], 0.1) == (False, False), "there is no cut-out to move"
    assert moved(space, switches[24], False) == (True, True)


@pytest.mark.parametrize("name", ["mix_patches", "occluder"])
def test_each_stores_a_figure_and_no_widget(name):
    "Stored widgets show nothing and have new ids in every run: the cell that makes them is not run when the page is built."
    notebook = nbformat.read(EXPLORE / f"{name}.ipynb", as_version=4)
    code = [c for c in notebook.cells if c.cell_type == "code"]
    assert sum("image/png" in o.get("data", {}) for c in code for o in c.outputs) == 1, "one static figure"
    assert [c.metadata.get("tags") for c in code if "widgets." in c.source] == [["skip-execution"]]
    assert not code[-1].outputs and "widgets" not in notebook.metadata


# ---- in JupyterLab, in a real browser ----

PICTURE = "() => document.querySelector('.widget-image')?.src"
READOUT = "() => document.querySelector('.widget-readout')?.textContent"


@pytest.fixture
def lab(tmp_path):
    "A JupyterLab of its own on copies of the two notebooks: notebook -> its address."
    needed("playwright", find_spec("playwright"))
    needed("chromium", CHROMIUM)
    (tmp_path / "work").mkdir()
    for name in ("mix_patches", "occluder"):
        shutil.copy(EXPLORE / f"{name}.ipynb", tmp_path / "work")
    port, token = free_port(), secrets.token_hex(16)
    own = {f"JUPYTER_{kind}_DIR": str(tmp_path / kind.lower()) for kind in ("CONFIG", "DATA", "RUNTIME")}
    own |= {"JUPYTERLAB_SETTINGS_DIR": str(tmp_path / "settings"), "JUPYTERLAB_WORKSPACES_DIR": str(tmp_path / "workspaces")}
    own |= {"PYTHONPATH": os.pathsep.join(filter(None, [str(EXPLORE.parents[1]), os.environ.get("PYTHONPATH")]))}
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", "--expose-app-in-browser", "--ServerApp.ip=127.0.0.1"]
    command += [f"--ServerApp.port={port}", f"--IdentityProvider.token={token}", f"--ServerApp.root_dir={tmp_path / 'work'}"]
    with open(tmp_path / "server.log", "wb") as log:
        server = subprocess.Popen(command, env={k: v for k, v in os.environ.items() if k != "MPLBACKEND"} | own, stdout=log, stderr=log)
        try:
            wait_for(f"http://127.0.0.1:{port}/api?token={token}", server)
            yield lambda name: f"http://127.0.0.1:{port}/lab/tree/{name}.ipynb?token={token}&reset"
        finally:
            server.terminate()
            server.wait(30)


@pytest.mark.parametrize("name, first, then", [("mix_patches", "0.35", "0.40"), ("occluder", "0.12", "0.14")])
def test_a_slider_moves_the_picture_in_the_browser(lab, name, first, then):
    from playwright.sync_api import sync_playwright

    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-dev-shm-usage"])
        page = browser.new_page(viewport={"width": 1280, "height": 1000})
        page.set_default_timeout(SECONDS * 1000)
        page.goto(lab(name))
        page.wait_for_function(IDLE)
        page.evaluate(RUN_ALL)
        page.wait_for_function(DONE)
        page.wait_for_selector(".widget-image")
        before = page.evaluate(PICTURE), page.evaluate(READOUT)
        assert before[1] == first
        handle = page.locator(".widget-slider .noUi-handle").first
        handle.focus()
        handle.press("ArrowRight")
        page.wait_for_function(f"before => ({PICTURE})() !== before", arg=before[0])
        assert page.evaluate(READOUT) == then
        browser.close()
