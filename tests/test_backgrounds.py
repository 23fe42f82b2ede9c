"""The Background Challenge's variants: worked by hand, pixel by pixel, and by their promises on any image and set."""
import hashlib
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from patchmix_repro import backgrounds as bg
from patchmix_repro.core import InputError
from patchmix_repro.data import create_dataset
from patchmix_repro.files import ImageSet

IMAGE = torch.arange(1, 17).view(1, 4, 4)
MASK = torch.tensor([[0, 0, 0, 0], [0, 1, 1, 0], [0, 1, 0, 0], [0, 0, 0, 0]])[None]
OTHER = -IMAGE


# ---- a 4 x 4 image by hand ----

@pytest.mark.parametrize(("variant", "expected"), [
    ("original", [[1, 2, 3, 4], [5, 6, 7, 8], [9, 10, 11, 12], [13, 14, 15, 16]]),
    ("only_bg_b", [[1, 2, 3, 4], [5, 0, 0, 8], [9, 0, 0, 12], [13, 14, 15, 16]]),
    ("only_bg_t", [[1, 2, 3, 4], [5, 2, 3, 8], [9, 2, 3, 12], [13, 14, 15, 16]]),  # four strips of 4 px: the first, above, repeats itself
    ("no_fg", [[1, 2, 3, 4], [5, 0, 0, 8], [9, 0, 11, 12], [13, 14, 15, 16]]),
    ("only_fg", [[0, 0, 0, 0], [0, 6, 7, 0], [0, 10, 0, 0], [0, 0, 0, 0]]),
    *((f"mixed_{kind}", [[-1, -2, -3, -4], [-5, 6, 7, -8], [-9, 10, -11, -12], [-13, -14, -15, -16]]) for kind in ("same", "rand", "next"))])
def test_each_variant_by_hand(variant, expected):
    assert bg.VARIANTS[variant](IMAGE, MASK, OTHER)[0].tolist() == expected


def test_the_names_and_their_order_are_the_papers():
    assert list(bg.VARIANTS) == ["original", "only_bg_b", "only_bg_t", "no_fg", "only_fg", "mixed_same", "mixed_rand", "mixed_next"]


@pytest.mark.parametrize(("cells", "box", "strip", "first_row"), [
    ([(0, 0)], (0, 1, 0, 1), (1, 4, 0, 4), [13, 2, 3, 4]),  # below, rows 1 to 3: one row up from row 1 is row 3 again
    ([(0, 3), (3, 3)], (0, 4, 3, 4), (0, 4, 0, 3), [1, 2, 3, 1]),  # left, columns 0 to 2: column 3 shows column 0
    ([(0, 0), (3, 1)], (0, 4, 0, 2), (0, 4, 2, 4), [3, 4, 3, 4]),  # right, columns 2 and 3
    ([(3, 0), (3, 3)], (3, 4, 0, 4), (0, 3, 0, 4), [1, 2, 3, 4])])  # above, rows 0 to 2
def test_box_strip_and_tile_at_each_side(cells, box, strip, first_row):
    mask = torch.zeros(1, 4, 4, dtype=torch.uint8)
    for y, x in cells:
        mask[0, y, x] = 1
    assert bg.bounding_box(mask) == box and bg.largest_strip(box, 4, 4) == strip
    assert bg.only_bg_t(IMAGE, mask)[0, 0].tolist() == first_row


# ---- pixel by pixel ----

