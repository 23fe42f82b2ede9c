"""Every sample once, rows that can be recounted, one record a run."""
import dataclasses
import shutil

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from patchmix_repro import store
from patchmix_repro.config import train_config
from patchmix_repro.core import InputError, NonFiniteError
from patchmix_repro.data import IMAGENET_MEAN, IMAGENET_STD, create_dataset, normalize, to_float
from patchmix_repro.evaluation import accuracy, evaluate, image_rows
from patchmix_repro.filing import measure
from patchmix_repro.models import create_model, in_eval_mode
from patchmix_repro.networks import load_model
from patchmix_repro.occlusion import Clean
from patchmix_repro.smd import Paste
from patchmix_repro.training import train


class Labelled:
    "Labels and file names, nothing else."

    def __init__(self, labels, k):
        self.labels, self.num_classes = torch.tensor(labels), k
        self.manifest = pd.DataFrame({"file": [f"{i}.png" for i in range(len(labels))]})

    def __len__(self):
        return len(self.labels)


@given(st.integers(0, 10**6), st.integers(1, 30), st.integers(2, 12))
def test_rows_against_a_slow_count(seed, n, k):
    rng = np.random.default_rng(seed)
    logits, labels = rng.normal(size=(n, k)), rng.integers(0, k, n)
    rows = image_rows(torch.tensor(logits), Labelled(labels.tolist(), k))
    for i in range(n):
        better = sum(v > logits[i, labels[i]] for v in logits[i])
        assert rows.correct[i] == (better == 0) and rows.correct5[i] == (better < 5)
        assert rows.probability[i] == pytest.approx(1 / np.exp(logits[i] - logits[i, labels[i]]).sum())
    assert accuracy(rows).estimate["top1"] == pytest.approx(rows.correct.mean())
    assert accuracy(rows).low["top1"] <= rows.correct.mean() <= accuracy(rows).high["top1"]


def test_every_sample_once_in_order():
    dataset, seen = create_dataset("shapes9", "val", 56), []

    class Spy(torch.nn.Module):
        pretrained_cfg = {"mean": IMAGENET_MEAN, "std": IMAGENET_STD}

        def forward(self, x):
            seen.extend(x[:, 0].double().sum((1, 2)).tolist())
            return torch.zeros(len(x), 9)

    rows = evaluate(Spy(), dataset, batch_size=300)
    expected = normalize(dataset.images)[:, 0].double().sum((1, 2)).tolist()
    assert seen == pytest.approx(expected) and rows.file.tolist() == dataset.manifest.file.tolist()


def test_wrong_models_are_refused():
    model, dataset = create_model("convmixer", num_classes=3), create_dataset("shapes9", "val", 56)
    with pytest.raises(InputError, match="mean= and std="):
        evaluate(model, dataset)
    with pytest.raises(InputError, match=r"shape \(\d+, 3\).*classes the model was trained on"):
        evaluate(model, dataset, mean=IMAGENET_MEAN, std=IMAGENET_STD)
    with pytest.raises(InputError, match=r"shape \(2,\)"):
        image_rows(torch.zeros(2), Labelled([0, 1], 2))
    with pytest.raises(NonFiniteError, match="1.png"):
        image_rows(torch.tensor([[1.0, 0.0], [float("inf"), 0.0]]), Labelled([0, 1], 2))


@pytest.mark.parametrize(("answer", "words"), [
    (lambda x: x.mean((1, 2, 3)), r"returns \(20,\) for 20 images"), (lambda x: (x.flatten(1)[:, :9],), "returns tuple"), (lambda x: x[:1].flatten(1)[:, :9], r"returns \(1, 9\)"),
    (lambda x: {"logits": x}, "returns dict"), (lambda x: x.sum(), "returns Tensor"),
])
def test_answers_that_are_no_logits(answer, words):
    class Answers(torch.nn.Module):
        def forward(self, x):
            return answer(x)

    with pytest.raises(InputError, match=words + ".*logits b k"):
        evaluate(Answers(), create_dataset("shapes9", "val", 56), mean=IMAGENET_MEAN, std=IMAGENET_STD, limit=20)


