"""Drift of inputs, of predictions and of what they mean: silent where nothing moved, and right about what did."""

from __future__ import annotations

import csv
from pathlib import Path

import drifting
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from ekiben.columns import Columns
from ekiben.monitor.concept import compare_labels, merge_bins, residual_drift
from ekiben.monitor.counting import Binner, Counts, count_columns
from ekiben.monitor.drift import ColumnDrift, Floor, compare_window, holm
from ekiben.monitor.labels import label_columns
from ekiben.monitor.onset import onset
from ekiben.monitor.twosample import distance_of, level_test, shape_test, share_p_values, shift_test
from ekiben.profile import ColumnProfile, Profile, profile_column, profile_of
from ekiben.records import Field, Schema
from ekiben.reference import Reference, reference_of

HISTOGRAMS = st.integers(2, 30).flatmap(
    lambda k: st.tuples(*[st.lists(st.integers(0, 500), min_size=k, max_size=k).map(np.array) for _ in range(2)])
)


def named(found: list[ColumnDrift]) -> list[str]:
    """Return the columns that drift."""
    return [d.column for d in found if d.is_drifting]


@pytest.fixture(scope="module")
def worlds() -> list[tuple[Profile, Reference]]:
    return [drifting.world(seed) for seed in range(4)]


# ---- no drift, no alarm


def test_windows_of_real_rows_without_drift_name_nothing(worlds) -> None:
    false = concept = 0
    for number in range(60):
        profile, reference = worlds[number % 4]
        c = drifting.draw(2_000, 100 + number)
        said, y = drifting.say(c), drifting.happen(c, 100 + number)
        false += bool(named(compare_window(profile, count_columns(profile, c, said))))
        labelled = label_columns(reference, profile, c, y, said)
        concept += any(d.is_drifting for d in (*residual_drift(reference, labelled, profile), *compare_labels(reference, labelled)))
    assert false == 0
    assert concept <= 1  # half a percent is expected: two of sixty come in one of thirty such tests


def test_drawn_counts_without_drift_name_nothing_in_ninety_nine_of_a_hundred_windows() -> None:
    """As many windows as a year has days, drawn as counts: both samples new each time, of shapes that are hard to test."""
    rng = np.random.default_rng(0)
    shapes = [np.full(20, 0.05), drifting.ZIPF / drifting.ZIPF.sum(), np.array([0.97, 0.03]), np.array([0.001, 0.999]), rng.dirichlet(np.ones(22))]
    kinds = ["number", "category", "flag", "flag", "number"]
    false = 0
    for _ in range(365):
        columns, counts = [], Counts(np.array([2_000]))
        for i in range(20):
            p, kind = shapes[i % 5], kinds[i % 5]
            p = np.array([0.0, *p, 0.0]) if kind == "number" else p  # nothing lies below the least or above the largest
            gone = [0.0, 0.001, 0.3][i % 3]
            before, now = (rng.multinomial(n, [*(p * (1 - gone)), gone]) for n in (10_000, 2_000))
            names = tuple(f"level {j}" for j in range(len(p))) if kind == "category" else ()
            own = [*before[:-1], 0] if kind == "category" else [*before[:-1]]
            cuts = tuple(float(j) for j in range(len(p) - 1)) if kind != "category" else ()
            facts = {"cuts": cuts, "levels": names, "counts": tuple(map(int, own)), "distinct": len(names), "mean": 10.0, "std": 5.0}
            columns.append(ColumnProfile(name=f"c{i}", kind=kind, rows=10_000, missing=int(before[-1]), **facts))
            counts.bins[f"c{i}"] = np.array([[*now[:-1], *([0] if kind == "category" else []), now[-1]]])
        false += bool(named(compare_window(Profile(rows=10_000, columns=tuple(columns)), counts)))
    assert false <= 3


def test_a_trifle_in_a_million_rows_is_not_named_and_the_floor_can_be_set() -> None:
    profile = profile_of(Columns({"x": np.random.default_rng(0).normal(size=1_000_000)}))
    moved = count_columns(profile, {"x": np.random.default_rng(1).normal(0.02, 1, 1_000_000)})
    [quiet] = compare_window(profile, moved)
    assert quiet.p_value < 1e-12 and not quiet.is_drifting and quiet.size < quiet.floor
    assert named(compare_window(profile, moved, floor=Floor(shape=0.005))) == ["x"]


