"""Blocks, conditions, resumption, and what the rows say: every image once under every condition, whatever interrupts."""
import numpy as np
import pandas as pd
import pytest
import torch
from children import evaluate_slowly, kill_when, start
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy.stats import binomtest

from patchmix_repro import store
from patchmix_repro.blocks import BLOCK, block_order, decoded, maps_for, saliency_maps, within_memory
from patchmix_repro.core import CheckpointError, InputError, NonFiniteError
from patchmix_repro.data import IMAGENET_MEAN, IMAGENET_STD, create_dataset, normalize
from patchmix_repro.evaluation import BATCH, compare, correct_table, evaluate, image_rows, summary
from patchmix_repro.files import ImageSet
from patchmix_repro.filing import battery_config, file_battery, filed, long_rows, measure_battery, note_of, wide_images
from patchmix_repro.models import predict
from patchmix_repro.occlusion import Clean, Drop, Permute, Replace, donor_ids
from patchmix_repro.parts import Filing, Parts, weights_hash

N, SIDE, K = 1100, 28, 5
CONDITIONS = (Clean(), Replace(0.3), Replace(0.5, grid=7), Drop(0.4), Drop(0.4, which="salient"), Permute(4))


def forward_passes(n, b=BATCH["cpu"]):
    "How many batches an evaluation of n images takes, per condition."
    return sum(-(-len(ids) // b) for ids in block_order(n))


def images(n=N, seed=0, labels=None):
    "Noise with labels and masks, in memory."
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, K, n) if labels is None else labels
    manifest = pd.DataFrame({"file": [f"{i:04}.png" for i in range(n)], "class": [f"c{k}" for k in labels], "label": labels, "sha256": str(seed)})
    pixels, masks = (torch.from_numpy(rng.integers(0, high, (n, c, SIDE, SIDE), dtype=np.uint8)) for high, c in ((256, 3), (2, 1)))
    return ImageSet("noise", "test", tuple(f"c{k}" for k in range(K)), manifest, pixels, masks)


class Linear(torch.nn.Module):
    "A linear classifier that keeps what it was shown."
    pretrained_cfg = {"mean": IMAGENET_MEAN, "std": IMAGENET_STD}

    def __init__(self, k=K, seed=0, spy=False):
        super().__init__()
        weight = torch.randn(k, 3 * SIDE * SIDE, generator=torch.Generator().manual_seed(seed))
        self.weight, self.spy, self.calls, self.seen = torch.nn.Parameter(weight), spy, 0, []

    def forward(self, x):
        self.calls += 1
        if self.spy:
            self.seen.append(x.clone())
        return x.flatten(1) @ self.weight.T


@pytest.fixture(scope="module")
def dataset():
    return images()


@pytest.fixture(scope="module")
def rows(dataset):
    return evaluate(Linear(), dataset, CONDITIONS)


# ---- the order ----

@given(st.integers(1, 4000), st.integers(0, 10**6), st.none() | st.integers(1, 5000))
def test_blocks_hold_every_image_once(n, seed, limit):
    blocks = block_order(n, seed, limit)
    ids = torch.cat(blocks).tolist()
    assert len(ids) == len(set(ids)) == min(n, limit or n) and set(ids) <= set(range(n))
    assert all(len(block) == BLOCK for block in blocks[:-1]) and (len(blocks) == 1 or BLOCK // 2 <= len(blocks[-1]) < 1.5 * BLOCK)
    assert ids == torch.cat(block_order(n, seed)).tolist()[:len(ids)]


# ---- rows ----

def test_every_image_once_under_every_condition(rows, dataset):
    assert list(rows) == ["condition", "id", "file", "label", "prediction", "correct", "correct5", "probability"]
    assert rows.condition.unique().tolist() == [c.name for c in CONDITIONS]
    for _, part in rows.groupby("condition"):
        assert part.id.tolist() == list(range(N)) and part.label.tolist() == dataset.labels.tolist()
        assert part.file.tolist() == dataset.manifest.file.tolist()


def test_rows_against_one_image_at_a_time_in_float64(rows, dataset):
    model = Linear().double()
    for ids in block_order(N):
        donors = dict(zip(ids.tolist(), donor_ids(dataset.labels[ids], ids, 0).tolist()))
        for i in ids[:20].tolist():
            image = dataset.images[i:i + 1].double() / 255
            maps = {"donor": dataset.images[donors[i]][None].double() / 255, "mask": dataset.masks[i:i + 1].double()}
            for condition in CONDITIONS:
                shown = condition(image, torch.tensor([i]), maps)
                logits = model(normalize(shown))[0].tolist()
                row = rows[(rows.condition == condition.name) & (rows.id == i)].iloc[0]
                label = int(dataset.labels[i])
                assert row.prediction == int(np.argmax(logits)) and row.correct == (row.prediction == label)
                assert row.probability == pytest.approx(1 / np.exp(np.array(logits) - logits[label]).sum(), rel=1e-3, abs=1e-6)


@pytest.mark.parametrize("batch_size", [1, 37, 512, "auto"])
def test_the_pictures_do_not_depend_on_the_batch(batch_size):
    few, conditions = images(40), CONDITIONS[1:]
    shown = {}
    for b in (40, batch_size):
        model = Linear(spy=True)
        evaluate(model, few, conditions, batch_size=b)
        shown[b] = list(torch.cat(model.seen).split(40))  # condition after condition
    assert [len(found) for found in shown.values()] == [len(conditions)] * len(shown) and all(torch.equal(a, b) for a, b in zip(*shown.values()))


def test_the_pictures_are_the_same_for_every_model(dataset):
    seen = []
    for seed in (0, 1):
        model = Linear(seed=seed, spy=True)
        evaluate(model, dataset, CONDITIONS, limit=60)
        seen.append(model.seen)
    assert len(seen[0]) == 2 * len(CONDITIONS) and all(torch.equal(a, b) for a, b in zip(*seen))


def test_a_sample_is_the_beginning_of_the_whole(rows, dataset):
    part = evaluate(Linear(), dataset, CONDITIONS, limit=BLOCK)
    whole = rows.merge(part[["condition", "id"]]).reset_index(drop=True)
    pd.testing.assert_frame_equal(part, whole, rtol=1e-4, atol=1e-6)


def test_without_conditions_nothing_has_changed(dataset):
    plain, clean = evaluate(Linear(), dataset), evaluate(Linear(), dataset, (Clean(),))
    assert list(plain) == ["file", "label", "prediction", "correct", "correct5", "probability"]
    pd.testing.assert_frame_equal(plain, clean.drop(columns=["condition", "id"]), rtol=1e-4, atol=1e-6)


def test_the_mode_of_the_model_comes_back(dataset):
    model = Linear().train()
    evaluate(model, dataset, (Clean(),), limit=10)
    assert model.training
    broken = Linear(k=3).train()
    with pytest.raises(InputError, match="pass class_map="):
        evaluate(broken, dataset, (Clean(),), limit=10)
    assert broken.training


def test_weights_of_another_type_and_draws_of_the_caller(tmp_path):
    few = images(40)
    whole, half = (evaluate(Linear().to(dtype), few, limit=40) for dtype in (torch.float64, torch.bfloat16))
    assert np.abs(whole.probability - half.probability).mean() < 0.1
    for k in range(3):
        for part in ("train/a", "train/b", "val/a", "val/b"):
            (tmp_path / part).mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (SIDE, SIDE), (k, 0, 0)).save(tmp_path / part / f"{k}.png")
    streamed = create_dataset("folder", "test", SIDE, tmp_path, memory=False)
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    evaluate(Linear(k=2), streamed, workers=0), predict(Linear(k=2), streamed)
    assert torch.equal(torch.rand(1), expected)


def test_streamed_images_are_decoded_once_for_all_conditions(tmp_path):
    for k in range(3):
        for i in range(4):
            (tmp_path / "val" / f"c{k}").mkdir(parents=True, exist_ok=True)
            (tmp_path / "train" / f"c{k}").mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.random.default_rng(4 * k + i).integers(0, 256, (40, 40, 3), dtype=np.uint8)).save(tmp_path / "val" / f"c{k}" / f"{i}.png")
            Image.new("RGB", (8, 8)).save(tmp_path / "train" / f"c{k}" / f"{i}.png")
    stored, streamed = (create_dataset("folder", "test", SIDE, tmp_path, memory=memory) for memory in (True, False))
    count, transform = [], streamed.transform
    streamed.transform = lambda image: count.append(1) or transform(image)
    conditions, model = CONDITIONS[:4], Linear(k=3)
    there = evaluate(model, streamed, conditions, workers=0)
    assert len(count) == 12
    pd.testing.assert_frame_equal(there, evaluate(model, stored, conditions))
    streamed.transform = transform
    pd.testing.assert_frame_equal(there, evaluate(model, streamed, conditions, workers=2))
    ids = torch.arange(12)
    assert all(torch.equal(pictures, stored.images[block]) for block, pictures in decoded(streamed, [ids[5:], ids[:5]], chunk=3))


