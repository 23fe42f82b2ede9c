"""Networks by name on variants, shifted sets and relevance; what labels know; challenge.ipynb through papermill."""
import copy
import dataclasses
import json
from pathlib import Path

import nbformat
import numpy as np
import pandas as pd
import papermill
import pytest
import torch
import torch.nn as nn
from hypothesis import given, settings
from hypothesis import strategies as st

from patchmix_repro import challenge_pictures as cp
from patchmix_repro import challenge_runs as cr
from patchmix_repro import relevance_records, store
from patchmix_repro.backgrounds import VARIANTS, build_variant, plan_backgrounds
from patchmix_repro.battery import Network, class_map_of, open_networks
from patchmix_repro.blocks import block_order
from patchmix_repro.challenge_runs import ChallengeConfig, challenge_table, run_challenge, source_for
from patchmix_repro.config import train_config
from patchmix_repro.core import CheckpointError, DataError, InputError, StoreError
from patchmix_repro.curves import draw_sheet, read_sheet
from patchmix_repro.data import create_dataset, normalize
from patchmix_repro.files import ImageSet
from patchmix_repro.label_files import write_labels
from patchmix_repro.label_sources import label_maps, patch_labels_of
from patchmix_repro.networks import write_model
from patchmix_repro.parameters import checked
from patchmix_repro.photographs import IN9_CLASSES
from patchmix_repro.relevance import object_share, relevance
from patchmix_repro.remixer_records import remixer_runs, select
from patchmix_repro.remixer_tables import labeller_table
from patchmix_repro.shards import synset_ids
from patchmix_repro.shifted_records import SHIFTED, measure_labeller, measure_shifted, open_shifted, part_of, probe_features, sampled_labels
from patchmix_repro.state import network_for

CHALLENGE = Path(__file__).resolve().parents[1] / "nbs" / "challenge.ipynb"


@pytest.fixture(scope="module")
def drawings():
    return create_dataset("shapes9", "test", 56)


@pytest.fixture(scope="module")
def remixed_run(tmp_path_factory, drawings):
    "The folder of a remixed DeiT with noise for weights, as `train` writes it."
    config = train_config(model="deit", remixer=True, labels="mask", data="shapes9", scale="mini", mixing="timm")
    torch.manual_seed(0)
    model, folder = network_for(config, 9), tmp_path_factory.mktemp("runs") / "remixed"
    with torch.no_grad():
        for p in model.base.parameters():
            p.add_(0.1 * torch.randn_like(p))
        model.kappa.fill_(1.5)
    write_model(model, {"config": dataclasses.asdict(config), "classes": list(drawings.classes), "size": 56, "run_id": "remixed-by-hand"}, folder)
    return folder


class Silent(nn.Module):
    pretrained_cfg = {"mean": (0.0,) * 3, "std": (1.0,) * 3}

    def forward(self, *given):
        raise AssertionError("asked again")


# ---- backgrounds ----

def test_a_remixed_network_gets_labels_of_the_variants_own_picture(remixed_run, drawings, tmp_path):
    config = ChallengeConfig(model=str(remixed_run), variants="original,only_bg_t,mixed_same,mixed_rand", limit=12, out=str(tmp_path))
    measured = run_challenge(config)
    network, = open_networks(str(remixed_run), remixed=True).values()
    assert measured.labels == {"remixed": "mask"} and network.labels == "mask"
    record, = store.read(tmp_path / "records", "backgrounds").to_dict("records")
    assert record["config.labels"] == "mask" and record["config.run_id"] == "remixed-by-hand" and record["metrics.objects"] == 12
    plan = plan_backgrounds(drawings, cr.variants_of(config))
    keep = torch.cat(block_order(len(plan.ids), 0, 12)).sort().values
    plan = plan._replace(ids=plan.ids[keep], backgrounds={name: donors[keep] for name, donors in plan.backgrounds.items()})
    right = {}
    for name in cr.variants_of(config):  # literally: one picture at a time, its own mask by area
        one = build_variant(drawings, name, plan)
        labels = one.masks.float().unfold(2, 4, 4).unfold(3, 4, 4).mean((-2, -1)).flatten(1)[..., None]
        with torch.no_grad():
            answers = [network.model(normalize(one.images[i : i + 1]), labels[i : i + 1]).argmax().item() for i in range(12)]
        right[name] = np.array(answers) == one.labels.numpy()
    table = measured.tables["remixed"]
    assert table.estimate[list(right)].tolist() == pytest.approx([r.mean() for r in right.values()])
    assert table.estimate["bg_gap"] == pytest.approx(right["mixed_same"].mean() - right["mixed_rand"].mean())


