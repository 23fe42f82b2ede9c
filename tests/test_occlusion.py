"""occlusion and its draws: tiny cases by hand, slow loops in float64, and properties."""

import json
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from patchmix_repro import occlusion
from patchmix_repro.core import InputError
from patchmix_repro.draws import donor_ids, first_patches, keyed_rand, one_order, patch_count, patch_order, patch_salience, salience_order
from patchmix_repro.occlusion import Clean, Drop, Permute, Replace, Slide, bar_columns, condition_from, paper_grid

GRIDS = st.sampled_from([1, 2, 4, 7, (1, 2), (4, 2), (2, 7)])  # all divide 28 pixels
SHARES = st.integers(0, 100).map(lambda k: k / 100)
IDS = st.lists(st.integers(0, 5000), min_size=1, max_size=6, unique=True).map(torch.tensor)
SEEDS = st.integers(0, 2**31)


def conditions():
    common = {"seed": SEEDS, "per_image": st.booleans()}
    return st.one_of(
        st.just(Clean()),
        st.builds(Replace, SHARES, GRIDS, **common),
        st.builds(Drop, SHARES, GRIDS, st.sampled_from(["black", "mean"]), st.sampled_from(["random", "salient", "nonsalient"]),
                  st.sampled_from(["mask", "saliency"]), **common),
        st.builds(Permute, GRIDS, **common),
        st.builds(Slide, st.sampled_from([0.1, 0.25, 1.0]), st.floats(-0.5, 0.5), st.sampled_from(["drawn", "red", "blue"]), seed=SEEDS),
    )


def batch(b, side=28, seed=0):
    "Images that nowhere equal their donors, and maps with many ties."
    generator = torch.Generator().manual_seed(seed)
    images, donor = (torch.rand(b, 3, side, side, generator=generator) * 0.4 + low for low in (0.05, 0.5))
    mask = (torch.rand(b, 1, side, side, generator=generator) < 0.3).byte()
    return images, {"donor": donor, "mask": mask, "saliency": torch.rand(b, 1, side, side, generator=generator).round(decimals=1)}


def boxes(side, grid):
    "Pixel slices of every patch, row by row."
    gh, gw = (grid, grid) if isinstance(grid, int) else grid
    rows, columns = np.arange(gh + 1) * side // gh, np.arange(gw + 1) * side // gw
    return [np.s_[..., rows[i] : rows[i + 1], columns[j] : columns[j + 1]] for i in range(gh) for j in range(gw)]


def cells(grid):
    return grid**2 if isinstance(grid, int) else grid[0] * grid[1]


def part(images, ids, maps, index):
    return images[index], ids[index], {key: value[index] for key, value in maps.items()}


# --- draws ------------------------------------------------------------------------------------------------------------


@given(ids=st.lists(st.integers(0, 5000), min_size=1, max_size=8), seed=SEEDS, data=st.data())
def test_a_draw_belongs_to_the_id(ids, seed, data):
    draws = keyed_rand(torch.tensor(ids), (2, 3), seed, "test", 7)
    assert draws.shape == (len(ids), 2, 3) and 0 <= draws.min() and draws.max() < 1
    order = data.draw(st.permutations(range(len(ids))))
    assert torch.equal(keyed_rand(torch.tensor(ids)[order], (2, 3), seed, "test", 7), draws[order])


def test_draws_differ_between_ids_seeds_and_purposes():
    ids = torch.tensor([0, 1, 1023, 1024, 2047, 2048])
    draws = [keyed_rand(ids, (4,), *key) for key in ((0, "a"), (1, "a"), (0, "b"), (0, "a", 7))]
    assert torch.cat(draws).unique().numel() == 4 * 6 * 4
    assert keyed_rand(ids[:0], (4,), 0, "a").shape == (0, 4)


def test_draws_are_uniform():
    draws = keyed_rand(torch.arange(5000), (4,), 0, "uniform").double()
    assert abs(draws.mean() - 1 / 2) < 4 * (1 / 12 / 20_000) ** 0.5
    assert (draws.flatten().mul(10).long().bincount(minlength=10) - 2000).abs().max() < 5 * (20_000 * 0.09) ** 0.5


