"""train.ipynb through papermill: every model a few steps, wrong parameters, any folder."""
import subprocess
import sys
from pathlib import Path

import nbformat
import papermill
import pytest
from nbclient import NotebookClient

from patchmix_repro import store
from patchmix_repro.config import train_config
from patchmix_repro.models import MODELS

TRAIN = Path(__file__).resolve().parents[1] / "nbs" / "train.ipynb"


def run(out, **parameters):
    notebook = papermill.execute_notebook(TRAIN, out / "out.ipynb", parameters | {"out": str(out / "run")}, progress_bar=False, cwd=str(out))
    return nbformat.read(out / "out.ipynb", as_version=4) if notebook else None


@pytest.mark.parametrize("model", MODELS)
def test_every_model_trains(model, tmp_path):
    notebook = run(tmp_path, model=model, max_steps=2, batch_size=8)
    record = store.read(tmp_path / "run" / "records").iloc[0]
    assert record["config.model"] == model and record["config.max_steps"] == 2
    shown = [o for c in notebook.cells if c.cell_type == "code" for o in c.outputs if "data" in o]
    assert sum("image/png" in o.data for o in shown) == 2  # the curve and the sheet
    assert any("top1" in o.data.get("text/html", "") for o in shown)
    assert (tmp_path / "run" / "model.safetensors").is_file()


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


def test_the_notebook_can_be_run_again_in_the_same_kernel(tmp_path):
    "Change a parameter, run all cells again: names left by the first run are no parameters."
    notebook = nbformat.read(TRAIN, as_version=4)
    code = [c for c in notebook.cells if c.cell_type == "code"]
    again = [nbformat.v4.new_code_cell(c.source) for c in code[1:]]
    values = nbformat.v4.new_code_cell(f"model, max_steps, batch_size, out = 'convmixer', 1, 8, {str(tmp_path / 'run')!r}")
    notebook.cells = [code[0], values, *code[1:], values.copy(), *again]
    NotebookClient(notebook, kernel_name="python3", timeout=600).execute()


def test_a_half_written_notebook_is_written_again(tmp_path):
    "What a killed papermill leaves does not stand in the way of the same command."
    (tmp_path / "out.ipynb").write_text('{"cells": [')
    run(tmp_path, model="convmixer", max_steps=1, batch_size=8)
    first = (tmp_path / "run" / "model.safetensors").read_bytes()
    (tmp_path / "out.ipynb").write_text('{"cells": [')
    run(tmp_path, model="convmixer", max_steps=1, batch_size=8)
    assert nbformat.read(tmp_path / "out.ipynb", as_version=4).cells
    assert (tmp_path / "run" / "model.safetensors").read_bytes() == first and len(list((tmp_path / "run" / "records").iterdir())) == 1


def test_a_misspelt_parameter_stops_papermill(tmp_path):
    command = [sys.executable, "-m", "papermill", str(TRAIN), str(tmp_path / "out.ipynb"), "-p", "modle", "convnext"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode != 0 and "did you mean 'model'?" in done.stderr
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out.ipynb"]
