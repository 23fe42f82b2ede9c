"Intervals and tests: by hand, by a slow independent form, by property, and by coverage in simulation."
import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.integrate import quad
from scipy.optimize import brentq

from patchmix_repro import stats
from patchmix_repro.core import InputError
from patchmix_repro.stats import equivalence, seeds_needed

Z = 1.959963984540054
SEEDS = st.lists(st.floats(0, 1).map(lambda x: round(x, 4)), min_size=2, max_size=6)


# slow forms in float64, from the definitions alone
def t_tail(x, df):
    "P(T > x), by integrating the density."
    scale = math.gamma((df + 1) / 2) / math.gamma(df / 2) / math.sqrt(df * math.pi)
    half = quad(lambda u: scale * (1 + u * u / df) ** (-(df + 1) / 2), 0, abs(x), epsabs=1e-13, limit=200)[0]
    return 0.5 - half if x >= 0 else 0.5 + half


def t_quantile(level, df):
    return brentq(lambda x: t_tail(x, df) - (1 - level) / 2, 0, 1e4, xtol=1e-12)


def mean_var(x):
    mean = sum(x) / len(x)
    return mean, sum((v - mean) ** 2 for v in x) / (len(x) - 1)


def slow_wilson(k, n, z=Z):
    "The accuracies p with |k/n - p| <= z sqrt(p (1 - p) / n), found as roots."
    p, q = k / n, lambda x: (k / n - x) ** 2 - z * z * x * (1 - x) / n
    low = 0.0 if k == 0 else brentq(q, 0, p - 1e-9, xtol=1e-14)
    return low, 1.0 if k == n else brentq(q, p + 1e-9, 1, xtol=1e-14)


def slow_welch(a, b, level=0.95):
    (ma, va), (mb, vb) = mean_var(a), mean_var(b)
    ea, eb = va / len(a), vb / len(b)
    df = (ea + eb) ** 2 / (ea**2 / (len(a) - 1) + eb**2 / (len(b) - 1))
    se, d = math.sqrt(ea + eb), ma - mb
    half = t_quantile(level, df) * se
    return d, d - half, d + half, 2 * t_tail(abs(d) / se, df), df, se


def slow_mcnemar(b, c):
    "Every way b + c coins can fall, weighed by how extreme it is."
    n = b + c
    extreme = [heads for heads in range(n + 1) if min(heads, n - heads) <= min(b, c)]
    return sum(math.comb(n, heads) for heads in extreme) / 2**n


def slow_newcombe(a, b, c, d, z=Z):
    "Newcombe 1998, table I, method 10, term by term."
    n = a + b + c + d
    l2, u2 = slow_wilson(a + b, n, z)
    l3, u3 = slow_wilson(a + c, n, z)
    e, f, g, h = a + b, c + d, a + c, b + d
    if e * f * g * h == 0:
        phi = 0.0
    else:
        numerator = a * d - b * c
        if numerator > n / 2:
            numerator -= n / 2
        elif numerator >= 0:
            numerator = 0
        phi = numerator / math.sqrt(e * f * g * h)
    dl2, du2, dl3, du3 = e / n - l2, u2 - e / n, g / n - l3, u3 - g / n
    delta = math.sqrt(max(dl2**2 - 2 * phi * dl2 * du3 + du3**2, 0))
    epsilon = math.sqrt(max(du2**2 - 2 * phi * du2 * dl3 + dl3**2, 0))
    return (b - c) / n - delta, (b - c) / n + epsilon


# wilson
def test_wilson_by_hand():
    # 81 of 263, the example of Newcombe (1998), two-sided intervals for the single proportion
    found = stats.wilson(81, 263)
    assert (round(found.low, 4), round(found.high, 4)) == (0.2553, 0.3662) and found.n == 263
    assert stats.wilson(0, 20).low == 0 and round(stats.wilson(0, 20).high, 4) == 0.1611


