"""pairs and mixing: labels and plans by hand, slow forms in float64, replay, and messages."""

import copy
import math
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader, TensorDataset, default_collate

from patchmix_repro.core import InputError, keyed_generator
from patchmix_repro.mixing import MixingSwitch, PatchMixing, PatchPlan, draw_patches, draw_ratio
from patchmix_repro.pairs import BlendPlan, BoxPlan, OwnGenerator, draw_beta, draw_blend, draw_box, draw_cut, draw_partners, mix_labels, soft_labels

SHAPE = (6, 3, 28, 28)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def batch(b=6, k=5, size=28):
    return torch.rand(b, 3, size, size, generator=generator(b)), torch.arange(b) % k


# --- by hand ----------------------------------------------------------------------------------------------------------


def test_patch_plan_by_hand():
    x = torch.arange(32.0).view(2, 1, 4, 4)
    mask = torch.tensor([[True, False, False, True], [False, True, False, False]])
    out = PatchPlan(torch.tensor([1, 0]), torch.tensor([0.5, 0.25]), mask, (2, 2)).apply(x)
    assert out[0, 0].tolist() == [[16, 17, 2, 3], [20, 21, 6, 7], [8, 9, 26, 27], [12, 13, 30, 31]]
    assert out[1, 0].tolist() == [[16, 17, 2, 3], [20, 21, 6, 7], [24, 25, 26, 27], [28, 29, 30, 31]]


def test_other_plans_by_hand():
    x = torch.tensor([0.0, 8.0]).view(2, 1, 1, 1).expand(2, 1, 2, 2)
    partner = torch.tensor([1, 0])
    assert BlendPlan(partner, torch.tensor([0.25, 0.25])).apply(x)[:, 0, 0, 0].tolist() == [2, 6]
    assert BoxPlan(partner, torch.tensor([0.25, 0.25]), (0, 1, 1, 2)).apply(x)[:, 0].tolist() == [[[0, 8], [0, 0]], [[8, 0], [8, 8]]]


def test_labels_by_hand():
    soft = mix_labels(soft_labels(torch.tensor([0, 3]), 4), torch.tensor([1, 0]), torch.tensor([17 / 49, 0.0]), 0.1)
    expected = [[0.9 * 32 / 49 + 0.025, 0.025, 0.025, 0.9 * 17 / 49 + 0.025], [0.025, 0.025, 0.025, 0.925]]
    np.testing.assert_allclose(soft, expected, atol=1e-7)


def test_counts_round_down_and_survive_binary_fractions():
    for ratio, count in [(0.0, 0), (0.35, 17), (2 / 7, 14), (17 / 49, 17), (0.9999, 48), (1.0, 49)]:
        plan = draw_patches(SHAPE, generator(), ratio=ratio)
        assert plan.mask.sum(1).tolist() == [count] * 6 and torch.equal(plan.weight, torch.full((6,), count / 49))
    for g in (1, 2, 7, 14):
        for count in range(g * g + 1):
            assert draw_patches(SHAPE, generator(), grid=g, ratio=count / (g * g)).mask.sum(1).eq(count).all()


# --- against slow forms -----------------------------------------------------------------------------------------------


@given(b=st.integers(1, 7), k=st.integers(2, 5), smoothing=st.floats(0, 1), seed=st.integers(0, 2**31))
def test_mixed_labels_agree_with_loops(b, k, smoothing, seed):
    soft = torch.rand(b, k, generator=generator(seed)).softmax(1)
    partner, weight = draw_partners(b, generator(seed)), torch.rand(b, generator=generator(seed + 1))
    slow = np.empty((b, k))
    for i in range(b):
        for c in range(k):
            r, a, d = float(weight[i]), float(soft[i, c]), float(soft[partner[i], c])
            slow[i, c] = (1 - smoothing) * ((1 - r) * a + r * d) + smoothing / k
    out = mix_labels(soft, partner, weight, smoothing)
    np.testing.assert_allclose(out, slow, atol=1e-6)
    np.testing.assert_allclose(out.sum(1), 1, atol=1e-5)


