"""From a number to the pixels: the images that are drawn again are the ones that were judged."""
import numpy as np
import pytest
import torch

from patchmix_repro import store
from patchmix_repro.background_records import measure_backgrounds
from patchmix_repro.blocks import normalization
from patchmix_repro.core import InputError
from patchmix_repro.data import create_dataset, normalize
from patchmix_repro.evidence import chain, deciding, maps_again, shown_backgrounds, shown_explained, shown_images
from patchmix_repro.explaining import explained_rows, selectivity_rows
from patchmix_repro.explanations import ExplainConfig, explain_sets, file_sets, open_split
from patchmix_repro.battery import open_networks
from patchmix_repro.filing import measure_battery, note_of
from patchmix_repro.models import create_model
from patchmix_repro.networks import find_run, load_model, write_model
from patchmix_repro.record_list import record_rows, records_html
from patchmix_repro.relevance import object_share
from patchmix_repro.relevance_records import measure_relevance
from patchmix_repro.smd import battery

NAMES = ("convnext_mini_original", "convnext_mini_patchmix")
ASKED = ("clean", "replace-14-50", "replace-7-30", "permute-64", "drop-14-60-black-random", "paste-embedded-20", "slide-25-50")


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    "Some conditions of the battery for the two shipped networks on 60 images, filed."
    folder, data = tmp_path_factory.mktemp("evidence"), create_dataset("shapes9", "test", 56)
    conditions = tuple(condition for condition in battery("paper") if condition.name in ASKED)
    for name in NAMES:
        model, card = load_model(find_run(name))
        measure_battery(model, note_of(model, card, name), conditions, data, folder, limit=60)
    records = store.read(folder, "battery")
    return folder, dict(zip(records["config.name"], records["run_id"]))


@pytest.mark.parametrize("condition", ASKED)
def test_the_pixels_get_the_recorded_answers(measured, condition):
    folder, runs = measured
    run_id = runs[NAMES[1]]
    rows = store.read_table(folder, "images", kind="battery").query("run_id == @run_id")
    ids = rows["id"].tolist()[::-1]
    model, _ = load_model(find_run(NAMES[1]))
    images = shown_images(folder, run_id, condition, ids)
    with torch.no_grad():
        said = model(normalize(images, *normalization(model))).argmax(1)
    labels = create_dataset("shapes9", "test", 56).labels[ids]
    np.testing.assert_array_equal(said.eq(labels).numpy(), rows.set_index("id").loc[ids, condition].to_numpy(bool))


def test_deciding_images_make_the_whole_difference(measured):
    folder, runs = measured
    rows = store.read_table(folder, "images", kind="battery").set_index(["run_id", "id"])["replace-14-50"].unstack(0)
    found = deciding(folder, *(runs[name] for name in NAMES), "replace-14-50")
    one, two = (rows[runs[name]] for name in NAMES)
    assert set(found["id"]) == set(rows.index[one.ne(two)])
    assert found["first"].sum() - found["second"].sum() == one.sum() - two.sum()
    assert deciding(folder, runs[NAMES[0]], runs[NAMES[0]], "clean").empty


def test_the_chain_names_training_data_and_versions(measured):
    folder, runs = measured
    links = chain(folder, runs[NAMES[0]])["value"]
    assert links["config.data"] == "shapes9" and links["data.test"] == create_dataset("shapes9", "test", 56).manifest_hash
    assert "torch" in links["versions"] and links["record"].startswith("battery-")


def test_what_cannot_be_traced_is_refused(measured, monkeypatch):
    folder, runs = measured
    run_id = runs[NAMES[0]]
    with pytest.raises(InputError, match="unknown run_id"):
        chain(folder, "nothing")
    with pytest.raises(InputError, match="unknown condition"):
        shown_images(folder, run_id, "replace-14-55", [0])
    with pytest.raises(InputError, match="not among those"):
        shown_images(folder, run_id, "clean", [10**6])
    from patchmix_repro import evidence
    monkeypatch.setattr(evidence, "create_dataset", lambda *given: create_dataset("shapes9", "val", 56))
    with pytest.raises(InputError, match="their hash differs"):
        shown_images(folder, run_id, "clean", [0])