# ---- class maps ----

@settings(deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 20), st.integers(5, 30))
def test_a_class_map_against_a_slow_count(seed, n, k):
    rng = np.random.default_rng(seed)
    few, classes, logits = images(n, seed), rng.integers(-1, K, k), rng.normal(size=(n, k))
    found = image_rows(torch.tensor(logits), few, class_map=torch.tensor(classes))
    for i in range(n):
        label, order = int(few.labels[i]), sorted(range(k), key=lambda j: -logits[i, j])
        p = np.exp(logits[i]) / np.exp(logits[i]).sum()
        assert found.prediction[i] == classes[order[0]] and found.correct[i] == (classes[order[0]] == label)
        assert found.correct5[i] == any(classes[j] == label for j in order[:5])
        assert found.probability[i] == pytest.approx(sum(p[j] for j in range(k) if classes[j] == label))


def test_a_thousand_classes_through_a_map(dataset):
    class_map = torch.full((1000,), -1)
    class_map[::100] = torch.arange(10) % K
    found = evaluate(Linear(k=1000), dataset, (Clean(),), class_map=class_map, limit=200)
    assert found.prediction.isin(range(-1, K)).all() and (found.prediction == -1).mean() > 0.9 and not found.correct[found.prediction == -1].any()


@pytest.mark.parametrize("class_map", [torch.tensor([0, K]), torch.tensor([-2, 0]), torch.tensor([0.0, 1.0]), torch.zeros(2, 2, dtype=torch.long), torch.tensor(0), [], [True, False]])
def test_an_impossible_class_map(dataset, class_map):
    with pytest.raises(InputError, match="one integer per class of the model"):
        evaluate(Linear(), dataset, (Clean(),), class_map=class_map)