def test_what_is_filed_is_not_measured_again(tmp_path, monkeypatch):
    config = ChallengeConfig(model="convnext_mini_original", variants="original,mixed_same,mixed_rand", limit=50, out=str(tmp_path))
    first, opened = run_challenge(config), open_networks("convnext_mini_original")
    monkeypatch.setattr(cr, "open_networks", lambda *_, **__: {name: network._replace(model=Silent()) for name, network in opened.items()})
    again = run_challenge(config)
    pd.testing.assert_frame_equal(again.tables["convnext_mini_original"], first.tables["convnext_mini_original"])
    assert len(list((tmp_path / "records").iterdir())) == 1 and first.chance == pytest.approx(1 / 9)
    with pytest.raises(AssertionError, match="asked again"):
        run_challenge(dataclasses.replace(config, seed=1))


def test_what_cannot_be_built_is_listed(drawings, tmp_path, monkeypatch):
    few = part_of(drawings, torch.arange(30))
    few.masks = few.masks.clone()
    few.masks[3] = 0
    monkeypatch.setattr(cr, "create_dataset", lambda *_: few)
    measured = run_challenge(ChallengeConfig(model="convnext_mini_original", variants="original,no_fg", limit=None, out=str(tmp_path)))
    lost = measured.skipped
    assert lost[["network", "variant", "file"]].to_numpy().tolist() == [["convnext_mini_original", "no_fg", drawings.manifest.file[3]]] and "covers nothing" in lost.reason[0]
    assert measured.tables["convnext_mini_original"].n.tolist() == [29, 29] and measured.tables["convnext_mini_original"].skipped.tolist() == [0, 1]


def test_the_table_shows_intervals_and_the_gaps_p_value():
    table = pd.DataFrame({"estimate": [0.5, 0.25], "low": [0.4, 0.1], "high": [0.6, 0.3], "n": [40, 40], "p_value": [np.nan, 0.0123]}, index=["original", "bg_gap"])
    shown = challenge_table({"a": table, "b": table.iloc[:1]})
    assert shown["a"].tolist() == ["50.0 [40.0, 60.0]", "25.0 [10.0, 30.0], p 0.012"] and shown["b"]["original"] == "50.0 [40.0, 60.0]" and shown["n"].tolist() == [40, 40]


@pytest.mark.parametrize("wrong, words", [
    (dict(variants="original,only_gf"), "did you mean 'only_fg'"), (dict(variants=" , "), "names nothing"), (dict(measure="background"), "did you mean 'backgrounds'"),
    (dict(measure="shifted"), "imagenet9, caltech9"), (dict(data="shape9"), "did you mean 'shapes9'"), (dict(labels="masks"), "did you mean 'mask'"), (dict(labels="shuffled"), "shuffled:SOURCE"),
    (dict(limit=0), "limit 0"), (dict(batch_size=0), "batch_size 0"), (dict(batch_size="all"), "'auto'"), (dict(limit="50"), "int | None"), (dict(varaints="all"), "did you mean 'variants'"),
])
def test_wrong_values_name_the_remedy(wrong, words):
    with pytest.raises(InputError) as error:
        checked(ChallengeConfig, wrong)
    assert words in str(error.value)


def test_only_a_remixed_network_takes_labels():
    plain, = open_networks("convnext_mini_original").values()
    for asked in ("auto", "mask", "none"):
        assert source_for(plain, asked) == "none"
    assert [source_for(plain._replace(labels="saliency"), asked) for asked in ("auto", "mask", "none")] == ["saliency", "mask", "none"]


