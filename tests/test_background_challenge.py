"""Networks on other backgrounds: answers known beforehand, a loop over single pictures, and records that are made once."""
import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn as nn
from hypothesis import given, settings
from hypothesis import strategies as st

from patchmix_repro import background_challenge as bc
from patchmix_repro import backgrounds as bg
from patchmix_repro import store
from patchmix_repro.background_records import file_backgrounds, filed_backgrounds, backgrounds_config, measure_backgrounds
from patchmix_repro.core import CheckpointError, InputError, NonFiniteError, StoreError
from patchmix_repro.evaluation import evaluate
from patchmix_repro.files import ImageSet
from patchmix_repro.stats import compare_paired, wilson

HALF = (0.5,) * 3
NOTE = {"name": "net", "model": "toy", "mixing": None, "scale": "mini", "pretrained": None, "run_id": "r", "train_data": "toy", "train_seed": 0, "train_grid": None, "weights": "w"}


def small(n=18, k=3, size=16, seed=0):
    "Squares of their class's brightness on a background of their class's brightness, with noise."
    generator = torch.Generator().manual_seed(seed)
    labels, masks = torch.arange(n) % k, torch.zeros(n, 1, size, size, dtype=torch.uint8)
    images = torch.randint(0, 30, (n, 3, size, size), generator=generator) + (40 + 80 * labels)[:, None, None, None]
    for i in range(n):
        y, x = torch.randint(0, size - 6, (2,), generator=generator).tolist()
        masks[i, 0, y:y + 6, x:x + 6] = 1
    names = tuple("abcdefghi"[:k])
    manifest = pd.DataFrame({"file": [f"{i:03}.png" for i in range(n)], "label": labels, "sha256": "", "class": [names[i] for i in labels]})
    return ImageSet("small", "test", names, manifest, images.to(torch.uint8), masks)


class Edge(nn.Module):
    "Classifies by one corner pixel: by the background alone."

    def forward(self, x):
        light = (x[:, :, 0, 0].mean(1) + 1) * 127.5
        return -(light[:, None] - torch.tensor([55.0, 135.0, 215.0])).abs()


class Random(nn.Module):
    "A fixed convolution, whose answers hang on every pixel."

    def __init__(self, k=3):
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.weight = nn.Parameter(torch.randn(k, 3, 16, 16, generator=generator))
        self.drop = nn.Dropout(0.5)

    def forward(self, x):
        return torch.einsum("bchw,kchw->bk", self.drop(x), self.weight)


class Labelled(nn.Module):
    "Answers by the labels it is given, and remembers them."

    def __init__(self):
        super().__init__()
        self.seen = []

    def forward(self, x, labels):
        self.seen.append(labels)
        return -(labels.mean((1, 2))[:, None] - torch.tensor([0.2, 0.5, 0.8])).abs()


def patches(images):
    "b n 1: the mean brightness of every 4 x 4 patch."
    return nn.functional.avg_pool2d(images.mean(1, keepdim=True), 4).flatten(2).transpose(1, 2)


TOLD = {"mean": HALF, "std": HALF}


# ---- every variant ----

def test_a_network_that_sees_the_background_alone_answers_with_its_class():
    data = small()
    rows = bc.evaluate_backgrounds(Edge(), data, ("original", "mixed_same", "mixed_rand", "mixed_next"), **TOLD)
    own = rows[rows.variant.ne("original")]
    corner_free = ~data.masks[:, 0, 0, 0].bool()
    free = own.id.map(lambda i: bool(corner_free[i]))
    assert (own.prediction == own.bg_label)[free].all() and free.mean() > 0.5
    table = bc.background_table(rows[rows.id.map(lambda i: bool(corner_free[i]))])
    assert table.estimate[["mixed_same", "mixed_next"]].tolist() == [1, 0]