@pytest.mark.parametrize(("class_map", "words"), [([-1] * K, "5 of the labels"), ([0, 1, 3, 4, -1], "can only be wrong: c2. Map"), (range(K - 1), "c4")])
def test_a_class_map_reaches_every_label(dataset, class_map, words):
    with pytest.raises(InputError, match=words):
        evaluate(Linear(), dataset, (Clean(),), class_map=torch.tensor(class_map))
    few = images(20, labels=np.array([0, 1] * 10))
    assert len(evaluate(Linear(), few, (Clean(),), class_map=torch.tensor([1, 0, -1, -1, -1]))) == 20, "classes without an image need no class of the model"


# ---- what may go wrong ----

def test_wrong_input(dataset):
    with pytest.raises(InputError, match="mean= and std="):
        evaluate(torch.nn.Flatten(), dataset, (Clean(),))
    with pytest.raises(InputError, match="std above 0"):
        evaluate(Linear(), dataset, (Clean(),), std=(0.2, 0.2, 0.0))
    with pytest.raises(InputError, match="clean are given twice"):
        evaluate(Linear(), dataset, (Clean(), Clean()))
    with pytest.raises(InputError, match="no condition"):
        evaluate(Linear(), dataset, ())
    with pytest.raises(InputError, match="integer from 1, or 'auto'"):
        evaluate(Linear(), dataset, (Clean(),), batch_size=0)
    with pytest.raises(InputError, match="permute-64 with 8 x 8 patches, do not divide images of 28 x 28.*a multiple of 56"):
        evaluate(spied := Linear(), dataset, (Clean(), Replace(0.3, grid=7), Permute(8)), limit=20)
    assert not spied.calls, "found before the first image"
    for model, data, words in ((lambda x: x, dataset, "the model is a function"), (Linear(), torch.zeros(3), "the data are a Tensor")):
        with pytest.raises(InputError, match=words):
            evaluate(model, data)
    with pytest.raises(InputError, match="dtype is 'bfloat16'"):
        evaluate(Linear(), dataset, dtype="bfloat16")
    with pytest.raises(InputError, match="do not normalise RGB"):
        evaluate(Linear(), dataset, mean=0.5, std=0.5)
    with pytest.raises(InputError, match="lack the columns condition, id"):
        summary(evaluate(Linear(), dataset, limit=20), (Clean(),))
    for name, values in {"limit": (2.5, True, 0, "9"), "seed": (1.5, "0", False)}.items():
        for value in values:
            with pytest.raises(InputError, match=f"{name} {value!r}.* whole number"):
                evaluate(Linear(), dataset, (Clean(),), **{name: value})
    for conditions in (Clean(), "clean", (Clean(), "drop"), (Clean,), 3):
        with pytest.raises(InputError, match="a tuple of conditions"):
            evaluate(Linear(), dataset, conditions)
    assert len(evaluate(Linear(), dataset, iter([Clean()]), limit=np.int64(9), seed=np.int64(1))) == 9
    with pytest.raises(InputError, match="all 30 images of the block are of class 1"):
        evaluate(Linear(), images(30, labels=np.ones(30, int)), (Replace(0.3),))