def test_runs_on_other_images_have_no_common_difference(measured, tmp_path):
    _, data = measured, create_dataset("shapes9", "test", 56)
    for name, limit in zip(NAMES, (30, 60), strict=True):
        model, card = load_model(find_run(name))
        measure_battery(model, note_of(model, card, name), battery("quick")[:2], data, tmp_path, limit=limit)
    with pytest.raises(InputError, match="are the same"):
        deciding(tmp_path, *store.read(tmp_path, "battery")["run_id"], "clean")


@pytest.fixture(scope="module")
def before_others(tmp_path_factory):
    "Backgrounds of the two shipped networks on 60 objects, filed."
    folder, data = tmp_path_factory.mktemp("backgrounds"), create_dataset("shapes9", "test", 56)
    for name in NAMES:
        model, card = load_model(find_run(name))
        measure_backgrounds(model, note_of(model, card, name), data, folder, limit=60)
    records = store.read(folder / "records", "backgrounds")
    return folder / "records", dict(zip(records["config.name"], records["run_id"]))


@pytest.mark.parametrize("variant", ["original", "only_bg_b", "only_bg_t", "no_fg", "only_fg", "mixed_same", "mixed_rand", "mixed_next"])
def test_the_pixels_before_other_backgrounds_get_the_recorded_answers(before_others, variant):
    folder, runs = before_others
    rows = store.read_table(folder, "images", kind="backgrounds").query("run_id == @runs[@NAMES[0]]").iloc[::-1]
    model, _ = load_model(find_run(NAMES[0]))
    images = shown_backgrounds(folder, runs[NAMES[0]], variant, rows["fg_file"].tolist())
    with torch.no_grad():
        said = model(normalize(images, *normalization(model))).argmax(1)
    np.testing.assert_array_equal(said.numpy() == rows["label"].to_numpy(), rows[variant].to_numpy(bool))
    found = deciding(folder, *(runs[name] for name in NAMES), variant)
    rates = store.read_table(folder, "images", kind="backgrounds").groupby("run_id")[variant].sum()
    assert found["first"].sum() - found["second"].sum() == rates[runs[NAMES[0]]] - rates[runs[NAMES[1]]]


def test_a_record_of_another_kind_is_refused(measured, before_others):
    for (folder, runs), shown, names in ((measured, shown_backgrounds, ["a"]), (before_others, shown_images, [0])):
        with pytest.raises(InputError, match="Use shown_images|Use shown_backgrounds"):
            shown(folder, runs[NAMES[0]], "original", names)
        with pytest.raises(InputError, match="which shown_explained does not show"):
            shown_explained(folder, runs[NAMES[0]], [0])
    with pytest.raises(InputError, match="unknown variant"):
        shown_backgrounds(before_others[0], before_others[1][NAMES[0]], "mixed", [])
    with pytest.raises(InputError, match="unknown run_id"):
        deciding(before_others[0], before_others[1][NAMES[0]], measured[1][NAMES[0]], "original")


@pytest.fixture(scope="module")
def explained(tmp_path_factory):
    "Maps of the two shipped networks of four images under both sets, filed."
    folder, config = tmp_path_factory.mktemp("explained"), ExplainConfig(images=4, num_masks=40, seed=3)
    networks = open_networks(",".join(NAMES))
    data = open_split(config, networks)
    found = explain_sets(config, networks, data)
    file_sets(config, networks, data, found, {key: selectivity_rows(one, data, config.seed) for key, one in found.items()}, folder)
    return folder, data, found, store.read(folder, "selectivity").set_index(["config.set", "config.name"])["run_id"]


