"""saliency: maps against the published average written out, contrasts, streaming, and messages."""

import itertools
import math

import numpy as np
import pytest
import torch
import torch.nn as nn
from hypothesis import given, settings
from hypothesis import strategies as st

from patchmix_repro.core import InputError, NonFiniteError
from patchmix_repro.masks import BLOCK, METHODS, Saliency, draw_masks, linear_map
from patchmix_repro.saliency import SCORES, Masking, contrast_scores, crise, look, masked_logits, pick, rise


class Linear(nn.Module):
    "Logits that are sums of weighted pixels."

    def __init__(self, k=4, h=14, w=14, scale=0.05):
        super().__init__()
        self.weights = nn.Parameter(scale * torch.randn(k, 3, h, w, generator=torch.Generator().manual_seed(5)))
        self.rows = []

    def forward(self, x):
        self.rows.append(len(x))
        return torch.einsum("bchw,kchw->bk", x, self.weights)


def photos(b=2, h=14, w=14):
    return torch.randn(b, 3, h, w, generator=torch.Generator().manual_seed(b))


# --- rise -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("score", SCORES)
def test_rise_is_the_published_average(score):
    model, x = Linear(), photos()
    found = rise(model, x, torch.tensor([1, 3]), num_masks=200, score=score, seed=4)
    masks = torch.cat([draw_masks(14, 14, seed=4, block=i).dense() for i in range(2)])[:200].double().numpy()
    for image, target in ((0, 1), (1, 3)):
        total = np.zeros((14, 14))
        for mask in masks:
            z = np.einsum("chw,kchw->k", x[image].double().numpy() * mask, model.weights.detach().double().numpy())
            p = np.exp(z - z.max()) / np.exp(z - z.max()).sum()
            total += {"logit": z, "prob": p, "logprob": np.log(p)}[score][target] * mask
        np.testing.assert_allclose(found.map[image], total / 200 / 0.5, atol=1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_a_linear_model_has_its_own_map(method):
    model, x = Linear(), photos(1)
    found = rise(model, x, 2, num_masks=4000, score="logit", method=method)
    v = (model.weights[2] * x[0]).sum(0).detach()
    truth = linear_map(v) + (0.5 * v.sum() if method == "rise" else 0)
    z = (found.map[0] - truth) / found.stderr[0]
    assert z.abs().max() < 5 and z.std() < 1.5


@pytest.mark.parametrize("method", METHODS)
def test_maps_do_not_depend_on_the_batch(method):
    model, x = Linear(), photos(3)
    whole = rise(model, x, num_masks=150, method=method)
    for size in (1, 2, 7, 150, 4000):
        part = rise(model, x, num_masks=150, method=method, batch_size=size)
        assert torch.allclose(part.map, whole.map, atol=1e-5) and torch.allclose(part.stderr, whole.stderr, atol=1e-5)
    alone = rise(model, x[1:2], num_masks=150, method=method)
    assert torch.allclose(alone.map[0], whole.map[1], atol=1e-5)


def test_every_mask_is_looked_through_once_and_batches_stay_small():
    model = Linear()
    rise(model, photos(3), num_masks=150, batch_size=8)
    assert model.rows[0] == 3 and sum(model.rows[1:]) == 450 and max(model.rows) <= 8


def test_all_classes_and_the_predicted_one():
    model, x = Linear(), photos(3)
    every = rise(model, x, "all", num_masks=140, method="regression")
    predicted = model(x).argmax(1)
    one = rise(model, x, num_masks=140, method="regression")
    assert every.map.shape == every.stderr.shape == (3, 4, 14, 14) and isinstance(one, Saliency)
    assert torch.allclose(every.map[torch.arange(3), predicted], one.map, atol=1e-5)
    assert torch.equal(rise(model, x, 2, num_masks=30).map, rise(model, x, torch.tensor([2, 2, 2], dtype=torch.int32), num_masks=30).map)


@pytest.mark.parametrize("method", METHODS)
def test_a_tolerance_stops_early_with_the_same_map(method):
    model, x = Linear(), photos(1)
    early = rise(model, x, num_masks=5000, tolerance=0.04, method=method)
    assert early.num_masks < 5000 and early.num_masks % BLOCK == 0 and early.stderr.max() < 0.04
    whole = rise(model, x, num_masks=early.num_masks, method=method)
    assert torch.equal(early.map, whole.map)
    assert rise(model, x, num_masks=BLOCK + 5, tolerance=1e-9).num_masks == BLOCK + 5


def test_any_sides_grids_and_counts():
    for h, w, grid, n in ((9, 14, 3, 2), (37, 53, (4, 7), 33), (14, 14, 14, 129)):
        found = rise(Linear(h=h, w=w), photos(2, h, w), num_masks=n, grid=grid, keep=0.2, method="regression")
        assert found.map.shape == (2, h, w) and found.num_masks == n and found.stderr.isfinite().all()


def test_nothing_is_left_changed():
    model, x = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.5), nn.AdaptiveAvgPool2d(1), nn.Flatten()), photos()
    model.train()
    model[1].eval()
    before, copy, state = x.clone(), {k: v.clone() for k, v in model.state_dict().items()}, torch.get_rng_state()
    found = rise(model, x, num_masks=20)
    assert torch.equal(x, before) and all(torch.equal(v, copy[k]) for k, v in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state) and not found.map.requires_grad
    assert [m.training for m in model] == [True, False, True, True, True]
    assert torch.equal(found.map, rise(model, x, num_masks=20).map)