def test_maps_are_found_given_and_checked(dataset):
    salient = Drop(0.5, which="salient", source="saliency")
    with pytest.raises(InputError, match="needs saliency, and noise has none"):
        evaluate(Linear(), dataset, (salient,))
    with pytest.raises(InputError, match="one map per image"):
        evaluate(Linear(), dataset, (salient,), maps={"saliency": dataset.masks[1:]})
    given_maps = evaluate(Linear(), dataset, (salient,), maps={"saliency": dataset.masks}, limit=100)
    own = evaluate(Linear(), dataset, (Drop(0.5, which="salient"),), limit=100)
    assert given_maps.drop(columns="condition").equals(own.drop(columns="condition"))
    assert maps_for((Clean(), Replace(0.1)), dataset) == {}


def test_saliency_of_a_network(dataset):
    network = torch.nn.Sequential(torch.nn.Conv2d(3, 1, 1), torch.nn.Sigmoid())
    few = images(30)
    found = saliency_maps(network, few, batch_size=7, mean=IMAGENET_MEAN, std=IMAGENET_STD)
    weight, bias = network[0].weight.double().flatten().tolist(), network[0].bias.item()
    x = normalize(few.images.double() / 255)[17, :, 3, 5].tolist()
    assert found.shape == (30, 1, SIDE, SIDE)
    assert float(found[17, 0, 3, 5]) == pytest.approx(1 / (1 + np.exp(-bias - sum(a * b for a, b in zip(weight, x)))), rel=1e-4)


class Greedy(Linear):
    "Runs out of memory above a batch size."
    room = 10

    def forward(self, x):
        if len(x) > self.room:
            raise torch.OutOfMemoryError(f"{len(x)} images")
        return super().forward(x)


def test_a_batch_that_does_not_fit_is_halved(rows, dataset):
    model = Greedy()
    found = evaluate(model, dataset, CONDITIONS)
    pd.testing.assert_frame_equal(found, rows, rtol=1e-3, atol=1e-6)  # some CPUs sum a batch of another size in another order
    assert model.calls == len(CONDITIONS) * forward_passes(N, 8)
    with pytest.raises(InputError, match="a batch of 64 does not fit.*'auto'"):
        evaluate(Greedy(), dataset, CONDITIONS, batch_size=64)
    model.room = 0
    with pytest.raises(InputError, match="a batch of 1 does not fit"):
        evaluate(model, dataset, CONDITIONS)
    with pytest.raises(ZeroDivisionError):
        within_memory(lambda b: 1 / 0, 8)


