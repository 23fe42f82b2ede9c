"""Patch selectivity, its baselines, insertion and deletion: by hand, by slow loops, by properties; errors; one network end to end."""
import math

import numpy as np
import pytest
import torch
import torch.nn as nn
from hypothesis import given, settings
from hypothesis import strategies as st

from patchmix_repro.core import InputError, NonFiniteError
from patchmix_repro.patches import choose_patches
from patchmix_repro.selectivity import (
    chance_map,
    context_pixels,
    deletion,
    gauss_map,
    insertion,
    patch_selectivity,
    selectivity_table,
    unit_scale,
    with_baselines,
)

SEEDS = st.integers(0, 2**31 - 1)


def rng(seed):
    return torch.Generator().manual_seed(seed)


def draw(seed, b=3, h=12, w=8, grid=4):
    "Maps and patch masks with both sides in every image."
    generator = rng(seed)
    count = torch.randint(1, grid * grid, (b,), generator=generator)
    return torch.randn(b, h, w, generator=generator), choose_patches(b, grid * grid, count, generator)


# ---- patch selectivity ----

def test_by_hand():
    "Map 4 2 / 2 0, upper row in context: scaled 1, .5, .5, 0; mass 3/4 of 1/2; means .75 and .25."
    found = patch_selectivity(torch.tensor([[[4.0, 2.0], [2.0, 0.0]]]), torch.tensor([[[[True, True], [False, False]]]]))
    assert found.columns.tolist() == ["share", "mass", "mean"]
    assert found.iloc[0].tolist() == [0.5, 0.25, 0.75]


def test_unequal_areas_by_hand():
    "One of four pixels in context with half of the mass 2: .5 - .25; means 1 and 1/3."
    found = patch_selectivity(torch.tensor([[[3.0, 2.0], [1.0, 2.0]]]), torch.tensor([[True, False, False, False]]))
    assert np.allclose(found, [[0.75, 0.5 - 0.25, (1 + 1 - 1 / 3) / 2]])


def slow(values, inside):
    "Both readings of one image, pixel by pixel in Python floats."
    low, high = min(map(min, values)), max(map(max, values))
    a, b = [], []
    for row, flags in zip(values, inside, strict=True):
        for value, flag in zip(row, flags, strict=True):
            (a if flag else b).append((value - low) / (high - low))
    mass = math.fsum(a) / math.fsum(a + b) - len(a) / len(a + b)
    return mass, (1 + math.fsum(a) / len(a) - math.fsum(b) / len(b)) / 2