def test_a_callers_autocast_does_not_round_the_masks():
    model, x = Linear(), photos()
    plain = rise(model, x, num_masks=40)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(rise(model, x, num_masks=40).map, plain.map)
    half = rise(model, x, num_masks=40, dtype=torch.bfloat16)
    assert not torch.equal(half.map, plain.map) and torch.allclose(half.map, plain.map, atol=0.02)


@pytest.mark.parametrize(("name", "dtype"), [("bfloat16", torch.bfloat16), ("torch.float16", torch.float16), ("float32", None), (torch.float32, None), ("auto", None)])
def test_types_have_names(name, dtype):
    model, x = Linear(), photos()
    assert torch.equal(rise(model, x, num_masks=40, dtype=name).map, rise(model, x, num_masks=40, dtype=dtype).map)


class Cramped(Linear):
    "A device whose memory holds 8 images."

    def forward(self, x):
        if len(x) > 8:
            raise torch.OutOfMemoryError("out of memory")
        return super().forward(x)


def test_auto_finds_a_batch_that_fits():
    x = photos(3)
    assert torch.allclose(rise(Cramped(), x, num_masks=200).map, rise(Linear(), x, num_masks=200).map, atol=1e-5)
    with pytest.raises(torch.OutOfMemoryError):
        rise(Cramped(), x, num_masks=200, batch_size=16)


def test_masked_logits_pair_every_mask_with_every_image():
    model, x, masks = Linear(), photos(3), draw_masks(14, 14).dense()[:5]
    with torch.no_grad():
        found = masked_logits(model, x, masks, 4)
        for m, b in itertools.product(range(5), range(3)):
            assert torch.allclose(found[m, b], model(x[b : b + 1] * masks[m])[0], atol=1e-5)


def test_look_yields_the_scores_of_block_after_block():
    with torch.no_grad():
        parts = list(look(Linear(), photos(2), lambda z: z[..., 0], Masking().blocks(14, 14), Masking(num_masks=300)))
    assert [p.shape for p, _ in parts] == [(BLOCK, 2), (BLOCK, 2), (44, 2)]
    assert [m.shape for _, m in parts] == [(BLOCK, 14, 14), (BLOCK, 14, 14), (44, 14, 14)]


@pytest.mark.parametrize("method", ["rise", "centred"])
def test_scores_of_all_classes_are_not_kept(method):
    "Streamed: no tensor of the run has a row for each mask."
    rows, model, x = 2000, Linear(), photos()
    with torch.no_grad(), torch.profiler.profile(record_shapes=True, activities=[torch.profiler.ProfilerActivity.CPU]) as seen:
        streamed = rise(model, x, "all", num_masks=rows, method=method)
    sides = {side for event in seen.events() for shape in event.input_shapes for side in shape if isinstance(side, int)}
    assert rows not in sides and BLOCK in sides and streamed.num_masks == rows
    whole = rise(model, x, 0, num_masks=rows, method=method)
    assert torch.allclose(streamed.map[:, 0], whole.map, atol=1e-5) and torch.allclose(streamed.stderr[:, 0], whole.stderr, atol=1e-6)


