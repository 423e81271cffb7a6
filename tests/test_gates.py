"""Gates: their lines, and the verdicts on what was measured."""

from __future__ import annotations

import math

import pytest
from hypothesis import assume, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from ekiben.errors import SettingsError
from ekiben.gates import METRICS, Gate, check_gates, judge, parse_gates
from ekiben.records import Judgement, Measure

patient = hypothesis_settings(deadline=None)


def gate(line: str, *, blocking: bool = True) -> Gate:
    (one,) = parse_gates(line, blocking=blocking)
    return one


def auc(value: float, low: float | None = None, high: float | None = None, rows: int = 1000) -> Measure:
    return Measure(name="auc", value=value, low=low, high=high, rows=rows)


def test_a_line_is_taken_apart() -> None:
    text = "\nauc >= 0.90\n\n  demographic_parity_ratio[ sex ]>=.8\nequalized_odds_difference[sex * race] <= 1e-1"
    found = parse_gates(text, blocking=False, first_line=30)
    assert [(g.name, g.metric, g.slice, g.op, g.limit) for g in found] == [
        ("auc >= 0.90", "auc", "", ">=", 0.9),
        ("demographic_parity_ratio[sex] >= .8", "demographic_parity_ratio", "sex", ">=", 0.8),
        ("equalized_odds_difference[sex*race] <= 1e-1", "equalized_odds_difference", "sex*race", "<=", 0.1),
    ]
    assert [g.where for g in found] == ["settings.ini line 31", "settings.ini line 33", "settings.ini line 34"]
    assert not any(g.blocking for g in found)
    assert found[1].label == "demographic_parity_ratio[sex]"


def test_one_line_may_hold_several_and_a_feature_may_have_spaces_and_commas() -> None:
    found = parse_gates("auc >= 0.9, demographic_parity_ratio[marital status, now] >= 0.8", blocking=True)
    assert [g.slice for g in found] == ["", "marital status, now"]


def test_no_lines_are_no_gates() -> None:
    assert parse_gates("", blocking=True) == parse_gates("\n \n", blocking=True) == []


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("auk >= 0.9", "no metric `auk`; did you mean `auc`?"),
        ("AUC >= 0.9", "no metric `AUC`; did you mean `auc`?"),
        ("Log loss <= 0.9", "no metric `Log loss`; did you mean `log_loss`?"),
        ("auc >= 1.7", "`auc >= 1.7` can never be met: auc is from 0 to 1"),
        ("auc <= -0.1", "can never be met"),
        ("auc >= -1", "can never fail"),
        ("accuracy <= 2", "can never fail"),
        ("log_loss <= -1", "can never be met: log_loss is at least 0"),
        ("r2 >= 2", "can never be met: r2 is at most 1"),
        ("demographic_parity_ratio[sex] >= 80", "can never be met"),
        (
            "demographic_parity_ratio >= 0.8",
            "name the sensitive feature, such as `demographic_parity_ratio[sex] >= 0.8`",
        ),
        ("demographic_parity_ratio[] >= 0.8", "name the sensitive feature"),
        ("demographic_parity_ratio[sex*] >= 0.8", "name the sensitive feature"),
        ("accuracy[sex] >= 0.8", "takes no [feature]; `accuracy_ratio[sex]` compares its groups"),
        ("auc[] >= 0.8", "takes no [feature]"),
        ("auc > 0.9", "is not a gate"),
        ("auc = 0.9", "is not a gate"),
        ("auc == 0.9", "is not a gate"),
        ("auc => 0.9", "is not a gate"),
        ("0.9 <= auc", "is not a gate"),
        ("auc >= 90%", "is not a gate"),
        ("auc >= nan", "is not a gate"),
        ("auc >= inf", "is not a gate"),
        ("auc >=", "is not a gate"),
        (">= 0.9", "is not a gate"),
        ("auc", "is not a gate"),
        ("auc >= 0.9 # good", "is not a gate"),
        ("auc >= 0.9 >= 0.8", "is not a gate"),
    ],
)
def test_a_line_that_cannot_be_a_gate_names_itself(line: str, says: str) -> None:
    with pytest.raises(SettingsError) as refused:
        parse_gates(f"f1 >= 0.1\n\n{line}", blocking=True, first_line=30)
    assert str(refused.value).startswith("settings.ini line 32: ")
    assert says in str(refused.value)
    assert refused.value.line == 32


@pytest.mark.parametrize(
    ("first", "second", "says"),
    [
        ("auc >= 0.9", "auc >= 0.8", r"repeats `auc >= 0.9` \(settings.ini line 1\)"),
        ("auc >= 0.9", "auc <= 0.8", "cannot both be met"),
        (
            "demographic_parity_ratio[sex*race] >= 0.8",
            "demographic_parity_ratio[race*sex] >= 0.8",
            "repeats",
        ),
    ],
)
def test_gates_that_repeat_or_contradict_each_other_are_refused(first: str, second: str, says: str) -> None:
    with pytest.raises(SettingsError, match=f"settings.ini line 2: .*{says}"):
        parse_gates(f"{first}\n{second}", blocking=True)