def test_time_moves_on_and_is_named_only_when_it_is_missing() -> None:
    day = np.timedelta64(86_400_000_000, "us")
    first = np.datetime64("2024-01-01", "us")
    profile = profile_of(Columns({"at": first + np.arange(1000) * day}))
    later = count_columns(profile, Columns({"at": first + np.arange(5000, 6000) * day}))
    assert named(compare_window(profile, later)) == ["at"]
    when = Field(name="at", kind="date", role="time")
    assert named(compare_window(profile, later, fields=[when])) == []
    gone = count_columns(profile, Columns({"at": np.full(1000, np.datetime64("NaT", "us"))}))
    [found] = compare_window(profile, gone, fields=[when])
    assert found.is_drifting and found.test == "missing" and found.where == '"at" IS NULL'


def test_columns_can_be_measured_without_being_named(worlds) -> None:
    profile, _ = worlds[0]
    counts = count_columns(profile, drifting.draw(2_000, 1, shift=1.0))
    assert "balance" in named(compare_window(profile, counts))
    found = compare_window(profile, counts, ignore=["balance"])
    assert "balance" not in named(found)
    assert next(d for d in found if d.column == "balance").distance > 0.8


# ---- drift is found, and named rightly


@pytest.mark.parametrize(
    ("how", "column", "test"),
    [({"shift": 0.25}, "balance", "shift"), ({"doubled": True}, "job", "level"), ({"gone": True}, "income", "missing")],
)
def test_a_known_drift_is_found_in_the_first_windows_and_the_right_column_is_named_first(worlds, how, column, test) -> None:
    for number in range(8):
        profile, _ = worlds[number % 4]
        two = []
        for window in range(2):
            c = drifting.draw(2_000, 5_000 + 10 * number + window, **how)
            two.append(compare_window(profile, count_columns(profile, c, drifting.say(c))))
        first = next(found[0] for found in two if named(found))
        assert (first.column, first.test) == (column, test)
        allowed = {column, "prediction"}  # the model looks at `balance`
        assert all(set(named(found)) <= allowed for found in two)


def test_what_balance_means_has_turned_while_every_input_looks_as_before(worlds) -> None:
    for number in range(6):
        profile, reference = worlds[number % 4]
        c = drifting.draw(2_000, 7_000 + number)
        y, said = drifting.happen(c, 7_000 + number, turned=True), drifting.say(c)
        first = residual_drift(reference, label_columns(reference, profile, c, y, said), profile)[0]
        assert first.column == "balance" and first.is_drifting
        assert '"balance"' in first.where and "truth minus prediction moved" in first.says
        assert named(compare_window(profile, count_columns(profile, c, said))) == []


def test_concept_drift_of_the_simulated_credit_names_what_stopped_to_matter() -> None:
    from ekiben.data.credit import simulate_credit
    from ekiben.encoding import fit_preprocessor
    from ekiben.fitting import fit_lightgbm

    table = simulate_credit("simulated:credit?rows=20000&drift=concept&from_day=584&days=730")
    names = ["age", "income", "employment", "purpose", "amount", "months", "history_years", "past_defaults", "open_loans", "homeowner"]
    c = Columns.from_arrow(table.select(names))
    y = np.array([label == "yes" for label in table["default"].to_pylist()], dtype=np.int64)
    changed = 20_000 * 584 // 730
    train, held = slice(0, 10_000), slice(10_000, changed - 2_000)
    preprocessor = fit_preprocessor(c.rows(train))
    X = preprocessor.transform(c)
    model = fit_lightgbm(X[train], y[train], task="binary", n_classes=2, params={}, rounds=60, categorical=preprocessor.categorical)
    said = model.predict(X)
    fields = tuple(Field(name=name, kind=c.kinds[name]) for name in names)
    schema = Schema(fields=fields, task="binary", target="default", classes=("no", "yes"))
    profile = profile_of(c.rows(train)).with_predictions(said[held])
    reference = reference_of(schema, profile, c.rows(held), y[held], said[held], said[held] >= 0.5)

    def look(first: int):
        rows = slice(first, first + 2_000)
        labelled = label_columns(reference, profile, c.rows(rows), y[rows], said[rows])
        return residual_drift(reference, labelled, profile), compare_window(profile, count_columns(profile, c.rows(rows), said[rows]))

    about, inputs = look(changed - 2_000)
    assert not any(d.is_drifting for d in about) and named(inputs) == []
    about, inputs = look(changed)
    assert about[0].column == "past_defaults" and about[0].is_drifting
    assert named(inputs) == []