def slow(variant, image, mask, background):
    "Every variant from its sentence, one pixel after the other."
    c, h, w = image.shape
    inside = [(y, x) for y in range(h) for x in range(w) if mask[0, y, x]]
    top, bottom = min(y for y, _ in inside), max(y for y, _ in inside)
    left, right = min(x for _, x in inside), max(x for _, x in inside)
    best, size = None, -1
    for name, area in (("above", top * w), ("below", (h - 1 - bottom) * w), ("left", left * h), ("right", (w - 1 - right) * h)):
        if area > size:
            best, size = name, area
    out = np.zeros_like(image)
    for y in range(h):
        for x in range(w):
            in_box, on = top <= y <= bottom and left <= x <= right, (y, x) in inside
            ty, tx = y, x
            while best == "above" and ty >= top:
                ty -= top
            while best == "below" and ty <= bottom:
                ty += h - 1 - bottom
            while best == "left" and tx >= left:
                tx -= left
            while best == "right" and tx <= right:
                tx += w - 1 - right
            pixel = {"original": image[:, y, x], "only_bg_b": 0 if in_box else image[:, y, x], "no_fg": 0 if on else image[:, y, x],
                     "only_fg": image[:, y, x] if on else 0, "only_bg_t": image[:, ty, tx] if in_box else image[:, y, x]}
            out[:, y, x] = pixel.get(variant, image[:, y, x] if on or background is None else background[:, y, x])
    return out


@st.composite
def pictures(draw):
    "An image, a mask whose box leaves a strip, and a background."
    h, w = draw(st.integers(2, 7)), draw(st.integers(2, 7))
    image, background = (draw(arrays(np.uint8, (3, h, w))) for _ in range(2))
    mask = draw(arrays(np.uint8, (1, h, w), elements=st.integers(0, 1)))
    edge = draw(st.integers(0, 3))
    mask[0, {0: 0, 1: h - 1}.get(edge, slice(None)), {2: 0, 3: w - 1}.get(edge, slice(None))] = 0
    if not mask.any():
        mask[0, 1 if edge == 0 else 0, 1 if edge == 2 else 0] = 1
    return image, mask, background


@given(pictures())
@settings(max_examples=80)
def test_every_variant_agrees_with_the_slow_form(case):
    image, mask, background = case
    for variant, make in bg.VARIANTS.items():
        found = make(*map(torch.from_numpy, case))
        assert found.dtype == torch.uint8 and np.array_equal(found.numpy(), slow(variant, image, mask, background)), variant


@given(pictures())
@settings(max_examples=80)
def test_what_each_variant_promises_for_any_picture(case):
    image, mask, background = map(torch.from_numpy, case)
    before = image.clone()
    on = mask.bool().expand_as(image)
    top, bottom, left, right = bg.bounding_box(mask)
    out_of_box = torch.ones_like(on)
    out_of_box[:, top:bottom, left:right] = False
    made = {name: make(image, mask, background) for name, make in bg.VARIANTS.items()}
    assert torch.equal(made["only_fg"] + made["no_fg"], image) and torch.equal(made["original"], image)
    assert torch.equal(made["no_fg"][~on], image[~on]) and not made["no_fg"][on].any() and not made["only_fg"][~on].any()
    for name in ("mixed_same", "mixed_rand", "mixed_next"):
        assert torch.equal(made[name][on], image[on]) and torch.equal(made[name][~on], background[~on])
        assert torch.equal(made[name].float(), image * mask.float() + background * (1 - mask.float()))
    for name in ("only_bg_b", "only_bg_t"):
        assert torch.equal(made[name][out_of_box], image[out_of_box])
    assert not made["only_bg_b"][~out_of_box].any()
    other = torch.where(on, 255 - image, image)  # nothing of the object is left
    assert torch.equal(bg.only_bg_t(other, mask), made["only_bg_t"]) and torch.equal(bg.no_fg(other, mask), made["no_fg"])
    assert torch.equal(image, before)


@pytest.mark.parametrize("make", [bg.only_fg, bg.no_fg, lambda i, m: bg.mix_background(i, m, i.flip(-1))])
def test_a_batch_is_the_images_one_by_one(make):
    images, masks = torch.randn(3, 2, 4, 5), torch.randint(0, 2, (3, 1, 4, 5))
    assert torch.equal(make(images, masks), torch.stack([make(i, m) for i, m in zip(images, masks)]))


# ---- bad input ----

