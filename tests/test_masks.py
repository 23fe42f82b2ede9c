"""masks: the law, exact maps and errors, against enumeration and slow float64 forms."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from patchmix_repro.core import InputError
from patchmix_repro.masks import BLOCK, METHODS, Masks, average, draw_masks, left_out, linear_map, overlap, patch_means, upsampling


def blocks(h, grid=7, keep=0.5, seed=0):
    "Number of a block -> its masks, on h x h px."
    return lambda block: draw_masks(h, h, grid, keep, seed, block)


# --- the law -----------------------------------------------------------------------------------------------------------


def test_upsampling_by_hand():
    assert torch.allclose(3 * upsampling(2, 4), torch.tensor([[2.0, 1], [3, 0], [2, 1], [1, 2], [0, 3], [1, 2]]).double())


@pytest.mark.parametrize(("s", "n"), [(2, 5), (3, 10), (7, 56), (7, 224), (8, 224), (5, 5)])
def test_upsampling_is_the_bilinear_zoom_with_mirrored_borders(s, n):
    "scikit-image's resize(order=1, mode='reflect', anti_aliasing=False), which RISE calls, is this zoom."
    cells = np.random.default_rng(s).random((s, s))
    side = (s + 1) * math.ceil(n / s)
    expected = ndimage.zoom(cells, side / s, order=1, mode="mirror", grid_mode=True)
    u = upsampling(s, n).numpy()
    assert expected.shape == (side, side)
    np.testing.assert_allclose(u @ cells @ u.T, expected, atol=1e-12)


def test_torchs_interpolation_differs_only_in_the_outer_half_cell():
    cells = torch.rand(7, 7, generator=torch.Generator().manual_seed(0)).double()
    theirs = torch.nn.functional.interpolate(cells[None, None], size=(256, 256), mode="bilinear", align_corners=False)[0, 0]
    ours = upsampling(7, 224) @ cells @ upsampling(7, 224).T
    assert torch.allclose(theirs[18:-18, 18:-18], ours[18:-18, 18:-18]) and (theirs - ours).abs().max() > 0.1


@pytest.mark.parametrize(("h", "w", "grid"), [(12, 12, 3), (10, 15, 4), (13, 8, (5, 2))])
def test_masks_are_crops_of_the_zoomed_grid_at_every_shift(h, w, grid):
    masks = draw_masks(h, w, grid, 0.4, seed=3)
    gh, gw = masks.cells.shape[1:]
    ch, cw = math.ceil(h / gh), math.ceil(w / gw)
    found = set()
    for cells, mask in zip(masks.cells.double().numpy(), masks.dense().numpy(), strict=True):
        zoomed = ndimage.zoom(cells, ((gh + 1) * ch / gh, (gw + 1) * cw / gw), order=1, mode="mirror", grid_mode=True)
        shifts = [(a, b) for a in range(ch) for b in range(cw) if np.allclose(mask, zoomed[a : a + h, b : b + w], atol=1e-5)]
        assert shifts
        found |= set(shifts) if len(shifts) == 1 else set()
    assert found == set(itertools.product(range(ch), range(cw)))


def test_blocks_are_keyed():
    first = draw_masks(14, 14, seed=1)
    assert torch.equal(first.dense(), draw_masks(14, 14, seed=1).dense())
    for other in (draw_masks(14, 14, seed=2), draw_masks(14, 14, seed=1, block=1)):
        assert not torch.equal(first.cells, other.cells)
    cells = torch.cat([draw_masks(14, 14, 7, 0.1, block=i).cells for i in range(20)])
    assert len(first.cells) == BLOCK and set(cells.unique().tolist()) == {0, 1} and abs(cells.mean() - 0.1) < 0.004


def test_masks_lie_between_zero_and_one_and_average_to_keep():
    masks = torch.cat([draw_masks(14, 14, 7, 0.3, block=i).dense() for i in range(60)])
    assert 0 <= masks.min() and masks.max() <= 1 + 1e-6
    assert (masks.mean(0) - 0.3).abs().max() < 5 * 0.46 / len(masks) ** 0.5


@settings(max_examples=15, deadline=None)
@given(h=st.integers(5, 23), w=st.integers(5, 23), gh=st.integers(2, 5), gw=st.integers(2, 5))
def test_patch_means_are_means_of_masks(h, w, gh, gw):
    masks = draw_masks(h, w, (gh, gw))
    expected = torch.nn.functional.adaptive_avg_pool2d(masks.dense().double()[:, None], (gh, gw)).flatten(1)
    assert torch.allclose(patch_means(masks), expected, atol=1e-6)


# --- every mask of a tiny grid ----------------------------------------------------------------------------------------


def every_mask(keep, h=4, s=2):
    "All masks of a 2 x 2 grid on 4 x 4 px, by loops, and their probabilities."
    cell = math.ceil(h / s)
    u, masks, weights = upsampling(s, h).numpy(), [], []
    for bits in itertools.product((0, 1), repeat=s * s):
        zoomed = u @ np.reshape(bits, (s, s)) @ u.T
        for a, b in itertools.product(range(cell), repeat=2):
            masks.append(zoomed[a : a + h, b : b + h])
            weights.append(keep ** sum(bits) * (1 - keep) ** (s * s - sum(bits)) / cell**2)
    return np.array(masks), np.array(weights)


def expectation(f, keep):
    "E[f m] / p and Cov(f, m) / p over all masks."
    masks, weights = every_mask(keep)
    values = f(masks)
    assert abs(weights.sum() - 1) < 1e-12
    raw, mean = np.einsum("i,i,ijk->jk", weights, values, masks), np.einsum("i,ijk->jk", weights, masks)
    np.testing.assert_allclose(mean, keep)
    return raw / keep, (raw - (weights * values).sum() * mean) / keep


@pytest.mark.parametrize("keep", [0.2, 0.5, 0.7])
def test_the_linear_map_is_exact(keep):
    v = np.random.default_rng(0).normal(size=(4, 4))
    raw, centred = expectation(lambda m: 0.3 + np.einsum("ijk,jk->i", m, v), keep)
    np.testing.assert_allclose(linear_map(torch.tensor(v), 2, keep), centred, atol=1e-12)
    np.testing.assert_allclose(raw - centred, 0.3 + keep * v.sum(), atol=1e-12)


def test_overlap_is_the_mean_over_shifts():
    u, slow = upsampling(3, 7), torch.zeros(7, 7).double()
    for shift, i, j, c in itertools.product(range(3), range(7), range(7), range(3)):
        slow[i, j] += u[shift + i, c] * u[shift + j, c] / 3
    assert torch.allclose(overlap(3, 7), slow, atol=1e-12)


def curved(masks):
    "Far from linear in the mask."
    v = np.random.default_rng(1).normal(size=(4, 4))
    return 2 + np.tanh(np.einsum("ijk,jk->i", masks, v)) + masks[:, 0, 0] * masks[:, 3, 3] - masks[:, 1, 2] ** 2


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("keep", [0.3, 0.5])
def test_maps_are_unbiased_and_their_errors_calibrated(method, keep):
    raw, centred = expectation(curved, keep)
    z = []
    for seed in range(100):
        draw = blocks(4, 2, keep, seed)
        scores = torch.cat([torch.tensor(curved(draw(i).dense().double().numpy())) for i in range(2)])[:, None]
        found = average(scores, draw, keep, method)
        z.append((found.map[0].numpy() - (raw if method == "rise" else centred)) / found.stderr[0].numpy())
    z = np.array(z)
    assert abs(z.std() - 1) < 0.12 and abs(z.mean()) < 0.25, (z.std(), z.mean())


def test_the_regressions_error_holds_with_as_many_slopes_as_half_the_masks():
    v, z = torch.randn(14, 14, generator=torch.Generator().manual_seed(0)), []
    for seed in range(60):
        draw = blocks(14, seed=seed)
        noise = torch.randn(BLOCK, generator=torch.Generator().manual_seed(seed))
        found = average((torch.einsum("mhw,hw->m", draw(0).dense(), v) + 3 * noise)[:96, None], draw, method="regression")
        z.append((found.map[0] - linear_map(v)) / found.stderr[0])
    z = torch.stack(z)
    assert abs(z.std() - 1) < 0.12 and abs(z.mean()) < 0.2, (z.std(), z.mean())


@pytest.mark.parametrize("method", METHODS)
def test_the_error_falls_with_the_root_of_the_masks(method):
    draw = blocks(4, 2)
    scores = torch.cat([torch.tensor(curved(draw(i).dense().double().numpy())) for i in range(32)])[:, None]
    few, many = (average(scores[:n], draw, method=method).stderr.mean() for n in (256, 4096))
    assert abs(few / many / 4 - 1) < 0.15


def test_fewer_masks_do_with_centring_and_regression():
    draw, v = blocks(14), torch.randn(14, 14, generator=torch.Generator().manual_seed(0))
    scores = torch.cat([(torch.einsum("mhw,hw->m", draw(i).dense(), v) / 8).sigmoid() for i in range(4)])[:, None]
    error = {method: average(scores, draw, method=method).stderr.square().mean() for method in METHODS}
    assert error["centred"] < error["rise"] / 2 and error["regression"] < error["centred"] / 2


# --- estimators -------------------------------------------------------------------------------------------------------


def test_average_by_hand():
    "Two masks of 2 x 2 px: one is all on, of the other the lower cells are."
    masks = Masks(torch.tensor([[[1.0, 1], [1, 1]], [[0, 0], [1, 1]]]), torch.zeros(2, 2, dtype=torch.int64), (2, 2))
    assert torch.allclose(masks.dense()[1], torch.tensor([[1 / 6, 1 / 6], [1 / 2, 1 / 2]]))
    scores = torch.tensor([[1.0], [3.0]])
    found, centred = (average(scores, lambda block: masks, 0.5, method) for method in ("rise", "centred"))
    assert torch.allclose(found.map[0, :, 0], torch.tensor([1.5, 2.5])) and found.num_masks == 2  # (1 + 3/6) / 2 / p, (1 + 3/2) / 2 / p
    assert torch.allclose(found.stderr, torch.tensor(0.5))  # the terms differ by 1/2: half of that, over p
    assert torch.allclose(centred.map[0, :, 0], torch.tensor([-5 / 6, -1 / 2]))  # (-1/2 - 1/3) / 2 / p, (-1/2 + 0) / 2 / p


@pytest.mark.parametrize("n", [BLOCK, BLOCK + 1, 300])
def test_average_agrees_with_the_slow_form(n):
    draw = blocks(14)
    masks = torch.cat([draw(i).dense() for i in range(3)])[:n].double().numpy()
    scores = np.random.default_rng(0).random((n, 2, 3))
    products = scores[..., None, None] * masks[:, None, None]
    found = average(torch.tensor(scores), draw)
    np.testing.assert_allclose(found.map, products.mean(0) / 0.5, rtol=2e-5)
    np.testing.assert_allclose(found.stderr, products.std(0, ddof=1) / n**0.5 / 0.5, rtol=2e-4)
    centred = average(torch.tensor(scores), draw, method="centred")
    away = (scores - scores.mean(0))[..., None, None] * (masks - 0.5)[:, None, None]
    np.testing.assert_allclose(centred.map, away.mean(0) / 0.5, atol=2e-6)
    np.testing.assert_allclose(centred.stderr, away.std(0, ddof=1) / n**0.5 / 0.5, rtol=2e-4)


def test_small_differences_of_large_scores_keep_their_error():
    draw = blocks(14)
    small = torch.rand(256, 1, generator=torch.Generator().manual_seed(0)).double() * 1e-4
    for method in ("centred", "regression"):
        near, far = (average(small + offset, draw, method=method) for offset in (0, 50))
        assert torch.allclose(near.map, far.map, atol=1e-9) and torch.allclose(near.stderr, far.stderr, rtol=1e-3)


def test_left_out_agrees_with_refitting_without_each_row():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(20, 6)), rng.normal(size=(20, 2)) + np.arange(20)[:, None] / 9
    total = ((x - x.mean(0)) ** 2).sum()
    fits = []
    for penalty in total * np.logspace(-6, 0, 13):
        def fit(keep, penalty=penalty):
            a, b = x[keep] - x.mean(0), y[keep]
            a = np.column_stack([np.ones(len(a)), a])
            return np.linalg.solve(a.T @ a + penalty * np.diag([0] + [1] * 6), a.T @ b)
        rest = np.array([y[i] - np.append(1, x[i] - x.mean(0)) @ fit(np.arange(20) != i) for i in range(20)])
        fits.append(((rest**2).mean(0), fit(np.arange(20))[1:], rest))
    best = np.argmin([f[0] for f in fits], axis=0)
    slopes, rest = left_out(torch.tensor(x), torch.tensor(y))
    for column, i in enumerate(best):
        np.testing.assert_allclose(slopes[:, column], fits[i][1][:, column], atol=1e-9)
        np.testing.assert_allclose(rest[:, column], fits[i][2][:, column], atol=1e-8)


def test_left_out_survives_equal_rows_and_more_slopes_than_rows():
    for x in (torch.ones(5, 3), torch.eye(2, 9)):
        slopes, rest = left_out(x.double(), torch.arange(float(len(x)))[:, None].double())
        assert slopes.isfinite().all() and rest.isfinite().all()


@settings(max_examples=20, deadline=None)
@given(scale=st.floats(0.1, 10), shift=st.floats(-5, 5), method=st.sampled_from(METHODS))
def test_maps_follow_an_affine_change_of_the_score(scale, shift, method):
    draw = blocks(9, 3)
    scores = torch.rand(140, 1, generator=torch.Generator().manual_seed(0)).double()
    mean_mask = torch.cat([draw(0).dense(), draw(1).dense()])[:140].mean(0)
    plain, changed = average(scores, draw, method=method), average(scale * scores + shift, draw, method=method)
    constant = shift * mean_mask / 0.5 if method == "rise" else 0
    assert torch.allclose(changed.map[0], scale * plain.map[0] + constant, atol=1e-4)
    if method != "rise":
        assert torch.allclose(changed.stderr, scale * plain.stderr, rtol=1e-3)


def test_impossible_methods_and_grids_are_refused():
    with pytest.raises(InputError, match="did you mean 'centred'"):
        average(torch.zeros(3, 1), blocks(14), method="centered")
    with pytest.raises(InputError, match="no patches"):
        draw_masks(14, 14, 0)