@given(seed=st.integers(0, 2**31), b=st.integers(1, 6))
@settings(max_examples=40)
def test_patch_mixing_agrees_with_loops(seed, b):
    x, y = batch(b)
    mix = PatchMixing(5, grid=7)
    plan = mix.draw(x.shape, generator(seed))
    out, soft = mix(x, y, generator=generator(seed))
    slow = x.double().numpy().copy()
    for i in range(b):
        for k in range(49):
            r, c = divmod(k, 7)
            if plan.mask[i, k]:
                slow[i, :, 4 * r : 4 * r + 4, 4 * c : 4 * c + 4] = x[plan.partner[i], :, 4 * r : 4 * r + 4, 4 * c : 4 * c + 4]
    assert np.array_equal(out.double().numpy(), slow)
    assert 0 <= plan.mask.sum(1).min() <= plan.mask.sum(1).max() <= 24
    torch.testing.assert_close(soft, mix_labels(soft_labels(y, 5), plan.partner, plan.mask.float().mean(1), 0.1))


@given(seed=st.integers(0, 2**31), h=st.integers(1, 40), w=st.integers(1, 40), area=st.floats(0, 1))
def test_boxes_lie_in_the_image_and_are_never_larger_than_drawn(seed, h, w, area):
    top, bottom, left, right = draw_box(h, w, area, generator(seed))
    assert 0 <= top <= bottom <= h and 0 <= left <= right <= w
    assert bottom - top <= h * math.sqrt(area) and right - left <= w * math.sqrt(area)


def test_cutmix_weight_is_the_clipped_area():
    for seed in range(50):
        plan = draw_cut(SHAPE, generator(seed))
        pasted = (plan.apply(torch.arange(6.0).view(6, 1, 1, 1).expand(6, 1, 28, 28)) != torch.arange(6.0).view(6, 1, 1, 1)).float().mean((1, 2, 3))
        torch.testing.assert_close(pasted, plan.weight)


# --- chance -----------------------------------------------------------------------------------------------------------


@given(b=st.integers(2, 40), seed=st.integers(0, 2**31))
def test_nobody_is_their_own_partner(b, seed):
    partner = draw_partners(b, generator(seed))
    assert (partner != torch.arange(b)).all() and torch.equal(partner.sort().values, torch.arange(b))


def test_every_other_image_is_an_equally_likely_partner():
    seen = torch.stack([draw_partners(4, keyed_generator(0, k)) for k in range(3000)])
    counts = seen[:, 0].bincount(minlength=4)
    assert counts[0] == 0 and ((counts[1:] - 1000).abs() < 5 * (3000 * 2 / 9) ** 0.5).all()


def test_laws_of_the_ratio():
    def moments(law):
        r = draw_ratio(law, 20_000, generator())
        assert r.dtype == torch.float64 and r.min() >= 0 and r.max() <= 1
        return float(r.mean()), float(r.var())

    np.testing.assert_allclose(moments((0.0, 0.5)), (0.25, 0.25 / 12), rtol=0.03)
    np.testing.assert_allclose(moments([0.2, 1]), (0.6, 0.64 / 12), rtol=0.03)
    np.testing.assert_allclose(moments(("beta", 2.0)), (0.5, 1 / 20), rtol=0.03)
    assert moments(0.3) == pytest.approx((0.3, 0))
    assert not torch.equal(draw_beta(1.0, 5, generator(0)), draw_beta(1.0, 5, generator(1)))


def test_one_mask_for_the_batch_or_one_per_image():
    shared = draw_patches(SHAPE, generator(), per_image=False, ratio=0.5)
    assert (shared.mask == shared.mask[0]).all() and (shared.weight == shared.weight[0]).all()
    own = draw_patches(SHAPE, generator())
    assert len(set(own.weight.tolist())) > 1 and len({tuple(m) for m in own.mask.tolist()}) > 1


def test_flip_is_timms_partner():
    assert draw_patches(SHAPE, generator(), donor="flip").partner.tolist() == [5, 4, 3, 2, 1, 0]


def test_prob_is_per_batch():
    mixed = [bool(draw_patches(SHAPE, keyed_generator(0, k), prob=0.3, ratio=0.5).mask.any()) for k in range(1000)]
    assert 230 < sum(mixed) < 370
    x, y = batch()
    out, soft = PatchMixing(5, prob=0.0)(x, y)
    assert torch.equal(out, x) and out.data_ptr() != x.data_ptr()
    torch.testing.assert_close(soft, 0.9 * soft_labels(y, 5) + 0.02)


def test_several_grids_take_turns():
    sides = {draw_patches(SHAPE, keyed_generator(0, k), grid=(4, 7)).grid for k in range(40)}
    assert sides == {(4, 4), (7, 7)}