def test_a_network_is_not_measured_with_another_labeller_than_its_own(remixed_run, tmp_path, monkeypatch):
    network, = open_networks(str(remixed_run), remixed=True).values()
    source = "dense:convnext_mini_original"
    other = network._replace(labels=source, labeler=f"{source} {'0' * 64}")
    monkeypatch.setattr(cr, "open_networks", lambda *_, **__: {"remixed": other})
    config = ChallengeConfig(variants="original", limit=8, out=str(tmp_path))
    with pytest.raises(CheckpointError, match=f"now made by '{source} .*in training they were by '{source} 0.*Restore the labeller"):
        run_challenge(config)
    assert not (tmp_path / "records").exists()
    assert run_challenge(dataclasses.replace(config, labels="mask")).tables["remixed"].n.tolist() == [8], "labels that are asked for by name are another matter"


# ---- classes ----

def test_a_network_of_imagenet_is_scored_on_imagenet9_through_the_table(tmp_path):
    table = {str(i): i % 9 if i < 90 else -1 for i in range(1000)}
    (tmp_path / "in_to_in9.json").write_text(json.dumps(table))
    network = Network(None, {"name": "net"}, 56, tuple(synset_ids()))
    data = type("Nine", (), {"name": "backgrounds-original", "classes": IN9_CLASSES})
    found = class_map_of(network, data, tmp_path)
    assert found.tolist() == list(table.values()) and class_map_of(network._replace(classes=IN9_CLASSES), data) is None
    with pytest.raises(InputError, match="net knows the classes"):
        class_map_of(network, type("Other", (), {"name": "x", "classes": IN9_CLASSES[::-1]}), tmp_path)


# ---- shifted sets ----

class Fixed(nn.Module):
    "Names the class that the mean brightness of a picture stands for."
    pretrained_cfg = {"mean": (0.0,) * 3, "std": (1.0,) * 3}

    def __init__(self, k=4):
        super().__init__()
        self.k, self.shift = k, nn.Parameter(torch.zeros(1))

    def forward(self, x):
        return nn.functional.one_hot((x.mean((1, 2, 3)) * 255).round().long(), self.k).float() + self.shift


def flat(values, labels, accepted=None):
    manifest = pd.DataFrame({"file": [f"{i}.png" for i in range(len(values))], "class": [f"c{k}" for k in labels], "label": labels, "sha256": ""})
    manifest = manifest if accepted is None else manifest.assign(accepted=accepted)
    images = torch.tensor(values, dtype=torch.uint8)[:, None, None, None].expand(-1, 3, 8, 8).contiguous()
    return ImageSet("flat", "test", ("c0", "c1", "c2", "c3"), manifest, images)


def test_shifted_by_hand_with_and_without_several_right_answers(tmp_path):
    note = {"name": "fixed", "model": "deit", "run_id": "r", "train_seed": 0}
    one = measure_shifted(Fixed(), note, flat([0, 1, 2, 3], [0, 1, 1, 1]), "sketch_9", tmp_path)
    real = measure_shifted(Fixed(), note, flat([0, 1, 2, 3], [0, 1, 1, 1], ["0", "1", "1 2", "0 1"]), "real_9", tmp_path)
    assert one.correct.tolist() == [True, True, False, False] and real.correct.tolist() == [True, True, True, False] and real.prediction.tolist() == [0, 1, 2, 3]
    records = store.read(tmp_path / "records", "shifted").set_index("config.data")
    assert records["metrics.accuracy"].to_dict() == {"sketch_9": 0.5, "real_9": 0.75} and records["config.variant"].eq("original").all()
    again = measure_shifted(Silent(), note, flat([0, 1, 2, 3], [0, 1, 1, 1]), "sketch_9", tmp_path)
    assert again.equals(one)
    with pytest.raises(StoreError, match="other images"):
        measure_shifted(Fixed(), note, flat([0, 1, 2, 3], [0, 1, 1, 2]), "sketch_9", tmp_path)