# ---- interruption ----

class Fragile(Linear):
    "Answers so often, then NaN."
    left = 999

    def forward(self, x):
        self.left -= 1
        return super().forward(x) if self.left >= 0 else torch.full((len(x), K), float("nan"))


def test_what_was_measured_survives_a_nan(tmp_path, dataset, rows):
    model = Fragile()
    model.left = forward_passes(BLOCK) * len(CONDITIONS) + 1
    with pytest.raises(NonFiniteError, match=r"under clean, the first is \d{4}.png"):
        evaluate(model, dataset, CONDITIONS, out=tmp_path)
    assert len(list((tmp_path / "parts").iterdir())) == 1
    model.left = 999
    resumed = evaluate(model, dataset, CONDITIONS, out=tmp_path)
    assert model.left == 999 - len(CONDITIONS) * (forward_passes(N) - forward_passes(BLOCK))
    pd.testing.assert_frame_equal(resumed, rows, check_exact=True)
    assert evaluate(model, dataset, CONDITIONS, out=tmp_path).equals(resumed)


@pytest.mark.parametrize("done", range(1, len(CONDITIONS)))
def test_conditions_that_were_finished_survive_a_nan_in_their_block(tmp_path, done):
    model, few = Fragile(), images(70)
    model.left = 3 * done + 1
    with pytest.raises(NonFiniteError, match=f"under {CONDITIONS[done].name}"):
        evaluate(model, few, CONDITIONS, out=tmp_path)
    model.left = 999
    resumed = evaluate(model, few, CONDITIONS, out=tmp_path)
    assert model.left == 999 - 3 * (len(CONDITIONS) - done)
    pd.testing.assert_frame_equal(resumed, evaluate(Linear(), few, CONDITIONS), check_exact=True)


@pytest.mark.parametrize(("every", "parts"), [(0, 3), (3600, 1)])
def test_a_long_block_is_written_now_and_then(tmp_path, every, parts):
    ids, prints = torch.arange(4), {"a": "0", "b": "1", "c": "2"}
    place, rows = Parts(tmp_path, {"seed": 0}, prints), pd.DataFrame({"id": ids.numpy(), "correct": True})
    with Filing(place, ids, every) as filing:
        for name in prints:
            filing.add(name, rows)
            assert len(list(tmp_path.glob("parts/part-*"))) == (0 if every else len(place.rows))
    assert len(list(tmp_path.glob("parts/part-*"))) == parts
    again = Parts(tmp_path, {"seed": 0}, prints)
    assert again.frame([ids]).equals(place.frame([ids])) and len(again.frame([ids])) == 12


def test_new_conditions_join_old_parts(tmp_path, dataset, rows):
    model = Linear()
    evaluate(model, dataset, CONDITIONS[:2], out=tmp_path)
    calls = model.calls
    found = evaluate(model, dataset, CONDITIONS, out=tmp_path)
    assert model.calls == 3 * calls
    pd.testing.assert_frame_equal(found, rows, check_exact=True)


def test_parts_of_something_else_are_refused(tmp_path, dataset):
    salient, maps = (Drop(0.5, which="salient", source="saliency"),), {"saliency": dataset.masks}
    evaluate(Linear(), dataset, salient, maps=maps, out=tmp_path, limit=20)

    def again(model=None, data=dataset, conditions=salient, maps=maps, **more):
        evaluate(model or Linear(), data, conditions, maps=maps, out=tmp_path, limit=20, **more)

    again()
    for word, changed in {
        "model": {"model": Linear(seed=1)}, "data": {"data": images(seed=1)}, "mean": {"mean": (0.5, 0.5, 0.5)}, "seed": {"seed": 1},
        "dtype": {"dtype": torch.bfloat16}, "class_map": {"class_map": torch.arange(K)},
    }.items():
        with pytest.raises(CheckpointError, match=f"parts of another {word}"):
            again(**changed)
    with pytest.raises(CheckpointError, match="parts of another condition drop-14-50"):
        again(maps={"saliency": 1 - dataset.masks})