def test_the_switch_draws_in_proportion():
    switch = MixingSwitch(5, weights=(2, 1, 1))
    kinds = [type(switch.draw(SHAPE, keyed_generator(0, k))) for k in range(2000)]
    assert abs(kinds.count(BlendPlan) - 1000) < 120 and abs(kinds.count(BoxPlan) - 500) < 100
    only = MixingSwitch(5, weights=(0, 0, 1))
    assert {type(only.draw(SHAPE, keyed_generator(0, k))) for k in range(50)} == {PatchPlan}


def test_mixup_has_one_weight_for_the_batch():
    plan = draw_blend(SHAPE, generator())
    assert plan.weight.shape == (6,) and len(set(plan.weight.tolist())) == 1


@pytest.mark.parametrize("make", [PatchMixing, MixingSwitch])
def test_private_generators(make):
    x, y = batch()

    def run(mix, times=3):
        return [mix(x, y)[0] for _ in range(times)]

    def same(a, b):
        return all(torch.equal(p, q) for p, q in zip(a, b, strict=True))

    one = run(make(5, seed=3))
    assert same(one, run(make(5, seed=3))) and not same(one, run(make(5, seed=4)))
    assert not same(one[:1], one[1:2])
    assert not same(run(make(5)), run(make(5)))
    used = make(5, seed=3)
    run(used)
    assert same(one, run(pickle.loads(pickle.dumps(used)))) and same(one, run(copy.deepcopy(used)))


class Collate:
    def __init__(self, mix):
        self.mix = mix

    def __call__(self, items):
        return self.mix(*default_collate(items))


def test_workers_and_epochs_draw_apart_and_replay():
    x, y = batch(4)
    mix = PatchMixing(5, ratio=0.5, seed=0)
    mix(x, y)  # the parent has drawn before its workers are made

    def epochs(count):
        loader = DataLoader(
            TensorDataset(x[[0, 1, 0, 1]], y[[0, 1, 0, 1]]),
            batch_size=2,
            num_workers=2,
            collate_fn=Collate(mix),
            generator=generator(1),
        )
        return [images for _ in range(count) for images, _ in loader]

    first = epochs(2)
    assert len({images.numpy().tobytes() for images in first}) == 4
    assert all(torch.equal(a, b) for a, b in zip(first, epochs(2), strict=True))


def test_own_generator_continues():
    own = OwnGenerator(1)
    assert not torch.equal(torch.rand(3, generator=own()), torch.rand(3, generator=own()))


# --- types and formats ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [PatchMixing, MixingSwitch])
def test_labels_leave_as_float32(make):
    x, y = batch()
    for labels in (y, y.int(), y.byte(), soft_labels(y, 5).half(), soft_labels(y, 5).double()):
        out, soft = make(5)(x.half(), labels, generator=generator())
        assert soft.dtype == torch.float32 and soft.shape == (6, 5) and out.dtype == torch.float16


def test_bytes_can_be_patch_mixed_but_not_blended():
    x, y = batch()
    x = (255 * x).byte()
    assert PatchMixing(5)(x, y)[0].dtype == torch.uint8
    with pytest.raises(InputError, match="Convert the images to float"):
        MixingSwitch(5, weights=(1, 0, 0))(x, y)


@pytest.mark.parametrize("make", [PatchMixing, MixingSwitch])
def test_mixup_enabled_is_timms_switch(make):
    x, y = batch()
    mix = make(5)
    mix.mixup_enabled = False
    out, soft = mix(x, y)
    assert torch.equal(out, x)
    torch.testing.assert_close(soft, 0.9 * soft_labels(y, 5) + 0.02)


def test_an_empty_batch_stays_empty():
    out, soft = PatchMixing(5)(torch.zeros(0, 3, 28, 28), torch.zeros(0, dtype=torch.long))
    assert out.shape == (0, 3, 28, 28) and soft.shape == (0, 5)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_cpu_generator_mixes_gpu_images():
    x, y = batch()
    for make in (PatchMixing, MixingSwitch):
        for seed in range(6):
            here, there = make(5)(x, y, generator(seed)), make(5)(x.cuda(), y.cuda(), generator(seed))
            assert all(t.is_cuda for t in there)
            for a, b in zip(here, there, strict=True):
                torch.testing.assert_close(a, b.cpu())


