"""Training with patch labels: they follow the images, kappa learns and survives a kill, and what is filed is what was trained."""
import dataclasses
import json
import math
import os
import shutil

import numpy as np
import pandas as pd
import pytest
import torch
from accelerate import Accelerator
from children import kill_when, start, train
from PIL import Image
from safetensors.torch import load_file
from test_training import CPU, ends
from test_train_notebook import run as run_notebook

from patchmix_repro import batches, filing, paired, state, store, training
from patchmix_repro.battery import open_networks
from patchmix_repro.config import HINTS, TrainConfig, identity, run_id, train_config
from patchmix_repro.core import CheckpointError, DataError, InputError, project_root
from patchmix_repro.data import IMAGENET_MEAN, IMAGENET_STD, create_dataset
from patchmix_repro.evaluation import evaluate
from patchmix_repro.files import ImageSet
from patchmix_repro.label_files import write_labels
from patchmix_repro.label_networks import Labeler, label_images
from patchmix_repro.label_sources import classifier_labeler, label_maps, patch_labels_of, run_labels, to_label
from patchmix_repro.labelers import LabelMaps
from patchmix_repro.models import predict
from patchmix_repro.remixer import Remixed
from patchmix_repro.remixer_records import kappa_runs, remixer_runs

POLICY = "rand-m9-mstd0.5-inc1"


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    "Three classes of coloured boxes on dark ground, 64 x 96 px, with train, val and test."
    root, rng = tmp_path_factory.mktemp("photos"), np.random.default_rng(0)
    for split, count in (("train", 11), ("val", 3), ("test", 4)):
        for c, name in enumerate(("red", "green", "blue")):
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                pixels, (top, left) = rng.integers(0, 60, (64, 96, 3), dtype=np.uint8), rng.integers(0, 40, 2)
                pixels[top: top + 24, left: left + 40, c] += 180
                Image.fromarray(pixels).save(root / split / name / f"{i}.png")
    return root


@pytest.fixture(scope="module")
def teacher(photos, tmp_path_factory):
    "A classifier of the same three classes, a few steps old: its dense maps differ from patch to patch."
    given = dict(model="convnext", data="folder", root=str(photos), batch_size=8, max_steps=4, lr=1e-2, warmup_epochs=0, layer_scale=0.0, ema_decay=0.0)
    return training.train(train_config(**given, **CPU, out=str(tmp_path_factory.mktemp("teacher") / "run")), progress=False).folder


def tokens(photos, teacher, out, **kw):
    "A streamed run with everything random in it, dense labels, ReMixer and TokenLabeling; kappa learns fast."
    given = dict(model="deit", data="folder", root=str(photos), remixer=True, token_labels=True, labels=f"dense:{teacher}", augmentation=POLICY, erase=0.25,
                 drop_path=0.2, batch_size=8, epochs=2, warmup_epochs=0, lr=2e-3, kappa_lr=20.0, ema_decay=0.5, checkpoint_every=1, seed=2, out=str(out))
    return train_config(**(given | CPU | kw))


@pytest.fixture(scope="module")
def whole(photos, teacher, tmp_path_factory):
    "That run, uninterrupted."
    return training.train(tokens(photos, teacher, tmp_path_factory.mktemp("whole") / "run"), progress=False)


# ---- resume ----

@pytest.mark.skipif(os.name != "posix", reason="kill -9 needs a POSIX system")
def test_kill_and_resume_is_exact(photos, teacher, whole, tmp_path):
    config = tokens(photos, teacher, tmp_path / "killed")
    kill_when(start(train, config), lambda: (tmp_path / "killed" / "checkpoints" / "step-000000002").exists())  # mid-epoch
    assert state.checkpoints(config.out)[-1].name < "step-000000008"  # of 8
    training.train(config, progress=False)
    (tensors, meta, model), (again, meta_again, model_again) = ends(whole.folder), ends(config.out)
    assert tensors["model.model.kappa"].gt(0).any() and tensors["ema.model.kappa"].ge(0).all(), "kappa has to have moved for this test to mean something"
    assert tensors.keys() == again.keys() and all(torch.equal(v, again[k]) for k, v in tensors.items())
    assert meta == meta_again and model == model_again