def test_rows_agree_with_evaluate_on_each_variants_set():
    data, model = small(), Random()
    rows = bc.evaluate_backgrounds(model, data, seed=2, batch_size=5, **TOLD)
    assert list(rows) == list(bc.ROWS) and list(dict.fromkeys(rows.variant)) == list(bg.VARIANTS)
    for name, found in bg.background_sets(data, seed=2).sets.items():
        mine, plain = rows[rows.variant.eq(name)].reset_index(drop=True), evaluate(model, found, **TOLD)
        assert mine[["file", "label", "prediction", "correct", "correct5"]].equals(plain[["file", "label", "prediction", "correct", "correct5"]])
        assert np.allclose(mine.probability, plain.probability, atol=1e-5) and mine.id.tolist() == found.manifest.fg_id.tolist()
        assert mine.fg_file.tolist() == data.manifest.file.tolist() and mine.bg_label.tolist() == found.manifest.bg_label.tolist()


def test_a_dict_of_sets_gives_the_rows_of_the_masked_set():
    data, model = small(), Random()
    sets = bg.background_sets(data).sets
    both = [bc.evaluate_backgrounds(model, given, ("no_fg", "mixed_rand"), limit=limit, **TOLD) for limit in (None, 7) for given in (data, sets)]
    assert both[0].equals(both[1]) and [len(rows) for rows in both] == [36, 36, 14, 14]
    for rows in both[2:]:
        assert rows.fg_file[rows.variant.eq("no_fg")].tolist() == rows.fg_file[rows.variant.eq("mixed_rand")].tolist()


def test_labels_are_made_on_the_variants_own_pictures():
    data, model, asked = small(), Labelled(), []

    def labels_of(images):
        asked.append(images.clone())
        return patches(images)
    rows = bc.evaluate_backgrounds(model, data, ("original", "only_fg", "mixed_next"), labels_of, batch_size=4, **TOLD)
    sets = bg.background_sets(data, ("original", "only_fg", "mixed_next")).sets
    shown = torch.cat([found.images for found in sets.values()]).float() / 255
    assert torch.equal(torch.cat(asked), shown) and torch.allclose(torch.cat(model.seen), patches(shown))
    expected = (patches(shown).mean((1, 2))[:, None] - torch.tensor([0.2, 0.5, 0.8])).abs().argmin(1)
    assert rows.prediction.tolist() == expected.tolist()


@pytest.mark.parametrize("answer", [lambda images: images, lambda images: patches(images)[:-1], lambda images: None, lambda images: patches(images)[..., 0]])
def test_labels_of_another_form_are_refused(answer):
    with pytest.raises(InputError, match="labels b n k"):
        bc.evaluate_backgrounds(Labelled(), small(), "original", answer, **TOLD)


def test_a_model_comes_back_in_its_mode_and_bad_answers_are_refused():
    model = Random().train()
    bc.evaluate_backgrounds(model, small(), "no_fg", **TOLD)
    assert model.training and model.drop.training
    model.weight.data[0, 0, 0, 0] = float("nan")
    with pytest.raises(NonFiniteError, match="small-no_fg"):
        bc.evaluate_backgrounds(model, small(), "no_fg", **TOLD)
    with pytest.raises(InputError, match="classes"):
        bc.evaluate_backgrounds(Random(5), small(), "no_fg", **TOLD)
    with pytest.raises(InputError, match="Pass mean= and std="):
        bc.evaluate_backgrounds(Random(), small(), "no_fg")
    with pytest.raises(InputError, match="lacks the column fg_file"):
        bc.evaluate_backgrounds(Random(), {"no_fg": small()}, "no_fg", **TOLD)
    with pytest.raises(InputError, match="unknown variant of the sets 'only_fg'"):
        bc.evaluate_backgrounds(Random(), bg.background_sets(small(), "no_fg").sets, "only_fg", **TOLD)


def test_a_larger_network_is_read_through_its_map():
    data, model = small(), Random(6)
    rows = bc.evaluate_backgrounds(model, data, "original", class_map=torch.tensor([0, 0, 1, 2, 2, -1]), **TOLD)
    with torch.no_grad():
        top = model.eval()(data.images / 127.5 - 1).argmax(1)
    assert rows.prediction.tolist() == torch.tensor([0, 0, 1, 2, 2, -1])[top].tolist()