def test_every_module_gets_its_own_mode_back():
    model = torch.nn.Sequential(torch.nn.BatchNorm2d(3).eval(), torch.nn.Dropout())
    with pytest.raises(KeyError), in_eval_mode(model):
        assert not any(module.training for module in model.modules())
        raise KeyError
    assert [module.training for module in model.modules()] == [True, False, True]


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    "A run of one step and some of its test images."
    run = train(train_config(model="convmixer", max_steps=1, batch_size=8, test_images=700, device="cpu", out=str(tmp_path_factory.mktemp("measured") / "run")), progress=False)
    return run, measure(run)


def test_a_torn_record_is_measured_again(measured, tmp_path):
    run, rows = measured
    torn = dataclasses.replace(run, folder=shutil.copytree(run.folder, tmp_path / "run"))
    part, = (torn.folder / "records").iterdir()
    part.write_bytes(part.read_bytes()[:1000])
    with pytest.warns(store.StoreWarning, match="torn"):
        again = measure(torn)
    pd.testing.assert_frame_equal(rows, again, check_dtype=False)


def test_the_record_of_a_run(measured):
    run, rows = measured
    again = measure(run)
    assert len(list((run.folder / "records").iterdir())) == 1
    pd.testing.assert_frame_equal(rows, again, check_dtype=False)
    record = store.read(run.folder / "records").iloc[0]
    test = create_dataset("shapes9", "test", 56)
    assert record["data.test"] == test.manifest_hash and len(rows) == record["metrics.test_images"] == 700
    everything = evaluate(load_model(run.folder)[0], test, limit=700)
    pd.testing.assert_frame_equal(rows, everything, check_dtype=False)
    assert record["metrics.test_top1"] == pytest.approx(rows.correct.mean()) and record["config.model"] == "convmixer"
    assert record["provenance"]["modules"]["patchmix_repro.training"] and store.verify(run.folder / "records").empty
    assert store.read_table(run.folder / "records", "history").val_accuracy.iloc[-1] == run.history.val_accuracy.iloc[-1]


def test_cut_outs_are_the_same_from_one_process_and_from_two():
    "And the caller's own random numbers stay what they were."
    paste, ids = Paste(area=0.3, number=2), torch.arange(40)
    torch.manual_seed(5)
    one, after = paste.ahead(ids, (56, 56)), torch.rand(3)
    torch.manual_seed(5)
    two = paste.ahead(ids, (56, 56), workers=2)
    assert torch.equal(torch.rand(3), after) and one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)
    images = torch.rand(40, 3, 56, 56)
    assert torch.equal(paste(images, ids, two), paste(images, ids))


def test_evaluate_draws_ahead_for_the_whole_block(monkeypatch):
    dataset, seen, shown = create_dataset("shapes9", "val", 56), [], []

    class Spy(torch.nn.Module):
        pretrained_cfg = {"mean": (0.0,) * 3, "std": (1.0,) * 3}

        def forward(self, x):
            shown.append(x)
            return torch.zeros(len(x), 9)

    ahead = Paste.ahead
    monkeypatch.setattr(Paste, "ahead", lambda self, ids, frame, workers=0: seen.append((len(ids), workers)) or ahead(self, ids, frame, workers))
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    rows = evaluate(Spy(), dataset, (Clean(), Paste()), limit=40, batch_size=16)
    assert seen == [(40, 2)]
    order = torch.tensor(rows[rows.condition.ne("clean")]["id"].tolist())
    pictures = torch.cat(shown)[40:]
    expected = Paste()(to_float(dataset.images[order]), order)
    assert sorted(pictures.double().sum((1, 2, 3)).tolist()) == pytest.approx(sorted(expected.double().sum((1, 2, 3)).tolist()))