@settings(deadline=None)
@given(st.integers(1, 400).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilson_is_the_set_of_plausible_accuracies(count):
    k, n = count
    found = stats.wilson(k, n)
    assert 0 <= found.low <= found.estimate <= found.high <= 1
    np.testing.assert_allclose(found[1:3], slow_wilson(k, n), atol=1e-9)
    other = stats.wilson(n - k, n)  # right and wrong exchanged
    np.testing.assert_allclose((1 - other.high, 1 - other.low), found[1:3], atol=1e-12)


@pytest.mark.parametrize("k, n", [(0, 0), (-1, 5), (6, 5), (1.5, 5), (float("nan"), 5), (1, float("nan"))])
def test_wilson_refuses_what_is_no_count(k, n):
    with pytest.raises(InputError, match="whole numbers"):
        stats.wilson(k, n)


@pytest.mark.parametrize("level", [0, 1, 95, -0.5, float("nan")])
def test_a_level_lies_between_0_and_1(level):
    for call in (
        lambda: stats.wilson(1, 2, level), lambda: stats.mean_interval([1, 2], level), lambda: stats.compare_seeds([1, 2], [2, 3], level),
        lambda: stats.compare_paired([1, 0], [0, 1], level), lambda: stats.compare_images([[1, 0]], [[0, 0]], level),
    ):
        with pytest.raises(InputError, match="0.95"):
            call()


# seeds
def test_mean_interval_by_hand():
    assert stats.mean_interval([1, 2, 3]) == pytest.approx((2, 2 - 2.484137712, 2 + 2.484137712, 3))
    assert stats.mean_interval([0.5, 0.5])[:3] == (0.5, 0.5, 0.5)


@settings(max_examples=40, deadline=None)
@given(SEEDS, st.sampled_from([0.5, 0.9, 0.95, 0.99]))
def test_mean_interval_is_student(values, level):
    mean, variance = mean_var(values)
    half = t_quantile(level, len(values) - 1) * math.sqrt(variance / len(values))
    assert stats.mean_interval(values, level)[:3] == pytest.approx((mean, mean - half, mean + half), abs=1e-8)


def test_compare_seeds_by_hand():
    found = stats.compare_seeds([4, 5, 6], [1, 2, 3])
    assert found.estimate == 3 and found.n == 6
    assert found.high - 3 == pytest.approx(2.776445105 * math.sqrt(2 / 3))
    # t = 3.674 with 4 degrees of freedom: P = 1 - (x/2)(3 - x^2), x = t / sqrt(t^2 + 4)
    x = 3 / math.sqrt(2 / 3) / math.sqrt(9 / (2 / 3) + 4)
    assert found.p_value == pytest.approx(1 - x / 2 * (3 - x * x))


@settings(max_examples=40, deadline=None)
@given(SEEDS, SEEDS)
def test_compare_seeds_is_welch(a, b):
    if min(np.ptp(a), np.ptp(b)) < 1e-2:
        return
    d, low, high, p_value, *_ = slow_welch(a, b)
    found = stats.compare_seeds(a, b)
    assert found[:4] == pytest.approx((d, low, high, p_value), abs=1e-6)
    mirror = stats.compare_seeds(b, a)
    assert mirror[:4] == pytest.approx((-d, -high, -low, p_value), abs=1e-6)


@pytest.mark.parametrize("values, word", [([0.5], "at least 2"), ([], "at least 2"), ([0.5, float("nan")], "NaN"), ([[1, 2]], "shape")])
def test_seeds_that_say_nothing_are_refused(values, word):
    for call in (lambda: stats.mean_interval(values), lambda: stats.compare_seeds(values, [1, 2]), lambda: stats.equivalence([1, 2], values, 1)):
        with pytest.raises(InputError, match=word):
            call()


def test_no_spread_is_refused():
    with pytest.raises(InputError, match="different seeds"):
        stats.compare_seeds([0.5, 0.5], [0.5, 0.5])
    with pytest.raises(InputError, match="different seeds"):
        stats.equivalence([0.5, 0.5], [0.4, 0.4], 0.1)


# paired over images
def outcomes(a, b, c, d):
    return [1] * (a + b) + [0] * (c + d), [1] * a + [0] * b + [1] * c + [0] * d


def test_compare_paired_by_hand():
    found = stats.compare_paired(*outcomes(3, 5, 0, 2))
    assert (found.estimate, found.p_value, found.n) == (0.5, 2 / 2**5, 10)
    # 2 against 1 disagreement: every fall of three coins is as extreme
    assert stats.compare_paired(*outcomes(4, 2, 1, 3)).p_value == 1


def test_newcombe_by_hand():
    # both, only a, only b, neither = 4, 2, 0, 4: phi = (16 - 5) / sqrt(6 * 4 * 4 * 6) = 11 / 24
    found = stats.compare_paired(*outcomes(4, 2, 0, 4))
    la, ub = stats.wilson(6, 10).low, stats.wilson(4, 10).high
    x, y = 0.6 - la, ub - 0.4
    assert found.low == pytest.approx(0.2 - math.sqrt(x * x - 2 * (11 / 24) * x * y + y * y))


CELLS = st.tuples(*[st.integers(0, 30)] * 4).filter(lambda cells: sum(cells) > 0)


@settings(deadline=None)
@given(CELLS)
def test_compare_paired_is_mcnemar_and_newcombe(cells):
    found = stats.compare_paired(*outcomes(*cells))
    assert found.p_value == pytest.approx(slow_mcnemar(cells[1], cells[2]), abs=1e-9)
    assert found[1:3] == pytest.approx(slow_newcombe(*cells), abs=1e-8)
    assert -1 <= found.low <= found.estimate <= found.high <= 1
    a, b, c, d = cells
    mirror = stats.compare_paired(*outcomes(a, c, b, d))
    assert mirror[:4] == pytest.approx((-found.estimate, -found.high, -found.low, found.p_value), abs=1e-9)


def test_the_order_of_the_images_does_not_matter():
    a, b = np.array(outcomes(7, 5, 3, 4), dtype=bool)
    order = np.random.default_rng(0).permutation(len(a))
    assert stats.compare_paired(a, b) == stats.compare_paired(a[order], b[order])


@pytest.mark.parametrize("a, b, word", [
    ([1, 0], [1], "paired"), ([], [], "outcomes"), ([0.5, 1], [0, 1], "right"), ([float("nan"), 1], [0, 1], "right"), ([[1]], [[0]], "1-d"),
])
def test_outcomes_that_cannot_be_paired_are_refused(a, b, word):
    with pytest.raises(InputError, match=word):
        stats.compare_paired(a, b)


def test_compare_images_by_hand():
    found = stats.compare_images([[1, 1, 0, 1], [1, 1, 1, 0]], [[0, 1, 0, 0], [0, 0, 1, 0]])
    assert found.estimate == 0.5 and found.n == 4
    assert found.high - 0.5 == pytest.approx(3.182446305 * math.sqrt(1 / 6) / 2)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 4), st.integers(2, 12), st.integers(0, 10**6))
