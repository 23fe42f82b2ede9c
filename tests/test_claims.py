"Claims: records become frames, the rule says what it should, and correlations are those of the textbooks."
import itertools

import numpy as np
import pandas as pd
import pytest
import simulated
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import permutation_test, spearmanr

from patchmix_repro import claims, ranks, store
from patchmix_repro.claims import Claim, load_battery, on_curve, verdicts
from patchmix_repro.core import InputError
from patchmix_repro.ledger import CURVES, published
from patchmix_repro.ranks import load_selectivity, rank_correlation
from patchmix_repro.stats import compare_seeds, equivalence, holm, mean_interval

OWN = ("convnext", "switch"), ("convnext", "timm")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return simulated.fill(tmp_path_factory.mktemp("store"))


@pytest.fixture(scope="module")
def battery(folder):
    return load_battery(folder, "shapes9", "mini")


# records to frames
def test_the_battery_comes_back_as_filed(battery):
    assert len(battery) == len(simulated.NETWORKS) * len(simulated.CONDITIONS)
    filed = simulated.battery_table("swin", "switch", 1).set_index("condition")
    mine = battery.query("model == 'swin' and mixing == 'switch' and train_seed == 1").set_index("condition").loc[filed.index]
    np.testing.assert_allclose(mine["accuracy"], filed["accuracy"])
    np.testing.assert_allclose(mine["kept"], 1 - filed["drop_normalised"])
    assert list(dict.fromkeys(zip(battery["model"], battery["training"], strict=True))) == list(itertools.product(("convnext", "swin", "deit"), ("Original", "Patch Mixing")))


def test_only_the_asked_data_scale_and_mixing_come_back(folder, tmp_path):
    assert load_battery(folder, "caltech9", "mini").empty and load_battery(folder, "shapes9", "small").empty
    assert set(load_battery(folder, "shapes9", "mini", ["timm"])["mixing"]) == {"timm"}
    simulated.fill(tmp_path, [("convnext", "timm", 0)], data="caltech9")
    store.append(simulated.battery("convnext", "none", 0), tmp_path)
    assert len(load_battery(tmp_path, "caltech9", "mini")) == len(simulated.CONDITIONS) and load_battery(tmp_path, "shapes9", "mini").empty


def test_a_store_without_such_records_gives_no_rows(tmp_path):
    store.append(simulated.sheets(["smd"]), tmp_path)
    for load in (load_battery, load_selectivity):
        found = load(tmp_path, "shapes9", "mini")
        assert found.empty and "not measured yet" in claims.coverage(found, "shapes9", "mini")


def test_a_network_filed_twice_is_refused(tmp_path):
    store.append(simulated.battery("swin", "timm", 0), tmp_path)
    store.append(simulated.battery("swin", "timm", 0) | {"run_id": "again"}, tmp_path)
    with pytest.raises(InputError, match="twice"):
        load_battery(tmp_path, "shapes9", "mini")


@pytest.mark.parametrize("name, places", [("replacement-14", 6), ("replacement-7", 6), ("permutation", 5), ("drop-14", 5)])
def test_a_curve_begins_with_the_clean_images(battery, name, places):
    rows = on_curve(battery, name)
    assert len(rows) == places * len(simulated.NETWORKS) and rows.groupby("run_id")["x"].min().eq(0).all()
    assert set(rows["x"].map("{:g}".format)) == set(published("Patch Mixing", name)["column"])
    assert rows.loc[rows["x"].eq(0), "accuracy"].tolist() == battery.loc[battery["curve"].eq("clean"), "accuracy"].tolist()


def test_conditions_of_no_curve_keep_their_name():
    names = ["drop-14-40-mean-random", "drop-7-40-black-random", "permute-196-each", "replace-14-30-seed1", "permute-2x4"]
    assert [claims.curve_of(name) for name in names] == names