def test_the_draws_of_published_numbers_stay():
    assert patch_order(torch.tensor([0, 5000]), 2, 0, "drop").tolist() == [[3, 2, 0, 1], [2, 0, 1, 3]]
    assert Replace(0.1, 7).mask(torch.tensor([1024])).nonzero()[:, 1].tolist() == [20, 23, 25, 31]


@given(k=st.integers(0, 1000), n=st.integers(1, 400))
def test_counts_are_floors_of_the_decimal_product(k, n):
    assert patch_count(k / 1000, n) == Fraction(k, 1000) * n // 1


def test_counts_of_ipvit():
    assert [patch_count(k / 10, 196) for k in range(10)] == [k * 196 // 10 for k in range(10)]
    assert [patch_count(s, 196) for s in (0.2, 0.4, 0.6, 0.8)] == [39, 78, 117, 156]
    assert patch_count(0.29, 100) == 29 and patch_count(2 / 7, 49) == 14 and patch_count(0.3, 196) == 58 and patch_count(3 * 0.1, 10) == 3


@given(ids=IDS, grid=GRIDS, seed=SEEDS)
def test_an_order_holds_every_patch_once(ids, grid, seed):
    order = patch_order(ids, grid, seed, "test")
    assert order.sort(dim=1).values.tolist() == [list(range(cells(grid)))] * len(ids)
    assert sorted(one_order(grid, seed, "test").tolist()) == list(range(cells(grid)))


def test_every_order_of_three_is_equally_likely_and_one_order_moves():
    counts = {}
    for row in patch_order(torch.arange(6000), (1, 3), 0, "test").tolist():
        counts[tuple(row)] = counts.get(tuple(row), 0) + 1
    assert len(counts) == 6 and all(abs(c - 1000) < 5 * (6000 * 5 / 36) ** 0.5 for c in counts.values())
    orders = {tuple(one_order((1, 3), seed, "test").tolist()) for seed in range(60)}
    assert orders == set(counts) - {(0, 1, 2)}


@given(ids=IDS, grid=GRIDS, seed=SEEDS, shares=st.tuples(SHARES, SHARES))
def test_a_larger_share_contains_the_smaller(ids, grid, seed, shares):
    order = patch_order(ids, grid, seed, "test")
    small, large = (first_patches(order, share) for share in sorted(shares))
    assert not (small & ~large).any()
    assert large.sum(1).tolist() == [patch_count(max(shares), cells(grid))] * len(ids)


def test_first_patches_by_hand():
    assert first_patches(torch.tensor([[2, 0, 3, 1], [1, 2, 3, 0]]), 0.5).tolist() == [[True, False, True, False], [False, True, True, False]]


# --- salience ---------------------------------------------------------------------------------------------------------


@given(b=st.integers(1, 3), grid=GRIDS, seed=SEEDS)
def test_salience_agrees_with_loops(b, grid, seed):
    salience = torch.rand(b, 1, 28, 28, generator=torch.Generator().manual_seed(seed))
    slow = [[image[box].mean() for box in boxes(28, grid)] for image in salience.double().numpy()]
    np.testing.assert_allclose(patch_salience(salience, grid).numpy(), slow, rtol=1e-12)


@given(values=st.lists(st.integers(0, 3), min_size=1, max_size=12), seed=SEEDS, salient=st.booleans())
def test_salient_patches_come_first_and_ties_keep_their_order(values, seed, salient):
    order = torch.randperm(len(values), generator=torch.Generator().manual_seed(seed))
    slow = sorted(order.tolist(), key=lambda patch: -values[patch] if salient else values[patch])  # sorted is stable
    assert salience_order(order[None], torch.tensor([values]).double(), salient).tolist() == [slow]


def test_patches_with_equal_pixels_are_ties_for_every_batch_size():
    salience = torch.full((37, 1, 56, 56), 0.1)
    assert all((patch_salience(salience[:b], 14) == patch_salience(salience[:1], 14)[0, 0]).all() for b in (1, 2, 37))


# --- donors -----------------------------------------------------------------------------------------------------------


@given(labels=st.lists(st.integers(-1, 3), min_size=2, max_size=12).filter(lambda y: len(set(y)) > 1), seed=SEEDS, data=st.data())
def test_donors_agree_with_loops(labels, seed, data):
    ids = torch.tensor(data.draw(st.lists(st.integers(0, 4000), min_size=len(labels), max_size=len(labels), unique=True)))
    draws = keyed_rand(ids, (), seed, "donor").double().tolist()
    block = sorted(zip(labels, ids.tolist(), strict=True))
    slow = []
    for label, draw in zip(labels, draws, strict=True):
        others = [i for other, i in block if other != label]
        slow.append(others[int(draw * len(others))])
    donors = donor_ids(torch.tensor(labels), ids, seed)
    assert donors.tolist() == slow
    order = data.draw(st.permutations(range(len(labels))))
    assert torch.equal(donor_ids(torch.tensor(labels)[order], ids[order], seed), donors[order])


def test_all_other_images_are_equally_likely_donors():
    labels, ids = torch.tensor([0, 0, 1, 2, 2]), torch.arange(5)
    seen = torch.stack([donor_ids(labels, ids, seed) for seed in range(3000)])
    for i, others in enumerate([[2, 3, 4], [2, 3, 4], [0, 1, 3, 4], [0, 1, 2], [0, 1, 2]]):
        counts = seen[:, i].bincount(minlength=5)
        assert counts[others].sum() == 3000
        assert (counts[others] - 3000 / len(others)).abs().max() < 5 * (3000 / len(others)) ** 0.5


# --- by hand ----------------------------------------------------------------------------------------------------------

ONE = torch.tensor([3])
TINY = (torch.arange(16.0) / 16).view(1, 1, 4, 4).expand(1, 3, 4, 4)


def test_nothing_and_everything():
    images, maps = batch(1)
    assert torch.equal(Replace(0.0, 7)(images, ONE, maps), images)
    assert torch.equal(Replace(1.0, 7)(images, ONE, maps), maps["donor"])
    assert (Drop(1.0, 7)(images, ONE) == 0).all()
    assert torch.equal(Drop(1, 7, fill="mean")(images, ONE)[0, :, 5, 6], torch.tensor([0.485, 0.456, 0.406]))
    assert torch.equal(Permute(1)(images, ONE), images) and Clean()(images, ONE) is images


def test_salient_drop_by_hand():
    mask = torch.zeros(1, 1, 4, 4)
    mask[..., :2, 2:], mask[..., 2:, :2] = 1, 0.5  # patches 1 and 2 of the 2 x 2 grid
    keep = {share: (Drop(share, 2, which=which)(TINY + 1 / 32, ONE, {"mask": mask})[0, 0, ::2, ::2] > 0).flatten().tolist()
            for share, which in ((0.25, "salient"), (0.5, "salient"), (0.75, "nonsalient"))}
    assert keep == {0.25: [True, False, True, True], 0.5: [True, False, False, True], 0.75: [False, True, False, False]}


def test_permutation_by_hand():
    assert Permute((1, 2), seed=5)(TINY, ONE)[0, 0, 0].tolist() == [2 / 16, 3 / 16, 0, 1 / 16]


def test_slide_by_hand():
    out = Slide(width=0.5, x=-0.25, colour="red")(TINY, ONE)
    assert out[0, 0].tolist() == [[0.75, 0.75, *row] for row in TINY[0, 0, :, 2:].tolist()]
    assert Slide(width=0.5, x=0.5, colour="blue")(TINY, ONE)[0, :, 2].T.tolist() == [[v] * 3 for v in TINY[0, 0, 2, :3].tolist()] + [[*torch.tensor([0.12, 0.25, 0.7]).tolist()]]


# --- against loops ----------------------------------------------------------------------------------------------------


@given(ids=IDS, condition=st.one_of(st.builds(Replace, SHARES, GRIDS, seed=SEEDS), st.builds(Drop, SHARES, GRIDS, st.sampled_from(["black", "mean"]), seed=SEEDS)))
def test_exactly_the_masked_patches_change(ids, condition):
    images, maps = batch(len(ids))
    fill = maps["donor"].double().numpy() if isinstance(condition, Replace) else np.zeros((len(ids), 3, 28, 28))
    if condition.settings().get("fill") == "mean":
        fill = fill + np.float32([0.485, 0.456, 0.406]).astype(float)[:, None, None]
    slow, mask = images.double().numpy().copy(), condition.mask(ids)
    for row, image, other in zip(mask.tolist(), slow, fill, strict=True):
        for bit, box in zip(row, boxes(28, condition.grid), strict=True):
            if bit:
                image[box] = other[box]
    out = condition(images, ids, maps)
    assert np.array_equal(out.double().numpy(), slow) and out.dtype == images.dtype
    changed = sum((out != images).numpy()[box].any((1, 2, 3)).astype(int) for box in boxes(28, condition.grid))
    assert changed.tolist() == [patch_count(condition.share, cells(condition.grid))] * len(ids)
    assert condition.settings()["true_share"] == mask[0].sum().item() / mask.shape[1]


@given(ids=IDS, condition=st.builds(Permute, GRIDS, seed=SEEDS, per_image=st.booleans()))
def test_a_permutation_keeps_the_patches(ids, condition):
    images, _ = batch(len(ids))
    out = condition(images, ids)
    where = boxes(28, condition.grid)
    for before, after in zip(images.numpy(), out.numpy(), strict=True):
        assert sorted(before[box].tobytes() for box in where) == sorted(after[box].tobytes() for box in where)


def test_one_permutation_is_for_all_and_each_has_its_own():
    images, ids = batch(1)[0].expand(3, -1, -1, -1), torch.tensor([1, 2, 2000])
    one, each = Permute(7)(images, ids), Permute(7, per_image=True)(images, ids)
    assert torch.equal(one[0], one[1]) and torch.equal(one[0], one[2]) and not torch.equal(one, images)
    assert all(not torch.equal(each[i], each[j]) for i, j in ((0, 1), (0, 2), (1, 2)))
    assert torch.equal(Drop(0.5, 7, per_image=False).mask(ids), Drop(0.5, 7, per_image=False).mask(ids + 7))
    assert not torch.equal(Drop(0.5, 7).mask(ids), Drop(0.5, 7).mask(ids + 7))


@given(w=st.integers(1, 300), width=st.floats(0.01, 1), x=st.floats(-0.5, 0.5))
def test_the_bar_agrees_with_a_loop(w, width, x):
    edges = [(Fraction(0.5) + Fraction(x) + side * Fraction(width) / 2) * w for side in (-1, 1)]
    slow = [edges[0] <= Fraction(2 * j + 1, 2) < edges[1] for j in range(w)]
    close = [min(abs(float(edge) - j - 0.5) for edge in edges) < 1e-5 for j in range(w)]  # rounding decides
    assert all(near or fast == exact for near, fast, exact in zip(close, bar_columns(w, width, x).tolist(), slow, strict=True))


@pytest.mark.parametrize("w", [56, 112, 224])
def test_the_bar_has_its_width_wherever_it_fits(w):
    assert {int(bar_columns(w, 0.25, k / 100).sum()) for k in range(-37, 38)} == {w // 4}


def test_both_colours_occur_and_hold_for_all_positions():
    images, ids = torch.zeros(200, 3, 8, 8), torch.arange(200)
    red = [Slide(width, x)(images, ids).amax((2, 3))[:, 0] > 0.5 for width, x in ((0.25, 0.0), (0.5, 0.4))]
    assert torch.equal(*red) and 60 < red[0].sum() < 140


# --- every condition --------------------------------------------------------------------------------------------------


@settings(max_examples=60)
@given(condition=conditions(), ids=IDS, data=st.data())
def test_the_batch_does_not_matter_and_the_input_stays(condition, ids, data):
    images, maps = batch(len(ids))
    before = images.clone(), ids.clone(), {key: value.clone() for key, value in maps.items()}
    whole = condition(images, ids, maps)
    assert torch.equal(images, before[0]) and torch.equal(ids, before[1]) and all(torch.equal(maps[key], before[2][key]) for key in maps)
    assert whole.shape == images.shape and whole.dtype == images.dtype and 0 <= whole.min() and whole.max() <= 1
    cut = data.draw(st.integers(0, len(ids)))
    halves = [condition(*part(images, ids, maps, index)) for index in (slice(cut), slice(cut, None))]
    assert torch.equal(torch.cat(halves), whole)
    order = data.draw(st.permutations(range(len(ids))))
    assert torch.equal(condition(*part(images, ids, maps, order)), whole[order])


@given(condition=conditions())
def test_settings_survive_json(condition):
    text = json.dumps(condition.settings(), allow_nan=False)
    assert json.loads(text) == condition.settings()
    assert condition_from(json.loads(text)) == condition and hash(condition_from(json.loads(text))) == hash(condition)
    assert {"kind", "grid", "share", "x", "true_share"} <= set(condition.settings())
    assert {type(condition.settings()[key]) for key in ("share", "x", "true_share")} == {float}


@given(one=conditions(), other=conditions())
def test_conditions_of_one_name_give_one_result(one, other):
    images, maps = batch(3)
    ids = torch.tensor([0, 7, 2000])
    if one.name == other.name:
        assert torch.equal(one(images, ids, maps), other(images, ids, maps))


def test_names_by_hand():
    named = {
        "clean": Clean(), "replace-14-30": Replace(0.3), "replace-7-12.5-seed1": Replace(0.125, 7, seed=1), "replace-2x7-29": Replace(0.29, (2, 7)),
        "drop-14-40-black-random": Drop(0.4), "drop-7-20-mean-salient": Drop(0.2, 7, "mean", "salient"),
        "drop-14-20-black-nonsalient-saliency": Drop(0.2, which="nonsalient", source="saliency"),
        "drop-14-20-black-random-shared": Drop(0.2, per_image=False), "permute-196": Permute(14), "permute-2x4-each": Permute((2, 4), per_image=True),
        "slide-25-50": Slide(), "slide-10-0-red-seed3": Slide(0.1, -0.5, "red", seed=3),
    }
    assert [condition.name for condition in named.values()] == list(named)


def test_the_papers_list():
    found = paper_grid()
    assert len({c.name for c in found}) == len(set(found)) == 19 and found[0] == Clean()
    settings = [c.settings() for c in found]
    x = {key: [s["x"] for s in settings if (s["kind"], s["grid"]) == key] for key in (("replace", 14), ("replace", 7), ("drop", 14))}
    assert x == {("replace", 14): [10, 20, 30, 40, 50], ("replace", 7): [10, 20, 30, 40, 50], ("drop", 14): [20, 40, 60, 80]}
    assert [s["x"] for s in settings if s["kind"] == "permute"] == [4, 16, 64, 196]
    assert [round(s["true_share"] * 196) for s in settings if s["kind"] == "drop"] == [39, 78, 117, 156]
    assert {c.seed for c in paper_grid(seed=4)[1:]} == {4}


@pytest.mark.parametrize("side", [56, 112, 224])
def test_the_papers_list_fits_every_scale(side):
    images, maps = batch(2, side)
    for condition in paper_grid():
        out = condition(images, torch.tensor([4, 9]), maps)
        assert condition == Clean() or not torch.equal(out, images)


def test_half_precision_and_channels_last():
    images, maps = batch(2)
    ids, last = torch.tensor([1, 2]), images.half().contiguous(memory_format=torch.channels_last)
    for condition in (Replace(0.3, 7), Drop(0.3, 7, "mean", "salient"), Permute(7), Slide()):
        out = condition(last, ids, {**maps, "donor": maps["donor"].half()})
        assert out.dtype == torch.half and out.is_contiguous(memory_format=torch.channels_last)
        torch.testing.assert_close(out.float(), condition(images, ids, maps), atol=1e-3, rtol=1e-3)


# --- wrong input ------------------------------------------------------------------------------------------------------

X, MAPS, TWO = *batch(2), torch.tensor([5, 6])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Replace(1.01), "share 1.01 of replace is impossible. Give a number from 0 to 1"),
        (lambda: Drop(-0.1), "share -0.1"),
        (lambda: Drop(float("nan")), "share nan"),
        (lambda: Drop("0.3"), "share '0.3'"),
        (lambda: Drop(True), "share True"),
        (lambda: Replace(0.3, 0), "grid 0 of replace"),
        (lambda: Replace(0.3, 7.0), "grid 7.0"),
        (lambda: Permute([2, 4]), r"grid \[2, 4\].*a pair \(rows, columns\)"),
        (lambda: Permute((2, 4, 2)), "grid"),
        (lambda: Permute(14, per_image=1), "per_image 1 .*True or False"),
        (lambda: Permute(14, seed=0.5), "seed 0.5"),
        (lambda: Replace(0.3, donor="other_clas"), "did you mean 'other_class'"),
        (lambda: Drop(0.3, fill="blak"), "did you mean 'black'"),
        (lambda: Drop(0.3, which="non-salient"), "did you mean 'nonsalient'"),
        (lambda: Drop(0.3, source="masks"), "did you mean 'mask'"),
        (lambda: Slide(colour="green"), "Allowed: drawn, red, blue"),
        (lambda: Slide(width=0), "width 0 of slide"),
        (lambda: Slide(width=1.5), "width 1.5"),
        (lambda: Slide(x=0.51), "x 0.51"),
        (lambda: Replace(0.3)(X, TWO), r"replace-14-30 needs the map 'donor' and was given \[\]. Call it with maps=\{'donor': b 3 h w, images of another class\}"),
        (lambda: Drop(0.3, which="salient")(X, TWO, {"donor": X}), r"needs the map 'mask' and was given \['donor'\]"),
        (lambda: Drop(0.3, which="salient").mask(TWO), "needs the map 'mask'"),
        (lambda: Replace(0.3, 7)(X, TWO, {"donor": X[:1]}), r"the map 'donor' of replace-7-30 is \(1, 3, 28, 28\). Give \(2, 3, 28, 28\)"),
        (lambda: Drop(0.3, 7, which="salient")(X, TWO, {"mask": X}), r"Give \(2, 1, 28, 28\): b 1 h w, 1 on the object"),
        (lambda: Drop(0.3, 7, which="salient")(X, TWO, {"mask": -X[:, :1]}), "negative or NaN"),
        (lambda: Drop(0.3, 7, which="salient")(X, TWO, {"mask": X[:, :1] * float("nan")}), "negative or NaN"),
        (lambda: Replace(0.3)(X[..., :27, :27], TWO, {"donor": X[..., :27, :27]}), "grid 14 x 14 does not divide a 27 x 27 image"),
        (lambda: Permute(8)(X, TWO), "grid 8 x 8 does not divide"),
        (lambda: Replace(0.3)(X, TWO, {"donor": X * 255}), r"donors run from .*Give them in \[0, 1\]"),
        (lambda: Replace(0.3)(X, TWO, {"donor": X * torch.nan}), "donors run from nan"),
        (lambda: Drop(0.3)(X * 255, TWO), r"run from .* to .*Give them in \[0, 1\] and normalise after"),
        (lambda: Drop(0.3)(X * float("nan"), TWO), "run from nan"),
        (lambda: Slide()(X.mul(255).byte(), TWO), "torch.uint8 .* Give float images b 3 h w"),
        (lambda: Slide()(X[:, :1], TWO), "do not go together"),
        (lambda: Clean()(X, TWO[:1]), "a whole number for each"),
        (lambda: Permute(7)(X, TWO.float()), "a whole number for each"),
        (lambda: donor_ids(torch.tensor([4, 4]), TWO, 0), "all 2 images of the block are of class 4"),
        (lambda: donor_ids(torch.tensor([4, 4, 3]), TWO, 0), "one label for each id"),
        (lambda: condition_from({"kind": "replase"}), "unknown condition 'replase'; did you mean 'replace'"),
        (lambda: condition_from({}), "unknown condition None"),
        (lambda: condition_from({"kind": "drop", "share": 0.3}), "the settings of drop lack grid, fill, which, source, seed, per_image"),
        (lambda: condition_from({**Permute(7).settings(), "grid": 7.5}), "grid 7.5"),
    ],
)
def test_messages_name_the_remedy(call, message):
    with pytest.raises(InputError, match=message):
        call()


@dataclass(frozen=True)
class Flip:
    kind, name, needs, seed = "flip", "flip", (), 0
    settings = occlusion.settings_of


def test_another_kind_can_join(monkeypatch):
    monkeypatch.setitem(occlusion.CONDITIONS, "flip", Flip)
    assert condition_from(Flip().settings()) == Flip()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_device_does_not_matter():
    images, maps = batch(4)
    ids = torch.tensor([1, 5, 900, 3000])
    for condition in (*paper_grid(), Drop(0.3, 7, which="salient"), Drop(0.3, 7, which="nonsalient", source="saliency"), Slide()):
        if getattr(condition, "grid", 7) in (2, 4, 7, 14):
            moved = condition(images.cuda(), ids, {key: value.cuda() for key, value in maps.items()})
            assert torch.equal(moved.cpu(), condition(images, ids, maps))