@pytest.mark.parametrize(("mask", "words"), [
    (torch.zeros(1, 4, 4), "covers nothing"), (torch.ones(1, 4, 4), "covers the whole picture"), (torch.eye(4)[None], "covers the whole picture"),
    (torch.ones(1, 2, 4), r"\(1, 2, 4\) do not fit"), (torch.ones(4, 4), "do not fit"), (torch.full((1, 4, 4), 0.5), "cut a soft mask"),
    (torch.full((1, 4, 4), float("nan")), "cut a soft mask"), (torch.ones(3, 4, 4), "do not fit")])
@pytest.mark.parametrize("make", [bg.only_bg_b, bg.only_bg_t])
def test_masks_that_leave_no_background(make, mask, words):
    with pytest.raises(InputError, match=words):
        make(IMAGE, mask)


def test_a_background_of_another_kind_is_refused():
    with pytest.raises(InputError, match="Give both alike"):
        bg.mix_background(IMAGE, MASK, IMAGE.float())
    with pytest.raises(InputError, match="Give both alike"):
        bg.mix_background(IMAGE, MASK, IMAGE[:, :2])


@pytest.mark.parametrize(("dataset", "words"), [
    (SimpleNamespace(name="cifar10", in_memory=True, masks=None), "cifar10 has no masks.*shapes9"),
    (SimpleNamespace(name="pets", in_memory=False, masks=None), "pets is streamed.*memory=True")])
def test_sets_without_masks_are_refused(dataset, words):
    with pytest.raises(InputError, match=words):
        bg.background_set(dataset, "no_fg")


# ---- sets ----

def small(n=24, k=3, size=8, seed=0, **columns):
    "Random squares on noise, k classes in turn."
    generator = torch.Generator().manual_seed(seed)
    images, masks = torch.randint(0, 256, (n, 3, size, size), generator=generator, dtype=torch.uint8), torch.zeros(n, 1, size, size, dtype=torch.uint8)
    for i in range(n):
        y, x = torch.randint(0, size - 3, (2,), generator=generator).tolist()
        masks[i, 0, y:y + 3, x:x + 3] = 1
    names = tuple("abcdefghi"[:k])
    manifest = pd.DataFrame({"file": [f"{i:03}.png" for i in range(n)], "label": [i % k for i in range(n)], "sha256": "", **columns})
    manifest["class"] = [names[i] for i in manifest.label]
    return ImageSet("small", "test", names, manifest, images, masks)


@given(st.integers(2, 30), st.integers(1, 5), st.integers(0, 5), st.data())
@settings(max_examples=60)
def test_a_background_comes_from_where_it_is_promised(n, k, seed, data):
    labels = torch.tensor(data.draw(st.lists(st.integers(0, k - 1), min_size=n, max_size=n)))
    usable = torch.tensor(data.draw(st.lists(st.booleans(), min_size=n, max_size=n)))
    for variant, shift in (("mixed_same", 0), ("mixed_next", 1), ("mixed_rand", None)):
        donors = bg.draw_backgrounds(labels, usable, variant, k, seed)
        assert torch.equal(donors, bg.draw_backgrounds(labels, usable, variant, k, seed))
        for i, donor in enumerate(donors.tolist()):
            allowed = [j for j in range(n) if j != i and usable[j] and (shift is None or labels[j] == (labels[i] + shift) % k)]
            assert donor in allowed if allowed else donor == -1


def test_mixed_rand_draws_classes_evenly_however_large_they_are():
    labels = torch.tensor([0] * 3000 + [1] * 300 + [2] * 30)
    drawn = labels[bg.draw_backgrounds(labels, torch.ones(3330, dtype=torch.bool), "mixed_rand", 3, 0)].bincount(minlength=3) / 3330
    assert (drawn - 1 / 3).abs().max() < 0.03


def test_within_a_class_every_other_image_is_drawn_alike():
    n = 6
    counts = torch.zeros(n, n)
    for seed in range(600):
        counts[torch.arange(n), bg.draw_backgrounds(torch.zeros(n, dtype=torch.int64), torch.ones(n, dtype=torch.bool), "mixed_same", 1, seed)] += 1
    assert not counts.diagonal().any() and ((counts[~torch.eye(n, dtype=torch.bool)] - 120).abs() < 50).all()


