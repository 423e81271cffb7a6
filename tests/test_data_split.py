"""Splits and folds: disjoint, exhaustive, never sharing a group, never seeing the future."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from ekiben.columns import Columns
from ekiben.data.split import SplitMethod, assign_folds, fold_pairs, is_ordered, split_method, split_rows
from ekiben.errors import DataError
from ekiben.records import Field, Schema, Task


def schema_for(task: Task = "binary", time: bool = False, group: bool = False) -> Schema:
    fields = [Field(name="y", kind="number", role="target", is_input=False)]
    fields += [Field(name="t", kind="date", role="time")] if time else []
    fields += [Field(name="g", kind="category", role="group", is_input=False)] if group else []
    return Schema(fields=tuple(fields), task=task, target="y", classes=("0", "1") if task == "binary" else ())


def table_of(y: np.ndarray, days: np.ndarray | None = None, groups: np.ndarray | None = None) -> Columns:
    values = {"y": y.astype(float)}
    if days is not None:
        values["t"] = np.datetime64("2026-01-01", "us") + days * np.timedelta64(1, "D")
    if groups is not None:
        values["g"] = groups
    return Columns(values)


labels = st.lists(st.integers(0, 1), min_size=20, max_size=120).map(np.array)


@given(labels, st.floats(0.05, 0.6), st.integers(0, 5))
def test_a_stratified_split_is_exhaustive_disjoint_and_keeps_the_shares(y: np.ndarray, share: float, seed: int) -> None:
    assume(min(np.bincount(y, minlength=2)) >= 2)
    train, test, _ = split_rows(table_of(y), schema_for(), y, method="stratified", test_size=share, seed=seed)
    assert sorted([*train, *test]) == list(range(len(y)))
    for label in (0, 1):
        assert abs((y[test] == label).sum() - share * (y == label).sum()) <= 1


@given(st.lists(st.integers(0, 12), min_size=20, max_size=100).map(np.array), st.integers(0, 3))
def test_a_group_split_never_shares_a_group(groups: np.ndarray, seed: int) -> None:
    assume(len(np.unique(groups)) >= 5)
    names = np.array([None if g == 0 else f"g{g}" for g in groups], dtype=object)
    columns, schema, y = table_of(groups % 2, groups=names), schema_for(group=True), groups % 2
    train, test, _ = split_rows(columns, schema, y, method="group", test_size=0.3, seed=seed)
    assert sorted([*train, *test]) == list(range(len(y)))
    assert not set(groups[train]) & set(groups[test])
    fold = assign_folds(columns, schema, y, method="group", folds=5, seed=seed)
    assert set(fold) == set(range(5))
    assert all(len(set(fold[groups == g])) == 1 for g in np.unique(groups))


@given(st.lists(st.integers(0, 60), min_size=30, max_size=120).map(np.array), st.integers(2, 4))
def test_a_split_by_time_respects_the_order_and_keeps_a_moment_together(days: np.ndarray, folds: int) -> None:
    assume(len(np.unique(days)) >= 25)
    columns, schema, y = table_of(days % 2, days), schema_for(time=True), days % 2
    train, test, _ = split_rows(columns, schema, y, method="time", test_size=0.25)
    assert sorted([*train, *test]) == list(range(len(y)))
    assert days[train].max() < days[test].min()
    try:
        fold = assign_folds(columns, schema, y, method="time", folds=folds)
    except DataError as exc:
        assert "too few" in str(exc)
        return
    assert set(fold) == set(range(-1, folds))
    assert is_ordered(fold)
    for train, valid in fold_pairs(fold):
        assert days[train].max() < days[valid].min()


@given(labels, st.integers(2, 6), st.integers(0, 3))
def test_stratified_folds_differ_by_one_row_at_most_in_each_class(y: np.ndarray, folds: int, seed: int) -> None:
    fold = assign_folds(table_of(y), schema_for(), y, method="stratified", folds=folds, seed=seed)
    for label in np.unique(y):
        counts = np.bincount(fold[y == label], minlength=folds)
        assert counts.max() - counts.min() <= 1
    assert np.ptp(np.bincount(fold, minlength=folds)) <= 1


@given(st.lists(st.integers(-1, 4), min_size=5, max_size=60).map(np.array), st.booleans())
def test_fold_pairs_are_disjoint_and_validate_every_row_once(fold: np.ndarray, ordered: bool) -> None:
    assume(fold.max() >= 0)
    pairs = fold_pairs(fold.astype(float), ordered)
    assert len(pairs) == fold.max() + 1
    assert sorted(i for _, valid in pairs for i in valid) == np.flatnonzero(fold >= 0).tolist()
    for j, (train, valid) in enumerate(pairs):
        assert not set(train) & set(valid)
        assert set(train) == set(np.flatnonzero(fold < j if ordered else fold != j))


@pytest.mark.parametrize("method", ["stratified", "group"])
def test_the_seed_decides(method: SplitMethod) -> None:
    random = np.random.default_rng(0)
    y, groups = random.integers(0, 2, 500), random.integers(0, 60, 500)
    columns = table_of(y, groups=groups.astype(str).astype(object))
    schema = schema_for(group=True)

    def split(seed: int) -> list[int]:
        return split_rows(columns, schema, y, method=method, seed=seed)[1].tolist()

    assert split(1) == split(1) != split(2)


def test_a_regression_target_is_spread_over_both_sides() -> None:
    y = np.arange(1000.0)
    _, test, _ = split_rows(table_of(y), schema_for("regression"), y, method="stratified", test_size=0.2)
    assert np.bincount((y[test] // 100).astype(int)).tolist() == [20] * 10


def test_auto_follows_file_then_time_then_group() -> None:
    def method(test: str = "", split: str = "auto", **has: bool) -> str:
        return split_method(schema_for(**has), SimpleNamespace(split=split, test=test))

    assert method("t.csv", time=True) == "file"
    assert method(time=True, group=True) == "time"
    assert method(group=True) == "group"
    assert method() == "stratified"
    assert method(split="stratified", time=True) == "stratified"
    with pytest.raises(DataError, match=r"split = time needs `time = COLUMN` under \[columns\]"):
        method(split="time")
    with pytest.raises(DataError, match=r"split = file needs `test = FILE`"):
        method(split="file")


def test_a_split_that_leaves_a_side_empty_is_refused() -> None:
    y = np.array([0, 1] * 10)
    with pytest.raises(DataError, match="one side would be empty"):
        split_rows(table_of(y, np.zeros(20, dtype=int)), schema_for(time=True), y, method="time")
    with pytest.raises(DataError, match="too few for 5 folds"):
        assign_folds(table_of(y, np.arange(20) // 5), schema_for(time=True), y, method="time", folds=5)
    groups = np.array(["a", "b"] * 10, dtype=object)
    with pytest.raises(DataError, match="2 groups, too few for 5 folds"):
        assign_folds(table_of(y, groups=groups), schema_for(group=True), y, method="group", folds=5)


def test_a_missing_time_is_named() -> None:
    y = np.array([0, 1] * 10)
    columns = table_of(y, np.arange(20))
    moments = columns["t"].copy()
    moments[7] = np.datetime64("NaT")
    with pytest.raises(DataError, match="`t` is missing in row 7"):
        split_rows(columns.with_columns(t=moments), schema_for(time=True), y, method="time")


def test_folds_of_a_given_file_follow_the_group_or_the_time() -> None:
    y = np.array([0, 1] * 50)
    groups = np.array([f"g{i % 10}" for i in range(100)], dtype=object)
    fold = assign_folds(table_of(y, groups=groups), schema_for(group=True), y, method="file", folds=5)
    assert all(len(set(fold[groups == g])) == 1 for g in set(groups))
    assert (assign_folds(table_of(y, np.arange(100)), schema_for(time=True), y, method="file") == -1).any()