@pytest.mark.parametrize("kind", ["patch", "smd"])
def test_maps_are_made_again(explained, kind):
    folder, data, found, runs = explained
    one, run_id = found[kind, NAMES[1]], runs[kind, NAMES[1]]
    ids = one.part.ids.tolist()[3:0:-1]
    part, again = shown_explained(folder, run_id, ids), maps_again(folder, run_id, ids, NAMES[1])
    places = [one.part.ids.tolist().index(i) for i in ids]
    assert torch.equal(part.images, one.part.images[places]) and torch.equal(part.own, one.part.own[places]) and torch.equal(part.labels, one.part.labels[places])
    torch.testing.assert_close(again, one.map[places], atol=1e-5, rtol=1e-4)
    rows = store.read_table(folder, "images", kind="selectivity").query("run_id == @run_id").set_index("id").loc[ids]
    judged = selectivity_rows(one._replace(part=part, map=again, predicted=one.predicted[places]), data, 3)
    np.testing.assert_allclose(judged["mass"], rows["mass"], atol=1e-5)
    assert explained_rows(one, data)["file"].loc[places].tolist() == rows["file"].tolist()


def test_the_image_that_makes_most_of_a_difference_comes_first(explained):
    folder, _, _, runs = explained
    found = deciding(folder, *(runs["patch", name] for name in NAMES), "mass")
    apart = (found["first"] - found["second"]).abs()
    assert apart.is_monotonic_decreasing and len(found) == 4 and apart.iloc[0] > 0


def test_maps_of_another_network_or_image_are_refused(explained):
    folder, _, found, runs = explained
    run_id = runs["patch", NAMES[0]]
    ids = found["patch", NAMES[0]].part.ids.tolist()
    with pytest.raises(InputError, match="their hash differs"):
        maps_again(folder, run_id, ids, NAMES[1])
    absent = next(i for i in range(100) if i not in ids)
    with pytest.raises(InputError, match="not among those"):
        shown_explained(folder, run_id, [ids[0], absent])


def test_relevance_is_made_again(tmp_path):
    torch.manual_seed(0)
    model, card = create_model("deit", "mini").eval(), {"config": {"model": "deit", "scale": "mini", "data": "shapes9", "mixing": "timm", "seed": 0}, "size": 56, "run_id": "deit-by-hand"}
    data = create_dataset("shapes9", "test", 56)
    write_model(model, card | {"classes": list(data.classes)}, tmp_path / "deit")
    loaded, known = load_model(tmp_path / "deit")
    rows = measure_relevance(loaded, note_of(loaded, known, "deit"), data, tmp_path, limit=8)
    run_id, ids = store.read(tmp_path / "records", "relevance")["run_id"].item(), rows["id"].tolist()[::-2]
    part, again = shown_explained(tmp_path / "records", run_id, ids), maps_again(tmp_path / "records", run_id, ids, str(tmp_path / "deit"))
    assert torch.equal(part.own.squeeze(1) if part.own.ndim == 4 else part.own, data.masks[ids].bool().squeeze()) and part.donors is None
    np.testing.assert_allclose(object_share(again, data.masks[ids].bool()).numpy(), rows.set_index("id").loc[ids, "share"], atol=1e-6)


def test_every_record_has_a_row_with_an_anchor(measured, explained):
    for folder, kind in ((measured[0], "battery"), (explained[0], "selectivity")):
        rows, records = record_rows(folder, kind), store.read(folder, kind)
        assert set(rows.index) == set(records["run_id"]) and (rows["older"] == "").all() and rows["versions"].str.contains("torch").all()
        page = records_html(rows.assign(metrics="<b>"), set(records["config.run_id"]))
        assert all(f'<tr id="{name}">' in page for name in rows.index) and "<b>" not in page
        assert all(f'<a href="#{name}">{name}</a>' in page for name in records["config.run_id"])