def test_copies_lie_with_channels_last():
    "Convolutions read that layout fastest; the copies once came out channels first."
    strides = []

    class Seen(nn.Module):
        def forward(self, x):
            strides.append(x.is_contiguous(memory_format=torch.channels_last))
            return x.mean((2, 3))

    masked_logits(Seen(), photos(3), draw_masks(14, 14).dense()[:5], 4)
    assert strides and all(strides)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_agrees_with_the_cpu():
    model, x = Linear(), photos()
    cpu = rise(model, x, num_masks=300, method="regression")
    gpu = rise(model.cuda(), x.cuda(), num_masks=300, method="regression", dtype=None)
    half = rise(model, x.cuda(), num_masks=300, method="regression")
    assert torch.allclose(cpu.map, gpu.map.cpu(), atol=1e-4) and torch.allclose(cpu.map, half.map.cpu(), atol=0.02)


# --- c-RISE -----------------------------------------------------------------------------------------------------------


def test_contrast_scores_by_hand():
    z, target = torch.tensor([[0.0, math.log(2), math.log(5)]]), torch.tensor([1])  # p = 1/8, 2/8, 5/8
    other = torch.tensor([2])
    assert torch.allclose(contrast_scores(z, target, other), torch.tensor([-3 / 8]))
    assert torch.allclose(contrast_scores(z, target, None), torch.tensor([2 / 8 - 6 / 8]))
    for score in ("logit", "logprob"):
        assert torch.allclose(contrast_scores(z, target, other, score), torch.tensor([math.log(2 / 5)]))
        assert torch.allclose(contrast_scores(z, target, None, score), torch.tensor([math.log(2 / 6)]))


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 99), k=st.integers(2, 6), score=st.sampled_from(sorted(SCORES)))
def test_contrasts_are_differences_and_change_sign(seed, k, score):
    z = torch.randn(5, 3, k, generator=torch.Generator().manual_seed(seed))
    a = torch.randint(k, (3,), generator=torch.Generator().manual_seed(seed))
    b = (a + 1) % k
    found = contrast_scores(z, a, b, score)
    assert torch.allclose(found, -contrast_scores(z, b, a, score), atol=1e-6)
    assert torch.allclose(found, pick(SCORES[score](z), a) - pick(SCORES[score](z), b))
    if k == 2:
        assert torch.allclose(found, contrast_scores(z, a, None, score), atol=1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_rest_is_an_affine_copy_of_rise(method):
    model, x, options = Linear(), photos(), {"num_masks": 200, "method": method}
    rest, plain = crise(model, x, contrast="rest", **options), rise(model, x, **options)
    mean_mask = torch.cat([draw_masks(14, 14, block=i).dense() for i in range(2)])[:200].mean(0)
    assert torch.allclose(rest.map, 2 * plain.map - (mean_mask / 0.5 if method == "rise" else 0), atol=1e-5)
    if method != "rise":
        assert torch.allclose(rest.stderr, 2 * plain.stderr, rtol=1e-3)


def test_crise_is_the_difference_of_two_maps_at_the_price_of_one():
    model, x, target = Linear(), photos(3), torch.tensor([0, 1, 2])
    every = rise(model, x, "all", num_masks=150)
    model.rows = []
    found = crise(model, x, target, donor=torch.tensor([3, 3, 3]), num_masks=150)
    assert sum(model.rows) == 3 + 450
    assert torch.allclose(found.map, every.map[torch.arange(3), target] - every.map[:, 3], atol=1e-5)
    assert torch.equal(found.map, crise(model, x, target, 3, num_masks=150).map)


def test_the_runner_up_is_the_best_other_class_of_the_whole_image():
    model, x = Linear(), photos(3)
    order = model(x).argsort(1, descending=True)
    assert torch.equal(crise(model, x, contrast="runner_up", num_masks=30).map, crise(model, x, order[:, 0], order[:, 1], num_masks=30).map)
    third = order[:, 2]
    assert torch.equal(crise(model, x, third, "runner_up", num_masks=30).map, crise(model, x, third, order[:, 0], num_masks=30).map)


# --- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"keep": 0.0}, "0 < keep < 1"), ({"keep": 1}, "0 < keep < 1"), ({"num_masks": 1}, "from 2"), ({"num_masks": 10.0}, "from 2"),
        ({"grid": 1}, "at least 2"), ({"grid": 0}, "at least 2"), ({"batch_size": 0}, "'auto'"), ({"batch_size": "all"}, "'auto'"),
        ({"tolerance": 0.0}, "above 0"), ({"tolerance": -1}, "above 0"), ({"method": "antithetic"}, "unknown method"), ({"score": "energy"}, "unknown score"),
        ({"target": 4}, "0 to 3"), ({"target": torch.tensor([-1, 0])}, "0 to 3"), ({"target": torch.tensor([1, 2, 3])}, "each of the 2"),
        ({"target": torch.tensor([0.0, 1.0])}, "int64"), ({"target": "each"}, "unknown target"),
        ({"keep": "0.5"}, "0 < keep < 1"), ({"keep": math.nan}, "0 < keep < 1"), ({"tolerance": "a"}, "above 0"), ({"tolerance": True}, "above 0"),
        ({"seed": 1.5}, "seed is 1.5"), ({"seed": "0"}, "seed is '0'"), ({"seed": True}, "seed is True"), ({"grid": 7.5}, "at least 2"), ({"grid": (7, 7, 7)}, "a pair"),
        ({"dtype": "float8"}, "torch.bfloat16"), ({"dtype": torch.float64}, "torch.bfloat16"), ({"dtype": torch.int64}, "'auto', None"), ({"dtype": 16}, "'auto', None"),
    ],
)
def test_impossible_options_are_refused(options, words):
    with pytest.raises(InputError, match=words):
        rise(Linear(), photos(), **{"num_masks": 10, **options})


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, "without donor"), ({"contrast": "rest", "donor": 1}, "does not read it"), ({"contrast": 2, "donor": 1}, "does not read it"), ({"donor": 9}, "0 to 3"), ({"donor": torch.tensor([0, 1])}, "1 of 2"), ({"contrast": "others"}, "unknown contrast"),
        ({"contrast": torch.tensor([1, 7])}, "0 to 3"), ({"contrast": "rest", "score": "p"}, "unknown score"), ({"contrast": None}, "unknown contrast None"),
        ({"contrast": {}}, "contrast is {}.*int64 class ids"), ({"donor": "cat"}, "donor is 'cat'"),
    ],
)
def test_impossible_contrasts_are_refused(options, words):
    with pytest.raises(InputError, match=words):
        crise(Linear(), photos(), torch.tensor([0, 2]), num_masks=10, **options)
    with pytest.raises(InputError, match="target is 'all'"):
        crise(Linear(), photos(), "all", 0, num_masks=10)
    with pytest.raises(InputError, match="did you mean 'num_masks'"):
        crise(Linear(), photos(), 0, 1, num_mask=10)


