"""explain.ipynb through papermill: sheets, tables and records; wrong parameters; again in the same kernel."""
from pathlib import Path

import nbformat
import papermill
from nbclient import NotebookClient

from patchmix_repro import store
from patchmix_repro.explaining import overlay
from patchmix_repro.explanations import ExplainConfig, unpack_pictures

EXPLAIN = Path(__file__).resolve().parents[1] / "nbs" / "explain.ipynb"
QUICK = {"images": 2, "num_masks": 16}


def run(folder, **parameters):
    papermill.execute_notebook(EXPLAIN, folder / "out.ipynb", QUICK | parameters | {"out": str(folder / "run")}, progress_bar=False, cwd=str(folder))
    return nbformat.read(folder / "out.ipynb", as_version=4)


def shown(notebook):
    return [o.data for c in notebook.cells if c.cell_type == "code" for o in c.outputs if "data" in o]


def test_a_run_shows_sheets_and_tables_and_files_records(tmp_path):
    notebook = run(tmp_path, seed=3)
    data = shown(notebook)
    assert sum("image/png" in d for d in data) == 2, "a sheet of patch-mixed and one of SMD-style images"
    table = next(d["text/html"] for d in data if "text/html" in d)
    assert all(word in table for word in ("mass", "mean", "deletion", "insertion", "chance", "gauss", "convnext_mini_patchmix"))
    records = store.read(tmp_path / "run" / "records", "selectivity")
    assert sorted(zip(records["config.set"], records["config.name"])) == [(s, f"convnext_mini_{n}") for s in ("patch", "smd") for n in ("original", "patchmix")]
    assert set(records["config.contrast"]) == {"donor", "runner_up"} and set(records["seed"]) == {3} and records["config.masks"].eq(16).all()
    images = store.read_table(tmp_path / "run" / "records", "images", "selectivity")
    assert len(images) == 8 and {"mass", "mean", "mass_chance", "mean_gauss", "donor_label", "share"} <= set(images)
    kept = unpack_pictures(store.attachment(tmp_path / "run" / "records", records.run_id[0], "explained.npz"))
    assert overlay(kept.part.images, kept.map).shape == (2, 3, 56, 56)


def test_a_network_of_ones_own_and_a_clean_set(tmp_path):
    folder = EXPLAIN.parents[1] / "results" / "checkpoints" / "convnext_mini_patchmix"
    notebook = run(tmp_path, model=str(folder), set="clean", contrast="rest")
    assert sum("image/png" in d for d in shown(notebook)) == 1 and not (tmp_path / "run").exists(), "nothing out of context, no record"


def test_it_is_short_and_all_its_parameters_are_fields():
    cells = nbformat.read(EXPLAIN, as_version=4).cells
    tagged = [c for c in cells if "parameters" in c.metadata.get("tags", [])]
    assert len([c for c in cells if c.cell_type != "raw"]) <= 12 and len(tagged) == 1
    space = {}
    exec(tagged[0].source, space)  # our own file
    names = [line.split(":")[0] for line in tagged[0].source.splitlines() if line]
    assert ExplainConfig(**{name: space[name] for name in names}) == ExplainConfig()
    assert set(names) == set(ExplainConfig.__dataclass_fields__)


def test_it_can_be_run_again_in_the_same_kernel(tmp_path):
    notebook = nbformat.read(EXPLAIN, as_version=4)
    code = [c for c in notebook.cells if c.cell_type == "code"]
    values = nbformat.v4.new_code_cell(f"images, num_masks, set, out = 2, 8, 'smd', {str(tmp_path / 'run')!r}")
    again = [nbformat.v4.new_code_cell(c.source) for c in code[1:]]
    notebook.cells = [code[0], values, *code[1:], nbformat.v4.new_code_cell(values.source), *again]
    NotebookClient(notebook, kernel_name="python3", timeout=600).execute()
    assert len(store.read(tmp_path / "run" / "records")) == 2, "the same run files no second record"