def test_a_plain_run_does_not_go_on_where_a_remixed_one_stopped(photos, teacher, whole):
    plain = dataclasses.replace(whole.config, remixer=False, token_labels=False, labels="none", distance="l1")
    with pytest.raises(CheckpointError, match="remixer: True there, False here"):
        training.train(plain, progress=False)


def test_another_labeller_of_the_same_name_is_refused(photos, teacher, tmp_path):
    copy = shutil.copytree(teacher, tmp_path / "teacher")
    config = tokens(photos, copy, tmp_path / "run", max_steps=1)
    run = training.train(config, progress=False)
    assert json.loads((run.folder / "model.json").read_text())["labeler"].startswith("dense:teacher ")
    path = copy / "model.safetensors"
    shutil.copy(project_root() / "results" / "checkpoints" / "convnext_mini_original" / "model.safetensors", path)
    shutil.copy(project_root() / "results" / "checkpoints" / "convnext_mini_original" / "model.json", copy)
    with pytest.raises(CheckpointError, match="data has changed.*labeler"):
        training.train(config, progress=False)
    with pytest.raises(CheckpointError, match="are now made by 'dense:teacher .*Restore the labeller"):
        filing.measure(run)


# ---- the same as the plain network where labels say nothing ----

@pytest.mark.parametrize("model", ["deit", "convit", "mixer", "convmixer"])
def test_constant_labels_train_the_plain_network(model):
    "Two steps in float64 from the same seed: equal weights, and a kappa of exactly zero."
    data, weights = create_dataset("shapes9", "val", 56), []
    ids, accelerator = torch.arange(4), Accelerator(cpu=True)
    for remixer in (False, True):
        more = {"remixer": True, "labels": "constant", "kappa_lr": 10.0} if remixer else {}
        config = train_config(model=model, mixing="switch", ema_decay=0.0, warmup_epochs=0, lr=1e-3, **more, **CPU)
        with torch.random.fork_rng():
            run = state.build(config, 9, 10, accelerator)
            run.model.double()
            if model == "mixer":
                torch.nn.init.normal_((run.model.base if remixer else run.model).head.weight)  # timm's is zero: nothing below would learn
            labels = [label_maps("constant", data).batch(ids).double().expand(-1, -1, 14, 14)] if remixer else []
            for _ in range(2):
                training.train_step(run, (ids, data.images[ids].double() / 255, data.labels[ids], *labels), batches.mixer_for(config, 9), config, accelerator)
            before = state.build(config, 9, 10, accelerator).model.state_dict()
        weights.append(run.model.state_dict())
    plain, remixed = weights
    assert remixed.pop("kappa").eq(0).all() and plain.keys() == remixed.keys()
    assert max((plain[k] - v).abs().max() for k, v in remixed.items()) < 1e-6
    assert max((v - before[k]).abs().max() for k, v in remixed.items()) > 1e-3, "the steps have to have moved the weights"


# ---- labels follow the images ----