@given(SEEDS)
@settings(max_examples=40, deadline=None)
def test_a_slow_form_agrees(seed):
    maps, patches = draw(seed)
    pixels = [[[bool(p[(y // 3) * 4 + x // 2]) for x in range(8)] for y in range(12)] for p in patches]
    wanted = [slow(m.double().tolist(), p) for m, p in zip(maps, pixels, strict=True)]
    assert np.allclose(patch_selectivity(maps, patches)[["mass", "mean"]], wanted, rtol=1e-9, atol=1e-12)
    assert torch.equal(context_pixels(patches, 12, 8), torch.tensor(pixels))


@given(SEEDS, st.floats(0.01, 100), st.floats(-100, 100))
@settings(max_examples=40, deadline=None)
def test_neither_scale_nor_constant_matters(seed, scale, shift):
    maps, inside = draw(seed)
    assert np.allclose(patch_selectivity(maps.double() * scale + shift, inside), patch_selectivity(maps, inside), atol=1e-6)


@given(SEEDS)
@settings(max_examples=40, deadline=None)
def test_ranges_complement_and_the_tie_between_the_readings(seed):
    maps, inside = draw(seed)
    found, other = patch_selectivity(maps, inside), patch_selectivity(maps, ~inside)
    area = 1 - found["share"]
    assert found["mean"].between(0, 1).all() and (found["mass"] >= -area).all() and (found["mass"] <= found["share"]).all()
    assert np.allclose(found["mass"], -other["mass"]) and np.allclose(found["mean"], 1 - other["mean"])
    height = unit_scale(maps).mean((1, 2)).numpy()
    assert np.allclose(found["mass"], area * (1 - area) * (2 * found["mean"] - 1) / height)


def test_the_extremes():
    _, inside = draw(0)
    best = context_pixels(inside, 12, 8).double()
    assert np.allclose(patch_selectivity(best, inside)[["mass", "mean"]].to_numpy().T, [patch_selectivity(best, inside)["share"], np.ones(3)])
    assert np.allclose(patch_selectivity(-best, inside)["mean"], 0)


def test_inputs_are_not_changed_and_masks_of_both_forms_agree():
    maps, inside = draw(1)
    before = maps.clone(), inside.clone()
    pixels = context_pixels(inside, 12, 8)[:, None]
    assert patch_selectivity(maps, inside).equals(patch_selectivity(maps, pixels))
    assert torch.equal(maps, before[0]) and torch.equal(inside, before[1])


@pytest.mark.parametrize(("change", "words"), [
    (lambda m, c: (m, c & False), "all False"),
    (lambda m, c: (m, c | True), "all True"),
    (lambda m, c: (m, c.float()), "bool"),
    (lambda m, c: (m, c[:, :15]), "15 patches"),
    (lambda m, c: (m, c[:2]), "3 maps with 2 masks"),
    (lambda m, c: (m[..., :7], c), "does not divide"),
    (lambda m, c: (m[:, None], c), "b h w"),
    (lambda m, c: (m.long(), c), "int64"),
    (lambda m, c: (torch.ones_like(m), c), "image 0 is constant"),
])
def test_bad_input(change, words):
    with pytest.raises(InputError, match=words):
        patch_selectivity(*change(*draw(2)))


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_map_that_is_not_finite(value):
    maps, inside = draw(3)
    maps[1, 2, 3] = value
    with pytest.raises(NonFiniteError, match="image 1"):
        patch_selectivity(maps, inside)


# ---- baselines ----

def test_chance_depends_on_seed_and_image_alone():
    ids = torch.tensor([5, 2000, 7])
    maps = chance_map(ids, 28, 28, seed=4)
    assert maps.shape == (3, 28, 28) and torch.equal(chance_map(ids[1:2], 28, 28, seed=4)[0], maps[1])
    assert not torch.equal(chance_map(ids, 28, 28, seed=5), maps)


def test_the_baselines_know_nothing():
    "Over random patches both are 0 and one half within four standard errors."
    ids, inside = torch.arange(400), choose_patches(400, 49, 14, rng(0))
    rows = with_baselines(torch.rand(400, 28, 28, generator=rng(1)), inside, ids)
    for name, none in (("mass_chance", 0), ("mean_chance", 0.5), ("mass_gauss", 0), ("mean_gauss", 0.5), ("mass", 0), ("mean", 0.5)):
        assert abs(rows[name].mean() - none) < 4 * rows[name].sem(), name


def test_the_gaussian_by_hand():
    found = gauss_map(2, 4, 8, width=0.5)
    wanted = math.exp(-(0.125**2 + 0.3125**2) / 0.5)  # pixel (2, 6): centres 0.125 and 0.3125 sides off
    assert found.shape == (2, 4, 8) and found[1, 2, 6].item() == pytest.approx(wanted)


def test_the_table_holds_the_network_and_both_baselines():
    maps, inside = draw(4, b=6, h=28, w=28)
    rows = with_baselines(maps, inside, torch.arange(6))
    table = selectivity_table(rows).set_index(["reading", "map"])
    assert len(table) == 6 and (table["n"] == 6).all() and (table["low"] < table["estimate"]).all()
    assert table.loc[("mean", "gauss"), "estimate"] == pytest.approx(rows["mean_gauss"].mean())
    assert table.loc[("mass", "network"), "estimate"] == pytest.approx(rows["mass"].mean())


# ---- insertion and deletion ----

class Pixels(nn.Module):
    "Logits that are weighted sums of the pixels of the first channel."

    def __init__(self, weights):
        super().__init__()
        self.weights, self.batches = weights, []  # k h w

    def forward(self, x):
        self.batches.append(len(x))
        return torch.einsum("bhw,khw->bk", x[:, 0], self.weights.to(x.dtype))


def slow_curve(weights, start, finish, heat, target, steps):
    "Probability and area for one image: pixels one by one, plain floats."
    k, h, w = weights.shape
    places = sorted(((y, x) for y in range(h) for x in range(w)), key=lambda p: (-heat[p[0]][p[1]].item(), p))
    scores = []
    for step in range(steps + 1):
        changed = set(places[: step * h * w // steps])
        now = [[(finish if (y, x) in changed else start)[0][y][x].item() for x in range(w)] for y in range(h)]
        logits = [sum(weights[c][y][x].item() * now[y][x] for y in range(h) for x in range(w)) for c in range(k)]
        scores.append(math.exp(logits[target]) / sum(map(math.exp, logits)))
    at = [step * h * w // steps / (h * w) for step in range(steps + 1)]
    return scores, sum((b - a) * (p + q) / 2 for a, b, p, q in zip(at, at[1:], scores, scores[1:]))


@given(SEEDS, st.integers(1, 12))
@settings(max_examples=20, deadline=None)
def test_curves_against_a_slow_form(seed, steps):
    generator = rng(seed)
    weights, x = torch.randn(3, 3, 4, generator=generator), torch.randn(2, 3, 3, 4, generator=generator, dtype=torch.float64)
    heat, target = torch.randint(0, 5, (2, 3, 4), generator=generator).double(), torch.tensor([2, 0])
    heat[:, 0, 0] = 9  # no constant map; the rest has ties
    for how, ends in ((deletion, (x, torch.zeros_like(x))), (insertion, (torch.zeros_like(x), x))):
        found = how(Pixels(weights), x, heat, target, steps, "zero", batch_size=5)
        for i in range(2):
            scores, auc = slow_curve(weights, ends[0][i], ends[1][i], heat[i], int(target[i]), steps)
            assert np.allclose(found.score[i], scores) and found.auc[i].item() == pytest.approx(auc)


def test_curves_by_hand():
    "Logit difference = sum of weights 3, 2, 1, 0 of what is left: 6, 3, 1, 0, 0."
    weights, x = torch.tensor([[[3.0, 1.0], [2.0, 0.0]], [[0.0, 0.0], [0.0, 0.0]]]), torch.ones(1, 3, 2, 2)
    gone = deletion(Pixels(weights), x, weights[:1], 0, steps=4)
    assert torch.allclose(gone.score, torch.tensor([[6.0, 3, 1, 0, 0]]).sigmoid()) and gone.fraction.tolist() == [0, 0.25, 0.5, 0.75, 1]
    back = insertion(Pixels(weights), x, weights[:1], 0, steps=4, baseline="zero")
    assert torch.allclose(back.score, torch.tensor([[0.0, 3, 5, 6, 6]]).sigmoid())
    assert back.auc[0] > gone.auc[0] and torch.allclose(deletion(Pixels(weights), x, -weights[:1], 0, steps=4).auc.float(), 1 - back.auc.float() + 0, atol=1)


@given(SEEDS)
@settings(max_examples=15, deadline=None)
def test_ends_order_and_batches(seed):
    "Curves start and end at image and baseline, a monotone change of the map leaves them, and the batch size, too."
    generator = rng(seed)
    model, x = Pixels(torch.randn(3, 6, 6, generator=generator)), torch.randn(3, 3, 6, 6, generator=generator)
    heat = torch.randn(3, 6, 6, generator=generator)
    full, none = model(x).softmax(1), model(torch.zeros_like(x)).softmax(1)
    best = full.argmax(1)
    found = deletion(model, x, heat)
    assert torch.allclose(found.score[:, 0], full.amax(1)) and torch.allclose(found.score[:, -1], none.gather(1, best[:, None])[:, 0])
    assert torch.allclose(deletion(model, x, heat.exp() * 3, best, batch_size=1).score, found.score, atol=1e-6)
    turned = insertion(model, x, -heat, best, baseline="zero")
    assert torch.allclose(turned.score.flip(1), found.score, atol=1e-6), "bringing the least salient back first undoes deletion"


def test_no_batch_is_larger_than_asked():
    model = Pixels(torch.ones(2, 6, 6))
    deletion(model, torch.ones(2, 3, 6, 6), torch.rand(2, 6, 6, generator=rng(0)), 0, batch_size=4)
    assert max(model.batches[1:]) == 4 and sum(model.batches[1:]) == 2 * 7


def test_insertion_begins_with_a_blur():
    model, x = Pixels(torch.randn(2, 12, 12, generator=rng(0))), torch.zeros(1, 3, 12, 12)
    x[..., 6, 6] = 1
    start = insertion(model, x, torch.rand(1, 12, 12, generator=rng(1)), 0).score[0, 0]
    assert start not in (model(x).softmax(1)[0, 0], 0.5)


@pytest.mark.parametrize(("how", "words"), [
    (lambda m, x, h: deletion(m, x, h, baseline="grey"), "unknown baseline 'grey'"),
    (lambda m, x, h: deletion(m, x, h, target=2), "classes 0 to 1"),
    (lambda m, x, h: deletion(m, x, h, target=0.5), "float32"),
    (lambda m, x, h: deletion(m, x, h, target=torch.tensor([0, 1, 0])), "one for each of the 2 images"),
    (lambda m, x, h: deletion(m, x, h[:, :3]), "of its size"),
    (lambda m, x, h: deletion(m, x, h, steps=-1), "steps is -1.*at least one"),
    (lambda m, x, h: deletion(m, x, h, steps=0), "steps is 0"),
    (lambda m, x, h: insertion(m, x, h, steps=1.5, baseline="zero"), "steps is 1.5"),
    (lambda m, x, h: deletion(m, x, h, steps=True), "steps is True"),
    (lambda m, x, h: deletion(m, x, h, batch_size=0), "batch_size is 0"),
    (lambda m, x, h: deletion(m, x, h, batch_size="auto"), "batch_size is 'auto'"),
    (lambda m, x, h: deletion(m, x, torch.ones_like(h)), "constant"),
    (lambda m, x, h: insertion(m, x, h), "baseline='zero'"),
])
def test_bad_curves(how, words):
    with pytest.raises(InputError, match=words):
        how(Pixels(torch.ones(2, 4, 4)), torch.ones(2, 3, 4, 4), torch.rand(2, 4, 4, generator=rng(0)))


def test_a_network_of_nan():
    with pytest.raises(NonFiniteError, match="outputs"):
        deletion(Pixels(torch.full((2, 4, 4), math.nan)), torch.ones(1, 3, 4, 4), torch.rand(1, 4, 4, generator=rng(0)))
