"""evaluate.ipynb through papermill: the shipped networks, timm's, wrong parameters, the same kernel twice."""
from dataclasses import asdict
from pathlib import Path

import nbformat
import numpy as np
import pandas as pd
import papermill
import pytest
import timm
import torch
import torch.nn as nn
from nbclient import NotebookClient
from PIL import Image
from test_occluded import make_nvd, make_rod, make_smd
from timm.data import ImageNetInfo

from patchmix_repro import store
from patchmix_repro.battery import (
    SHIPPED,
    EvaluateConfig,
    against_first,
    beside_accuracy,
    class_map_of,
    guessing,
    open_networks,
    overview,
    published_sets,
    rod_table,
    run_battery,
)
from patchmix_repro.core import CheckpointError, InputError
from patchmix_repro.data import create_dataset, normalize, to_float
from patchmix_repro.evaluation import summary
from patchmix_repro.models import PRETRAINED
from patchmix_repro.occluded import ROD_IDS, pccp, score_rod
from patchmix_repro.shards import synset_ids
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
    assert len(cells) <= 13 and len(tagged) == 1 and tagged[0] is next(c for c in cells if c.cell_type == "code")
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


# ---- a network and the data's classes ----

def test_as_many_classes_are_not_the_same_classes(tmp_path, monkeypatch):
    network = open_networks("convnext_mini_original")["convnext_mini_original"]
    nine = tuple(f"caltech {k}" for k in range(9))
    monkeypatch.setattr("patchmix_repro.battery.open_networks", lambda *_: {"other": network._replace(classes=nine)})
    with pytest.raises(InputError, match=r"caltech 0, .* \(9\), and shapes9 has .* \(9\)\. Give networks that were trained"):
        run_battery(EvaluateConfig(limit=4, out=str(tmp_path)))
    assert not list(tmp_path.rglob("*.parquet"))
    with pytest.raises(InputError, match="shapes9 has"):  # the same names in another order
        class_map_of(network._replace(classes=network.classes[::-1]), create_dataset("shapes9", "test", 56))
    monkeypatch.setattr("patchmix_repro.battery.open_networks", lambda *_: {"other": network._replace(classes=None)})
    assert len(run_battery(EvaluateConfig(limit=4, battery="quick", out=str(tmp_path))).rows["other"]) == 24


class Colours(nn.Module):
    "A made-up ImageNet network: random logits from the mean colour, the same in every batch."
    pretrained_cfg = {"mean": (0.5, 0.5, 0.5), "std": (0.25, 0.25, 0.25), "input_size": (3, 56, 56)}
    num_classes = 1000

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.weight = nn.Parameter(torch.randn(3, 1000, generator=generator))
        self.bias = nn.Parameter(8.0 * torch.zeros(1000).index_fill_(0, torch.tensor([i for ids in ROD_IDS.values() for i in ids]), 1))

    def forward(self, x):
        return 20 * x.mean((2, 3)) @ self.weight + self.bias


@pytest.fixture
def colours(monkeypatch):
    monkeypatch.setattr(timm, "create_model", lambda name, pretrained: Colours())


def settings_of(data, tmp_path, **options):
    return EvaluateConfig(pretrained="colours", data=data, root=str(tmp_path), battery="quick", workers=0, out=str(tmp_path / "run"), **options)


def slow_logits(dataset):
    model = Colours().double()
    images = torch.stack([dataset[i][0] for i in range(len(dataset))])
    return model(normalize(to_float(images), (0.5,) * 3, (0.25,) * 3).double()).detach()


