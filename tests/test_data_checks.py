"""Warnings, groups and fingerprints."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import csv, parquet

from ekiben.columns import Columns
from ekiben.data.checks import check_columns, check_duplicates, check_leaks
from ekiben.data.convert import to_columns
from ekiben.data.groups import MISSING_GROUP, OTHER_GROUP, bin_sensitive, fit_groups
from ekiben.data.infer import infer_fields
from ekiben.data.sources import read_table
from ekiben.data.table import fingerprint, target_of
from ekiben.records import Field, Schema, Task


def schema_of(columns: Columns, target: str, task: Task = "binary", classes: tuple[str, ...] = ("0", "1"), **roles: str) -> Schema:
    fields = tuple(
        Field(name=n, kind=k, role=roles.get(n, "target" if n == target else "feature"), is_input=n != target and n not in roles)  # type: ignore[arg-type]
        for n, k in columns.kinds.items()
    )
    return Schema(fields=fields, task=task, target=target, classes=() if task == "regression" else classes)


def test_a_single_feature_that_gives_a_class_away_is_named_and_honest_ones_are_not() -> None:
    random = np.random.default_rng(0)
    y = random.integers(0, 2, 2000)
    columns = Columns(
        {
            "honest": y + random.normal(0, 1.0, 2000),
            "status": np.array(["closed" if v else "open" for v in y], dtype=object),
            "interval": np.where(y == 1, random.uniform(3, 4, 2000), random.choice([random.uniform(0, 3), random.uniform(4, 9)], 2000)),
            "y": y.astype(float),
        }
    )
    found = check_leaks(columns, schema_of(columns, "y"), y)
    assert {w.columns for w in found} == {("status",), ("interval",)}
    assert all("AUC" in w.message and w.kind == "leak" for w in found)


def test_a_leak_is_seen_in_one_of_three_classes_too() -> None:
    y = np.random.default_rng(0).integers(0, 3, 1500)
    columns = Columns({"code": y * 10.0, "noise": np.random.default_rng(1).normal(size=1500), "y": y.astype(float)})
    schema = schema_of(columns, "y", "multiclass", ("0", "1", "2"))
    assert [w.columns for w in check_leaks(columns, schema, y)] == [("code",)]


def test_bike_sharings_leak_is_named(shared_data: Path) -> None:
    table = read_table(str(shared_data / "bike_sharing" / "hour.csv"))
    columns = to_columns(table, infer_fields(table))
    schema = schema_of(columns, "cnt", "regression", dteday="time", instant="id")
    found = check_leaks(columns, schema, target_of(columns, schema))
    assert [(w.kind, w.columns) for w in found] == [("leak", ("casual", "registered"))]
    without = columns.drop(["casual", "registered"])
    assert check_leaks(without, schema_of(without, "cnt", "regression"), target_of(columns, schema)) == []


def test_adult_has_no_leak(shared_data: Path) -> None:
    table = read_table(str(shared_data / "adult" / "train.csv"))
    columns = to_columns(table, infer_fields(table))
    schema = schema_of(columns, "income", classes=("<=50K", ">50K"))
    assert check_leaks(columns, schema, target_of(columns, schema)) == []


def test_constants_identifiers_missing_and_personal_columns_are_named() -> None:
    n = 200
    columns = Columns(
        {
            "always": np.full(n, 3.0),
            "nothing": np.full(n, None, dtype=object),
            "ticket": np.array([f"t{i}" for i in range(n)], dtype=object),
            "rare": np.where(np.arange(n) % 5 == 0, 1.0 * np.arange(n), np.nan),
            "contact": np.array([f"p{i % 7}@example.org" for i in range(n)], dtype=object),
            "phone": np.arange(n) % 9 * 1.0,
            "fine": np.arange(n) % 3 * 1.0,
            "y": np.arange(n) % 2 * 1.0,
        }
    )
    found = {(w.kind, *w.columns) for w in check_columns(columns, schema_of(columns, "y"))}
    assert found == {
        ("constant", "always"),
        ("constant", "nothing"),
        ("identifier", "ticket"),
        ("missing", "rare"),
        ("personal", "contact"),
        ("personal", "phone"),
    }
    private = schema_of(columns, "y", contact="private", phone="ignore", always="ignore")
    assert not {"contact", "phone", "always"} & {c for w in check_columns(columns, private) for c in w.columns}


def test_rows_on_both_sides_are_counted_whatever_their_identifier() -> None:
    columns = Columns(
        {
            "id": np.arange(6.0),
            "a": np.array([1, 2, np.nan, 4, 1, np.nan]),
            "b": np.array(["x", "y", None, "z", "x", None], dtype=object),
            "y": np.array([0, 1, 0, 1, 0, 1.0]),
        }
    )
    schema = schema_of(columns, "y", id="id")
    found = check_duplicates(columns.rows(slice(0, 4)), columns.rows(slice(4, 6)), schema)
    assert len(found) == 1 and found[0].message.startswith("1 of 2 held-out rows (50.0%)")
    assert check_duplicates(columns.rows(slice(0, 3)), columns.rows([3]), schema) == []


def test_ages_become_round_ranges_that_stay_the_same_on_other_rows() -> None:
    ages = np.random.default_rng(0).integers(17, 91, 5000).astype(float)
    grouping = fit_groups(ages, "number")
    assert all(float(e) % 5 == 0 for e in grouping.edges) and 4 <= len(grouping.levels) <= 9
    low, high = grouping.labels(np.array([0.0, 300.0]))
    assert (low, high) == (grouping.levels[0], grouping.levels[-1])
    assert grouping.labels(np.array([30.0]))[0] in ("30–39", "20–39", "30–44")
    assert grouping.labels(np.array([np.nan]))[0] == MISSING_GROUP
    assert type(grouping).from_json(grouping.to_json()) == grouping


def test_many_categories_are_pooled_and_few_are_left_alone() -> None:
    few = np.array(["f", "m", None, "f"], dtype=object)
    labels, note = bin_sensitive(few, "category")
    assert labels.tolist() == ["f", "m", MISSING_GROUP, "f"] and note == ""
    many = np.array([f"v{i % 5000}" for i in range(5000)] + ["v7"] * 50, dtype=object)
    labels, note = bin_sensitive(many, "category")
    assert len(set(labels)) == 12 and {"v7", OTHER_GROUP} <= set(labels)
    assert note == "5,000 values: the 11 most frequent kept, the rest pooled as Other"
    assert fit_groups(many, "category").labels(np.array(["new"], dtype=object))[0] == OTHER_GROUP


@settings(max_examples=80)
@given(st.lists(st.one_of(st.just(float("nan")), st.floats(-1e6, 1e6)), min_size=1, max_size=60).map(np.array))
def test_every_number_gets_one_of_the_groups_and_ranges_are_in_order(values: np.ndarray) -> None:
    grouping = fit_groups(values, "number")
    labels = grouping.labels(values)
    assert set(labels) <= {*grouping.levels, MISSING_GROUP}
    assert ((labels == MISSING_GROUP) == np.isnan(values)).all()
    if grouping.edges:
        order = [grouping.levels.index(label) for label in labels[np.argsort(values)] if label != MISSING_GROUP]
        assert order == sorted(order) and len(set(grouping.levels)) == len(grouping.levels)


def test_dates_become_years() -> None:
    births = np.array(["1960-05-01", "1985-01-01", "NaT", "2001-12-31"], dtype="datetime64[us]")
    assert bin_sensitive(births, "date")[0].tolist() == ["1960", "1985", MISSING_GROUP, "2001"]


def test_the_fingerprint_is_of_the_content_alone(tmp_path: Path) -> None:
    table = pa.table({"a": [1, None, 3], "b": ["x", None, "zä"], "c": [1.5, -0.0, None], "d": [True, None, False]})
    parquet.write_table(table, tmp_path / "t.parquet")
    csv.write_csv(table, tmp_path / "t.csv")
    packed = table.set_column(1, "b", table["b"].combine_chunks().dictionary_encode())
    chunked = pa.concat_tables([table.slice(i, 1) for i in range(3)])
    filled = table.set_column(2, "c", pa.array([1.5, 0.0, float("nan")]))
    prints = {
        fingerprint(t)
        for t in (table, packed, chunked, filled, read_table(str(tmp_path / "t.csv")), read_table(str(tmp_path / "t.parquet")))
    }
    assert len(prints) == 1


def test_any_change_of_the_content_changes_the_fingerprint() -> None:
    table = pa.table({"a": [1.0, 2.0], "b": ["xy", "z"]})
    others = [
        table.slice(1),
        table.take([1, 0]),
        table.select(["b", "a"]),
        table.rename_columns(["a", "c"]),
        pa.table({"a": [1.0, 2.5], "b": ["xy", "z"]}),
        pa.table({"a": [1.0, None], "b": ["xy", "z"]}),
        pa.table({"a": [1.0, 2.0], "b": ["x", "yz"]}),
        pa.table({"a": [1.0, 2.0], "b": ["xyz", ""]}),
        pa.table({"a": [1.0, 2.0], "b": ["xyz", None]}),
        pa.table({"a": ["1", "2"], "b": ["xy", "z"]}),
    ]
    assert len({fingerprint(t) for t in [table, *others]}) == len(others) + 1