def test_means_over_seeds_are_those_of_the_stats_module(battery):
    table = claims.by_seed(on_curve(battery, "drop-14"), "kept").set_index(["model", "mixing", "x"])
    values = battery.query("model == 'deit' and mixing == 'timm' and condition == 'drop-14-80-black-random'")["kept"]
    assert table.loc[("deit", "timm", 80), ["estimate", "low", "high", "seeds"]].tolist() == pytest.approx(list(mean_interval(values)))
    one = claims.by_seed(battery.query("train_seed == 0"), "kept", ("model", "mixing", "condition"))
    assert one["low"].isna().all() and one["seeds"].eq(1).all()


def test_selectivity_is_the_mean_over_images(folder):
    found = load_selectivity(folder, "shapes9", "mini")
    assert len(found) == 2 * len(simulated.NETWORKS) and set(found["curve"]) == {"patch", "smd"} and found["n"].eq(100).all()
    images = store.read_table(folder, "images", "selectivity").groupby("run_id")["mass"].mean()
    np.testing.assert_allclose(found.set_index("run_id")["mass"], images.loc[found["run_id"]])


def test_drops_are_shown_with_grid_and_dagger(battery):
    seven, fourteen = (claims.drop_table(on_curve(battery, f"replacement-{grid}")) for grid in (7, 14))
    assert ("ConvNeXt Patch Mixing", "as in training") in seven.index and ("ConvNeXt Original", "not in training") in seven.index
    assert set(fourteen.index.get_level_values("grid")) == {"not in training"}
    blind = claims.drop_table(on_curve(battery.assign(discriminates=False), "drop-14"))
    assert blind.map(lambda words: words.endswith("†")).all(axis=None) and not fourteen.map(lambda words: "†" in words)["50"].any()


# the rule
def frame(first, second, discriminates=True):
    rows = [("convnext", mixing, seed, "drop-14", 80.0, value) for mixing, values in (("switch", first), ("timm", second)) for seed, value in enumerate(values)]
    return pd.DataFrame(rows, columns=["model", "mixing", "train_seed", "curve", "x", "kept"]).assign(discriminates=discriminates)


@pytest.mark.parametrize("first, second, expect, discriminates, verdict", [
    ((0.80, 0.81, 0.82), (0.50, 0.51, 0.52), "more", True, "seen"),
    ((0.50, 0.51, 0.52), (0.80, 0.81, 0.82), "more", True, "contradicted"),
    ((0.50, 0.60, 0.70), (0.55, 0.60, 0.71), "more", True, "not decided"),
    ((0.600, 0.601, 0.602), (0.601, 0.602, 0.600), "same", True, "seen"),
    ((0.80, 0.81, 0.82), (0.50, 0.51, 0.52), "same", True, "contradicted"),
    ((0.50, 0.60, 0.70), (0.55, 0.60, 0.71), "same", True, "not decided"),
    ((0.620, 0.621, 0.622), (0.600, 0.601, 0.602), "same", True, "seen"),  # differs from 0, yet within the margin
    ((0.650, 0.651, 0.652), (0.600, 0.601, 0.602), "same", True, "not decided"),  # on the margin
    ((0.50, 0.51, 0.52), (0.80, 0.81, 0.82), "same", True, "contradicted"),
    ((0.590, 0.591, 0.592), (0.600, 0.601, 0.602), "no less", True, "seen"),
    ((0.80, 0.81, 0.82), (0.50, 0.51, 0.52), "no less", True, "seen"),
    ((0.50, 0.51, 0.52), (0.80, 0.81, 0.82), "no less", True, "contradicted"),
    ((0.50, 0.60, 0.70), (0.55, 0.60, 0.71), "no less", True, "not decided"),
    ((0.50, 0.51, 0.52), (0.80, 0.81, 0.82), "less", True, "seen"),
    ((0.80, 0.81, 0.82), (0.50, 0.51, 0.52), "less", True, "contradicted"),
    ((0.50, 0.60, 0.70), (0.55, 0.60, 0.71), "less", True, "not decided"),
    ((0.5, 0.5, 0.5), (0.4, 0.4), "more", True, "no spread"),
    ((0.5, 0.5, 0.5), (0.5, 0.5), "same", True, "no spread"),
    ((0.80, 0.81, 0.82), (0.50, 0.51, 0.52), "more", False, "not testable here"),
    ((0.80,), (0.50, 0.51, 0.52), "more", True, "one seed"),
    ((0.80, 0.81), (0.50, 0.51, 0.52, 0.53), "more", True, "two seeds"),
    ((0.80, 0.81), (0.50, 0.51, 0.52), "more", True, "seen"),
    ((), (0.50, 0.51, 0.52), "more", True, "not measured yet"),
    ((), (), "same", True, "not measured yet"),
])
def test_the_rule_by_hand(first, second, expect, discriminates, verdict):
    table = verdicts(frame(first, second, discriminates), [Claim("it", *OWN, "drop-14", 80, expect=expect)])
    assert table["verdict"].item() == verdict and verdict in claims.RULE
    assert claims.sentences(table).startswith(verdict)