def test_compare_images_is_a_paired_t_test(s, n, seed):
    a, b = np.random.default_rng(seed).integers(0, 2, (2, s, n))
    d = [sum(int(a[i][j]) - int(b[i][j]) for i in range(s)) / s for j in range(n)]
    mean, variance = mean_var(d)
    if variance < 1e-12:
        with pytest.raises(InputError, match="more images"):
            stats.compare_images(a, b)
        return
    se = math.sqrt(variance / n)
    half, p_value = t_quantile(0.95, n - 1) * se, 2 * t_tail(abs(mean) / se, n - 1)
    assert stats.compare_images(a, b)[:4] == pytest.approx((mean, mean - half, mean + half, p_value), abs=1e-8)


def test_compare_images_refuses_unequal_shapes():
    with pytest.raises(InputError, match="paired"):
        stats.compare_images([[1, 0]], [[1, 0], [0, 1]])
    with pytest.raises(InputError, match="2-d"):
        stats.compare_images([1, 0], [1, 1])


# equivalence
def test_equivalence_by_hand():
    # difference 0, standard error sqrt(2/3), 4 degrees of freedom: the 90 % limit is 2.1318 standard errors away
    a, limit = [1, 2, 3], 2.131846786 * math.sqrt(2 / 3)
    assert stats.equivalence(a, a, limit * 1.001).equivalent and not stats.equivalence(a, a, limit * 0.999).equivalent
    assert stats.equivalence(a, a, limit).p_value == pytest.approx(0.05)


@settings(max_examples=40, deadline=None)
@given(SEEDS, SEEDS, st.floats(0.01, 1))
def test_equivalence_is_two_one_sided_tests(a, b, margin):
    if min(np.ptp(a), np.ptp(b)) < 1e-2:
        return
    d, low, high, _, df, se = slow_welch(a, b, 0.9)
    found = stats.equivalence(a, b, margin)
    assert found.p_value == pytest.approx(max(t_tail((d + margin) / se, df), t_tail((margin - d) / se, df)), abs=1e-6)
    if min(abs(low + margin), abs(high - margin)) > 1e-6:
        assert found.equivalent == (-margin < low and high < margin)


@pytest.mark.parametrize("margin, alpha", [(0, 0.05), (-1, 0.05), (float("nan"), 0.05), (float("inf"), 0.05), (1, 0.5), (1, 0)])
def test_equivalence_needs_a_margin(margin, alpha):
    with pytest.raises(InputError, match="margin above 0"):
        stats.equivalence([1, 2], [2, 3], margin, alpha)


# holm
def test_holm_by_hand():
    np.testing.assert_allclose(stats.holm([0.01, 0.04, 0.03]), [0.03, 0.06, 0.06])
    np.testing.assert_allclose(stats.holm([0.9, 0.8]), [1, 1])