def test_a_part_and_a_class_map(tmp_path):
    swap = torch.tensor([1, 0, 2, 3])
    rows = measure_shifted(Fixed(), {"name": "fixed"}, flat([0, 1, 2], [1, 0, 1]), "shape_texture edges", tmp_path, class_map=swap)
    record, = store.read(tmp_path / "records").to_dict("records")
    assert rows.correct.tolist() == [True, True, False] and (record["config.data"], record["config.variant"]) == ("shape_texture", "edges")


def test_the_sets_of_a_training(shared_data, tmp_path):
    with pytest.raises(DataError, match="no shifted set of imagenet9 is at hand. imagenet_v2"):
        open_shifted("imagenet9", 56, tmp_path)
    if not (shared_data / "shape_texture.zip").is_file():
        pytest.skip("no shape_texture.zip in the folder that PATCHMIX_DATA names")
    sets, missing = open_shifted("caltech9", 56, shared_data)
    assert list(sets) == list(SHIFTED["caltech9"]) and missing.empty and len({one.classes for one in sets.values()}) == 1
    network = Network(Fixed(9), {"name": "fixed"}, 56, next(iter(sets.values())).classes)
    network.model.forward = lambda x: torch.arange(9.0).repeat(len(x), 1) + network.model.shift  # always the last class
    table, _ = cr._shifted(network, (dict(list(sets.items())[:1]), missing), ChallengeConfig(limit=50), "none", tmp_path, False)
    labels = next(iter(sets.values())).labels
    assert table.index.tolist() == ["shape_texture cue_conflict"] and table.n.tolist() == [50] and table.estimate.iloc[0] == pytest.approx((labels[torch.cat(block_order(len(labels), 0, 50))] == 8).float().mean().item())


# ---- labellers ----

@settings(max_examples=15)
@given(ids=st.lists(st.integers(0, 99), min_size=1, max_size=6))
def test_a_part_holds_what_its_ids_say(drawings, ids):
    whole = drawings
    part = part_of(whole, torch.tensor(ids))
    assert torch.equal(part.images, whole.images[ids]) and torch.equal(part.masks, whole.masks[ids]) and part.labels.tolist() == whole.labels[ids].tolist()
    assert part.manifest.file.tolist() == whole.manifest.file[ids].tolist() and len(part) == len(ids)
    assert (part.manifest_hash == whole.manifest_hash) is False


def test_labels_of_a_sample_are_those_of_the_whole(drawings, tmp_path):
    few, ids = part_of(drawings, torch.arange(20)), torch.tensor([3, 11, 19])
    write_labels(label_maps("mask", few), few, tmp_path / "labels.npz")
    want = patch_labels_of(label_maps("mask", few))(ids)
    for source in ("mask", f"file:{tmp_path / 'labels.npz'}"):
        assert torch.equal(sampled_labels(source, few, ids)(torch.arange(3)), want)
    assert torch.equal(probe_features("mask", few, ids), want)


def test_a_probe_reads_no_more_than_the_labels_hold(drawings, tmp_path):
    train, test = part_of(drawings, torch.arange(0, 600, 2)), part_of(drawings, torch.arange(1, 600, 2))
    found = measure_labeller("constant", train, test, tmp_path)
    most = train.labels.bincount().argmax()
    assert found[0] == pytest.approx((test.labels == most).float().mean().item()) and found[3] == 300
    know = measure_labeller("mask", train, test, tmp_path)
    assert found[1] <= found[0] <= found[2] < know[0]
    assert measure_labeller("mask", train, test, tmp_path) == know and len(store.read(tmp_path / "records", "labeller")) == 2
    with pytest.raises(InputError, match="takes no patch labels"):
        run_challenge(ChallengeConfig(model="convnext_mini_original", measure="labels", limit=50, out=str(tmp_path)))


# ---- relevance ----

