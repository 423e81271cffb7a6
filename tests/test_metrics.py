"""Figures equal scikit-learn's, and intervals hold what they promise."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score

from ekiben.metrics import _statistics, calibration_bins, gains, mcnemar, point_values, quality
from ekiben.records import Measure
from ekiben.resampling import Bootstrap, auc_influence, auc_interval, percentiles, share_measure


def binary_rows(seed, n=400, sharp=2.0):
    rng = np.random.default_rng(seed)
    y = rng.integers(0, 2, n)
    y[:2] = 0, 1
    p = 1 / (1 + np.exp(-(sharp * (y - 0.5) + rng.normal(size=n))))
    return y, p, (p >= 0.5).astype(int)


def class_rows(seed, n=300, k=4):
    rng = np.random.default_rng(seed)
    y = rng.integers(0, k, n)
    y[:k] = np.arange(k)
    p = rng.dirichlet(np.ones(k), n) + np.eye(k)[y] * 0.3
    p /= p.sum(axis=1, keepdims=True)
    return y, p, p.argmax(axis=1)


def number_rows(seed, n=300):
    rng = np.random.default_rng(seed)
    y = rng.normal(100, 20, n)
    p = y + rng.normal(0, 5, n)
    return y, p, p


ROWS = {"binary": binary_rows, "multiclass": class_rows, "regression": number_rows}


@pytest.mark.parametrize("task", ROWS)
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_what_is_resampled_is_what_sklearn_measures(task, seed):
    y, p, d = ROWS[task](seed)
    boot = Bootstrap(len(y), resamples=1)
    statistics = _statistics(boot, y, p, d, task)
    means = boot.means()[0]
    expected = point_values(y, p, d, task)
    assert {s.name for s in statistics} == set(expected)
    for statistic in statistics:
        assert statistic.of(means) == pytest.approx(expected[statistic.name], abs=1e-9), statistic.name


@pytest.mark.parametrize("task", ROWS)
def test_every_figure_lies_in_its_interval_and_survives_json(task):
    y, p, d = ROWS[task](5)
    for measure in quality(y, p, d, task, resamples=500):
        assert measure.low <= measure.value <= measure.high, measure.name
        assert Measure.from_json(measure.to_json()) == measure


@pytest.mark.parametrize("task", ROWS)
def test_the_order_of_rows_does_not_change_a_figure(task):
    y, p, d = ROWS[task](6)
    order = np.random.default_rng(0).permutation(len(y))
    first, second = point_values(y, p, d, task), point_values(y[order], p[order], d[order], task)
    assert first == pytest.approx(second)


def test_the_same_seed_gives_the_same_intervals():
    rows = binary_rows(1, 6000)
    assert quality(*rows, "binary", seed=3) == quality(*rows, "binary", seed=3)
    assert quality(*rows, "binary", seed=3) != quality(*rows, "binary", seed=4)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.booleans(), st.integers(0, 6)), min_size=2, max_size=60).filter(lambda r: 0 < sum(a for a, _ in r) < len(r)))
def test_auc_with_ties_is_sklearns_and_influences_are_delongs(rows):
    y, score = np.array([a for a, _ in rows]), np.array([b / 6 for _, b in rows])
    auc, influence = auc_influence(y, score)
    assert auc == pytest.approx(roc_auc_score(y, score))
    assert influence.mean() == pytest.approx(0, abs=1e-9)
    wins = (score[y][:, None] > score[~y][None, :]) + 0.5 * (score[y][:, None] == score[~y][None, :])
    naive = np.mean((wins.mean(axis=1) - auc) ** 2) / y.sum() + np.mean((wins.mean(axis=0) - auc) ** 2) / (~y).sum()
    assert np.sum(influence**2) / len(y) ** 2 == pytest.approx(naive, abs=1e-12)


@pytest.mark.parametrize(("n", "shift"), [(40, 1.0), (200, 2.0), (60, 2.5)])
def test_the_auc_interval_covers_the_true_auc(n, shift):
    from statistics import NormalDist

    true, rng, covered = NormalDist().cdf(shift / np.sqrt(2)), np.random.default_rng(0), 0
    for _ in range(400):
        y = np.arange(n) < n // 4
        auc, influence = auc_influence(y, rng.normal(size=n) + shift * y)
        low, high = auc_interval(auc, influence, n // 4)
        covered += low <= true <= high
    assert covered >= 0.93 * 400


def test_five_perfectly_ranked_rows_do_not_prove_perfection():
    y = np.arange(36) < 5
    low, high = auc_interval(*auc_influence(y, y * 1.0), 5)
    assert 0.6 < low < 0.95 and high == 1.0


@pytest.mark.parametrize("name", ["f1", "balanced_accuracy", "precision", "calibration_error"])
def test_intervals_of_small_samples_cover_the_value_of_many_rows(name):
    true = next(m.value for m in quality(*binary_rows(99, 400_000), "binary", resamples=2) if m.name == name)
    found = [next(m for m in quality(*binary_rows(s, 80), "binary", resamples=200) if m.name == name) for s in range(100)]
    assert np.mean([m.low <= true <= m.high for m in found]) >= 0.9


def test_macro_f1_of_few_rows_covers_the_value_of_many_rows():
    true = point_values(*class_rows(99, 200_000), "multiclass")["f1"]
    found = [next(m for m in quality(*class_rows(s, 60), "multiclass", resamples=200) if m.name == "f1") for s in range(100)]
    assert np.mean([m.low <= true <= m.high for m in found]) >= 0.9


def test_blocks_of_rows_spread_like_rows():
    values = np.random.default_rng(0).gamma(0.5, size=60_000)
    boot = Bootstrap(len(values), resamples=4000)
    boot.add(values)
    assert boot.means()[1:, 0].std() == pytest.approx(values.std() / np.sqrt(len(values)), rel=0.05)
    assert boot.means()[0, 0] == pytest.approx(values.mean())


def test_a_perfect_score_is_not_certain():
    measure = share_measure("accuracy", np.ones(20, dtype=bool))
    assert measure.value == 1 and measure.high == 1 and 0.75 < measure.low < 0.9


def test_a_figure_that_the_rows_do_not_define_is_left_out():
    y, p = np.zeros(30, dtype=int), np.linspace(0, 0.4, 30)
    names = {m.name for m in quality(y, p, y, "binary", resamples=50)}
    assert not names & {"auc", "precision", "recall", "f1"} and {"accuracy", "log_loss"} <= names
    constant = np.full(30, 7.0)
    assert {m.name for m in quality(constant, constant + p, constant + p, "regression", resamples=50)} == {"mae", "rmse"}


def test_a_class_without_rows_is_named():
    y, p, d = class_rows(0)
    kept = y != 2
    found = {m.name: m for m in quality(y[kept], p[kept], d[kept], "multiclass", ("a", "b", "c", "d"), resamples=50)}
    assert "no rows of c" in found["auc"].note and np.isfinite(found["log_loss"].value)


def test_a_calibrated_model_is_not_called_miscalibrated():
    rng = np.random.default_rng(0)
    p = rng.random(3000)
    honest = {m.name: m for m in quality((rng.random(3000) < p) * 1, p, (p > 0.5) * 1, "binary")}["calibration_error"]
    boastful = {m.name: m for m in quality((rng.random(3000) < 0.7 * p) * 1, p, (p > 0.5) * 1, "binary")}["calibration_error"]
    assert honest.low < 0.01 and boastful.low > 0.1


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 20), min_size=1, max_size=80))
def test_equal_predictions_share_a_bin_and_bins_keep_the_order(values):
    p = np.array(values) / 20
    bins = calibration_bins(p)
    assert bins.min() >= 0 and bins.max() <= 9
    order = np.argsort(p, kind="stable")
    assert (np.diff(bins[order]) >= 0).all()
    assert all(len(set(bins[p == v])) == 1 for v in set(p))


@pytest.mark.parametrize("task", ROWS)
def test_a_model_gains_nothing_over_itself(task):
    y, p, d = ROWS[task](3)
    for measure in gains(y, (p, d), (p, d), task, resamples=100):
        assert [measure.value, measure.low, measure.high] == pytest.approx([0, 0, 0], abs=1e-12)


def test_a_gain_is_positive_when_ours_is_better_whichever_way_the_figure_runs():
    y, p, d = binary_rows(0, 3000, sharp=3.0)
    blurred = np.clip(p + np.random.default_rng(1).normal(0, 0.3, len(p)), 0.001, 0.999)
    found = {m.name: m for m in gains(y, (p, d), (blurred, (blurred >= 0.5) * 1), "binary")}
    assert all(found[f"{name}_gain"].low > 0 for name in ("auc", "accuracy", "log_loss", "brier"))
    assert "selection_rate_gain" not in found


def test_a_paired_gain_is_known_better_than_two_figures():
    y, p, d = binary_rows(0, 3000)
    near = np.clip(p + np.random.default_rng(1).normal(0, 0.02, len(p)), 0.001, 0.999)
    gain = next(m for m in gains(y, (p, d), (near, (near >= 0.5) * 1), "binary") if m.name == "auc_gain")
    auc = next(m for m in quality(y, p, d, "binary") if m.name == "auc")
    assert gain.high - gain.low < 0.3 * (auc.high - auc.low)


def test_mcnemar_counts_and_probability_by_hand():
    y = np.ones(10, dtype=int)
    ours, other = y.copy(), y.copy()
    other[:5] = 0
    assert mcnemar(y, ours, other) == (5, 0, pytest.approx(2 * 0.5**5))
    assert mcnemar(y, ours, ours) == (0, 0, 1.0)


def test_replicates_that_are_undefined_are_left_out():
    assert percentiles(np.array([np.nan, 1.0, 1.0])) == (1.0, 1.0)