def test_a_torn_part_is_reported_and_measured_again(tmp_path, dataset, rows):
    evaluate(Linear(), dataset, CONDITIONS, out=tmp_path)
    part = sorted((tmp_path / "parts").iterdir())[0]
    part.write_bytes(part.read_bytes()[:-100])
    model = Linear()
    with pytest.warns(store.StoreWarning, match=f"{part.name} is torn"):
        found = evaluate(model, dataset, CONDITIONS, out=tmp_path)
    assert 0 < model.calls < len(CONDITIONS) * forward_passes(N)
    pd.testing.assert_frame_equal(found, rows, check_exact=True)
    assert store.verify(tmp_path / "parts").empty


def test_a_killed_evaluation_goes_on_where_it_was(tmp_path):
    n, parts = 5 * BLOCK, tmp_path / "out" / "parts"
    kill_when(start(evaluate_slowly, n, tmp_path / "out"), lambda: len(list(parts.glob("part-*.parquet"))) >= 2)
    done, model = len(list(parts.glob("part-*.parquet"))), Linear()
    resumed = evaluate(model, images(n), CONDITIONS, out=tmp_path / "out")
    assert 2 <= done < 5 and model.calls == (5 - done) * forward_passes(BLOCK) * len(CONDITIONS)
    pd.testing.assert_frame_equal(resumed, evaluate(Linear(), images(n), CONDITIONS), check_exact=True)


# ---- what the rows say ----

def rows_of(**conditions):
    "Rows of a hand-written battery: name -> outcomes."
    return pd.concat([pd.DataFrame({"condition": name.replace("_", "-"), "id": range(len(right)), "file": "x", "label": [i % 2 for i in range(len(right))], "correct": right})
                      for name, right in conditions.items()], ignore_index=True)


def test_a_summary_worked_by_hand():
    rows = rows_of(clean=[True] * 90 + [False] * 10, replace_7_30=[True] * 60 + [False] * 30 + [True] * 5 + [False] * 5, permute_16=[True] * 52 + [False] * 48, drop_14_20_black_random=[True] * 89 + [False] * 11)
    conditions = (Clean(), Replace(0.3, 7), Permute(4), Drop(0.2))
    table = summary(rows, conditions, train_grid=7).set_index("condition")
    assert table.accuracy.tolist() == [0.9, 0.65, 0.52, 0.89] and table.n.eq(100).all() and table.x.tolist() == [0, 30, 16, 20]
    assert table["drop"].tolist() == pytest.approx([0, 0.25, 0.38, 0.01])
    assert table.drop_normalised.tolist() == pytest.approx([0, 0.25 / 0.4, 0.38 / 0.4, 0.01 / 0.4])
    assert table.in_distribution.tolist() == [False, True, False, False]
    assert table.reason.tolist() == ["reference", "", "at chance", "no effect"] and table.discriminates.tolist() == [False, True, False, False]
    assert not summary(rows, conditions, train_grid=14).in_distribution.any() and not summary(rows, conditions).in_distribution.any()
    assert summary(rows, conditions, train_grid=(7, 14)).in_distribution.sum() == 1
    assert (table.drop_low <= table["drop"]).all() and (table["drop"] <= table.drop_high).all()
    worse = summary(rows, conditions, chance=0.95)
    assert worse.drop_normalised.isna().all() and worse.reason.tolist()[1:] == ["clean at chance"] * 3


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=60))
@settings(deadline=None)
def test_a_summary_property(pairs):
    clean, other = map(list, zip(*pairs))
    table = summary(rows_of(clean=clean, permute_16=other), (Clean(), Permute(4)), chance=0.0).set_index("condition")
    row = table.loc["permute-16"]
    assert row.accuracy + row["drop"] == pytest.approx(table.accuracy["clean"]) and row.low <= row.accuracy <= row.high
    assert -1 <= row.drop_low <= row["drop"] <= row.drop_high <= 1
    assert row.discriminates == (row.reason == "") and bool(row.drop_normalised >= 0.05) >= row.discriminates