# --- wrong input ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "remedy"),
    [
        ({"ratio": 1.2}, "Give a number in"),
        ({"ratio": -0.1}, "Give a number in"),
        ({"ratio": (0.0, 1.5)}, "a pair low <= high"),
        ({"ratio": (0.5, 0.1)}, "a pair low <= high"),
        ({"ratio": ("beta", -1)}, "with a > 0"),
        ({"ratio": ("gamma", 1)}, "is not a valid ratio"),
        ({"ratio": float("nan")}, "is not a valid ratio"),
        ({"prob": 1.1}, "prob 1.1 is outside"),
        ({"label_smoothing": -0.1}, "label_smoothing -0.1 is outside"),
        ({"donor": "flop"}, "did you mean 'flip'"),
        *[({"grid": grid}, "grid .* whole number from 1 on, or a tuple") for grid in (0, -7, 7.0, True, "7", None, (), (7, 0), (7, 3.5))],
        *[({"num_classes": k}, "num_classes .* whole number from 2 on") for k in (1, 0, -5, 5.0, True, "5", None)],
    ],
)
def test_impossible_settings_are_refused_at_once(settings, remedy):
    with pytest.raises(InputError, match=remedy):
        PatchMixing(**{"num_classes": 5} | settings)


@pytest.mark.parametrize(
    ("settings", "remedy"),
    [
        ({"mixup_alpha": 0.0}, "set its entry of weights to 0"),
        ({"cutmix_alpha": float("nan")}, "Give a number above 0"),
        ({"weights": (0, 0, 0)}, "not all 0"),
        ({"weights": (1, -1, 1)}, "three numbers >= 0"),
        ({"weights": (1, 1)}, "Give three numbers"),
        ({"label_smoothing": 2}, "from 0 to 1"),
        ({"patchmix": PatchMixing(6)}, "num_classes 6, the switch has 5"),
        ({"patchmix": PatchMixing(5, label_smoothing=0)}, "Give both the same"),
        ({"num_classes": 1}, "whole number from 2 on"),
        ({"num_classes": 5.0, "patchmix": PatchMixing(5)}, "whole number from 2 on"),
    ],
)
def test_impossible_switches_are_refused_at_once(settings, remedy):
    with pytest.raises(InputError, match=remedy):
        MixingSwitch(**{"num_classes": 5} | settings)


@pytest.mark.parametrize("make", [PatchMixing, MixingSwitch])
@pytest.mark.parametrize(
    ("x", "y", "remedy"),
    [
        (torch.zeros(2, 3, 28, 28), torch.tensor([0, 5]), "Give labels from 0 to 4, or raise num_classes"),
        (torch.zeros(2, 3, 28, 28), torch.tensor([-1, 0]), "Give labels from 0 to 4"),
        (torch.zeros(2, 3, 28, 28), torch.tensor([0.0, 1.0]), "Give integers b"),
        (torch.zeros(2, 3, 28, 28), torch.full((2, 4), 0.25), "k = 5 = num_classes"),
        (torch.zeros(2, 3, 28, 28), torch.full((2, 5), float("nan")), "finite weights"),
        (torch.zeros(2, 3, 28, 28), torch.full((2, 5), -1.0), "finite weights"),
        (torch.zeros(2, 3, 28, 28), torch.tensor([0]), "one label per image"),
        (torch.zeros(3, 28, 28), torch.tensor([0, 1, 2]), "Give images b c h w"),
    ],
)
def test_wrong_batches_are_refused(make, x, y, remedy):
    with pytest.raises(InputError, match=remedy):
        make(5)(x, y)


def test_a_grid_that_does_not_divide_is_refused_before_any_is_drawn():
    with pytest.raises(InputError, match="grid 5 x 5 does not divide a 28 x 28 image"):
        for seed in range(20):
            PatchMixing(5, grid=(7, 5))(*batch(), generator=generator(seed))


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("patchmix", [None, PatchMixing(5, grid=(8, 7))])
def test_a_switch_refuses_such_a_grid_on_the_first_batch(seed, patchmix):
    with pytest.raises(InputError, match="grid 7 x 7 does not divide a 32 x 32 image"):
        MixingSwitch(5, patchmix=patchmix)(*batch(size=32), generator=generator(seed))
    out, _ = MixingSwitch(5, patchmix=patchmix, weights=(1, 1, 0))(*batch(size=32), generator=generator(seed))
    assert out.shape[-1] == 32


def test_the_check_draws_nothing():
    here, there = generator(), generator()
    plan = MixingSwitch(5, weights=(0, 0, 1)).draw(SHAPE, here)
    torch.rand((), generator=there, dtype=torch.float64)  # which of the three
    again = PatchMixing(5).draw(SHAPE, there)
    assert torch.equal(plan.mask, again.mask) and torch.equal(here.get_state(), there.get_state())
