"Pictures for records: drawn by key, as the conditions say, and back again as heat maps."
import io
import json

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt
import pytest
import simulated
import torch
import torch.nn as nn
from einops import rearrange
from PIL import Image
from test_occluded import make_rod

from patchmix_repro import pictures, store
from patchmix_repro.core import InputError
from patchmix_repro.curves import read_sheet, unstrip
from patchmix_repro.data import create_dataset
from patchmix_repro.occlusion import Drop, Permute


@pytest.fixture(scope="module")
def files():
    return pictures.example_pictures(0)


@pytest.fixture(autouse=True)
def closed():
    yield
    plt.close("all")


def test_every_sheet_has_a_caption_for_every_image(files):
    captions = json.loads(files["captions.json"])
    assert set(files) == {f"{name}.png" for name in captions} | {"captions.json"}
    assert set(captions) == {"teaser_train", "teaser_test", "patch_mixing", "smd", "replacement", "permutation", "drop", "rod"}
    assert all(unstrip(files[f"{name}.png"]).shape == (len(titles), 3, 56, 56) for name, titles in captions.items())


def test_the_same_seed_gives_the_same_bytes_and_another_does_not(files):
    assert pictures.example_pictures(0) == files and pictures.example_pictures(1)["smd.png"] != files["smd.png"]


def test_the_teaser_mixes_what_its_mask_says(files):
    own, donor, mask, mixed = unstrip(files["teaser_train.png"])
    assert set(mask.unique().tolist()) == {0, 255}
    assert torch.equal(mixed, torch.where(mask > 0, donor, own))
    assert (rearrange(mask[0], "(g p) (k q) -> (g k) (p q)", p=8, q=8) > 0).float().mean(1).sum() == 17


def test_a_sheet_is_its_conditions(files):
    drop, shuffled = unstrip(files["drop.png"]), unstrip(files["permutation.png"])
    assert torch.equal(drop[0], shuffled[0])  # both begin with the clean image
    images = (create_dataset("shapes9", "test", 56).images == drop[0]).flatten(1).all(1).nonzero().flatten()
    x = drop[:1] / 255
    for k, condition in enumerate(pictures.SHEETS["drop"][1:], 1):
        assert isinstance(condition, Drop) and torch.equal(drop[k], pictures._bytes(condition(x, images))[0])
    assert torch.equal(shuffled[4], pictures._bytes(Permute(14)(x, images))[0])


class Brightest(nn.Module):
    "Answers with a fixed class, and says how its images are normalised."
    pretrained_cfg = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}

    def __init__(self, answer):
        super().__init__()
        self.answer = answer

    def forward(self, x):
        assert self.training is False and x.min() >= -1 and x.max() <= 1
        return nn.functional.one_hot(torch.full((len(x),), self.answer), 9).float()


def test_answers_stand_in_the_teaser():
    classes = create_dataset("shapes9", "test", 56).classes
    _, captions = pictures.teaser_test({"first": Brightest(0), "second": Brightest(5)})
    for caption in captions:
        title, first, second = caption.split("\n")
        own = title.split(",")[0]
        assert first == f"first: {'✓' if own == classes[0] else classes[0]}" and second == f"second: {'✓' if own == classes[5] else classes[5]}"


def test_the_pages_find_the_sheets(files, tmp_path):
    store.append(store.new_record("pictures", {"data": "shapes9"}, seed=0, data=simulated.MANIFEST, metrics={}, attachments=files), tmp_path)
    images, titles = read_sheet(tmp_path, "rod", "shapes9")
    assert torch.equal(images, unstrip(files["rod.png"])) and len(titles) == 7


def test_a_sheet_of_the_published_rod(tmp_path):
    "Twelve oranges of one sequence and one of another, in no order; the sheet is the first sequence in its order."
    frames = [f"a-s{k}.jpg" for k in (10, 2, 0, 9, 7, 1, 3, 8, 11, 5, 4, 6)] + ["b-s0.jpg"]
    pictures_of = [{"bytes": shade(9 * k), "path": path} for k, path in enumerate(frames)]
    root = make_rod(tmp_path, [[9] * 13], image=pictures_of)
    with pytest.raises(InputError, match="unknown class 'vase'.*Allowed: orange"):
        pictures.file_rod(tmp_path / "store", root, "vase", shards=(0,))
    assert not (tmp_path / "store").exists()
    pictures.file_rod(tmp_path / "store", root, count=4, size=56, shards=(0,))
    images, titles = read_sheet(tmp_path / "store", "rod_published", "rod")
    assert titles == [f"orange\n{k} of 12" for k in (1, 5, 8, 12)]
    assert images[:, 0, 0, 0].tolist() == pytest.approx([9 * frames.index(f"a-s{k}.jpg") for k in (0, 4, 7, 11)], abs=3)
    rod = create_dataset("rod", "test", 56, root=root, shards=(0,))
    assert len(pictures.rod_sheet(rod, count=99)[1]) == 12 and pictures.rod_sheet(rod, count=1)[1] == ["orange\n1 of 12"]
    unnamed = make_rod(tmp_path / "unnamed", [[9, 9]], image=[{"bytes": shade(0), "path": None}] * 2)
    assert len(pictures.rod_sheet(create_dataset("rod", "test", 56, root=unnamed, shards=(0,)))[1]) == 2


def shade(value):
    buffer = io.BytesIO()
    Image.new("RGB", (60, 60), (value,) * 3).save(buffer, "PNG")
    return buffer.getvalue()


def test_heat_maps_show_the_first_seed_of_every_network(tmp_path):
    simulated.fill(tmp_path, [("convnext", "timm", 1), ("convnext", "timm", 0), ("swin", "switch", 0)])
    _, table = pictures.heat_maps(tmp_path, "shapes9", "mini")
    assert table["title"].tolist() == [line for k, verdict in ((0, "right"), (1, "wrong"))
                                       for line in (f"image {k}", f"ConvNeXt\nOriginal\n{verdict}", f"Swin\nPatch Mixing\n{verdict}")]
    assert len(pictures.heat_maps(tmp_path, "shapes9", "mini", "smd", count=1)[1]) == 3
    assert pictures.heat_maps(tmp_path, "shapes9", "small")[1].empty


def test_heat_maps_of_different_images_are_refused(tmp_path, monkeypatch):
    simulated.fill(tmp_path, [("convnext", "timm", 0)])
    plain = simulated.explained
    other = plain(simulated.noise("x"))
    found = pictures.unpack_pictures(other)
    moved = pictures.unpack_pictures(other)._replace(part=found.part._replace(ids=found.part.ids + 7))
    monkeypatch.setattr(simulated, "explained", lambda rng: simulated.pack_pictures(moved))
    simulated.fill(tmp_path, [("swin", "timm", 0)])
    with pytest.raises(InputError, match="different images"):
        pictures.heat_maps(tmp_path, "shapes9", "mini")
