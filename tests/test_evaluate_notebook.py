"""evaluate.ipynb through papermill: the shipped networks, timm's, wrong parameters, the same kernel twice."""
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import nbformat
import numpy as np
import papermill
import pytest
import timm
from nbclient import NotebookClient
from PIL import Image
from timm.data import ImageNetInfo

from patchmix_repro import store
from patchmix_repro.battery import SHIPPED, EvaluateConfig, against_first, open_networks, overview, run_battery
from patchmix_repro.core import CheckpointError, InputError
from patchmix_repro.evaluation import summary
from patchmix_repro.models import PRETRAINED
from patchmix_repro.smd import battery

EVALUATE = Path(__file__).resolve().parents[1] / "nbs" / "evaluate.ipynb"


def test_the_shipped_networks_side_by_side(tmp_path):
    papermill.execute_notebook(EVALUATE, tmp_path / "out.ipynb", {"limit": 40, "battery": "quick", "out": str(tmp_path / "run")}, progress_bar=False, cwd=str(tmp_path))
    records = store.read(tmp_path / "run" / "records", "battery")
    assert sorted(records["config.name"]) == sorted(SHIPPED) and records["metrics.images"].eq(40).all() and store.verify(tmp_path / "run" / "records").empty
    shown = [o.data for c in nbformat.read(tmp_path / "out.ipynb", as_version=4).cells if c.cell_type == "code" for o in c.outputs if "data" in o]
    assert sum("image/png" in data for data in shown) == 1 and sum("p_holm" in data.get("text/html", "") for data in shown) == 1


def test_a_notebook_is_short_and_all_its_parameters_are_fields():
    cells = nbformat.read(EVALUATE, as_version=4).cells
    tagged = [c for c in cells if "parameters" in c.metadata.get("tags", [])]
    assert len(cells) <= 12 and len(tagged) == 1 and tagged[0] is next(c for c in cells if c.cell_type == "code")
    space = {}
    exec(tagged[0].source, space)  # our own file
    names = [line.split(":")[0] for line in tagged[0].source.splitlines() if line]
    assert {n: space[n] for n in names} == asdict(EvaluateConfig())


def test_the_notebook_can_be_run_again_in_the_same_kernel(tmp_path):
    notebook = nbformat.read(EVALUATE, as_version=4)
    code = [c for c in notebook.cells if c.cell_type == "code"]
    values = nbformat.v4.new_code_cell(f"model, limit, battery, out = 'convnext_mini_patchmix', 20, 'quick', {str(tmp_path / 'run')!r}")
    notebook.cells = [code[0], values, *code[1:], *[nbformat.v4.new_code_cell(c.source) for c in code[1:]]]
    NotebookClient(notebook, kernel_name="python3", timeout=600).execute()
    assert len(list((tmp_path / "run" / "records").iterdir())) == 1


def test_a_misspelt_parameter_stops_papermill(tmp_path):
    command = [sys.executable, "-m", "papermill", str(EVALUATE), str(tmp_path / "out.ipynb"), "-p", "pretraind", "convnext"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode != 0 and "did you mean 'pretrained'?" in done.stderr
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out.ipynb"]


@pytest.fixture(scope="module")
def imagenet(tmp_path_factory):
    "ImageNet's layout with one picture in each of its 1000 folders."
    root = tmp_path_factory.mktemp("imagenet")
    for k, wnid in enumerate(ImageNetInfo().label_names()):
        for part in ("train", "val"):
            (root / part / wnid).mkdir(parents=True)
        Image.fromarray(np.random.default_rng(k).integers(0, 256, (24, 24, 3), dtype=np.uint8)).save(root / "val" / wnid / "a.JPEG")
        Image.new("RGB", (2, 2)).save(root / "train" / wnid / "a.JPEG")
    return root


def test_the_four_originals_in_one_call(tmp_path, imagenet, monkeypatch):
    "What `-p pretrained convnext,... -p data imagenet` runs; random weights stand in for timm's."
    asked, create = [], timm.create_model

    def random(name, pretrained):
        asked.append((name, pretrained))
        kind = "swin_tiny_patch4_window7_224" if "swin" in name else "convnext_atto"
        model = create(kind, img_size=56, embed_dim=12, depths=(1, 1, 1, 1), num_heads=(1, 1, 1, 1)) if "swin" in name else create(kind, depths=(1, 1, 1, 1), dims=(8, 8, 8, 8))
        model.pretrained_cfg = {"mean": (0.5, 0.5, 0.5), "std": (0.2, 0.2, 0.2), "input_size": (3, 56, 56)}
        return model

    monkeypatch.setattr(timm, "create_model", random)
    config = EvaluateConfig(pretrained="convnext, convnext_s,swin,swin_s", data="imagenet", root=str(imagenet), battery="quick", limit=24, workers=0, out=str(tmp_path))
    measured = run_battery(config)
    originals = [PRETRAINED[name] for name in ("convnext", "convnext_s", "swin", "swin_s")]
    assert asked == [(name, True) for name in originals] and list(measured.tables) == originals and measured.chance == 1 / 1000
    records = store.read(tmp_path / "records", "battery").set_index("config.pretrained")
    assert records["config.model"][originals].tolist() == ["convnext", "convnext_s", "swin", "swin_s"] and records["config.scale"].eq("paper").all()
    for name, rows in measured.rows.items():
        assert rows.groupby("condition").size().eq(24).all()
        assert measured.tables[name].equals(summary(rows, battery("quick"), 1 / 1000))
    assert len(against_first(measured.rows)) == 3 * len(battery("quick")) and list(overview(measured.tables)) == originals


def test_networks_that_are_not_there():
    with pytest.raises(InputError, match="did you mean 'convnext_mini_original'"):
        open_networks("convnext_mini_orignal")
    with pytest.raises(CheckpointError, match="gives no weights for 'no_such_net.in1k'"):
        open_networks(pretrained="no_such_net.in1k")
    with pytest.raises(InputError, match="each once"):
        open_networks("")
    assert list(open_networks("convnext_mini_original")) == ["convnext_mini_original"]


def test_one_network_has_nothing_to_be_compared_with(tmp_path):
    measured = run_battery(EvaluateConfig(model="convnext_mini_original", battery="quick", limit=10, out=str(tmp_path)))
    assert against_first(measured.rows).empty and list(overview(measured.tables)) == ["convnext_mini_original"]