def test_finished_variants_are_not_computed_again(tmp_path):
    class Counting(Random):
        calls = 0

        def forward(self, x):
            self.calls += 1
            return super().forward(x)
    data, model = small(), Counting()
    first = bc.evaluate_backgrounds(model, data, ("no_fg", "only_fg"), out=tmp_path, **TOLD)
    calls = model.calls
    assert bc.evaluate_backgrounds(model, data, ("no_fg", "only_fg"), out=tmp_path, **TOLD).equals(first) and model.calls == calls
    for change in ({"seed": 1}, {"limit": 5}, {"mean": (0.4,) * 3}):
        before = model.calls
        bc.evaluate_backgrounds(model, data, ("no_fg",), out=tmp_path, **{**TOLD, **change})
        assert model.calls > before, change
    model.weight.data += 1
    before = model.calls
    bc.evaluate_backgrounds(model, data, ("no_fg",), out=tmp_path, **TOLD)
    assert model.calls > before
    for path in tmp_path.glob("only_fg-*.parquet"):
        path.write_bytes(path.read_bytes()[:50])
    model.weight.data -= 1
    with pytest.raises(CheckpointError, match="only_fg-.*is torn"):
        bc.evaluate_backgrounds(Counting(), data, ("only_fg",), out=tmp_path, **TOLD)


# ---- the table ----

@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=40))
@settings(max_examples=40)
def test_the_table_is_wilson_and_the_paired_gap(answers):
    same, rand = zip(*answers)
    rows = pd.concat([pd.DataFrame({"variant": name, "fg_file": [str(i) for i in range(len(right))], "correct": right}) for name, right in (("mixed_same", same), ("mixed_rand", rand))])
    skipped = pd.DataFrame({"variant": ["mixed_same", "mixed_same"], "id": [3, 4], "file": ["a", "b"], "reason": "r"})
    table = bc.background_table(rows.sample(frac=1, random_state=0), skipped)
    for name, right in (("mixed_same", same), ("mixed_rand", rand)):
        assert table.loc[name, ["estimate", "low", "high", "n"]].tolist() == list(wilson(sum(right), len(right)))
    assert table.loc["bg_gap", ["estimate", "low", "high", "p_value", "n"]].tolist() == list(compare_paired(same, rand))
    assert table.skipped.to_dict() == {"mixed_same": 2, "mixed_rand": 0, "bg_gap": 0}


def test_no_gap_without_both_variants():
    rows = bc.evaluate_backgrounds(Random(), small(), ("mixed_same", "no_fg"), **TOLD)
    assert bc.background_table(rows).index.tolist() == ["mixed_same", "no_fg"]


# ---- the challenge ----

def slow_challenge(model, data, backgrounds):
    "One object, one background, one picture at a time: img * mask + bg * (1 - mask)."
    model, robust = model.eval(), []
    for i in range(len(data)):
        mask, right = data.masks[i].double(), []
        for other in backgrounds.images:
            pasted = (data.images[i].double() * mask + other.double() * (1 - mask)) / 255
            with torch.no_grad():
                right.append(int(model(((pasted - 0.5) / 0.5).float()[None]).argmax()) == int(data.labels[i]))
        robust.append(all(right))
    return robust


class Centre(nn.Module):
    "Looks at the brightest pixels alone: the brightest class is robust, the others are not."

    def forward(self, x):
        light = (x.amax((1, 2, 3)) + 1) * 127.5
        return -(light[:, None] - torch.tensor([65.0, 145.0, 225.0])).abs()