@settings(max_examples=15, deadline=None)  # statsmodels collects garbage at each call
@given(st.lists(st.floats(0, 1), min_size=1, max_size=5))
def test_holm_is_closed_testing_with_bonferroni(p):
    "The adjusted p-value is the largest Bonferroni p-value of all families that hold the question."
    families = [f for r in range(1, len(p) + 1) for f in itertools.combinations(range(len(p)), r)]
    slow = [max(min(1, len(f) * min(p[j] for j in f)) for f in families if i in f) for i in range(len(p))]
    np.testing.assert_allclose(stats.holm(p), slow, atol=1e-12)


@pytest.mark.parametrize("p", [[], [1.2], [-0.1], [float("nan")]])
def test_holm_refuses_what_is_no_p_value(p):
    with pytest.raises(InputError):
        stats.holm(p)


def test_percent():
    assert stats.percent(stats.Interval(0.5, 0.25, 0.75, 4)) == "50.0 [25.0, 75.0]"
    assert stats.percent(stats.Comparison(-0.01, -0.03, 0.01, 0.4, 9), 0) == "-1 [-3, 1]"


# do the intervals hold the truth as often as they say?
def covered(intervals, truth):
    return np.mean([found.low <= truth <= found.high for found in intervals])


def test_coverage_of_wilson():
    rng = np.random.default_rng(1)
    for truth in (0.5, 0.8, 0.97):
        assert 0.93 < covered([stats.wilson(k, 300) for k in rng.binomial(300, truth, 2000)], truth) < 0.975


def test_coverage_over_seeds():
    rng = np.random.default_rng(2)
    draws = rng.normal(0.7, 0.02, (1500, 3))
    assert 0.935 < covered([stats.mean_interval(x) for x in draws], 0.7) < 0.965
    pairs = zip(draws, rng.normal(0.6, 0.04, (1500, 5)), strict=True)
    assert 0.93 < covered([stats.compare_seeds(a, b) for a, b in pairs], 0.1) < 0.975


def paired_draws(rng, runs, n, s=1):
    "Networks that share hard images: image difficulty u; right with 0.9 - 0.4 u and 0.85 - 0.4 u."
    u = rng.random((runs, 1, n))
    return rng.random((runs, s, n)) < 0.9 - 0.4 * u, rng.random((runs, s, n)) < 0.85 - 0.4 * u


def test_coverage_of_paired_comparisons():
    rng = np.random.default_rng(3)
    one = [stats.compare_paired(a[0], b[0]) for a, b in zip(*paired_draws(rng, 1200, 200), strict=True)]
    assert 0.93 < covered(one, 0.05) < 0.975
    many = [stats.compare_images(a, b) for a, b in zip(*paired_draws(rng, 1200, 200, s=3), strict=True)]
    assert 0.93 < covered(many, 0.05) < 0.97


def test_mcnemar_and_tost_keep_their_level():
    rng = np.random.default_rng(4)
    same = [stats.compare_paired(*(rng.random((2, 80)) < 0.8)).p_value for _ in range(1000)]
    assert np.mean(np.array(same) < 0.05) < 0.06
    edge = [stats.equivalence(rng.normal(0, 1, 5), rng.normal(2, 1, 5), 2).equivalent for _ in range(1500)]
    assert 0.025 < np.mean(edge) < 0.065


@given(st.floats(1e-4, 1e3), st.floats(1e-4, 1e3), st.booleans())
def test_a_larger_difference_never_needs_more_seeds(spread, difference, same):
    n, fewer = (seeds_needed(spread, k * difference, same) for k in (1, 2))
    assert n is None or 2 <= fewer <= n <= 1000
    assert seeds_needed(spread, -difference, same) == n and seeds_needed(2 * spread, 2 * difference, same) == n


@pytest.mark.parametrize("effect, n", [(0.2, 394), (0.5, 64), (0.8, 26)])
def test_seeds_needed_against_cohens_table(effect, n):
    "Cohen 1988, table 2.4.1: n a group for power 0.80 at a two-sided 5 %; he rounds to 393."
    assert abs(seeds_needed(1, effect) - n) <= 1


def test_seeds_needed_to_show_the_same_by_trial():
    rng, n = np.random.default_rng(3), seeds_needed(1, 0.7, same=True)
    shares = [np.mean([equivalence(*rng.normal(size=(2, k)), 0.7).equivalent for _ in range(3000)]) for k in (n - 3, n, n + 3)]
    assert shares[0] < shares[1] < shares[2] and 0.77 < shares[1] < 0.86


@pytest.mark.parametrize("wrong", [dict(spread=0), dict(difference=0), dict(spread=float("nan")), dict(difference=float("inf")), dict(power=0.01), dict(power=1), dict(alpha=0)])
def test_no_plan_is_refused(wrong):
    with pytest.raises(InputError, match="Give"):
        seeds_needed(**({"spread": 1, "difference": 1} | wrong))
