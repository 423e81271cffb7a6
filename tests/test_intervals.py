"""Intervals of rates and of gaps between groups keep what they promise."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from ekiben.intervals import (
    family_z,
    gap_difference,
    gap_ratio,
    mean_limits,
    rate_limits,
    resample_counts,
    worst_pair_z,
    z_value,
)

SHARES = np.array([0.4, 0.2, 0.15, 0.1, 0.06, 0.05, 0.03, 0.01])


def audit_gap(rows, chance, seed):
    rng = np.random.default_rng(seed)
    hits = rng.binomial(rows, chance)
    limits = rate_limits(hits, rows, worst_pair_z(hits, rows, seed=seed))
    return gap_ratio(np.where(rows > 0, hits / np.maximum(rows, 1), np.nan), *limits)


def test_rate_limits_are_those_of_scipy():
    from scipy.stats import binomtest

    for hits, rows, method in ((30, 200, "wilson"), (190, 200, "wilson"), (3, 40, "exact"), (0, 5, "exact"), (5, 5, "exact")):
        low, high = rate_limits(np.array([hits]), np.array([rows]), z_value(0.95))
        theirs = binomtest(hits, rows).proportion_ci(0.95, method=method)
        assert (low[0], high[0]) == pytest.approx((theirs.low, theirs.high), abs=1e-9)


@pytest.mark.parametrize("chance", [0.02, 0.2, 0.5])
@pytest.mark.parametrize("rows", [8, 60, 1000])
def test_rate_limits_cover_the_true_rate(chance, rows):
    hits = np.random.default_rng(0).binomial(rows, chance, 4000)
    low, high = rate_limits(hits, np.full(4000, rows), z_value(0.95))
    assert ((low <= chance) & (chance <= high)).mean() >= 0.935


def test_mean_limits_are_students():
    from scipy.stats import t

    values = np.array([1.0, 2.0, 4.0, 9.0])
    low, high = mean_limits(np.array([values.mean()]), np.array([values.std(ddof=1)]), np.array([4]), z_value(0.95))
    theirs = t.interval(0.95, 3, values.mean(), values.std(ddof=1) / 2)
    assert (low[0], high[0]) == pytest.approx(theirs, rel=1e-6)


def test_resampled_counts_keep_the_total_and_the_variance():
    counts = np.array([[[300, 60], [40, 100]], [[180, 20], [30, 50]]])
    draws = resample_counts(counts, 4000, seed=1)
    assert (draws.sum(axis=(1, 2, 3)) == counts.sum()).all()
    shares = counts / counts.sum()
    assert draws.var(axis=0) == pytest.approx(counts.sum() * shares * (1 - shares), rel=0.12)
    assert (resample_counts(counts, 50, seed=1) == resample_counts(counts, 50, seed=1)).all()


def test_the_price_of_all_pairs_lies_between_one_comparison_and_bonferroni():
    rows = np.round(2000 * SHARES).astype(int)
    z = worst_pair_z(rows // 4, rows)
    assert z_value(0.95) < z <= family_z(28)
    assert worst_pair_z(rows[:2] // 4, rows[:2]) == z_value(0.95)


def test_eight_fair_groups_fail_four_fifths_at_most_once_in_twenty():
    rng = np.random.default_rng(7)
    gaps = [audit_gap(rng.multinomial(2000, SHARES), 0.25, seed) for seed in range(400)]
    point_fails = np.mean([g.value < 0.8 for g in gaps])
    interval_fails = np.mean([g.high < 0.8 for g in gaps])
    assert point_fails > 0.9
    assert interval_fails <= 0.05
    assert np.mean([g.high >= 1.0 for g in gaps]) >= 0.93, "the truth, a ratio of 1, must lie in 95 % of the intervals"


def test_an_unfair_model_fails():
    rows = np.round(10_000 * SHARES).astype(int)
    chance = np.where(np.arange(8) == 1, 0.12, 0.25)
    assert np.mean([audit_gap(rows, chance, seed).high < 0.8 for seed in range(100)]) > 0.95


@pytest.mark.parametrize(("chance", "rows"), [((0.25, 0.2), (500, 300)), ((0.3, 0.1), (2000, 1000)), ((0.3, 0.25, 0.2, 0.1), (800, 400, 200, 100))])
def test_the_true_ratio_and_difference_lie_in_their_intervals(chance, rows):
    chance, rows, rng = np.array(chance), np.array(rows), np.random.default_rng(3)
    inside = np.zeros((400, 2), dtype=bool)
    for i in range(400):
        hits = rng.binomial(rows, chance)
        limits = rate_limits(hits, rows, worst_pair_z(hits, rows, seed=i))
        ratio, difference = gap_ratio(hits / rows, *limits), gap_difference(hits / rows, *limits)
        inside[i] = ratio.low <= chance.min() / chance.max() <= ratio.high, difference.low <= np.ptp(chance) <= difference.high
    assert (inside.mean(axis=0) >= 0.93).all()


@given(npst.arrays(np.int64, st.integers(2, 7), elements=st.integers(0, 400)), st.data())
def test_an_interval_holds_its_own_value(rows, data):
    hits = np.array([data.draw(st.integers(0, int(n))) for n in rows])
    limits = rate_limits(hits, rows, 2.5)
    value = np.where(rows > 0, hits / np.maximum(rows, 1), np.nan)
    ratio, difference = gap_ratio(value, *limits), gap_difference(value, *limits)
    assert 0 <= ratio.low <= ratio.high <= 1
    if not np.isnan(ratio.value):
        assert ratio.low - 1e-9 <= ratio.value <= ratio.high + 1e-9
    if not np.isnan(difference.value):
        assert difference.low - 1e-9 <= difference.value <= difference.high + 1e-9


def test_three_rows_cannot_convict_nor_acquit():
    for hits in (0, 1, 3):
        k, n = np.array([250, 240, hits]), np.array([1000, 1000, 3])
        gap = gap_ratio(k / n, *rate_limits(k, n, worst_pair_z(k, n)))
        assert gap.low < 0.8 < gap.high


def test_a_group_without_rows_leaves_the_value_and_opens_the_interval():
    k, n = np.array([250, 240, 0]), np.array([1000, 1000, 0])
    value = np.array([0.25, 0.24, np.nan])
    gap = gap_ratio(value, *rate_limits(k, n))
    assert gap.value == pytest.approx(0.96)
    assert gap.low < 0.3 and gap.high > 0.8


def test_one_group_has_no_gap():
    assert np.isnan(gap_ratio(np.array([0.3]), np.array([0.2]), np.array([0.4])).value)
    assert np.isnan(gap_difference(np.array([0.3]), np.array([0.2]), np.array([0.4])).value)