def test_a_draw_depends_on_seed_and_variant_and_not_on_later_images():
    labels, all_of = torch.arange(3000) % 3, torch.ones(3000, dtype=torch.bool)
    usable = all_of.clone()
    usable[30:] = False  # the lenders stay the same
    long = bg.draw_backgrounds(labels, usable, "mixed_rand", 3, 1)
    assert torch.equal(long[:40], bg.draw_backgrounds(labels[:40], usable[:40], "mixed_rand", 3, 1))
    one, other = (bg.draw_backgrounds(labels, all_of, "mixed_same", 3, seed) for seed in (0, 1))
    assert (one != other).float().mean() > 0.9


def test_drawing_leaves_the_global_generator_alone():
    state = torch.get_rng_state()
    bg.background_sets(small())
    assert torch.equal(state, torch.get_rng_state())


def test_a_set_is_what_its_manifest_says():
    data = small()
    sets, skipped = bg.background_sets(data, seed=3)
    assert list(sets) == list(bg.VARIANTS) and skipped.empty
    for name, found in sets.items():
        table = found.manifest
        assert (found.name, found.split, found.classes, found.num_classes) == (f"small-{name}", "test", data.classes, 3)
        assert found.labels.tolist() == data.labels.tolist() and table.fg_file.tolist() == data.manifest.file.tolist()
        assert table.file.tolist() == [f"{name}/{file}" for file in data.manifest.file] and table.variant.eq(name).all()
        for i, row in enumerate(table.itertuples()):
            lent = slow("only_bg_t", data.images[row.bg_id].numpy(), data.masks[row.bg_id].numpy(), None) if name.startswith("mixed") else None
            assert np.array_equal(found.images[i].numpy(), slow(name, data.images[i].numpy(), data.masks[i].numpy(), lent))
            assert row.sha256 == hashlib.sha256(found.images[i].numpy().tobytes()).hexdigest()
            if name == "only_fg":
                assert (row.bg_id, row.bg_file, row.bg_class, row.bg_label) == (-1, "", "", -1)
            else:
                other = data.manifest.iloc[row.bg_id]
                assert (row.bg_file, row.bg_class, row.bg_label) == (other.file, other["class"], other.label)
                assert (row.bg_id == i) != name.startswith("mixed")
        shift = {"mixed_same": 0, "mixed_next": 1}.get(name)
        assert shift is None or (table.bg_label == (table.label + shift) % 3).all()
        assert torch.equal(found.masks, torch.zeros_like(data.masks) if name.startswith("only_bg") else data.masks)


def test_the_same_seed_gives_the_same_bytes_and_one_variant_alone_the_same_pictures():
    data = small()
    sets = bg.background_sets(data, seed=1).sets
    for name in bg.VARIANTS:
        alone = bg.background_set(data, name, seed=1)
        assert torch.equal(alone.images, sets[name].images) and alone.manifest.equals(sets[name].manifest) and alone.skipped.empty
    assert bg.background_set(data, "mixed_rand").manifest_hash != sets["mixed_rand"].manifest_hash
    assert bg.background_set(data, "no_fg").manifest_hash == sets["no_fg"].manifest_hash


def flawed():
    "Image 1: nothing; 2: everything; 3: a box as large as the picture; 4: not trusted."
    data = small(mask_ok=[1, 1, 1, 1, 0] + [1] * 19)
    data.masks[1], data.masks[2], data.masks[3] = 0, 1, torch.eye(8, dtype=torch.uint8)
    return data


@pytest.mark.parametrize(("variant", "lost"), [
    ("original", []), ("only_bg_b", [1, 2, 3, 4]), ("only_bg_t", [1, 2, 3, 4]), ("no_fg", [1, 2, 4]), ("only_fg", [1, 2, 4]),
    ("mixed_same", [1, 2, 4]), ("mixed_rand", [1, 2, 4]), ("mixed_next", [1, 2, 4])])