def test_a_range_is_no_contradiction() -> None:
    assert len(parse_gates("selection_rate >= 0.1\nselection_rate <= 0.3", blocking=True)) == 2


def test_a_feature_must_be_declared_sensitive() -> None:
    found = parse_gates("\ndemographic_parity_ratio[sex*rase] >= 0.8", blocking=True, first_line=8)
    with pytest.raises(SettingsError, match=r"^settings.ini line 9: `rase` is not .* did you mean `race`\?$"):
        check_gates(found, sensitive=["sex", "race"])
    with pytest.raises(SettingsError, match="none is declared"):
        check_gates(found, sensitive=[])
    check_gates(found, sensitive=["sex", "rase"])


def test_a_metric_must_fit_the_task() -> None:
    with pytest.raises(SettingsError, match="`auc` is not measured for regression"):
        check_gates([gate("auc >= 0.9")], sensitive=[], task="regression")
    with pytest.raises(SettingsError, match="`r2` is not measured for binary"):
        check_gates([gate("r2 >= 0.9")], sensitive=[], task="binary")
    check_gates([gate("auc >= 0.9"), gate("r2 >= 0.9")], sensitive=[], task="")


@pytest.mark.parametrize("name", sorted(METRICS))
def test_every_metric_can_be_gated_and_watched(name: str) -> None:
    metric = METRICS[name]
    label = f"{name}[sex]" if metric.sliced else name
    limit = next(x for x in (0.5, metric.low, metric.high) if metric.low <= x <= metric.high)
    op = "<=" if metric.better == "lower" else ">="
    assert metric.low < metric.high
    assert metric.tasks <= {"binary", "multiclass", "regression"} and metric.tasks
    declared = gate(f"{label} {op} {limit}")
    on_limit = Measure(name=name, slice=declared.slice, value=limit)
    assert judge(declared, [on_limit]).verdict == "pass"


@pytest.mark.parametrize(
    ("line", "low", "high", "verdict"),
    [
        ("auc >= 0.9", 0.91, 0.93, "pass"),
        ("auc >= 0.9", 0.9, 0.93, "pass"),
        ("auc >= 0.9", 0.87, 0.89, "fail"),
        ("auc >= 0.9", 0.87, 0.9, "insufficient"),
        ("auc >= 0.9", 0.87, 0.93, "insufficient"),
        ("auc <= 0.9", 0.87, 0.9, "pass"),
        ("auc <= 0.9", 0.91, 0.93, "fail"),
        ("auc <= 0.9", 0.9, 0.93, "insufficient"),
        ("auc >= 0.9", 0.91, None, "pass"),
        ("auc >= 0.9", None, 0.89, "fail"),
        ("auc >= 0.9", None, 0.95, "insufficient"),
        ("auc <= 0.9", 0.85, None, "insufficient"),
    ],
)
def test_the_verdict_is_on_the_interval(line: str, low: float | None, high: float | None, verdict: str) -> None:
    assert judge(gate(line), [auc(0.91, low, high)]).verdict == verdict


@pytest.mark.parametrize(("value", "verdict"), [(0.9, "pass"), (0.8999, "fail")])
def test_without_an_interval_the_value_decides(value: float, verdict: str) -> None:
    judgement = judge(gate("auc >= 0.9"), [auc(value)])
    assert judgement.verdict == verdict
    assert (judgement.low, judgement.high) == (None, None)


def test_what_was_not_measured_is_insufficient_and_says_so() -> None:
    other = Measure(name="demographic_parity_ratio", slice="race", value=0.9)
    judgement = judge(gate("demographic_parity_ratio[sex] >= 0.8"), [auc(0.9), other])
    assert (judgement.verdict, judgement.value, judgement.note) == ("insufficient", None, "not measured")
    empty = Measure(name="demographic_parity_ratio", slice="sex", value=math.nan, note="no row of Other is positive")
    judgement = judge(gate("demographic_parity_ratio[sex] >= 0.8"), [empty])
    assert (judgement.verdict, judgement.value, judgement.note) == ("insufficient", None, "no row of Other is positive")
    assert judgement.rows_needed == 0


def test_a_judgement_carries_the_gate_and_the_figure() -> None:
    declared = gate("demographic_parity_ratio[race*sex] >= 0.8", blocking=False)
    figure = Measure(name="demographic_parity_ratio", slice="sex*race", value=0.5, low=0.4, high=0.6, note="3 rows")
    assert judge(declared, [figure]) == Judgement(
        name="demographic_parity_ratio[race*sex] >= 0.8",
        metric="demographic_parity_ratio",
        slice="race*sex",
        op=">=",
        limit=0.8,
        value=0.5,
        low=0.4,
        high=0.6,
        verdict="fail",
        blocking=False,
        note="3 rows",
    )