def test_one_network_that_discriminates_is_enough():
    rows = frame((0.8, 0.81, 0.82), (0.5, 0.51, 0.52)).assign(discriminates=[False] * 5 + [True])
    assert verdicts(rows, [Claim("it", *OWN, "drop-14", 80)])["verdict"].item() == "seen"


def test_a_table_holds_the_tests_numbers(battery):
    claim = Claim("it", *OWN, "replacement-14", 50)
    row = verdicts(battery, [claim, Claim("none", ("mixer", "switch"), ("mixer", "timm"), "drop-14", 80)]).iloc[0]
    first, second = (battery.query(f"model == 'convnext' and mixing == '{mixing}' and condition == 'replace-14-50'")["kept"] for mixing in ("switch", "timm"))
    found = compare_seeds(first, second)
    assert row[["difference", "low", "high", "p_value", "p_holm"]].tolist() == pytest.approx([found.estimate, found.low, found.high, found.p_value, found.p_value])
    assert row["seeds"] == "3 + 3" and row["first"] == pytest.approx(first.mean())


def test_beyond_is_a_difference_of_differences_and_none_a_mean_along_the_curve(battery):
    kept = battery.query("model == 'convnext'").pivot(index=["mixing", "train_seed"], columns="condition", values="kept")
    grown, mean = verdicts(battery, [Claim("a", *OWN, "replacement-14", 50, beyond=10), Claim("b", *OWN, "paste")])["difference"]
    change = (kept["replace-14-50"] - kept["replace-14-10"]).groupby("mixing").mean()
    pasted = kept[["paste-embedded-10", "paste-embedded-20"]].mean(axis=1).groupby("mixing").mean()
    assert (grown, mean) == pytest.approx((change["switch"] - change["timm"], pasted["switch"] - pasted["timm"]))


def test_holm_counts_every_question_of_the_page(battery):
    asked = [Claim("a", *OWN, "replacement-14", 50), Claim("b", ("swin", "switch"), ("swin", "timm"), "replacement-14", 50, expect="same"), Claim("c", ("x", "switch"), ("x", "timm"), "drop-14", 80)]
    table = verdicts(battery, asked)
    values = [[battery.query(f"model == '{m}' and mixing == '{x}' and condition == 'replace-14-50'")["kept"] for x in ("switch", "timm")] for m in ("convnext", "swin")]
    assert abs(values[1][0].mean() - values[1][1].mean()) < 0.05  # within the margin: no evidence that it is beyond
    family = holm([compare_seeds(*values[0]).p_value, 1.0, equivalence(*values[1], 0.05).p_value])
    assert [table["p_holm"][0], table["p_holm"][1], table["p_same_holm"][1]] == pytest.approx(list(family))
    assert table.loc[2, ["p_holm", "p_same_holm"]].isna().all()


@pytest.mark.parametrize("curve, x", [("replacement-14", 50), ("replacement-7", 30), ("permutation", 196), ("drop-14", 80)])
def test_the_published_difference_is_the_ledgers(curve, x):
    found = claims.published_difference(Claim("it", *OWN, curve, x))
    rows = published("Patch Mixing", curve)
    for size in "TS":
        shares = []
        for training in ("Patch Mixing", "Original"):
            mine = rows[rows["row"].eq(f"ConvNeXt-{size} {training}")].set_index("column")["value"]
            shares.append((mine[str(x)] - 0.1) / (mine["0"] - 0.1))
        assert found[size] == pytest.approx(shares[0] - shares[1])