def test_a_comparison_worked_by_hand():
    a = rows_of(clean=[True] * 8 + [False] * 2, permute_16=[True] * 9 + [False])
    b = rows_of(clean=[True] * 7 + [False] * 3, permute_16=[False] * 9 + [True])
    table = compare(a, b.sample(frac=1, random_state=0)).set_index("condition")
    assert table.estimate.tolist() == pytest.approx([0.1, 0.8]) and table.n.tolist() == [10, 10]
    exact = [1.0, binomtest(1, 10).pvalue]
    assert table.p_value.tolist() == pytest.approx(exact)
    assert table.p_holm.tolist() == pytest.approx([1.0, min(1, 2 * exact[1])])


def test_rows_that_do_not_belong_together():
    a = rows_of(clean=[True, False, True], permute_16=[True, True, False])
    with pytest.raises(InputError, match="not the same"):
        compare(a, a.assign(id=a.id + 1))
    with pytest.raises(InputError, match="permute-16 only one"):
        compare(a, a[a.condition == "clean"])
    with pytest.raises(InputError, match="come twice"):
        correct_table(pd.concat([a, a]))
    with pytest.raises(InputError, match="permute-16 lacks images"):
        correct_table(a[:-1])
    with pytest.raises(InputError, match="lack the condition clean"):
        summary(a[a.condition != "clean"], (Permute(4),))


# ---- records ----

CARD = {"run_id": "noise-linear", "config": {"model": "linear", "mixing": "switch", "scale": "mini", "data": "noise", "seed": 3, "grid": 7}}


def test_a_battery_is_filed_once(tmp_path, dataset, rows):
    model, note = Linear(), note_of(Linear(), CARD, "one")
    found = measure_battery(model, note, CONDITIONS, dataset, tmp_path)
    pd.testing.assert_frame_equal(found, rows[["condition", "id", "file", "label", "correct"]])
    calls = model.calls
    assert measure_battery(model, note, CONDITIONS, dataset, tmp_path).equals(found) and model.calls == calls
    record = store.read(tmp_path / "records", "battery").iloc[0]
    assert record["config.train_grid"] == 7 and record["config.train_seed"] == 3 and record["config.weights"] == weights_hash(model)
    assert [c["kind"] for c in record["config.conditions"]] == [c.kind for c in CONDITIONS] and record["data.test"] == dataset.manifest_hash
    table = store.read_table(tmp_path / "records", "conditions").drop(columns="run_id")
    pd.testing.assert_frame_equal(table, summary(rows, CONDITIONS, 1 / K, 7), check_dtype=False)
    assert record["metrics.clean"] == pytest.approx(rows[rows.condition == "clean"].correct.mean()) and store.verify(tmp_path / "records").empty
    other = measure_battery(Linear(seed=1), note_of(Linear(seed=1), CARD, "two"), CONDITIONS[:3], dataset, tmp_path)
    assert measure_battery(model, note, CONDITIONS, dataset, tmp_path).equals(found)
    assert compare(other, found[found.condition.isin(other.condition)]).n.eq(N).all()


def test_what_is_filed_is_told_apart(tmp_path, dataset, rows):
    note = note_of(Linear(), CARD)
    file_battery(note, rows, CONDITIONS, dataset, tmp_path)
    assert filed(note, CONDITIONS, dataset, tmp_path).equals(long_rows(wide_images(rows)))
    for other in (filed(note, CONDITIONS[:-1], dataset, tmp_path), filed(note, CONDITIONS, dataset, tmp_path, seed=1), filed(note, CONDITIONS, dataset, tmp_path, limit=9),
                  filed(note | {"weights": "0"}, CONDITIONS, dataset, tmp_path), filed(note, CONDITIONS, dataset, tmp_path / "none")):
        assert other is None
    with pytest.raises(store.StoreError, match="filed for other images"):
        filed(note, CONDITIONS, images(seed=1), tmp_path)
    assert note_of(Linear(), "convnext_tiny.fb_in1k")["model"] == "convnext" and note_of(Linear(), "resnet18.a1_in1k")["mixing"] is None
    assert battery_config(note, CONDITIONS, dataset, maps={"mask": dataset.masks})["maps"] != {}
