"""From a number to the pixels: the images that are drawn again are the ones that were judged."""
import numpy as np
import pytest
import torch

from patchmix_repro import store
from patchmix_repro.blocks import normalization
from patchmix_repro.core import InputError
from patchmix_repro.data import create_dataset, normalize
from patchmix_repro.evidence import chain, deciding, shown_images
from patchmix_repro.filing import measure_battery, note_of
from patchmix_repro.networks import find_run, load_model
from patchmix_repro.smd import battery

NAMES = ("convnext_mini_original", "convnext_mini_patchmix")


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    "Batteries of the two shipped networks on 60 images, filed."
    folder, data = tmp_path_factory.mktemp("evidence"), create_dataset("shapes9", "test", 56)
    for name in NAMES:
        model, card = load_model(find_run(name))
        measure_battery(model, note_of(model, card, name), battery("paper"), data, folder, limit=60)
    records = store.read(folder, "battery")
    return folder, dict(zip(records["config.name"], records["run_id"]))


@pytest.mark.parametrize("condition", ["clean", "replace-14-50", "replace-7-30", "permute-64", "drop-14-60-black-random", "paste-embedded-20", "slide-25-50"])
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
        measure_battery(model, note_of(model, card, name), battery("quick"), data, tmp_path, limit=limit)
    with pytest.raises(InputError, match="are the same"):
        deciding(tmp_path, *store.read(tmp_path, "battery")["run_id"], "clean")