def test_vicprice_is_silent_until_it_begins_to_vary_and_named_in_every_window_after(shared_data: Path) -> None:
    with (shared_data / "electricity" / "elec.csv").open() as file:
        rows = list(csv.DictReader(file))
    table = {name: np.array([float(row[name]) for row in rows]) for name in rows[0] if name != "class"}
    profile = profile_of(Columns({name: values[:10_000] for name, values in table.items()}))
    others, begins = set(), 17_424
    for first in range(10_000, len(rows) - 1_000, 1_000):
        window = count_columns(profile, Columns({name: values[first : first + 1_000] for name, values in table.items()}))
        found = {d.column: d for d in compare_window(profile, window)}
        assert found["vicprice"].is_drifting == (first + 1_000 > begins + 50), first
        if first + 1_000 <= begins:
            others |= set(named(list(found.values())))
    assert others  # other columns do move earlier
    assert found["vicprice"].test == "range" and found["vicprice"].outside == 1.0 and found["vicprice"].distance <= 1


def test_a_category_that_training_never_saw_is_named_and_a_rare_new_one_is_not() -> None:
    rng = np.random.default_rng(0)
    profile = profile_of(Columns({"c": rng.choice(["a", "b"], 5_000).astype(object)}))

    def window(new: int):
        values = np.array(["new"] * new + ["a"] * (1000 - new // 2) + ["b"] * (1000 - new + new // 2), dtype=object)
        return compare_window(profile, count_columns(profile, Columns({"c": values})))[0]

    assert not window(1).is_drifting
    found = window(100)
    assert found.is_drifting and found.unseen == 0.05
    known = Field(name="c", kind="category", categories=("a", "b", "new"))
    values = Columns({"c": np.array(["new", "a"], dtype=object)})
    assert count_columns(profile, values, fields=[known]).unseen["c"].tolist() == [0]


def test_a_window_without_rows_or_a_profile_of_nothing_says_nothing() -> None:
    profile = profile_of(Columns({"x": np.array([1.0, 2.0]), "c": np.array(["a", None], dtype=object)}, {"c": "category"}))
    assert named(compare_window(profile, Counts(np.zeros(1, dtype=np.int64), {n: np.zeros((1, len(profile[n].counts) + 1), dtype=np.int64) for n in ("x", "c")}))) == []
    empty = profile_of(Columns({"x": np.zeros(0)}))
    assert named(compare_window(empty, count_columns(empty, {"x": np.arange(50.0)}))) == []
    gone = profile_of(Columns({"x": np.full(100, np.nan)}))
    assert named(compare_window(gone, count_columns(gone, {"x": np.full(100, np.nan)}))) == []
    assert named(compare_window(gone, count_columns(gone, {"x": np.arange(100.0)}))) == ["x"]


def test_what_is_found_can_be_written_as_json_whatever_the_columns(worlds) -> None:
    profile, _ = worlds[0]
    c = drifting.draw(300, 3, shift=3.0, gone=True)
    for d in compare_window(profile, count_columns(profile, c, drifting.say(c))):
        assert ColumnDrift.from_json(d.to_json()) == d
        assert np.isfinite([d.statistic, d.p_value, d.psi, d.distance]).all()


# ---- the tests themselves


@settings(deadline=None, max_examples=200)
@given(HISTOGRAMS)
def test_every_p_value_is_one_and_two_equal_histograms_are_alike(pair) -> None:
    before, now = pair
    for test in (shape_test, shift_test, level_test):
        found = test(before, now)
        assert 0 <= found.p_value <= 1 and 0 <= found.size <= 1 and np.isfinite(found.statistic)
        same = test(before, before)
        assert same.p_value > 0.99 and same.size == pytest.approx(0, abs=1e-9)


@settings(deadline=None, max_examples=100)
@given(st.integers(0, 60), st.integers(0, 300))
def test_the_test_of_a_share_is_never_far_bolder_than_the_exact_one(hits: int, before: int) -> None:
    ours = float(share_p_values(np.array(hits), 2_000, np.array(before), 10_000))
    exact = stats.fisher_exact([[hits, 2_000 - hits], [before, 10_000 - before]])[1]
    assert ours >= 0.5 * exact or ours > 0.3


def test_the_share_test_is_symmetric_in_the_rare_and_the_common_side() -> None:
    one = share_p_values(np.array([30]), 2_000, np.array([80]), 10_000)
    other = share_p_values(np.array([1_970]), 2_000, np.array([9_920]), 10_000)
    assert one == pytest.approx(other)


def test_the_shape_is_scipys_chi_squared_where_no_bin_is_small() -> None:
    before, now = np.array([500, 300, 200, 400]), np.array([130, 60, 40, 90])
    expected = stats.chi2_contingency([before, now], correction=False)
    found = shape_test(before, now)
    assert found.statistic == pytest.approx(expected.statistic) and found.p_value == pytest.approx(expected.pvalue)


@pytest.mark.parametrize("moved", [0.0, 0.1, 0.3])
def test_a_shift_at_the_cuts_is_never_larger_than_on_the_raw_rows(moved: float) -> None:
    rng = np.random.default_rng(4)
    before, now = rng.gamma(2, 1, 5_000), rng.gamma(2, 1, 1_000) + moved
    column = profile_column("x", before, "number")
    binned, raw = shift_test(np.array(column.counts), column.count(now)[:-1]), stats.ks_2samp(before, now)
    assert binned.size <= raw.statistic + 1e-12
    assert binned.size > 0.8 * raw.statistic
    assert distance_of(column, column.count(now), float(now.mean())) * column.std == pytest.approx(
        stats.wasserstein_distance(before, now), rel=0.25, abs=0.02
    )


def test_holm_is_statsmodels_rule_by_hand() -> None:
    corrected = holm({("a", "x"): 0.01, ("b", "x"): 0.04, ("c", "x"): 0.03})
    assert corrected == {("a", "x"): pytest.approx(0.03), ("c", "x"): pytest.approx(0.06), ("b", "x"): pytest.approx(0.06)}
    assert holm({}) == {}


@settings(deadline=None, max_examples=200)
@given(st.lists(st.integers(0, 60), min_size=1, max_size=30), st.data())
def test_merged_bins_have_enough_rows_or_are_one(rows: list[int], data) -> None:
    before = data.draw(st.lists(st.integers(0, 60), min_size=len(rows), max_size=len(rows)))
    group = merge_bins(np.array(rows), np.array(before), 20)
    assert (np.diff(group) >= 0).all() and group[0] == 0 and (np.diff(group) <= 1).all()
    if group[-1] > 0:
        assert np.bincount(group, rows).min() >= 20 and np.bincount(group, before).min() >= 20


@pytest.mark.parametrize("block", [0, 1, 12, 23])
def test_the_block_at_which_a_column_moved_is_found(block: int) -> None:
    rng = np.random.default_rng(block)
    p, q = np.full(20, 0.05), np.linspace(0.02, 0.08, 20)
    blocks = np.vstack([rng.multinomial(400, q if i >= block else p) for i in range(24)])
    blocks[3] = 0 if block != 3 else blocks[3]  # an hour without traffic
    assert abs(onset(np.full(20, 500), blocks) - block) <= 1


# ---- counting


@settings(deadline=None, max_examples=50)
@given(st.lists(st.one_of(st.none(), st.sampled_from(["a", "b", "new", "", "ä"])), max_size=50))
def test_texts_are_counted_as_the_profile_counts_them(values: list[str | None]) -> None:
    import pyarrow as pa

    column = profile_column("c", np.array(["a", "b", "b", None], dtype=object), "category")
    array, binner = np.array(values, dtype=object), Binner(column)
    expected = column.count(array).tolist()
    for given_as in (array, pa.array(values, pa.string()), pa.array(values, pa.string()).dictionary_encode()):
        assert np.bincount(binner.place(given_as).bins, minlength=binner.size).tolist() == expected
    assert np.bincount(column.place(array), minlength=binner.size).tolist() == expected


@settings(deadline=None, max_examples=50)
@given(st.lists(st.floats(allow_nan=True, allow_infinity=False, width=32), min_size=1, max_size=80), st.sampled_from([3, 20, 200]))
def test_numbers_are_counted_as_the_profile_counts_them(values: list[float], bins: int) -> None:
    array = np.array(values)
    column = profile_column("x", array[::2], "number", bins=bins)
    binner = Binner(column)
    assert np.bincount(binner.place(array).bins, minlength=binner.size).tolist() == column.count(array).tolist()
    assert np.bincount(column.place(array), minlength=binner.size).tolist() == column.count(array).tolist()


def test_blocks_add_up_and_means_are_kept(worlds) -> None:
    profile, _ = worlds[0]
    c = drifting.draw(1_000, 5)
    whole, parts = count_columns(profile, c), count_columns(profile, c, blocks=7)
    assert parts.rows.sum() == 1_000 and len(parts.rows) == 7
    for name in whole.bins:
        assert (parts.of(name) == whole.of(name)).all() and (whole.of(name) == profile[name].count(c[name])).all()
    assert parts.sums["age"].sum(axis=0) == pytest.approx(whole.sums["age"][0])
    assert profile["age"].mean + whole.sums["age"][0, 0] / 1_000 == pytest.approx(c["age"].mean())
    assert parts.between(0, 3).total == int(parts.rows[:3].sum())
