"""label.ipynb through papermill: its own pictures, somebody's folder, and what stops it."""
import dataclasses
from pathlib import Path

import nbformat
import numpy as np
import papermill
import pytest
import torch
from PIL import Image

from patchmix_repro.core import InputError
from patchmix_repro.data import create_dataset
from patchmix_repro.label_files import read_labels
from patchmix_repro.label_sources import label_maps
from patchmix_repro.labelling import LabelConfig, label_folder, label_split, open_images
from patchmix_repro.parameters import checked

LABEL = Path(__file__).resolve().parents[1] / "nbs" / "label.ipynb"


def run(out, **parameters):
    papermill.execute_notebook(LABEL, out / "out.ipynb", parameters | {"out": str(out / "run")}, progress_bar=False, cwd=str(out))
    return nbformat.read(out / "out.ipynb", as_version=4)


def test_the_notebook_is_short_and_all_its_parameters_are_fields():
    cells = nbformat.read(LABEL, as_version=4).cells
    tagged = [c for c in cells if "parameters" in c.metadata.get("tags", [])]
    assert len(cells) <= 13 and len(tagged) == 1 and tagged[0] is next(c for c in cells if c.cell_type == "code")
    space = {}
    exec(tagged[0].source, space)  # our own file
    names = {f.name for f in dataclasses.fields(LabelConfig)}
    assert names == {line.split(":")[0] for line in tagged[0].source.splitlines()}
    assert checked(LabelConfig, {n: space[n] for n in names}) == LabelConfig()


def test_the_defaults_label_the_embedded_set(tmp_path):
    notebook = run(tmp_path)
    outputs = [o for c in notebook.cells if c.cell_type == "code" for o in c.outputs]
    assert sum("image/png" in o.get("data", {}) for o in outputs) == 1 and any("probe accuracy" in str(o) for o in outputs)
    data = create_dataset("shapes9", "val", 56)
    found = read_labels(tmp_path / "run" / "labels.safetensors", data)
    assert len(found) == len(data) and found.classes == data.classes
    before = (tmp_path / "run" / "labels.safetensors").stat().st_mtime_ns
    again = label_split(LabelConfig(), open_images(LabelConfig()), tmp_path / "run")
    assert torch.equal(again.maps, found.maps)
    assert (tmp_path / "run" / "labels.safetensors").stat().st_mtime_ns == before, "a finished run is read, not made again"


@pytest.fixture
def photos(tmp_path):
    "Two classes of pictures of several sizes, as a user keeps them."
    rng = np.random.default_rng(0)
    for part, n in (("train", 12), ("val", 2)):
        for name in ("cat", "dog"):
            (tmp_path / "photos" / part / name).mkdir(parents=True)
            for i in range(n):
                Image.fromarray(rng.integers(0, 256, (40 + 5 * i, 60, 3), np.uint8)).save(tmp_path / "photos" / part / name / f"{i}.jpg")
    return tmp_path / "photos"


def test_somebodys_own_pictures(photos, tmp_path):
    notebook = run(tmp_path, data="folder", root=str(photos), split="train", size=48, labels="dense:convnext_mini_original", grid=7)
    assert "dense:convnext_mini_original" in str(notebook.cells)
    data = create_dataset("folder", "train", 48, photos)
    path = tmp_path / "run" / "labels.safetensors"
    assert torch.equal(label_maps(f"file:{path}", data).maps, label_maps("dense:convnext_mini_original", data).maps)


def test_pictures_without_masks_say_what_to_use(photos, tmp_path):
    config = LabelConfig(data="folder", root=str(photos), split="train", labels="mask")
    with pytest.raises(InputError, match="has no object masks.*Use saliency, dense"):
        label_split(config, open_images(config), tmp_path / "run")
    assert not (tmp_path / "run" / "labels.safetensors").exists()


@pytest.mark.parametrize("given, words", [
    (dict(labels="masks"), "did you mean 'mask'"), (dict(split="valid"), "did you mean 'val'"), (dict(size="56"), "allowed is int"), (dict(data="shapes"), "did you mean 'shapes9'"),
    (dict(batch_size=0), "whole numbers from 1"), (dict(labels="file"), "write 'file:PATH'"), (dict(grids=7), "did you mean 'grid'"),
])
def test_wrong_values_name_the_remedy(given, words):
    with pytest.raises(InputError) as error:
        checked(LabelConfig, given)
    assert words in str(error.value)


def test_where_a_run_lies():
    a, b = LabelConfig(), LabelConfig(batch_size=3, workers=2, device="cuda", root="elsewhere")
    assert label_folder(a) == label_folder(b) and label_folder(a).name.startswith("label-") and label_folder(LabelConfig(out="here")) == Path("here")
    assert len({label_folder(c) for c in (a, LabelConfig(labels="mask"), LabelConfig(split="train"), LabelConfig(seed=1), LabelConfig(size=112))}) == 5