def test_what_is_not_published_has_no_published_difference():
    for claim in (Claim("", ("deit", "switch"), ("deit", "timm"), "drop-14", 80), Claim("", *OWN, "paste"), Claim("", *OWN, "patch", value="mass")):
        assert claims.published_difference(claim) == {}
    clean = claims.published_difference(Claim("", ("swin", "switch"), ("swin", "timm"), "replacement-14", 0, value="accuracy"))
    assert clean == pytest.approx({"T": 0.001, "S": -0.003})


@settings(max_examples=5)  # each verdict makes statsmodels collect garbage
@given(st.lists(st.floats(0, 1), min_size=3, max_size=3, unique=True), st.lists(st.floats(0, 1), min_size=3, max_size=3, unique=True))
def test_changing_sides_changes_the_sign(first, second):
    ahead, behind = (verdicts(frame(a, b), [Claim("it", *OWN, "drop-14", 80)]).iloc[0] for a, b in ((first, second), (second, first)))
    assert ahead["difference"] == pytest.approx(-behind["difference"], abs=1e-9)
    swapped = {"seen": "contradicted", "contradicted": "seen", "not decided": "not decided"}
    assert swapped[ahead["verdict"]] == behind["verdict"]


# rank correlation
def slow_spearman(x, y):
    "1 - 6 sum d^2 / n (n^2 - 1), from ranks by counting; no ties."
    def rank(values):
        return [sum(other < value for other in values) for value in values]
    n, d = len(x), np.subtract(rank(x), rank(y))
    return 1 - 6 * (d**2).sum() / (n * (n * n - 1))


@given(st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 10**6)), min_size=4, max_size=12, unique_by=(lambda p: p[0], lambda p: p[1])))
def test_spearman_is_the_textbooks(points):
    x, y = zip(*points, strict=True)
    found = rank_correlation(x, y, draws=20)
    assert found.estimate == pytest.approx(slow_spearman(x, y)) == pytest.approx(spearmanr(x, y).statistic)
    assert (found.low <= found.high or len(x) < 5) and found.n == len(x)


def test_the_partial_correlation_is_the_textbooks():
    x, y, z = np.random.default_rng(0).normal(size=(3, 30)) + np.linspace(0, 3, 30)
    xy, xz, yz = (spearmanr(a, b).statistic for a, b in itertools.combinations((x, y, z), 2))
    expected = (xy - xz * yz) / np.sqrt((1 - xz**2) * (1 - yz**2))
    assert rank_correlation(x, y, [z], draws=10).estimate == pytest.approx(expected)


def test_a_correlation_between_groups_is_not_one_within():
    group = np.repeat([0.0, 1.0], 20)
    x, y = 10 * group + np.random.default_rng(1).normal(size=40), 10 * group + np.random.default_rng(2).normal(size=40)
    assert rank_correlation(x, y, draws=50).estimate > 0.7 > 0.4 > abs(rank_correlation(x, y, [group], draws=50).estimate)


def test_the_bootstrap_covers():
    "Of 60 samples of a correlated pair, nearly all intervals hold the truth; they are repeatable."
    truth, hits = 6 / np.pi * np.arcsin(0.6 / 2), 0
    for seed in range(60):
        x, e = np.random.default_rng(seed).normal(size=(2, 40))
        found = rank_correlation(x, 0.6 * x + 0.8 * e, draws=200, seed=seed)
        hits += found.low <= truth <= found.high
    assert 50 <= hits <= 60 and rank_correlation(x, e, draws=50) == rank_correlation(x, e, draws=50)


def test_groups_are_resampled_whole():
    "Copies of a network add nothing: the interval stays as wide as without them."
    x, y = np.random.default_rng(3).normal(size=(2, 8))
    once, copied = rank_correlation(x, y, draws=500), rank_correlation(np.repeat(x, 5), np.repeat(y, 5), groups=np.repeat(range(8), 5), draws=500)
    assert copied.estimate == pytest.approx(once.estimate) and copied.n == 40
    assert copied.high - copied.low == pytest.approx(once.high - once.low, abs=0.1)
    assert np.subtract(*rank_correlation(np.repeat(x, 5), np.repeat(y, 5), draws=500)[2:0:-1]) < 0.6 * (once.high - once.low)