def test_the_share_of_relevance_is_that_of_the_map(remixed_run, drawings, tmp_path):
    config = ChallengeConfig(model=str(remixed_run), measure="relevance", limit=6, batch_size=4, out=str(tmp_path))
    measured = run_challenge(config)
    network, = open_networks(str(remixed_run), remixed=True).values()
    rows = store.read_table(tmp_path / "records", "images", "relevance")
    ids = torch.tensor(rows["id"].to_numpy())
    maps = torch.cat([relevance(network.model, normalize(drawings.images[i : i + 1]), labels=patch_labels_of(label_maps("mask", drawings))(i.view(1))) for i in ids])
    want = object_share(maps, drawings.masks[ids].bool())
    np.testing.assert_allclose(rows.share, want, atol=1e-4)
    table = measured.tables["remixed"]
    assert table.index.tolist() == ["object share"] and table.estimate.iloc[0] == pytest.approx(want.mean().item(), abs=1e-4) and measured.chance is None
    assert not np.allclose(rows.share, object_share(torch.cat([relevance(network.model, normalize(drawings.images[i : i + 1])) for i in ids]), drawings.masks[ids].bool()), atol=1e-3)
    run = store.read_table(tmp_path / "records", "variants", "relevance")
    assert run[["variant", "n"]].to_numpy().tolist() == [["object share", 6]]


def test_a_map_without_mass_is_counted_and_not_replaced(drawings, tmp_path, monkeypatch):
    ids = relevance_records.object_ids(drawings, 0, 4)
    maps = drawings.masks[ids, 0].float()
    maps[1] = 0
    monkeypatch.setattr(relevance_records, "relevance_maps", lambda *_: maps)
    network = Network(Silent(), {"name": "x"}, 56, drawings.classes)
    table, lost = cr._relevance(network, drawings, ChallengeConfig(limit=4), "none", tmp_path, False)
    shares = 1 - drawings.masks[ids[[0, 2, 3]]].double().mean((1, 2, 3))
    assert table.n.tolist() == [3] and table.estimate.iloc[0] == pytest.approx(shares.mean().item(), abs=1e-6) and lost.file.tolist() == [drawings.manifest.file[int(ids[1])]]
    blank = copy.copy(drawings)
    blank.masks = torch.zeros_like(drawings.masks)
    with pytest.raises(InputError, match="usable mask"):
        relevance_records.object_ids(blank)


# ---- pictures ----

def test_sheets_are_filed_once_and_drawn(remixed_run, drawings, tmp_path):
    assert cp.file_variant_sheet(tmp_path, count=2) and cp.file_variant_sheet(tmp_path, count=2) is None
    images, captions = read_sheet(tmp_path, "backgrounds", "shapes9")
    assert len(images) == 16 and [c.split("\n")[0] for c in captions] == [*VARIANTS] * 2
    assert torch.equal(images[4].where(images[4] > 0, images[0]), images[0])  # only_fg is the object of original, or black
    plan = plan_backgrounds(drawings)
    own = plan.ids[torch.cat(block_order(len(plan.ids), 0, 2))]
    assert torch.equal(images[::8], drawings.images[own])
    network, = open_networks(str(remixed_run), remixed=True).values()
    assert cp.file_relevance_sheet({"remixed": network}, tmp_path, count=3)
    images, captions = read_sheet(tmp_path, "relevance", "shapes9")
    assert captions[3:] == ["remixed"] * 3 and torch.equal(images[:3], drawings.images[relevance_records.object_ids(drawings, 0, 3)]) and draw_sheet(tmp_path, "relevance", "shapes9")[1].shape[0] == 6


def test_every_measure_has_a_sheet(shared_data, monkeypatch):
    for measure in ("backgrounds", "relevance", "labels"):
        assert len(cp.challenge_sheet(ChallengeConfig(measure=measure, variants="original,no_fg"), count=2)[1]) == 4
    monkeypatch.setattr(cp, "MEASURES", {"backgrounds": cr.MEASURES["backgrounds"]._replace(open=lambda *_: flat([1, 2], [0, 1]))})
    assert "no masks" in cp.challenge_sheet(ChallengeConfig())[0].get_label()
    monkeypatch.undo()
    if not (shared_data / "shape_texture.zip").is_file():
        pytest.skip("no shape_texture.zip in the folder that PATCHMIX_DATA names")
    titles = cp.challenge_sheet(ChallengeConfig(measure="shifted", data="caltech9", root=str(shared_data)), count=2)[1].title
    assert [title.split("\n")[0] for title in titles[::2]] == list(SHIFTED["caltech9"])


