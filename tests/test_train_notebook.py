"""train.ipynb through papermill: every model a few steps, wrong parameters, any folder."""
import itertools
import subprocess
import sys
from pathlib import Path

import nbformat
import numpy as np
import papermill
import pytest
from nbclient import NotebookClient
from PIL import Image

from patchmix_repro import store
from patchmix_repro.config import train_config
from patchmix_repro.models import MODELS

TRAIN = Path(__file__).resolve().parents[1] / "nbs" / "train.ipynb"


def run(out, **parameters):
    notebook = papermill.execute_notebook(TRAIN, out / "out.ipynb", parameters | {"out": str(out / "run")}, progress_bar=False, cwd=str(out))
    return nbformat.read(out / "out.ipynb", as_version=4) if notebook else None


@pytest.fixture
def photos(tmp_path):
    "Three classes of noise, as a user keeps pictures."
    rng = np.random.default_rng(0)
    for split, name in itertools.product(("train", "val", "test"), "abc"):
        (tmp_path / "photos" / split / name).mkdir(parents=True)
        for i in range(4):
            Image.fromarray(rng.integers(0, 256, (60, 70, 3), np.uint8)).save(tmp_path / "photos" / split / name / f"{i}.png")
    return tmp_path / "photos"


def test_the_default_model_trains_on_the_embedded_set(tmp_path):
    notebook = run(tmp_path, max_steps=2, batch_size=8, test_images=300)
    record = store.read(tmp_path / "run" / "records").iloc[0]
    assert record["config.model"] == "convnext" and record["config.max_steps"] == 2 and record["metrics.test_images"] == record["config.test_images"] == 300
    shown = [o for c in notebook.cells if c.cell_type == "code" for o in c.outputs if "data" in o]
    assert sum("image/png" in o.data for o in shown) == 2  # the curve and the sheet
    assert any("top1" in o.data.get("text/html", "") for o in shown)
    assert (tmp_path / "run" / "model.safetensors").is_file()


def test_every_model_trains_one_after_the_other_in_one_kernel(photos, tmp_path):
    "Change parameters, run all cells again, on a small folder: names left by an earlier run are no parameters."
    code = [c for c in nbformat.read(TRAIN, as_version=4).cells if c.cell_type == "code"]
    values = [f"model, data, root, max_steps, batch_size, out = {m!r}, 'folder', {str(photos)!r}, 1, 6, {str(tmp_path / m)!r}" for m in MODELS]
    cells = [code[0], *(nbformat.v4.new_code_cell(source) for value in values for source in (value, *(c.source for c in code[1:])))]
    notebook = NotebookClient(nbformat.v4.new_notebook(cells=cells), kernel_name="python3", timeout=600).execute()
    assert {m: store.read(tmp_path / m / "records").iloc[0][["config.model", "metrics.test_images"]].tolist() for m in MODELS} == {m: [m, 12] for m in MODELS}
    assert all((tmp_path / m / "model.safetensors").is_file() for m in MODELS)
    assert sum("image/png" in o.get("data", {}) for c in notebook.cells for o in c.outputs) == 2 * len(MODELS)


def test_a_notebook_is_short_and_all_its_parameters_are_fields():
    cells = nbformat.read(TRAIN, as_version=4).cells
    tagged = [c for c in cells if "parameters" in c.metadata.get("tags", [])]
    assert len(cells) <= 12 and len(tagged) == 1 and tagged[0] is next(c for c in cells if c.cell_type == "code")
    names = [line.split(":")[0] for line in tagged[0].source.splitlines() if line]
    assert {"model", "scale", "data", "root", "mixing", "grid", "ratio", "epochs", "batch_size", "lr", "seed", "out", "resume"} <= set(names)
    space = {}
    exec(tagged[0].source, space)  # our own file
    defaults = {n: space[n] for n in names}
    assert train_config(**defaults) == train_config()


def test_a_half_written_notebook_is_written_again(photos, tmp_path):
    "What a killed papermill leaves does not stand in the way of the same command."
    (tmp_path / "out.ipynb").write_text('{"cells": [')
    run(tmp_path, model="convmixer", data="folder", root=str(photos), max_steps=1, batch_size=6)
    first = (tmp_path / "run" / "model.safetensors").read_bytes()
    (tmp_path / "out.ipynb").write_text('{"cells": [')
    run(tmp_path, model="convmixer", data="folder", root=str(photos), max_steps=1, batch_size=6)
    assert nbformat.read(tmp_path / "out.ipynb", as_version=4).cells
    assert (tmp_path / "run" / "model.safetensors").read_bytes() == first and len(list((tmp_path / "run" / "records").iterdir())) == 1


def test_a_misspelt_parameter_stops_papermill(tmp_path):
    command = [sys.executable, "-m", "papermill", str(TRAIN), str(tmp_path / "out.ipynb"), "-p", "modle", "convnext"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode != 0 and "did you mean 'model'?" in done.stderr
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out.ipynb"]
