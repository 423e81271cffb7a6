"""Fairness figures equal Fairlearn's, and do not depend on names or order."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ekiben.columns import Columns
from ekiben.errors import DataError
from ekiben.fairness import count_groups, fit_groupings, group_rows, group_table, measure_gaps
from ekiben.gates import Gate, judge

RATIO = Gate("demographic_parity_ratio[sex] >= 0.8", "demographic_parity_ratio", "sex", ">=", 0.8, True)


def people(n=3000, seed=0, groups=("A", "B", "C")):
    rng = np.random.default_rng(seed)
    who = np.array(groups, dtype=object)[rng.integers(0, len(groups), n)]
    y = (rng.random(n) < 0.3).astype(int)
    decision = (rng.random(n) < 0.2 + 0.4 * y + 0.1 * (who == groups[0])).astype(int)
    return y, decision, who


def by_name(measures, feature="sex"):
    return {m.name: m.value for m in measures if m.slice == feature}


@pytest.mark.parametrize("seed", range(3))
def test_point_values_are_fairlearns(seed):
    from fairlearn import metrics

    y, decision, who = people(seed=seed)
    ours = by_name(measure_gaps(y, decision, {"sex": who}, "binary"))
    names = (
        "demographic_parity_ratio", "demographic_parity_difference", "equalized_odds_ratio",
        "equalized_odds_difference", "equal_opportunity_difference",
    )  # fmt: skip
    for name in names:
        assert ours[name] == pytest.approx(getattr(metrics, name)(y, decision, sensitive_features=who)), name


def test_rates_of_each_group_are_fairlearns():
    from fairlearn.metrics import MetricFrame, false_positive_rate, selection_rate, true_positive_rate
    from sklearn.metrics import accuracy_score, precision_score

    y, decision, who = people()
    frame = MetricFrame(
        metrics={
            "selection_rate": selection_rate, "true_positive_rate": true_positive_rate, "precision": precision_score,
            "false_positive_rate": false_positive_rate, "accuracy": accuracy_score,
        },
        y_true=y, y_pred=decision, sensitive_features=who,
    )  # fmt: skip
    found = {(m.name, m.slice): m for m in group_table(y, decision, decision.astype(float), who, "binary")}
    for name in frame.by_group.columns:
        for group in frame.by_group.index:
            assert found[name, group].value == pytest.approx(frame.by_group.loc[group, name])
            assert found[name, group].low <= found[name, group].value <= found[name, group].high


def test_errors_of_each_group_are_fairlearns():
    from fairlearn.metrics import MetricFrame
    from sklearn.metrics import mean_absolute_error

    rng = np.random.default_rng(0)
    y, who = rng.normal(10, 3, 900), np.array(["a", "b", "c"] * 300, dtype=object)
    prediction = y + rng.normal(0, 1, 900) * np.where(who == "a", 2, 1)
    frame = MetricFrame(metrics=mean_absolute_error, y_true=y, y_pred=prediction, sensitive_features=who)
    gaps = {m.name: m for m in measure_gaps(y, prediction, {"sex": who}, "regression")}
    assert gaps["mae_ratio"].value == pytest.approx(frame.ratio())
    assert gaps["mae_ratio"].high < 0.7
    means = [prediction[who == g].mean() for g in "abc"]
    assert gaps["mean_prediction_difference"].value == pytest.approx(max(means) - min(means))
    table = {m.slice: m.value for m in group_table(y, prediction, prediction, who, "regression") if m.name == "mae"}
    assert table == pytest.approx(frame.by_group.to_dict())


def test_with_several_classes_the_worst_class_counts():
    from fairlearn.metrics import demographic_parity_ratio

    rng = np.random.default_rng(0)
    who = np.array(["a", "b"] * 1500, dtype=object)
    decision = np.where(rng.random(3000) < np.where(who == "a", 0.1, 0.4), 2, rng.integers(0, 2, 3000))
    y = rng.integers(0, 3, 3000)
    found = {m.name: m for m in measure_gaps(y, decision, {"sex": who}, "multiclass", classes=("x", "y", "z"))}
    each = [demographic_parity_ratio(y == c, decision == c, sensitive_features=who) for c in range(3)]
    assert found["demographic_parity_ratio"].value == pytest.approx(min(each))
    assert "worst class z" in found["demographic_parity_ratio"].note
    assert set(found) >= {"equalized_odds_difference", "accuracy_ratio"}


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 1000), st.permutations(["A", "B", "C"]))
def test_neither_row_order_nor_group_names_matter(seed, renamed):
    y, decision, who = people(400, seed)
    order = np.random.default_rng(seed).permutation(400)
    plain = measure_gaps(y, decision, {"sex": who}, "binary")
    shuffled = measure_gaps(y[order], decision[order], {"sex": who[order]}, "binary")
    assert [m.to_dict() for m in plain] == [m.to_dict() for m in shuffled]
    names = dict(zip("ABC", renamed, strict=True))
    other = measure_gaps(y, decision, {"sex": np.array([names[w] for w in who], dtype=object)}, "binary")
    for a, b in zip(plain, other, strict=True):
        assert b.value == pytest.approx(a.value)
        assert (b.low, b.high) == pytest.approx((a.low, a.high), abs=0.03)


def test_a_group_of_three_makes_the_verdict_insufficient_not_failed():
    rng = np.random.default_rng(0)
    who = np.array(["A", "B"] * 3000, dtype=object)
    y = (rng.random(6000) < 0.3).astype(int)
    decision = (rng.random(6000) < 0.3).astype(int)
    assert judge(RATIO, measure_gaps(y, decision, {"sex": who}, "binary")).verdict == "pass"
    who[:3], decision[:3] = "C", 0
    judged = judge(RATIO, measure_gaps(y, decision, {"sex": who}, "binary"))
    assert judged.value == 0 and judged.verdict == "insufficient"


def test_a_group_without_positives_does_not_make_equal_opportunity_fail():
    y, decision, who = people(6000, groups=("A", "B"))
    who[:40], y[:40] = "C", 0
    found = {m.name: m for m in measure_gaps(y, decision, {"sex": who}, "binary")}
    without = {m.name: m for m in measure_gaps(y[40:], decision[40:], {"sex": who[40:]}, "binary")}
    assert found["equal_opportunity_difference"].value == pytest.approx(without["equal_opportunity_difference"].value)
    assert found["equal_opportunity_difference"].high > without["equal_opportunity_difference"].high


def test_one_group_alone_has_no_gap_and_nobody_selected_has_none_to_judge():
    y, decision, who = people()
    assert measure_gaps(y, decision, {"sex": np.full(len(y), "A", dtype=object)}, "binary") == []
    judged = judge(RATIO, measure_gaps(y, np.zeros_like(y), {"sex": who}, "binary"))
    assert judged.verdict == "insufficient"


def test_missing_values_are_a_group_and_intersections_are_slices():
    columns = Columns(
        {"sex": np.array(["F", None, "M", "F"], dtype=object), "race": np.array(["x", "y", "x", None], dtype=object)},
        {"sex": "category", "race": "category"},
    )
    groups = group_rows(columns, fit_groupings(columns, ["sex", "race"]))
    assert groups["sex"].tolist() == ["F", "(missing)", "M", "F"]
    assert groups["sex*race"].tolist() == ["F, x", "(missing), y", "M, x", "F, (missing)"]


def test_a_sensitive_column_that_is_not_there_is_named():
    columns = Columns({"age": np.arange(3.0)}, {"age": "number"})
    with pytest.raises(DataError, match="`gender` is not in the table"):
        fit_groupings(columns, ["gender"])


def test_counts_add_up_to_the_rows():
    y, decision, who = people()
    counts = count_groups(y, decision, who)
    assert counts.names == ["A", "B", "C"]
    assert counts.cells.sum() == len(y)
    assert counts.cells[1, 1, 0] == ((who == "B") & (y == 1) & (decision == 0)).sum()