@pytest.mark.parametrize("model", [Random(), Edge(), Centre()], ids=["random", "edge", "centre"])
def test_robust_is_what_no_background_flips(model):
    data = small()
    backgrounds = bg.background_set(data, "only_bg_t")
    found = bc.challenge(model, data, **TOLD)
    assert found.rows.robust.tolist() == slow_challenge(model, data, backgrounds) and found.skipped.empty
    assert bc.challenge_score(found.rows) == wilson(int(found.rows.robust.sum()), 18)
    if isinstance(model, Centre):
        assert found.rows.robust.tolist() == (data.labels == 2).tolist()
    assert found.rows.tried[found.rows.robust].eq(18).all() and found.rows.flipped_by[found.rows.robust].eq("").all()
    for row in found.rows[~found.rows.robust].itertuples():
        place = backgrounds.manifest.file.tolist().index(row.flipped_by)
        pasted = bg.mix_background(data.images[row.id], data.masks[row.id], backgrounds.images[place])
        with torch.no_grad():
            assert int(model((pasted / 127.5 - 1)[None]).argmax()) == row.prediction != row.label
        assert row.flipped_class == backgrounds.manifest["class"][place]


def test_batches_and_samples_do_not_change_the_challenge():
    data, model = small(), Random()
    whole = bc.challenge(model, data, **TOLD).rows
    for size in (1, 4, 100):
        assert bc.challenge(model, data, batch_size=size, **TOLD).rows.equals(whole)
    part = bc.challenge(model, data, limit=5, **TOLD).rows
    assert len(part) == 5 and part.equals(whole[whole.id.isin(part.id)].reset_index(drop=True))
    few = bc.challenge(model, data, background_limit=4, **TOLD).rows
    assert few.tried.max() <= 4 and (few.robust >= whole.robust).all()


def test_the_own_class_and_the_own_picture_are_among_the_backgrounds():
    data = small(3, 3)
    tried = []

    class Watching(Centre):
        def forward(self, x):
            tried.append(len(x))
            return super().forward(x)
    bc.challenge(Watching(), ImageSet("one", "test", data.classes, data.manifest.iloc[2:].reset_index(drop=True), data.images[2:], data.masks[2:]), **TOLD)
    assert tried == [1]  # its own tiled background


def test_objects_without_a_mask_are_listed_and_labels_follow_the_pasted_picture():
    data, model = small(), Labelled()
    data.masks[4] = 0
    found = bc.challenge(model, data, labels_of=patches, **TOLD)
    assert found.skipped[["id", "reason"]].values.tolist() == [[4, "the mask covers nothing"]] and len(found.rows) == 17
    backgrounds = bg.background_set(data, "only_bg_t").images
    for row in found.rows.itertuples():
        pasted = bg.mix_background(data.images[row.id].expand_as(backgrounds), data.masks[row.id].expand(len(backgrounds), -1, -1, -1), backgrounds) / 255
        answers = (patches(pasted).mean((1, 2))[:, None] - torch.tensor([0.2, 0.5, 0.8])).abs().argmin(1)
        assert row.robust == bool((answers == row.label).all())


def test_the_challenge_refuses_what_it_cannot_judge():
    model = Random()
    model.weight.data[:] = float("nan")
    with pytest.raises(NonFiniteError, match="Check weights"):
        bc.challenge(model, small(), **TOLD)
    with pytest.raises(InputError, match="Give both alike"):
        bc.challenge(Random(), small(), bg.background_set(small(size=8), "only_bg_t"), **TOLD)
    empty, bare = small(), small()
    empty.masks, bare.masks = torch.zeros_like(empty.masks), None
    with pytest.raises(InputError, match="no object of small has a usable mask, the first because the mask covers nothing"):
        bc.challenge(Random(), empty, bg.background_set(small(), "only_bg_t"), **TOLD)
    with pytest.raises(InputError, match="has no masks"):
        bc.challenge(Random(), bare, **TOLD)


# ---- records ----

class Silent(nn.Module):
    def forward(self, *x):
        raise AssertionError("asked again")


