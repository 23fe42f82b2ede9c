"""patches: tiny cases by hand, slow loops in float64, and properties."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from patchmix_repro.core import InputError
from patchmix_repro.patches import (
    choose_patches,
    drop_patches,
    gather_patches,
    grid_sides,
    patch_sides,
    permute_patches,
    replace_patches,
)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def boxes(shape, grid):
    "Pixel slices of every patch, row by row."
    (h, w), (gh, gw) = shape, grid
    return [np.s_[..., i * h // gh : (i + 1) * h // gh, j * w // gw : (j + 1) * w // gw] for i in range(gh) for j in range(gw)]


def slow_replace(x, donor, mask, grid):
    out = x.numpy().astype(np.float64).copy()
    for image, other, bits in zip(out, donor.numpy().astype(np.float64), mask.tolist(), strict=True):
        for bit, box in zip(bits, boxes(x.shape[-2:], grid), strict=True):
            if bit:
                image[box] = other[box]
    return out


def slow_gather(x, image, place, grid):
    source = x.numpy().astype(np.float64)
    out, where = np.empty_like(source), boxes(x.shape[-2:], grid)
    for i in range(len(x)):
        for k, box in enumerate(where):
            out[i][box] = source[image[i, k]][where[place[i, k]]]
    return out


@st.composite
def cases(draw):
    b, c, gh, gw, ph, pw = (draw(st.integers(1, high)) for high in (4, 3, 4, 4, 3, 3))
    seed = draw(st.integers(0, 2**31))
    dtype = draw(st.sampled_from([torch.float32, torch.float16, torch.uint8]))
    x, donor = (torch.randint(0, 200, (b, c, gh * ph, gw * pw), generator=generator(seed + k)).to(dtype) for k in (0, 1))
    if draw(st.booleans()):
        x = x.contiguous(memory_format=torch.channels_last)
    mask = torch.rand(b, gh * gw, generator=generator(seed + 2)) < 0.5
    return x, donor, mask, (gh, gw), seed


# --- choose -----------------------------------------------------------------------------------------------------------


@given(b=st.integers(0, 5), n=st.integers(1, 60), seed=st.integers(0, 2**31), data=st.data())
def test_exactly_count_patches_are_chosen(b, n, seed, data):
    counts = torch.tensor(data.draw(st.lists(st.integers(0, n), min_size=b, max_size=b)), dtype=torch.long)
    mask = choose_patches(b, n, counts, generator(seed))
    assert mask.dtype == torch.bool and mask.shape == (b, n)
    assert mask.sum(1).tolist() == counts.tolist()
    assert torch.equal(mask, choose_patches(b, n, counts, generator(seed)))


def test_every_pair_of_patches_is_equally_likely():
    mask = choose_patches(20_000, 4, 2, generator()).long()
    sets = (mask * torch.tensor([1, 2, 4, 8])).sum(1).bincount(minlength=16)
    seen = sets[[3, 5, 6, 9, 10, 12]]  # the six pairs
    assert seen.sum() == 20_000
    assert ((seen - 20_000 / 6).abs() < 5 * (20_000 * 5 / 36) ** 0.5).all()


@pytest.mark.parametrize("count", [5, -1, torch.tensor([0, 5]), torch.tensor([1, 2, 3]), 1.5, torch.ones(2)])
def test_impossible_counts_are_refused(count):
    with pytest.raises(InputError, match=r"Choose 0 to 4|Give one integer"):
        choose_patches(2, 4, count, generator())


# --- the grid ---------------------------------------------------------------------------------------------------------


def test_grid_errors_name_both_numbers_and_a_remedy():
    with pytest.raises(InputError, match=r"50 patches do not fill a 7 x 7 grid. Give 49"):
        grid_sides(50)
    with pytest.raises(InputError, match=r"grid 7 x 7 does not divide a 50 x 60 image. Resize the image to 49 x 63"):
        patch_sides(50, 60, 7)
    with pytest.raises(InputError, match="at least 1 x 1"):
        patch_sides(8, 8, 0)


@pytest.mark.parametrize(
    "call",
    [
        lambda x, m: replace_patches(x, x, m),
        lambda x, m: drop_patches(x, m),
        lambda x, m: permute_patches(x, torch.arange(9)),
        lambda x, m: gather_patches(x, torch.zeros(1, 9).long(), torch.arange(9)[None]),
    ],
)
def test_a_grid_that_does_not_divide_is_refused_everywhere(call):
    with pytest.raises(InputError, match="grid 3 x 3 does not divide a 8 x 9 image"):
        call(torch.zeros(2, 3, 8, 9), torch.zeros(2, 9, dtype=torch.bool))


# --- by hand ----------------------------------------------------------------------------------------------------------

TINY = torch.arange(16.0).view(1, 1, 4, 4)


def test_replace_by_hand():
    out = replace_patches(TINY, -TINY, torch.tensor([[True, False, False, True]]))
    assert out[0, 0].tolist() == [[0, -1, 2, 3], [-4, -5, 6, 7], [8, 9, -10, -11], [12, 13, -14, -15]]


def test_drop_by_hand():
    out = drop_patches(TINY.expand(1, 2, 4, 4), torch.tensor([[False, True]]), fill=torch.tensor([7.0, 8.0]), grid=(2, 1))
    assert out[0, :, 1:, 0].tolist() == [[4, 7, 7], [4, 8, 8]]
    assert (out[0, 1, 2:] == 8).all() and torch.equal(out[0, :, :2], TINY.expand(1, 2, 4, 4)[0, :, :2])


def test_permute_by_hand():
    assert permute_patches(TINY, torch.tensor([1, 0, 3, 2]))[0, 0].tolist() == [[2, 3, 0, 1], [6, 7, 4, 5], [10, 11, 8, 9], [14, 15, 12, 13]]
    assert permute_patches(TINY, torch.tensor([3, 2, 1, 0]), grid=(4, 1))[0, 0, :, 0].tolist() == [12, 8, 4, 0]


# --- against loops ----------------------------------------------------------------------------------------------------


@given(cases())
def test_replace_agrees_with_loops(case):
    x, donor, mask, grid, _ = case
    before = x.clone(), donor.clone(), mask.clone()
    out = replace_patches(x, donor, mask, grid)
    assert np.array_equal(out.double().numpy(), slow_replace(x, donor, mask, grid))
    assert out.dtype == x.dtype and out.shape == x.shape
    assert all(torch.equal(now, then) for now, then in zip((x, donor, mask), before, strict=True))
    if not x.is_contiguous():
        assert out.is_contiguous(memory_format=torch.channels_last)


@given(cases())
def test_gather_agrees_with_loops(case):
    x, _, mask, grid, seed = case
    image = torch.randint(len(x), mask.shape, generator=generator(seed))
    place = torch.randint(mask.shape[1], mask.shape, generator=generator(seed + 1))
    before = x.clone()
    out = gather_patches(x, image, place, grid)
    assert np.array_equal(out.double().numpy(), slow_gather(x, image, place, grid))
    assert out.dtype == x.dtype and torch.equal(x, before)
    if not x.is_contiguous():
        assert out.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(gather_patches(x, image[:1], place[:1], grid), gather_patches(x, image[:1].expand_as(image), place[:1].expand_as(place), grid))


@given(cases())
def test_drop_is_replace_by_a_plain_image(case):
    x, _, mask, grid, _ = case
    fill = torch.arange(x.shape[1]) + 3
    plain = fill.to(x.dtype).view(1, -1, 1, 1).expand_as(x)
    assert torch.equal(drop_patches(x, mask, fill, grid), replace_patches(x, plain, mask, grid))
    assert torch.equal(drop_patches(x, mask, 3, grid), replace_patches(x, torch.full_like(x, 3), mask, grid))


@given(cases())
def test_a_permutation_and_its_inverse_cancel(case):
    x, _, mask, grid, seed = case
    for order in (torch.rand(mask.shape, generator=generator(seed)).argsort(1), torch.randperm(mask.shape[1], generator=generator(seed))):
        assert torch.equal(permute_patches(permute_patches(x, order, grid), order.argsort(-1), grid), x)


@settings(max_examples=25)
@given(cases())
def test_gradients_reach_only_the_pixels_that_are_read(case):
    x, donor, mask, grid, _ = case
    x, donor = (t.float().requires_grad_() for t in (x, donor))
    replace_patches(x, donor, mask, grid).sum().backward()
    assert torch.equal(x.grad + donor.grad, torch.ones_like(x))
    assert x.grad.sum() == (~mask).sum() * x[0].numel() / mask.shape[1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_large_results_equal_small_ones(dtype, layout):
    "Above 4 MB the result lies in numpy's memory; it is the same, whole, and its own."
    x = (255 * torch.rand(30, 3, 224, 224, generator=generator())).to(dtype).contiguous(memory_format=layout)
    donors, places = torch.arange(30).roll(1)[:, None].expand(30, 49), torch.randperm(49, generator=generator())[None]
    mixed, kept = gather_patches(x, donors, places, 7), x.clone()
    parts = [gather_patches(x[[i, i - 1]], torch.ones(1, 49, dtype=torch.int64), places, 7)[:1] for i in range(30)]
    assert mixed.nbytes >= 2**22 and torch.equal(mixed, torch.cat(parts)) and mixed.is_contiguous(memory_format=layout)
    mixed.zero_()
    assert torch.equal(x, kept)


def test_gradients_of_large_results():
    x = torch.rand(30, 3, 224, 224, generator=generator(), requires_grad=True)
    gather_patches(x, torch.zeros(1, 49, dtype=torch.int64), torch.arange(49)[None], 7).sum().backward()
    assert torch.equal(x.grad[0], torch.full_like(x[0], 30)) and not x.grad[1:].any()


def test_other_strides_are_fine():
    x = torch.rand(4, 16, 3, 16, generator=generator()).permute(0, 2, 3, 1)[::2, :, :, :14][:, :, :14]
    order = torch.randperm(49, generator=generator())
    assert torch.equal(permute_patches(x, order), permute_patches(x.contiguous(), order))
    mask = choose_patches(2, 49, 20, generator())
    assert torch.equal(replace_patches(x, x.flip(0), mask), replace_patches(x.contiguous(), x.flip(0), mask))


# --- wrong input ------------------------------------------------------------------------------------------------------

X, MASK = torch.zeros(2, 3, 8, 8), torch.zeros(2, 4, dtype=torch.bool)


@pytest.mark.parametrize(
    ("call", "remedy"),
    [
        (lambda: replace_patches(X, X[:1], MASK), "Give a donor of the same shape and type"),
        (lambda: replace_patches(X, X.half(), MASK), "Give a donor of the same shape and type"),
        (lambda: replace_patches(X, X, MASK.float()), "bool mask b n"),
        (lambda: replace_patches(X, X, MASK[:1]), "bool mask b n"),
        (lambda: replace_patches(X[0], X[0], MASK), "Give images b c h w"),
        (lambda: replace_patches(X, X, MASK, grid=(1, 2)), "Give 2 patches, or name the grid"),
        (lambda: drop_patches(X, MASK, torch.zeros(2)), "Give one number, or one per channel"),
        (lambda: drop_patches(X.byte(), MASK, 0.5), "Give whole numbers"),
        (lambda: drop_patches(X.byte(), MASK, 300), "Give whole numbers"),
        (lambda: permute_patches(X, torch.tensor([0, 1, 2, 2])), "exactly once"),
        (lambda: permute_patches(X, torch.arange(5)), "Give 4 patches"),
        (lambda: gather_patches(X, MASK + 2, torch.arange(4)[None]), "from 0 to 1"),
        (lambda: gather_patches(X, MASK.long() - 1, torch.arange(4)[None]), "from 0 to 1"),
        (lambda: gather_patches(X, MASK.long(), torch.arange(1, 5)[None]), "from 0 to 3"),
        (lambda: gather_patches(X, torch.zeros(3, 4).long(), torch.arange(4)[None]), "b = 2"),
        (lambda: gather_patches(X, torch.zeros(2, 4), torch.arange(4)[None]), "whole numbers"),
    ],
)
def test_messages_name_the_remedy(call, remedy):
    with pytest.raises(InputError, match=remedy):
        call()