def red_masks(n=24, side=56, seed=0):
    "Pictures whose red channel is their mask: a box in a corner region, taller than wide; green and blue are noise."
    generator = torch.Generator().manual_seed(seed)
    masks = torch.zeros(n, 1, side, side, dtype=torch.uint8)
    for mask in masks:
        top, left = torch.randint(side // 2, (2,), generator=generator).tolist()
        mask[:, top: top + side // 2, left: left + side // 4] = 1
    noise = torch.randint(256, (n, 2, side, side), generator=generator, dtype=torch.uint8)
    table = pd.DataFrame({"file": [f"{i}.png" for i in range(n)], "class": "a", "label": [i % 2 for i in range(n)], "sha256": ""})
    return ImageSet("red", "train", ("a", "b"), table, torch.cat([masks * 255, noise], 1), masks)


def agreement(x, labels):
    "Correlation of the red channel's patch means with the labels b n 1, and with the transposed and mirrored labels."
    red = torch.nn.functional.avg_pool2d(x[:, :1].double() * IMAGENET_STD[0] + IMAGENET_MEAN[0], x.shape[-1] // 14)[:, 0]
    grid = labels.double().unflatten(1, (14, 14))[..., 0]
    of = lambda other: torch.corrcoef(torch.stack([red.flatten(), other.flatten()]))[0, 1].item()
    return of(grid), max(of(grid.mT), of(grid.flip(1)), of(grid.flip(2)), of(grid.roll(1, 0)))


def mixed_steps(dataset, config, maps, steps=6):
    "Mixed images and patch labels of several steps, so that a switch has thrown every way."
    epoch = [batch for e in range(3) for batch in batches.train_batches(dataset, config, e, labels=maps)]
    pairs = [training.mixed_batch(batch, batches.mixer_for(config, dataset.num_classes), config, step) for step, batch in enumerate(epoch[:steps])]
    return torch.cat([x for x, _, _ in pairs]), torch.cat([labels for _, _, labels in pairs])


@pytest.mark.parametrize("mixing", ["none", "timm", "patch", "switch"])
def test_labels_follow_crop_flip_and_mixing(mixing):
    data = red_masks()
    config = train_config(model="deit", remixer=True, mixing=mixing, batch_size=8, **CPU)
    right, wrong = agreement(*mixed_steps(data, config, label_maps("mask", data)))
    assert right > 0.97 and wrong < 0.8


@pytest.mark.parametrize("mixing", ["none", "switch"])
def test_labels_follow_the_paired_policy(mixing, monkeypatch):
    "RandAugment's five moves alone, since colour operations change the red channel and not the mask; what comes in is black."
    data = red_masks()
    monkeypatch.setattr(paired, "ARGUMENTS", {name: law for name, law in paired.ARGUMENTS.items() if name in paired.GEOMETRY})
    monkeypatch.setattr(paired, "FILL", (0, 0, 0))
    config = train_config(model="deit", remixer=True, mixing=mixing, batch_size=8, augmentation=POLICY, erase=0.0, crop=0.35, **CPU)
    right, wrong = agreement(*mixed_steps(data, config, label_maps("mask", data)))
    assert right > 0.97 and wrong < 0.8


def test_labels_of_whole_photographs_follow_their_crops(photos):
    "A streamed set of 64 x 96 px: the labeller sees a square of the whole photograph, training a crop of any shape."
    config = train_config(model="deit", data="folder", root=str(photos), remixer=True, labels="saliency", mixing="patch", augmentation="rand-m0-mstd0-inc1", erase=0.0, batch_size=8, **CPU)
    data = create_dataset("folder", "train", 56, photos, **batches.options(config, "train"))
    maps = label_images(Labeler("red", lambda x: x[:, :1], side=96), to_label(data, 96))
    assert not data.in_memory and maps.maps.shape == (33, 1, 96, 96)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(paired, "ARGUMENTS", {"Rotate": paired.ARGUMENTS["Rotate"]})  # by 0 degrees
        right, wrong = agreement(*mixed_steps(data, config, maps, 9))
    assert right > 0.97 and wrong < 0.8


def test_workers_do_not_change_labels(photos, teacher):
    configs = [tokens(photos, teacher, "unused", workers=n) for n in (0, 2)]
    data = create_dataset("folder", "train", 56, photos, **batches.options(configs[0], "train"))
    maps = label_maps(configs[0].labels, data)
    first, second = (list(batches.train_batches(data, c, 1, start=2, labels=maps)) for c in configs)
    assert len(first) == len(second) == 2 and first[0][3].shape == (8, 3, 14, 14)
    assert all(torch.equal(a, b) for x, y in zip(first, second) for a, b in zip(x, y))
    assert all((batch[3].sum(1) - 1).abs().max() < 1e-5 for batch in first), "dense labels are distributions, also where something was erased"


def test_a_label_file_a_split(photos, teacher, tmp_path):
    "The same batches and the same run from files as from the labeller itself; one file for two splits is refused."
    config = tokens(photos, teacher, tmp_path / "a", augmentation="crop", erase=0.0, max_steps=1)
    for split in ("train", "val"):
        data = create_dataset("folder", split, 56, photos, **batches.options(config, split))
        write_labels(label_maps(config.labels, data), data, tmp_path / split / "labels.safetensors")
    files = dataclasses.replace(config, labels=f"file:{tmp_path}/{{split}}/labels.safetensors", out=str(tmp_path / "b"))
    one, two = (training.train(c, progress=False).history.drop(columns="seconds") for c in (config, files))
    assert one.equals(two)
    with pytest.raises(DataError, match=r"labels other images: folder/train.*\{split\}"):
        training.train(dataclasses.replace(files, labels=f"file:{tmp_path}/train/labels.safetensors", out=str(tmp_path / "c")), progress=False)
    with pytest.raises(DataError, match="labels square pictures.*takes whole ones. Set augmentation"):
        training.train(dataclasses.replace(files, augmentation=POLICY, out=str(tmp_path / "c")), progress=False)


def test_the_strongest_posterize_of_either_policy_is_a_picture():
    "timm's level 10 keeps 0 bits, which Pillow refuses: one run in 700 images met it."
    picture = Image.new("RGB", (8, 8), (200, 100, 0))
    assert paired.operate(picture, "PosterizeIncreasing", paired.ARGUMENTS["PosterizeIncreasing"](10, 1)).getpixel((0, 0)) == (128, 0, 0)
    policy = batches.policy_of(train_config(augmentation="rand-m10-n60-inc1"))
    with torch.random.fork_rng():
        assert all(torch.isfinite(policy(picture)).all() for _ in range(20))


# ---- kappa ----

@pytest.fixture(scope="module")
def learnt(tmp_path_factory):
    "DeiT on true masks, in memory, until kappa has moved."
    given = dict(model="deit", remixer=True, mixing="patch", batch_size=16, max_steps=12, warmup_epochs=0, lr=3e-3, kappa_lr=20.0, ema_decay=0.5, seed=2)
    return training.train(train_config(**given, **CPU, out=str(tmp_path_factory.mktemp("learnt") / "run")), progress=False)


def test_kappa_moves_and_stays_at_least_zero(learnt):
    kappa = learnt.history.filter(like="kappa_").iloc[-1]
    assert list(kappa.index) == [f"kappa_{i}" for i in range(6)] and (kappa >= 0).all() and (kappa > 0.01).any()
    assert kappa.iloc[-1] == 0, "the last layer of a CLS-pooled network cannot learn"
    tensors = load_file(state.checkpoints(learnt.folder)[-1] / "state.safetensors")
    assert tensors["model.kappa"].ge(0).all() and torch.equal(tensors["ema.kappa"], torch.tensor(kappa.to_numpy(np.float32)))


def test_a_step_never_leaves_kappa_below_zero():
    "A gradient that pushes kappa down: it is projected after the step, and the average sees it projected."
    config, accelerator = train_config(model="deit", remixer=True, kappa_lr=1000.0, warmup_epochs=0, ema_decay=0.5, **CPU), Accelerator(cpu=True)
    with torch.random.fork_rng():
        run = state.build(config, 9, 10, accelerator)
        run.model.kappa.register_hook(lambda g: torch.ones_like(g))
        training.train_step(run, (torch.arange(4), torch.rand(4, 3, 56, 56), torch.arange(4), torch.rand(4, 1, 14, 14)), batches.mixer_for(config, 9), config, accelerator)
    assert run.model.kappa.eq(0).all() and run.ema.module.kappa.eq(0).all()


def test_the_loaded_network_is_the_average_with_labels(learnt):
    "load_model gives the network that validation saw: equal weights, and the accuracy of the history again."
    model, card = training.load_model(learnt.folder)
    tensors = load_file(state.checkpoints(learnt.folder)[-1] / "state.safetensors")
    assert isinstance(model, Remixed) and card["config"]["labels"] == "mask"
    assert all(torch.equal(v, tensors[f"ema.{k}"]) for k, v in model.state_dict().items())
    data, ids = create_dataset("shapes9", "val", 56), torch.arange(32)
    found = predict(model, data, ids, labels=patch_labels_of(label_maps("mask", data)))
    twin = state.network_for(learnt.config, 9)
    twin.load_state_dict({k.removeprefix("ema."): v for k, v in tensors.items() if k.startswith("ema.")})
    assert torch.equal(found, predict(twin, data, ids, labels=patch_labels_of(label_maps("mask", data))))
    assert (found - predict(model, data, ids)).abs().max() > 1e-4, "labels have to matter for this test to mean something"


def test_validation_uses_the_labels(learnt):
    "Without them the loss is another: see the test above."
    model, card = training.load_model(learnt.folder)
    data = create_dataset("shapes9", "val", 56)
    loss = torch.nn.functional.cross_entropy(predict(model, data, labels=patch_labels_of(label_maps("mask", data))), data.labels).item()
    assert learnt.history.val_loss.iloc[-1] == pytest.approx(loss, rel=1e-6)


@pytest.mark.parametrize("name", ["convnext_mini_original", "convnext_mini_patchmix"])
def test_shipped_networks_still_load(name):
    model, card = training.load_model(project_root() / "results" / "checkpoints" / name)
    assert not isinstance(model, Remixed) and "remixer" not in card["config"] and len(card["classes"]) == 9


# ---- configuration ----

@pytest.mark.parametrize("given, words", [
    (dict(remixer=True), "remixer with model 'convnext'; allowed are deit, deit_b, convit, mixer, convmixer"),
    (dict(model="convmixer_full", remixer=True), "set remixer to False"),
    (dict(model="convmixer", token_labels=True, labels="dense:a"), "token_labels with model 'convmixer'"),
    (dict(model="deit", labels="mask"), "used by nothing"),
    (dict(model="deit", remixer=True, labels="none"), "need labels"),
    (dict(model="deit", token_labels=True), "which name no class. Give 'dense:RUN'"),
    (dict(model="deit", token_labels=True, labels="shuffled:mask"), "which name no class"),
    (dict(model="deit", remixer=True, distance="cosine"), "which have one class, is always 0. Set distance to 'l1'"),
    (dict(model="deit", remixer=True, labels="mean:saliency", distance="cosine"), "one class"),
    (dict(model="deit", remixer=True, augmentation="rand-m9-mstd0.5"), "cannot follow the augmentation"),
    (dict(model="deit", remixer=True, augmentation="augmix-m3"), "cannot follow the augmentation"),
    (dict(model="deit", remixer=True, distance="l2"), "auto, l1, cosine"),
    (dict(model="deit", remixer=True, kappa_lr=-1.0), "0 or more"), (dict(token_weight=0.0), "above 0"), (dict(remixer="yes"), "bool"),
])
def test_impossible_configurations_name_the_remedy(given, words):
    with pytest.raises(InputError) as error:
        train_config(**given)
    assert words in str(error.value)


def test_auto_labels_and_distance():
    of = lambda **given: (config := train_config(model="deit", **given)) and (config.labels, config.distance)
    assert of() == ("none", "l1") and of(remixer=True) == ("mask", "l1")
    assert of(remixer=True, labels="dense:a") == of(remixer=True, labels="dense:a", token_labels=True) == ("dense:a", "cosine")
    assert of(remixer=True, labels="shuffled:dense:a") == ("shuffled:dense:a", "cosine") and of(remixer=True, labels="dense:a", distance="l1") == ("dense:a", "l1")


def test_an_unknown_source_stops_before_anything_is_written(tmp_path):
    with pytest.raises(InputError, match="did you mean 'mask'"):
        training.train(train_config(model="deit", remixer=True, labels="masks", **CPU, out=str(tmp_path / "run")), progress=False)
    assert not (tmp_path / "run").exists()


def test_published_runs_keep_their_names():
    "Every training record: its fields give the name that it has, and a configuration without labels names none."
    records, names = store.read(project_root() / "results"), {f.name for f in dataclasses.fields(TrainConfig)}
    records = records[records.kind == "train"]
    assert len(records) >= 36
    for _, row in records.iterrows():
        given = {k.removeprefix("config."): v for k, v in row.items() if k.startswith("config.") and k.removeprefix("config.") in names}
        given = {k: v.tolist() if isinstance(v, np.ndarray) else v for k, v in given.items() if not (v is None or isinstance(v, float) and math.isnan(v))}
        whole = {k: int(v) if isinstance(v, float) and HINTS[k] in (int, int | None, int | tuple[int, ...]) else bool(v) if HINTS[k] is bool else v for k, v in given.items()}
        config = train_config(**whole)
        assert run_id(config) == row.run_id
        assert config.remixer or config.token_labels or not {"remixer", "labels", "distance", "kappa_lr", "token_labels", "token_weight"} & set(identity(config))


# ---- what is filed ----

def test_a_record_holds_kappa_by_quarter(whole):
    rows = filing.measure(whole)
    found = kappa_runs(whole.folder / "records")
    assert len(rows) == 12 and found.layer.tolist() == list(range(6)) and found.quarter.tolist() == [1, 1, 2, 3, 3, 4]  # layer i lies in quarter floor(4 i / 6) + 1
    assert np.allclose(found.kappa, whole.history.filter(like="kappa_").iloc[-1], atol=1e-7) and found.kappa.max() > 0
    runs = remixer_runs(whole.folder / "records")
    assert len(runs) == 1 and runs.iloc[0][["model", "remixer", "token_labels", "labels", "trained", "variant", "n"]].tolist() == ["deit", True, True, whole.config.labels, whole.config.labels, "test", 12]
    assert runs.accuracy[0] == rows.correct.mean() and "remixer-tokens" in runs.run_id[0]


def test_a_record_is_made_with_the_labels_of_the_test_images(whole):
    model, card = training.load_model(whole.folder)
    test = create_dataset("folder", "test", 56, whole.config.root)
    shares = predict(model, test, labels=patch_labels_of(label_maps(whole.config.labels, test))).softmax(1).gather(1, test.labels[:, None])[:, 0]
    rows = filing.tested(model, card, whole.config, test)
    assert np.allclose(rows.probability, shares, atol=1e-6)
    some = filing.tested(model, card, dataclasses.replace(whole.config, test_images=5), test)
    assert len(some) == 5 and np.allclose(some.probability, rows.set_index("file").probability[some.file], atol=1e-6)
    assert some.file.tolist() == evaluate(model, test, limit=5).file.tolist()


def test_a_shipped_remixed_network_says_what_its_accuracy_needs(whole, tmp_path):
    folder = filing.publish_checkpoint(whole, "specimen", tmp_path)
    model, card = training.load_model(folder)
    test = create_dataset("folder", "test", 56, whole.config.root)
    right = predict(model, test, labels=patch_labels_of(label_maps(whole.config.labels, test))).argmax(1) == test.labels
    assert card["test_top1"] == right.double().mean() and isinstance(model, Remixed)
    assert f"ReMixer by the labels `{whole.config.labels}`, which its accuracy needs" in (folder / "README.md").read_text()


def test_a_remixed_network_is_not_measured_without_its_labels(whole):
    "Neither as one network of a battery nor as the labeller of another training."
    with pytest.raises(InputError, match="needs patch labels .*Measure it with nbs/challenge.ipynb"):
        open_networks(str(whole.folder))
    with pytest.raises(InputError, match="trained with ReMixer and needs patch labels itself"):
        classifier_labeler(str(whole.folder))


def test_labels_are_made_for_every_split_by_the_same_source(whole):
    data = {split: create_dataset("folder", split, 56, whole.config.root, **batches.options(whole.config, split)) for split in ("train", "val")}
    made = run_labels(whole.config, data)
    assert {split: len(maps) for split, maps in made.items()} == {"train": 33, "val": 9} and all(isinstance(maps, LabelMaps) for maps in made.values())
    assert len({(maps.labeler, maps.sha256, maps.kind) for maps in made.values()}) == 1


# ---- the notebook ----

def test_the_notebook_trains_with_remixer(tmp_path):
    notebook = run_notebook(tmp_path, model="deit", remixer=True, max_steps=2, batch_size=8, test_images=100)
    shown = [o for c in notebook.cells if c.cell_type == "code" for o in c.outputs if "data" in o]
    assert sum("image/png" in o.data for o in shown) == 3  # the curve, kappa, and the sheet
    assert kappa_runs(tmp_path / "run" / "records").layer.tolist() == list(range(6))
