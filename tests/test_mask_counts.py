"""How many masks a method needs: windows of masks, ranks, curves read by hand, and a run from networks to a record."""
import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import spearmanr
from test_squeezenet import shared

from patchmix_repro import store
from patchmix_repro.battery import open_networks
from patchmix_repro.core import InputError, keyed_generator
from patchmix_repro.data import create_dataset
from patchmix_repro.explanations import open_split
from patchmix_repro.mask_counts import COUNTS, MaskCountsConfig, mask_counts, mask_curves, needed, needed_table, rank_rows, ranks, seen_scores, times_fewer, window
from patchmix_repro.masks import BLOCK, METHODS, average, draw_masks
from patchmix_repro.saliency import Masking, rise

DRAW = Masking(seed=4).blocks(14, 14)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 3 * BLOCK), st.integers(1, 2 * BLOCK))
def test_a_window_holds_the_masks_counted_from_its_start(start, count):
    whole = torch.cat([draw_masks(14, 14, seed=4, block=k).dense() for k in range(6)])
    at = window(DRAW, start, count)
    got = torch.cat([at(k).dense() for k in range(-(-count // BLOCK))])[:count]
    assert torch.equal(got, whole[start : start + count])


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.booleans())
def test_products_of_ranks_are_spearmans_correlation(seed, ties):
    a, b = torch.rand(2, 3, 4, 5, generator=keyed_generator(seed, "ranks"))
    if ties:
        a, b = (5 * a).round(), (5 * b).round()
    slow = [spearmanr(x.flatten(), y.flatten())[0] for x, y in zip(a, b, strict=True)]
    assert np.allclose((ranks(a) * ranks(b)).sum(1), slow)


def test_a_flat_map_correlates_with_nothing():
    flat = torch.ones(1, 4, 4)
    assert not ranks(flat).any()


def test_needed_by_hand():
    curve = pd.Series([0.1, 0.5, 0.3, 0.9], index=[16, 32, 64, 128])  # the dip does not count: 0.5 was reached
    assert np.allclose([needed(curve, 0.05), needed(curve, 0.3), needed(curve, 0.5), needed(curve, 0.9)], [16, 16 * 2**0.5, 64, 128])
    assert np.isnan(needed(curve, 0.91))


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(0, 1), min_size=4, max_size=4), st.floats(0, 1))
def test_needed_reaches_the_level(values, level):
    curve = pd.Series(values, index=[16, 32, 64, 128])
    found, best = needed(curve, level), np.maximum.accumulate(values)
    if level > best[-1]:
        assert np.isnan(found)
    else:
        assert 16 - 1e-9 <= found <= 128 + 1e-9
        assert np.interp(np.log(found), np.log(curve.index), best) >= level - 1e-6


def table_of(quarter):
    "Plain RISE gains 0.1 at each doubling; regression is two doublings ahead; centred is RISE."
    steps = {"rise": 0, "centred": 0, "regression": quarter}
    return pd.DataFrame([{"image": k, "method": m, "masks": n, "start": 0, "spearman": 0.1 * (np.log2(n / 16) + steps[m]) + 0.01 * k, "stderr": 0.1}
                         for k in range(5) for m in METHODS for n in (16, 32, 64, 128, 256)])


def test_a_method_two_doublings_ahead_needs_a_quarter():
    table = table_of(2)
    found = times_fewer(table, "regression", 256)
    assert np.allclose([found.estimate, found.low, found.high], 4, rtol=1e-6) and found.n == 5
    assert np.isclose(times_fewer(table, "centred", 64).estimate, 1)
    assert np.isclose(times_fewer(table, "regression", 32).estimate, 2)  # of 32, no more than 16 can be told
    words = needed_table({"net": table}, (32, 256))
    assert words.loc[("net", 32), "regression"] == "at most 16 masks: at least 2.0 [2.0, ...] times fewer" and words.loc[("net", 256), "regression"].startswith("64 masks: 4.0 [4.0, 4.0]")
    assert not words.loc[("net", 256), "centred"].startswith("at most")


def test_draws_that_do_not_reach_count_as_no_gain():
    "Two of five images never reach what plain RISE reaches: many bootstrap draws do not either."
    table = table_of(0)
    table.loc[table.method.eq("regression") & table.image.lt(2), "spearman"] -= 0.3
    table.loc[table.method.eq("regression") & table.image.ge(2), "spearman"] += 0.21
    found = times_fewer(table, "regression", 256)
    assert found.low == 0 and found.estimate > 0 and found.low <= found.estimate <= found.high


def test_what_is_not_reached_is_said():
    assert times_fewer(table_of(-2), "regression", 256)[:3] == (0, 0, 0)
    assert needed_table({"net": table_of(-2)}, (256,)).loc[("net", 256), "regression"] == "not reached"


def test_an_unknown_method():
    with pytest.raises(InputError, match="centred"):
        times_fewer(table_of(2), "centered", 64)


def test_rank_rows_judge_what_rise_gives():
    network, test = open_networks("convnext_mini_original")["convnext_mini_original"], create_dataset("shapes9", "test", 56)
    images = test.images[:2] / 255
    masking = Masking(num_masks=64, seed=3)
    scores, draw = seen_scores(network, images, masking), masking.blocks(56, 56)
    judge = torch.rand(2, 56, 56, generator=keyed_generator(0, "judge"))
    table = pd.DataFrame(rank_rows(scores, draw, judge)).set_index(["method", "masks", "start", "image"]).spearman
    x = (images - torch.tensor(network.model.pretrained_cfg["mean"]).view(3, 1, 1)) / torch.tensor(network.model.pretrained_cfg["std"]).view(3, 1, 1)
    for method in METHODS:
        found = rise(network.model, x, num_masks=64, seed=3, method=method)
        assert np.isclose(table[method, 64, 0, 1], spearmanr(found.map[1].flatten(), judge[1].flatten())[0], atol=1e-3)
    part = average(scores[16:32], lambda _: draw(0)._replace(cells=draw(0).cells[16:], shift=draw(0).shift[16:]), 0.5, "rise")
    assert np.isclose(table["rise", 16, 16, 0], spearmanr(part.map[0].flatten(), judge[0].flatten())[0], atol=1e-6)


def test_a_run_is_filed_once_and_drawn(tmp_path):
    config = MaskCountsConfig(images=2, masks=32, judge_masks=64)
    networks = open_networks("convnext_mini_patchmix")
    tables = {name: mask_counts(config, network, create_dataset("shapes9", "test", 56), tmp_path) for name, network in networks.items()}
    again = mask_counts(config, networks["convnext_mini_patchmix"], create_dataset("shapes9", "test", 56), tmp_path)
    assert again.equals(tables["convnext_mini_patchmix"]) and len(store.read(tmp_path)) == 1
    figure, points = mask_curves(tables)
    assert set(points.masks) == {16, 32} and len(figure.axes) == 1
    assert np.isclose(points["mean"].iloc[0], again[again.method.eq(points.method[0]) & again.masks.eq(points.masks[0])].spearman.mean())


@pytest.mark.parametrize("given", [{"images": 1}, {"masks": COUNTS[0] - 1}, {"masks": 64, "judge_masks": 63}])
def test_bad_configs(given):
    with pytest.raises(InputError, match="allowed"):
        MaskCountsConfig(**given)


def test_squeezenet_is_a_network_like_others(monkeypatch):
    monkeypatch.setenv("PATCHMIX_DATA", str(shared("squeezenet1_0_imagenet.npz", "imagenet_ccby.zip")))
    network = open_networks(pretrained="squeezenet")["squeezenet"]
    assert network.size == 224 and network.note["train_data"] is None and network.note["pretrained"] == "squeezenet"
    assert len(open_split(MaskCountsConfig(data="imagenet_ccby"), {"squeezenet": network})) == 300