def test_rows_needed_follows_the_square_root_of_the_rows() -> None:
    assert judge(gate("auc >= 0.9"), [auc(0.91, 0.89, 0.93, rows=1000)]).rows_needed == pytest.approx(4000, abs=2)
    assert judge(gate("auc >= 0.9"), [auc(0.89, 0.86, 0.92, rows=1000)]).rows_needed == pytest.approx(9000, abs=2)
    assert judge(gate("auc <= 0.9"), [auc(0.89, 0.86, 0.92, rows=1000)]).rows_needed == pytest.approx(9000, abs=2)
    assert judge(gate("auc >= 0.9"), [auc(0.9, 0.88, 0.92, rows=1000)]).rows_needed == 0
    assert judge(gate("auc >= 0.9"), [auc(0.91, 0.89, 0.93, rows=0)]).rows_needed == 0
    assert judge(gate("auc >= 0.9"), [auc(0.95, 0.91, 0.97, rows=1000)]).rows_needed == 0


unit = st.floats(0, 1, allow_nan=False)
ops = st.sampled_from([">=", "<="])


def interval(value: float, below: float, above: float, rows: int = 1000) -> Measure:
    return auc(value, value - below, value + above, rows)


@patient
@given(unit, ops, unit, st.one_of(st.none(), unit), st.one_of(st.none(), unit))
def test_the_verdict_equals_asking_every_value_in_the_interval(
    limit: float, op: str, value: float, below: float | None, above: float | None
) -> None:
    figure = auc(value, None if below is None else value - below, None if above is None else value + above)
    ends = (
        [value]
        if below is None and above is None
        else [
            -math.inf if figure.low is None else figure.low,
            math.inf if figure.high is None else figure.high,
        ]
    )
    right = [end >= limit if op == ">=" else end <= limit for end in ends]
    naive = "pass" if all(right) else "insufficient" if any(right) else "fail"
    assert judge(Gate("x", "auc", "", op, limit, True), [figure]).verdict == naive


@patient
@given(unit, ops, unit, unit, unit, st.floats(-1, 1, allow_nan=False))
def test_a_stricter_limit_never_improves_the_verdict(
    limit: float, op: str, value: float, below: float, above: float, by: float
) -> None:
    order = {"fail": 0, "insufficient": 1, "pass": 2}
    stricter = limit + abs(by) if op == ">=" else limit - abs(by)
    figure = interval(value, below, above)
    before = judge(Gate("x", "auc", "", op, limit, True), [figure]).verdict
    after = judge(Gate("x", "auc", "", op, stricter, True), [figure]).verdict
    assert order[after] <= order[before]


@patient
@given(unit, ops, unit, unit, unit, st.integers(1, 10**6))
def test_as_many_rows_as_were_asked_for_do_decide(
    limit: float, op: str, value: float, below: float, above: float, rows: int
) -> None:
    declared = Gate("x", "auc", "", op, limit, True)
    judgement = judge(declared, [interval(value, below, above, rows)])
    assume(judgement.rows_needed)
    assert judgement.verdict == "insufficient"
    assert judgement.rows_needed > rows
    shrink = math.sqrt(rows / (judgement.rows_needed * 1.0001 + 1))
    later = judge(declared, [interval(value, below * shrink, above * shrink, judgement.rows_needed)])
    assert later.verdict == ("pass" if (value >= limit) == (op == ">=") else "fail")


@patient
@given(st.sampled_from(sorted(METRICS)), ops, st.floats(allow_nan=False, allow_infinity=False), st.booleans())
def test_a_gate_is_accepted_exactly_when_its_limit_is_in_the_metrics_range(
    name: str, op: str, limit: float, blocking: bool
) -> None:
    metric = METRICS[name]
    line = f"{name}[sex] {op} {limit!r}" if metric.sliced else f"{name} {op} {limit!r}"
    if metric.low <= limit <= metric.high:
        (found,) = parse_gates(line, blocking=blocking)
        assert (found.name, found.limit, found.op, found.blocking) == (line, limit, op, blocking)
        assert parse_gates(found.name, blocking=blocking) == [found]
    else:
        with pytest.raises(SettingsError, match="can never"):
            parse_gates(line, blocking=blocking)


@patient
@given(st.text())
def test_any_text_is_gates_or_a_settings_error_in_one_line(text: str) -> None:
    try:
        for found in parse_gates(text, blocking=True):
            assert found.metric in METRICS
    except SettingsError as exc:
        assert str(exc).startswith("settings.ini line ")