def test_what_cannot_be_built_is_listed_and_nothing_else(variant, lost):
    found = bg.background_set(flawed(), variant)
    assert found.skipped.id.tolist() == lost and len(found) + len(lost) == 24
    assert sorted([*found.manifest.fg_id, *found.skipped.id]) == list(range(24))
    reasons = {1: "covers nothing", 2: "covers everything", 3: "whole picture", 4: "mask_ok"}
    assert all(reasons[i] in why for i, why in zip(found.skipped.id, found.skipped.reason))
    if variant.startswith("mixed"):
        assert not set(found.manifest.bg_id) & {1, 2, 3, 4}


def test_all_variants_hold_the_images_that_all_of_them_allow():
    sets, skipped = bg.background_sets(flawed())
    assert {tuple(found.manifest.fg_id) for found in sets.values()} == {(0, *range(5, 24))}
    assert set(skipped.id) == {1, 2, 3, 4} and set(skipped.variant[skipped.id == 3]) == {"only_bg_b", "only_bg_t"}


def test_a_class_without_a_second_background_is_listed():
    data = small(4, 3)  # labels 0 1 2 0
    found = bg.background_set(data, "mixed_same")
    assert found.manifest.fg_id.tolist() == [0, 3] and found.manifest.bg_id.tolist() == [3, 0]
    assert found.skipped[["id", "reason"]].values.tolist() == [[i, "no other picture can lend the background"] for i in (1, 2)]
    with pytest.raises(InputError, match="no image can be built as mixed_same, the first because no other picture"):
        bg.background_set(small(3, 3), "mixed_same")


@pytest.mark.parametrize(("call", "words"), [
    (lambda data: bg.background_set(data, "mixed_random"), "did you mean 'mixed_rand'"), (lambda data: bg.background_sets(data, ()), "no variant is asked for"),
    (lambda data: bg.background_sets(data, ("no_fg", None)), "unknown variant None"),
    (lambda data: bg.build_variant(data, "no_fg", bg.plan_backgrounds(data, "only_fg")), "unknown planned variant 'no_fg'")])
def test_impossible_requests(call, words):
    with pytest.raises(InputError, match=words):
        call(small())


def test_shapes9_has_all_eight_of_every_drawing():
    data = create_dataset("shapes9", "val", 56)
    plan = bg.plan_backgrounds(data)
    assert torch.equal(plan.ids, torch.arange(len(data))) and plan.skipped.empty
    mixed = bg.build_variant(data, "mixed_next", plan)
    on = data.masks.bool().expand_as(data.images)
    assert torch.equal(mixed.images[on], data.images[on]) and (mixed.images[~on] != data.images[~on]).float().mean() > 0.9


def test_caltech9_uses_its_trusted_masks_alone(shared_data):
    data = create_dataset("caltech9", "test", 56, root=shared_data)
    sets, skipped = bg.background_sets(data)
    trusted = data.manifest.mask_ok.eq(1)
    for found in sets.values():
        assert trusted[found.manifest.fg_id].all() and trusted[found.manifest.bg_id[found.manifest.bg_id >= 0]].all()
        assert len(found) + skipped.id.nunique() == len(data) == 824
    whole = skipped[skipped.reason.str.contains("whole picture")]
    assert skipped.id[skipped.reason.str.contains("mask_ok")].nunique() == 824 - 508 and len(sets["original"]) == 508 - whole.id.nunique() > 450


# ---- the gap ----

def test_the_gap_is_paired_on_objects():
    same = pd.DataFrame({"fg_file": list("abcd"), "correct": [True, True, True, False]})
    rand = pd.DataFrame({"fg_file": list("dcba"), "correct": [False, True, False, True]})
    gap = bg.background_gap(same, rand)
    assert gap.estimate == pytest.approx(0.25) and gap.n == 4 and gap.p_value == 1.0 and gap.low < 0 < gap.high
    for other in (rand.iloc[1:], rand.assign(fg_file=list("dcbe")), pd.concat([rand, rand])):
        with pytest.raises(InputError, match="same objects"):
            bg.background_gap(same, other)