def test_a_measurement_is_filed_once_and_read_back(tmp_path):
    data = small()
    data.masks[4] = 0
    first = measure_backgrounds(Random(), NOTE, data, tmp_path, **TOLD)
    assert measure_backgrounds(Silent(), NOTE, data, tmp_path, **TOLD).equals(first)
    record, = store.read(tmp_path / "records", "backgrounds").to_dict("records")
    rows = bc.evaluate_backgrounds(Random(), data, **TOLD)
    assert {row["id"] for row in rows.attrs["skipped"]} == {4} and {row["reason"] for row in rows.attrs["skipped"]} == {"the mask covers nothing"}
    table = bc.background_table(rows, bg.plan_backgrounds(data).skipped)
    assert record["metrics.bg_gap"] == table.estimate["bg_gap"] and record["metrics.original"] == table.estimate["original"]
    assert record["metrics.objects"] == 17 and record["metrics.skipped"] == 1 and record["config.labels"] == "none"
    variants, images, skipped = (store.read_table(tmp_path / "records", name, "backgrounds") for name in ("variants", "images", "skipped"))
    assert variants.variant.tolist() == list(bg.VARIANTS) and variants.accuracy.tolist() == table.estimate[list(bg.VARIANTS)].tolist()
    assert images[list(bg.VARIANTS)].dtypes.eq(bool).all() and len(images) == 17
    assert set(skipped.id) == {4} and set(skipped.variant) == set(bg.VARIANTS) - {"original"} and skipped.reason.eq("the mask covers nothing").all()
    assert bc.background_table(first)[["estimate", "low", "high", "n"]].equals(table[["estimate", "low", "high", "n"]])


def test_nothing_skipped_is_an_empty_table(tmp_path):
    measure_backgrounds(Random(), NOTE, small(), tmp_path, variants=("original", "no_fg"), **TOLD)
    assert len(store.read_table(tmp_path / "records", "skipped")) == 0 and store.verify(tmp_path / "records").empty
    assert not [name for name in store.read(tmp_path / "records") if "bg_gap" in name]


def test_another_question_is_another_record(tmp_path):
    data = small()
    asked = [{}, {"seed": 1}, {"limit": 5}, {"variants": ("no_fg",)}, {"labels_of": patches, "labels": "patch means"}, {"note": NOTE | {"weights": "x"}}]
    for options in asked:
        model = Labelled() if "labels" in options else Random()
        measure_backgrounds(model, options.pop("note", NOTE), data, tmp_path, **options, **TOLD)
    records = store.read(tmp_path / "records", "backgrounds")
    assert len(records) == 6 and records.run_id.is_unique and set(records["config.labels"]) == {"none", "patch means"}
    other = small()
    other.masks[0] = other.masks[1]
    assert filed_backgrounds(backgrounds_config(NOTE, other, tuple(bg.VARIANTS)), other, tmp_path / "records") is None
    renamed = ImageSet("small", "test", data.classes, data.manifest.assign(sha256="1"), data.images, data.masks)
    with pytest.raises(StoreError, match="filed for other images of test"):
        measure_backgrounds(Random(), NOTE, renamed, tmp_path, **TOLD)


def test_a_dict_of_sets_is_filed_too(tmp_path):
    sets = bg.background_sets(small()).sets
    rows = measure_backgrounds(Random(), NOTE, sets, tmp_path, **TOLD)
    assert rows.equals(measure_backgrounds(Silent(), NOTE, sets, tmp_path, **TOLD))
    assert rows.equals(measure_backgrounds(Random(), NOTE, small(), tmp_path / "built", **TOLD))


@pytest.mark.parametrize("given", [{"labels": "true masks"}, {"labels_of": patches}])
def test_a_labeller_and_its_name_go_together(tmp_path, given):
    with pytest.raises(InputError, match="Name the labeller"):
        measure_backgrounds(Random(), NOTE, small(), tmp_path, **given, **TOLD)
    assert not list(tmp_path.iterdir())


def test_rows_of_different_objects_are_not_filed(tmp_path):
    data = small()
    rows = bc.evaluate_backgrounds(Random(), data, ("no_fg", "only_fg"), **TOLD)
    with pytest.raises(InputError, match="do not hold the same"):
        file_backgrounds(backgrounds_config(NOTE, data, ("no_fg", "only_fg")), rows.iloc[1:], bg.plan_backgrounds(data).skipped, data, tmp_path)