def test_the_figure_tells_networks_apart():
    table = pd.DataFrame({"estimate": [0.5, 0.25, 0.2], "low": [0.4, 0.1, 0.1], "high": [0.6, 0.3, 0.3], "n": 40}, index=pd.Index(["original", "no_fg", "bg_gap"], name="variant"))
    note = {"model": "deit", "mixing": "timm"}
    measured = cr.Challenged({"a": table, "b": table}, {"a": note, "b": note}, {"a": "none", "b": "mask"}, pd.DataFrame(), 0.1, "top-1 accuracy, %")
    figure, points = cp.challenge_figure(measured)
    assert points.estimate.tolist() == [0.5, 0.25, 0.5, 0.25] and [t.get_text() for t in figure.axes[0].get_xticklabels()] == ["original", "no_fg"]
    lines = [bar.lines[0] for bar in figure.axes[0].containers]
    assert lines[0].get_color() == lines[1].get_color() and lines[0].get_markerfacecolor() != lines[1].get_markerfacecolor() == "white"
    assert (lines[0].get_xdata() < lines[1].get_xdata()).all() and "a, original: 50.0" in figure.get_label()


# ---- what the results pages read ----

def test_the_pages_find_every_kind_of_record(remixed_run, drawings, tmp_path):
    for measure in ("backgrounds", "relevance", "labels"):
        run_challenge(ChallengeConfig(model=str(remixed_run), measure=measure, variants="original,mixed_rand", limit=40 if measure == "labels" else 4, out=str(tmp_path)))
    network, = open_networks(str(remixed_run), remixed=True).values()
    measure_shifted(network.model, network.note, drawings, "sketch_9", tmp_path, "mask", limit=4)
    measure_shifted(network.model, network.note, drawings, "shape_texture edges", tmp_path, "mask", limit=4)
    runs = remixer_runs(tmp_path / "records")
    assert set(zip(runs["kind"], runs.variant)) == {("backgrounds", "original"), ("backgrounds", "mixed_rand"), ("relevance", "object share"), ("shifted", "sketch_9"), ("shifted", "shape_texture edges")}
    assert runs.remixer.all() and set(runs.labels) == {"mask"} and set(runs.run_id) == {"remixed-by-hand"} and set(runs.n) == {4} and set(runs.train_data) == {"shapes9"}
    assert set(select(runs, "shapes9", "mini").recipe) == {"remixer mask"}
    assert labeller_table(tmp_path / "records", "shapes9").loc["mask", "images"] == 40 and store.verify(tmp_path / "records").empty


# ---- the notebook ----

def test_challenge_through_papermill(remixed_run, tmp_path):
    given = {"model": f"convnext_mini_original,{remixed_run}", "limit": 50, "out": str(tmp_path / "run")}
    papermill.execute_notebook(CHALLENGE, tmp_path / "out.ipynb", given, progress_bar=False, cwd=str(tmp_path))
    records = store.read(tmp_path / "run" / "records", "backgrounds").set_index("config.name")
    assert records["config.labels"].to_dict() == {"convnext_mini_original": "none", "remixed": "mask"} and records["metrics.objects"].eq(50).all()
    shown = [o.data for c in nbformat.read(tmp_path / "out.ipynb", as_version=4).cells if c.cell_type == "code" for o in c.outputs if "data" in o]
    assert sum("image/png" in data for data in shown) == 2 and any("bg_gap" in data.get("text/html", "") for data in shown)


def test_the_notebook_is_short_and_all_its_parameters_are_fields():
    cells = nbformat.read(CHALLENGE, as_version=4).cells
    tagged = [c for c in cells if "parameters" in c.metadata.get("tags", [])]
    assert len(cells) <= 12 and len(tagged) == 1 and tagged[0] is next(c for c in cells if c.cell_type == "code")
    space = {}
    exec(tagged[0].source, space)  # our own file
    names = [line.split(":")[0] for line in tagged[0].source.splitlines() if line]
    assert {n: space[n] for n in names} == dataclasses.asdict(ChallengeConfig())