def test_rod_under_three_rules(tmp_path, colours):
    rod = create_dataset("rod", "test", 56, root=make_rod(tmp_path, [[3, 3, 3], [6, 6], [0], [1], [2], [4], [5]]))
    logits, config = slow_logits(rod), settings_of("rod", tmp_path, limit=None)
    right = [int(row.argmax()) in list(ROD_IDS.values())[label] for row, label in zip(logits, rod.labels.tolist())]
    measured = run_battery(config)
    clean = measured.rows["colours"].query("condition == 'clean'")
    assert clean.sort_values("id").correct.tolist() == right and len(measured.rows["colours"]) == 6 * 10
    # 5 of 10 pictures are of classes with two ids
    assert measured.chance == pytest.approx((5 * 2 + 5) / 10 / 1000) == guessing(rod, class_map_of(open_networks(pretrained="colours")["colours"], rod))
    record = store.read(tmp_path / "run" / "records").iloc[0]
    assert record["config.class_map"] and record["metrics.clean"] == np.mean(right)
    filed = store.read_table(tmp_path / "run" / "records", "conditions").drop(columns="run_id")
    pd.testing.assert_frame_equal(filed, measured.tables["colours"].reset_index(drop=True), check_dtype=False)
    network, want = open_networks(pretrained="colours")["colours"], score_rod(logits, rod.labels)
    seen = []
    network.model.register_forward_hook(lambda model, given, found: seen.append(len(found)))
    for size in (1, 3, "auto"):
        pd.testing.assert_frame_equal(rod_table(network, rod, batch_size=size, workers=0), want)
    assert sum(seen) == 3 * len(rod)  # one pass serves three rules
    assert rod_table(network, rod, limit=4, workers=0).n.eq(4).all()
    table = beside_accuracy(config, measured)
    assert table.index.tolist() == [("colours", rule) for rule in ("strict", "synonyms", "restricted")] and table.n.eq(10).all()
    assert table.percent.iloc[1].startswith(f"{100 * np.mean(right):.1f} [")
    shown = published_sets(tmp_path / "run" / "records").loc["colours"]
    assert shown["ROD"].endswith("n 10") and shown.drop("ROD").eq("not measured yet").all()


def test_smd_and_nvd_have_imagenets_classes(tmp_path, colours):
    make_nvd(make_smd(tmp_path))
    config = settings_of("smd", tmp_path)
    smd = run_battery(config)
    assert smd.chance == 1 / 1000 and len(smd.rows["colours"]) == 6 * 40 and beside_accuracy(config, smd) is None
    config = settings_of("nvd", tmp_path)
    nvd, manifest = run_battery(config), create_dataset("nvd", "test", 56, root=tmp_path).manifest
    assert "not defined: none of 2" in beside_accuracy(config, nvd).percent.item()  # no answer is right
    nvd.rows["colours"]["correct"] = nvd.rows["colours"].file.ne(manifest.file[0])
    want = pccp(nvd.rows["colours"].query("condition == 'clean'"), manifest)
    table = beside_accuracy(config, nvd)
    assert table.index.tolist() == [("colours", x) for x in want.x] and table.percent.str.split(" ").str[0].astype(float).tolist() == (100 * want.estimate).round(1).tolist()
    part = run_battery(settings_of("nvd", tmp_path, limit=3))
    assert "each of the manifest's 6" in beside_accuracy(config, part).percent.item()
    assert published_sets(tmp_path / "run" / "records").loc["colours", "NVD"].endswith("n 6")  # the larger sample


def test_part_of_imagenet_by_its_synsets(tmp_path, colours):
    for part, i in (("train", 0), ("val", 0), ("train", 954), ("val", 954)):
        path = tmp_path / "folder" / part / list(synset_ids())[i] / "a.png"
        path.parent.mkdir(parents=True)
        Image.new("RGB", (60, 60), (i % 256, 9, 9)).save(path)
    network = open_networks(pretrained="colours")["colours"]
    data = type("Two", (), {"name": "folder", "classes": tuple(sorted(p.name for p in (tmp_path / "folder" / "val").iterdir()))})
    found = class_map_of(network, data)
    assert found[[0, 954]].tolist() == [0, 1] and (found >= 0).sum() == 2


def test_a_cell_shows_the_drop_and_its_share():
    row = {"condition": "drop", "kind": "drop", "accuracy": 0.253, "low": 0.207, "high": 0.305, "drop": 0.227, "drop_normalised": 0.4735, "in_distribution": False, "reason": ""}
    clean = row | {"condition": "clean", "kind": "clean", "drop": 0.0, "drop_normalised": 0.0, "reason": "reference"}
    gain = row | {"condition": "gain", "drop": -0.004, "drop_normalised": -0.001, "in_distribution": True, "reason": "no effect"}
    shown = overview({"net": pd.DataFrame([clean, row, gain])})["net"]
    assert shown.tolist() == ["25.3 [20.7, 30.5]", "25.3 [20.7, 30.5], -22.7 (0.47)", "25.3 [20.7, 30.5], +0.4 (0.00) * (no effect)"]