class Answers(nn.Module):
    "Gives what it was told to."

    def __init__(self, answer):
        super().__init__()
        self.answer = answer

    def forward(self, x):
        return self.answer(x)


@pytest.mark.parametrize(
    ("answer", "error", "words"),
    [
        (lambda x: torch.zeros(len(x), 2, 3), InputError, r"\(2, 2, 3\)"), (lambda x: torch.zeros(1, 3), InputError, "2 images"),
        (lambda x: [0.5], InputError, "list"), (lambda x: torch.full((len(x), 3), torch.nan), NonFiniteError, "whole images"),
        (lambda x: torch.where((x == 0).any(), torch.nan, torch.zeros(len(x), 3)), NonFiniteError, "masks 0 to 9"),
    ],
)
def test_bad_networks_are_named(answer, error, words):
    with pytest.raises(error, match=words):
        rise(Answers(answer), photos(), num_masks=10, keep=0.2)


def test_bad_images_are_named():
    for x in (torch.zeros(3, 14, 14), torch.zeros(1, 1, 14, 14), torch.zeros(0, 3, 14, 14), torch.zeros(1, 3, 14, 14, dtype=torch.uint8)):
        with pytest.raises(InputError, match="b 3 h w"):
            rise(Linear(), x, num_masks=10)
    with pytest.raises(NonFiniteError):
        rise(Linear(), photos() * torch.nan, num_masks=10)
    with pytest.raises(InputError, match="meta"):
        rise(Linear(), photos().to("meta"), num_masks=10)
    with pytest.raises(InputError, match="float64, the model torch.float32"):
        rise(Linear(), photos().double(), num_masks=10)
    with pytest.raises(InputError, match="the model is a function"):
        rise(lambda x: x.flatten(1), photos(), num_masks=10)
    with pytest.raises(InputError, match="one logit"):
        crise(Answers(lambda x: x.mean((1, 2, 3))[:, None]), photos(), contrast="rest", num_masks=10)


def test_weights_of_another_type_keep_it():
    exact, rough = (rise(Linear().to(dtype), photos().to(dtype), num_masks=64) for dtype in (torch.float64, torch.bfloat16))
    assert (exact.map - rough.map.double()).abs().max() < 0.05
