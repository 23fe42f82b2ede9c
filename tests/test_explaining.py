"""From a network and a condition to maps, pictures, rows and records; the calls of captum."""
import dataclasses

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn as nn

from patchmix_repro import store
from patchmix_repro.battery import Network, open_networks
from patchmix_repro.core import InputError
from patchmix_repro.data import create_dataset, normalize, to_float
from patchmix_repro.explaining import (
    Explained,
    RiseAttribution,
    explain_batch,
    occluded_batches,
    overlay,
    own_pixels,
    selectivity_rows,
    selectivity_run,
)
from patchmix_repro.explanations import (
    SETS,
    ExplainConfig,
    curve_rows,
    explain_sets,
    file_selectivity,
    image_rows,
    names_in,
    open_split,
    pack_pictures,
    readings_table,
    unpack_pictures,
)
from patchmix_repro.occlusion import Clean, Drop, Permute, Replace, Slide
from patchmix_repro.saliency import crise, rise
from patchmix_repro.selectivity import context_pixels, patch_selectivity
from patchmix_repro.smd import Paste


class Seer(nn.Module):
    "Nine classes; each logit a fixed random sum of the pixels."

    def __init__(self, side=56, classes=9, scale=0.02):
        super().__init__()
        self.pretrained_cfg = {"mean": (0.5, 0.5, 0.5), "std": (0.25, 0.25, 0.25)}
        self.weights = nn.Parameter(torch.randn(classes, 3, side, side, generator=torch.Generator().manual_seed(0)) * scale)

    def forward(self, x):
        return torch.einsum("bchw,kchw->bk", x, self.weights)


@pytest.fixture(scope="module")
def data():
    return create_dataset("shapes9", "val", 56)


# ---- the in-context mask ----

def test_own_pixels_of_every_condition(data):
    ids = torch.tensor([3, 1007, 12])
    maps = {"donor": to_float(data.images[[4, 5, 6]]), "mask": data.masks[ids]}
    replaced, dropped, pasted = Replace(0.3, 7), Drop(0.2, 14, which="salient"), Paste(area=0.2)
    assert torch.equal(own_pixels(replaced, ids, maps, 56, 56)[:, 0], context_pixels(~replaced.mask(ids), 56, 56))
    assert torch.equal(own_pixels(dropped, ids, maps, 56, 56)[:, 0], context_pixels(~dropped.mask(ids, maps), 56, 56))
    assert torch.equal(own_pixels(pasted, ids, maps, 56, 56), ~pasted.masks(ids, 56))
    assert own_pixels(Slide(width=0.25), ids, maps, 56, 56).float().mean() == 0.75
    assert own_pixels(Clean(), ids, maps, 56, 56).all() and own_pixels(Permute(4), ids, maps, 56, 56).all()


def test_batches_hold_what_the_condition_made_of_them(data):
    ids = torch.tensor([9, 1, 700, 32, 8])
    parts = list(occluded_batches(data, ids, Replace(0.3, 7), batch_size=2, seed=3))
    (whole,) = occluded_batches(data, ids, Replace(0.3, 7), batch_size=5, seed=3)
    for field in ("ids", "images", "labels", "donors", "own"):
        assert torch.equal(torch.cat([getattr(part, field) for part in parts]), getattr(whole, field)), field
    assert torch.equal(whole.labels, data.labels[ids]) and (whole.donors != whole.labels).all()
    photos = to_float(data.images[ids])
    assert torch.equal(torch.where(whole.own, whole.images, 0), torch.where(whole.own, photos, 0))
    (pasted,) = occluded_batches(data, ids, Paste(), batch_size=5)
    assert pasted.donors is None


def test_images_of_one_class_have_no_donors(data):
    with pytest.raises(InputError, match="class"):
        list(occluded_batches(data, (data.labels == 2).nonzero().flatten()[:3], Replace(0.3, 7)))


# ---- rows ----

def test_a_map_is_crise_of_the_normalised_images(data):
    (part,) = occluded_batches(data, torch.tensor([0, 1, 2]), Replace(0.3, 7))
    model = Seer()
    found = explain_batch(model, part, num_masks=64, seed=5)
    x = (part.images - 0.5) / 0.25
    wanted = crise(model, x, part.labels, "donor", part.donors, num_masks=64, seed=5, method="regression")
    assert torch.allclose(found.map, wanted.map, atol=1e-6) and torch.equal(found.predicted, model(x).argmax(1))
    other = explain_batch(model, part, "rest", mean=(0, 0, 0), std=(1, 1, 1), num_masks=64, method="rise")
    assert torch.allclose(other.map, crise(model, part.images, part.labels, "rest", num_masks=64).map, atol=1e-6)