def test_the_pairing_test_by_hand_and_against_scipy():
    assert ranks.pairing_test([1, 2, 3, 4, 5], [10, 20, 30, 40, 50]) == pytest.approx((1, 2 / 120))  # the order and its reverse
    x, y = np.random.default_rng(5).normal(size=(2, 6))
    slow = permutation_test((y,), lambda y: spearmanr(x, y).statistic, permutation_type="pairings", n_resamples=np.inf)
    two_sided = np.mean(np.abs(slow.null_distribution) >= abs(slow.statistic) - 1e-9)
    assert ranks.pairing_test(x, y) == pytest.approx((slow.statistic, two_sided))


@pytest.mark.parametrize("n, given", [(6, 0), (8, 1), (12, 2)])
def test_unrelated_recipes_are_rarely_called_related(n, given):
    "Rule fixed beforehand: of 400 samples without any relation, at most 7 % (5 % and the error of 400) are below p = 0.05."
    rng = np.random.default_rng(n)
    columns = rng.normal(size=(400, 2 + given, n))
    low = [ranks.pairing_test(x, y, more, draws=500)[1] <= 0.05 for x, y, *more in columns]
    assert np.mean(low) <= 0.07


def test_a_strong_relation_of_six_recipes_is_found():
    rng = np.random.default_rng(0)
    found = [ranks.pairing_test(x, x + 0.2 * rng.normal(size=6)) for x in rng.normal(size=(50, 6))]
    assert np.mean([p <= 0.05 and sign > 0 for sign, p in found]) > 0.8


def test_too_few_recipes_cannot_be_tested():
    assert np.isnan(ranks.pairing_test([1, 2, 3, 4], [1, 2, 3, 4])[1]) and np.isnan(ranks.pairing_test([], [])[1])
    assert np.isnan(ranks.pairing_test([1, 2, 3, 4, 5], [1, 2, 3, 4, 5], [[1, 1, 0, 0, 0]])[1])


@pytest.mark.parametrize("x, y", [([1, 2, 3], [1, 2, 3]), ([1, 2, 3, np.nan], [1, 2, 3, 4]), ([], [])])
def test_too_little_is_refused(x, y):
    with pytest.raises(InputError, match="at least 4"):
        rank_correlation(x, y)


def test_what_has_no_spread_has_no_correlation():
    assert np.isnan(rank_correlation([1, 1, 1, 1], [1, 2, 3, 4], draws=10).estimate)
    assert np.isnan(rank_correlation([1, 2, 3, 4], [1, 2, 3, 4], [[1, 2, 3, 4]], draws=10).estimate)


def test_selectivity_meets_robustness_by_network(folder, battery):
    selectivity = load_selectivity(folder, "shapes9", "mini")
    pairs = ranks.robustness(battery, selectivity)
    assert len(pairs) == len(simulated.NETWORKS)
    row = pairs.query("model == 'swin' and mixing == 'timm' and train_seed == 2").iloc[0]
    mine = battery.query("model == 'swin' and mixing == 'timm' and train_seed == 2")
    assert row["robustness"] == pytest.approx(mine[mine["curve"].isin(["paste", "slide"])]["kept"].mean())
    table = ranks.correlations(pairs).set_index("networks")
    assert table.loc["all", "verdict"] == "seen" and table["n"].tolist() == [18, 18, 18, 6, 6, 6] and table["recipes"].tolist() == [6, 6, 6, 2, 2, 2]
    assert set(table["verdict"][-3:]) == {"not testable here"} and table["p_holm"][-3:].isna().all()
    assert table.loc["all", "estimate"] == pytest.approx(spearmanr(pairs["selectivity"], pairs["robustness"]).statistic)
    with pytest.raises(InputError, match="score"):
        ranks.robustness(battery, selectivity, score="mas")


def test_curves_of_the_battery_are_those_of_the_ledger(battery):
    assert set(CURVES) < set(battery["curve"])