def test_rows_are_the_readings_of_the_maps(data):
    (part,) = occluded_batches(data, torch.tensor([5, 6, 40]), Paste())
    found = Explained(part, torch.rand(3, 56, 56, generator=torch.Generator().manual_seed(0)), part.labels.roll(1))
    rows = selectivity_rows(found, data)
    assert rows[["share", "mass", "mean"]].equals(patch_selectivity(found.map, part.own))
    assert rows["id"].tolist() == [5, 6, 40] and rows["donor_label"].tolist() == [-1] * 3
    assert rows["file"].tolist() == data.manifest.file.iloc[[5, 6, 40]].tolist() and not rows["correct"].any()
    assert list(rows)[5:] == ["share", "mass", "mean", "mass_chance", "mean_chance", "mass_gauss", "mean_gauss"]


def test_a_network_that_sees_the_own_patches_is_selective(data):
    "A linear network for class 0 whose weights lie on the in-context pixels: its RISE map does, too."
    (part,) = occluded_batches(data, torch.tensor([0]), Slide())
    model = Seer(scale=0.0)
    with torch.no_grad():
        model.weights[int(part.labels)] = 0.01 * (part.own[0, 0] * ((part.images[0] - 0.5) / 0.25)).sign()
    selective = explain_batch(model, part, "rest", num_masks=512, score="logit")
    blind = Explained(part, -selective.map, selective.predicted)
    good, bad = (selectivity_rows(one, data).iloc[0] for one in (selective, blind))
    assert good["mean"] > 0.6 and bad["mean"] == pytest.approx(1 - good["mean"])
    assert good["mass"] > 0.05 > bad["mass"]


def test_the_batch_does_not_matter(data):
    ids, model = torch.tensor([3, 44, 5, 8, 100]), Seer()
    whole, parts = (selectivity_run(model, data, ids, Replace(0.3, 7), num_masks=32, batch_size=b) for b in (5, 2))
    pd.testing.assert_frame_equal(whole, parts, atol=1e-4)
    assert len(whole) == 5 and whole["share"].eq(14 / 49).all()


def test_a_donor_contrast_needs_donors(data):
    with pytest.raises(InputError, match="donor"):
        selectivity_run(Seer(), data, torch.tensor([0, 1]), Paste(), num_masks=8, contrast="donor")


def test_a_network_that_does_not_say_how_it_is_normalised(data):
    model = Seer()
    del model.pretrained_cfg
    with pytest.raises(InputError, match="mean="):
        selectivity_run(model, data, torch.tensor([0, 1]), Paste(), num_masks=8)
    assert len(selectivity_run(model, data, torch.tensor([0, 1]), Paste(), num_masks=8, mean=(0.5,) * 3, std=(0.2,) * 3)) == 2


# ---- overlay and captum ----

def test_overlay_by_hand():
    "jet: 0 is (0, 0, .5), 1 is (.5, 0, 0); half of it and half of the image."
    image, heat = torch.full((1, 3, 1, 2), 0.4), torch.tensor([[[3.0, 7.0]]])
    assert torch.allclose(overlay(image, heat)[0, :, 0], torch.tensor([[0.2, 0.45], [0.2, 0.2], [0.45, 0.2]]), atol=1e-6)
    assert torch.allclose(overlay((image * 255).byte(), heat, alpha=0.0), image)


def test_attributions_have_the_inputs_shape_and_the_maps_values(data):
    model, x = Seer(), normalize(data.images[:3])
    wanted = rise(model, x, torch.tensor([1, 2, 3]), num_masks=40, seed=2).map
    attributor = RiseAttribution(model, num_masks=40, seed=2)
    for target in ([1, 2, 3], torch.tensor([1, 2, 3])):
        found = attributor.attribute(x, target=target)
        assert found.shape == x.shape and all(torch.equal(found[:, channel], wanted) for channel in range(3))
    same = attributor.attribute(x, target=4)
    assert torch.equal(same, attributor.attribute(x, target=torch.tensor([4]))) and torch.equal(same, attributor.attribute((x,), target=4)[0])
    assert attributor.attribute(x, num_masks=3).shape == x.shape and not attributor.has_convergence_delta()
    contrast = RiseAttribution(model, crise, contrast="runner_up", num_masks=40, seed=2)
    assert torch.equal(contrast.attribute(x, target=1)[:, 0], crise(model, x, 1, "runner_up", num_masks=40, seed=2).map)
    found[0] = 0  # its own memory, as captum's


def test_attributions_of_wrong_targets(data):
    with pytest.raises(InputError, match="target"):
        RiseAttribution(Seer(), num_masks=4).attribute(normalize(data.images[:3]), target=[1, 2])


# ---- a run ----

@pytest.fixture(scope="module")
def run():
    config = ExplainConfig(images=2, num_masks=32, set="patch,smd,clean")
    networks = open_networks(config.model, config.pretrained)
    dataset = open_split(config, networks)
    found = explain_sets(config, networks, dataset)
    return config, networks, dataset, found, image_rows(found, networks, dataset)


def test_every_set_and_network_is_explained(run):
    config, networks, dataset, found, rows = run
    assert list(found) == list(rows) == [(kind, name) for kind in ("patch", "smd", "clean") for name in networks]
    assert len({tuple(one.part.ids.tolist()) for one in found.values()}) == 1, "the same images everywhere"
    one, other = (found["patch", name] for name in networks)
    assert torch.equal(one.part.images, other.part.images) and not torch.equal(one.map, other.map)


def test_clean_images_have_curves_and_no_selectivity(run):
    rows = run[4]["clean", "convnext_mini_original"]
    assert "mass" not in rows and {"deletion", "insertion", "deletion_chance", "insertion_gauss"} <= set(rows)
    table = readings_table(run[4]).reset_index()
    assert table[table["set"].eq("clean")]["mass"].isna().all() and table[table["set"].ne("clean")].notna().all(axis=None)
    assert set(table["map"]) == {"network", "chance", "gauss"} and len(table) == 3 * 2 * 3


def test_curve_rows_follow_the_in_context_class(run):
    config, networks, dataset, found, _ = run
    one = found["patch", "convnext_mini_patchmix"]
    rows = curve_rows(networks["convnext_mini_patchmix"].model, one, steps=1)
    x = normalize(one.part.images)
    with torch.no_grad():
        full, none = (networks["convnext_mini_patchmix"].model(v).softmax(1)[range(2), one.part.labels] for v in (x, torch.zeros_like(x)))
    assert all(np.allclose(rows[name], (full + none) / 2, atol=1e-5) for name in rows), "one step: the trapezoid of both ends"


def test_records_carry_rows_and_pictures(run, tmp_path):
    config, networks, dataset, found, rows = run
    key = ("smd", "convnext_mini_original")
    note = {"name": "somebody", "model": "convnext", "mixing": "timm"}
    asked = (dataset, "smd", SETS["smd"](0), tmp_path, 32, "runner_up")
    name = file_selectivity(note, rows[key], *asked, found=found[key])
    assert file_selectivity(note, rows[key], *asked, found=found[key]) == name and len(store.read(tmp_path)) == 1
    assert file_selectivity(note, rows[key], *asked[:-2], 64, "runner_up") != name
    record = store.read(tmp_path, "selectivity").set_index("run_id").loc[name]
    assert record["config.set"] == "smd" and record["config.masks"] == 32 and record["metrics.mass"] == pytest.approx(rows[key]["mass"].mean())
    kept = store.read_table(tmp_path, "images", "selectivity").query("run_id == @name")
    assert np.allclose(kept["mass_gauss"], rows[key]["mass_gauss"]) and len(kept) == 2
    pictures = unpack_pictures(store.attachment(tmp_path, name, "explained.npz"))
    assert torch.allclose(pictures.part.images, found[key].part.images, atol=1 / 500) and torch.equal(pictures.predicted, found[key].predicted)
    other = dataclasses.replace(dataset, name="caltech9") if dataclasses.is_dataclass(dataset) else None
    if other is not None:
        unseen = file_selectivity(note, rows[key], other, *asked[1:], found=found[key])
        with pytest.raises(InputError):
            store.attachment(tmp_path, unseen, "explained.npz")


def test_packed_pictures_are_the_same_bytes_every_time(run):
    one = run[3]["patch", "convnext_mini_original"]
    assert pack_pictures(one, 2) == pack_pictures(one, 2)
    kept = unpack_pictures(pack_pictures(one, 2))
    assert torch.equal(kept.part.donors, one.part.donors[:2]) and kept.map.min() == 0 and kept.map.max() == 1


@pytest.mark.parametrize(("given", "words"), [
    ({"set": "patch,smd,patches"}, "did you mean 'patch'"),
    ({"set": " , "}, "names nothing"),
    ({"images": 1}, "2 to 512"),
    ({"images": 513}, "2 to 512"),
    ({"num_masks": 1}, "from 2 masks"),
])
def test_bad_configs(given, words):
    with pytest.raises(InputError, match=words):
        ExplainConfig(**given)


def test_names_and_networks():
    assert names_in(" a,b , ") == ["a", "b"]
    with pytest.raises(InputError, match="unknown model 'nowhere'"):
        open_networks("nowhere")


@pytest.mark.parametrize("cards", [[(56, ["a", "b"])], [(56, None), (112, None)]])
def test_networks_that_cannot_be_shown_the_data(cards, data):
    networks = {str(i): Network(None, {}, size, tuple(classes or data.classes)) for i, (size, classes) in enumerate(cards)}
    with pytest.raises(InputError, match="cannot all be shown shapes9"):
        open_split(ExplainConfig(), networks)
